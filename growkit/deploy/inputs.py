"""What a file is checked with besides seeded noise: extremes, pictures of odd sizes, the user's own pictures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from growkit.deploy.truth import Preprocessing, noise_images, noise_pixels, normalised
from growkit.errors import GrowkitError
from growkit.pictures import SUFFIXES, open_picture
from growkit.text import visible

SIZES = ((97, 61), (61, 97), (1, 1), (3, 5), (12, 9), (480, 640), (333, 500), (1000, 300))  # heights and widths
PICTURES = 64  # of the user, at most
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def extremes(prepared: Preprocessing, seed: int) -> dict[str, np.ndarray]:
    """Make float32 images (1, C, H, W): black, white, pure noise, a checkerboard, and noise ten times too large."""
    size = prepared.input_size
    rows, columns = np.indices(size[1:])
    pixels = {
        "black": np.zeros(size),
        "white": np.ones(size),
        "pure noise": np.random.default_rng(seed).random(size),
        "checkerboard": np.broadcast_to((rows + columns) % 2, size).astype(np.float64),
    }
    images = {name: normalised(prepared, unit[None]) for name, unit in pixels.items()}
    return {**images, "ten times too large": 10 * noise_images(prepared, 1, seed)}


def made_pictures(prepared: Preprocessing, seed: int) -> dict[str, Image.Image]:
    """Make seeded pictures of odd sizes, smaller and larger than the model's input, by size."""
    channels, found = prepared.input_size[0], {}
    for index, (height, width) in enumerate(SIZES):
        levels = np.rint(255 * noise_pixels((channels, height, width), 1, seed + index)[0]).astype(np.uint8)
        picture = Image.fromarray(levels[0] if channels == 1 else np.ascontiguousarray(levels.transpose(1, 2, 0)))
        found[f"{height} x {width}"] = picture
    return found


def read_pictures(folder: Path, prepared: Preprocessing) -> dict[str, Image.Image]:
    """Read at most PICTURES pictures below `folder`, evenly spaced in order of name, in the model's colour mode.

    Raises:
        GrowkitError: there are none, one cannot be read, or the model takes no pictures; the message names it.
    """
    channels = prepared.input_size[0]
    if channels not in MODES:
        raise GrowkitError(f"--images {folder}: the model takes {channels} channels, pictures have 1, 3 or 4")
    if not folder.is_dir():
        raise GrowkitError(f"--images {folder}: no such folder")
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.is_dir())
    within = sorted((path.relative_to(folder), path) for path in paths)
    shown = [(name, path) for name, path in within if not any(part.startswith(".") for part in name.parts)]
    if len(shown) > PICTURES:
        shown = [shown[place * len(shown) // PICTURES] for place in range(PICTURES)]
    if not shown:
        raise GrowkitError(f"--images {folder}: holds no picture ({', '.join(SUFFIXES)})")
    return {visible(name): open_picture(str(path), MODES[channels]) for name, path in shown}


def as_model_takes(prepared: Preprocessing, given: Sequence[Image.Image]) -> np.ndarray:
    """Apply timm's own transform to pictures -> (N, C, H, W) float32."""
    from timm.data import create_transform

    transform = create_transform(
        input_size=prepared.input_size,
        is_training=False,
        interpolation=prepared.interpolation,
        mean=prepared.mean,
        std=prepared.std,
        crop_pct=prepared.crop_pct,
        crop_mode=prepared.crop_mode,
    )
    return np.stack([np.asarray(transform(picture), dtype=np.float32) for picture in given])


def as_file_takes(picture: Image.Image) -> np.ndarray:
    """Convert a picture -> (1, height, width, C) uint8, for a file that takes pixels."""
    levels = np.asarray(picture)
    return levels[None] if levels.ndim == 3 else levels[None, ..., None]
