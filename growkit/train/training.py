"""The model with its optimizer, schedule, loss scaler and moving average, and one update of it."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from growkit.errors import GrowkitError
from growkit.seeds import seeded
from growkit.train import distributed, made_weights
from growkit.train import resume as resuming
from growkit.train.batch_size import recompute_blocks
from growkit.train.batches import train_batches
from growkit.train.data import Data
from growkit.train.flops import count_making, count_step
from growkit.train.memory import keep_what_fits, without_storage
from growkit.train.normalise import sent
from growkit.train.optimizer import optimizer_of
from growkit.train.precision import autocast, precision_on
from growkit.train.score import predictor, require_labels
from growkit.train.settings import CUDA_GRAPHS, FitSettings

REMEDY = "try a lower --lr, a longer --warmup-epochs, a lower --clip-grad or --precision fp32"
SMALLEST_SCALE = 2**-8  # loss scale in float16: 24 halvings below its start, one for each skipped update


class Training:
    """The model with its optimizer, schedule, loss scaler and moving average, and one update of it."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        settings: FitSettings,
        device: torch.device,
        updates: int,
        warmup: int,
        flops_per_step: int | None = None,
    ):
        self.settings, self.device = settings, device
        self.ema: Any = None
        if settings.model_ema:
            self.ema = ModelEmaV3(model, settings.model_ema_decay, use_warmup=True)
        if settings.grad_checkpointing:
            recompute_blocks(model)
        bare = without_storage(model)
        for part in (model,) if self.ema is None else (model, self.ema.module):
            if settings.shard:
                distributed.shard(part, device)
            part.to(device)
        self.model = model.train()
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self.trained:
            raise GrowkitError("nothing to train: every parameter of the model is frozen")
        self.optimizer = optimizer_of(model, settings)
        self.schedule, _ = create_scheduler_v2(
            self.optimizer,
            sched=settings.sched,
            num_epochs=updates - warmup,
            warmup_epochs=warmup,
            warmup_prefix=True,
            warmup_lr=settings.lr / (warmup + 1),  # the first update already moves
            min_lr=settings.min_lr,
            step_on_epochs=False,
            updates_per_epoch=1,  # timm's epoch is our update
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self.judged: nn.Module = model if self.ema is None else self.ema.module
        images, labels = next(train_batches(data, replace(settings, workers=0), 0, 1, device=device))
        self.outputs = self._count_outputs(images, data)
        require_labels(labels, self.outputs)
        self.loss_of, self.mix = _loss(settings, self.outputs)
        self.flops_per_step = flops_per_step or self._count_flops(bare, images, labels)
        keep_what_fits(model, images.shape, precision_on(device, settings.precision))
        self.network = distributed.together(model, device)
        # Only training runs compiled: evaluation would be a second graph to compile, and FLOPs could not be counted.
        self.forward: Callable[..., Any] = self.network
        if settings.compile is not None:
            made_weights.leave_uncompiled(model)
            self.forward = torch.compile(self.network, mode=settings.compile)

    def _count_outputs(self, images: Tensor, data: Data) -> int:
        """Return how many outputs the model has for an image.

        Raises:
            GrowkitError: fewer than the data has classes.
        """
        with seeded("outputs", device=self.device):
            outputs = int(predictor(self.model, self.device, self.settings.precision)(images[:1]).shape[-1])
        if len(data.classes) > outputs:
            raise GrowkitError(
                f"the data has {len(data.classes)} classes but the model has {outputs}"
                " outputs; give the model as many classes as the data"
            )
        return outputs

    def _count_flops(self, bare: nn.Module, images: Tensor, targets: Tensor) -> int:
        """Return the FLOPs of an update, of all processes together; `bare` is the model without storage."""
        if self.mix is not None:
            with seeded("outputs", device=self.device):
                images, targets = self.mix(images.to(self.device), targets.to(self.device))
        processes, cost = distributed.size(), count_step(bare, (images, targets), self.loss_of)
        flops = cost.of_update(self.settings.grad_accum_steps)
        if processes > 1:
            with made_weights.shared(bare, processes):
                flops += count_making(bare) - cost.flops_of_making
        return flops * processes

    @property
    def lr(self) -> float:
        """Learning rate of the last update."""
        return float(self.optimizer.param_groups[0]["lr"])

    def update(self, step: int, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """Make update number `step` (from 1) and return its loss, still on the device."""
        self.schedule.step_update(step - 1)
        accumulate = self.settings.grad_accum_steps
        loss = torch.zeros((), device=self.device)
        with seeded(self.settings.seed, "update", step, *distributed.own_draws(), device=self.device):
            with (
                made_weights.shared(self.model, distributed.size()),
                made_weights.made_once(self.model, accumulate) as leaves,
            ):
                for left in reversed(range(accumulate)):
                    loss += self._add_gradients(*next(batches), last=not left)
                    if left and left == accumulate - 1 and self.settings.compile in CUDA_GRAPHS:
                        _own_gradients(leaves)
                del leaves  # of made weights, only the gradients are needed from here on
            if self.settings.clip_grad:
                self.scaler.unscale_(self.optimizer)
                dispatch_clip_grad(self.trained, self.settings.clip_grad)
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model, step=step)
        return loss

    def _add_gradients(self, images: Tensor, targets: Tensor, *, last: bool) -> Tensor:
        """Run one batch forward and backward; return its share of the update's loss."""
        require_labels(targets, self.outputs)
        images = images.to(self.device, non_blocking=True)
        targets = sent(targets, self.device)
        if self.mix is not None:
            images, targets = self.mix(images, targets)
        with distributed.syncing_gradients(self.network, now=last):
            with autocast(self.settings.precision, self.device):
                share = self.loss_of(self.forward(images), targets) / self.settings.grad_accum_steps
            self.scaler.scale(share).backward()
        return share.detach()

    def refuse_broken(self, step: int, kept: str) -> None:
        """Raise GrowkitError if weights are not finite after update `step`, or float16 gradients keep overflowing.

        A loss belongs to the weights before its update: a gradient that is not finite shows only in the next loss.
        """
        own = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in self.trained]
        # waits for the GPU once, not for each tensor; a process's part of a sharded one may be empty
        largest = get_total_norm([tensor for tensor in own if tensor.numel()], norm_type=math.inf)
        (broken,) = distributed.anywhere(not math.isfinite(largest))
        if broken:
            raise GrowkitError(f"weights are not finite after update {step}; {REMEDY}{kept}")
        if self.scaler.is_enabled() and self.scaler.get_scale() < SMALLEST_SCALE:
            raise GrowkitError(
                f"float16 overflows in update after update (loss scale {self.scaler.get_scale():.1e} at update {step});"
                f" try --precision bf16 or fp32, or a lower --lr{kept}"
            )

    def state(self) -> dict[str, Any]:
        """Return what `load` takes; the schedule depends only on the step and has no state."""
        return {
            "model": resuming.trainable_state(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": {} if self.ema is None else resuming.trainable_state(self.ema.module),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state()` returned."""
        resuming.load_trainable(self.model, state["model"])
        resuming.load_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            resuming.load_trainable(self.ema.module, state["ema"])


def _own_gradients(leaves: Iterable[Tensor]) -> None:
    """Copy gradients out of memory that a CUDA graph overwrites at its next run: autograd keeps the first it is given.

    Later gradients are added to that one (pytorch/pytorch#169545: an error, or a wrong sum).
    """
    for leaf in leaves:
        if leaf.grad is not None:
            leaf.grad = leaf.grad.clone()


def _loss(settings: FitSettings, outputs: int) -> tuple[Callable[[Any, Tensor], Tensor], Any]:
    """Return the loss, and the mixing applied to a batch before it (or None)."""
    if settings.mixup or settings.cutmix:
        mix = Mixup(
            settings.mixup,
            settings.cutmix,
            label_smoothing=settings.smoothing,
            num_classes=outputs,
        )
        return SoftTargetCrossEntropy(), mix
    if settings.smoothing:
        return LabelSmoothingCrossEntropy(settings.smoothing), None
    return nn.CrossEntropyLoss(), None
