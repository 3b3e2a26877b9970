"""Progress for people: rate, loss, score, time left."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import typer

from growkit.text import counted, speed
from growkit_cli.console import Console, PlainBar

if TYPE_CHECKING:
    from growkit.fitting import Trained
    from growkit.train.loop import FitResult
    from growkit.train.progress import Progress, StartProgress


@contextmanager
def telling(console: Console, *, rarely: bool = False) -> Iterator["StartProgress"]:
    """Yield `tell(what)`, which starts a bar, or lines in a log, and returns a callback for that work's progress.

    `rarely` prints fewer lines. A repeated title closes the bar that a failure left open.
    """
    begun: dict[str, ExitStack] = {}
    with ExitStack() as shown:

        def tell(what: str) -> "Progress":
            if what in begun:
                begun[what].close()
            own = begun[what] = shown.enter_context(ExitStack())
            show = own.enter_context(console.progress(what, rarely=rarely))

            def progress(done: float, total: int, note: str = "") -> None:
                show(total).update(done, note)
                if done >= total:
                    own.close()

            return progress

        yield tell


@contextmanager
def following(console: Console, title: str) -> Iterator[Callable[[str, int, int], "Progress"]]:
    """Yield `follow(name, finished, runs)`, which returns a callback for the progress of one of many runs.

    All share one bar; in a log each run prints a few lines.
    """
    with console.progress(title) as show:

        def follow(name: str, finished: int, runs: int) -> "Progress":
            lines: list[PlainBar] = []

            def progress(done: float, total: int, note: str = "") -> None:
                if console.rich.is_interactive:
                    show(runs).update(finished + done / total, f"{name}: {note}" if note else name)
                    return
                if not lines or lines[0].total != total:  # a new total: operator training came before
                    lines[:] = [PlainBar(console, name, total, rarely=True)]
                lines[0].update(done, note)

            return progress

        yield follow


def tell_trained(console: Console, trained: "Trained") -> None:
    """Print the result of a training run, and its JSON."""
    from dataclasses import asdict

    fitted = trained.fitted
    best = fitted.best_scores
    if not fitted.images_per_second and not fitted.interrupted:
        console.say("all of its updates were made before; nothing was left to train")
    rate = f"{speed(fitted.images_per_second)} images/s while training, " if fitted.images_per_second else ""
    done = f"{'wrote' if rate else 'kept'} {trained.folder} after {counted(fitted.steps, 'update')}"
    console.say(f"{done} in {fitted.seconds:.0f} s ({rate}{fitted.flops_per_step * fitted.steps / 1e12:.3g} TFLOP)")
    console.result(
        {
            "folder": trained.folder,
            "steps": fitted.steps,
            "interrupted": fitted.interrupted,
            "start": asdict(trained.scores_at_start) if trained.scores_at_start else None,
            "best": asdict(best) if best else None,
            "best_step": fitted.best_step,
            "history": [{"step": step, **asdict(scores)} for step, scores in fitted.history],
            "flops_per_step": fitted.flops_per_step,
            "macs_per_step": fitted.macs_per_step,
            "images_per_second": fitted.images_per_second,
            "seconds": fitted.seconds,
        }
    )


def ended(console: Console, fitted: "FitResult | None") -> None:
    """Exit with status 130, or 143 after SIGTERM, if training was interrupted; its state is saved."""
    if fitted is not None and fitted.interrupted:
        if not console.rich.quiet:
            sys.stderr.write("interrupted; what was learned is saved, --resume goes on\n")
        raise typer.Exit(128 + (fitted.stopped_by or signal.SIGINT))
