"""LLaMA Pro (Wu et al., ACL 2024, section 3.2): depth by identity blocks.

The layers are cut into as many groups as layers are added, and each group is followed by a copy of its last layer
whose two output projections are zero, so that the new block adds nothing at first. If the layers do not divide evenly,
the groups differ by one; if more layers are added than there are, a layer is followed by several copies. The paper
then trains only the new blocks, to keep what a language model knows while it learns a new domain; growkit trains
everything, as for every other method.
"""

from typing import ClassVar

import torch

from growkit.arch.spec import LAYERS, Architecture
from growkit.core import maps
from growkit.methods.base import grows_width
from growkit.methods.expand import Expansion, Maps, identity_blocks
from growkit.settings import GrowSettings


class LlamaPro(Expansion):
    """Identity blocks between copied layers; widths stay. Keeps the function at every depth."""

    TAKES: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def cannot(cls, source: Architecture, target: Architecture, settings: GrowSettings) -> str | None:
        """Width cannot grow."""
        return grows_width(source, target)

    @property
    def lossless(self) -> bool:
        """Always."""
        return True

    def make_maps(self, generator: torch.Generator) -> Maps:
        """Maps of the layers, with the new blocks' rows zero for the slots that write the residual."""
        old, new, _ = self.sizes(LAYERS)
        return identity_blocks(maps.inserted_layers(old, new))
