"""Labelled images in batches that depend only on (seed, epoch, image), never on workers or luck."""

import copy
from collections import deque
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from growkit.errors import GrowkitError
from growkit.pictures import UnreadablePictureError
from growkit.seeds import seeded
from growkit.train.augment import augmented
from growkit.train.data import Data, size_of
from growkit.train.distributed import part, rank, size
from growkit.train.erasing import ErasedBatch
from growkit.train.loading import Augmented, Read, loaded
from growkit.train.resident import Resident
from growkit.train.settings import AUTO, FitSettings

MOST_UNREADABLE = 0.1  # share of the training images; more is no accident, and would amount to another data set
BATCHES_AHEAD = 1  # on a GPU, besides the one in use
FEW = 2  # unreadable images that are tolerated whatever their share


def images_per_batch(data: Data, settings: FitSettings) -> int:
    """Return the number of images per training batch; a dataset smaller than that is one batch.

    Raises:
        GrowkitError: the batch size is automatic and not found yet.
    """
    return min(_chosen(settings), size_of(data.train))


def _chosen(settings: FitSettings) -> int:
    if settings.batch_size == AUTO:
        raise GrowkitError("--batch-size auto, or -1: only grow, finetune and train find it; give a number here")
    return settings.batch_size


def batches_per_epoch(data: Data, settings: FitSettings) -> int:
    """Return the number of training batches per epoch; an incomplete last batch is dropped."""
    return size_of(data.train) // images_per_batch(data, settings)


def train_batches(
    data: Data, settings: FitSettings, first: int, last: int, *, device: torch.device | str = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches `first` to `last` - 1 of a run: images (N, C, H, W) and labels (N,).

    With several processes, each gets its part of every batch: the same images with the same augmentation as in a
    single process. Batch numbers continue across epochs. Nothing before `first` is read. `device` is where the batches
    will be used; on a GPU the images are already there.

    An unreadable image is replaced by the next readable one, as in timm, so that one bad file in a million does not
    end a run overnight; but each is recorded in data.unreadable, and too many are an error: training would go on with
    other images than it was given.

    Raises:
        GrowkitError: more than FEW images, and more than MOST_UNREADABLE of those read so far, are unreadable; or one
            image and all STAND_INS after it are. The message names one and the reason.
    """
    device = torch.device(device)
    sampler = _Places(data, settings, first, last)
    if isinstance(data.train, Resident):
        data.train.decoded.on(device)
        told = data.train.decoded.told
        data.unreadable.update(dict.fromkeys(told))
        _refuse_many(len(told), size_of(data.train), told)
        for number, places in enumerate(sampler, start=first):
            images, labels = data.train.batch(torch.tensor([index for _, index in places]), device)
            whole = sampler.whole
            yield augmented(images, data.train.normalised, settings, number, whole=whole, part=part(whole)), labels
        return
    yield from _on(device, data.normalised, _read_to_train(data, settings, sampler, device))


def val_batches(
    data: Data, settings: FitSettings, *, device: torch.device | str = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all images for evaluation once, in order: images (N, C, H, W) and labels (N,).

    With several processes, each gets its part, in as many batches as the others. `device` is where they will be used;
    on a GPU the images are already there. Unreadable images are not replaced: the score would be of other images than
    it says.

    Raises:
        GrowkitError: an image cannot be read; the message names it and the reason.
    """
    device = torch.device(device)
    if isinstance(data.val, Resident):
        yield from data.val.evaluation(_shares(size_of(data.val), _chosen(settings)), device)
        return
    yield from _on(device, data.normalised, read_to_evaluate(data, settings, pin_memory=device.type == "cuda"))


def read_to_evaluate(data: Data, settings: FitSettings, *, pin_memory: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of `val_batches` as they are read, in CPU memory; only for images that are not cached.

    Raises:
        GrowkitError: an image cannot be read; the message names it and the reason.
    """
    shares = _shares(size_of(data.val), _chosen(settings))
    for batch, _ in loaded(Read(data.val, 0), shares, settings, pin_memory=pin_memory):
        yield batch


def unaugmented(data: Data, count: int, *, seed: int) -> Tensor:
    """Draw up to `count` uncached training images (N, C, H, W), without labels, prepared as for evaluation.

    Raises:
        GrowkitError: one of them cannot be read.
    """
    plain = copy.copy(data.train)
    plain.transform = data.val.transform  # type: ignore[attr-defined]
    places = np.random.default_rng(seed).permutation(size_of(plain))[:count]
    return data.normalised(torch.stack([plain[int(place)][0] for place in places]))


class _Places(Sampler[list[tuple[int, int]]]):
    """This process's (epoch, index) pairs of batches `first` to `last` - 1 of a run; each epoch is permuted anew."""

    def __init__(self, data: Data, settings: FitSettings, first: int, last: int):
        self.images, self.settings, self.first, self.last = size_of(data.train), settings, first, last
        self.whole = images_per_batch(data, settings)

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, order_of = torch.empty(0), -1
        for number in range(self.first, self.last):
            epoch, place = divmod(number, self.images // self.whole)
            if epoch != order_of:
                with seeded(self.settings.seed, "order", epoch):
                    order, order_of = torch.randperm(self.images), epoch
            batch = order[place * self.whole : (place + 1) * self.whole]
            yield [(epoch, index) for index in batch[part(self.whole)].tolist()]


def _read_to_train(
    data: Data, settings: FitSettings, sampler: _Places, device: torch.device
) -> Iterator[tuple[Tensor | ErasedBatch, Tensor]]:
    read = failed = 0
    met: dict[str, None] = {}  # by this process since it began: data.unreadable may hold others' too
    images_of = Augmented(data.train, settings.seed)
    for batch, told in loaded(images_of, sampler, settings, pin_memory=device.type == "cuda"):
        read, failed = read + len(batch[-1]), failed + len(told)
        met.update(dict.fromkeys(told))
        data.unreadable.update(met)
        _refuse_many(failed, read, met)
        yield batch


def _refuse_many(failed: int, read: int, lines: Collection[str]) -> None:
    """Raise UnreadablePictureError if too many training images are unreadable for this to be an accident."""
    if len(lines) > FEW and failed > MOST_UNREADABLE * read:
        first = next(iter(lines))
        raise UnreadablePictureError(
            f"{failed} of the first {read} training images could not be read; the first: {first}"
        )


def _on(
    device: torch.device, normalised: Callable[[Tensor], Tensor], batches: Iterator[tuple[Tensor | ErasedBatch, Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches with their images normalised and on the device."""
    if device.type == "cuda":
        yield from _ahead(device, normalised, batches)
        return
    for images, labels in batches:
        yield _ready(images, normalised, device), labels


def _ready(images: Tensor | ErasedBatch, normalised: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
    if isinstance(images, ErasedBatch):
        return images.over(_ready(images.images, normalised, device))
    return normalised(images.to(device, non_blocking=True))


def _ahead(
    device: torch.device, normalised: Callable[[Tensor], Tensor], batches: Iterator[tuple[Tensor | ErasedBatch, Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of `_on` on a GPU: each is copied there while the one before it is in use.

    At most BATCHES_AHEAD are there besides the one in use, however far the GPU lags behind.
    """
    copying = _copying(device)
    copying.wait_event(torch.cuda.current_stream(device).record_event())  # which may use batches that came before
    waiting: deque[tuple[Tensor, Tensor, torch.cuda.Event]] = deque()

    def handed_out() -> Iterator[tuple[Tensor, Tensor]]:
        images, labels, copied = waiting.popleft()
        working = torch.cuda.current_stream(device)
        working.wait_event(copied)
        try:
            yield images, labels
        finally:  # before another batch is copied over this one
            copying.wait_event(working.record_event())

    for images, labels in batches:
        with torch.cuda.stream(copying):
            waiting.append((_ready(images, normalised, device), labels, copying.record_event()))
        if len(waiting) > BATCHES_AHEAD:
            yield from handed_out()
    while waiting:
        yield from handed_out()


@lru_cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    """The one stream that copies: torch's allocator keeps what was freed on a stream for that stream alone."""
    return torch.cuda.Stream(device)


def _shares(images: int, batch_size: int) -> list[list[int]]:
    """Return the indices of this process's images for evaluation, batch by batch; no batch is empty."""
    places = torch.arange(images)
    if size() == 1:
        return [batch.tolist() for batch in places.split(batch_size) if len(batch)]
    if images < size():
        raise GrowkitError(f"{images} images for evaluation do not give each of {size()} processes one; use fewer")
    # nearly equal, none below batch_size unless there are fewer images in total
    batches = places.tensor_split(max(1, images // batch_size))
    return [batch.tensor_split(size())[rank()].tolist() for batch in batches]
