"""Training progress as a person reads it: rate, loss, score, time left."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import typer

from growkit_cli.console import Bar, Console

if TYPE_CHECKING:
    from growkit.pipeline import Trained
    from growkit.train.loop import FitResult, StepRecord

QUICK = 1.0  # seconds of reading or scoring images that need no bar


@contextmanager
def watching(console: Console, title: str) -> Iterator[Callable[["StepRecord"], None]]:
    """Yield a callback for fit(on_step=...) that shows a bar from its first record on."""
    with console.progress(title) as show:
        scored = ""

        def watch(record: "StepRecord") -> None:
            nonlocal scored
            if record.scores is not None:
                scored = f" top-1 {record.scores.top1:.2%}"
            bar = show(record.total)
            note = f"loss {record.loss:.4f}{scored} lr {record.lr:.1e} {record.images_per_second:.0f} images/s"
            bar.update(record.step, note)

        yield watch


@contextmanager
def telling(console: Console) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Yield `tell(what)`, which makes what is told how many images of how many are done.

    It shows a bar once that has taken QUICK seconds.
    """
    with ExitStack() as shown:

        def tell(what: str) -> Callable[[int, int], None]:
            began = time.monotonic()
            bars: list[Callable[[int], Bar]] = []

            def progress(done: int, total: int) -> None:
                seconds = time.monotonic() - began
                if not bars and seconds > QUICK and done < total:
                    bars.append(shown.enter_context(console.progress(what)))
                if bars:
                    bars[0](total).update(done, f"{done / seconds:.0f} images/s")
                if bars and done >= total:
                    shown.close()

            return progress

        yield tell


@contextmanager
def following(console: Console, title: str) -> Iterator[Callable[[str, int, int], Callable[["StepRecord"], None]]]:
    """Yield `follow(name, finished, total)`, which makes what watches one of many runs; a bar on terminals alone."""
    with console.progress(title) as show:

        def follow(name: str, finished: int, total: int) -> Callable[["StepRecord"], None]:
            def watch(record: "StepRecord") -> None:
                if console.rich.is_terminal:
                    note = f"{name}: loss {record.loss:.4f} {record.images_per_second:.0f} images/s"
                    show(total).update(finished + record.step / record.total, note)

            return watch

        yield follow


def tell_trained(console: Console, trained: "Trained") -> None:
    """Print what a training run ended with, and its JSON."""
    from dataclasses import asdict

    fitted = trained.fitted
    best = fitted.best_scores
    if best is not None:
        console.say(
            f"best at update {fitted.best_step}: top-1 {best.top1:.2%}, top-5 {best.top5:.2%}, loss {best.loss:.4f}"
        )
    console.say(
        f"wrote {trained.folder} after {fitted.steps} updates in {fitted.seconds:.0f} s "
        f"({fitted.images_per_second:.0f} images/s, {fitted.flops_per_step * fitted.steps / 1e12:.2f} TFLOP)"
    )
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
    """Leave with status 130, or 143 after SIGTERM, when training was interrupted: all that was learned is saved."""
    if fitted is not None and fitted.interrupted:
        if not console.rich.quiet:
            sys.stderr.write("interrupted; what was learned is saved, --resume goes on\n")
        raise typer.Exit(128 + (fitted.stopped_by or signal.SIGINT))
