"""random-pad, a control: the source in a corner of freshly initialised weights.

Old units and layers keep their weights among themselves. Everything new is as fresh ViTs usually start: matrices and
embeddings are normal with deviation 0.02, truncated at two deviations; biases are 0, gains 1, layer scales 1e-5. New
layers come last. It shows what merely having the source's numbers somewhere is worth.
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.init import trunc_normal_

from growkit.arch.spec import LAYERS, TensorSpec, Weights
from growkit.methods.base import GrowthMethod
from growkit.methods.expand import SCALE

DEVIATION, LAYER_SCALE = 0.02, 1e-5


class RandomPad(GrowthMethod):
    """The source's weights in the first places, fresh ones in the rest. Keeps no function."""

    TAKES: ClassVar[frozenset[str]] = frozenset()

    def forward(self, weights: Weights) -> Weights:
        """Slots of the source -> slots of the target."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        grown: Weights = {}
        for row in self.source.tensors:
            for slot in row.slots:
                tensor = weights[slot]
                fresh = self._fresh(row, slot, tuple(tensor.shape), generator).to(tensor)
                fresh[tuple(slice(size) for size in tensor.shape)] = tensor
                grown[slot] = fresh
        return grown

    def _fresh(self, row: TensorSpec, slot: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return initial values for this slot; `shape` is the source's."""
        spaces = (LAYERS, *row.dims) if row.layered else row.dims
        sizes = [self.target.spaces[s].size if s else old for s, old in zip(spaces, shape, strict=True)]
        if row.normalises and slot.endswith("weight"):
            return torch.ones(sizes)
        if slot.startswith(SCALE):
            return torch.full(sizes, LAYER_SCALE)
        if slot.endswith("bias"):
            return torch.zeros(sizes)
        return trunc_normal_(torch.empty(sizes), std=DEVIATION, a=-2 * DEVIATION, b=2 * DEVIATION, generator=generator)
