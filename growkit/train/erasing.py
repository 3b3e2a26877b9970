"""timm's random erasing for uint8 images: the noise is drawn with the image, and written after normalisation."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import default_collate

from growkit.train.normalise import sent

NOTHING = torch.zeros(1)  # noise of an image that is not erased, and pixels of one when only the erased place matters


class Erased(NamedTuple):
    """A uint8 image (C, H, W), and where noise (C, height, width) is to be written over it, if anywhere."""

    image: Tensor
    corner: tuple[int, int] | None = None  # row and column
    noise: Tensor = NOTHING


class ErasedBatch(NamedTuple):
    """uint8 images (N, C, H, W), and the noise to be written over them.

    boxes   (K, 5): index of the image, top, left, height and width
    noise   of all boxes, flattened one after the other, (C, height, width) each
    """

    images: Tensor
    boxes: Tensor
    noise: Tensor

    def over(self, normalised: Tensor) -> Tensor:
        """Write the noise into the normalised images, in place, and return them."""
        boxes, channels = self.boxes.tolist(), normalised.shape[1]
        pieces = sent(self.noise, normalised.device).split([channels * high * wide for *_, high, wide in boxes])
        for (number, top, left, high, wide), piece in zip(boxes, pieces, strict=True):
            normalised[number, :, top : top + high, left : left + wide] = piece.view(channels, high, wide)
        return normalised


class _Noted(Tensor):
    """A tensor that records what is written to it instead of storing it."""

    written: tuple[tuple[slice, ...], Tensor] | None = None

    def __setitem__(self, place: Any, values: Any) -> None:
        self.written = place, values


class Erasing:
    """Draws, with `probability`, a box of a uint8 image (C, H, W) and noise for it, as timm does for floats."""

    def __init__(self, probability: float):
        self.erase = RandomErasing(probability, mode="pixel", device="cpu")

    def __call__(self, image: Tensor) -> Erased:
        """Return the unchanged image with at most one box."""
        noted = NOTHING.expand(image.shape).as_subclass(_Noted)
        self.erase(noted)
        if noted.written is None:
            return Erased(image)
        (_, rows, columns), noise = noted.written
        return Erased(image, (rows.start, columns.start), noise)


def together(images: Sequence[Erased]) -> ErasedBatch:
    """Collate single images into one batch."""
    return ErasedBatch(default_collate([one.image for one in images]), *boxes_and_noise(images))


def boxes_and_noise(images: Sequence[Erased]) -> tuple[Tensor, Tensor]:
    """Return the boxes and the noise of an ErasedBatch of these images."""
    boxes = [(number, *one.corner, *one.noise.shape[1:]) for number, one in enumerate(images) if one.corner is not None]
    return (
        torch.tensor(boxes, dtype=torch.long).view(-1, 5),
        torch.cat([NOTHING[:0], *(one.noise.flatten() for one in images if one.corner is not None)]),
    )
