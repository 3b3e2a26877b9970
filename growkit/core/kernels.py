"""Triton kernels for memory-bound work: float16 products with one small matrix as a factor, and scaling to float16.

cuBLAS reads what the two gradients of such a product share once for each, and on an H200 no faster than 3 of 4 TB/s.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = 128  # rows and columns of the small matrix
MOST_ELEMENTS = 4096  # that a program scales


def run_each(device: torch.device) -> None:
    """Run every kernel once on tiny tensors; raises what Triton, its compiler or the driver raises."""
    square, one = torch.ones(1, 16, 16, dtype=torch.float16, device=device), torch.ones((), device=device)
    scaled(square.float(), one, square)
    product(square[0], square, torch.empty_like(square), 1, 1)
    gradients(square[0], square, square)


def scaled(values: Tensor, scale: Tensor, out: Tensor) -> bool:
    """Write values * scale () to `out`; False, with nothing written, if their memory layout does not allow it.

    One of them must be contiguous, and the other must take at most four steps (see `in_steps`).
    """
    steps = in_steps(*((values.shape, values.stride()) if out.is_contiguous() else (out.shape, out.stride())), 4)
    if steps is None or not _adjoin(steps[3]) or not (out.is_contiguous() or values.is_contiguous()):
        return False
    sizes, strides = zip(*steps, strict=True)
    block = min(MOST_ELEMENTS, triton.next_power_of_2(sizes[3]))
    grid = (sizes[0] * sizes[1] * sizes[2] * triton.cdiv(sizes[3], block),)
    with torch.cuda.device_of(values):
        _scaled[grid](values, scale, out, *sizes[1:], *strides[:3], out.is_contiguous(), block)
    return True


def product(small: Tensor, large: Tensor, made: Tensor, before: int, new: int) -> bool:
    """Write (new, summed) times each of (before, summed, after) to `made`; False if its memory layout rules that out.

    The first `before` axes of `made` are those indices, then `new` axes the new ones; the rest, contiguous, are after.
    """
    cuts = (0, before), (before, before + new), (before + new, made.dim())
    places, rows, columns = (in_steps(made.shape[cut:end], made.stride()[cut:end], 2) for cut, end in cuts)
    if places is None or rows is None or columns is None or columns[0][0] > 1 or not _adjoin(columns[1]):
        return False
    (outer_size, outer), (inner_size, inner) = places
    (_, major), (minor_size, minor) = rows
    after = columns[1][0]
    blocks = _blocks(*small.shape)
    grid = (outer_size * inner_size * triton.cdiv(after, blocks[-1]),)
    sizes = after, *small.shape, inner_size, minor_size
    with torch.cuda.device_of(large):
        _product[grid](small.contiguous(), large.contiguous(), made, *sizes, outer, inner, major, minor, *blocks)
    return True


def gradients(small: Tensor, large: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `small` (float32) and `large` (float16), given their product's (before, new, after)."""
    (new, summed), (before, _, after) = small.shape, large.shape
    blocks = _blocks(new, summed)
    tiles = before * triton.cdiv(after, blocks[-1])
    programs = min(tiles, _of(large.device)["multiprocessor_count"])
    of_large = torch.empty_like(large, memory_format=torch.contiguous_format)
    parts = torch.empty((programs, new, summed), dtype=torch.float32, device=large.device)
    factors = small.contiguous(), large.contiguous(), above.contiguous()
    options = {"num_warps": 8, "num_stages": _stages(blocks, large.device)}
    with torch.cuda.device_of(large):
        _gradients[(programs,)](*factors, of_large, parts, tiles, after, new, summed, *blocks, **options)
    return parts.sum(0), of_large


def in_steps(sizes: Sequence[int], strides: Sequence[int], most: int) -> list[tuple[int, int]] | None:
    """Merge a tensor's axes into the (size, stride) of `most` axes, outer ones first; None if it takes more."""
    steps: list[tuple[int, int]] = []
    for size, stride in reversed([pair for pair in zip(sizes, strides, strict=True) if pair[0] != 1]):
        if steps and stride == steps[0][0] * steps[0][1]:
            steps[0] = (steps[0][0] * size, steps[0][1])
        else:
            steps.insert(0, (size, stride))
    # a stride of 0 keeps offsets divisible by 16, so that writes go in pieces of 16 bytes
    return [(1, 0)] * (most - len(steps)) + steps if len(steps) <= most else None


def _adjoin(step: tuple[int, int]) -> bool:
    """Return whether an axis of this size and stride is contiguous."""
    return step[1] == 1 or step[0] == 1


def _blocks(*sizes: int) -> tuple[int, ...]:
    """Return a program's block sizes: all new and summed indices, at least 16 for a tensor core, and the columns."""
    blocks = tuple(max(16, triton.next_power_of_2(size)) for size in sizes)
    return *blocks, 128 if max(blocks) <= 64 else 64


def _stages(blocks: Sequence[int], device: torch.device) -> int:
    """Return how many tiles a multiprocessor's shared memory holds beside the small matrix and the output."""
    new, summed, columns = blocks
    room = _of(device)["max_shared_mem"] - 2 * summed * (new + columns)
    return max(1, min(4, room // (2 * (new + summed) * columns)))


@lru_cache
def _of(device: torch.device) -> dict[str, int]:
    """Return Triton's properties of a GPU, asked once as that takes milliseconds; the least when it interprets."""
    if device.type != "cuda":
        return {"multiprocessor_count": 1, "max_shared_mem": 0}
    return triton.runtime.driver.active.utils.get_device_properties(device.index)


@triton.jit
def _scaled(
    values, scale, out, first, second, columns, outer, middle, inner, READS_IN_STEPS: tl.constexpr, BLOCK: tl.constexpr
):
    blocks = tl.cdiv(columns, BLOCK)
    row = tl.program_id(0) // blocks
    places = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    in_steps = (row // (first * second)).to(tl.int64) * outer + (row // second % first).to(tl.int64) * middle
    in_steps += (row % second).to(tl.int64) * inner
    in_one = row.to(tl.int64) * columns
    made = tl.load(values + (in_steps if READS_IN_STEPS else in_one) + places, places < columns, 0.0) * tl.load(scale)
    to = out + (in_one if READS_IN_STEPS else in_steps) + places
    tl.store(to, made.to(out.dtype.element_ty), places < columns)


@triton.jit
def _product(
    small, large, made, after, new, summed, inner_places, minor_rows, outer, inner, major, minor,
    NEW: tl.constexpr, SUMMED: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    tiles = tl.cdiv(after, COLUMNS)
    place = tl.program_id(0) // tiles
    columns = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    rows, sums = tl.arange(0, NEW), tl.arange(0, SUMMED)
    inside = columns < after
    matrix = tl.load(small + rows[:, None] * summed + sums, (rows < new)[:, None] & (sums < summed), 0.0)
    first = large + place.to(tl.int64) * summed * after
    values = tl.load(first + sums[:, None] * after + columns, (sums < summed)[:, None] & inside, 0.0)
    first = made + (place // inner_places).to(tl.int64) * outer + (place % inner_places).to(tl.int64) * inner
    row = (rows // minor_rows).to(tl.int64) * major + (rows % minor_rows).to(tl.int64) * minor
    tl.store(first + row[:, None] + columns, tl.dot(matrix, values).to(tl.float16), (rows < new)[:, None] & inside)


@triton.jit
def _gradients(
    small, large, above, of_large, parts, all_tiles, after, new, summed,
    NEW: tl.constexpr, SUMMED: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    tiles = tl.cdiv(after, COLUMNS)
    rows, sums = tl.arange(0, NEW), tl.arange(0, SUMMED)
    turned = tl.load(small + sums[:, None] + rows * summed, (sums < summed)[:, None] & (rows < new), 0.0)
    of_small = tl.zeros((NEW, SUMMED), tl.float32)
    for tile in tl.range(tl.program_id(0), all_tiles, tl.num_programs(0)):
        place = (tile // tiles).to(tl.int64)
        columns = tile % tiles * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < after
        at_large = place * summed * after + sums[:, None] * after + columns
        in_large = (sums < summed)[:, None] & inside
        at_above = place * new * after + rows[:, None] * after + columns
        values = tl.load(large + at_large, in_large, 0.0)
        steep = tl.load(above + at_above, (rows < new)[:, None] & inside, 0.0)
        tl.store(of_large + at_large, tl.dot(turned, steep).to(tl.float16), in_large)
        of_small = tl.dot(steep, tl.trans(values), of_small)
    at_parts = tl.program_id(0) * new * summed + rows[:, None] * summed + sums
    tl.store(parts + at_parts, of_small, (rows < new)[:, None] & (sums < summed))
