"""Verifying an ONNX file or a model, as one function into a run folder."""

import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from growkit.deploy.golden import Golden, make_golden, read_golden, refuse_unreplaceable
from growkit.deploy.golden_checks import update_golden
from growkit.deploy.inputs import read_pictures
from growkit.deploy.junit import junit_xml
from growkit.deploy.parity import Material
from growkit.deploy.reproduce import reproduction
from growkit.deploy.settings import VerifySettings
from growkit.deploy.store import form_in, refuse_missing
from growkit.deploy.subject import model_subject, onnx_subject
from growkit.deploy.truth import at_image_size, preprocessing
from growkit.deploy.verify import Verification, overall, verify_alone, verify_onnx
from growkit.errors import GrowkitError
from growkit.evaluation import COMPARING, labelled
from growkit.files import (
    read_json,
    refuse_unwritable,
    whole_file,
    write_json,
)
from growkit.record import RunFolder
from growkit.settings import Loading
from growkit.source import AS_IT_IS, Source, load_source
from growkit.text import counted
from growkit.train.batches import val_batches
from growkit.train.data import size_of
from growkit.train.progress import Say, StartProgress, followed, say_nothing, start_nothing
from growkit.train.settings import FitSettings
from growkit.unmeant import READING, Need, unmeant


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
    differ; into RUN/verify/other if the run has an ONNX file and this is another, or was exported from another model.
    With `reference.update`, what passes becomes the reference. `model` and `loading` are what `load_source` takes;
    `show` is given the verification before anything is written.

    Raises:
        GrowkitError: nothing to compare with, a model that cannot be loaded, a missing file, a provider that does not
            run here, a reference or data that cannot be read or do not fit.
    """
    started, clock = datetime.now(UTC), time.monotonic()
    run.refuse_unusable()
    if junit is not None:
        refuse_unwritable(junit, suffix=".xml")
    updating = reference is not None and reference.update
    _refuse_alone(model, file, reference, loading)
    remarks = _remarks(settings, evidence, model, file, updating=updating)
    settings = _settled(settings, evidence, alone=model is None or file is None, updating=updating)
    golden = _opened(reference) if reference else None
    if file is not None:
        refuse_missing(file)
    for line in remarks:
        say(line)

    source, held = None if model is None else load_source(model, loading, say=say), None
    if source is not None and file is not None:
        verified = _with_file(source, file, settings, golden, evidence, say, tell)
        path = _placed(run, source, file, verified, settings, say)
    elif source is not None:
        held = model_subject(
            source.model(),
            weights_sha256=source.sha256,
            architecture=source.architecture.name,
            labels=source.labels,
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
    # not what is inconclusive: the next verification would call right whatever the file answered
    if reference is not None and updating and verified.verdict == "pass":
        if held is None:
            assert file is not None  # else refused above
            held = onnx_subject(file, provider=report["provider"]["used"])
        golden = golden or make_golden(held, seed=settings.seed)
        report["reference_update"] = update_golden(reference.folder, golden, held)
    write_json(path, report)
    if junit is not None:
        _write_junit(junit, verified, started, time.monotonic() - clock)
    _record(run, verified, report, settings, evidence, source)
    return replace(verified, report=report)


def _refuse_alone(model: str | None, file: Path | None, reference: Reference | None, loading: Loading) -> None:
    """Raise GrowkitError if there is nothing to compare with, or no model to load as `loading` says."""
    if model is None and loading != AS_IT_IS:
        raise GrowkitError(f"{file} is an ONNX file: leave out --from, --from-set and --no-ema")
    if model is not None and file is not None:
        return
    if reference is None or (model is None and reference.update):
        named = f"growkit verify MODEL --onnx-file {shlex.quote(str(file))}"
        beside = f", or the model it was made of: {named}" if file else ""
        raise GrowkitError(
            f"nothing to hold {file or model} against; name --reference DIR, which --update-reference writes{beside}"
        )


def _opened(reference: Reference) -> Golden | None:
    """Read the reference; None if it is to be replaced, which must be possible."""
    if not reference.update:
        return read_golden(reference.folder)
    refuse_unreplaceable(reference.folder)
    return None


def _write_junit(path: Path, verified: Verification, started: datetime, seconds: float) -> None:
    text = junit_xml(verified.checks, suite="growkit verify", started=started, seconds=seconds)
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _placed(
    run: RunFolder, source: Source, file: Path, verified: Verification, settings: VerifySettings, say: Say
) -> Path:
    """Return where the report on file and model goes; say what else changes there, and write reproduce.py if needed."""
    folder = run.verify if _of_the_run(run, source, file) else run.verify / "other"
    path = folder / "report.json"
    _leave_script(run, folder, verified, source, file, settings, say)
    if folder == run.verify:
        _tell_less(path, verified, say)
    else:
        say(f"{path} is of {file} and {source.path}; `growkit report` goes by {run.onnx_file} and what it was made of")
    return path


def _of_the_run(run: RunFolder, source: Source, file: Path) -> bool:
    """Whether `growkit report` judges these: the run's ONNX file and what it was made of; any where there is none."""
    if not run.onnx_file.exists():
        return True
    exported = run.exported_weights()
    own = source.sha256 == exported if exported else run.holds(source.path)
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
        remedy = "verify once more with them for `growkit report`, or the next time with --run elsewhere"
        say(f"{path} told {' and '.join(lost)}, too, which this verification leaves out; {remedy}")


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
    if settings.compiled and not settings.latency:
        raise GrowkitError("--compiled times the model compiled: leave out --no-latency")
    if timed and updating:
        raise GrowkitError(
            "--max-latency-ratio and --compiled time a file, which --update-reference does not: leave them out"
        )
    if timed and alone:
        raise GrowkitError("--max-latency-ratio and --compiled time a file beside its model: name both")
    return replace(settings, latency=False) if alone or updating else settings


def _remarks(
    settings: VerifySettings, evidence: Evidence, model: str | None, file: Path | None, *, updating: bool
) -> list[str]:
    """Name the options that have no effect here."""
    both = model is not None and file is not None
    untimed = "with --update-reference" if updating else "where a model or a file is verified alone"
    untimed = untimed if settings.latency else "with --no-latency"
    timing = ("latency_seconds", "latency_margin", "throughput_seconds", "throughput_batch")
    return unmeant(
        Need(settings, timing, settings.latency and both and not updating, untimed),
        Need(settings, ("max_batch",), both, "where a model or a file is verified alone"),
        Need(settings, ("provider",), file is not None, "to a model alone"),
        Need(evidence.reading, READING, evidence.data is not None, "without --data"),
    )


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
            "reference": _held(verified, report),
            **{key: report[key] for key in ("numerics", "latency", "throughput")},
        },
        hashes={name: sha256 for name, sha256 in hashes.items() if sha256},
    )


def _held(verified: Verification, report: Mapping[str, Any]) -> dict[str, Any] | None:
    """What holding against a reference came to; None if it was not done.

    Of a model or a file alone, and where the file does not even open, all checks decide.
    """
    if report["reference"] is None or "reference_update" in report:
        return {"verdict": "pass", "failed": []} if report["reference"] else None
    compared = verified.parity is not None and verified.parity.figures
    judged = [c for c in verified.checks if not compared or c.group == "reference"]
    failed = [c.line for c in judged if c.verdict != "pass"]
    return {"verdict": overall(judged), "failed": failed} if judged else None


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
    material = Material(
        weights_sha256=source.sha256,
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
        progress=tell("latency"),
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
    say(f"python {shlex.quote(str(script))} shows it again")
