"""A data set read image by image in processes of its own, and handed over in batches of bytes."""

import signal
import sys
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate

from growkit.errors import first_line
from growkit.pictures import UnreadablePictureError, unreadable
from growkit.train.erasing import Erased, together
from growkit.train.seeds import random_kept, seed_all
from growkit.train.settings import FitSettings

PATIENCE = 60  # seconds that a process which reads serves on after SIGTERM
STAND_INS = 10  # images after an unreadable one that are tried in its place; timm's number


class Read(Dataset[Any]):
    """`dataset` for loaders: gives samples, each with the reason where another one stands in for it.

    An error that a worker raised would reach the user as a page of traceback, so reasons travel with the batch. In the
    place of an unreadable image comes the next one, up to `stand_ins` further on: which, depends on the image alone.
    """

    def __init__(self, dataset: Any, stand_ins: int):
        self.dataset, self.stand_ins = dataset, stand_ins

    def __getitems__(self, places: list[Any]) -> list[Any]:
        """A whole batch, as loaders ask for it."""
        return [self._read(place) for place in places]

    def _read(self, index: int) -> tuple[Any, str | None]:
        why = None
        for step in range(1 + self.stand_ins):
            place = (index + step) % len(self.dataset)
            try:
                return self.dataset[place], why
            except UnreadablePictureError as error:
                why = why or str(error)
            except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # PIL's, in torchvision's hands
                why = why or unreadable(f"image {place}", first_line(error, 160))
        return None, why


class Augmented(Read):
    """`dataset`, asked for (epoch, index): what is drawn for an image depends on these alone."""

    def __init__(self, dataset: Any, seed: int):
        super().__init__(dataset, STAND_INS)
        self.seed = seed

    def __getitems__(self, places: list[tuple[int, int]]) -> list[Any]:
        """A whole batch; NumPy takes 0.2 ms to give its state back."""
        with random_kept():
            return [self._draw(epoch, index) for epoch, index in places]

    def _draw(self, epoch: int, index: int) -> Any:
        seed_all(self.seed, "image", epoch, index)
        return self._read(index)


def _collated(read: list[tuple[Any, str | None]]) -> tuple[Any, list[str]]:
    """Samples as one batch, and why some are others than asked for; no batch where one is missing, and why."""
    missing = [why for sample, why in read if sample is None and why]
    if missing:
        return None, missing
    samples = [sample for sample, _ in read]
    if isinstance(samples[0][0], Erased):
        images, labels = (list(part) for part in zip(*samples, strict=True))
        return (together(images), default_collate(labels)), [why for _, why in read if why]
    return default_collate(samples), [why for _, why in read if why]


def loaded(dataset: Read, sampler: Any, settings: FitSettings, *, pin_memory: bool = False) -> Iterator[Any]:
    """Batches, with the reasons of those images in them that another one stands in for.

    Raises:
        UnreadablePictureError: an image cannot be read, nor can what may stand in for it.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more than there are cores: as asked
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=_collated,
            num_workers=min(settings.workers, len(sampler)),
            pin_memory=pin_memory,
            worker_init_fn=_quiet_worker,
            generator=torch.Generator(),  # else a loader draws from the global one
        )
        batches = iter(loader)
    for batch, told in batches:
        if batch is None:
            more = f"; nor can the {dataset.stand_ins} images after it be read" if dataset.stand_ins else ""
            raise UnreadablePictureError(told[0] + more)
        yield batch, told


def in_order(dataset: Any, stand_ins: int, settings: FitSettings) -> Iterator[Any]:
    """All images of `dataset` once, and what is said of those that could not be read."""
    places = torch.arange(len(dataset)).split(256)
    return loaded(Read(dataset, stand_ins), [batch.tolist() for batch in places], settings)


def _quiet_worker(_: int) -> None:
    """Leave signals to the main process, which ends its workers when it is done with them; say nothing of its death.

    torchrun, `timeout` and schedulers send SIGTERM to all processes of a job, and training needs its images until it
    has saved. Python hands images on in a thread of the worker; where the main process is killed meanwhile, that thread
    fails.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(PATIENCE))
    shown = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, EOFError | ConnectionError):
            shown(kind, error, trace)

    sys.excepthook = show
