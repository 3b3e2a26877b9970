"""Growing: the target network with weights method(source weights), and how far its outputs are from the source's."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from growkit.arch import build, halfway
from growkit.arch.spec import Architecture, StateDict, Weights
from growkit.core.ring import RingOperator
from growkit.core.ring_slices import without_autocast
from growkit.methods import check
from growkit.methods.base import GrowthMethod, whole
from growkit.methods.expand import even_scales
from growkit.methods.staged import Staged
from growkit.ranges import refuse_choice
from growkit.settings import STAGES, GrowSettings

_IN_BLOCK = re.compile(r"^(blocks\.\d+\.)")


class _Recomputed(nn.Module):
    """A block recomputed in the backward pass, with the weights that the forward pass used.

    timm's own checkpointing would see the skeleton's weights, since functional_call restores them after the forward.
    """

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Any:
        return checkpoint(functional_call, self.block, dict(self.block.named_parameters()), (x,), use_reentrant=False)


class GrownModel(nn.Module):
    """The target network with weights method(source). Its trainable parameters are the method's.

    The network itself is a skeleton without storage. The source's weights are buffers, so `.to()` moves them and the
    method. Only `method.state_dict()` needs saving.
    """

    def __init__(self, target: Architecture, method: GrowthMethod, source: Weights):
        super().__init__()
        self.target = target
        self.method = method.to(next(iter(source.values())).dtype)
        # Not a registered submodule: it must not be moved, saved or optimised.
        self._skeleton = (build(target.name, target.arguments, device="meta"),)
        self._kept: dict[str, Tensor] | None = None  # the weights while `weights_once` keeps them
        self._weights_of = GrownModel._current_weights
        self._slots = tuple(source)
        for index, slot in enumerate(self._slots):
            self.register_buffer(f"source_{index}", source[slot].detach(), persistent=False)

    def train(self, mode: bool = True) -> Self:
        """Set training mode, also for the skeleton's dropout."""
        self.network.train(mode)
        return super().train(mode)

    @property
    def network(self) -> VisionTransformer:
        """The network that runs with the grown weights; its own have no storage."""
        return self._skeleton[0]

    def weights(self) -> dict[str, Tensor]:
        """Compute the target's weights by checkpoint name, differentiable in the method's parameters."""
        source = {slot: getattr(self, f"source_{index}") for index, slot in enumerate(self._slots)}
        with without_autocast(next(iter(source.values())).device.type):
            return self.target.join(self.method(source))

    def _current_weights(self) -> dict[str, Tensor]:
        return self.weights() if self._kept is None else self._kept

    @contextmanager
    def weights_once(self) -> Iterator[list[Tensor]]:
        """Compute the weights once for every forward and backward pass inside.

        Yields the weights. Their gradients accumulate, and go back through the method in one pass on leaving.
        """
        made = self.weights()
        ways = {name: get_gradient_edge(weight) for name, weight in made.items() if weight.requires_grad}
        kept = {name: weight.detach().requires_grad_(name in ways) for name, weight in made.items()}
        del made
        self._kept = kept
        try:
            yield list(kept.values())
        finally:
            self._kept = None
        found = {name: weight.grad for name, weight in kept.items() if weight.grad is not None}
        del kept  # only their gradients are needed from here on
        torch.autograd.backward([ways[name] for name in found], list(found.values()))

    @contextmanager
    def weights_shared(self, processes: int) -> Iterator[None]:
        """Split the computation of rings among the `processes` of torch.distributed inside: see `RingOperator`."""
        for ring in self._rings:
            ring.processes = processes
        try:
            yield
        finally:
            for ring in self._rings:
                ring.processes = 1

    def keep_intermediates(self, size: int) -> None:
        """Have rings keep at most `size` bytes of intermediates for the backward pass, which recomputes the rest."""
        for ring in self._rings:
            ring.room = size // len(self._rings)

    @property
    def _rings(self) -> list[RingOperator]:
        return [part for part in self.method.modules() if isinstance(part, RingOperator)]

    def leave_weights_uncompiled(self) -> None:
        """Exclude `weights` from torch.compile: it would trace a ring's planning, and compile each of its slices."""
        self._weights_of = torch.compiler.disable(GrownModel._current_weights)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass, as timm's method of this name does."""
        blocks = self.network.blocks
        for index, block in enumerate(blocks):
            inner = block.block if isinstance(block, _Recomputed) else block
            blocks[index] = _Recomputed(inner) if enable else inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the target network with the grown weights."""
        weights = self._weights_of(self)
        if isinstance(self.network.blocks[0], _Recomputed):
            weights = {_IN_BLOCK.sub(r"\1block.", name): tensor for name, tensor in weights.items()}
        return functional_call(self.network, weights, args, kwargs)

    @torch.no_grad()
    def materialize(self) -> VisionTransformer:
        """Return a plain target network with the grown weights: eval mode, all trainable, on the method's device."""
        model = build(self.target.name, self.target.arguments, device="meta")
        grown = self.weights()
        weights = {name: grown.pop(name).clone(memory_format=torch.contiguous_format) for name in list(grown)}
        model.load_state_dict(weights, assign=True)
        return model.requires_grad_(True).eval()


def grow(source: Architecture, target: Architecture, state: StateDict, settings: GrowSettings) -> GrownModel:
    """Grow a checkpoint by a new method, ready to train or to `materialize`.

        small = load_source("deit_small.pth")
        target, notes = find_target(small.architecture, "deit_base")
        big = grow(small.architecture, target, small.state, GrowSettings(rank=4)).materialize()  # timm's network

    `load_source` is in growkit.source, `find_target` in growkit.arch, `GrowSettings` in growkit.settings; `state` uses
    the names of timm's state dict.

    Raises:
        GrowkitError: weights that do not fit `source`, unknown method, or sizes that it cannot grow; the message says
            what would work.
    """
    source.check(state)
    weights = source.split(state)
    if not whole(source, target, "embed"):
        weights = even_scales(weights)
    return GrownModel(target, make_method(source, target, settings), weights)


def make_method(source: Architecture, target: Architecture, settings: GrowSettings) -> GrowthMethod:
    """Build the method that the settings name for a pair, in two stages if they ask for it and width and depth grow.

    Raises:
        GrowkitError: unknown method, variant or stages, or sizes that it cannot grow.
    """
    refuse_choice("--stages", settings.stages, STAGES)
    method = check(source, target, settings)
    middle = None if settings.stages == "both" else halfway(source, target, depth=settings.stages == "depth-first")
    if middle is None:
        return method(source, target, settings)
    return Staged(method(source, middle, settings), method(middle, target, settings))


@torch.no_grad()
def lossless_gap(source: VisionTransformer, grown: VisionTransformer, *, seed: int) -> float:
    """Largest absolute difference of the two networks' logits on four standard-normal inputs.

    Both run in eval mode, on the device and in the precision of their own parameters. Without a head they give
    features; then the source's are compared with the first of the grown ones, which are their copies.
    """
    first = next(source.parameters())
    config = source.patch_embed
    generator = torch.Generator().manual_seed(seed)
    shape = (4, config.proj.in_channels, *config.img_size)
    batch = torch.randn(shape, generator=generator, dtype=torch.float64).to(first.device, first.dtype)
    was = source.training, grown.training
    try:
        wanted, got = source.eval()(batch), grown.eval()(batch)
        return float((wanted - got[..., : wanted.shape[-1]]).abs().max())
    finally:
        source.train(was[0])
        grown.train(was[1])
