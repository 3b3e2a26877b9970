"""expand(): apply a map to every axis of every tensor. Every method but Mango is this call with other matrices."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from growkit.arch.spec import LAYERS, TensorSpec, Weights


class SpaceMap(NamedTuple):
    """How a space grows: tensors that write it use `write`, tensors that read it use `read`.

    Both are (new, old). The function is kept when write.T @ read = I.
    """

    write: Tensor
    read: Tensor


Maps = Mapping[str | tuple[str, str], SpaceMap]  # by space, or by (slot, space) where one slot differs


def expand(tensors: Sequence[TensorSpec], weights: Weights, maps: Maps) -> Weights:
    """Grow every slot of `tensors` along every axis that lives in a space; other axes stay.

    Shapes: a slot (old sizes) -> the same slot (new sizes). Source: LiGO (Wang et al., ICLR 2023), Eq. 3,
    of which duplication, stacking and interpolation are special cases.
    """
    grown: Weights = {}
    for spec in tensors:
        axes = (LAYERS, *spec.dims) if spec.layered else spec.dims
        reads = None if spec.reads is None else spec.reads + spec.layered
        for slot in spec.slots:
            tensor = weights[slot]
            for axis, space in enumerate(axes):
                if space is None:
                    continue
                space_map = maps.get((slot, space)) or maps[space]
                matrix = space_map.read if axis == reads else space_map.write
                tensor = torch.movedim(torch.tensordot(matrix, tensor, dims=([1], [axis])), 0, axis)
            grown[slot] = tensor
    return grown
