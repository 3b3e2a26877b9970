"""Commands that torchrun may start in several processes, only one of which prints."""

import functools
import os
import signal
from collections.abc import Callable
from typing import Any

import typer


def speaks() -> bool:
    """Whether this process prints: the first of torchrun's, or the only one."""
    return "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0"


def on_processes(command: Callable[..., Any]) -> Callable[..., Any]:
    """Join torchrun's processes before `command` and leave after it; an error that all share is printed once."""

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
                except typer.Exit as left:  # all processes exit this way: no error
                    leaving = left
            raise leaving
        except (GrowkitError, OSError) as error:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends the others; let them print why first
            if first_to_say(str(error)):
                raise
            raise typer.Exit(2) from None

    return wrapper
