"""Growing a source into a target, and training its operator, as one function into a run folder."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from growkit.adapt import head_is_new, with_classes, with_input
from growkit.arch import find, find_target
from growkit.arch.spec import Architecture
from growkit.checkpoint import CONFIG, HISTORY, OPERATOR, WEIGHTS, sha256_written, write_model, write_tensors
from growkit.errors import GrowkitError
from growkit.files import whole_folder
from growkit.grow import GrownModel, grow, lossless_gap
from growkit.history import fit_figures, in_short, origin_of, sizes
from growkit.job import Job
from growkit.methods import check, ignored
from growkit.ranges import option_of
from growkit.report.growth import start_in_words
from growkit.settings import OPERATOR_DEFAULTS, GrowSettings
from growkit.source import Source
from growkit.stage import below, goes_on, settled, tell_stale_export, tell_stale_model
from growkit.text import counted
from growkit.train.data import Data, open_data
from growkit.train.device import pick_device
from growkit.train.distributed import by_leader
from growkit.train.loop import FitResult, fit, refuse_settings
from growkit.train.precision import refuse_tf32
from growkit.train.resume import STATE
from growkit.train.score import Scores, score_model
from growkit.train.settings import AUTO, COMPILE_AUTO, FitSettings, recorded

WRITES = (CONFIG, HISTORY, WEIGHTS, OPERATOR)  # in run/grown, which is replaced whole


@dataclass(frozen=True)
class Grown:
    """Result of `grow_model`. With data, `scores` on its validation images: source, step 0, after operator training."""

    folder: Path
    target: Architecture
    gap: float  # largest logit difference from the source before any operator training
    parameters: int
    operator_parameters: int
    operator: FitResult | None
    scores: dict[str, Scores] | None


@dataclass(frozen=True)
class _Learned:
    """What operator training came to: settings that nothing is auto in, scores, and the fit if there is an operator."""

    settings: FitSettings
    scores: dict[str, Scores]
    fitted: FitResult | None

    @property
    def complete(self) -> bool:
        """Whether the scored weights are those that are written."""
        return self.fitted is None or not self.fitted.interrupted


def grow_model(
    job: Job,
    source: Source,
    to: str,
    settings: GrowSettings,
    *,
    sets: Sequence[str] = (),
    data: str | None = None,
    operator: FitSettings | None = None,
) -> Grown:
    """Grow `source` into `to`, train the operator if data is given, and write run/grown.

    Raises:
        GrowkitError: sizes that cannot be grown, unusable data, or run/grown exists and must not be replaced.
    """
    run = job.run
    _refuse_unmeant(job, data, operator)
    find(to)  # another family's arguments would look like typing errors
    source = with_input(source, sets)
    _refuse_mistyped(source, to, sets, settings)
    resumed = goes_on(job, run.grown, None if data is None else run.operator / STATE, writes=WRITES)
    device, opened = pick_device(job.device), None
    training = replace(operator or FitSettings(**OPERATOR_DEFAULTS), seed=settings.seed)
    if data is not None:
        refuse_tf32(training, device)
        opened = open_data(data, source.preprocessing, training, tell=job.tell)
        if training.batch_size != AUTO:  # else after growing, once it is known
            refuse_settings(opened, replace(training, compile=None))
    source = with_classes(source, opened.classes if opened else None, sets, seed=settings.seed)
    target, notes = find_target(source.architecture, to, sets)
    for note in (*source.adapted, *notes, *_remarks(source, target, settings, data, operator)):
        job.say(note)

    grown, models, gap = _grow(job, source, target, settings)
    learned = None
    if opened is None:
        model = models["step0"]
    else:
        asked = {"to": target.name, "set": " ".join(sets) or None, **asdict(settings)}
        growth = {option_of(name): value for name, value in asked.items() if name != "seed"}
        # resuming requires the same operator
        opened = replace(opened, identity={**opened.identity, "source": source.sha256, **growth})
        learned = _train_operator(job, resumed, grown, models, opened, training, device)
        model = grown.materialize()
    result = Grown(
        folder=run.grown,
        target=target,
        gap=gap,
        parameters=sum(p.numel() for p in model.parameters()),
        operator_parameters=sum(p.numel() for p in grown.method.parameters()),
        operator=learned.fitted if learned else None,
        scores=learned.scores if learned else None,
    )
    options = {
        "source": source.path,
        "to": to,
        "set": list(sets),
        "data": data,
        **asdict(settings),
        "operator": recorded(learned.settings) if learned else None,
    }
    unreadable = list(opened.unreadable) if opened else []
    by_leader(lambda: _write(job, result, grown, model, source, learned, options, unreadable))
    tell_stale_model(job)
    tell_stale_export(job, run.grown)
    return result


def _refuse_unmeant(job: Job, data: str | None, operator: FitSettings | None) -> None:
    if job.resume and data is None:
        raise GrowkitError("--resume goes on with operator training; give the --data it was trained on")
    if data is not None and operator is not None and operator.shard:
        raise GrowkitError(
            "--shard: every process holds the whole target to run it, and the operator itself is small, so sharding"
            " saves nothing here; leave it out"
        )


def _refuse_mistyped(source: Source, to: str, sets: Sequence[str], settings: GrowSettings) -> None:
    """Raise GrowkitError for options that cannot work, before complaining about what is in the run folder."""
    adapted = with_classes(source, None, sets, seed=settings.seed)
    check(adapted.architecture, find_target(adapted.architecture, to, sets)[0], settings)


def _remarks(
    source: Source, target: Architecture, settings: GrowSettings, data: str | None, operator: FitSettings | None
) -> list[str]:
    """What the user should know of these options."""
    remarks = [f"warning: {option} means nothing to {settings.method}" for option in ignored(settings)]
    if target.spaces == source.architecture.spaces:
        remarks.append("target has the source's sizes, so nothing grows; choose others by --to or --set")
    if data is not None and not source.own_head:
        remarks.insert(0, head_is_new(source, data))
    if data is None and operator not in (None, FitSettings(**OPERATOR_DEFAULTS)):
        remarks.append("warning: options of operator training mean nothing without --data")
    return remarks


def _grow(
    job: Job, source: Source, target: Architecture, settings: GrowSettings
) -> tuple[GrownModel, dict[str, nn.Module], float]:
    """Return the grown model, source and target as plain models, and the largest difference between their logits."""
    small, progress = source.model(), job.tell("growing")
    progress(0, 3, "making the method")
    grown = grow(source.architecture, target, source.state, settings)
    progress(1, 3, "making the weights")
    model = grown.materialize()
    progress(2, 3, "comparing with the source")
    gap = lossless_gap(small, model, seed=settings.seed)
    progress(3, 3)
    job.say(start_in_words(gap, grown.method.lossless, f"{gap:.1e}"))
    return grown, {"source": small, "step0": model}, gap


def _train_operator(
    job: Job,
    resumed: bool,
    grown: GrownModel,
    models: dict[str, nn.Module],
    opened: Data,
    operator: FitSettings,
    device: torch.device,
) -> _Learned:
    """Train the method's parameters on the data.

    Scores are of `models`, the source and the grown model, which are freed, and of the trained model if training
    finished.
    """
    folder, learns = job.run.operator, any(p.requires_grad for p in grown.parameters())
    if learns:
        operator = settled(job, grown, opened, operator, device, folder if resumed else None)
    else:  # nothing is trained that could be tried
        number = FitSettings.batch_size if operator.batch_size == AUTO else operator.batch_size
        mode = None if operator.compile == COMPILE_AUTO else operator.compile
        operator = replace(operator, batch_size=number, compile=mode)
        refuse_settings(opened, operator)

    def score(model: nn.Module, what: str) -> Scores:
        return score_model(model, opened, operator, device, progress=job.tell(f"scoring the {what}"))

    scores = {name: score(models.pop(name), what) for name, what in (("source", "source"), ("step0", "grown model"))}
    for name, found in scores.items():
        job.say(f"{name} on the validation images: top-1 {found.top1:.2%}, loss {found.loss:.4f}")
    if not learns:
        rule = grown.method.settings.method
        job.say(f"{rule} is a fixed rule with nothing to train; `growkit finetune` trains what it gave")
        return _Learned(operator, scores, None)
    fitted = fit(
        grown,
        opened,
        operator,
        device=device,
        folder=folder,
        resume=resumed,
        progress=job.tell("training the operator"),
    )
    for line in opened.remarks(job.run.record):
        job.say(line)
    told = f"operator trained for {counted(fitted.steps, 'update')}"
    if fitted.interrupted:
        job.say(f"{told}: loss of batches {fitted.losses[0]:.4f} -> {fitted.losses[-1]:.4f}")
        return _Learned(operator, scores, fitted)
    before, after = scores["step0"], score(grown.materialize(), "grown model")
    scores["operator"] = after
    job.say(
        f"{told}: on the validation images top-1 {before.top1:.2%} -> {after.top1:.2%}, "
        f"loss {before.loss:.4f} -> {after.loss:.4f}"
    )
    if after.top1 < before.top1:
        remedy = "try a lower --lr, or grow with --force and no --data"
        job.say(below("training the operator did harm", before, after, remedy))
    return _Learned(operator, scores, fitted)


def _write(
    job: Job,
    result: Grown,
    grown: GrownModel,
    model: nn.Module,
    source: Source,
    learned: _Learned | None,
    options: dict[str, Any],
    unreadable: list[str],
) -> None:
    """Write run/grown and the step in the run's record."""
    operator = fit_figures(learned.fitted, learned.settings) if learned and learned.fitted else None
    history = {
        "stage": "grown",
        **origin_of(source),
        "to": result.target.name,
        "sizes": {"source": sizes(source.architecture), "target": sizes(result.target)},
        "settings": asdict(grown.method.settings),
        "step0_gap": result.gap,
        "lossless": grown.method.lossless,
        "operator": operator,
    }
    with whole_folder(result.folder) as folder:
        write_model(folder, model, preprocessing=source.preprocessing, labels=source.labels, history=history)
        if result.operator_parameters:
            write_tensors(folder / OPERATOR, grown.method.state_dict())
    shown = learned.scores if learned and learned.complete else {}
    job.run.add(
        "grow",
        options=options,
        figures={
            "step0_gap": result.gap,
            "parameters": result.parameters,
            "operator_parameters": result.operator_parameters,
            "operator": in_short(operator) if operator else None,
            "scores": {name: asdict(found) for name, found in shown.items()} or None,
            "adapted": list(source.adapted),
            "unreadable": unreadable,
        },
        hashes={"source": source.sha256, "grown": sha256_written(result.folder)},
    )
