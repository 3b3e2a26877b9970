"""Growing, training and fine-tuning, one function each: from a source to files and figures in a run folder."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import nn

from growkit.adapt import head_is_new, unread_pixels, with_classes, with_input
from growkit.arch import find_target
from growkit.arch.spec import Architecture
from growkit.checkpoint import HISTORY, OPERATOR, WEIGHTS, replace_model, write_model, write_tensors
from growkit.errors import GrowkitError
from growkit.files import read_json, refuse_existing, sha256_of, whole_folder, without_folders, write_json
from growkit.grow import GrownModel, grow, lossless_gap
from growkit.history import fit_figures, in_short, origin_of, served_settings, sizes
from growkit.job import Job
from growkit.methods import check, ignored
from growkit.report.growth import start_in_words
from growkit.settings import OPERATOR_DEFAULTS, GrowSettings
from growkit.source import Source, fresh, named
from growkit.text import counted
from growkit.train.batch_size import STEP, with_batch_size
from growkit.train.compiling import with_compile
from growkit.train.data import Data, open_data, size_of
from growkit.train.device import pick_device
from growkit.train.distributed import by_leader, leads, restarted, sharded, size, whole
from growkit.train.loop import FitResult, fit, refuse_unusable
from growkit.train.precision import refuse_tf32
from growkit.train.progress import Say
from growkit.train.resume import METRICS, STATE, begun_with
from growkit.train.score import Scores, read_through, score_model, worse
from growkit.train.settings import AUTO, COMPILE_AUTO, FitSettings

OPERATOR_RUN = "operator"  # inside a run: the state to resume operator training
LAST = "last"  # inside a trained folder: the state to resume, and the last weights, beside the best
START = "start.json"  # in there: the scores before fine-tuning


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
class Trained:
    """Result of `train_model` and `finetune_model`."""

    folder: Path
    fitted: FitResult
    scores_at_start: Scores | None


def _tell_stale_export(job: Job, folder: Path) -> None:
    """Warn if `folder` is the model that would be exported now and the run's ONNX file has other weights."""
    run = job.run
    if not leads() or not run.onnx_file.exists() or run.furthest() != folder:
        return
    if run.exported_weights() != sha256_of(folder / WEIGHTS):
        job.say(f"warning: {run.onnx} was made of an earlier model; `growkit export --force` makes it anew")


def _goes_on(job: Job, output: Path, state: Path | None) -> bool:
    """Whether to resume from `state`: on request, or because torchrun restarted this job after a failure.

    A run that ended before it saved anything starts anew.

    Raises:
        GrowkitError: the run cannot be written, or `output` or `state` exists and is neither replaced nor resumed.
    """
    anew = restarted()

    def look() -> bool:
        job.run.refuse_unusable()
        if not (job.resume or anew):
            resumable = state is not None and state.exists()
            if not _only_begun(output):
                refuse_existing(output, job.force, WEIGHTS, LAST, resumable=resumable)
            if state is not None and resumable:
                refuse_existing(state.parent, job.force, STATE, resumable=True)
        if state is None:
            return False
        if job.resume and not state.exists() and not (output / WEIGHTS).exists():
            begun = state.parent.is_dir() or output.is_dir()
            job.say(
                "nothing was saved before it ended: it begins anew" if begun else "nothing to resume: it begins now"
            )
            return False
        return job.resume or (anew and state.exists())

    return by_leader(look)


def _only_begun(output: Path) -> bool:
    """Whether this folder is from a run killed before it saved anything, so that nothing in it can be lost."""
    return output.is_dir() and {path.name for path in output.rglob("*")} <= {LAST, METRICS, START}


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
    run, say = job.run, job.say
    if job.resume and data is None:
        raise GrowkitError("--resume goes on with operator training; give the --data it was trained on")
    if data is not None and operator is not None and operator.shard:
        raise GrowkitError(
            "--shard: every process holds the whole target to run it, and the operator itself is small, so sharding"
            " saves nothing here; leave it out"
        )
    source, opened = with_input(source, sets), None
    _refuse_mistyped(source, to, sets, settings)
    goes_on = _goes_on(job, run.grown, None if data is None else run.path / OPERATOR_RUN / STATE)
    chosen = pick_device(job.device)
    if data is not None:
        operator = replace(operator or FitSettings(**OPERATOR_DEFAULTS), seed=settings.seed)
        opened = open_data(data, source.preprocessing, operator, tell=job.tell)
    source = with_classes(source, opened.classes if opened else None, sets, seed=settings.seed)
    target, notes = find_target(source.architecture, to, sets)
    for note in (*source.adapted, *notes):
        say(note)
    if data is not None and not source.own_head:
        say(head_is_new(source, data))
    for option in ignored(settings):
        say(f"warning: {option} means nothing to {settings.method}")
    if data is None and operator not in (None, FitSettings(**OPERATOR_DEFAULTS)):
        say("warning: options of operator training mean nothing without --data")
    if opened is not None:  # resuming requires the same operator
        growth = {"source": source.sha256, "to": target.name, "set": list(sets), **asdict(settings)}
        opened = replace(opened, identity={**opened.identity, **growth})
    small, progress = source.model(), job.tell("growing")
    progress(0, 3, "making the method")
    grown = grow(source.architecture, target, source.state, settings)
    progress(1, 3, "making the weights")
    model = grown.materialize()
    progress(2, 3, "comparing with the source")
    gap = lossless_gap(small, model, seed=settings.seed)
    progress(3, 3)
    say(start_in_words(gap, grown.method.lossless, f"{gap:.1e}"))

    fitted = scores = None
    if opened is not None and operator is not None:
        models = {"source": small, "step0": model}
        del small, model
        fitted, operator, scores = _train_operator(job, goes_on, grown, models, opened, operator, chosen)
        model = grown.materialize()
    complete = fitted is None or not fitted.interrupted
    history = {
        "stage": "grown",
        **origin_of(source),
        "to": target.name,
        "sizes": {"source": sizes(source.architecture), "target": sizes(target)},
        "settings": asdict(settings),
        "step0_gap": gap,
        "lossless": grown.method.lossless,
        "operator": fit_figures(fitted, operator),
    }
    operator_parameters = sum(p.numel() for p in grown.method.parameters())
    result = Grown(
        folder=run.grown,
        target=target,
        gap=gap,
        parameters=sum(p.numel() for p in model.parameters()),
        operator_parameters=operator_parameters,
        operator=fitted,
        scores=scores,
    )

    def write() -> None:
        with whole_folder(run.grown) as folder:
            _write(folder, model, source, history)
            if operator_parameters:
                write_tensors(folder / OPERATOR, grown.method.state_dict())
        run.add(
            "grow",
            options={
                "source": source.path,
                "to": to,
                "set": list(sets),
                "data": data,
                **asdict(settings),
                "operator": asdict(operator) if operator is not None and data is not None else None,
            },
            figures={
                "step0_gap": gap,
                "parameters": result.parameters,
                "operator_parameters": operator_parameters,
                "operator": in_short(history["operator"]),
                # None while operator training is unfinished: the scored weights are not the written ones
                "scores": {name: asdict(found) for name, found in scores.items()} if scores and complete else None,
                "adapted": list(source.adapted),
                "unreadable": list(opened.unreadable) if opened is not None else [],
            },
            hashes={"source": source.sha256, "grown": sha256_of(run.grown / WEIGHTS)},
        )

    by_leader(write)
    if (run.finetuned / WEIGHTS).exists():
        say(f"warning: {run.finetuned} was made of an earlier grown model; `growkit finetune --force` makes it anew")
    _tell_stale_export(job, run.grown)
    return result


def _refuse_mistyped(source: Source, to: str, sets: Sequence[str], settings: GrowSettings) -> None:
    """Raise GrowkitError for options that cannot work, before complaining about what is in the run folder."""
    adapted = with_classes(source, None, sets, seed=settings.seed)
    check(adapted.architecture, find_target(adapted.architecture, to, sets)[0], settings)


def _train_operator(
    job: Job,
    goes_on: bool,
    grown: GrownModel,
    models: dict[str, nn.Module],
    opened: Data,
    operator: FitSettings,
    device: torch.device,
) -> tuple[FitResult | None, FitSettings, dict[str, Scores]]:
    """Train the method's parameters on the data; return the fit, the settings used, and scores.

    Scores are of `models`, the source and the grown model, which are freed, and of the trained model if training
    finished.
    """
    folder, learns = job.run.path / OPERATOR_RUN, any(p.requires_grad for p in grown.parameters())
    if learns:
        operator = _settled(job, grown, opened, operator, device, folder if goes_on else None)
    else:  # nothing is trained that could be tried
        size = FitSettings.batch_size if operator.batch_size == AUTO else operator.batch_size
        operator = replace(operator, batch_size=size, compile=None)
    if made := refuse_unusable(opened, operator, device, resumed=folder if learns and goes_on else None):
        job.say(f"goes on after update {made}")

    def score(model: nn.Module, what: str) -> Scores:
        return score_model(model, opened, operator, device, progress=job.tell(f"scoring the {what}"))

    scores = {name: score(models.pop(name), what) for name, what in (("source", "source"), ("step0", "grown model"))}
    for name, found in scores.items():
        job.say(f"{name} on the validation images: top-1 {found.top1:.2%}, loss {found.loss:.4f}")
    if not learns:
        rule = grown.method.settings.method
        job.say(f"{rule} is a fixed rule with nothing to train; `growkit finetune` trains what it gave")
        return None, operator, scores
    fitted = fit(
        grown,
        opened,
        operator,
        device=device,
        folder=folder,
        resume=goes_on,
        progress=job.tell("training the operator"),
    )
    for line in opened.remarks(job.run.record):
        job.say(line)
    told = f"operator trained for {counted(fitted.steps, 'update')}"
    if fitted.interrupted:
        job.say(f"{told}: loss of batches {fitted.losses[0]:.4f} -> {fitted.losses[-1]:.4f}")
        return fitted, operator, scores
    before, after = scores["step0"], score(grown.materialize(), "grown model")
    scores["operator"] = after
    job.say(
        f"{told}: on the validation images top-1 {before.top1:.2%} -> {after.top1:.2%}, "
        f"loss {before.loss:.4f} -> {after.loss:.4f}"
    )
    if after.top1 < before.top1:
        remedy = "try a lower --lr, or grow with --force and no --data"
        job.say(_below("training the operator did harm", before, after, remedy))
    return fitted, operator, scores


def _below(harm: str, before: Scores, after: Scores, remedy: str) -> str:
    """The line about a drop in top-1: `harm` and the remedy if chance does not explain it."""
    if worse(before, after):
        return f"warning: {harm}: {remedy}"
    fell = f"top-1 fell from {before.top1:.2%} to {after.top1:.2%} on {counted(after.count, 'image')}"
    return f"note: {fell}, which may be chance; `growkit evaluate --against` tells image by image"


def train_model(
    job: Job,
    name: str,
    data: str,
    settings: FitSettings,
    *,
    sets: Sequence[str] = (),
) -> Trained:
    """Train timm's `name` from scratch and write run/trained: a source for experiments, or the baseline."""
    drafted, preprocessing = named(name, sets)  # its preprocessing, before the data gives the number of classes
    opened = open_data(data, preprocessing, settings, tell=job.tell)
    labels = opened.classes or [str(index) for index in range(drafted.classes)]
    source = with_classes(fresh(name, sets, labels, seed=settings.seed), labels, sets, seed=settings.seed)
    return _fit_into(job, job.run.trained, source, data, opened, settings, command="train")


def finetune_model(
    job: Job,
    source: Source,
    data: str,
    settings: FitSettings,
) -> Trained:
    """Fine-tune a model and write run/finetuned: the best weights by validation, and last/ to resume from."""
    opened = open_data(data, source.preprocessing, settings, tell=job.tell)
    adapted = with_classes(source, opened.classes, seed=settings.seed)
    for note in adapted.adapted:
        job.say(note)
    operator = (source.history or {}).get("operator")
    if isinstance(operator, dict) and operator.get("interrupted") is True:
        job.say(f"warning: training the operator of {source.path} was stopped; `growkit grow --resume` goes on with it")
    return _fit_into(job, job.run.finetuned, adapted, data, opened, settings, command="finetune")


def _fit_into(
    job: Job, folder: Path, source: Source, data: str, opened: Data, settings: FitSettings, *, command: str
) -> Trained:
    """Train `source` on the data into `folder`."""
    goes_on, say, tell = _goes_on(job, folder, folder / LAST / STATE), job.say, job.tell
    model_of = {"source": source.sha256, "model": source.architecture.name, **source.architecture.arguments}
    opened = replace(opened, identity={**opened.identity, **model_of})
    chosen = pick_device(job.device)
    model = source.model()
    if command == "train" and (unread := unread_pixels(model)):
        say(unread)
    settings = _settled(job, model, opened, settings, chosen, folder / LAST if goes_on else None)
    made = refuse_unusable(opened, settings, chosen, resumed=folder / LAST if goes_on else None)
    start: Scores | None = None
    scored = folder / LAST / START
    if goes_on:
        start = _kept_scores(scored)
        say(f"goes on after update {made}")
    elif command == "train":
        read_through(opened, settings, chosen, progress=tell("reading the validation images"))

    def score_start(judged: nn.Module) -> None:
        nonlocal start
        start = score_model(judged, opened, settings, chosen, progress=tell("scoring the start"))
        say(f"starts at top-1 {start.top1:.2%}, loss {start.loss:.4f} on the validation images")
        figures = asdict(start)
        by_leader(lambda: write_json(scored, figures))

    history = {"stage": folder.name, **origin_of(source), "settings": served_settings(settings)}
    model.train()

    def plain(trained: nn.Module) -> nn.Module:
        """Return `trained`, gathered in the leading process if it is sharded; a collective call."""
        if not sharded(trained):
            return trained
        state = whole(trained.state_dict())
        together = source.model()
        if leads():
            together.load_state_dict(state)
        return together

    def keep(best: nn.Module, scores: Scores) -> None:
        kept = plain(best)
        by_leader(lambda: _replace(folder, kept, source, {**history, "scores": asdict(scores)}))

    scoring, training = "scoring the validation images", f"training {source.path}"
    fitted = fit(
        model,
        opened,
        settings,
        device=chosen,
        evaluate=lambda judged: score_model(judged, opened, settings, chosen, progress=tell(scoring)),
        folder=folder / LAST,
        resume=goes_on,
        on_start=score_start if command == "finetune" else None,
        on_best=keep,
        progress=tell("fine-tuning" if command == "finetune" else training),
    )
    for line in opened.remarks(job.run.record):
        say(line)
    best = fitted.best_scores
    if best is not None:
        say(f"best at update {fitted.best_step}: top-1 {best.top1:.2%}, top-5 {best.top5:.2%}, loss {best.loss:.4f}")
        if start is not None and best.top1 < start.top1 and not fitted.interrupted:
            remedy = "try a lower --lr or more --epochs, or go on with the model it started from"
            say(_below(f"that is below the start, {start.top1:.2%}", start, best, remedy))
    final = {**history, "fit": fit_figures(fitted, settings, start)}

    last = plain(model)
    kept = last if fitted.best_scores or fitted.judged is model else plain(fitted.judged)

    def write() -> None:
        _replace(folder / LAST, last, source, final)
        if fitted.best_scores is None:
            _replace(folder, kept, source, final)
        else:
            write_json(folder / HISTORY, {**read_json(folder / HISTORY), "fit": without_folders(final["fit"])})
        job.run.add(
            command,
            options={"model": source.path, "data": data, **asdict(settings)},
            figures={
                **(in_short(final["fit"]) or {}),
                "adapted": list(source.adapted),
                "unreadable": list(opened.unreadable),
            },
            hashes={"source": source.sha256, folder.name: sha256_of(folder / WEIGHTS)},
        )

    by_leader(write)
    _tell_stale_export(job, folder)
    return Trained(folder, fitted, start)


def _kept_scores(path: Path) -> Scores | None:
    """Read the starting scores of a resumed run; None if they are lost, since they are only reported."""
    try:
        kept = Scores(**read_json(path))
    except (GrowkitError, TypeError):
        return None
    return kept if all(isinstance(value, int | float) for value in asdict(kept).values()) else None


def _settled(
    job: Job, model: nn.Module, opened: Data, settings: FitSettings, device: torch.device, resumed: Path | None
) -> FitSettings:
    """Settle what is auto: tried once per run, and then read from the state in `resumed`.

    Raises:
        GrowkitError: not even one image fits in memory, or the device does not support the settings.
    """
    refuse_tf32(settings, device)
    if resumed is not None and settings.compile == COMPILE_AUTO:
        settings = replace(settings, compile=begun_with(resumed, "compile", str, NoneType))
        job.say(f"--compile auto: {'compiled' if settings.compile else 'not compiled'}, as the run was started")
    if resumed is not None and settings.batch_size == AUTO:
        settings = replace(settings, batch_size=begun_with(resumed, "batch_size", int))
        job.say(f"--batch-size {settings.batch_size} is what the run was started with")
    sized = _sized(model, opened, settings, device, job.say)
    refuse_unusable(opened, replace(sized, compile=None), device)  # before what takes a minute
    return with_compile(model, opened, sized, device, job.say, job.tell)


def _sized(model: nn.Module, opened: Data, settings: FitSettings, device: torch.device, say: Say) -> FitSettings:
    """Settle the batch size.

    Raises:
        GrowkitError: not even one image fits in memory.
    """
    sized = with_batch_size(model, opened, settings, device)
    images = size_of(opened.train)
    if settings.batch_size > images:
        say(f"--batch-size {settings.batch_size}: there are {images} training images, and a batch takes them all")
    if sized is not settings:
        where = str(device) if size() == 1 else f"{size()} processes"
        takes_all = sized.batch_size > images - STEP * size()  # the size found is rounded down
        found = f"takes nearly all {images:,} training images" if takes_all else f"is the largest that fits {where}"
        say(f"--batch-size {sized.batch_size} {found}; --lr {settings.lr:g} is not scaled")
    return sized


def _write(folder: Path, model: nn.Module, source: Source, history: dict[str, Any]) -> None:
    write_model(folder, model, preprocessing=source.preprocessing, labels=source.labels, history=history)


def _replace(folder: Path, model: nn.Module, source: Source, history: dict[str, Any]) -> None:
    replace_model(folder, model, preprocessing=source.preprocessing, labels=source.labels, history=history)
