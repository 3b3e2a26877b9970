"""Two growths in a row, as one: width first or depth first, both operators trained together."""

from growkit.arch.spec import Weights
from growkit.methods.base import GrowthMethod


class Staged(GrowthMethod):
    """second(first(weights)); its parameters are those of both."""

    def __init__(self, first: GrowthMethod, second: GrowthMethod):
        super().__init__(first.source, second.target, second.settings)
        self.first, self.second = first, second

    @property
    def lossless(self) -> bool:
        """Where both are."""
        return self.first.lossless and self.second.lossless

    def forward(self, weights: Weights) -> Weights:
        """Slots of the source -> slots of the target."""
        return self.second(self.first(weights))
