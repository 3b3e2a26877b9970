"""Spaces, tensor rows and architectures: which size lives on which axis of which checkpoint tensor."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from growkit.errors import GrowkitError
from growkit.text import some

StateDict = Mapping[str, Tensor]  # by checkpoint name
Weights = dict[str, Tensor]  # by slot; layered tensors stacked, (L, out, in)

LAYERS = "blocks"  # the space that a '{l}' in a key counts
NORM = "norm"  # how the slot of a norm begins


@dataclass(frozen=True)
class Space:
    """A size that can grow. `group` units always move together: a head's 64 channels."""

    size: int
    group: int = 1


@dataclass(frozen=True)
class TensorSpec:
    """One checkpoint tensor, or one per layer when `key` holds '{l}'.

    slots   canonical names; more than one means fused along axis 0 (timm qkv -> q, k, v)
    dims    space of each axis in (out, in) order, None for an axis that never grows
    reads   index of the axis contracted with activations; the other axes are written
    raw     whether it reads the residual as it is, with no norm before it
    """

    key: str
    slots: tuple[str, ...]
    dims: tuple[str | None, ...]
    reads: int | None = None
    raw: bool = False

    @property
    def layered(self) -> bool:
        """Whether the checkpoint holds one such tensor per layer."""
        return "{l}" in self.key

    @property
    def normalises(self) -> bool:
        """Whether it is the gain or the bias of a norm."""
        return self.slots[0].startswith(NORM)


@dataclass(frozen=True)
class Architecture:
    """A table with one row per checkpoint tensor, and what builds the network it describes."""

    name: str  # timm's, 'deit_small_patch16_224'
    arguments: Mapping[str, Any]  # what differs from timm's defaults for that name
    spaces: Mapping[str, Space]  # embed 384, attn 384/64, mlp 1536, blocks 12
    tensors: tuple[TensorSpec, ...]
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)  # of every checkpoint tensor
    kind: Mapping[str, str] = field(default_factory=dict)  # what decides the function but leaves no trace in shapes

    @property
    def widths(self) -> tuple[str, ...]:
        """Names of its spaces except the layers."""
        return tuple(name for name in self.spaces if name != LAYERS)

    @property
    def parameters(self) -> int:
        """How many numbers its checkpoint holds."""
        return sum(map(prod, self.shapes.values()))

    @property
    def classes(self) -> int:
        """Number of classes of its head; 0 if it has no head and gives features."""
        return self.shapes["head.weight"][0] if "head.weight" in self.shapes else 0

    @property
    def centred(self) -> bool:
        """Whether its norms subtract the mean, as LayerNorm does and RMSNorm does not."""
        return "rms" not in self.kind.get("norm", "").lower()

    def has(self, slot: str) -> bool:
        """Return whether it has a tensor of this slot: 'norm_pre' finds 'norm_pre.weight'."""
        return any(own.partition(".")[0] == slot for row in self.tensors for own in row.slots)

    def check(self, state: StateDict, called: str | None = None) -> None:
        """Check a checkpoint against the table; where its architecture was guessed, errors call it `called`.

        Raises:
            GrowkitError: tensors are missing, unknown, misshapen or not finite; the message names them.
        """
        otherwise = ", or name what they are (--from)" if called else ""
        called = called or self.name
        missing = [name for name in self.shapes if name not in state]
        unknown = [name for name in state if name not in self.shapes]
        if missing or unknown:
            parts = [f"{word} {some(names)}" for word, names in (("lacks", missing), ("has unknown", unknown)) if names]
            raise GrowkitError(
                f"weights do not fit {called}: {'; '.join(parts)}; give all of its weights and no others{otherwise}"
            )
        for name, shape in self.shapes.items():
            if tuple(state[name].shape) != shape:
                got = tuple(state[name].shape)
                raise GrowkitError(f"weights do not fit {called}: {name} has shape {got}, expected {shape}")
            if not torch.isfinite(state[name]).all():
                raise GrowkitError(f"{name} holds values that are not finite; take other weights")

    def split(self, state: StateDict) -> Weights:
        """Checkpoint names -> slots; layered tensors come stacked, (L, out, in)."""
        weights: Weights = {}
        for spec in self.tensors:
            if spec.layered:
                layers = range(self.spaces[LAYERS].size)
                tensor = torch.stack([state[spec.key.format(l=layer)] for layer in layers])
            else:
                tensor = state[spec.key]
            axis = 1 if spec.layered else 0
            weights.update(zip(spec.slots, tensor.chunk(len(spec.slots), dim=axis), strict=True))
        return weights

    def join(self, weights: Weights) -> dict[str, Tensor]:
        """Inverse of split; plain torch operations, so gradients pass."""
        state: dict[str, Tensor] = {}
        for spec in self.tensors:
            slots = [weights[slot] for slot in spec.slots]
            tensor = torch.cat(slots, dim=1 if spec.layered else 0) if len(slots) > 1 else slots[0]
            if spec.layered:
                state.update((spec.key.format(l=layer), piece) for layer, piece in enumerate(tensor.unbind(0)))
            else:
                state[spec.key] = tensor
        return state


def linear(
    key: str, *, out: str | None, reads: str | None, slots: tuple[str, ...], raw: bool = False
) -> tuple[TensorSpec, ...]:
    """Rows of a linear layer: weight (out, in) and bias (out)."""
    return (
        TensorSpec(f"{key}.weight", tuple(f"{s}.weight" for s in slots), (out, reads), reads=1, raw=raw),
        TensorSpec(f"{key}.bias", tuple(f"{s}.bias" for s in slots), (out,)),
    )


def norm(key: str, space: str | None, slot: str) -> tuple[TensorSpec, ...]:
    """Rows of a LayerNorm: gain and bias; an RMSNorm has no bias."""
    return (
        TensorSpec(f"{key}.weight", (f"{slot}.weight",), (space,)),
        TensorSpec(f"{key}.bias", (f"{slot}.bias",), (space,)),
    )


def conv(key: str, *, out: str) -> tuple[TensorSpec, ...]:
    """Rows of a convolution that reads pixels: weight (out, channels, height, width) and bias (out)."""
    return (
        TensorSpec(f"{key}.weight", (f"{key}.weight",), (out, None, None, None)),
        TensorSpec(f"{key}.bias", (f"{key}.bias",), (out,)),
    )


def table(key: str, *dims: str | None, slot: str | None = None) -> tuple[TensorSpec, ...]:
    """The row of a parameter that is added to activations or scales them: tokens, position embeddings, layer scale."""
    return (TensorSpec(key, (slot or key,), dims),)
