"""Settings for reading a source, growing it, and training around it; imports no torch, so that --help stays fast."""

from dataclasses import dataclass
from typing import Any

from growkit.ranges import SEEDS, refuse_outside

MOST_RANK = 1024  # wider than any bond needs to be: its cores would outgrow the model
STAGES = ("both", "width-first", "depth-first")


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How a checkpoint is read; a model folder's config.json already says most of it."""

    from_: str | None = None
    """Architecture of the source, where its shapes leave it open (head count)."""
    from_set: list[str] | None = None
    """Override an argument of the source's architecture, as in --from-set num_heads=3; repeatable."""
    ema: bool = True
    """Take the averaged (EMA) weights of a checkpoint that holds both them and the plain ones."""

    @property
    def words(self) -> list[str]:
        """The options as they are typed."""
        named = ["--from", self.from_] if self.from_ else []
        sets = [word for item in self.from_set or () for word in ("--from-set", item)]
        return [*named, *([] if self.ema else ["--no-ema"]), *sets]


@dataclass(frozen=True, kw_only=True)
class GrowSettings:
    """How the target's weights are made from the source's."""

    method: str = "mango"
    """Growth method: mango, ligo, bert2bert, net2net, lemon, hypercloning, stackbert, llama-pro or random-pad."""
    variant: str | None = None
    """Variant of the method: fpi or aki of bert2bert; stack, interlace, round or solar of stackbert; lossless, noisy
    or random start of mango."""
    rank: int = 1
    """Rank of every bond of Mango's tensor ring."""
    ranks: str | None = None
    """Rank of each bond in ring order, as in 4,4,1,4; overrides --rank."""
    ring_order: str = "BOLI"
    """Order of Mango's cores around the ring: B matrices of a layer, O outputs, L layers, I inputs."""
    vectors: bool = True
    """Train Mango's maps of biases, norms, embeddings and head together with its ring."""
    stages: str = "both"
    """Grow width and depth at once or one after the other: both, width-first or depth-first."""
    noise: float = 1.0
    """Symmetry-breaking noise on duplicated units, relative to the weights; exact methods stay exact."""
    seed: int = 0
    """Seed of the method's random draws, the data order and the augmentation."""

    def __post_init__(self) -> None:
        """Raise GrowkitError on a number that no method can use, naming the option."""
        refuse_outside(self, "rank", least=1, most=MOST_RANK)
        refuse_outside(self, "noise", least=0)
        refuse_outside(self, "seed", least=0, most=SEEDS)


# Defaults that differ from training from scratch, for training an operator and a grown model.
OPERATOR_DEFAULTS: dict[str, Any] = {
    "steps": 100,
    "lr": 1e-4,
    "weight_decay": 0.0,
    "eval_every": 0.0,
}
FINETUNE_DEFAULTS: dict[str, Any] = {"lr": 1e-4}
