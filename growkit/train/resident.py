"""Images that stay decoded, in RAM or on the device: many short runs over small images are bound by decoding."""

import math
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from growkit.errors import GrowkitError
from growkit.train.free_memory import free_bytes
from growkit.train.normalise import Normalisation, sent
from growkit.train.progress import Progress, rate

ROOM = 0.8  # of the free memory that images may take


class Decoded:
    """All images of `dataset`, decoded when first needed.

    read     gives a dataset's batches of uint8 images (n, C, H, W) and labels (n,), in order, and lines about
             unreadable images
    size     (C, H, W) of an image
    cache    where they stay: "device", the one that asked last, or "ram"
    begin    called when decoding begins; returns what receives its progress
    labels   (N,) on the CPU, where the training loop looks at them; empty before the images are decoded
    told     the lines about unreadable images, also empty before
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        read: Callable[[Dataset[Any]], Iterator[Any]],
        size: Sequence[int],
        cache: str,
        begin: Callable[[], Progress],
    ):
        assert isinstance(dataset, Sized)
        self.dataset, self.read, self.cache, self.begin = dataset, read, cache, begin
        self.shape = (len(dataset), *size)
        self.told: list[str] = []
        self.labels = torch.empty(0, dtype=torch.long)
        self._images: Tensor | None = None

    def part(self, index: Sequence[int]) -> "Decoded":
        """Return a subset, which decodes its own images alone."""
        return Decoded(Subset(self.dataset, index), self.read, self.shape[1:], self.cache, self.begin)

    def on(self, device: torch.device) -> Tensor:
        """Return the uint8 images (N, C, H, W) from where they are cached for use on `device`.

        Raises:
            GrowkitError: they would take more than ROOM of the memory that is free there.
        """
        device = torch.empty(0, device=device if self.cache == "device" else "cpu").device  # cuda becomes cuda:0
        if self._images is None or self._images.device != device:
            self._require_room(device)
            self._images = self._decode(device) if self._images is None else self._images.to(device)
        return self._images

    def _require_room(self, device: torch.device) -> None:
        need, free = math.prod(self.shape), free_bytes(device)
        if need > ROOM * free:
            raise GrowkitError(
                f"--cache {self.cache}: {self.shape[0]:,} images take {need / 1e9:.1f} GB, more than {ROOM:.0%} of the"
                f" {free / 1e9:.1f} GB free on {device}; leave out --cache, or use fewer images"
            )

    def _decode(self, device: torch.device) -> Tensor:
        images = torch.empty(self.shape, dtype=torch.uint8, device=device)
        labels: list[Tensor] = []
        done, progress, began = 0, self.begin(), time.perf_counter()
        progress(0, len(images))
        for (batch, found), told in self.read(self.dataset):
            self.told += told
            images[done : done + len(batch)] = batch
            labels.append(found)
            done += len(batch)
            progress(done, len(images), rate(done, time.perf_counter() - began))
        self.labels = torch.cat(labels)
        return images


class Resident(Dataset[Any]):
    """Images of `decoded` and their normalisation; gives whole batches, not single images."""

    def __init__(self, decoded: Decoded, normalised: Normalisation):
        self.decoded, self.normalised = decoded, normalised

    def __len__(self) -> int:
        return self.decoded.shape[0]

    def part(self, index: Sequence[int]) -> "Resident":
        """Return a subset, which decodes its own images alone."""
        return Resident(self.decoded.part(index), self.normalised)

    def batch(self, places: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return uint8 images (len(places), C, H, W), and labels, which stay on the CPU."""
        images = self.decoded.on(device)
        return sent(images[sent(places, images.device)], device), self.decoded.labels[places]

    def evaluation(self, batches: Sequence[Sequence[int]], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalised images and labels at the indices of each batch."""
        for places in batches:
            images, labels = self.batch(torch.tensor(places), device)
            yield self.normalised(images), labels
