"""Arithmetic of one whole training step, counted by torch's FlopCounterMode."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from growkit.train.made_weights import MakesWeights, made_once
from growkit.train.memory import without_storage


@dataclass(frozen=True)
class StepCost:
    """Matrix products and convolutions of a forward and a backward pass over one batch.

    A multiply-accumulate is two FLOPs. What torch.utils.checkpoint recomputes is counted twice, as are a ring's
    intermediates, although training keeps those that fit (`memory.keep_what_fits`). What a fused attention kernel
    recomputes is counted once: nothing is executed, so the figures depend on no device or kernel. The optimizer's own
    arithmetic, norms and activations are not counted.
    """

    flops_per_step: int
    flops_of_making: int = 0  # the part of it that makes a grown model's weights, forward and backward

    def of_update(self, batches: int) -> int:
        """Return the FLOPs of an update of `batches` such batches, for which weights are made once."""
        return (self.flops_per_step - self.flops_of_making) * batches + self.flops_of_making


def count_step(model: nn.Module, batch: tuple[Tensor, Tensor], loss_fn: Callable[[Any, Tensor], Tensor]) -> StepCost:
    """Count a training step of `model` on a batch like this one; nothing is computed.

    Args:
        model: the module to train; its forward must run on torch's meta device, so it may not look at values.
        batch: images (N, C, H, W) and the targets `loss_fn` takes.
        loss_fn: maps (outputs, targets) to a scalar.
    """
    images, targets = (tensor.detach().to("meta").requires_grad_(tensor.requires_grad) for tensor in batch)
    bare, counter = without_storage(model), FlopCounterMode(display=False)
    # a grown model's weights are made beforehand; making them is counted separately
    with made_once(bare, 2), counter:
        loss_fn(bare(images), targets).backward()
    making = count_making(model)
    flops = counter.get_total_flops() + making
    return StepCost(flops, making)


def count_making(model: nn.Module) -> int:
    """Count the FLOPs of making weights once, in this process, forward and backward; nothing is computed.

    Counted with the slices a CPU uses; larger ones, as on a GPU, repeat no more. 0 for a model that makes no weights.
    """
    if not isinstance(model, MakesWeights):
        return 0
    maker: Any = without_storage(model)
    maker.keep_intermediates(0)
    with FlopCounterMode(display=False) as counter:
        made = [tensor for tensor in maker.weights().values() if tensor.requires_grad]
        torch.autograd.backward(made, [torch.empty_like(tensor) for tensor in made])
    return counter.get_total_flops()
