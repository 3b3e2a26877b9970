"""Net2Net (Chen, Goodfellow and Shlens, ICLR 2016): random duplication, and new layers that begin as identities.

Net2Wider: unit j of the target is unit j of the source as long as there is one, then one drawn at random with
replacement; readers divide by a unit's number of copies. Heads are drawn whole, hidden units anew for each layer, the
residual's channels once, because all layers share them. Noise that cancels over the copies breaks their symmetry; the
paper adds a little noise that does not cancel. Net2Deeper: a new block of a pre-norm transformer is an identity if it
does not write the residual.

Exact except for LayerNorm: if channels have unequal numbers of copies, its mean and variance change, so growing
`embed` is not lossless.
"""

import torch

from growkit.arch.spec import LAYERS
from growkit.core import maps
from growkit.methods.base import growing, normed_inside
from growkit.methods.expand import Expansion, Maps, SpaceMap, identity_blocks

IN_LAYERS = ("attn", "mlp")  # the spaces that layers do not share


class Net2Net(Expansion):
    """Keeps the function as long as the residual's width stays."""

    @property
    def lossless(self) -> bool:
        """Unless `embed` grows, or a width over which a norm is taken."""
        return not {"embed", *normed_inside(self.source)} & {*growing(self.source, self.target)}

    def make_maps(self, generator: torch.Generator) -> Maps:
        """Random duplicates; hidden ones for each source layer."""

        def draw(space: str) -> SpaceMap:
            return self.copied(maps.random_duplicate(*self.sizes(space), generator), generator)

        old, new, _ = self.sizes(LAYERS)
        return {
            **{space: draw(space) for space in self.source.widths if space not in IN_LAYERS},
            **{space: _stacked([draw(space) for _ in range(old)]) for space in IN_LAYERS},
            **identity_blocks(maps.spread_layers(old, new)),
        }


def _stacked(drawn: list[SpaceMap]) -> SpaceMap:
    return SpaceMap(torch.stack([m.write for m in drawn]), torch.stack([m.read for m in drawn]))
