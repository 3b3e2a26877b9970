"""The growkit program: its commands, and one-line errors."""

import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import typer

from growkit import __version__
from growkit.errors import GrowkitError, Terminated, is_memory_full
from growkit_cli import (
    compare,
    demo,
    evaluate,
    export,
    finetune,
    grow,
    plan,
    report,
    sweep,
    train,
    verify,
)
from growkit_cli.guard import guarded, stoppable
from growkit_cli.processes import leave, speaks
from growkit_cli.streams import ready
from growkit_cli.typed import Typed

app = typer.Typer(
    name="growkit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # in 80 columns rich's tables cut names of options and leave little room for what they do
)


def show_version(wanted: bool) -> None:
    """Print the version and exit, whatever else was typed."""
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


LONGEST_LINE = 1000  # of an error
ON_PROCESSES = ("grow", "train", "finetune")  # commands that torchrun may run


@app.callback()
def growkit(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=show_version, is_eager=True, help="Print the version and exit."
    ),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Grow small pretrained transformers into larger ones and take them into serving."""
    command = context.invoked_subcommand
    if "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1 and command not in ON_PROCESSES:
        line = f"growkit {command} runs in one process; start it without torchrun"
        if not speaks():
            leave(line)
            raise typer.Exit(2)
        raise GrowkitError(line)
    if debug:
        os.environ["GROWKIT_DEBUG"] = "1"


def prompt(command: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a command to print a line on stderr before anything else, since torch takes seconds to load."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        if sys.modules.get("torch") is None and speaks():
            sys.stderr.write(f"growkit {__version__}: {command.__name__}\n")
            sys.stderr.flush()
        return command(*args, **kwargs)

    return run


for command in (
    grow.grow,
    plan.plan,
    finetune.finetune,
    train.train,
    evaluate.evaluate,
    compare.compare,
    sweep.sweep,
    export.export,
    verify.verify,
    report.report,
    demo.demo,
):
    app.command(cls=Typed, no_args_is_help=False)(prompt(guarded(command)))


def main() -> None:
    """Run the program.

    Exit status: 0 done, 1 a check said no, 2 bad usage or input, 130 ended by Ctrl-C, 143 by SIGTERM.
    """
    ready()
    try:
        with stoppable():
            app()
    except (GrowkitError, OSError) as error:  # a full disk or a read-only folder is for the user to fix, too
        if os.environ.get("GROWKIT_DEBUG"):
            raise
        _tell(str(error))
        sys.exit(2)
    except (MemoryError, RuntimeError, ImportError) as error:
        if os.environ.get("GROWKIT_DEBUG") or not is_memory_full(error):
            raise
        _tell("memory is used up; take smaller batches, images or models, or a machine with more")
        sys.exit(2)
    except KeyboardInterrupt as error:
        sys.stderr.write("interrupted\n")
        sys.exit(143 if isinstance(error, Terminated) else 130)


def _tell(message: str) -> None:
    leave(message)
    from growkit.text import visible
    from growkit_cli.console import Console

    line = f"error: {visible(message)}"
    if len(line) > LONGEST_LINE:  # the user probably gave a file's content instead of its name
        line = f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"
    Console(as_json=True).rich.print(line, style="red", markup=False)
