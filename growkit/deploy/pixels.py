"""Preprocessing inside the graph: uint8 images of any size, resized, cropped and normalised as timm does it.

With antialias on, ONNX Runtime resizes uint8 in fixed point as Pillow does. Up to two pixels in a hundred differ, by
one level of 255. Resizing in float32 would change every fifth pixel.
"""

import math

import numpy as np
import onnx
from onnx import compose, numpy_helper, parser

from growkit.deploy.truth import Preprocessing
from growkit.errors import GrowkitError

INPUT = "image"
CUBIC = -0.5  # Pillow's coefficient of bicubic interpolation
# pixels outside the picture get no weight, as in Pillow
FILTERS = {
    "bicubic": f'mode="cubic", cubic_coeff_a={CUBIC}, antialias=1, exclude_outside=1',
    "bilinear": 'mode="linear", antialias=1, exclude_outside=1',
}
PREFIX = "pixels_"
CHANNELS = (1, 3)


def with_pixels(core: onnx.ModelProto, prepared: Preprocessing, batch: int | None) -> onnx.ModelProto:
    """Feed `core` from 'image': uint8 (batch, height, width, C), any height and width; changed in place and returned.

    Raises:
        GrowkitError: the preprocessing cannot be done in a graph.
    """
    graph = parser.parse_graph(_source(prepared, batch))
    channels = prepared.input_size[0]
    for name, values in (("mean", prepared.mean), ("std", prepared.std)):
        value = np.asarray(values, dtype=np.float32).reshape(1, channels, 1, 1)
        graph.initializer.append(numpy_helper.from_array(value, name))
    # names that no exporter gives
    compose.add_prefix_graph(graph, PREFIX, rename_inputs=False, rename_outputs=False, inplace=True)
    old = list(core.graph.node)
    del core.graph.node[:], core.graph.input[:]
    core.graph.node.extend([*graph.node, *old])
    core.graph.input.extend(graph.input)
    core.graph.initializer.extend(graph.initializer)
    return core


def resized(prepared: Preprocessing) -> tuple[int, int]:
    """Return height and width before the crop, of an image with the input's own shape."""
    _, height, width = prepared.input_size
    return math.floor(height / prepared.crop_pct), math.floor(width / prepared.crop_pct)


# sizes of all four axes: ONNX Runtime 1.31 fails on a linear Resize with `axes` after a Transpose
def _source(prepared: Preprocessing, batch: int | None) -> str:
    channels, height, width = prepared.input_size
    if prepared.interpolation not in FILTERS:
        raise GrowkitError(
            f"--pixels: {prepared.interpolation} interpolation cannot be done in a graph; "
            "it can be bicubic or bilinear: leave --pixels out and prepare images as preprocessing in the file says"
        )
    if channels not in CHANNELS:  # Pillow weights colours by a fourth channel, and no picture has two
        raise GrowkitError(
            f"--pixels: the model takes {channels} channels, pictures as files have 1 or 3; leave it out"
        )
    if prepared.crop_mode not in ("center", "squash") or (prepared.crop_mode == "center" and height != width):
        raise GrowkitError(
            f"--pixels: crop mode {prepared.crop_mode} for {height} x {width} cannot be done in a graph; leave it out"
        )
    rows, columns = resized(prepared)
    if prepared.crop_mode == "squash":
        # Pillow shrinks before it enlarges: where the width grows, a shrinking height is resized first
        size = f"""
        new_h = Constant<value_ints=[{rows}]>()
        new_w = Constant<value_ints=[{columns}]>()
        h = Shape<start=1, end=2>({INPUT})
        w = Shape<start=2, end=3>({INPUT})
        wider = Greater(new_w, w)
        lower = Min(h, new_h)
        first_h = Where(wider, lower, h)
        kept_first = Shape<start=0, end=2>(turned)
        first_sizes = Concat<axis=0>(kept_first, first_h, w)
        first = Resize<{FILTERS[prepared.interpolation]}>(turned, , , first_sizes)"""
    else:  # the shorter edge becomes `rows`, the longer one is rounded down as in torchvision
        size = f"""
        h = Shape<start=1, end=2>({INPUT})
        w = Shape<start=2, end=3>({INPUT})
        edge = Constant<value_ints=[{rows}]>()
        short = Min(h, w)
        long_h = Mul(h, edge)
        long_w = Mul(w, edge)
        new_h = Div(long_h, short)
        new_w = Div(long_w, short)
        first = Identity(turned)"""

    def middle(length: int, name: str) -> str:  # int(round(x / 2)) of torchvision: halves round to even
        return f"""
        crop_{name} = Constant<value_ints=[{length}]>()
        rest_{name} = Sub(new_{name}, crop_{name})
        half_{name} = Div(rest_{name}, two)
        odd_{name} = Mod(rest_{name}, two)
        half_odd_{name} = Mod(half_{name}, two)
        up_{name} = Mul(odd_{name}, half_odd_{name})
        start_{name} = Add(half_{name}, up_{name})
        end_{name} = Add(start_{name}, crop_{name})"""

    body = f"""
        turned = Transpose<perm=[0, 3, 1, 2]>({INPUT})
        {size}
        two = Constant<value_ints=[2]>()
        {middle(height, "h")}
        {middle(width, "w")}
        kept = Shape<start=0, end=2>(first)
        sizes = Concat<axis=0>(kept, new_h, new_w)
        scaled = Resize<{FILTERS[prepared.interpolation]}>(first, , , sizes)
        starts = Concat<axis=0>(start_h, start_w)
        ends = Concat<axis=0>(end_h, end_w)
        axes = Constant<value_ints=[2, 3]>()
        cropped = Slice(scaled, starts, ends, axes)
        levels = Cast<to=1>(cropped)
        most = Constant<value_float=255.0>()
        unit = Div(levels, most)
        centred = Sub(unit, mean)
        input = Div(centred, std)"""
    count = str(batch) if batch is not None else "batch"
    return (
        f"pixels (uint8[{count}, height, width, {channels}] {INPUT}) "
        f"=> (float[{count}, {channels}, {height}, {width}] input)\n{{{body}\n}}"
    )
