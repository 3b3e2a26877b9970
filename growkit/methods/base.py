"""What a growth method is: a module that maps the source's weights to the target's."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import nn

from growkit.arch.spec import LAYERS, Architecture, Weights
from growkit.errors import GrowkitError
from growkit.settings import GrowSettings


class GrowthMethod(nn.Module, ABC):
    """Maps the source's weights to the target's.

    Initialise in __init__, apply in forward, train parameters(). A fixed rule has no parameters. `cannot` says which
    sizes a method cannot grow; callers ask `methods.check`, as `grow.make_method` does.
    """

    VARIANTS: ClassVar[tuple[str, ...]] = ()  # what --variant takes; the first is the default
    # settings that change its result, besides variant, stages and seed; tests check that
    TAKES: ClassVar[frozenset[str]] = frozenset({"noise"})

    def __init__(self, source: Architecture, target: Architecture, settings: GrowSettings):
        super().__init__()
        self.source, self.target, self.settings = source, target, settings
        self.variant = settings.variant or next(iter(self.VARIANTS), None)

    @classmethod
    def cannot(cls, source: Architecture, target: Architecture, settings: GrowSettings) -> str | None:
        """Say why this pair cannot be grown: what, got, expected; None if it can be."""
        return None

    @property
    def lossless(self) -> bool:
        """Whether the grown model, before any training, computes what the source computes; tests check that."""
        return not growing(self.source, self.target)

    @abstractmethod
    def forward(self, weights: Weights) -> Weights:
        """Slots of the source -> slots of the target; layered slots are (L, out, in) and (L, out)."""


def refuse_shrinking(source: Architecture, target: Architecture) -> None:
    """Refuse a target that is not a larger network of the same kind: growing only adds.

    Raises:
        GrowkitError: a space of the target is smaller, its head size differs, or it is a network of another kind.
    """
    for name, old in source.spaces.items():
        new = target.spaces.get(name, old)
        if new.group != old.group:
            heads, size = new.size // old.group, old.group
            fits = f"--set num_heads={heads}" if new.size % size == 0 else f"a width that is a multiple of {size}"
            raise GrowkitError(
                f"{name}: head size {old.group} -> {new.group}; growkit keeps head size, choose "
                f"a target with {size}-wide heads ({fits})"
            )
        if new.size < old.size:
            raise GrowkitError(
                f"{name}: {old.size} -> {new.size} would shrink; choose a target of at least {old.size} "
                f"(growkit plan shows sizes)"
            )
    differs = [
        f"{what} {old} -> {target.kind.get(what)}" for what, old in source.kind.items() if old != target.kind.get(what)
    ]
    differs += sorted({row.key for row in source.tensors} ^ {row.key for row in target.tensors})
    if differs:
        sizes = {
            "embed_dim": target.spaces["embed"].size,
            "num_heads": target.spaces["attn"].size // source.spaces["attn"].group,
            "depth": target.spaces[LAYERS].size,
        }
        same_kind = " ".join([f"--to {source.name}", *(f"--set {name}={size}" for name, size in sizes.items())])
        raise GrowkitError(
            f"source and target differ in {', '.join(differs[:3])}; choose a target of the same kind, as {same_kind}"
        )


def growing(source: Architecture, target: Architecture) -> tuple[str, ...]:
    """Names of the spaces that grow."""
    return tuple(name for name, space in source.spaces.items() if target.spaces[name].size != space.size)


def whole(source: Architecture, target: Architecture, *spaces: str) -> bool:
    """Whether each of these spaces grows to a whole multiple of its size."""
    return all(target.spaces[name].size % source.spaces[name].size == 0 for name in spaces)


def normed_inside(architecture: Architecture) -> tuple[str, ...]:
    """Return the spaces inside a layer with a norm over them: it sees the same only if all units are copied equally."""
    return tuple(space for space, slot in (("attn", "norm_attn"), ("mlp", "norm_mlp")) if architecture.has(slot))


def averages(source: Architecture, target: Architecture) -> bool:
    """Return whether the residual's tail can be kept at the mean of the rest, or need not be: see `maps.residual`.

    Only operations linear in the channels keep that mean: not a norm over patches, nor a maximum over tokens before the
    last norm. A norm before the blocks does if `carry_mean` helps it. An RMSNorm needs zeros, which all of them keep.
    """
    if whole(source, target, "embed") or not source.centred:
        return True
    alone = target.spaces["embed"].size % source.spaces["embed"].size == 1 and source.has("norm_pre")
    pooled = "max" in source.kind.get("pooling", "") and "fc_norm.weight" in source.shapes
    return not (source.has("norm_patch") or alone or pooled)


def grows_width(source: Architecture, target: Architecture) -> str | None:
    """Say why a method that only grows depth cannot grow this pair: the first width that grows; None if it can."""
    for name in source.widths:
        if name in growing(source, target):
            sizes = f"{source.spaces[name].size} -> {target.spaces[name].size}"
            return f"{name} grows ({sizes}), and this method grows depth alone"
    return None


def grows_depth(source: Architecture, target: Architecture) -> str | None:
    """Say why a method that only grows width cannot grow this pair; None if it can."""
    if LAYERS not in growing(source, target):
        return None
    sizes = f"{source.spaces[LAYERS].size} -> {target.spaces[LAYERS].size}"
    return f"{LAYERS} grow ({sizes}), and this method grows width alone"
