"""What a growth method is: a module that maps the source's weights to the target's."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import nn

from growkit.arch.spec import Architecture, Weights
from growkit.errors import GrowkitError
from growkit.settings import GrowSettings


class GrowthMethod(nn.Module, ABC):
    """Maps the source's weights to the target's.

    Initialise in __init__, apply in forward, train parameters(). A fixed rule has no parameters.
    """

    lossless: ClassVar[bool]  # claims to keep the function where sizes allow; tests hold it to that

    def __init__(self, source: Architecture, target: Architecture, settings: GrowSettings):
        super().__init__()
        refuse_shrinking(source, target)
        self.source, self.target, self.settings = source, target, settings

    @abstractmethod
    def forward(self, weights: Weights) -> Weights:
        """Slots of the source -> slots of the target; layered slots are (L, out, in) and (L, out)."""


def refuse_shrinking(source: Architecture, target: Architecture) -> None:
    """Growing only adds.

    Raises:
        GrowkitError: a space of the target is smaller, a head's size differs, or other tensors are there.
    """
    for name, old in source.spaces.items():
        new = target.spaces[name]
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
    keys = {row.key for row in source.tensors} ^ {row.key for row in target.tensors}
    if keys:
        raise GrowkitError(
            f"source and target differ in {', '.join(sorted(keys)[:3])}; choose a target of the same kind"
        )
