"""timm's optimizer for a model, and what it keeps for each weight."""

from difflib import get_close_matches

import torch
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_weight_decay
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from growkit.errors import GrowkitError, first_line
from growkit.seeds import random_kept
from growkit.train.settings import FitSettings

SGD = ("sgd", "momentum", "nesterov")
UNSHARDED = ("adafactor", "kron", "novograd")  # their updates fail on torch's DTensor
FUSED = ("adamw", "adam", *SGD)  # timm's names for what torch updates in one kernel
ADAMW_KEEPS = 2  # numbers for each weight: its moments


def optimizer_of(model: nn.Module, settings: FitSettings) -> torch.optim.Optimizer:
    """Make the optimizer for the parameters of `model` that require a gradient.

    Raises:
        GrowkitError: timm has no such optimizer, it is of second order, or it cannot update sharded parameters.
    """
    if settings.shard and any(name in settings.opt.lower() for name in UNSHARDED):
        raise GrowkitError(f"--opt {settings.opt}: it cannot update sharded weights; leave out --shard, or give adamw")
    # timm's models name what must not decay
    spared: set[str] = getattr(model, "no_weight_decay", set)()
    groups = param_groups_weight_decay(model, settings.weight_decay, no_weight_decay_list=spared)
    groups = [group for group in groups if group["params"]]
    # torch's DTensor has no fused SGD, and fused SGD reads momentum it never wrote if float16 skips the first update
    plain = settings.opt in SGD and (settings.shard or settings.precision == "fp16")
    fused = {"fused": True} if settings.opt in FUSED and not plain else {}
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(groups, settings.opt, lr=settings.lr, **fused)
    except (ValueError, AssertionError, KeyError) as error:
        known, name = list_optimizers(), settings.opt.lower().removeprefix("lookahead_")
        near = [] if name in known else get_close_matches(name, known, n=3)
        told = f"nearest: {', '.join(near)}" if near else "give adamw, sgd, lamb or another of timm's"
        raise GrowkitError(
            f"--opt {settings.opt}: not an optimizer timm can make ({first_line(error)}); {told}"
        ) from None
    if getattr(optimizer, "is_second_order", False):
        raise GrowkitError(f"--opt {settings.opt}: it asks for second derivatives, which are not computed here")
    return optimizer


def numbers_kept(settings: FitSettings) -> float:
    """Return how many numbers the optimizer keeps for each weight of a matrix; ADAMW_KEEPS if it runs on GPUs alone."""
    with random_kept():
        probe = nn.Linear(64, 256, bias=False)  # as an MLP's: what some keep depends on the shape
        optimizer = optimizer_of(probe, settings)
        probe.weight.grad = torch.ones_like(probe.weight)
        try:
            for _ in range(8):  # Lookahead copies the weights at its sixth update
                optimizer.step()
        except Exception:  # each library's own
            return ADAMW_KEEPS
    kept = [tensor for tensor in tree_leaves(optimizer.state_dict()["state"]) if isinstance(tensor, Tensor)]
    return sum(tensor.numel() for tensor in kept if tensor.numel() > 1) / probe.weight.numel()
