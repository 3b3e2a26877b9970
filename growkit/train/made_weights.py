"""Training a model that makes its weights from others in every forward pass, as a grown model does with its operator.

In training they are made once per update, however many batches it has, and each of several processes makes a part. Any
other model passes through here unchanged.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class MakesWeights(Protocol):
    """growkit.grow.GrownModel as the training loop sees it."""

    @property
    def network(self) -> nn.Module:
        """The module that runs with the weights; its own parameters have no storage."""

    def weights(self) -> dict[str, Tensor]:
        """Return the weights by name; gradients flow to the parameters."""

    def weights_once(self) -> AbstractContextManager[Iterable[Tensor]]:
        """Make them once for all batches inside: gradients accumulate on them and reach the parameters on exit."""

    def weights_shared(self, processes: int) -> AbstractContextManager[None]:
        """Inside, each of the `processes`, which are all there are, makes a part of the weights for all."""

    def keep_intermediates(self, size: int) -> None:
        """Keep intermediates of at most `size` bytes from the forward to the backward pass; recompute the others."""

    def leave_weights_uncompiled(self) -> None:
        """Exclude making the weights from torch.compile."""


def made_once(model: nn.Module, batches: int) -> AbstractContextManager[Iterable[Tensor]]:
    """Wrap the `batches` of an update, forward and backward; gives the tensors on which their gradients accumulate."""
    if batches > 1 and isinstance(model, MakesWeights):
        return model.weights_once()
    return nullcontext(list(model.parameters()))


def shared(model: nn.Module, processes: int) -> AbstractContextManager[None]:
    """Wrap what all `processes` that train together do alike: they make the weights together."""
    if processes > 1 and isinstance(model, MakesWeights):
        return model.weights_shared(processes)
    return nullcontext()


def leave_uncompiled(model: nn.Module) -> None:
    """Exclude making weights from torch.compile."""
    if isinstance(model, MakesWeights):
        model.leave_weights_uncompiled()
