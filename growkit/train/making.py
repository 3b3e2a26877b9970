"""Training of a model that makes its weights anew for every batch, as a grown one does from its operator.

They need not be made so often: once an update is enough, and of several processes each can make a part. Any other model
passes through here untouched.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class MakesWeights(Protocol):
    """What growkit.grow.GrownModel is to the loop."""

    def weights(self) -> dict[str, Tensor]:
        """The weights by name, with gradients to the parameters."""

    def weights_once(self) -> AbstractContextManager[Iterable[Tensor]]:
        """Make them once for all batches inside: gradients add up there, and reach the parameters on leaving."""

    def share_weights(self, processes: int) -> None:
        """Have as many processes as there are make a part of the weights each, for all."""

    def leave_weights_uncompiled(self) -> None:
        """Keep torch.compile out of making them."""


def made_once(model: nn.Module, batches: int) -> AbstractContextManager[Iterable[Tensor]]:
    """Around the `batches` of an update, forward and backward: gives the tensors at which their gradients add up."""
    if batches > 1 and isinstance(model, MakesWeights):
        return model.weights_once()
    return nullcontext(list(model.parameters()))


def share(model: nn.Module, processes: int) -> None:
    """Have `processes`, all that train together, make the weights together from here on."""
    if isinstance(model, MakesWeights):
        model.share_weights(processes)


def leave_uncompiled(model: nn.Module) -> None:
    """Keep torch.compile out of making weights."""
    if isinstance(model, MakesWeights):
        model.leave_weights_uncompiled()
