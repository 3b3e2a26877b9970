"""The tensor-ring operator of Mango (Pan et al., NeurIPS 2023): four small cores in place of one 8-axis tensor.

    y[B,O,L,I] = sum over b, o, l, i and the bonds p, q, r, s of
                 x[b,o,l,i] * core_B[p,b,B,q] * core_O[q,o,O,r] * core_L[r,l,L,s] * core_I[s,i,I,p]

B is the matrix inside a layer, O its output axis, L the layer, I its input axis; capital = grown axis.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from math import prod
from operator import attrgetter
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from growkit.core.contract import (
    SPARE,
    Pair,
    Path,
    cheapest_orders,
    contract,
    float32_sums,
    gradients,
    growth,
    pairs_of,
    terms_of,
)
from growkit.core.half import ROOM, halved, may_halve, power_above, scaled, scales_of
from growkit.errors import GrowkitError

AXES = "BOLI"
BONDS = "pqrs"
# Elements of the largest intermediate of one slice: a share of the result's, so that slices weigh little beside what is
# grown, but at least 1 MB in float32, for smaller slices make the matrix products thin, and never above 128 MB.
SLICE_SHARE = 1 / 8
FEWEST_ELEMENTS, MOST_ELEMENTS = 2**18, 2**25
FEWEST_ON_GPU = 2**26  # 256 MB: smaller slices leave a GPU waiting for the next
SHARE_ON_GPU = 0.8  # but at most as much of the result: beside a small model even one of those would weigh
MANY_SLICES = 256  # more are not made for the share's sake: each takes some dozens of kernels


class RingOperator(nn.Module):
    """TR-MPO over the axes B, O, L, I. The core of axis n has shape (r_n, old_n, new_n, r_{n+1}), ring closed.

    `order` names the axes around the ring; O and I are not neighbours in the default 'BOLI'.
    `ranks` has one entry per bond: ranks[n] is the bond in front of the axis order[n].
    """

    def __init__(
        self,
        old: Mapping[str, int],
        new: Mapping[str, int],
        ranks: Sequence[int],
        order: str = AXES,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if sorted(order) != sorted(AXES):
            raise GrowkitError(f"ring order {order!r}: expected the letters B, O, L and I, each once")
        if len(ranks) != len(AXES) or min(ranks) < 1:
            raise GrowkitError(f"ranks {tuple(ranks)}: expected four whole numbers of at least 1, one per bond")
        self.order, self.ranks = order, tuple(ranks)
        self.processes = 1  # of torch.distributed's, all there are, that train it together; each grows a part for all
        self.cores = nn.ParameterDict(
            {
                axis: torch.zeros(ranks[n], old[axis], new[axis], ranks[(n + 1) % 4], dtype=dtype)
                for n, axis in enumerate(order)
            }
        )

    @classmethod
    def lossless(
        cls,
        paths: Sequence[Mapping[str, Tensor]],
        ranks: Sequence[int],
        order: str = AXES,
        *,
        noise: float,
        generator: torch.Generator,
    ) -> Self:
        """A ring that computes the sum of `paths` exactly, with every further bond index alive.

        Each path holds one (new, old) matrix per axis and takes one index of every bond (growth-methods
        1.3: one path for whole multiples of width, two otherwise). The other bond indices get noise of
        standard deviation noise / sqrt(old) where they leave a core and zeros where they enter the next
        one: the sum is untouched, yet the zeros receive a gradient at the first step (as LoRA starts).

        Raises:
            GrowkitError: a bond has fewer indices than there are paths.
        """
        first = paths[0]
        old = {axis: first[axis].shape[1] for axis in AXES}
        new = {axis: first[axis].shape[0] for axis in AXES}
        ring = cls(old, new, ranks, order, first["B"].dtype)
        if min(ring.ranks) < len(paths):
            raise GrowkitError(f"ranks {ring.ranks}: this start needs {len(paths)} on every bond")
        with torch.no_grad():
            for axis in AXES:
                core = ring.cores[axis]
                leaving = core[: len(paths), :, :, len(paths) :]
                leaving.normal_(0, noise / old[axis] ** 0.5, generator=generator)
                for index, path in enumerate(paths):
                    core[index, :, :, index] = path[axis].T
        return ring

    def forward(self, x: Tensor) -> Tensor:
        """(B, O, L, I) -> (B', O', L', I'), slice by slice along the grown axis where slicing costs nothing.

        A slice's intermediates are recomputed in the backward pass, so memory holds one slice's at a time. Where
        `processes` train together, each computes its part of the slices and gets the others'. The gradients that it
        finds are then those of its part, from the upstream gradients of all: their mean over the processes is the
        mean gradient, as where each computes everything.
        """
        cores = [self.cores[axis] for axis in self.order]
        if torch.is_grad_enabled():
            plan = self._plan(x, cores, self.processes)
            if plan.slices == 1 and not may_halve(x):
                return _product(self.equation, plan.path, [x, *cores])
            sliced: Tensor = _Sliced.apply(self.equation, plan, x, *cores)
            return sliced
        grown = _grown_like(x, self.equation, cores).zero_()
        for ring in _independent_rings(_without_dead_bonds(cores)):
            plan = self._plan(x, ring)
            for (place,), slice_ in _cut(self.equation, plan, grown, [x, *ring]):
                place += _product(self.equation, plan.path, slice_)
        return grown

    def _plan(self, x: Tensor, cores: Sequence[Tensor], parts: int = 1) -> "ContractionPlan":
        shapes = tuple(tuple(core.shape) for core in cores)
        fewest = fewest_elements(prod(core.shape[2] for core in cores), gpu=x.is_cuda)
        fewest *= 2 if torch.is_grad_enabled() and may_halve(x) else 1  # of half the size
        return contraction_plan(self.equation, tuple(x.shape), shapes, self.order, fewest, parts)

    @property
    def equation(self) -> str:
        """The einsum of forward, for this ring's order."""
        cores = (f"{BONDS[n]}{axis.lower()}{axis}{BONDS[(n + 1) % 4]}" for n, axis in enumerate(self.order))
        return f"boli,{','.join(cores)}->BOLI"


def _without_dead_bonds(cores: list[Tensor]) -> list[Tensor]:
    """Drop the bond indices that a zero slice on either side silences: the sum is the same, a fresh start cheap."""
    cores = list(cores)
    for n in range(len(cores)):
        alive = cores[n - 1].flatten(0, 2).any(0) & cores[n].flatten(1).any(1)
        if not alive.any():
            alive[0] = True
        cores[n - 1], cores[n] = cores[n - 1][..., alive], cores[n][alive]
    return cores


def _independent_rings(cores: list[Tensor]) -> list[list[Tensor]]:
    """Split a ring whose bond indices fall into groups that never meet: the rings sum to it and cost less.

    A fresh start is such a ring: two paths of rank 1 take half the arithmetic of one ring of rank 2.
    """
    ranks = [len(core) for core in cores]
    met = torch.block_diag(*(torch.eye(rank) for rank in ranks))  # over the indices of all bonds
    blocks = [list(rows.split(ranks, dim=1)) for rows in met.split(ranks)]
    for n, core in enumerate(cores):
        link = core.flatten(1, 2).any(1).cpu()
        blocks[n][(n + 1) % 4] += link
        blocks[(n + 1) % 4][n] += link.T
    for _ in range(len(met).bit_length()):
        met = (met @ met > 0).float()
    groups = [row.bool().to(cores[0].device).split(ranks) for row in met.unique(dim=0)]
    return [[core[group[n]][..., group[(n + 1) % 4]] for n, core in enumerate(cores)] for group in groups]


class _Sliced(torch.autograd.Function):
    """A ring applied slice by slice, each written where it belongs; intermediates are made again for gradients.

    torch's checkpointing would do as much, but takes longer about a slice than a GPU does. Where torch may multiply in
    TF32, factors and intermediates are float16.
    """

    @staticmethod
    def forward(ctx: Any, equation: str, plan: "ContractionPlan", x: Tensor, *cores: Tensor) -> Tensor:
        ctx.equation, ctx.plan = equation, plan
        grown = _grown_like(x, equation, cores)
        factors, scales = [x, *cores], None
        if may_halve(x):
            factors, scales, ctx.steeper = _halved(equation, plan, factors)
            whole = scales.prod()
        ctx.save_for_backward(*factors, scales)
        with nullcontext() if scales is None else float32_sums():
            for places, slice_ in _cut(equation, plan, grown, factors):
                if plan.parts > 1:
                    made = _product(equation, plan.path, slice_)
                    _hand_round(made if scales is None else made.mul_(whole), places)
                elif scales is None:
                    _product(equation, plan.path, slice_, out=places[0])
                else:
                    scaled(_product(equation, plan.path, slice_), whole, places[0])
        return grown

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        *factors, scales = ctx.saved_tensors
        steepest = flat = None
        if scales is not None:
            steepest = _scale_of_sums(grad, ctx.plan.parts) * ctx.steeper
            flat = 1 / steepest
        found: list[Tensor | None] = [None] * len(wanted)
        cut = 1 + _position(ctx.equation, ctx.plan)
        pieces: list[Tensor] = []  # of the gradient of the core that is cut
        with without_autocast(grad.device.type), nullcontext() if scales is None else float32_sums():
            for places, slice_ in _cut(ctx.equation, ctx.plan, grad, factors):
                above = _sum_of_own(places)
                if flat is not None:
                    above = halved(above, flat)
                for number, part in enumerate(_gradients(ctx.equation, ctx.plan.path, slice_, above, wanted)):
                    total = found[number]
                    if part is None:
                        continue
                    if number == cut:
                        pieces.append(part)
                    elif total is None:
                        found[number] = part
                    else:
                        total += part
        if pieces:
            found[cut] = _among_zeros(torch.cat(pieces, dim=2), ctx.plan.parts)
        if steepest is not None:
            for part, scale in zip(found, steepest * scales.prod() / scales, strict=True):
                if part is not None:
                    part.mul_(scale)
        return None, None, *found


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """No mixed precision: a ring's long sums stay in the weights' precision, forwards and backwards."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def _cut(
    equation: str, plan: "ContractionPlan", grown: Tensor, factors: Sequence[Tensor]
) -> Iterator[tuple[tuple[Tensor, ...], list[Tensor]]]:
    """Views of what is grown, slice by slice, one in each process's part; with each the factors of this one's."""
    position, dim = 1 + _position(equation, plan), AXES.index(plan.axis)
    parts = (part.split(plan.width, dim) for part in grown.chunk(plan.parts, dim))
    own = factors[position].chunk(plan.parts, dim=2)[_number(plan.parts)]
    for places, piece in zip(zip(*parts, strict=True), own.split(plan.width, dim=2), strict=True):
        yield places, [*factors[:position], piece, *factors[position + 1 :]]


def _halved(equation: str, plan: "ContractionPlan", factors: Sequence[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Factors in float16, their scales (n,), and by how much () the gradient from above is to be scaled besides.

    x and that gradient are made so much smaller that no intermediate leaves float16's range, whatever the cores hold.
    """
    scales = scales_of(factors)
    made = list(map(halved, factors, 1 / scales))
    without_single, operands = _prepared(equation, made)
    forwards, backwards = (power_above(bound / ROOM) for bound in growth(without_single, plan.path, operands))
    scales[0] *= forwards
    made[0] /= forwards
    return _laid_out(equation, pairs_of(without_single, plan.path), made), scales, backwards


def _laid_out(equation: str, pairs: Sequence[Pair], factors: Sequence[Tensor]) -> list[Tensor]:
    """The factors, cores in memory as `pairs` take them: otherwise each slice would copy those that are not cut."""
    laid = list(factors)
    for pair in pairs:
        if 0 < pair.small < len(factors):
            term = terms_of(equation)[pair.small]
            taken = pair.new + pair.lead + pair.summed
            order = [term.index(index) for index in sorted(term, key=(taken + term).index)]
            back = [order.index(place) for place in range(len(order))]
            laid[pair.small] = laid[pair.small].permute(order).contiguous().permute(back)
    return laid


def _number(parts: int) -> int:
    """Which part is this process's."""
    return dist.get_rank() if parts > 1 else 0


def _hand_round(made: Tensor, places: Sequence[Tensor]) -> None:
    """Write what each process made to its place; every process gets it all."""
    if len(places) == 1 or made.is_meta:
        places[_number(len(places))].copy_(made)
        return
    parts = [torch.empty_like(made, memory_format=torch.contiguous_format) for _ in places]
    dist.all_gather(parts, made.contiguous())
    for place, part in zip(places, parts, strict=True):
        place.copy_(part)


def _sum_of_own(places: Sequence[Tensor]) -> Tensor:
    """What lies in this process's place, added up over all processes."""
    own = places[_number(len(places))]
    if len(places) == 1 or own.is_meta:
        return own
    total = torch.empty_like(own, memory_format=torch.contiguous_format)
    dist.reduce_scatter(total, [place.contiguous() for place in places])
    return total


def _scale_of_sums(grad: Tensor, parts: int) -> Tensor:
    """For `halved`: what no sum over the processes exceeds, the same in each."""
    (scale,) = scales_of([grad])
    if parts > 1 and not scale.is_meta:
        dist.all_reduce(scale, dist.ReduceOp.MAX)
    return scale * 2 ** (parts - 1).bit_length()


def _among_zeros(own: Tensor, parts: int) -> Tensor:
    """This process's part of a core's gradient, with zeros where others have theirs."""
    if parts == 1:
        return own
    whole = own.new_zeros((*own.shape[:2], parts * own.shape[2], own.shape[3]))
    whole.chunk(parts, dim=2)[_number(parts)].copy_(own)
    return whole


def _position(equation: str, plan: "ContractionPlan") -> int:
    """Which core is cut."""
    return next(n for n, term in enumerate(terms_of(equation)[1:]) if term[2] == plan.axis)


def _grown_like(x: Tensor, equation: str, cores: Sequence[Tensor]) -> Tensor:
    """What will be grown of x, in memory layer by layer, as weights are."""
    sizes = {term[2]: core.shape[2] for term, core in zip(terms_of(equation)[1:], cores, strict=True)}
    return x.new_empty([sizes[axis] for axis in "BLOI"]).permute(["BLOI".index(axis) for axis in AXES])


def _product(equation: str, path: Path, factors: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """The einsum of `equation` along `path`; the factors are x and the cores."""
    without_single, operands = _prepared(equation, factors)
    return contract(without_single, path, operands, out)


def _gradients(
    equation: str, path: Path, factors: Sequence[Tensor], grad: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of `_product` for its factors."""
    without_single, operands = _prepared(equation, factors)
    found = gradients(without_single, path, operands, grad, wanted)
    return [part if part is None else part.reshape(of.shape) for part, of in zip(found, factors, strict=True)]


def _prepared(equation: str, factors: Sequence[Tensor]) -> tuple[str, list[Tensor]]:
    """Equation and factors without bonds of one index: torch sums over those by copying what is big."""
    x, *cores = factors
    single = {BONDS[n] for n, core in enumerate(cores) if len(core) == 1}
    if not single:
        return equation, [x, *cores]
    operands = [
        core.squeeze(tuple(place for n, place in ((n, 0), ((n + 1) % 4, 3)) if BONDS[n] in single))
        for n, core in enumerate(cores)
    ]
    return equation.translate({ord(bond): None for bond in single}), [x, *operands]


@dataclass(frozen=True)
class ContractionPlan:
    """How a ring is applied: in slices of `width` along the grown `axis`, in as many `parts` as processes share it."""

    path: Path  # in which a slice is contracted
    axis: str
    width: int
    slices: int  # of all parts together
    flops: int  # of one forward application, 2 per multiply-add, of all parts together
    training_flops: int  # those and of a backward pass
    largest_elements: int  # of the largest intermediate
    parts: int = 1


def fewest_elements(grown: int, *, gpu: bool) -> int:
    """Below how many elements no slice need be cut, where `grown` elements are made in all."""
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
    """How to apply a ring at next to no extra arithmetic, in few slices with small intermediates.

    Slicing along the axis whose core the best order takes first repeats nothing; slicing along L, layer
    by layer, repeats the contraction with the first core for every layer (1.9 times the arithmetic for
    DeiT-S -> DeiT-B at rank 4). So arithmetic comes first, that of training: but for intermediates of more than
    MOST_ELEMENTS, which none may have. Of the plans within SPARE of the cheapest, those with
    intermediates of at most SLICE_SHARE of the result (or of `fewest` elements) are taken, or those with the smallest.
    Where `parts` divides no grown axis, the plan has one part.
    """
    positions = [position for position, core in enumerate(cores) if core[2] % parts == 0]
    if not positions:
        positions, parts = list(range(len(cores))), 1
    plans = [plan for position in positions for plan in _plans_along(position, equation, x, cores, order, parts)]
    most = max(SLICE_SHARE * prod(core[2] for core in cores), fewest)
    able = _at_most(max(MOST_ELEMENTS, fewest), plans)
    whole = cheapest_orders(equation, x, cores)[0]
    for cost in (attrgetter("training_flops"), attrgetter("flops")):
        enough = max(SPARE * cost(whole), min(map(cost, able)))
        able = [plan for plan in able if cost(plan) <= enough]
    able = _at_most(most, able)
    return min(able, key=lambda plan: (plan.flops, plan.slices))


def _at_most(elements: float, plans: list[ContractionPlan]) -> list[ContractionPlan]:
    """The plans with intermediates of at most `elements`; where there are none, those with the smallest."""
    elements = max(elements, min(plan.largest_elements for plan in plans))
    return [plan for plan in plans if plan.largest_elements <= elements]


def _plans_along(
    position: int, equation: str, x: tuple[int, ...], cores: tuple[tuple[int, ...], ...], order: str, parts: int
) -> Iterator[ContractionPlan]:
    """Each part of the axis order[position] in one piece, in two slices, in three, in four and so on."""
    shape, sliced = cores[position], list(cores)
    each = shape[2] // parts
    for pieces in _counts():
        width = -(-each // pieces)
        sliced[position] = (shape[0], shape[1], width, shape[3])
        slices = parts * -(-each // width)
        for one in cheapest_orders(equation, x, tuple(sliced)):
            costs = slices * one.flops, slices * one.training_flops
            yield ContractionPlan(one.path, order[position], width, slices, *costs, one.largest, parts)
        if width == 1 or (slices >= MANY_SLICES and one.largest <= MOST_ELEMENTS):
            return


def _counts() -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12 and so on."""
    yield 1
    for power in count():
        yield from (2 << power, 3 << power)
