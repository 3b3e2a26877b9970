"""The training loop, for growth operators, grown models and models from nothing alike."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from growkit.errors import GrowkitError
from growkit.train import distributed
from growkit.train import resume as resuming
from growkit.train.batches import batches_per_epoch, images_per_batch, train_batches
from growkit.train.data import Data, size_of
from growkit.train.room import telling_what_fits
from growkit.train.score import Scores, multiplying, refuse_tf32
from growkit.train.settings import FitSettings
from growkit.train.telling import Done, rate, unheard
from growkit.train.training import REMEDY, Training, optimizer_of
from growkit.train.watch import StepRecord, board, interruption, stop_signals

__all__ = ["FitResult", "StepRecord", "fit"]

# settings that change how a run is watched or fed, never what it computes
FREE_TO_CHANGE = ("shard", "workers", "log_every", "save_seconds", "tensorboard", "data_dir", "dataset_download")


@dataclass(frozen=True)
class FitResult:
    """What a run did; a resumed run's result covers its earlier parts, but for images_per_second.

    interrupted says that a stop was asked for, stopped_by by which signal, where one did.
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
    stopped_by: int | None = None
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
        training = Training(model, data, settings, device, plan.total, plan.warmup)
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
    saved, saved_scores, saved_at = start, len(history), time.perf_counter()
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
        """Scores of the model; None where a stop was asked for before, or meanwhile."""
        if evaluate is None or distributed.agreed(stop.asked)[0]:
            return None
        try:
            with stop.raising(distributed.size() == 1):
                return evaluate(training.judged)
        except KeyboardInterrupt:
            if distributed.size() > 1:
                raise
            stop.asked = True
            return None
        finally:
            model.train()

    def save() -> None:
        nonlocal saved, saved_scores, saved_at
        if folder is not None:
            state = {
                "identity": identity,
                "step": len(losses),
                "training": distributed.whole(training.state()),
                "losses": torch.tensor(losses, dtype=torch.float64),
                "history": [(step, asdict(scores)) for step, scores in history],
                "seconds": seconds_before + time.perf_counter() - began,
            }
            distributed.by_leader(lambda: resuming.save_state(folder, state))
        saved, saved_scores, saved_at = len(losses), len(history), time.perf_counter()

    pending: list[Tensor] = []  # losses still on the device; reading them waits for it
    note = ""  # on the last record
    window = training_seconds = 0.0  # seconds since the last record, and in all
    recorded, stopping = start, False
    written_in = folder if distributed.leads() else None
    with stop_signals() as stop, board(settings, written_in, start - owed(start)) as show:
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
                raise interruption(distributed.largest(stop.number or 0))
            if due or stopping:  # nothing that is not finite is scored, kept or saved
                training.refuse_broken(len(losses), _kept_in(saved, folder))
            window += time.perf_counter() - mark
            if judge and step > saved:  # scoring takes long, and may be ended at once
                save()
            scores = score() if judge else None
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
                    images_per_second=(step - recorded) * plan.images_per_update / (window or 1.0),
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
            if (due or stopping) and (len(losses) > saved or len(history) > saved_scores):
                save()
            mark = time.perf_counter()
            if stopping:
                break
        told(len(losses))

    training_seconds += window
    signalled = distributed.largest(stop.number or 0)
    best = _best(history) if history else (None, None)
    return FitResult(
        steps=len(losses),
        total=plan.total,
        losses=tuple(losses),
        best_step=best[0],
        best_scores=best[1],
        history=tuple(history),
        interrupted=stopping,
        flops_per_step=training.flops_per_step,
        macs_per_step=training.flops_per_step // 2,
        images_per_step=plan.images_per_update,
        images_per_second=(len(losses) - start) * plan.images_per_update / (training_seconds or 1.0),
        seconds=seconds_before + time.perf_counter() - began,
        stopped_by=signalled or None,
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
    optimizer_of(nn.Linear(1, 1), settings)
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
