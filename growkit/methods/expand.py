"""expand(): apply a map to every axis of every tensor. Every method but Mango is this call with other matrices."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from growkit.arch.spec import LAYERS, Architecture, TensorSpec, Weights
from growkit.core import maps
from growkit.methods.base import GrowthMethod
from growkit.settings import GrowSettings

BRANCHES = ("o", "out")  # the slots through which a block writes the residual
SCALE = "scale"  # how the slot of a layer scale begins
SCALED = {"scale1.gamma": "o", "scale2.gamma": "out"}  # which branch a layer scale scales
WRITING_NORMS = ("norm_pre", "norm_patch")  # their output is the residual; the others' output is read by a layer


class SpaceMap(NamedTuple):
    """How a space grows: tensors that write it use `write`, tensors that read it use `read`.

    Both are (new, old), or (L, new, old) with a matrix for each source layer. The function is kept when
    write.T @ read = I.
    """

    write: Tensor
    read: Tensor

    @classmethod
    def tied(cls, matrix: Tensor) -> "SpaceMap":
        """Use the same matrix to write and to read."""
        return cls(matrix, matrix)


Place = str | tuple[str, str]  # a space, or (slot, space) where one slot differs
Maps = Mapping[Place, SpaceMap]


def expand(tensors: Sequence[TensorSpec], weights: Weights, maps: Maps) -> Weights:
    """Grow every slot of `tensors` along every axis whose space has a map; other axes stay.

    Shapes: a slot (old sizes) -> the same slot (new sizes). Width first, then depth, so that a width may have a
    matrix for each source layer. Source: LiGO (Wang et al., ICLR 2023), Eq. 3, of which duplication, stacking and
    interpolation are special cases.
    """
    grown: Weights = {}
    alike: dict[object, list[str]] = {}  # slots with the same shape and matrices
    ways: dict[object, list[tuple[int, Tensor]]] = {}
    for spec in tensors:
        axes = (LAYERS, *spec.dims) if spec.layered else spec.dims
        reads = None if spec.reads is None else spec.reads + spec.layered
        for slot in spec.slots:
            way = []
            for axis, space in reversed(list(enumerate(axes))):
                space_map = maps.get((slot, space)) or maps.get(space) if space else None
                if space_map is not None:
                    way.append((axis, space_map.read if axis == reads else space_map.write))
            # vectors are stacked, as each alone is little work; a matrix for each layer takes one tensor
            joint = way and len(spec.dims) == 1 and all(matrix.ndim == 2 for _, matrix in way)
            key: object = (weights[slot].shape if joint else slot, tuple((axis, id(matrix)) for axis, matrix in way))
            alike.setdefault(key, []).append(slot)
            ways[key] = way
            grown[slot] = weights[slot]  # keeps the order
    for key, slots in alike.items():
        tensors_of = [weights[slot] for slot in slots]
        together = torch.stack(tensors_of) if len(slots) > 1 else tensors_of[0]
        for axis, matrix in ways[key]:
            together = _along(together, axis + (len(slots) > 1), matrix)
        grown.update(zip(slots, together.unbind(0) if len(slots) > 1 else [together], strict=True))
    return grown


def _along(tensor: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """Apply `matrix`, (new, old) or one for each layer (L, new, old), to one axis of `tensor`."""
    if matrix.ndim == 3:
        return torch.einsum("lno,lo...->ln...", matrix, tensor.movedim(axis, 1)).movedim(1, axis)
    if axis == tensor.ndim - 1:  # as it will lie in memory
        return tensor @ matrix.mT
    return torch.tensordot(matrix, tensor, dims=([1], [axis])).movedim(0, axis)


class Expansion(GrowthMethod):
    """A fixed rule: `expand` with matrices that are made once, in float64, and never trained."""

    def __init__(self, source: Architecture, target: Architecture, settings: GrowSettings):
        super().__init__(source, target, settings)
        self.maps = self.make_maps(torch.Generator().manual_seed(settings.seed))

    @abstractmethod
    def make_maps(self, generator: torch.Generator) -> Maps:
        """The matrices of each space; spaces without any stay as they are."""

    def forward(self, weights: Weights) -> Weights:
        """Slots of the source -> slots of the target."""
        return expand(self.source.tensors, weights, as_in(weights, self.maps))

    def sizes(self, space: str) -> tuple[int, int, int]:
        """Old size, new size and group of a space."""
        old = self.source.spaces[space]
        return old.size, self.target.spaces[space].size, old.group

    def copied(self, write: Tensor, generator: torch.Generator) -> SpaceMap:
        """Return the map of a 0/1 copy matrix: each copy is read at its share, plus noise that cancels over copies."""
        return parted_copies(write, self.settings.noise, generator)


def parted_copies(write: Tensor, noise: float, generator: torch.Generator) -> SpaceMap:
    """Return the map of a 0/1 copy matrix: each copy is read at its share, plus `noise` that cancels over copies."""
    share = maps.shared_read(write)
    return SpaceMap(write, share + noise * share.max() * maps.parting_noise(write, generator))


def as_in(weights: Weights, maps: Maps) -> Maps:
    """Return the maps on the device and in the dtype of the weights."""
    like = next(iter(weights.values()))
    return {name: SpaceMap(m.write.to(like), m.read.to(like)) for name, m in maps.items()}


def identity_blocks(layers: Tensor) -> dict[Place, SpaceMap]:
    """Return depth maps of a 0/1 matrix (new, old) in which only the first copy of a layer writes the residual."""
    writing = ((f"{slot}.{kind}", LAYERS) for slot in BRANCHES for kind in ("weight", "bias"))
    return {LAYERS: SpaceMap.tied(layers), **dict.fromkeys(writing, SpaceMap.tied(maps.first_copies(layers)))}


def residual_vectors(source: Architecture) -> dict[Place, str]:
    """Return which of `vector_maps` each norm and layer scale over the residual takes; other vectors take `embed`."""
    found: dict[Place, str] = {}
    for row in source.tensors:
        module, _, kind = row.slots[0].partition(".")
        if row.dims != ("embed",):
            continue
        if module.startswith(SCALE):
            found[row.slots[0], "embed"] = "scale"
        elif row.normalises:
            written = "embed" if module in WRITING_NORMS else "shift"
            found[row.slots[0], "embed"] = "gain" if kind == "weight" else written
    return found


def vector_maps(source: Architecture, old: int, new: int) -> dict[str, Tensor]:
    """Return (new, old) matrices of vectors over the residual of `maps.residual` (LEMON, Wang et al., ICLR 2024, 4).

    Copied gains undo eta. The tail's normalised value is zero: its bias stays zero, and any gain there lets it
    learn. So does a layer scale; `even_scales` has made it one number for each layer.
    """
    copies, average = maps.whole_copies(old, new), maps.average_tail(old, new)
    return {
        "embed": maps.residual(old, new, centred=source.centred),
        "gain": torch.where(copies.any(1, keepdim=True), maps.norm_gain(old, new) * copies, average),
        "shift": copies,
        "scale": average,
    }


def read_maps(source: Architecture, copies: Tensor, residual: Tensor) -> list[Tensor]:
    """Return what readers of the residual see: its copies after a norm, and its tail too if some read it unnormed."""
    return [copies, residual] if any(row.raw for row in source.tensors) else [copies]


def even_scales(weights: Weights) -> Weights:
    """Make each layer scale one number for each layer and move the rest into the branch's output; same function.

    The mean over the residual's channels is then the branch's mean times a number, which a grown tail can hold.
    """
    even = dict(weights)
    for scale, branch in SCALED.items():
        if scale in weights:
            gamma = weights[scale]
            size = gamma.abs().mean(dim=1, keepdim=True).clamp_min(torch.finfo(gamma.dtype).tiny)
            share = gamma / size
            even[scale] = size.expand_as(gamma).clone()
            even[f"{branch}.weight"] = weights[f"{branch}.weight"] * share[:, :, None]
            if f"{branch}.bias" in weights:
                even[f"{branch}.bias"] = weights[f"{branch}.bias"] * share
    return even
