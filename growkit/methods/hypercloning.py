"""HyperCloning (Samragh et al., 2024): width by whole multiples, every weight tiled.

W' = tile(W) / n along the axes that are read; biases, norms and embeddings are tiled as they are, the head is divided.
Heads are copied whole, so that head size and softmax scale stay. The released code can break the copies' symmetry by
adding +N and -N to alternating column blocks at a chosen signal-to-noise ratio; here --noise does it, as everywhere in
growkit, with noise in the null space of what was written, which cancels just as exactly. Without noise this is
bert2BERT's FPI on whole multiples.
"""

import torch

from growkit.arch.spec import Architecture
from growkit.core import maps
from growkit.methods.base import grows_depth
from growkit.methods.expand import Expansion, Maps
from growkit.settings import GrowSettings


class HyperCloning(Expansion):
    """Tiled widths; depth stays. Keeps the function wherever it applies."""

    @classmethod
    def cannot(cls, source: Architecture, target: Architecture, settings: GrowSettings) -> str | None:
        """Depth cannot grow, nor widths by other than whole multiples."""
        for name in source.widths:
            old, new = source.spaces[name].size, target.spaces[name].size
            if new % old:
                return f"{name} {old} -> {new} is {new / old:.3g} times as wide, and this method tiles whole copies"
        return grows_depth(source, target)

    @property
    def lossless(self) -> bool:
        """Always."""
        return True

    def make_maps(self, generator: torch.Generator) -> Maps:
        """Whole tiles of every width."""
        return {space: self.copied(maps.duplicate(*self.sizes(space)), generator) for space in self.source.widths}
