"""The training loop, for growth operators, grown models and models from nothing alike."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from growkit.errors import GrowkitError, first_line
from growkit.train import distributed, making
from growkit.train import resume as resuming
from growkit.train.batches import batches_per_epoch, images_per_batch, train_batches
from growkit.train.data import Data, size_of
from growkit.train.flops import count_making, count_step
from growkit.train.memory import without_storage
from growkit.train.room import recompute_blocks, telling_what_fits
from growkit.train.score import Scores, amp_dtype, autocast, multiplying, predictor, refuse_tf32, require_labels
from growkit.train.seeds import seeded
from growkit.train.settings import CUDA_GRAPHS, FitSettings
from growkit.train.telling import Done, rate, unheard
from growkit.train.watch import StepRecord, board, interruption, stop_signals

__all__ = ["FitResult", "StepRecord", "fit"]

SGD = ("sgd", "momentum", "nesterov")
FUSED = ("adamw", "adam", *SGD)  # timm's names for what torch updates in one kernel
REMEDY = "try a lower --lr, a longer --warmup-epochs, a lower --clip-grad or --precision fp32"
SMALLEST_SCALE = 2**-8  # of the loss in float16: 24 halvings from where it starts, one for each update that is skipped
# settings that change how a run is watched or fed, never what it computes
FREE_TO_CHANGE = ("shard", "workers", "log_every", "save_seconds", "tensorboard", "data_dir", "dataset_download")


@dataclass(frozen=True)
class FitResult:
    """What a run did; a resumed run's result covers its earlier parts, but for images_per_second.

    losses holds one value per update, history (step, scores) of each evaluation; best is the one
    with the highest top-1 (then the lowest loss). seconds is wall time with evaluation.
    """

    steps: int
    total: int
    losses: tuple[float, ...]
    best_scores: Scores | None
    best_step: int | None
    history: tuple[tuple[int, Scores], ...]
    interrupted: bool
    flops_per_step: int
    macs_per_step: int
    images_per_step: int
    images_per_second: float
    seconds: float
    stopped_by: int | None = None  # the signal that interrupted it, where one did
    judged: nn.Module | None = field(default=None, compare=False, repr=False)  # the model, or its moving average


def fit(
    model: nn.Module,
    data: Data,
    settings: FitSettings,
    *,
    device: torch.device | str = "cpu",
    evaluate: Callable[[nn.Module], Scores] | None = None,
    folder: Path | None = None,
    resume: bool = False,
    on_step: Callable[[StepRecord], None] | None = None,
    on_best: Callable[[nn.Module, Scores], None] | None = None,
    progress: Done = unheard,
) -> FitResult:
    """Train the parameters of `model` that require a gradient, in place.

    The result depends on the model, the data and the settings alone: not on the number of workers,
    nor on where a run was stopped and resumed. No global random state is changed. Ctrl-C or
    SIGTERM ends the run after the batch at hand, with the state of the last whole update saved, and a
    scoring at once where it is of one process; a second one ends at once whatever is at hand. What was not scored is
    when the run is resumed.

    On several processes (`distributed.joined`) each takes its part of every batch, gradients are averaged, and the
    result is that of one process to rounding; but dropout and mixing draw for each process, and mixing pairs the
    images of its part. All see the same records, scores and result; only the leading one writes. A run may be
    resumed on another number of them.

    Args:
        model: gives logits (N, classes) for images (N, C, H, W).
        data: images to train on.
        settings: everything else about the run.
        device: where to train; the model is moved there.
        evaluate: scores the model it is given: `model`, or the moving average with model_ema.
        folder: where state and metrics.jsonl go; nothing is written without it.
        resume: go on from the state in `folder`.
        on_step: called every log_every updates, after each evaluation and at the end.
        on_best: called with the evaluated model whenever it is the best so far.
        progress: told before every batch how many of the run's updates are done, parts of one too.

    Raises:
        GrowkitError: nothing to train, settings that do not fit the data, a loss that is not
            finite, --tf32 on a device without it, no state to resume from, or a state of another run.
        KeyboardInterrupt: a second signal, or a first one before anything was learned.
    """
    began = time.perf_counter()
    plan = _plan(data, settings)
    if settings.model_ema and evaluate is None:
        raise GrowkitError("--model-ema needs data to evaluate on; leave it out here")
    device = torch.device(device)
    refuse_tf32(settings, device)
    identity = _identity(data, settings)
    state = _state_of(folder, identity) if resume else None
    with telling_what_fits(model, data, settings, device):
        training = _Training(model, data, settings, device, plan)
    losses: list[float] = []
    history: list[tuple[int, Scores]] = []
    start, seconds_before = 0, 0.0

    def owed(step: int) -> bool:
        """Whether the model is to be scored after update `step`, and was not."""
        scored = bool(history) and history[-1][0] == step
        return evaluate is not None and step > 0 and not scored and (step == plan.total or plan.evaluates_at(step))

    if folder is not None and state is not None:
        training.load(state["training"])
        start, seconds_before, losses = state["step"], state["seconds"], state["losses"].tolist()
        history = [(step, Scores(**scores)) for step, scores in state["history"]]
        distributed.by_leader(lambda: resuming.cut_metrics(folder, start - owed(start)))
    elif folder is not None:
        distributed.by_leader(lambda: resuming.clear(folder))
        distributed.begin()
    saved, saved_at = start, time.perf_counter()
    accumulate = settings.grad_accum_steps
    divisible = not distributed.statistics(model)  # an update whose first batches leave no trace
    read = train_batches(data, settings, start * accumulate, plan.total * accumulate, device=training.device)

    def told(done: float) -> None:
        seconds = window + time.perf_counter() - mark
        progress(done, plan.total, note or rate((done - start) * plan.images_per_update, seconds))

    def followed() -> Iterator[tuple[Tensor, Tensor]]:
        for number in range((plan.total - start) * accumulate):
            told(start + number / accumulate)
            if number % accumulate and divisible and distributed.agreed(stop.asked)[0]:
                raise _StoppedError
            yield next(read)

    batches = followed()

    def updated(step: int) -> bool:
        """Make an update; False where a stop was asked for between its batches: they are let go."""
        try:
            with telling_what_fits(model, data, settings, device), multiplying(settings.tf32):
                pending.append(training.update(step, batches))
        except _StoppedError:
            training.optimizer.zero_grad(set_to_none=True)
            return False
        return True

    def score() -> Scores | None:
        """Scores of the model; None where a stop was asked for meanwhile."""
        try:
            with stop.raising(distributed.size() == 1):
                return None if evaluate is None else evaluate(training.judged)
        except KeyboardInterrupt:
            if distributed.size() > 1:
                raise
            stop.asked = True
            return None
        finally:
            model.train()

    def save() -> None:
        nonlocal saved, saved_at
        saved, saved_at = len(losses), time.perf_counter()
        if folder is None:
            return

        trained = distributed.whole(training.state())

        def write() -> None:
            state = {
                "identity": identity,
                "step": len(losses),
                "training": trained,
                "losses": torch.tensor(losses, dtype=torch.float64),
                "history": [(step, asdict(scores)) for step, scores in history],
                "seconds": seconds_before + time.perf_counter() - began,
            }
            resuming.save_state(folder, state)

        distributed.by_leader(write)
        saved_at = time.perf_counter()

    pending: list[Tensor] = []  # losses still on the device; reading them waits for it
    note = ""  # on the last record
    window = training_seconds = 0.0  # seconds since the last record, and in all
    recorded = start
    with stop_signals() as stop, board(settings, folder if distributed.leads() else None, start) as show:
        mark = time.perf_counter()
        for step in range(start + (not owed(start)), plan.total + 1):
            whole = step == start or updated(step)
            last, judge = whole and step == plan.total, whole and owed(step)
            report = judge or last or (whole and step % settings.log_every == 0)
            due = judge or last or time.perf_counter() - saved_at >= settings.save_seconds
            due, stopping = distributed.agreed(due, stop.asked)
            if not (report or due or stopping):
                continue

            if pending:
                means = distributed.summed(torch.stack(pending)) / distributed.size()
                losses += _finite(means.tolist(), len(losses), _kept_in(saved, folder))
                pending.clear()
            if stopping and not losses:
                raise interruption(stop.number)
            new = len(losses) > saved and (due or stopping)
            if new:  # nothing that is not finite is scored, kept or saved
                training.refuse_broken(len(losses), _kept_in(saved, folder))
            window += time.perf_counter() - mark
            if new:
                save()
            scores = score() if judge and not stopping else None
            stopping = stopping or (judge and scores is None)
            if report and (scores is not None or not judge):
                if scores is not None:
                    history.append((step, scores))
                    if on_best is not None and _best(history) == (step, scores):
                        on_best(training.judged, scores)
                record = StepRecord(
                    step=step,
                    total=plan.total,
                    epoch=step / plan.updates_per_epoch,
                    loss=losses[-1],
                    lr=training.lr,
                    images_per_second=(step - recorded) * plan.images_per_update / window,
                    scores=scores,
                )
                training_seconds, window, recorded = training_seconds + window, 0.0, step
                note = _note(record, history)
                if folder is not None and distributed.leads():
                    resuming.append_metrics(folder, asdict(record))
                show(record)
                if on_step is not None:
                    try:
                        on_step(record)
                    except KeyboardInterrupt:
                        stop.asked = True
                (stopping,) = distributed.agreed(stop.asked)
            if (last or stopping) and (scores is not None or len(losses) > saved):
                save()
            mark = time.perf_counter()
            if stopping:
                break
        told(len(losses))

    training_seconds += window
    best = _best(history) if history else (None, None)
    return FitResult(
        steps=len(losses),
        total=plan.total,
        losses=tuple(losses),
        best_step=best[0],
        best_scores=best[1],
        history=tuple(history),
        interrupted=len(losses) < plan.total or owed(plan.total),
        flops_per_step=training.flops_per_step,
        macs_per_step=training.flops_per_step // 2,
        images_per_step=plan.images_per_update,
        images_per_second=(len(losses) - start) * plan.images_per_update / (training_seconds or 1.0),
        seconds=seconds_before + time.perf_counter() - began,
        stopped_by=stop.number,
        judged=training.judged,
    )


def refuse_unusable(data: Data, settings: FitSettings, resumed: Path | None = None) -> None:
    """What `fit` would refuse of these settings, before anything else is done.

    `resumed` is the folder of a run that is to go on.

    Raises:
        GrowkitError: no such optimizer, lengths or rates that do not fit together, a batch that does not divide, or no
            state to go on from, or one of another run.
    """
    _plan(data, settings)
    _optimizer(nn.Linear(1, 1), settings)
    if resumed is not None:
        _state_of(resumed, _identity(data, settings))


def _state_of(folder: Path | None, identity: dict[str, Any]) -> dict[str, Any]:
    if folder is None:
        raise GrowkitError("resuming needs the folder of the run to go on with")
    return resuming.load_state(folder, identity)


class _StoppedError(Exception):
    """A stop was asked for between the batches of an update."""


@dataclass(frozen=True)
class _Plan:
    """Lengths of a run, in updates."""

    total: int
    warmup: int
    updates_per_epoch: float
    eval_every: int
    images_per_update: int

    def evaluates_at(self, step: int) -> bool:
        return self.eval_every > 0 and step % self.eval_every == 0


def _plan(data: Data, settings: FitSettings) -> _Plan:
    if settings.min_lr > settings.lr:
        raise GrowkitError(f"--min-lr {settings.min_lr}: expected at most the learning rate, {settings.lr}")
    if settings.lr * settings.weight_decay >= 1:
        raise GrowkitError(
            f"--weight-decay {settings.weight_decay} at a learning rate of {settings.lr} turns the sign of every"
            " weight; expected a product below 1"
        )
    images = images_per_batch(data, settings)
    distributed.refuse_odd(images)
    each = images // distributed.size()
    if each % 2 and (settings.mixup or settings.cutmix):
        raise GrowkitError(
            f"--mixup and --cutmix pair the images of a batch, and {each} is odd;"
            f" set --batch-size {max(2, each - 1) * distributed.size()}"
        )
    updates_per_epoch = batches_per_epoch(data, settings) / settings.grad_accum_steps
    total = settings.steps or max(1, round(settings.epochs * updates_per_epoch))
    warmup = round((settings.warmup_epochs or 0) * updates_per_epoch)
    if settings.warmup_epochs is None:
        warmup = total // 20
    if warmup >= total:
        raise GrowkitError(
            f"--warmup-epochs {settings.warmup_epochs} ({warmup} updates) must be shorter than"
            f" the run ({total} updates)"
        )
    eval_every = round(settings.eval_every * updates_per_epoch)
    return _Plan(
        total=total,
        warmup=warmup,
        updates_per_epoch=updates_per_epoch,
        eval_every=max(1, eval_every) if settings.eval_every else 0,
        images_per_update=images * settings.grad_accum_steps,
    )


class _Training:
    """The model with all that changes it, and one update of it."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        settings: FitSettings,
        device: torch.device,
        plan: _Plan,
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
        self.optimizer = _optimizer(model, settings)
        self.schedule, _ = create_scheduler_v2(
            self.optimizer,
            sched=settings.sched,
            num_epochs=plan.total - plan.warmup,
            warmup_epochs=plan.warmup,
            warmup_prefix=True,
            warmup_lr=settings.lr / (plan.warmup + 1),  # the first update moves already
            min_lr=settings.min_lr,
            step_on_epochs=False,
            updates_per_epoch=1,  # timm's epoch is our update
        )
        fp16 = amp_dtype(settings.precision, device) is torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self.judged: nn.Module = model if self.ema is None else self.ema.module
        batch, processes = self._try_one_batch(data), distributed.size()
        cost = count_step(bare, batch, self.loss_of)
        flops = cost.of_update(settings.grad_accum_steps)
        if processes > 1:
            with making.shared(bare, processes):
                flops += count_making(bare) - cost.flops_of_making
        self.flops_per_step = flops * processes
        self.network = distributed.together(model, device)
        # Training alone runs compiled: evaluation would be a second graph to compile, and FLOPs could not be counted.
        self.forward: Callable[..., Any] = self.network
        if settings.compile is not None:
            making.leave_uncompiled(model)
            self.forward = torch.compile(self.network, mode=settings.compile)

    def _try_one_batch(self, data: Data) -> tuple[Tensor, Tensor]:
        """Find how many outputs the model has, and give a batch as the network and its loss take it."""
        images, labels = next(train_batches(data, replace(self.settings, workers=0), 0, 1, device=self.device))
        with seeded("outputs", device=self.device):
            logits = predictor(self.model, self.device, self.settings.precision)(images[:1])
        self.outputs: int = logits.shape[-1]
        if len(data.classes) > self.outputs:
            raise GrowkitError(
                f"the data has {len(data.classes)} classes but the model has {self.outputs}"
                " outputs; give the model as many classes as the data"
            )
        require_labels(labels, self.outputs)
        self.loss_of, self.mix = _loss(self.settings, self.outputs)
        if self.mix is None:
            return images, labels
        with seeded("outputs", device=self.device):
            mixed: tuple[Tensor, Tensor] = self.mix(images.to(self.device), labels.to(self.device))
        return mixed

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
            with making.shared(self.model, distributed.size()), making.made_once(self.model, accumulate) as leaves:
                for left in reversed(range(accumulate)):
                    loss += self._add_gradients(*next(batches), last=not left)
                    if left and left == accumulate - 1 and self.settings.compile in CUDA_GRAPHS:
                        _own_gradients(leaves)
                del leaves  # of weights that were made the gradients alone are needed from here on
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
        """Run one batch forward and backward; its share of the update's loss."""
        require_labels(targets, self.outputs)
        images = images.to(self.device, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        if self.mix is not None:
            images, targets = self.mix(images, targets)
        with distributed.gathering(self.network, now=last):
            with autocast(self.settings.precision, self.device):
                share = self.loss_of(self.forward(images), targets) / self.settings.grad_accum_steps
            self.scaler.scale(share).backward()
        return share.detach()

    def refuse_broken(self, step: int, kept: str) -> None:
        """Raise GrowkitError where weights are not finite after update `step`, or float16 holds no gradient any more.

        A loss is that of the weights before its update: a gradient that is not finite shows in the next one.
        """
        own = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in self.trained]
        # waits for the GPU once, not for each tensor; a share of a sharded one may be empty
        largest = get_total_norm([tensor for tensor in own if tensor.numel()], norm_type=math.inf)
        (broken,) = distributed.agreed(not math.isfinite(largest))
        if broken:
            raise GrowkitError(f"weights are not finite after update {step}; {REMEDY}{kept}")
        if self.scaler.is_enabled() and self.scaler.get_scale() < SMALLEST_SCALE:
            raise GrowkitError(
                f"float16 overflows in update after update (loss scale {self.scaler.get_scale():.1e} at update {step});"
                f" try --precision bf16 or fp32, or a lower --lr{kept}"
            )

    def state(self) -> dict[str, Any]:
        """What `load` takes; the schedule is a function of the step and needs none."""
        return {
            "model": resuming.trainable_state(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": {} if self.ema is None else resuming.trainable_state(self.ema.module),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go back to where `state` was taken."""
        resuming.load_trainable(self.model, state["model"])
        resuming.load_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            resuming.load_trainable(self.ema.module, state["ema"])


def _own_gradients(leaves: Iterable[Tensor]) -> None:
    """Move gradients out of memory that a CUDA graph writes to at its next run: autograd keeps the first it is given.

    Further ones are added to what it keeps (pytorch/pytorch#169545: an error, or a wrong sum).
    """
    for leaf in leaves:
        if leaf.grad is not None:
            leaf.grad = leaf.grad.clone()


def _optimizer(model: nn.Module, settings: FitSettings) -> torch.optim.Optimizer:
    # timm's models name what must not decay
    spared: set[str] = getattr(model, "no_weight_decay", set)()
    groups = param_groups_weight_decay(model, settings.weight_decay, no_weight_decay_list=spared)
    groups = [group for group in groups if group["params"]]
    # torch's DTensor knows no fused SGD
    fused = {"fused": True} if settings.opt in FUSED and not (settings.shard and settings.opt in SGD) else {}
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(groups, settings.opt, lr=settings.lr, **fused)
    except (ValueError, AssertionError, KeyError) as error:
        known, name = list_optimizers(), settings.opt.lower().removeprefix("lookahead_")
        near = [] if name in known else get_close_matches(name, known, n=3)
        told = f"nearest: {', '.join(near)}" if near else "give adamw, sgd, lamb or another of timm's"
        raise GrowkitError(
            f"--opt {settings.opt}: not an optimizer timm can make ({first_line(error)}); {told}"
        ) from None
    return optimizer


def _loss(settings: FitSettings, outputs: int) -> tuple[Callable[[Any, Tensor], Tensor], Any]:
    """The loss, and what mixes a batch before it (or None)."""
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


def _identity(data: Data, settings: FitSettings) -> dict[str, Any]:
    """What must be the same for a run to be resumed."""
    chosen = {name: v for name, v in asdict(settings).items() if name not in FREE_TO_CHANGE}
    sizes = {"training images": size_of(data.train), "validation images": size_of(data.val)}
    return {**chosen, **sizes, "classes": data.classes, **data.identity}


def _best(history: list[tuple[int, Scores]]) -> tuple[int, Scores]:
    """The evaluation with the highest top-1, then the lowest loss, then the earliest."""
    return max(history, key=lambda entry: (entry[1].top1, -entry[1].loss))


def _note(record: StepRecord, history: list[tuple[int, Scores]]) -> str:
    """What a bar says of a record, with the last score."""
    scored = f" top-1 {history[-1][1].top1:.2%}" if history else ""
    speed = f" {record.images_per_second:.0f} images/s" if record.images_per_second else ""  # only scored since resumed
    return f"loss {record.loss:.4f}{scored} lr {record.lr:.1e}{speed}"


def _kept_in(saved: int, folder: Path | None) -> str:
    """Where the last good weights are, as the end of a line."""
    return f"; the state of update {saved} is in {folder}" if folder and saved else ""


def _finite(losses: list[float], done: int, kept: str) -> list[float]:
    """`losses` of the updates after `done`; GrowkitError where one is not finite."""
    for step, loss in enumerate(losses, start=done + 1):
        if not math.isfinite(loss):
            raise GrowkitError(f"the loss is {loss} at update {step}; {REMEDY}{kept}")
    return losses
