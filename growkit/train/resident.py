"""Images that stay decoded in the device's memory and are cropped and flipped there, a whole batch at once.

Many short runs over small images are otherwise bound by decoding. Cropping and flipping are timm's in meaning: an area
between scale_min and 1, an aspect ratio between 3:4 and 4:3, a mirror image with probability hflip.
"""

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, Dataset

from growkit.errors import GrowkitError
from growkit.train.settings import FitSettings

RATIO = (3 / 4, 4 / 3)  # timm's and torchvision's
TRIES = 10  # theirs, too, before the whole image is taken
ROOM = 0.8  # of the free memory that images may take


class Resident(Dataset[Any]):
    """Decoded images (N, C, H, W) of uint8 and their labels (N,), made from `dataset` when first needed.

    dataset   gives (uint8 tensor (C, H, W), label), prepared as for evaluation but for normalisation
    size      (C, H, W)
    index     which of its images are meant, in order; all of them when left out
    """

    def __init__(
        self,
        dataset: Any,
        size: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        workers: int,
        index: Tensor | None = None,
    ):
        self.dataset, self.size, self.mean, self.std, self.workers = dataset, tuple(size), mean, std, workers
        self.index = torch.arange(len(dataset)) if index is None else index
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}  # by device; shared with what `part` gives

    def __len__(self) -> int:
        return len(self.index)

    def part(self, index: Sequence[int]) -> Self:
        """Some of the images, by their places in this one; decoded once for all parts."""
        other = type(self)(
            self.dataset, self.size, self.mean, self.std, self.workers, self.index[torch.as_tensor(index)]
        )
        other._kept = self._kept
        return other

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """All images and labels of the dataset, on the device.

        Raises:
            GrowkitError: they would not fit.
        """
        if str(device) not in self._kept:
            need, free = len(self.dataset) * math.prod(self.size), _free(device)
            if need > ROOM * free:
                sizes = f"{need / 2**30:.1f} GiB of {free / 2**30:.1f} GiB free on {device}"
                raise GrowkitError(f"--resident: {len(self.dataset):,} images take {sizes}; leave it out")
            if "cpu" not in self._kept:
                self._kept["cpu"] = self._decode()
            images, labels = self._kept["cpu"]
            self._kept[str(device)] = images.to(device), labels.to(device)
        return self._kept[str(device)]

    def _decode(self) -> tuple[Tensor, Tensor]:
        images = torch.empty((len(self.dataset), *self.size), dtype=torch.uint8)
        labels = torch.empty(len(self.dataset), dtype=torch.long)
        loader = DataLoader(self.dataset, batch_size=256, num_workers=self.workers, generator=torch.Generator())
        done = 0
        for batch, found in loader:
            images[done : done + len(batch)] = batch
            labels[done : done + len(batch)] = found
            done += len(batch)
        return images, labels

    def batch(self, places: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images (len(places), C, H, W) with values in [0, 1], and labels."""
        images, labels = self.on(device)
        chosen = self.index[places].to(device)
        return images[chosen].float().div(255), labels[chosen]

    def normalised(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as the network takes them."""
        mean, std = (torch.tensor(v, device=images.device).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return images.sub(mean).div(std)

    def evaluation(self, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """All images once, in order, normalised."""
        for places in torch.arange(len(self)).split(batch_size):
            images, labels = self.batch(places, device)
            yield self.normalised(images), labels


def refuse_other_augmentation(settings: FitSettings) -> None:
    """Raise GrowkitError where the settings ask for more than crops and flips."""
    for name, off in (("color_jitter", 0.0), ("aa", None), ("reprob", 0.0)):
        if getattr(settings, name) != off:
            option = "--" + name.replace("_", "-")
            remedy = f"{option} 0" if off is not None else f"no {option}"
            raise GrowkitError(f"--resident crops and flips only; give {remedy}, or leave --resident out")


def crop_and_flip(images: Tensor, settings: FitSettings, generator: torch.Generator) -> Tensor:
    """Each image (N, C, H, W) cropped, resized back and perhaps mirrored; all draws come from the CPU's generator."""
    count = len(images)
    mirrored = torch.rand(count, generator=generator) < settings.hflip
    if settings.scale_min == 1:
        return torch.where(mirrored.to(images.device)[:, None, None, None], images.flip(3), images)
    left, top, width, height = _crops(count, tuple(images.shape[2:]), settings.scale_min, generator)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = torch.where(mirrored, -width, width)
    theta[:, 0, 2] = 2 * left + width - 1
    theta[:, 1, 1] = height
    theta[:, 1, 2] = 2 * top + height - 1
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


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


def _free(device: torch.device) -> int:
    """Bytes of memory that are free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 2**63 - 1  # this system does not say
