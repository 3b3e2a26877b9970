"""The tensor-ring operator of Mango (Pan et al., NeurIPS 2023): four small cores in place of one 8-axis tensor.

    y[B,O,L,I] = sum over b, o, l, i and the bonds p, q, r, s of
                 x[b,o,l,i] * core_B[p,b,B,q] * core_O[q,o,O,r] * core_L[r,l,L,s] * core_I[s,i,I,p]

B is the matrix inside a layer, O its output axis, L the layer, I its input axis; capital = grown axis.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Self

import torch
from torch import Tensor, nn

from growkit.core.half import may_halve
from growkit.core.ring_plan import ContractionPlan, contraction_plan, fewest_elements
from growkit.core.ring_slices import Sliced, cut_up, grown_like, product
from growkit.errors import GrowkitError

AXES = "BOLI"
BONDS = "pqrs"


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
        self.processes = 1  # that train it together: all of torch.distributed's; each grows a part for all
        self.room = 0  # bytes of intermediates to keep for the backward pass
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
        """Make a ring that computes the sum of `paths` exactly and can train every other bond index.

        Each path holds one (new, old) matrix per axis and takes one index of every bond. The other bond indices
        get noise of standard deviation noise / sqrt(old) where they leave a core and zeros where they enter the next
        one: the sum is unchanged, yet the zeros get a gradient at the first step (as in LoRA's initialisation).

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

        A slice's intermediates are recomputed in the backward pass, so memory holds one slice's at a time; as many as
        `room` holds are kept instead. If `processes` train together, each computes its part of the slices and gets
        the others'. Its gradients are then those of its part, from the upstream gradients of all processes: their mean
        over the processes is the mean gradient, as if each computed everything.
        """
        cores = [self.cores[axis] for axis in self.order]
        if torch.is_grad_enabled():
            halves = may_halve(x)
            plan = self.plan(x, cores, halves=halves, parts=self.processes)
            if plan.slices == 1 and not halves:
                return product(self.equation, plan.path, [x, *cores])
            sliced: Tensor = Sliced.apply(self.equation, plan, halves, self.room, x, *cores)
            return sliced
        grown = grown_like(x, self.equation, cores).zero_()
        for ring in _independent_rings(_without_dead_bonds(cores)):
            plan = self.plan(x, ring)
            for (place,), slice_ in cut_up(self.equation, plan, grown, [x, *ring]):
                place += product(self.equation, plan.path, slice_)
        return grown

    def plan(self, x: Tensor, cores: Sequence[Tensor], *, halves: bool = False, parts: int = 1) -> ContractionPlan:
        """Plan how to apply `cores`, all of the ring's or fewer indices of its bonds, to x, which may hold nothing."""
        shapes = tuple(tuple(core.shape) for core in cores)
        fewest = fewest_elements(prod(core.shape[2] for core in cores), gpu=x.is_cuda)
        fewest *= 2 if halves else 1  # elements of half the size
        return contraction_plan(self.equation, tuple(x.shape), shapes, self.order, fewest, parts)

    @property
    def equation(self) -> str:
        """The einsum of forward, for this ring's order."""
        cores = (f"{BONDS[n]}{axis.lower()}{axis}{BONDS[(n + 1) % 4]}" for n, axis in enumerate(self.order))
        return f"boli,{','.join(cores)}->BOLI"


def _without_dead_bonds(cores: list[Tensor]) -> list[Tensor]:
    """Drop bond indices with a zero slice on either side: the sum is the same, and a fresh start becomes cheap."""
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
    rings = [[core[group[n]][..., group[(n + 1) % 4]] for n, core in enumerate(cores)] for group in groups]
    return [ring for ring in rings if all(core.numel() for core in ring)]  # one without an index on some bond is zero
