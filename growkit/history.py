"""The provenance that growkit.json and the run's record keep of a model."""

from dataclasses import asdict
from typing import Any

from growkit import __version__
from growkit.arch.spec import LAYERS, Architecture
from growkit.lineage import ancestors, name_of
from growkit.record import versions
from growkit.source import Source
from growkit.train import distributed
from growkit.train.loop import FitResult
from growkit.train.score import Scores
from growkit.train.settings import FitSettings

CURVES = ("losses", "history", "training")


def origin_of(source: Source) -> dict[str, Any]:
    """Return where weights come from: names, hashes and versions; nothing about this machine, since it is served."""
    return {
        "growkit": __version__,
        "source": {
            "name": name_of(source),
            "sha256": source.sha256,
            "architecture": source.architecture.name,
            "arguments": dict(source.architecture.arguments),
            "adapted": list(source.adapted),
            "own_head": source.own_head,
            "history": _training(source),
        },
        "ancestors": ancestors(source),
        "versions": versions(),
    }


def _training(source: Source) -> dict[str, Any] | None:
    """What growkit knows of the source's own training, with its curve; `ancestors` has totals for earlier models."""
    history = source.history or {}
    trained = next((key for key in ("fit", "operator") if isinstance(history.get(key), dict)), None)
    return {"stage": history.get("stage"), trained: in_short(history[trained])} if trained else None


def sizes(architecture: Architecture) -> dict[str, int]:
    """The sizes that can grow, whether arguments or the architecture's name set them."""
    attention = architecture.spaces["attn"]
    return {
        "embed_dim": architecture.spaces["embed"].size,
        "depth": architecture.spaces[LAYERS].size,
        "num_heads": attention.size // attention.group,
        "parameters": architecture.parameters,
    }


def served_settings(settings: FitSettings) -> dict[str, Any]:
    """Settings as growkit.json has them: without the data set's folder, since they are served and it is local."""
    return {name: value for name, value in asdict(settings).items() if name != "data_dir"}


def fit_figures(fitted: FitResult, settings: FitSettings, start: Scores | None = None) -> dict[str, Any]:
    """Return what a fit did, as JSON, with the scores it started from."""
    return {
        "start": asdict(start) if start else None,
        "steps": fitted.steps,
        "images": fitted.images_per_step * fitted.steps,
        "interrupted": fitted.interrupted,
        "processes": distributed.size(),
        "losses": [round(loss, 6) for loss in fitted.losses],
        "history": [{"step": step, **asdict(scores)} for step, scores in fitted.history],
        "best": asdict(fitted.best_scores) if fitted.best_scores else None,
        "best_step": fitted.best_step,
        "flops_per_step": fitted.flops_per_step,
        "macs_per_step": fitted.macs_per_step,
        "flops": fitted.flops_per_step * fitted.steps,
        "images_per_second": fitted.images_per_second,
        "seconds": fitted.seconds,
        "settings": served_settings(settings),
    }


def in_short(fit: dict[str, Any]) -> dict[str, Any]:
    """Shorten a fit for the run's record, which has the options already and needs few points of the loss curve."""
    losses = fit["losses"] if isinstance(fit.get("losses"), list) else []
    every = -(-len(losses) // 200) or 1
    curve = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1) if step % every == 0]
    rest = {name: value for name, value in fit.items() if name not in ("losses", "settings")}
    return {**rest, "training": curve}


def without_curves(history: dict[str, Any] | None) -> dict[str, Any] | None:
    """Remove training curves from a model's history: serving does not need them."""
    if history is None:
        return None
    kept = {key: value for key, value in history.items() if key not in CURVES or not isinstance(value, list)}
    return {key: without_curves(value) if isinstance(value, dict) else value for key, value in kept.items()}
