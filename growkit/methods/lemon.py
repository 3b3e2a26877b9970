"""LEMON (Wang et al., ICLR 2024): growing a pre-norm transformer to any width and depth without losing anything.

The residual gets whole copies and, if the width is not a whole multiple, the mean of all channels in the rest
(average expansion), so that a LayerNorm sees the source's statistics; its gain undoes eta = sqrt(floor(D2 / D1)
D1 / D2). Heads and MLP units are duplicated whole, in circular order. Readers weight a unit's copies unequally, which
breaks their symmetry: here by noise that cancels over the copies. New layers copy old ones with both output
projections zero. An RMSNorm subtracts no mean: there the rest of the residual is zero.

A reader's columns for the tail are free, because the tail normalises to zero; LEMON fills them at random, as the noise
does here. As for Mango, LayerNorm's eps is not scaled by eta^2, so that the file stays a stock timm model; see
docs/architecture.md.
"""

import torch

from growkit.arch.spec import LAYERS, Weights
from growkit.core import maps
from growkit.methods.base import averages, normed_inside, whole
from growkit.methods.carried_mean import carry_mean
from growkit.methods.expand import Expansion, Maps, SpaceMap, identity_blocks, read_maps, residual_vectors, vector_maps


class Lemon(Expansion):
    """Keeps the function at every width and depth, as far as norms that a plain ViT lacks allow (see `averages`)."""

    @property
    def lossless(self) -> bool:
        """Wherever the residual's mean can be kept, and norms inside a layer see whole copies."""
        pair = self.source, self.target
        return averages(*pair) and whole(*pair, *normed_inside(self.source))

    def forward(self, weights: Weights) -> Weights:
        """Slots of the source -> slots of the target."""
        return carry_mean(self.source, self.target, weights, super().forward(weights))

    def make_maps(self, generator: torch.Generator) -> Maps:
        """Average expansion of the residual, duplicated hidden units, silent new layers."""
        old, new, _ = self.sizes("embed")
        vectors = vector_maps(self.source, old, new)
        copies, residual = vectors["shift"], vectors["embed"]
        noise = self.settings.noise * maps.null_noise((new, old), read_maps(self.source, copies, residual), generator)
        hidden = [space for space in self.source.widths if space != "embed"]
        return {
            "embed": SpaceMap(residual, (copies + noise) / (new // old)),
            **{place: SpaceMap.tied(vectors[name]) for place, name in residual_vectors(self.source).items()},
            **{space: self.copied(maps.duplicate(*self.sizes(space)), generator) for space in hidden},
            **identity_blocks(maps.spread_layers(*self.sizes(LAYERS)[:2])),
        }
