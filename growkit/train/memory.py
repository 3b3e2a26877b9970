"""Peak memory of a training step, counted from the births and deaths of storages: no GPU, nothing computed."""

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
from growkit.train.score import autocast

# Of what a network holds for its backward pass: what the making of its weights may hold besides. Where that is all of a
# ring's intermediates, an update of its operator at rank 4 peaks a fifth above one of the network at most.
KEPT_SHARE = 1 / 4


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
    keep_what_fits(model, images, precision)
    with _computing_nothing(model) as alive:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        batch = torch.empty(*images)
        labels = torch.empty(len(batch), dtype=torch.long)
        for _ in range(2):
            with made_once(model, batches):
                for _ in range(batches):
                    with autocast(precision, batch.device):
                        loss = nn.functional.cross_entropy(model(batch), labels)
                    loss.backward()
                    del loss
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return alive.peak


def keep_what_fits(model: nn.Module, images: Sequence[int], precision: str) -> None:
    """Let a model that makes its weights keep intermediates of that, as many as weigh little beside a batch of images.

    It is (N, C, H, W) as of `step_peak`. The room is a share of what the network holds for its backward pass, so that
    it depends on model and batch alone.
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
    """Inside, the model's tensors have no numbers, and what is made of them is counted."""
    with FakeTensorMode(), Alive() as alive:
        for module in model.modules():
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                # on the CPU: autograd runs on no other fake device without that device being there
                fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                parameter = isinstance(tensor, nn.Parameter)
                setattr(module, name, nn.Parameter(fake, tensor.requires_grad) if parameter else fake)
        yield alive
