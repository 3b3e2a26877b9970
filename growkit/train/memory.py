"""Peak memory of a training step, counted from the births and deaths of storages: no GPU, nothing computed."""

import copy
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from growkit.train.making import made_once
from growkit.train.score import autocast


class Alive(TorchDispatchMode):
    """Counts the bytes of every storage that an operation makes while this is entered, until it is freed.

    What a kernel allocates and frees inside, and an allocator's rounding, are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0  # bytes; `largest` of one storage
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
    """A copy in training mode whose tensors are on the meta device."""
    tensors: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    tensors |= {id(b): b.to("meta") for b in model.buffers()}
    return copy.deepcopy(model, tensors).train()


def step_peak(model: nn.Module, images: Sequence[int], precision: str, batches: int = 1) -> int:
    """Peak bytes of two AdamW updates on `batches` (N, C, H, W) of `images` each; the second has the moments.

    `precision` is fp32, bf16 or fp16. Weights, gradients, moments, activations and the batch are in. `model` is given
    up: it comes back without weights.
    """
    device = torch.device("cpu")  # autograd runs on no other fake device without that device being there
    with FakeTensorMode(), Alive() as alive:
        for module in model.modules():
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                parameter = isinstance(tensor, nn.Parameter)
                setattr(module, name, nn.Parameter(fake, tensor.requires_grad) if parameter else fake)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        batch = torch.empty(*images, device=device)
        labels = torch.empty(len(batch), dtype=torch.long, device=device)
        for _ in range(2):
            with made_once(model, batches):
                for _ in range(batches):
                    with autocast(precision, device):
                        loss = nn.functional.cross_entropy(model(batch), labels)
                    loss.backward()
                    del loss
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return alive.peak
