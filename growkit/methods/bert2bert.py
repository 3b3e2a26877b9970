"""bert2BERT (Chen et al., ACL 2022): duplication (FPI, section 3.2), or new units from the layer above (AKI, 3.3).

FPI: unit j of the target copies unit j mod old; readers divide by the number of copies. Heads are copied whole, and
every space has one map that all its tensors share, so that reads match writes; LayerNorms are copied as they are.
Units left over after whole rounds are drawn at random without replacement. The paper draws all new units uniformly;
only whole rounds keep a LayerNorm's statistics, and only they give the equal losses that it reports at twice the width.

AKI: as FPI, but the new output units of every matrix and bias in layer l come from layer l + 1, grown by the same
maps; the last layer, norms and embeddings are as in FPI. A circulating unofficial implementation takes whole new heads
and neurons instead, with the columns that read them; the one here is the paper's rule, per matrix.

Depth: the widened layers are stacked floor(L2 / L1) times, and the top layers fill the rest. The paper relies on
dropout to break the symmetry of equal copies; ViTs train without it, so --noise does it here, and --noise 0 is the
paper's method. Its two-stage training of sub-models is training, not growth, and is not here.
"""

from typing import ClassVar

import torch

from growkit.arch.spec import LAYERS, Architecture, TensorSpec, Weights
from growkit.core import maps
from growkit.methods.base import growing, normed_inside, whole
from growkit.methods.expand import SCALE, Expansion, Maps, Place, SpaceMap, as_in, expand
from growkit.settings import GrowSettings


class Bert2BERT(Expansion):
    """FPI keeps the function at whole multiples of `embed` and equal depth."""

    VARIANTS: ClassVar[tuple[str, ...]] = ("fpi", "aki")

    @classmethod
    def cannot(cls, source: Architecture, target: Architecture, settings: GrowSettings) -> str | None:
        """AKI takes new units from the layer above, so it needs two layers."""
        if settings.variant == "aki" and source.spaces[LAYERS].size < 2:
            return f"{LAYERS} is 1, and aki takes what is new from the layer above"
        return None

    @property
    def lossless(self) -> bool:
        """FPI, at whole multiples of `embed` and equal depth."""
        grown = growing(self.source, self.target)
        even = whole(self.source, self.target, "embed", *normed_inside(self.source))
        return not grown or (self.variant == "fpi" and even and LAYERS not in grown)

    def make_maps(self, generator: torch.Generator) -> Maps:
        """Duplicates of every width, and the stack of layers."""
        layers = maps.stacked_layers(*self.sizes(LAYERS)[:2])
        widths: dict[Place, SpaceMap] = {
            space: self.copied(maps.even_duplicate(*self.sizes(space), generator), generator)
            for space in self.source.widths
        }
        return {**widths, LAYERS: SpaceMap.tied(layers)}

    def forward(self, weights: Weights) -> Weights:
        """Slots of the source -> slots of the target."""
        if self.variant == "fpi":
            return super().forward(weights)
        maps_here = as_in(weights, self.maps)
        widths: Maps = {space: maps_here[space] for space in self.source.widths}
        wide = expand(self.source.tensors, weights, widths)
        for row in self.source.tensors:
            if _takes_from_above(row):
                above = {slot: torch.cat([weights[slot][1:], weights[slot][-1:]]) for slot in row.slots}
                upper = expand([row], above, widths)
                old = self.source.spaces[str(row.dims[0])].size
                for slot in row.slots:
                    wide[slot] = torch.cat([wide[slot][:, :old], upper[slot][:, old:]], dim=1)
        return expand(self.source.tensors, wide, {LAYERS: maps_here[LAYERS]})


def _takes_from_above(row: TensorSpec) -> bool:
    return row.layered and not row.normalises and not row.slots[0].startswith(SCALE)
