"""The command that is at work, as it was typed."""

import os
import shlex
from contextvars import ContextVar
from typing import Any

import typer
from typer.core import TyperCommand

_words: ContextVar[tuple[str, ...]] = ContextVar("_words", default=())


class Typed(TyperCommand):
    """A command that keeps its words for `command_line`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Keep the words before they are taken apart."""
        ctx.meta[__name__] = (str(ctx.info_name), *args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run it; a command that it runs itself, as the demo does, has words of its own."""
        token = _words.set(ctx.meta[__name__])
        try:
            return super().invoke(ctx)
        finally:
            _words.reset(token)


def command_line() -> str:
    """Its words, quoted for a shell; options that stood before its name are left out, torchrun's but the numbers."""
    return shlex.join([*_program(), *_words.get()])


def _program() -> list[str]:
    """What starts the command as this process was started: growkit, or torchrun, which tells by the environment."""
    here, everywhere = (int(os.environ.get(name, 1)) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    if "LOCAL_RANK" not in os.environ:
        return ["growkit"]
    hosts = ["--nnodes", str(everywhere // here)] if everywhere > here else []
    # without the --, torchrun would take --run for its own
    return ["torchrun", *hosts, "--nproc-per-node", str(here), "-m", "--", "growkit_cli"]
