"""A guard around every command: it locks the run folder, and on Ctrl-C or SIGTERM prints a line on what was kept."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any

import typer

from growkit.errors import GrowkitError, Terminated
from growkit.lock import held
from growkit_cli.processes import speaks
from growkit_cli.typed import command_line

STATES = {  # the state that a stopped command resumes from, inside the run folder
    "train": "trained/last/state.pt",
    "finetune": "finetuned/last/state.pt",
    "grow": "operator/state.pt",
    "compare": "compare/begun.json",
    "sweep": "sweep/begun.json",
}
_at_work: list[str] = []  # running commands of this process; the demo runs others inside its own


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a command: it locks the run folder it writes, and prints a last line when interrupted."""

    @wraps(command)
    def run(*args: Any, **given: Any) -> Any:
        _at_work.append(command.__name__)
        try:
            folder = written(command.__name__, given)
            # a report is of the run as it stands, also while another command is at work there
            with nullcontext() if folder is None else holding(folder, alone=command.__name__ != "report"):
                return command(*args, **given)
        except KeyboardInterrupt as error:
            if speaks():
                sys.stderr.write(f"interrupted; {left(command.__name__, given)}\n")
            raise typer.Exit(128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)) from None
        finally:
            _at_work.pop()

    return run


def written(command: str, given: Mapping[str, Any]) -> Path | None:
    """The run folder that a command with these arguments writes; None if it only reads."""
    run = given.get("run")
    reads = (command == "evaluate" and not _recorded(given)) or (command == "report" and given["out"] is not None)
    if reads or not speaks():  # torchrun's processes share a run: only the first locks it
        return None
    # a report of a missing run must say so, and locking it would create it
    return None if command == "report" and run is not None and not run.exists() else run


def _recorded(given: Mapping[str, Any]) -> bool:
    """Whether `evaluate` adds a comparison to the run's record: of a model that the run holds."""
    from growkit.record import RunFolder

    model = given["model"]
    return given["against"] is not None and (model is None or RunFolder(given["run"]).holds(str(model)))


@contextmanager
def holding(folder: Path, *, alone: bool = True) -> Iterator[None]:
    """Lock a run folder, and clean up what killed commands left there; unless `alone`, go on if another holds it.

    Raises:
        GrowkitError: another process holds it.
    """
    from growkit.record import RunFolder

    with ExitStack() as stack:
        try:
            had = stack.enter_context(held(folder, command_line(), lambda line: print(line, file=sys.stderr)))
        except GrowkitError:
            if alone:
                raise
            had = False
        if had:
            RunFolder(folder).clear_left()
        yield


def left(command: str, given: Mapping[str, Any]) -> str:
    """Say what an interrupted command leaves, and how to continue."""
    learning = command in STATES and not (command == "grow" and given["data"] is None)
    state = given["run"] / STATES[command] if learning else None
    if state is not None and state.exists():
        return "what is finished and the state saved last are kept, --resume goes on"
    if state is not None and state.name == "state.pt" and state.parent.exists():
        return "nothing that it learned was saved yet, --resume begins it anew"
    return "what was complete before is as it was; give the same command again"


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported in this frame or above it."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, SIGTERM raises as Ctrl-C does, so that half-written files are removed; a second signal ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def again(number: int) -> None:
        threading.Timer(0.02, signal.pthread_kill, (threading.main_thread().ident, number)).start()

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if not asked and _importing(frame):  # libraries swallow exceptions of their imports
            again(number)
            return
        if asked:
            from multiprocessing import active_children

            for child in active_children():
                child.kill()
            os.write(2, b"stopped at once\n")
            os._exit(128 + number)
        asked = True
        if not _at_work:  # Typer would swallow the exception while it reads options
            sys.stderr.write("interrupted; nothing was at work\n")
            raise SystemExit(128 + number)
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    def lost(what: Any) -> None:
        """Send an interrupt again that came where Python cannot raise, such as in its callbacks around a fork.

        After it, half-built objects may complain when they are deleted, as torch's loaders do; that is not reported.
        """
        nonlocal asked
        if os.getpid() != process or not isinstance(what.exc_value, KeyboardInterrupt):
            if not asked:
                told(what)
            return
        asked = False
        number = signal.SIGTERM if isinstance(what.exc_value, Terminated) else signal.SIGINT
        again(number)

    process, told = os.getpid(), sys.unraisablehook
    before = {name: signal.signal(name, stop) for name in (signal.SIGINT, signal.SIGTERM)}
    sys.unraisablehook = lost
    try:
        yield
    finally:
        if not asked:
            sys.unraisablehook = told
        for name, handler in before.items():
            signal.signal(name, handler)
