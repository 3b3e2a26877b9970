"""Golden data: seeded images, the float64 truth, and ONNX's test_data_set folders.

The folders are read by onnx_test_runner, onnxruntime_perf_test and onnx.backend.test.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from growkit.errors import GrowkitError

BATCHES = (1, 5)  # of test_data_set_0 and test_data_set_1


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
    """Read from `model.pretrained_cfg`; the size from the network itself where it differs.

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
    """(count, C, H, W) float32: coarse colour fields with fine noise, normalised by mean and std.

    The coarse part makes images differ after patches are averaged, as photographs do.
    """
    generator = np.random.default_rng(seed)
    channels, height, width = prepared.input_size
    coarse = generator.random((count, channels, 4, 4))
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    fine = generator.random((count, channels, height, width))
    pixels = 0.7 * coarse[:, :, rows[:, None], columns] + 0.3 * fine
    mean, std = (np.reshape(v, (-1, 1, 1)) for v in (prepared.mean, prepared.std))
    return np.ascontiguousarray((pixels - mean) / std, dtype=np.float32)


def truth_of(model: nn.Module) -> nn.Module:
    """A float64 copy on the CPU, in eval mode: what every float32 result is held against."""
    return copy.deepcopy(model).cpu().double().eval()


@torch.inference_mode()
def logits_of(model: nn.Module, images: np.ndarray) -> np.ndarray:
    """Run `model` on (B, C, H, W) images in the model's own precision and place -> (B, classes)."""
    first = next(model.parameters())
    return model(torch.from_numpy(images).to(first)).cpu().numpy()


def write_reference(model: nn.Module, folder: Path, *, seed: int) -> tuple[Path, ...]:
    """Write test_data_set_0 (batch 1) and test_data_set_1 (batch 5) below `folder`.

    The outputs are the float64 truth rounded to float32. Returns the two folders.
    """
    truth, prepared = truth_of(model), preprocessing(model)
    folders = []
    for index, batch in enumerate(BATCHES):
        images = noise_images(prepared, batch, seed + index)
        target = folder / f"test_data_set_{index}"
        target.mkdir(parents=True)
        logits = logits_of(truth, images).astype(np.float32)
        for name, stem, value in (("input", "input_0", images), ("logits", "output_0", logits)):
            tensor = numpy_helper.from_array(value, name)
            (target / f"{stem}.pb").write_bytes(tensor.SerializeToString(deterministic=True))
        folders.append(target)
    return tuple(folders)


def read_reference(folder: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield (name, images, logits) of each test_data_set_* in `folder`.

    Raises:
        GrowkitError: there is none, or a file is missing or damaged.
    """
    found = sorted(folder.glob("test_data_set_*"))
    if not found:
        raise GrowkitError(f"{folder} holds no test_data_set_*; `growkit export` writes them beside model.onnx")
    for data_set in found:
        arrays = []
        for name in ("input_0.pb", "output_0.pb"):
            try:
                tensor = onnx.load_tensor(str(data_set / name))
                arrays.append(numpy_helper.to_array(tensor).copy())  # its own is read-only
            except Exception as error:  # protobuf and numpy_helper raise a dozen kinds
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise GrowkitError(f"{data_set / name}: not a readable ONNX tensor ({reason}); export again") from None
        yield data_set.name, arrays[0], arrays[1]
