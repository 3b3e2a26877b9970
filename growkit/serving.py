"""Export a model and verify a file for serving, one function each, with results in a run folder."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from growkit.deploy.folder import MODEL, Exported, write_export
from growkit.deploy.golden import Golden, make_golden, read_golden, refuse_unreplaceable
from growkit.deploy.golden_checks import update_golden
from growkit.deploy.inputs import read_pictures
from growkit.deploy.junit import junit_xml
from growkit.deploy.outputs import refuse_answers
from growkit.deploy.parity import Material
from growkit.deploy.reproduce import reproduction
from growkit.deploy.settings import ExportSettings, TritonSettings, VerifySettings
from growkit.deploy.store import form_in, refuse_missing
from growkit.deploy.subject import model_subject, onnx_subject
from growkit.deploy.triton import refuse_taken, write_model_repository
from growkit.deploy.truth import at_image_size, preprocessing
from growkit.deploy.verify import Verification, timing_steps, verify_alone, verify_onnx
from growkit.errors import GrowkitError
from growkit.evaluation import labelled, prepared_for, refuse_unjudgeable
from growkit.files import (
    read_json,
    refuse_existing,
    refuse_unwritable,
    whole_file,
    whole_folder,
    without_folders,
    write_json,
)
from growkit.history import without_curves
from growkit.record import RunFolder
from growkit.settings import Loading
from growkit.source import AS_IT_IS, Source, load_source
from growkit.text import counted
from growkit.train.batches import unaugmented, val_batches
from growkit.train.data import size_of
from growkit.train.progress import Say, StartProgress, followed, say_nothing, start_nothing
from growkit.train.settings import FitSettings

CALIBRATION = 256  # images to calibrate int8-static on
COMPARING = "comparing on the validation images"


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
    target = out or run.onnx
    _refuse_folders(target, triton, force)
    if settings.max_accuracy_drop is not None and data is None:
        raise GrowkitError("--max-accuracy-drop is judged on labelled images: give --data")
    source = load_source(model, loading, say=say)
    refuse_answers(settings.form(), source.architecture.classes)
    if triton is not None:
        name = triton.settings.name or source.architecture.name
        triton = replace(triton, settings=replace(triton.settings, name=name))
        prepared = None if settings.form().pixels else source.preprocessing
        refuse_taken(triton.folder, name, triton.settings, force, prepared)
    calibration, batches = _calibrating(source, settings, data, reading or FitSettings(), say, tell)
    provenance = {
        "weights_sha256": source.sha256 or None,
        "architecture": source.architecture.name,
        "arguments": source.architecture.arguments,
        "history": without_folders(without_curves(source.history)),
    }
    try:
        with whole_folder(target) as partial:
            exported = write_export(
                source.model(),
                partial,
                settings,
                labels=source.labels,
                provenance=provenance,
                calibration=calibration,
                data=batches,
                say=say,
            )
            if not exported.parity.passed:
                raise _UnfaithfulError
    except _UnfaithfulError:
        for check in exported.parity.failed:
            say(f"FAILED {check.group}: {check.line}")
        say(f"{target} was not written: the file does not answer like the model")
        show(exported)
        return exported
    _tell(exported, target, data, say)
    show(exported)
    made = exported.export
    run.add(
        "export",
        options={
            "model": source.path,
            "out": str(target),
            "data": data,
            **asdict(settings),
            "triton": _served(triton) if triton else None,
        },
        figures={"bytes": made.bytes, "nodes": made.nodes, "parity": exported.parity.figures},
        hashes={"weights": source.sha256, "model.onnx": made.sha256},
    )
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
    refuse_existing(target, force, "export.json", elsewhere="--out writes elsewhere")
    if triton is not None and triton.folder.resolve().is_relative_to(target.resolve()):
        raise GrowkitError(
            f"--triton {triton.folder}: {target} is replaced whole by the next export; name one outside it"
        )


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
    """Say what was written, and how close it is to the model."""
    made, figures = exported.export, exported.parity.figures
    for choice in exported.choices:
        say(f"{choice.attention} attention: {choice.verdict}; {choice.why}")
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


def _served(triton: Repository) -> dict[str, Any]:
    """The Triton settings of an export, for the record."""
    return {"repository": str(triton.folder), **asdict(triton.settings), "version": triton.settings.version or 1}


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
    for remark in model.remarks:
        say(f"warning: {remark}")


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The folder of a golden reference: outputs are compared with it, or with `update` become it."""

    folder: Path
    update: bool = False


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The user's images on which a file and its model are compared, beside the generated ones."""

    data: str | None = None  # labelled, for accuracy
    reading: FitSettings = field(default_factory=FitSettings)  # how they are read
    pictures: Path | None = None  # a folder of unlabelled images


def verify_run(
    run: RunFolder,
    settings: VerifySettings,
    model: str | None,
    file: Path | None,
    *,
    loading: Loading = AS_IT_IS,
    reference: Reference | None = None,
    evidence: Evidence = Evidence(),
    junit: Path | None = None,
    say: Say = say_nothing,
    tell: StartProgress = start_nothing,
    show: Callable[[Verification], None] = lambda verification: None,
) -> Verification:
    """Compare an ONNX `file` with the model it came from, or one of the two alone with a reference.

    Writes the report as report.json, held-file.json or held-model.json into RUN/verify, and reproduce.py if outputs
    differ; into RUN/verify/other if the run has an ONNX file and this is another, or the model is of another run. With
    `reference.update`, what passes becomes the reference. `model` and `loading` are what `load_source` takes; `show` is
    given the verification before anything is written.

    Raises:
        GrowkitError: nothing to compare with, a model that cannot be loaded, a missing file, a provider that does not
            run here, a reference or data that cannot be read or do not fit.
    """
    started, clock = datetime.now(UTC), time.monotonic()
    run.refuse_unusable()
    if junit is not None:
        refuse_unwritable(junit, suffix=".xml")
    updating = reference is not None and reference.update
    if (model is None or file is None) and (reference is None or (model is None and updating)):
        alone = file or model
        beside = f", or the model it was made of: growkit verify MODEL --onnx-file {file}" if file else ""
        raise GrowkitError(
            f"nothing to hold {alone} against; name --reference DIR, which --update-reference writes{beside}"
        )
    settings = _settled(settings, evidence, alone=model is None or file is None, updating=updating)
    golden = None
    if reference is not None and updating:
        refuse_unreplaceable(reference.folder)
    elif reference is not None:
        golden = read_golden(reference.folder)
    if file is not None:
        refuse_missing(file)

    source, held = None if model is None else load_source(model, loading, say=say), None
    if source is not None and file is not None:
        folder = run.verify if _of_the_run(run, source, file) else run.verify / "other"
        path, verified = folder / "report.json", _with_file(source, file, settings, golden, evidence, say, tell)
        _leave_script(run, folder, verified, source, file, settings, say)
        if folder == run.verify:
            _tell_less(path, verified, say)
        else:
            say(f"{path} is of {file} and {model}; `growkit report` goes by what was verified of {run.onnx_file}")
    elif source is not None:
        held = model_subject(
            source.model(), weights_sha256=source.sha256 or None, architecture=source.architecture.name
        )
        golden = golden or make_golden(held, seed=settings.seed)
        path, verified = run.verify / "held-model.json", verify_alone(held, golden, settings)
    else:
        assert file is not None  # else refused above
        assert golden is not None
        path, verified = run.verify / "held-file.json", verify_alone(file, golden, settings)
    show(verified)
    report = {
        "model": model,
        "onnx": str(file) if file else None,
        "reference": str(reference.folder) if reference else None,
        **verified.report,
    }
    if reference is not None and updating and verified.verdict != "fail":
        if golden is None or held is None:
            assert file is not None  # a model alone has made its golden above
            held = onnx_subject(file, provider=report["provider"]["used"])
            golden = make_golden(held, seed=settings.seed)
        report["reference_update"] = update_golden(reference.folder, golden, held)
    write_json(path, report)
    if junit is not None:
        text = junit_xml(verified.checks, suite="growkit verify", started=started, seconds=time.monotonic() - clock)
        with whole_file(junit) as partial:
            partial.write_text(text, encoding="utf-8")
    _record(run, verified, report, settings, evidence, source)
    return replace(verified, report=report)


def _of_the_run(run: RunFolder, source: Source, file: Path) -> bool:
    """Whether file and model are what `growkit report` judges: the run's own, or any where it has no ONNX file."""
    if not run.onnx_file.exists():
        return True
    own = run.holds(source.path) or (source.sha256 or None) == run.exported_weights()
    return own and run.onnx_file.samefile(file)


def _tell_less(path: Path, verified: Verification, say: Say) -> None:
    """Say where the report at `path` is of the same file and tells more than the one that will replace it."""
    try:
        before = read_json(path)
        left_out = {str(check["group"]) for check in before["checks"]} - {check.group for check in verified.checks}
    except (GrowkitError, KeyError, TypeError):
        return
    lost = [what for group, what in (("accuracy", "accuracy"), ("latency", "times")) if group in left_out]
    if lost and before.get("onnx_sha256") == verified.report["onnx_sha256"]:
        say(f"{path} told {' and '.join(lost)}, too, which this verification leaves out")


def _settled(settings: VerifySettings, evidence: Evidence, *, alone: bool, updating: bool) -> VerifySettings:
    """Turn timing off for a file or model `alone`, and when a reference is written.

    Raises:
        GrowkitError: the settings ask for something that is then not done.
    """
    timed = settings.max_latency_ratio is not None or settings.compiled
    if settings.max_accuracy_drop is not None and evidence.data is None:
        raise GrowkitError("--max-accuracy-drop is judged on labelled images: give --data")
    if settings.max_latency_ratio is not None and not settings.latency:
        raise GrowkitError("--max-latency-ratio is judged by timing: leave out --no-latency")
    if timed and updating:
        raise GrowkitError(
            "--max-latency-ratio and --compiled time a file, which --update-reference does not: leave them out"
        )
    if timed and alone:
        raise GrowkitError("--max-latency-ratio and --compiled time a file beside its model: name both")
    return replace(settings, latency=False) if alone or updating else settings


def _record(
    run: RunFolder,
    verified: Verification,
    report: Mapping[str, Any],
    settings: VerifySettings,
    evidence: Evidence,
    source: Source | None,
) -> None:
    hashes = {"weights": source.sha256 if source else None, "model.onnx": report["onnx_sha256"]}
    run.add(
        "verify",
        options={
            **{key: report[key] for key in ("model", "onnx", "reference")},
            "data": evidence.data,
            **asdict(settings),
        },
        figures={
            "verdict": verified.verdict,
            "failed": [c.line for c in verified.checks if c.verdict == "fail"],
            **{key: report[key] for key in ("numerics", "latency", "throughput")},
        },
        hashes={name: sha256 for name, sha256 in hashes.items() if sha256},
    )


def _with_file(
    source: Source,
    file: Path,
    settings: VerifySettings,
    golden: Golden | None,
    evidence: Evidence,
    say: Say,
    tell: StartProgress,
) -> Verification:
    """Verify the ONNX file against its model: outputs, a reference, accuracy on data, latency."""
    network, form = source.model(), form_in(file)
    prepared = preprocessing(at_image_size(network, form.image_size))
    pictures = None
    if evidence.pictures is not None:
        pictures = read_pictures(evidence.pictures, prepared)
        say(f"compared on {counted(len(pictures), 'picture')} of {evidence.pictures}, too")
    batches = None
    if evidence.data is not None:
        judged = labelled(evidence.data, source, evidence.reading, image_size=form.image_size)
        batches = followed(val_batches(judged, evidence.reading), size_of(judged.val), tell(COMPARING))
    say("comparing answers" + (", then times" if settings.latency else ""))
    total, progress = timing_steps(settings, form), tell("latency")
    material = Material(
        weights_sha256=source.sha256 or None,
        labels=source.labels,
        data_sets=_data_sets_beside(file),
        data=batches,
        batch_size=evidence.reading.batch_size,
        pictures=pictures,
    )
    return verify_onnx(
        network,
        file,
        settings,
        material,
        stock=(source.architecture.name, source.architecture.arguments),
        golden=golden,
        progress=lambda done, note: progress(done, total, note),
    )


def _data_sets_beside(file: Path) -> Path | None:
    """The folder of a file's own reference data, if `growkit export` wrote them beside it."""
    return file.parent if (file.parent / "test_data_set_0").is_dir() else None


def _leave_script(
    run: RunFolder,
    folder: Path,
    verified: Verification,
    source: Source,
    file: Path,
    settings: VerifySettings,
    say: Say,
) -> None:
    """Write reproduce.py into `folder` if a file's outputs differ from its model's; remove an earlier one."""
    script = folder / "reproduce.py"
    script.unlink(missing_ok=True)
    if verified.parity is None or verified.parity.passed:
        return
    text = reproduction(
        verified.parity,
        folder,
        run=run.path,
        model=source.path,
        file=file,
        settings=settings,
        data_sets=_data_sets_beside(file),
        loading=repr(source.loading),
    )
    with whole_file(script) as partial:
        partial.write_text(text, encoding="utf-8")
    say(f"python {script} shows it again")
