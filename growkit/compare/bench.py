"""What every arm of a comparison shares, and one run of an arm: start, train, score."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from growkit.adapt import head_is_new, with_classes, with_input
from growkit.arch import build, find, find_target
from growkit.arch.spec import Architecture
from growkit.checkpoint import WEIGHTS, write_tensors
from growkit.compare.arms import LONGER, Arm
from growkit.compare.costs import Costs
from growkit.compare.settings import CompareSettings, SweepSettings
from growkit.errors import DamagedStateError, GrowkitError, UnwritableError, first_line
from growkit.files import read_json, whole_file, write_json
from growkit.grow import grow
from growkit.job import Job
from growkit.pictures import UnreadablePictureError
from growkit.settings import OPERATOR_DEFAULTS, GrowSettings
from growkit.source import Source, untrained
from growkit.train.data import Data, hold_out, open_data, size_of
from growkit.train.device import pick_device
from growkit.train.loop import FitResult, fit, refuse_settings
from growkit.train.precision import refuse_tf32
from growkit.train.progress import Progress, no_progress
from growkit.train.resume import STATE
from growkit.train.score import Scores, read_through, score_model
from growkit.train.settings import FitSettings
from growkit.train.watch import StepRecord, interruption
from growkit.unmeant import unmeant_in_training

UNREADABLE = "unreadable.json"  # lines about unreadable training images, kept for resuming
START = "start.json"  # scores of a start, and what its operator took
Watch = Callable[[StepRecord], None]


class RunFailedError(Exception):
    """One run failed, for the reason in the message; other runs may succeed."""


@contextmanager
def failing() -> Iterator[None]:
    """Turn errors inside into RunFailedError, except those that every other run would hit too."""
    try:
        yield
    except (UnreadablePictureError, UnwritableError):
        raise
    except (GrowkitError, RuntimeError, MemoryError) as error:  # torch's own are RuntimeErrors
        raise RunFailedError(first_line(error)) from error


@dataclass(frozen=True)
class Start:
    """A model before its main training. Scores are on held-out images; operator figures only if one was trained."""

    model: nn.Module
    step0: Scores | None  # None for training from scratch
    after_operator: Scores | None
    flops: int  # of operator training
    seconds: float


@dataclass(frozen=True)
class Bench:
    """Source, target, images and recipe that all arms share.

    data       training images, with the held-out images used for selection as validation images
    test       the images scored once, as validation images
    share      of the training images that data has; more than was asked for where a class has few
    recipe     how the full budget is spent from scratch
    operator   how operators are trained
    costs      what arms cost
    job        is told of progress and of what is made anew
    """

    source: Source
    target: Architecture
    data: Data
    test: Data
    share: float
    recipe: FitSettings
    operator: FitSettings
    costs: Costs
    device: torch.device
    folder: Path
    job: Job

    def refuse_settings(self, rates: Iterable[float], operator_rates: Iterable[float]) -> None:
        """Raise GrowkitError if the recipe is unusable at one of `rates`, or the operator's at `operator_rates`."""
        for settings, tried in ((self.recipe, rates), (self.operator, operator_rates)):
            refuse_tf32(settings, self.device)
            for lr in tried:
                refuse_settings(self.data, replace(settings, lr=lr))

    def read_through(self, *, test: bool) -> None:
        """Read every held-out image once, and with `test` every test image.

        Raises:
            GrowkitError: an image cannot be read; the message names it.
        """
        for part in (self.data, self.test) if test else (self.data,):
            read_through(part, self.recipe, self.device, progress=self.job.tell("reading the validation images"))

    def start(self, arm: Arm, seed: int, operator_lr: float | None, progress: Progress = no_progress) -> Start:
        """Make the arm's model before its main training; starts kept in the folder, trained operators too, are reused.

        Raises:
            GrowkitError: the method cannot grow this pair, or its operator's loss is not finite.
            KeyboardInterrupt: operator training was stopped; the next call resumes it.
        """
        if arm.name == LONGER:
            return Start(self.source.model(), self.source_score(), None, 0, 0.0)
        if arm.grow is None:
            model = self.fresh(arm)
            model.load_state_dict(untrained(self.target, seed=seed))
            return Start(model, None, None, 0, 0.0)
        rate = "" if operator_lr is None else f"-lr{operator_lr!r}"
        folder = self.folder / "starts" / f"{arm.slug}-s{seed}{rate}"
        figures = folder / START
        kept = self.kept(arm, folder) if figures.exists() else None  # a kill may have left only one of them
        model = kept or self._grown(arm, replace(arm.grow, seed=seed), operator_lr, folder, progress)
        (folder / STATE).unlink(missing_ok=True)  # not before its scores are kept
        found = read_json(figures)
        after = Scores(**found["operator"]) if "operator" in found else None
        return Start(model, Scores(**found["step0"]), after, found["flops"], found["seconds"])

    def _grown(
        self, arm: Arm, settings: GrowSettings, operator_lr: float | None, folder: Path, progress: Progress
    ) -> nn.Module:
        """Grow the target and train its operator, if it has a rate; write the weights so trained and all figures."""
        source = self.source.architecture
        state = untrained(source, seed=settings.seed) if arm.fresh_source else self.source.state
        grown = grow(source, self.target, state, settings)
        model = grown.materialize()
        if operator_lr is None and (folder / START).exists():
            return model
        found: dict[str, Any] = {"step0": asdict(self.score(model)), "flops": 0, "seconds": 0.0}
        if operator_lr is not None:
            steps = self.costs.operator_steps(arm)
            recipe = replace(self.operator, steps=steps, lr=operator_lr, seed=settings.seed)
            price = self.costs.operator_flops_per_step(arm)
            fitted = self._fit(grown, recipe, price, folder, None, progress)
            model = grown.materialize()
            with whole_file(folder / WEIGHTS) as partial:
                write_tensors(partial, model.cpu().state_dict())
            found |= {
                "flops": fitted.flops_per_step * fitted.steps,
                "seconds": fitted.seconds,
                "operator": asdict(self.score(model)),
                "losses": [round(loss, 6) for loss in fitted.losses],
            }
        write_json(folder / START, found)
        return model

    def _fit(
        self,
        model: nn.Module,
        recipe: FitSettings,
        flops_per_step: int,
        folder: Path | None,
        evaluate: Callable[[nn.Module], Scores] | None,
        progress: Progress,
        watch: Watch | None = None,
    ) -> FitResult:
        """Call fit(), resuming where it was stopped; its state stays in `folder`."""
        known, resume = len(self.data.unreadable), folder is not None and (folder / STATE).exists()
        fit_it = partial(
            fit,
            model,
            self.data,
            recipe,
            device=self.device,
            evaluate=evaluate,
            folder=folder,
            on_step=watch,
            flops_per_step=flops_per_step,
            progress=progress,
        )
        try:
            fitted = fit_it(resume=resume)
        except DamagedStateError:  # the run did not fail: made anew, it ends the same
            assert folder is not None
            self.job.say(f"{folder / STATE}: damaged; trained anew")
            fitted = fit_it(resume=False)
        finally:
            if len(self.data.unreadable) > known:
                write_json(self.folder / UNREADABLE, list(self.data.unreadable))
        if fitted.interrupted:
            raise interruption(fitted.stopped_by)
        return fitted

    def kept(self, arm: Arm, folder: Path) -> nn.Module | None:
        """The arm's model with the weights kept in `folder`; None without them, with a line if they are damaged."""
        weights = folder / WEIGHTS
        if not weights.exists():
            return None
        model = self.fresh(arm)
        try:
            model.load_state_dict(load_file(weights))
        except SafetensorError:
            self.job.say(f"{weights}: damaged; trained anew")
            return None
        return model

    def let_starts_go(self) -> None:
        """Remove the weights of starts, once every run from them is done; a later run recomputes them."""
        for weights in (self.folder / "starts").glob(f"*/{WEIGHTS}"):
            weights.unlink()

    def score(self, model: nn.Module, *, test: bool = False) -> Scores:
        """Score a model on the held-out images, or on the test images."""
        progress = self.job.tell(f"scoring the {'test' if test else 'held-out'} images")
        return score_model(model, self.test if test else self.data, self.recipe, self.device, progress=progress)

    def source_score(self) -> Scores:
        """Scores of the source on the held-out images, computed once per comparison."""
        path = self.folder / "source.json"
        if not path.exists():
            write_json(path, asdict(self.score(self.source.model())))
        return Scores(**read_json(path))

    def fresh(self, arm: Arm) -> nn.Module:
        """Build the network that the arm trains, with weights yet to be loaded."""
        trained = self.costs.trained(arm)
        return build(trained.name, trained.arguments)

    def train(
        self,
        start: Start,
        arm: Arm,
        *,
        flops: float,
        seed: int,
        lr: float,
        evals: int,
        folder: Path | None = None,
        progress: Progress = no_progress,
        watch: Watch | None = None,
    ) -> dict[str, Any]:
        """Train the start for what is left of `flops`, with a schedule that ends there; return the results as JSON.

        The model of `start` is trained in place; with a moving average it ends with the averaged weights, which are
        the ones scored. The curve holds (FLOPs, top-1, loss) on held-out images.

        Raises:
            GrowkitError: nothing is left to spend, or the loss is not finite.
            KeyboardInterrupt: stopped, with the state saved in `folder`; the next call resumes from it.
        """
        steps = self.costs.steps_within(arm, flops, start.flops)
        full, warmup = self.costs.full, self.recipe.warmup_epochs
        every = -(-steps // evals) / full.updates_per_epoch
        if warmup is not None:  # the same share of every run, however short
            warmup *= steps / full.total
        recipe = replace(self.recipe, steps=steps, lr=lr, seed=seed, eval_every=every, warmup_epochs=warmup)
        price = self.costs.flops_per_step(arm)
        fitted = self._fit(start.model, recipe, price, folder, self.score, progress, watch)
        if folder is not None:
            (folder / STATE).unlink(missing_ok=True)
        if fitted.judged is not start.model:
            start.model.load_state_dict(fitted.judged.state_dict())
        first = start.after_operator or start.step0
        curve = [] if start.step0 is None else [(0, start.step0)]
        if start.after_operator is not None:
            curve.append((start.flops, start.after_operator))
        curve += [(start.flops + step * fitted.flops_per_step, scores) for step, scores in fitted.history]
        return {
            "steps": fitted.steps,
            "flops": start.flops + fitted.steps * fitted.flops_per_step,
            "operator_flops": start.flops,
            "flops_per_step": fitted.flops_per_step,
            "macs_per_step": fitted.macs_per_step,
            "step0": asdict(start.step0) if start.step0 else None,
            "started_from": asdict(first) if first else None,
            "final": asdict(fitted.history[-1][1]),
            "curve": [[at, scores.top1, scores.loss] for at, scores in curve],
            "training_losses": [round(loss, 5) for loss in fitted.losses[:: max(1, len(fitted.losses) // 200)]],
            "seconds": fitted.seconds,
            "operator_seconds": start.seconds,
            "images_per_second": fitted.images_per_second,
        }


def bench_of(
    job: Job,
    folder: Path,
    source: Source,
    to: str,
    data: str,
    recipe: FitSettings,
    *,
    split: CompareSettings | SweepSettings,
    operator_steps: int = OPERATOR_DEFAULTS["steps"],
    sets: Sequence[str] = (),
) -> Bench:
    """Build what all arms share: the source adapted to `sets` and the data, the target, and the split images."""
    find(to)  # another family's arguments would look like typing errors
    device, adapted = pick_device(job.device), with_input(source, sets)
    opened = open_data(data, adapted.preprocessing, recipe, tell=job.tell)
    adapted = with_classes(adapted, opened.classes, sets, seed=recipe.seed)
    target, notes = find_target(adapted.architecture, to, sets)
    for note in (*adapted.adapted, *notes):
        job.say(note)
    if not adapted.own_head:
        job.say(head_is_new(source, data))
    for line in unmeant_in_training(recipe):
        job.say(line)
    chosen, tested = hold_out(opened, share=split.hold_out, keep=split.share, seed=recipe.seed)
    kept, whole = size_of(chosen.train), size_of(opened.train)
    if split.share < 1:
        job.say(f"trains on {kept:,} of {whole:,} images")
    own = {**OPERATOR_DEFAULTS, "steps": operator_steps, "warmup_epochs": None, "model_ema": False}
    operator = replace(recipe, **own)
    costs = Costs(adapted, target, chosen, recipe, operator)
    return Bench(adapted, target, chosen, tested, kept / whole, recipe, operator, costs, device, folder, job)
