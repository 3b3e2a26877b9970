"""What a file is compared with: the model's preprocessing, seeded images, and its logits in float64."""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from growkit.errors import GrowkitError


@dataclass(frozen=True)
class Preprocessing:
    """What a server must do to an image before the model sees it.

    input_size (channels, height, width); mean and std per channel, of pixels in 0..1.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str


def preprocessing(model: nn.Module) -> Preprocessing:
    """Read the preprocessing from `model.pretrained_cfg`; the size from the network itself where it differs.

    Raises:
        GrowkitError: the model has no `pretrained_cfg`.
    """
    config = getattr(model, "pretrained_cfg", None)
    if not config:
        raise GrowkitError(
            f"{type(model).__name__} has no pretrained_cfg, so its input size and mean/std are "
            "unknown; set model.pretrained_cfg as timm does"
        )
    channels, height, width = config["input_size"]
    # timm keeps the published size in the config when img_size= or in_chans= overrides it
    patches = getattr(model, "patch_embed", None)
    height, width = getattr(patches, "img_size", None) or (height, width)
    projection = getattr(patches, "proj", None)
    channels = getattr(projection, "in_channels", channels)
    return Preprocessing(
        input_size=(channels, height, width),
        mean=_per_channel(config["mean"], channels),
        std=_per_channel(config["std"], channels),
        interpolation=str(config.get("interpolation", "bicubic")),
        crop_pct=float(config.get("crop_pct", 1.0)),
        crop_mode=str(config.get("crop_mode", "center")),
    )


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) == channels:
        return tuple(map(float, values))
    return (float(np.mean(values)),) * channels


def noise_images(prepared: Preprocessing, count: int, seed: int) -> np.ndarray:
    """(count, C, H, W) float32: noise_pixels, normalised by mean and std."""
    return normalised(prepared, noise_pixels(prepared.input_size, count, seed))


def noise_pixels(size: tuple[int, int, int], count: int, seed: int) -> np.ndarray:
    """(count, C, H, W) float64 in 0..1: coarse colour fields with fine noise.

    The coarse part makes images differ after patches are averaged, as photographs do.
    """
    generator = np.random.default_rng(seed)
    channels, height, width = size
    coarse = generator.random((count, channels, 4, 4))
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    fine = generator.random((count, channels, height, width))
    return 0.7 * coarse[:, :, rows[:, None], columns] + 0.3 * fine


def normalised(prepared: Preprocessing, pixels: np.ndarray) -> np.ndarray:
    """Normalise (N, C, H, W) in 0..1 by mean and std -> float32."""
    mean, std = (np.reshape(v, (-1, 1, 1)) for v in (prepared.mean, prepared.std))
    return np.ascontiguousarray((pixels - mean) / std, dtype=np.float32)


def at_image_size(model: nn.Module, size: int | None) -> nn.Module:
    """Return `model` for images of size x size, its position embeddings resampled as in timm; a copy, or itself.

    Raises:
        GrowkitError: the network has a fixed size, or the patches do not fit.
    """
    if size is None or preprocessing(model).input_size[1:] == (size, size):
        return model
    if not isinstance(model, VisionTransformer):
        raise GrowkitError(f"--image-size {size}: {type(model).__name__} has one size; leave it out")
    patch = max(model.patch_embed.patch_size)
    if size % patch:
        raise GrowkitError(f"--image-size {size}: patches are {patch} wide; choose a multiple of {patch}")
    copied = copy.deepcopy(model)
    copied.set_input_size(img_size=(size, size))
    return copied


def truth_of(model: nn.Module) -> nn.Module:
    """Return a float64 copy on the CPU, in eval mode, with which every float32 result is compared."""
    return copy.deepcopy(model).cpu().double().eval()


@torch.inference_mode()
def logits_of(model: nn.Module, images: np.ndarray) -> np.ndarray:
    """Run `model` on (B, C, H, W) images in the model's own precision and on its device -> (B, classes)."""
    first = next(model.parameters())
    return model(torch.from_numpy(images).to(first)).cpu().numpy()
