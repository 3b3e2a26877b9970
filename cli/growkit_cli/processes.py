"""Commands that torchrun may start in several processes, only one of which prints."""

import contextlib
import functools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
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
            leave(str(error))
            if first_to_say(str(error)):
                raise
            raise typer.Exit(2) from None

    return wrapper


def leave(message: str) -> None:
    """Write an error to where torchrun takes it from, for the summary below everything else, and live to print it."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends the others; let them print why first
        content = {"message": {"message": f"error: {message}", "extraInfo": {"timestamp": int(time.time())}}}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps(content), encoding="utf-8")
