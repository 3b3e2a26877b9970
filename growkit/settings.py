"""Settings of growing, and of training around it, free of torch so that --help stays fast."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class GrowSettings:
    """How the target's weights are made from the source's."""

    method: str = "mango"
    """Growth method."""
    rank: int = 1
    """Rank of every bond of Mango's tensor ring."""
    ranks: str | None = None
    """Rank of each bond in ring order, as in 4,4,1,4; overrides --rank."""
    ring_order: str = "BOLI"
    """Order of Mango's cores around the ring: B matrices of a layer, O outputs, L layers, I inputs."""
    noise: float = 0.1
    """Noise that parts duplicated units, relative to the weights; the function stays as it is."""
    seed: int = 0
    """Seed of the noise, of the data order and of the augmentation."""


# Where training an operator or a grown model differs from training from nothing.
OPERATOR_DEFAULTS: dict[str, Any] = {
    "steps": 100,
    "lr": 1e-4,
    "weight_decay": 0.0,
    "eval_every": 0.0,
}
FINETUNE_DEFAULTS: dict[str, Any] = {"lr": 1e-4}
