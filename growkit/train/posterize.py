"""timm's posterize at 0 bits, which its policies ask for at their strongest: black, though Pillow 13 refuses it."""

from typing import Any

from PIL import Image
from timm.data import auto_augment

NAMES = ("Posterize", "PosterizeIncreasing", "PosterizeOriginal")
_posterize = auto_augment.posterize


def posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """timm's, but for 0 bits: a black image, as every Pillow before 13 made it."""
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return _posterize(image, bits_to_keep, **options)


def use_in_policies() -> None:
    """Have the policies that timm makes from now on take `posterize`."""
    auto_augment.NAME_TO_OP.update(dict.fromkeys(NAMES, posterize))
