"""The running command, as it was typed."""

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
        """Keep the words before they are parsed."""
        ctx.meta[__name__] = (str(ctx.info_name), *args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run it; a command run from within it, as in the demo, has its own words."""
        token = _words.set(ctx.meta[__name__])
        try:
            return super().invoke(ctx)
        finally:
            _words.reset(token)


def command_line() -> str:
    """The command as typed, shell-quoted; options before its name are dropped, of torchrun's only the counts kept."""
    return shlex.join([*_program(), *_words.get()])


def _program() -> list[str]:
    """The program that started this process: growkit, or torchrun, recognized by its environment variables."""
    if "LOCAL_RANK" not in os.environ:
        return ["growkit"]
    here, everywhere = (int(os.environ.get(name, 1)) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    hosts = ["--nnodes", str(everywhere // here)] if everywhere > here else []
    # without the --, torchrun would take --run as its own option
    return ["torchrun", *hosts, "--nproc-per-node", str(here), "-m", "--", "growkit_cli"]
