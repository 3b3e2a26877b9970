"""timm's augmentation of whole batches on their device: crops, mirror images, colour jitter and random erasing.

A crop has an area between scale_min and 1 and an aspect ratio between 3:4 and 4:3; it is cut from the image as
evaluation sees it, not from a larger original. Every draw comes from the CPU and depends on the seed and the batch's
number alone, so that a run repeats bit for bit on any number of processes.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from growkit.errors import GrowkitError
from growkit.seeds import number_of, random_kept, seed_all
from growkit.train.erasing import NOTHING, ErasedBatch, Erasing, boxes_and_noise
from growkit.train.normalise import Normalisation, sent, values
from growkit.train.settings import FitSettings

RATIO = (3 / 4, 4 / 3)  # timm's and torchvision's
TRIES = 10  # theirs, too, before the whole image is taken
GREY = (0.299, 0.587, 0.114)  # what red, green and blue weigh in a grey image (ITU-R BT.601)
BRIGHTNESS, CONTRAST, SATURATION = range(3)


def refuse_other_augmentation(settings: FitSettings) -> None:
    """Raise GrowkitError where the settings ask for an augmentation that is made of single images only."""
    if settings.aa is not None:
        raise GrowkitError("--cache crops, flips, jitters and erases batches on the device; leave out --aa, or --cache")


def augmented(
    images: Tensor, normalised: Normalisation, settings: FitSettings, number: int, *, whole: int, part: slice
) -> Tensor:
    """Turn uint8 images (N, C, H, W), the `part` of batch `number` of `whole` images, into augmented network input."""
    crops, colours = (
        torch.Generator().manual_seed(number_of(settings.seed, draw, number)) for draw in ("crops", "colours")
    )
    pixels = crop_and_flip(values(images), settings, crops, whole=whole, part=part)
    if settings.color_jitter:
        least, most = max(0.0, 1 - settings.color_jitter), 1 + settings.color_jitter
        factors = torch.empty(whole, 3).uniform_(least, most, generator=colours)[part]
        order = torch.rand(whole, 3, generator=colours).argsort(1)[part]
        pixels = jittered(pixels, factors, order)
    pixels = normalised.of(pixels)
    if settings.reprob:
        erase, blank, drawn = Erasing(settings.reprob), NOTHING.expand(images.shape[1:]), []
        with random_kept():
            for place in range(whole)[part]:
                seed_all(settings.seed, "erasing", number, place)
                drawn.append(erase(blank))
        pixels = ErasedBatch(images, *boxes_and_noise(drawn)).over(pixels)
    return pixels


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


def jittered(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Change brightness, contrast and saturation of images (N, C, H, W) between 0 and 1, as torchvision's ColorJitter.

    Each blends the image with black, with its mean grey or with its grey image, in place.

    Args:
        factors: (N, 3), how much of the image is left, of brightness, contrast and saturation.
        order: (N, 3), which of them comes first, second and third.
    """
    factors, order = (sent(draws, images.device) for draws in (factors.gather(1, order), order))
    for factor, kind in zip(factors.T, order.T, strict=True):
        factor, kind = factor.view(-1, 1, 1, 1), kind.view(-1, 1, 1, 1)
        grey = _grey(images)
        other = torch.where(kind == CONTRAST, grey.mean((1, 2, 3), keepdim=True), grey)
        other = torch.where(kind == BRIGHTNESS, 0.0, other)
        images.mul_(factor).add_(other.mul_(1 - factor)).clamp_(0, 1)
    return images


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, 1)
    return (red * GREY[0]).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])


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
