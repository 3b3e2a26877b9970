"""What a model was made from: every earlier model, as growkit.json lists them under "ancestors"."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from growkit.source import FETCHED, Source

MOST = 100  # ancestors kept, the latest ones
LONGEST = 200  # characters of a name
LARGEST = 1e100  # of numbers; rejects infinity and NaN too
KEYS = (
    "stage",  # trained, grown or finetuned by growkit; given for any other origin
    "name",  # of its file or folder, or timm:NAME
    "sha256",  # of its weights; empty for random ones
    "source",  # the sha256 of the weights it was made from; empty for random weights
    "architecture",
    "width",
    "layers",
    "adapted",  # how the model it was made from was adapted
    "method",
    "rank",
    "seed",
    "steps",  # of its training; for a grown model, of operator training
    "images",
    "flops",
)
Entry = dict[str, Any]  # some of KEYS


def name_of(source: Source) -> str:
    """Name of a source in records: without local folders, since records are served with the model."""
    return source.path if source.path.startswith(FETCHED) else Path(source.path).name


def ancestors(source: Source) -> list[Entry]:
    """List the ancestors of a model made from `source`: oldest first, `source` itself last.

    Empty if `source` is random weights. Unknown facts are left out of an entry.
    """
    if not source.sha256:
        return []
    history = source.history or {}
    listed = history.get("ancestors")
    earlier = [_plain(entry) for entry in listed if isinstance(entry, Mapping)] if isinstance(listed, list) else []
    return [*earlier, _plain(_own(source, history))][-MOST:]


def flops_of(source: Source) -> float | None:
    """Total training FLOPs of a model that growkit trained, including everything it was grown from; None if unknown."""
    line = ancestors(source)
    if not line or line[0].get("stage") != "trained" or line[0].get("source"):
        return None  # not known to begin with random weights
    spent = [flops for entry in line if isinstance(flops := entry.get("flops"), int | float)]
    return float(sum(spent)) if len(spent) == len(line) else None


def _own(source: Source, history: Mapping[str, Any]) -> Entry:
    """What the source's own growkit.json says of it."""
    spaces = source.architecture.spaces
    entry = {
        "stage": "given",
        "name": name_of(source),
        "sha256": source.sha256,
        "architecture": source.architecture.name,
        "width": spaces["embed"].size,
        "layers": spaces["blocks"].size,
    }
    if not history:
        return entry
    origin, settings = _mapping(history.get("source")), _mapping(history.get("settings"))
    grown = history.get("stage") == "grown"
    fit = _mapping(history.get("operator" if grown else "fit"))
    adapted, untold = origin.get("adapted"), 0 if grown and not fit else None
    return {
        **entry,
        "stage": history.get("stage"),
        "source": origin.get("sha256"),
        "adapted": "; ".join(map(str, adapted)) if isinstance(adapted, list) and adapted else None,
        "method": settings.get("method"),
        "rank": (settings.get("ranks") or settings.get("rank")) if settings.get("method") == "mango" else None,
        "seed": settings.get("seed"),
        "steps": fit.get("steps", untold),
        "images": fit.get("images", untold),
        "flops": fit.get("flops", untold),
    }


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _plain(entry: Mapping[str, Any]) -> Entry:
    """Reduce an entry, whoever wrote it, to short text and numbers under known names."""
    found: Entry = {}
    for key in KEYS:
        value = entry.get(key)
        if isinstance(value, str):
            found[key] = value[:LONGEST]
        elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST:
            found[key] = value
    return found
