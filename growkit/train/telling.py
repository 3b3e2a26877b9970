"""How many images are read or scored, told to whoever shows it."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from torch import Tensor

Done = Callable[[int, int], None]  # images done, images in all
Tell = Callable[[str], Done]  # what is done with images, as in "scoring the source" -> what is told of it
T = TypeVar("T", bound=tuple[Tensor, ...])


def silent(what: str) -> Done:
    """A Tell that tells nobody."""
    return lambda done, total: None


def followed(batches: Iterable[T], total: int, progress: Done) -> Iterator[T]:
    """The batches, labels last in each; `progress` is told how many of `total` images are done."""
    done = 0
    for batch in batches:
        yield batch
        done += len(batch[-1])
        progress(min(done, total), total)
