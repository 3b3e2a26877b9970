"""Exporting a model for serving, as one function into a run folder."""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from growkit.deploy.folder import MODEL, Exported, write_export
from growkit.deploy.outputs import refuse_answers
from growkit.deploy.settings import ExportSettings, TritonSettings
from growkit.deploy.store import SUFFIX
from growkit.deploy.triton import refuse_taken, write_model_repository
from growkit.errors import GrowkitError
from growkit.evaluation import COMPARING, prepared_for, refuse_unjudgeable
from growkit.files import (
    refuse_existing,
    refuse_unwritable,
    whole_folder,
    without_folders,
)
from growkit.history import without_curves
from growkit.record import RunFolder
from growkit.settings import Loading
from growkit.source import AS_IT_IS, Source, load_source
from growkit.train.batches import unaugmented, val_batches
from growkit.train.data import size_of
from growkit.train.progress import Say, StartProgress, followed, say_nothing, start_nothing
from growkit.train.settings import FitSettings
from growkit.unmeant import READING, Need, unmeant

CALIBRATION = 256  # images to calibrate int8-static on
WRITES = ("export.json", MODEL, MODEL + SUFFIX, "test_data_set_[0-9]/input_0.pb", "test_data_set_[0-9]/output_*.pb")


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A Triton model repository to write the export into as well; its name defaults to the architecture's."""

    folder: Path
    settings: TritonSettings


def export_model(
    run: RunFolder,
    model: str,
    settings: ExportSettings,
    *,
    loading: Loading = AS_IT_IS,
    out: Path | None = None,
    triton: Repository | None = None,
    data: str | None = None,
    reading: FitSettings | None = None,
    force: bool = False,
    say: Say = say_nothing,
    tell: StartProgress = start_nothing,
    show: Callable[[Exported], None] = lambda exported: None,
) -> Exported:
    """Write a model as ONNX into `out`, or RUN/onnx, and compare the finished file with the model.

    A file whose outputs differ is discarded; `Exported.parity` tells. `model` and `loading` are what `load_source`
    takes; `data`, read as `reading` says, is for measuring accuracy and calibrating int8-static. `show` is given the
    export before it goes into the Triton repository.

    Raises:
        GrowkitError: a model that cannot be loaded, a folder that cannot be written or exists without `force`,
            settings or data that do not fit the model.
    """
    run.refuse_unusable()
    target, reading = out or run.onnx, reading or FitSettings()
    _refuse_folders(target, triton, force)
    if settings.max_accuracy_drop is not None and data is None:
        raise GrowkitError("--max-accuracy-drop is judged on labelled images: give --data")
    for line in unmeant(
        Need(reading, READING, data is not None, "without --data"),
        Need(settings, ("latency_seconds",), settings.for_ is not None, "without --for"),
    ):
        say(line)
    source = load_source(model, loading, say=say)
    refuse_answers(settings.form(), source.architecture.classes)
    triton = _named(triton, source, settings, force) if triton else None
    calibration, batches = _calibrating(source, settings, data, reading, say, tell)
    with contextlib.suppress(_UnfaithfulError), whole_folder(target, replace=force) as partial:
        exported = write_export(
            source.model(),
            partial,
            settings,
            labels=source.labels,
            provenance={
                "weights_sha256": source.sha256,
                "architecture": source.architecture.name,
                "arguments": source.architecture.arguments,
                "history": without_folders(without_curves(source.history)),
            },
            calibration=calibration,
            data=batches,
            say=say,
        )
        if not exported.parity.passed:
            raise _UnfaithfulError
    _tell(exported, target, data, say)
    show(exported)
    if not exported.parity.passed:
        return exported
    asked = {"model": source.path, "out": str(target), "data": data, **asdict(settings)}
    _record(run, exported, source, asked, triton)
    if triton is not None:
        _write_repository(target, triton, force, say)
    return exported


class _UnfaithfulError(Exception):
    """The file's outputs differ from the model's: its folder must not be created."""


def _refuse_folders(target: Path, triton: Repository | None, force: bool) -> None:
    """Raise GrowkitError if an export could not be written."""
    if target.resolve() == Path.cwd():
        raise GrowkitError(f"--out {target}: the current folder cannot be replaced; name another")
    refuse_unwritable(target.absolute().parent)
    refuse_existing(target, force, "export.json", writes=WRITES, elsewhere="--out writes elsewhere")
    if triton is None:
        return
    if triton.folder.resolve().is_relative_to(target.resolve()):
        raise GrowkitError(
            f"--triton {triton.folder}: {target} is replaced whole by the next export; name one outside it"
        )
    if target.resolve().is_relative_to(triton.folder.resolve()):
        raise GrowkitError(
            f"--triton {triton.folder}: Triton takes every folder in it for a model, also {target}; "
            "name another with --out, or with --run"
        )


def _named(triton: Repository, source: Source, settings: ExportSettings, force: bool) -> Repository:
    """Name the model in the repository after the source, unless it has a name.

    Raises:
        GrowkitError: it could not be written there.
    """
    name = triton.settings.name or source.architecture.name
    prepared = None if settings.pixels else source.preprocessing
    refuse_taken(triton.folder, name, triton.settings, force, prepared)
    return replace(triton, settings=replace(triton.settings, name=name))


def _calibrating(
    source: Source, settings: ExportSettings, data: str | None, reading: FitSettings, say: Say, tell: StartProgress
) -> tuple[np.ndarray | None, Iterable[tuple[Tensor, Tensor]] | None]:
    """Return calibration images for int8-static (N, C, H, W) and labelled batches for accuracy, None if unused."""
    calibrates = settings.precision == "int8-static"
    if data is None:
        if calibrates:
            raise GrowkitError(
                "--precision int8-static takes its ranges from images: give --data, or use --precision int8"
            )
        return None, None
    opened = prepared_for(source, data, reading, image_size=settings.image_size, training=calibrates)
    batches = None
    try:
        refuse_unjudgeable(source, data, opened.classes)
        batches = followed(val_batches(opened, reading), size_of(opened.val), tell(COMPARING))
    except GrowkitError as error:
        if not calibrates or settings.max_accuracy_drop is not None:
            raise
        say(f"accuracy is not judged: {error}")  # calibration needs no labels
    return unaugmented(opened, CALIBRATION, seed=settings.seed).numpy() if calibrates else None, batches


def _tell(exported: Exported, target: Path, data: str | None, say: Say) -> None:
    """Say what was written and how close it is to the model, or why nothing was."""
    if not exported.parity.passed:
        for check in exported.parity.failed:
            say(f"FAILED {check.group}: {check.line}")
        say(f"{target} was not written: the file does not answer like the model")
        return
    made, figures = exported.export, exported.parity.figures
    for choice in exported.content["choices"]:
        say(f"{choice['attention']} attention: {choice['verdict']}; {choice['why']}")
    say(
        f"wrote {target / MODEL}: {made.form.precision}, {made.bytes / 1e6:.1f} MB, opset {made.opset}, "
        f"IR {made.ir}, {made.nodes} nodes" + (f", weights in {made.files[1]}" if made.files[1:] else "")
    )
    errors = [(batch["relative_rms"], batch["relative_rms_allowed"]) for batch in figures["batches"].values()]
    worst, allowed = max(errors, key=lambda one: one[0] / one[1])
    say(
        f"it answers like PyTorch: relative error {worst:.1e} (allowed {allowed:.2g}), "
        f"{figures['noise_ratio']:.2f} x PyTorch's own, {len(exported.parity.checks)} checks passed"
    )
    if made.form.precision == "bf16":
        say("ONNX Runtime has no bfloat16 on the CPU, where this was emulated; `verify --provider cuda` tries a GPU")
    if "accuracy" in figures:
        scores = figures["accuracy"]
        say(f"top-1 {scores['top1']:.2%} against PyTorch's {scores['torch_top1']:.2%} on {scores['samples']} images")
    elif made.form.precision != "fp32" and data is None:
        say("its effect on accuracy was not measured: give --data, here or to `growkit verify`")


def _record(
    run: RunFolder, exported: Exported, source: Source, asked: dict[str, Any], triton: Repository | None
) -> None:
    made, served = exported.export, None
    if triton is not None:
        version = triton.settings.version or 1
        served = {"repository": str(triton.folder), **asdict(triton.settings), "version": version}
    run.add(
        "export",
        options={**asked, "triton": served},
        figures={"bytes": made.bytes, "nodes": made.nodes, "parity": exported.parity.figures},
        hashes={"weights": source.sha256, "model.onnx": made.sha256},
    )


def _write_repository(target: Path, triton: Repository, force: bool, say: Say) -> None:
    """Write the exported folder into a model repository; the folder stays even if that fails."""
    try:
        model = write_model_repository(target, triton.folder, triton.settings, force=force)
    except (GrowkitError, OSError) as error:
        raise GrowkitError(f"{target} was written, the model repository was not: {error}") from error
    config = "written anew" if model.configured else "kept as it is"
    say(
        f"wrote {model.folder / str(model.version)}: a model repository for Triton and KServe; "
        f"config.pbtxt was {config}"
    )
    configuring = ("max_batch", "queue_delay", "instances", "kind")
    kept = Need(triton.settings, configuring, model.configured, "to a config.pbtxt that is kept", prefix="triton_")
    for line in (*unmeant(kept), *(f"warning: {remark}" for remark in model.remarks)):
        say(line)
