"""Training of a model that makes its weights from others at every forward pass, as a grown one does by its operator.

In training they are made once an update, whatever its batches, and of several processes each makes a part. Any other
model passes through here untouched.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class MakesWeights(Protocol):
    """What growkit.grow.GrownModel is to the loop."""

    @property
    def network(self) -> nn.Module:
        """What runs with the weights; its own have no storage."""

    def weights(self) -> dict[str, Tensor]:
        """The weights by name, with gradients to the parameters."""

    def weights_once(self) -> AbstractContextManager[Iterable[Tensor]]:
        """Make them once for all batches inside: gradients add up there, and reach the parameters on leaving."""

    def weights_shared(self, processes: int) -> AbstractContextManager[None]:
        """Inside, each of as many processes as there are makes a part of the weights for all."""

    def keep_intermediates(self, size: int) -> None:
        """Keep intermediates of at most `size` bytes from the forward to the backward pass; make the others again."""

    def leave_weights_uncompiled(self) -> None:
        """Keep torch.compile out of making them."""


def made_once(model: nn.Module, batches: int) -> AbstractContextManager[Iterable[Tensor]]:
    """Around the `batches` of an update, forward and backward: gives the tensors at which their gradients add up."""
    if batches > 1 and isinstance(model, MakesWeights):
        return model.weights_once()
    return nullcontext(list(model.parameters()))


def shared(model: nn.Module, processes: int) -> AbstractContextManager[None]:
    """Around what `processes`, all that train together, do alike: they make the weights together."""
    if processes > 1 and isinstance(model, MakesWeights):
        return model.weights_shared(processes)
    return nullcontext()


def leave_uncompiled(model: nn.Module) -> None:
    """Keep torch.compile out of making weights."""
    if isinstance(model, MakesWeights):
        model.leave_weights_uncompiled()
