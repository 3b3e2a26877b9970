"""Images that a graph is run on to learn how large its activations get."""

from collections.abc import Iterator

import numpy as np
import onnx

from growkit.errors import GrowkitError

CALIBRATED_AT_ONCE = 8  # images per run


def refuse_images(proto: onnx.ModelProto, images: np.ndarray, what: str) -> None:
    """Raise GrowkitError unless `images`, called `what`, are finite (N, C, H, W) float32 as the graph takes them."""
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    wanted = tuple(d.dim_value for d in dims[1:])
    if images.ndim != 4 or images.shape[1:] != wanted or not len(images):
        takes = " x ".join(map(str, wanted))
        got = " x ".join(map(str, images.shape)) or "a single number"
        raise GrowkitError(f"{what} {got}: the model takes N x {takes}, N at least 1; prepare them as for the model")
    if images.dtype != np.float32:
        raise GrowkitError(f"{what} are {images.dtype}: the model takes normalised float32")
    if not np.isfinite(images).all():
        raise GrowkitError(f"{what} hold NaN or infinite values; look for damaged ones")


def runs(proto: onnx.ModelProto, images: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """Yield the images in batches for the graph; a fixed batch size is filled up by repeating the last image."""
    given = proto.graph.input[0]
    batch = given.type.tensor_type.shape.dim[0].dim_value
    if batch:
        images = np.concatenate([images, np.repeat(images[-1:], -len(images) % batch, axis=0)])
    for start in range(0, len(images), batch or CALIBRATED_AT_ONCE):
        yield {given.name: images[start : start + (batch or CALIBRATED_AT_ONCE)]}
