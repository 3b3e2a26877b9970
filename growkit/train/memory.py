"""Peak memory of a training step, counted from storages as they are made and freed: no GPU, nothing computed."""

import copy
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from growkit.train.made_weights import MakesWeights, made_once
from growkit.train.optimizer import ADAMW_KEEPS
from growkit.train.precision import autocast

# Memory that making the weights may keep, as a share of what the network holds for its backward pass. Where all of a
# ring's intermediates fit, an update of its operator at rank 4 peaks at most a fifth above one of the network.
KEPT_SHARE = 1 / 4


class Alive(TorchDispatchMode):
    """While entered, counts the bytes of every storage that an operation makes, until it is freed.

    A kernel's internal allocations and an allocator's rounding are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0  # bytes; `largest` is the largest single storage
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, bool] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known[storage] = True
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return made

    def _add(self, size: int) -> None:
        self.now += size
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)


def without_storage(model: nn.Module) -> nn.Module:
    """Copy the model, in training mode, with its tensors on the meta device."""
    tensors: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    tensors |= {id(b): b.to("meta") for b in model.buffers()}
    return copy.deepcopy(model, tensors).train()


def step_peak(model: nn.Module, images: Sequence[int], precision: str, batches: int = 1) -> int:
    """Return the peak bytes of an update with fused AdamW on `batches` batches, when its moments are there.

    `images` is a batch's shape (N, C, H, W); `precision` is fp32, bf16 or fp16. Weights, gradients, moments,
    activations and the batch are included. `model` is consumed: it loses its weights.
    """
    keep_what_fits(model, images, precision)
    with _computing_nothing(model) as alive:
        learned = [p for p in model.parameters() if p.requires_grad]
        moments = [torch.empty_like(p) for p in learned for _ in range(ADAMW_KEEPS)]
        batch = torch.empty(*images)
        labels = torch.empty(len(batch), dtype=torch.long)
        with made_once(model, batches):
            for _ in range(batches):
                with autocast(precision, batch.device):
                    loss = nn.functional.cross_entropy(model(batch), labels)
                loss.backward()
                del loss
        del moments  # the update itself takes nothing more
    return alive.peak


def keep_what_fits(model: nn.Module, images: Sequence[int], precision: str) -> None:
    """Let a model that makes its weights keep as many intermediates of that as take little memory beside a batch.

    `images` is the batch's shape (N, C, H, W), as in `step_peak`. The limit is a share of what the network holds for
    its backward pass, so that it depends on model and batch alone.
    """
    if not isinstance(model, MakesWeights):
        return
    network = without_storage(model.network)
    with _computing_nothing(network) as alive:
        batch = torch.empty(*images)
        before = alive.now
        with autocast(precision, batch.device):
            outputs = network(batch)
        model.keep_intermediates(int(KEPT_SHARE * (alive.now - before)))
        del outputs


@contextmanager
def _computing_nothing(model: nn.Module) -> Iterator[Alive]:
    """Inside, the model's tensors are fake, and every tensor made from them is counted."""
    with FakeTensorMode(), Alive() as alive:
        for module in model.modules():
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                # on the CPU: autograd on any other fake device needs the real one to be there
                fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                parameter = isinstance(tensor, nn.Parameter)
                setattr(module, name, nn.Parameter(fake, tensor.requires_grad) if parameter else fake)
        yield alive
