"""The settings that a folder of runs began with, so that results of two comparisons or versions are never mixed."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from growkit import __version__
from growkit.arch.spec import Architecture
from growkit.checkpoint import WEIGHTS
from growkit.compare.bench import START, UNREADABLE, Bench
from growkit.compare.settings import SCHEMA, CompareSettings, SweepSettings
from growkit.errors import GrowkitError
from growkit.files import read_json, refuse_existing, whole_folder, write_json
from growkit.job import Job
from growkit.ranges import option_of
from growkit.record import hardware, versions
from growkit.train.data import size_of
from growkit.train.loop import comparable
from growkit.train.resume import METRICS, STATE, difference

BEGUN = "begun.json"
WRITES = (  # by compare, sweep or both; Optuna's lock has names of its own while it is renamed
    *(BEGUN, UNREADABLE, "source.json", "results.json", "results.md", "report.html", "plots/*.svg", "plots/*.png"),
    *("study.log", "study.log.lock*"),
    *(
        f"{folder}/*/{name}"
        for folder in ("runs", "starts", "from-scratch")
        for name in (STATE, METRICS, WEIGHTS, "result.json", START)
    ),
)
TYPED = ("recipe", "settings")  # what holds options of the command; the rest follows from them, or from the files


def _identity(bench: Bench) -> dict[str, Any]:
    """What must be identical for runs to be comparable."""
    images = {"training images": bench.data.train, "held-out images": bench.data.val, "test images": bench.test.val}
    return {
        "schema": SCHEMA,
        "growkit": __version__,
        "source": {"sha256": bench.source.sha256, **_described(bench.source.architecture)},
        "target": _described(bench.target),
        "data": {name: str(value) for name, value in bench.data.identity.items()},
        "images": {name: size_of(images) for name, images in images.items()},
        "recipe": comparable(bench.recipe, bench.device),
        "operator": comparable(bench.operator, bench.device),
        "machine": {"device": bench.device.type, "torch": torch.__version__},
    }


def described(bench: Bench, settings: CompareSettings | SweepSettings, command: str | None) -> dict[str, Any]:
    """The provenance part of results.json."""
    return {
        **_identity(bench),
        "adapted": bench.source.adapted,
        "unreadable": list(bench.data.unreadable),
        "command": command,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": asdict(settings),
        "versions": versions(),
        "hardware": hardware(),
    }


def refuse_begun(job: Job, folder: Path) -> None:
    """Raise GrowkitError if the run cannot be written, or `folder` exists and is neither resumed nor replaced."""
    job.run.refuse_unusable()
    if not job.resume:
        refuse_existing(folder, job.force, BEGUN, writes=WRITES, resumable=(folder / BEGUN).exists())


def begin(
    job: Job, bench: Bench, settings: CompareSettings | SweepSettings, *, free: Sequence[str], test: bool
) -> None:
    """Record in the folder what is measured there; a folder that starts anew is emptied first.

    All images that are to be scored, with `test` those of the test too, are read first: one that cannot be read
    would make every run fail at scoring.

    Raises:
        GrowkitError: on resuming, the folder holds results of another version, of other images, recipe or settings
            (those in `free` may differ), or something else; or an image cannot be read.
    """
    folder, own = bench.folder, {**_identity(bench), "settings": asdict(settings)}
    path = folder / BEGUN
    goes_on = job.resume and path.exists()
    if goes_on:
        differing = _first_difference(read_own(path), own, free)
        if differing is not None:
            raise GrowkitError(f"{path}: begun with {difference(*differing)}; give the same, or --run elsewhere")
    elif job.resume:
        if folder.exists() and any(folder.iterdir()):
            raise GrowkitError(f"{folder}: nothing to resume; --force replaces it, --run writes elsewhere")
        job.say(f"{folder}: nothing was begun there before, it begins now")
    bench.read_through(test=test)
    if goes_on and (folder / UNREADABLE).exists():
        bench.data.unreadable.update(dict.fromkeys(read_json(folder / UNREADABLE)))
    if goes_on:
        write_json(path, own)
        return
    with whole_folder(folder) as partial:
        write_json(partial / BEGUN, own)


def _described(architecture: Architecture) -> dict[str, Any]:
    sizes = {name: space.size for name, space in architecture.spaces.items()}
    return {"name": architecture.name, "arguments": dict(architecture.arguments), "spaces": sizes}


def read_own(path: Path) -> dict[str, Any]:
    """Read a file that this version of growkit wrote.

    Raises:
        GrowkitError: it is damaged or from another version; it is left unchanged.
    """
    content = read_json(path)
    made = (content.get("schema"), content.get("growkit")) if isinstance(content, dict) else None
    if made != (SCHEMA, __version__):
        by = f"growkit {made[1]}, schema {made[0]}" if made and made[1] else "something else"
        raise GrowkitError(
            f"{path}: written by {by}, this is growkit {__version__}, schema {SCHEMA}; results of two versions are "
            "not mixed, --run writes elsewhere"
        )
    return dict(content)


def _first_difference(before: Any, now: Any, free: Sequence[str], name: str = "") -> tuple[str, Any, Any] | None:
    """Return name, old and new value of the first difference between two JSON objects; keys in `free` may differ.

    Options, which are named as they are typed, come first.
    """
    if not isinstance(before, dict) or not isinstance(now, dict):
        return None if before == now else (name, before, now)
    keys = sorted(
        (key for key in before.keys() | now.keys() if key not in free), key=lambda key: (key not in TYPED, key)
    )
    found = (
        _first_difference(before.get(key), now.get(key), free, option_of(key) if name in TYPED else key) for key in keys
    )
    return next((difference for difference in found if difference is not None), None)
