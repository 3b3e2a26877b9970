"""The tensor-ring operator of Mango (Pan et al., NeurIPS 2023): four small cores in place of one 8-axis tensor.

    y[B,O,L,I] = sum over b, o, l, i and the bonds p, q, r, s of
                 x[b,o,l,i] * core_B[p,b,B,q] * core_O[q,o,O,r] * core_L[r,l,L,s] * core_I[s,i,I,p]

B is the matrix inside a layer, O its output axis, L the layer, I its input axis; capital = grown axis.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod
from typing import Self

import opt_einsum
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from growkit.errors import GrowkitError

AXES = "BOLI"
BONDS = "pqrs"
# Elements of the largest intermediate of one slice: a share of the result's, so that slices weigh little beside what is
# grown, but at least 1 MB in float32, for smaller slices make the matrix products thin, and never above 128 MB.
SLICE_SHARE = 1 / 8
FEWEST_ELEMENTS, MOST_ELEMENTS = 2**18, 2**25
MANY_SLICES = 256  # more are not made for the share's sake: each takes some dozens of kernels
SPARE = 1.05  # arithmetic that a plan may take beside the cheapest for smaller slices


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

        A slice's intermediates are recomputed in the backward pass, so memory holds one slice's at a time.
        """
        cores = [self.cores[axis] for axis in self.order]
        if torch.is_grad_enabled():
            axis, width, slices = self._slices(x, cores)
            pieces = list(slices)
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=axis)
        grown = x.new_zeros([self.cores[axis].shape[2] for axis in AXES])
        for ring in _independent_rings(_without_dead_bonds(cores)):
            axis, width, slices = self._slices(x, ring)
            for place, piece in zip(grown.split(width, dim=axis), slices, strict=True):
                place += piece
        return grown

    def _slices(self, x: Tensor, cores: Sequence[Tensor]) -> tuple[int, int, Iterator[Tensor]]:
        """The axis of the result that is cut, the width of a slice, and the slices, made as they are asked for."""
        shapes = tuple(tuple(core.shape) for core in cores)
        plan = contraction_plan(self.equation, tuple(x.shape), shapes, self.order)
        position = self.order.index(plan.axis)
        recompute = torch.is_grad_enabled() and plan.width < shapes[position][2]
        contract = partial(checkpoint, self._contract, use_reentrant=False) if recompute else self._contract
        pieces = cores[position].split(plan.width, dim=2)
        slices = (contract(x, *cores[:position], piece, *cores[position + 1 :]) for piece in pieces)
        return AXES.index(plan.axis), plan.width, slices

    def layer(self, x: Tensor, index: int) -> Tensor:
        """(B, O, L, I) -> (B', O', I') of target layer `index`, for growing one layer at a time."""
        cores = [self.cores[axis] for axis in self.order]
        position = self.order.index("L")
        cores[position] = cores[position][:, :, index : index + 1]
        return self._contract(x, *cores).squeeze(AXES.index("L"))

    def dense(self) -> Tensor:
        """The full operator (b, o, l, i, B, O, L, I); its size is the product of all eight. For tests."""
        operands = self.equation.split("->")[0].split(",")[1:]
        return torch.einsum(f"{','.join(operands)}->boliBOLI", *(self.cores[axis] for axis in self.order))

    @property
    def equation(self) -> str:
        """The einsum of forward, for this ring's order."""
        cores = (f"{BONDS[n]}{axis.lower()}{axis}{BONDS[(n + 1) % 4]}" for n, axis in enumerate(self.order))
        return f"boli,{','.join(cores)}->BOLI"

    def _contract(self, x: Tensor, *cores: Tensor) -> Tensor:
        shapes = tuple(tuple(core.shape) for core in cores)
        path, _, _ = cheapest_path(self.equation, tuple(x.shape), shapes)
        equation, operands = self._without_single_bonds(x, *cores)
        return opt_einsum.contract(equation, *operands, optimize=list(path), backend="torch")

    def _without_single_bonds(self, x: Tensor, *cores: Tensor) -> tuple[str, list[Tensor]]:
        """The equation and its operands without bonds of one index: torch sums over them by copying what is big."""
        single = {BONDS[n] for n, core in enumerate(cores) if len(core) == 1}
        operands = [
            core.squeeze(tuple(place for n, place in ((n, 0), ((n + 1) % 4, 3)) if BONDS[n] in single))
            for n, core in enumerate(cores)
        ]
        return self.equation.translate({ord(bond): None for bond in single}), [x, *operands]


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


@dataclass(frozen=True)
class ContractionPlan:
    """How a ring is applied: in slices of `width` along the grown `axis`."""

    axis: str
    width: int
    slices: int
    flops: int  # of one forward application, 2 per multiply-add
    largest_elements: int  # of the largest intermediate


@lru_cache(maxsize=256)
def contraction_plan(
    equation: str, x: tuple[int, ...], cores: tuple[tuple[int, ...], ...], order: str
) -> ContractionPlan:
    """How to apply a ring at next to no extra arithmetic, in few slices with small intermediates.

    Slicing along the axis whose core the best order takes first repeats nothing; slicing along L, layer
    by layer, repeats the contraction with the first core for every layer (1.9 times the arithmetic for
    DeiT-S -> DeiT-B at rank 4). So arithmetic comes first. Of the plans within SPARE of the cheapest, those with
    intermediates of at most SLICE_SHARE of the result are taken, or those with the smallest.
    """
    plans = [plan for position in range(len(order)) for plan in _plans_along(position, equation, x, cores, order)]
    most = max(SLICE_SHARE * prod(core[2] for core in cores), FEWEST_ELEMENTS)
    able = _at_most(MOST_ELEMENTS, plans)
    cheapest = min(plan.flops for plan in able)
    able = _at_most(most, [plan for plan in able if plan.flops <= SPARE * cheapest])
    return min(able, key=lambda plan: (plan.flops, plan.slices))


def _at_most(elements: float, plans: list[ContractionPlan]) -> list[ContractionPlan]:
    """The plans with intermediates of at most `elements`; where there are none, those with the smallest."""
    elements = max(elements, min(plan.largest_elements for plan in plans))
    return [plan for plan in plans if plan.largest_elements <= elements]


def _plans_along(
    position: int, equation: str, x: tuple[int, ...], cores: tuple[tuple[int, ...], ...], order: str
) -> Iterator[ContractionPlan]:
    """In one piece along the axis order[position], in two slices, in four and so on."""
    shape, sliced = cores[position], list(cores)
    width = shape[2]
    while True:
        sliced[position] = (shape[0], shape[1], width, shape[3])
        _, flops, largest = cheapest_path(equation, x, tuple(sliced))
        slices = -(-shape[2] // width)
        yield ContractionPlan(order[position], width, slices, flops * slices, largest)
        if width == 1 or (slices >= MANY_SLICES and largest <= MOST_ELEMENTS):
            return
        width = -(-width // 2)


@lru_cache(maxsize=1024)
def cheapest_path(
    equation: str, x: tuple[int, ...], cores: tuple[tuple[int, ...], ...]
) -> tuple[tuple[tuple[int, ...], ...], int, int]:
    """Pairwise order of least arithmetic, its FLOPs (2 per multiply-add), its largest intermediate."""
    path, info = opt_einsum.contract_path(equation, x, *cores, shapes=True, optimize="optimal")
    return tuple(tuple(step) for step in path), int(info.opt_cost), int(info.largest_intermediate)
