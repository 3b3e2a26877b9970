"""Commands that torchrun may start in several processes, and which of these speaks."""

import functools
import os
import signal
from collections.abc import Callable
from typing import Any

import typer


def speaks() -> bool:
    """Whether this is the one of torchrun's processes that says what all do; alone, it is."""
    return "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0"


def on_processes(command: Callable[..., Any]) -> Callable[..., Any]:
    """Let the processes that torchrun started join before `command` and leave after it; of one error, one tells."""

    @functools.wraps(command)
    def wrapper(**given: Any) -> Any:
        if "LOCAL_RANK" not in os.environ:
            return command(**given)
        from growkit.errors import GrowkitError
        from growkit.train.device import pick_device
        from growkit.train.distributed import first_to_say, joined

        try:
            with joined(pick_device(given["device"])):
                try:
                    return command(**given)
                except typer.Exit as left:  # all processes leave so: no error
                    leaving = left
            raise leaving
        except (GrowkitError, OSError) as error:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends those that are left; they say why first
            if first_to_say(str(error)):
                raise
            raise typer.Exit(2) from None

    return wrapper
