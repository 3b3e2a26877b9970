"""Training from scratch and fine-tuning, each as one function into a run folder."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from growkit.adapt import unread_pixels, with_classes
from growkit.checkpoint import HISTORY, replace_model, sha256_written
from growkit.errors import GrowkitError
from growkit.files import read_json, without_folders, write_json
from growkit.history import fit_figures, in_short, origin_of, served_settings
from growkit.job import Job
from growkit.source import Source, fresh, named
from growkit.stage import LAST, START, below, goes_on, settled, tell_stale_export
from growkit.train.data import Data, open_data
from growkit.train.device import pick_device
from growkit.train.distributed import by_leader, leads, sharded, whole
from growkit.train.loop import FitResult, fit
from growkit.train.resume import STATE
from growkit.train.score import Scores, read_through, score_model
from growkit.train.settings import FitSettings, recorded


@dataclass(frozen=True)
class Trained:
    """Result of `train_model` and `finetune_model`."""

    folder: Path
    fitted: FitResult
    scores_at_start: Scores | None


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
    asked = {"model": source.path, "set": list(sets), "data": data}
    return _fit_into(job, job.run.trained, source, asked, opened, settings, command="train")


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
    asked = {"model": source.path, "data": data}
    return _fit_into(job, job.run.finetuned, adapted, asked, opened, settings, command="finetune")


def _fit_into(
    job: Job,
    folder: Path,
    source: Source,
    asked: dict[str, Any],
    opened: Data,
    settings: FitSettings,
    *,
    command: str,
) -> Trained:
    """Train `source` on the data into `folder`; what was `asked` goes into the record beside the settings."""
    resumed, last = goes_on(job, folder, folder / LAST / STATE), folder / LAST
    model_of = {"source": source.sha256, "model": source.architecture.name, **source.architecture.arguments}
    opened = replace(opened, identity={**opened.identity, **model_of})
    device, model = pick_device(job.device), source.model()
    if command == "train" and (unread := unread_pixels(model)):
        job.say(unread)
    settings = settled(job, model, opened, settings, device, last if resumed else None)
    start = _kept_scores(last / START) if resumed else None
    if command == "train" and not resumed:
        read_through(opened, settings, device, progress=job.tell("reading the validation images"))

    def score(judged: nn.Module, what: str = "scoring the validation images") -> Scores:
        return score_model(judged, opened, settings, device, progress=job.tell(what))

    def score_start(judged: nn.Module) -> None:
        nonlocal start
        start = score(judged, "scoring the start")
        job.say(f"starts at top-1 {start.top1:.2%}, loss {start.loss:.4f} on the validation images")
        figures = asdict(start)
        by_leader(lambda: write_json(last / START, figures))

    history = {"stage": folder.name, **origin_of(source), "settings": served_settings(settings)}

    def keep(best: nn.Module, scores: Scores) -> None:
        kept = _gathered(best, source)
        by_leader(lambda: _replace(folder, kept, source, {**history, "scores": asdict(scores)}))

    fitted = fit(
        model.train(),
        opened,
        settings,
        device=device,
        evaluate=score,
        folder=last,
        resume=resumed,
        on_start=score_start if command == "finetune" else None,
        on_best=keep,
        progress=job.tell("fine-tuning" if command == "finetune" else f"training {source.path}"),
    )
    for line in (*opened.remarks(job.run.record), *_on_best(fitted, start)):
        job.say(line)
    history["fit"] = fit_figures(fitted, settings, start)
    at_last = _gathered(fitted.judged, source)

    def write() -> None:
        _replace(last, at_last, source, history)
        if fitted.best_scores is None:
            _replace(folder, at_last, source, history)
        sha256 = sha256_written(folder)
        if fitted.best_scores is not None:
            write_json(folder / HISTORY, {**read_json(folder / HISTORY), "fit": without_folders(history["fit"])})
        job.run.add(
            command,
            options={**asked, **recorded(settings)},
            figures={
                **in_short(history["fit"]),
                "adapted": list(source.adapted),
                "unreadable": list(opened.unreadable),
            },
            hashes={"source": source.sha256, folder.name: sha256},
        )

    by_leader(write)
    tell_stale_export(job, folder)
    return Trained(folder, fitted, start)


def _kept_scores(path: Path) -> Scores | None:
    """Read the starting scores of a resumed run; None if they are lost, since they are only reported."""
    try:
        kept = Scores(**read_json(path))
    except (GrowkitError, TypeError):
        return None
    return kept if all(isinstance(value, int | float) for value in asdict(kept).values()) else None


def _gathered(trained: nn.Module, source: Source) -> nn.Module:
    """Return `trained`, gathered in the leading process if it is sharded; a collective call."""
    if not sharded(trained):
        return trained
    state = whole(trained.state_dict())
    together = source.model()
    if leads():
        together.load_state_dict(state)
    return together


def _on_best(fitted: FitResult, start: Scores | None) -> list[str]:
    """The lines about the best scores, and about a fall below those of the start."""
    best = fitted.best_scores
    if best is None:
        return []
    lines = [f"best at update {fitted.best_step}: top-1 {best.top1:.2%}, top-5 {best.top5:.2%}, loss {best.loss:.4f}"]
    if start is not None and best.top1 < start.top1 and not fitted.interrupted:
        remedy = "try a lower --lr, more --epochs or --steps, or go on with the model it started from"
        lines.append(below(f"that is below the start, {start.top1:.2%}", start, best, remedy))
    return lines


def _replace(folder: Path, model: nn.Module, source: Source, history: dict[str, Any]) -> None:
    replace_model(folder, model, preprocessing=source.preprocessing, labels=source.labels, history=history)
