"""Images that stay decoded, in RAM or on the device, and are cropped and flipped on the device, a batch at once.

Many short runs over small images are otherwise bound by decoding. Cropping and flipping are timm's in meaning: an area
between scale_min and 1, an aspect ratio between 3:4 and 4:3, a mirror image with probability hflip. Crops are of the
image as evaluation sees it, not of a larger original.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import grid_sample
from torch.utils.data import Dataset

from growkit.errors import GrowkitError
from growkit.train.free_memory import free_bytes
from growkit.train.normalise import Normalisation, sent
from growkit.train.settings import FitSettings
from growkit.train.telling import Done, rate

RATIO = (3 / 4, 4 / 3)  # timm's and torchvision's
TRIES = 10  # theirs, too, before the whole image is taken
ROOM = 0.8  # of the free memory that images may take


class Decoded:
    """All images of `dataset`, decoded when first needed.

    read     gives batches of uint8 images (n, C, H, W) and labels (n,), in order, and lines about unreadable images
    size     (C, H, W) of an image
    cache    where they stay: "device", the one that asked last, or "ram"
    begin    called when decoding begins; gives what is told how many are decoded
    labels   (N,) on the CPU, where the training loop looks at them; empty before the images are decoded
    told     the lines, likewise
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        read: Callable[[], Iterator[Any]],
        size: Sequence[int],
        cache: str,
        begin: Callable[[], Done],
    ):
        assert isinstance(dataset, Sized)
        self.dataset, self.read, self.cache, self.begin = dataset, read, cache, begin
        self.shape = (len(dataset), *size)
        self.told: list[str] = []
        self.labels = torch.empty(0, dtype=torch.long)
        self._images: Tensor | None = None

    def on(self, device: torch.device) -> Tensor:
        """The images (N, C, H, W), uint8, where they stay when `device` uses them.

        Raises:
            GrowkitError: they would take more than ROOM of the memory that is free there.
        """
        device = torch.empty(0, device=device if self.cache == "device" else "cpu").device  # cuda is cuda:0, say
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
        for (batch, found), told in self.read():
            self.told += told
            images[done : done + len(batch)] = batch
            labels.append(found)
            done += len(batch)
            progress(done, len(images), rate(done, time.perf_counter() - began))
        self.labels = torch.cat(labels)
        return images


class Resident(Dataset[Any]):
    """Images of `decoded` and how they are normalised; gives whole batches, not single images.

    index   which of its images are meant, in order; all of them when left out
    """

    def __init__(self, decoded: Decoded, normalised: Normalisation, index: Tensor | None = None):
        self.decoded, self.normalised = decoded, normalised
        self.index = torch.arange(decoded.shape[0]) if index is None else index

    def __len__(self) -> int:
        return len(self.index)

    def part(self, index: Sequence[int]) -> Self:
        """Some of the images, by their places in this one; decoded once for all parts."""
        return type(self)(self.decoded, self.normalised, self.index[torch.as_tensor(index)])

    def batch(self, places: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images (len(places), C, H, W) as the network takes them, and labels, which stay on the CPU."""
        images, chosen = self.decoded.on(device), self.index[places]
        return self.normalised(sent(images[sent(chosen, images.device)], device)), self.decoded.labels[chosen]

    def evaluation(self, batches: Sequence[Sequence[int]], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """The images at the places of each batch."""
        for places in batches:
            yield self.batch(torch.tensor(places), device)


def refuse_other_augmentation(settings: FitSettings) -> None:
    """Raise GrowkitError where the settings ask for more than crops and flips."""
    for holds, remedy in (
        (settings.aa is None, "leave out --aa"),
        (settings.color_jitter == 0, "set --color-jitter 0"),
        (settings.reprob == 0, "set --reprob 0"),
    ):
        if not holds:
            raise GrowkitError(f"--cache crops and flips only; {remedy}")


def crop_and_flip(
    images: Tensor,
    settings: FitSettings,
    generator: torch.Generator,
    *,
    whole: int | None = None,
    part: slice = slice(None),
) -> Tensor:
    """Each image (N, C, H, W) cropped, resized back and perhaps mirrored; all draws come from the CPU's generator.

    Draws are made for a batch of `whole` images, of which `images` are `part`.
    """
    high, wide = images.shape[2:]
    count = len(images) if whole is None else whole
    mirrored = (torch.rand(count, generator=generator) < settings.hflip)[part]
    if settings.scale_min == 1:
        return torch.where(sent(mirrored, images.device)[:, None, None, None], images.flip(3), images)
    crops = _crops(count, (high, wide), settings.scale_min, generator)
    left, top, width, height = (side[part] for side in crops)
    x, y = _centres(left, width, wide), _centres(top, height, high)
    x = torch.where(mirrored[:, None], x.flip(1), x)
    x, y = (sent(centres, images.device) for centres in (x, y))
    # not affine_grid: its matrix product may round to TF32
    x, y = x[:, None, :].expand(-1, high, -1), y[:, :, None].expand(-1, -1, wide)
    return grid_sample(images, torch.stack([x, y], -1), mode="bilinear", padding_mode="border", align_corners=False)


def _centres(start: Tensor, length: Tensor, pixels: int) -> Tensor:
    """Where `pixels` pixels lie along crops (N,) of a side, in grid_sample's -1 to 1: (N, pixels)."""
    steps = (torch.arange(pixels) + 0.5) / pixels
    return 2 * (start[:, None] + length[:, None] * steps) - 1


def _crops(
    count: int, shape: tuple[int, ...], scale_min: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Left, top, width and height of `count` crops as shares of the image's sides."""
    area = torch.empty(TRIES, count).uniform_(scale_min, 1, generator=generator)
    ratio = torch.empty(TRIES, count).uniform_(*(math.log(r) for r in RATIO), generator=generator).exp()
    high, wide = shape
    width, height = (area * ratio * high / wide).sqrt(), (area / ratio * wide / high).sqrt()
    fits = (width <= 1) & (height <= 1)
    first = fits.to(torch.int8).argmax(0, keepdim=True)
    found = fits.any(0)
    width, height = (torch.where(found, side.gather(0, first)[0], 1.0) for side in (width, height))
    left, top = torch.rand(2, count, generator=generator)
    return left * (1 - width), top * (1 - height), width, height
