"""Preprocessing inside the graph: uint8 images of any size, resized, cropped and normalised as timm does it.

With antialias on, ONNX Runtime resizes uint8 in fixed point as Pillow does. Up to two pixels in a hundred differ, by
one level of 255; with bilinear interpolation up to a quarter, where a side has few pixels. Resizing in float32 would
change every fifth pixel.
"""

import math

import numpy as np
import onnx
from onnx import compose, numpy_helper, parser
from PIL import Image

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

    prepared  one that `refuse_unfit` lets pass
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


def refuse_unfit(prepared: Preprocessing) -> None:
    """Raise GrowkitError where the preprocessing cannot be done in a graph."""
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


# sizes of all four axes: ONNX Runtime 1.31 fails on a linear Resize with `axes` after a Transpose
def _source(prepared: Preprocessing, batch: int | None) -> str:
    """Return the graph in ONNX's text format: the image, channels first -> first -> scaled -> cropped -> input.

    The crop starts at torchvision's int(round(rest / 2)), where halves round to even.
    """
    channels, height, width = prepared.input_size
    count = str(batch) if batch is not None else "batch"
    return f"""
    pixels (uint8[{count}, height, width, {channels}] {INPUT})
        => (float[{count}, {channels}, {height}, {width}] input)
    {{
        turned = Transpose<perm=[0, 3, 1, 2]>({INPUT})
        h = Shape<start=1, end=2>({INPUT})
        w = Shape<start=2, end=3>({INPUT})
        edges = Concat<axis=0>(h, w)
        {_squashed(prepared) if prepared.crop_mode == "squash" else _shorter_edge(prepared)}
        {_height_first(prepared)}
        kept = Shape<start=0, end=2>(first)
        sizes = Concat<axis=0>(kept, new)
        scaled = Resize<{FILTERS[prepared.interpolation]}>(first, , , sizes)
        crop = Constant<value_ints=[{height}, {width}]>()
        rest = Sub(new, crop)
        two = Constant<value_ints=[2]>()
        half = Div(rest, two)
        odd = Mod(rest, two)
        half_odd = Mod(half, two)
        up = Mul(odd, half_odd)
        starts = Add(half, up)
        ends = Add(starts, crop)
        axes = Constant<value_ints=[2, 3]>()
        cropped = Slice(scaled, starts, ends, axes)
        levels = Cast<to=1>(cropped)
        most = Constant<value_float=255.0>()
        unit = Div(levels, most)
        centred = Sub(unit, mean)
        input = Div(centred, std)
    }}"""


def _squashed(prepared: Preprocessing) -> str:
    """Both edges get the size wanted."""
    rows, columns = resized(prepared)
    return f"new = Constant<value_ints=[{rows}, {columns}]>()"


def _shorter_edge(prepared: Preprocessing) -> str:
    """The shorter edge gets the size wanted; the longer one is rounded down as in torchvision."""
    return f"""
        edge = Constant<value_ints=[{resized(prepared)[0]}]>()
        enlarged = Mul(edges, edge)
        shorter = Min(h, w)
        new = Div(enlarged, shorter)"""


def _height_first(prepared: Preprocessing) -> str:
    """The height of tall pictures is resized before their width, and the levels between are rounded, as Pillow does it.

    From Pillow 13 on a picture is tall if its height shrinks by more than twice what its width does.
    """
    if not _has_tall_pictures():
        return "first = Identity(turned)"
    return f"""
        changed = Sub(edges, new)
        none = Constant<value_ints=[0]>()
        shrunk = Max(changed, none)
        twice = Constant<value_ints=[1, 2]>()
        compared = Mul(shrunk, twice)
        lower, narrower = Split<num_outputs=2>(compared)
        tall = Greater(lower, narrower)
        rows, _ = Split<num_outputs=2>(new)
        first_h = Where(tall, rows, h)
        kept_first = Shape<start=0, end=2>(turned)
        first_sizes = Concat<axis=0>(kept_first, first_h, w)
        first = Resize<{FILTERS[prepared.interpolation]}>(turned, , , first_sizes)"""


def _has_tall_pictures() -> bool:
    """Whether the Pillow that training reads with resizes heights first at all: until 12 it never did."""
    noise = np.random.default_rng(0).integers(0, 256, (640, 80), dtype=np.uint8)
    picture = Image.fromarray(noise)
    return picture.resize((40, 40)).tobytes() == picture.resize((80, 40)).resize((40, 40)).tobytes()
