"""StackBERT (Gong et al., ICML 2019) and its kin: depth by copying layers, as a map of layers.

The original trains half the layers, doubles them and repeats; this is one such step, and --variant says which
source layer each target layer copies:

    stack      l mod L1                        StackBERT; G_stack (Du et al., NeurIPS 2024) for whole multiples
    interlace  floor(l L1 / L2)                interpolation (LiGO, Wang et al., ICLR 2023, Eq. 1)
    round      round(l L1 / L2)                Gopher's and ModernBERT's map
    solar      0..n-m-1, then m..n-1           SOLAR's depth up-scaling (Kim et al., 2023), L2 = 2 (n - m) <= 2 L1

Halves round up in `round`, where Python's own rounding would go to even layers. An odd L2 gives SOLAR's first copy
the extra layer.
"""

from typing import ClassVar

import torch

from growkit.arch.spec import LAYERS, Architecture
from growkit.core import maps
from growkit.methods.base import grows_width
from growkit.methods.expand import Expansion, Maps, SpaceMap
from growkit.settings import GrowSettings

LAYER_MAPS = {
    "stack": maps.duplicate,
    "interlace": maps.spread_layers,
    "round": maps.round_layers,
    "solar": maps.solar_layers,
}


class StackBERT(Expansion):
    """Layers copied as they are; widths stay. A deeper target does not keep the function."""

    TAKES: ClassVar[frozenset[str]] = frozenset()
    VARIANTS: ClassVar[tuple[str, ...]] = tuple(LAYER_MAPS)

    @classmethod
    def cannot(cls, source: Architecture, target: Architecture, settings: GrowSettings) -> str | None:
        """Width cannot grow, nor depth to more than twice with SOLAR."""
        old, new = source.spaces[LAYERS].size, target.spaces[LAYERS].size
        if settings.variant == "solar" and new > 2 * old:
            return f"{LAYERS} {old} -> {new}: solar overlaps two copies and reaches {2 * old} layers at most"
        return grows_width(source, target)

    def make_maps(self, generator: torch.Generator) -> Maps:
        """One map, of the layers."""
        old, new, _ = self.sizes(LAYERS)
        layers = LAYER_MAPS[str(self.variant)](old, new)
        return {LAYERS: SpaceMap.tied(layers)}
