"""The training loop, for growth operators, grown models and models from scratch alike."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from growkit.errors import GrowkitError
from growkit.float32 import multiplying
from growkit.train import distributed
from growkit.train import resume as resuming
from growkit.train.batch_size import telling_what_fits
from growkit.train.batches import train_batches
from growkit.train.data import Data, size_of
from growkit.train.length import Length, length_of
from growkit.train.optimizer import optimizer_of
from growkit.train.precision import precision_on, refuse_tf32
from growkit.train.progress import Progress, no_progress, rate
from growkit.train.score import Scores
from growkit.train.settings import AUTO, COMPILE_AUTO, FitSettings
from growkit.train.training import REMEDY, Training
from growkit.train.watch import StepRecord, Stop, board, interruption, stop_signals, summary_writer

# settings that change how a run is watched or fed, never what it computes
FREE_TO_CHANGE = ("shard", "workers", "log_every", "save_seconds", "tensorboard", "data_dir", "dataset_download")


@dataclass(frozen=True)
class FitResult:
    """What a run did; a resumed run's result covers its earlier parts, except in images_per_second.

    interrupted says whether a stop was requested, stopped_by by which signal, if any.
    losses has one value per update, history (step, scores) for each evaluation; best is the one
    with the highest top-1 (then the lowest loss). seconds is wall time including evaluation.
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
    judged: nn.Module = field(compare=False, repr=False)  # the model, or its moving average
    stopped_by: int | None = None


def fit(
    model: nn.Module,
    data: Data,
    settings: FitSettings,
    *,
    device: torch.device | str = "cpu",
    evaluate: Callable[[nn.Module], Scores] | None = None,
    folder: Path | None = None,
    resume: bool = False,
    on_start: Callable[[nn.Module], None] | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
    on_best: Callable[[nn.Module, Scores], None] | None = None,
    flops_per_step: int | None = None,
    progress: Progress = no_progress,
) -> FitResult:
    """Train the parameters of `model` that require a gradient, in place.

    The result depends on the model, the data and the settings alone: not on the number of workers,
    nor on where a run was stopped and resumed. No global random state is changed. Ctrl-C or
    SIGTERM ends the run after the current batch, with the state of the last whole update saved; on a single
    process it ends an evaluation at once. A second signal ends anything at once. An evaluation that was due
    but not made is made when the run is resumed.

    With several processes (`distributed.joined`), each takes its part of every batch, gradients are averaged, and the
    result is that of one process up to rounding; but dropout and mixing draw separately on each process, and mixing
    pairs images within its part. All see the same records, scores and result; only the leading process writes. A run
    may be resumed on a different number of processes.

    Args:
        model: gives logits (N, classes) for images (N, C, H, W), also on the meta device, where its FLOPs are counted.
        data: images to train on.
        settings: everything else about the run.
        device: where to train; the model is moved there.
        evaluate: scores the model it is given: `model`, or the moving average with model_ema.
        folder: where state and metrics.jsonl go; nothing is written without it.
        resume: go on from the state in `folder`.
        on_start: called before the first update, but not of a resumed run, with the model that `evaluate` would get.
        on_step: called every log_every updates, after each evaluation and at the end.
        on_best: called with the evaluated model whenever it is the best so far.
        flops_per_step: those of an update, if they are counted already.
        progress: told before every batch how many of the run's updates are done, fractions included.

    Raises:
        GrowkitError: nothing to train, settings that do not fit the data, a loss that is not
            finite, --tf32 on a device without it, no state to resume from, or a state of another run.
        KeyboardInterrupt: a second signal, or a first one before anything was learned.
    """
    _refuse_values(settings)
    length = length_of(data, settings)
    if settings.model_ema and evaluate is None:
        raise GrowkitError("--model-ema needs data to evaluate on; leave it out here")
    device = torch.device(device)
    refuse_tf32(settings, device)
    identity = _identity(data, settings, device)
    state = _state_of(folder, identity) if resume else None
    run = _Run(
        model, data, settings, length, device, folder, identity, evaluate, on_step, on_best, flops_per_step, progress
    )
    if state is None and on_start is not None:
        on_start(run.training.judged)
        run.training.model.train()
    run.begin(state)
    run.go()
    return run.result()


class _Run:
    """A run under way: what it has learned, how much of that is saved, and whether it is to stop."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        settings: FitSettings,
        length: Length,
        device: torch.device,
        folder: Path | None,
        identity: dict[str, Any],
        evaluate: Callable[[nn.Module], Scores] | None,
        on_step: Callable[[StepRecord], None] | None,
        on_best: Callable[[nn.Module, Scores], None] | None,
        flops_per_step: int | None,
        progress: Progress,
    ):
        self.began = time.perf_counter()
        self.data, self.settings, self.length = data, settings, length
        self.folder, self.identity = folder, identity
        self.evaluate, self.on_step, self.on_best, self.progress = evaluate, on_step, on_best, progress
        self.what_fits = partial(telling_what_fits, model, data, settings, device)
        with self.what_fits():
            self.training = Training(model, data, settings, device, length.total, length.warmup, flops_per_step)
        self.divisible = not distributed.statistics(model)  # an update can be dropped midway without a trace
        self.start, self.seconds_before = 0, 0.0
        self.losses: list[float] = []  # one for each update
        self.unread: list[Tensor] = []  # losses still on the device; reading them waits for it
        self.history: list[tuple[int, Scores]] = []
        self.saved, self.saved_at = (0, 0), self.began  # updates and scores saved last, and when
        self.window = self.training_seconds = 0.0  # seconds since the last record, and in total
        self.mark = self.began  # time up to which the window has counted
        self.recorded = 0  # step of the last record
        self.note = "compiling first" if settings.compile else ""  # of progress, until there is a record
        self.stop, self.interrupted = Stop(), False

    def begin(self, state: dict[str, Any] | None) -> None:
        """Resume from `state`, or start from scratch, and make the folder ready."""
        folder = self.folder
        if folder is not None and state is not None:
            self.training.load(state["training"])
            self.start, self.seconds_before, self.losses = state["step"], state["seconds"], state["losses"].tolist()
            self.history = [(step, Scores(**scores)) for step, scores in state["history"]]
            self.data.unreadable.update(dict.fromkeys(state.get("unreadable", ())))
            distributed.by_leader(lambda: resuming.cut_metrics(folder, self.start - self._owed(self.start)))
        elif folder is not None:
            distributed.by_leader(lambda: resuming.clear(folder))
            distributed.begin()
        self.recorded, self.saved, self.saved_at = self.start, self._learned, time.perf_counter()

    def go(self) -> None:
        """Make the remaining updates, until the last one or a stop."""
        start, owed = self.start, self._owed(self.start)
        batches = self._batches()
        written_in = self.folder if distributed.leads() else None
        with stop_signals() as self.stop, board(self.settings, written_in, start - owed) as show:
            self.mark = time.perf_counter()
            for step in range(start + (not owed), self.length.total + 1):
                whole = step == start or self._updated(step, batches)
                self.interrupted = self._after_update(step, whole, show)
                if self.interrupted:
                    break
            self._tell(len(self.losses))

    def result(self) -> FitResult:
        """Return what was done so far."""
        best = _best(self.history) if self.history else (None, None)
        images, flops = self.length.images_per_update, self.training.flops_per_step
        seconds = self.training_seconds + self.window
        return FitResult(
            steps=len(self.losses),
            total=self.length.total,
            losses=tuple(self.losses),
            best_step=best[0],
            best_scores=best[1],
            history=tuple(self.history),
            interrupted=self.interrupted,
            flops_per_step=flops,
            macs_per_step=flops // 2,
            images_per_step=images,
            images_per_second=(len(self.losses) - self.start) * images / (seconds or 1.0),
            seconds=self._seconds,
            stopped_by=distributed.largest(self.stop.number or 0) or None,
            judged=self.training.judged,
        )

    @property
    def _learned(self) -> tuple[int, int]:
        """Updates and scores so far."""
        return len(self.losses), len(self.history)

    @property
    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.began

    def _owed(self, step: int) -> bool:
        """Return whether an evaluation after update `step` is due but not made."""
        scored = bool(self.history) and self.history[-1][0] == step
        return self.evaluate is not None and not scored and self.length.evaluates_at(step)

    def _tell(self, done: float) -> None:
        seconds = self.window + time.perf_counter() - self.mark
        learned = (done - self.start) * self.length.images_per_update
        self.progress(done, self.length.total, self.note or rate(learned, seconds))

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of the remaining updates, reporting progress before each.

        Raises:
            _StoppedError: a stop was requested between two batches of an update.
        """
        accumulate = self.settings.grad_accum_steps
        first, end = self.start * accumulate, self.length.total * accumulate
        read = train_batches(self.data, self.settings, first, end, device=self.training.device)
        for number in range(first, end):
            self._tell(number / accumulate)
            if number % accumulate and self.divisible and distributed.anywhere(self.stop.asked)[0]:
                raise _StoppedError
            yield next(read)

    def _updated(self, step: int, batches: Iterator[tuple[Tensor, Tensor]]) -> bool:
        """Make an update; False if a stop was requested between its batches, whose gradients are then dropped."""
        try:
            with self.what_fits(), multiplying(self.settings.tf32):
                self.unread.append(self.training.update(step, batches))
        except _StoppedError:
            self.training.optimizer.zero_grad(set_to_none=True)
            return False
        return True

    def _after_update(self, step: int, whole: bool, show: Callable[[StepRecord], None]) -> bool:
        """Score, record and save what is due after update `step`; return whether to stop there.

        An update that is not `whole` was dropped.
        """
        last, judge = whole and step == self.length.total, whole and self._owed(step)
        report = judge or last or (whole and step % self.settings.log_every == 0)
        due = judge or last or time.perf_counter() - self.saved_at >= self.settings.save_seconds
        due, stopping = distributed.anywhere(due, self.stop.asked)
        if not (report or due or stopping):
            return False
        self._read_losses()
        if stopping and not self.losses:
            raise interruption(distributed.largest(self.stop.number or 0))
        if due or stopping:  # weights that are not finite are never scored, kept or saved
            self.training.refuse_broken(len(self.losses), self._kept_in)
        self.window += time.perf_counter() - self.mark
        scores = None
        if judge:
            if step > self.saved[0]:  # scoring takes long and may be cut short
                self._save()
            scores = self._score()
            stopping = stopping or scores is None
        if report and (scores is not None or not judge):
            self._record(step, scores, show)
            (stopping,) = distributed.anywhere(self.stop.asked)
        if (due or stopping) and self._learned != self.saved:
            self._save()
        self.mark = time.perf_counter()
        return stopping

    def _read_losses(self) -> None:
        """Wait for the device, and fetch the losses since the last call.

        Raises:
            GrowkitError: a loss is not finite.
        """
        if not self.unread:
            return
        means = distributed.summed(torch.stack(self.unread)) / distributed.size()
        for step, loss in enumerate(means.tolist(), start=len(self.losses) + 1):
            if not math.isfinite(loss):
                raise GrowkitError(f"the loss is {loss} at update {step}; {REMEDY}{self._kept_in}")
            self.losses.append(loss)
        self.unread.clear()

    def _score(self) -> Scores | None:
        """Score the model; None if a stop was requested before or meanwhile."""
        assert self.evaluate is not None
        if distributed.anywhere(self.stop.asked)[0]:
            return None
        try:
            with self.stop.raising(distributed.size() == 1):
                return self.evaluate(self.training.judged)
        except KeyboardInterrupt:
            if distributed.size() > 1:
                raise
            return None
        finally:
            self.training.model.train()

    def _record(self, step: int, scores: Scores | None, show: Callable[[StepRecord], None]) -> None:
        if scores is not None:
            self.history.append((step, scores))
            if self.on_best is not None and _best(self.history) == (step, scores):
                self.on_best(self.training.judged, scores)
        record = StepRecord(
            step=step,
            total=self.length.total,
            epoch=step / self.length.updates_per_epoch,
            loss=self.losses[-1],
            lr=self.training.lr,
            images_per_second=(step - self.recorded) * self.length.images_per_update / (self.window or 1.0),
            scores=scores,
        )
        self.training_seconds, self.window, self.recorded = self.training_seconds + self.window, 0.0, step
        self.note = _note(record, self.history)
        if self.folder is not None and distributed.leads():
            resuming.append_metrics(self.folder, asdict(record))
        show(record)
        if self.on_step is not None:
            try:
                self.on_step(record)
            except KeyboardInterrupt:
                self.stop.asked = True

    def _save(self) -> None:
        folder, unreadable = self.folder, distributed.gathered(self.data.unreadable)
        self.data.unreadable.update(dict.fromkeys(unreadable))  # each process found different ones
        if folder is not None:
            state = {
                "identity": self.identity,
                "step": len(self.losses),
                "training": distributed.whole(self.training.state()),
                "losses": torch.tensor(self.losses, dtype=torch.float64),
                "history": [(step, asdict(scores)) for step, scores in self.history],
                "seconds": self._seconds,
                "unreadable": unreadable,
            }
            distributed.by_leader(lambda: resuming.save_state(folder, state))
        self.saved, self.saved_at = self._learned, time.perf_counter()

    @property
    def _kept_in(self) -> str:
        """Say where the last good weights are, as the end of a message."""
        updates, _ = self.saved
        return f"; the state of update {updates} is in {self.folder}" if self.folder and updates else ""


def refuse_settings(data: Data, settings: FitSettings) -> None:
    """Refuse early what `fit` would refuse of these settings.

    Raises:
        GrowkitError: no such optimizer, lengths or rates that do not fit together, a batch that does not divide.
    """
    _refuse_values(settings)
    length_of(data, settings)
    optimizer_of(nn.Linear(1, 1), settings)


def updates_made(folder: Path, data: Data, settings: FitSettings, device: torch.device) -> int:
    """Return how many updates the run in `folder` has made that is to be resumed.

    Raises:
        GrowkitError: no state to resume from, or a state of another run.
    """
    return int(resuming.load_state(folder, _identity(data, settings, device), checked=False)["step"])


def _state_of(folder: Path | None, identity: dict[str, Any]) -> dict[str, Any]:
    if folder is None:
        raise GrowkitError("resuming needs the folder of the run to go on with")
    return resuming.load_state(folder, identity)


class _StoppedError(Exception):
    """A stop was requested between the batches of an update."""


def _refuse_values(settings: FitSettings) -> None:
    if settings.compile == COMPILE_AUTO:
        raise GrowkitError("--compile auto: only grow, finetune and train decide it; name the mode here")
    if settings.min_lr > settings.lr:
        raise GrowkitError(f"--min-lr {settings.min_lr}: expected at most the learning rate, {settings.lr}")
    if settings.lr * settings.weight_decay >= 1:
        raise GrowkitError(
            f"--weight-decay {settings.weight_decay} at a learning rate of {settings.lr} turns the sign of every"
            " weight; expected a product below 1"
        )
    if settings.tensorboard and distributed.leads():
        summary_writer()


def comparable(settings: FitSettings, device: torch.device) -> dict[str, Any]:
    """The settings that decide what comes of a run on `device`, by name."""
    chosen = {name: value for name, value in asdict(settings).items() if name not in FREE_TO_CHANGE}
    chosen["cache"] = "none" if settings.cache == "none" else "ram or device"  # which give the same bits
    chosen["precision"] = precision_on(device, settings.precision)  # auto is another one elsewhere
    return chosen


def _identity(data: Data, settings: FitSettings, device: torch.device) -> dict[str, Any]:
    """What must be the same for a run to be resumed."""
    sizes = {"training images": size_of(data.train), "validation images": size_of(data.val)}
    return {**comparable(settings, device), **sizes, "classes": data.classes, **data.identity}


def refuse_unlike(data: Data, settings: FitSettings, device: torch.device) -> None:
    """Raise GrowkitError on all processes where one of them, such as on another host, was not given the same.

    It would train something else or, where it communicates at other times, wait forever: so ask before what is auto.
    """
    mine = {**_identity(data, settings, device), "shard": settings.shard, "log_every": settings.log_every}
    mine["batch_size"] = "auto" if settings.batch_size == AUTO else settings.batch_size  # as it is typed
    unlike = resuming.differences(distributed.by_leader(lambda: mine), mine)
    if told := distributed.gathered(unlike):
        raise GrowkitError(f"the first process was given {'; '.join(told)}: give all processes the same")


def _best(history: list[tuple[int, Scores]]) -> tuple[int, Scores]:
    """The evaluation with the highest top-1, then the lowest loss, then the earliest."""
    return max(history, key=lambda entry: (entry[1].top1, -entry[1].loss))


def _note(record: StepRecord, history: list[tuple[int, Scores]]) -> str:
    """Return a record's text for the progress bar, with the last score."""
    scored = f" top-1 {history[-1][1].top1:.2%}" if history else ""
    pace = rate(record.images_per_second, 1)  # none if only scored since resumed
    return f"loss {record.loss:.4f}{scored} lr {record.lr:.1e} {pace}".rstrip()
