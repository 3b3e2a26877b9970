"""Progress of work, reported to whoever shows it."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from growkit.text import speed

S = TypeVar("S")
T = TypeVar("T", bound=tuple[Tensor, ...])


class Progress(Protocol):
    """Receives how many of `total` images, or updates, are done, with a short note on their rate, loss or score."""

    def __call__(self, done: float, total: int, note: str = "") -> None: ...


Say = Callable[[str], None]  # a line for the user
StartProgress = Callable[[str], Progress]  # name of the work, as in "scoring the source" -> what receives its progress
FollowRun = Callable[[str, int, int], Progress]  # title of a run, runs finished, runs in all -> the same


def no_progress(done: float, total: int, note: str = "") -> None:
    """A Progress that nobody listens to."""


def say_nothing(line: str) -> None:
    """A Say that nobody reads."""


def start_nothing(what: str) -> Progress:
    """A StartProgress that tells nobody."""
    return no_progress


def follow_nothing(title: str, finished: int, runs: int) -> Progress:
    """A FollowRun that tells nobody."""
    return no_progress


def rate(done: float, seconds: float) -> str:
    """Return images per second, as a note."""
    return f"{speed(done / seconds)} images/s" if done and seconds else ""


def each(items: Sequence[S], progress: Progress) -> Iterator[S]:
    """Yield the items; `progress` is told how many are done."""
    for done, item in enumerate(items):
        progress(done, len(items))
        yield item
    progress(len(items), len(items))


def followed(batches: Iterable[T], total: int, progress: Progress) -> Iterator[T]:
    """Yield the batches, labels last in each; `progress` is told how many of `total` images are done."""
    done, began = 0, time.perf_counter()
    progress(0, total)
    for batch in batches:
        yield batch
        done += len(batch[-1])
        progress(min(done, total), total, rate(done, time.perf_counter() - began))
