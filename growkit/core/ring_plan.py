"""How a ring is contracted: along which grown axis it is cut, into how many slices, and in which order each is made."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from math import prod
from operator import attrgetter

from growkit.core.contract import SPARE, Path, cheapest_orders

# Elements of the largest intermediate of one slice: a share of the result's, so that slices take little memory beside
# the result, but at least 1 MB in float32, because smaller slices make the matrix products thin; above 128 MB (on a GPU
# 256 MB) only if no plan below is near the least arithmetic, and then up to half the result, or if none stays below.
SLICE_SHARE, MOST_SHARE = 1 / 8, 1 / 2
FEWEST_ELEMENTS, MOST_ELEMENTS = 2**18, 2**25
FEWEST_ON_GPU = 2**26  # 256 MB: smaller slices leave a GPU waiting for the next
SHARE_ON_GPU = 0.8  # but at most this share of the result: beside a small model even one such slice would be large
MANY_SLICES = 256  # more are not made to meet SLICE_SHARE: each takes dozens of kernels


@dataclass(frozen=True)
class ContractionPlan:
    """How a ring is applied: in slices of `width` along the grown `axis`, in `parts`, one for each process."""

    path: Path  # order in which a slice is contracted
    axis: str
    width: int
    slices: int  # of all parts together
    flops: int  # of one forward application, 2 per multiply-add, of all parts together
    training_flops: int  # those plus a backward pass
    largest_elements: int  # of the largest intermediate
    elements: int  # of all intermediates of a slice together
    parts: int = 1


def fewest_elements(grown: int, *, gpu: bool) -> int:
    """Return up to how many elements intermediates are not cut further; the result has `grown` elements."""
    return max(FEWEST_ELEMENTS, min(FEWEST_ON_GPU, int(SHARE_ON_GPU * grown))) if gpu else FEWEST_ELEMENTS


@lru_cache(maxsize=256)
def contraction_plan(
    equation: str,
    x: tuple[int, ...],
    cores: tuple[tuple[int, ...], ...],
    order: str,
    fewest: int = FEWEST_ELEMENTS,
    parts: int = 1,
) -> ContractionPlan:
    """Plan how to apply a ring at next to no extra arithmetic, in few slices with small intermediates.

    Slicing along the axis whose core the best order takes first repeats nothing; slicing along L, layer
    by layer, repeats the contraction with the first core for every layer (1.9 times the arithmetic for
    DeiT-S -> DeiT-B at rank 4). So training arithmetic comes first, among plans whose intermediates have at most
    MOST_ELEMENTS (or `fewest`) elements, or MOST_SHARE of the result if none of those is within SPARE of the best order
    in one piece. Of the plans within SPARE of the cheapest, those with intermediates of at most SLICE_SHARE of the
    result (or `fewest` elements) are taken, else those with the smallest.
    If `parts` divides no grown axis, the plan has one part.
    """
    positions = [position for position, core in enumerate(cores) if core[2] % parts == 0]
    if not positions:
        positions, parts = list(range(len(cores))), 1
    plans = [plan for position in positions for plan in _plans_along(position, equation, x, cores, order, parts)]
    grown, whole = prod(core[2] for core in cores), cheapest_orders(equation, x, cores)[0]
    able = _at_most(max(MOST_ELEMENTS, fewest), plans)
    if not any(one.training_flops <= SPARE * whole.training_flops and one.flops <= SPARE * whole.flops for one in able):
        able = _at_most(max(MOST_ELEMENTS, fewest, MOST_SHARE * grown), plans)
    for cost in (attrgetter("training_flops"), attrgetter("flops")):
        enough = max(SPARE * cost(whole), min(map(cost, able)))
        able = [plan for plan in able if cost(plan) <= enough]
    able = _at_most(max(SLICE_SHARE * grown, fewest), able)
    return min(able, key=lambda plan: (plan.flops, plan.slices))


def _at_most(elements: float, plans: list[ContractionPlan]) -> list[ContractionPlan]:
    """Return the plans with intermediates of at most `elements`; if there are none, those with the smallest."""
    elements = max(elements, min(plan.largest_elements for plan in plans))
    return [plan for plan in plans if plan.largest_elements <= elements]


def _plans_along(
    position: int, equation: str, x: tuple[int, ...], cores: tuple[tuple[int, ...], ...], order: str, parts: int
) -> Iterator[ContractionPlan]:
    """Yield plans that cut each part of the axis order[position] into one, two, three, four slices and so on."""
    shape, sliced = cores[position], list(cores)
    each = shape[2] // parts
    for pieces in _counts():
        width = -(-each // pieces)
        sliced[position] = (shape[0], shape[1], width, shape[3])
        slices = parts * -(-each // width)
        for one in cheapest_orders(equation, x, tuple(sliced)):
            costs = slices * one.flops, slices * one.training_flops, one.largest, one.intermediates
            yield ContractionPlan(one.path, order[position], width, slices, *costs, parts)
        if width == 1 or (slices >= MANY_SLICES and one.largest <= MOST_ELEMENTS):
            return


def _counts() -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12 and so on."""
    yield 1
    for power in count():
        yield from (2 << power, 3 << power)
