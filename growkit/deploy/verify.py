"""The gate: parity, data sets, accuracy and latency of an ONNX file, and one verdict.

A model without its file, or a file without its model, is compared with a golden reference alone.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx
from torch import nn

from growkit.deploy.bounded import bound_of, memory_bounded
from growkit.deploy.checks import Check, Verdict, check
from growkit.deploy.form import PLAIN, Form
from growkit.deploy.golden import Golden
from growkit.deploy.golden_checks import check_golden
from growkit.deploy.latency import Latency, measure_latency
from growkit.deploy.parity import Material, Parity, check_parity
from growkit.deploy.parts import whole_session
from growkit.deploy.runtime import Assignment, assignment, environment
from growkit.deploy.settings import VerifySettings
from growkit.deploy.store import files_of, form_in
from growkit.deploy.subject import Subject, model_subject, onnx_subject
from growkit.deploy.throughput import Throughput, batches_up_to, measure_throughput
from growkit.deploy.truth import at_image_size, preprocessing
from growkit.errors import GrowkitError, first_line
from growkit.files import plain, sha256_of


@dataclass(frozen=True)
class Verification:
    """Everything that was checked; `report` is what report.json holds."""

    checks: tuple[Check, ...]
    parity: Parity | None  # None where a model or a file is compared with a reference alone
    latency: Latency | None
    throughput: Throughput | None
    assignment: Assignment | None
    verdict: Verdict
    report: dict[str, Any]


def verify_onnx(
    model: nn.Module,
    file: Path,
    settings: VerifySettings,
    material: Material,
    *,
    stock: tuple[str, Mapping[str, Any]],
    golden: Golden | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> Verification:
    """Check `file` against `model` and time it; latency only where parity holds.

    stock     name and arguments for timm.create_model, of the same architecture, never grown
    golden    reference to compare the file with, and the model too if the reference is a model's
    progress  called with how many comparisons and batch sizes are timed, of how many, and which comes next

    Raises:
        GrowkitError: a missing file, a provider that does not run here, data sets that cannot be read.
    """
    parity = _bounded_parity(model, file, settings, material)
    held: tuple[Check, ...] = ()
    if golden is not None:
        if golden.identity.of == "model":
            subject = model_subject(
                model, weights_sha256=material.weights_sha256, architecture=stock[0], labels=material.labels
            )
            held += check_golden(golden, subject)
        if parity.figures:  # else the file does not even open
            subject_of_file, valid = _open(file, parity.provider)
            held += check_golden(golden, subject_of_file) if subject_of_file else (valid,)
    opened = whole_session(file, parity.form, provider=settings.provider) if parity.figures else None
    chosen, placed = (opened.note, assignment(opened)) if opened else ("", None)
    facts = environment(opened)
    del opened
    latency = throughput = None
    emulated = parity.form.precision == "bf16" and parity.provider == "cpu"  # its times would say nothing
    if settings.latency and not emulated and not any(c.verdict == "fail" for c in (*parity.checks, *held)):
        latency, throughput = _timed(model, file, settings, stock, parity, progress)
    checks = (
        *([provider_check(placed, emulated=emulated)] if placed else []),
        *parity.checks,
        *held,
        *(latency.checks if latency else ()),
    )
    report = {
        "onnx_sha256": sha256_of(*(parity.files or (file,))),
        "weights_sha256": material.weights_sha256,
        "provider": _provider(settings, parity.provider, chosen, placed),
        "environment": facts,
    }
    return _verified(checks, settings, report, parity, placed, latency, throughput)


def _bounded_parity(model: nn.Module, file: Path, settings: VerifySettings, material: Material) -> Parity:
    """Check parity within the memory that the file, as large as it claims to be, should need."""
    files, form = _as_claimed(file)
    channels, height, width = preprocessing(model).input_size
    side = form.image_size or max(height, width)
    largest = max(settings.max_batch, material.batch_size, form.batch or 1)
    images = 4 * largest * channels * side * side
    with memory_bounded(bound_of(files), images, provider=settings.provider):
        return check_parity(model, file, settings, material)


def _timed(
    model: nn.Module,
    file: Path,
    settings: VerifySettings,
    stock: tuple[str, Mapping[str, Any]],
    parity: Parity,
    progress: Callable[[int, int, str], None],
) -> tuple[Latency, Throughput | None]:
    """Time the file against the model and the stock export; measure images per second if asked for."""
    form = parity.form
    if form.image_size:
        name, arguments = stock
        model, stock = at_image_size(model, form.image_size), (name, {**arguments, "img_size": form.image_size})
    settings = replace(settings, provider=parity.provider)  # what auto turned out to be
    compared, batches = form.batches_timed(settings.max_batch), throughput_batches(settings, form)
    before = (3 + settings.compiled) * len(compared)
    total = before + len(batches)
    latency = measure_latency(
        model,
        file,
        settings,
        stock=stock,
        form=form,
        batches=compared,
        progress=lambda done, note: progress(done, total, note or ("images per second" if batches else "")),
    )
    if not batches:
        return latency, None
    throughput = measure_throughput(
        model,
        file,
        settings,
        form=form,
        batches=batches,
        progress=lambda done, note: progress(before + done, total, note),
    )
    return latency, throughput


def _verified(
    checks: Sequence[Check],
    settings: VerifySettings,
    subject: Mapping[str, Any],
    parity: Parity | None = None,
    placed: Assignment | None = None,
    latency: Latency | None = None,
    throughput: Throughput | None = None,
) -> Verification:
    """Assemble the findings; `subject` is the part of report.json that says what was checked, and where."""
    verdict = overall(checks)
    report = {
        "schema": 1,
        "verdict": verdict,
        **subject,
        "settings": asdict(settings),
        "checks": [asdict(c) for c in checks],
        "numerics": parity.figures if parity else None,
        "latency": asdict(latency) if latency else None,
        "throughput": {**asdict(throughput), "contended": throughput.contended} if throughput else None,
    }
    return Verification(tuple(checks), parity, latency, throughput, placed, verdict, plain(report))


def _provider(
    settings: VerifySettings, used: str | None, note: str = "", placed: Assignment | None = None
) -> dict[str, Any]:
    """Return the provider asked for and the one used, as report.json stores them."""
    return {
        "requested": settings.provider,
        "used": used,
        "note": note,
        "nodes": placed.nodes if placed else {},
        "fallen_back": [asdict(node) for node in placed.fallen_back] if placed else [],
    }


def provider_check(placed: Assignment, *, emulated: bool = False) -> Check:
    """Check that at least one node runs on the provider that was asked for; nothing can be said of `emulated` ones."""
    running, name = placed.nodes.get(placed.provider, 0), f"nodes on {placed.provider}"
    if emulated:
        line = f"bfloat16 was emulated: ONNX Runtime does not run it on {placed.provider}; verify with --provider cuda"
        return Check("provider", name, "inconclusive", running, "1 or more", line)
    return check("provider", name, running > 0, running, "1 or more", placed.line)


def verify_alone(
    subject: Subject | Path, golden: Golden, settings: VerifySettings, *, tolerance: float | None = None
) -> Verification:
    """Compare a model, or the ONNX file at a path, with a reference and nothing else.

    tolerance  as check_golden

    Raises:
        GrowkitError: a missing file, a provider that does not run here.
    """
    checks: list[Check] = []
    if isinstance(subject, Path):
        opened, valid = _open(subject, settings.provider)
        checks.append(valid)
        sha256 = opened.identity.onnx_sha256 if opened else sha256_of(subject)  # of all its files, or of what is there
    else:
        opened, sha256 = subject, None
    if opened is not None:
        if settings.precision is not None:
            wanted, found = settings.precision.partition("-")[0], opened.identity.precision
            checks.append(check("structure", "precision", found == wanted, found, wanted))
        checks += check_golden(golden, opened, tolerance=tolerance)
    report = {
        "onnx_sha256": sha256,
        "weights_sha256": opened.identity.weights_sha256 if opened else None,
        "provider": _provider(settings, opened.provider if opened else None),
        "environment": environment(),
    }
    return _verified(checks, settings, report)


def _open(file: Path, provider: str) -> tuple[Subject | None, Check]:
    """Open the file; return it if ONNX and ONNX Runtime accept it, and the check that says so."""
    try:
        subject = onnx_subject(file, provider=provider)
        onnx.checker.check_model(str(file), full_check=True)
    except GrowkitError:
        raise
    except Exception as error:  # the checker, protobuf and ONNX Runtime each have their own kinds
        reason = first_line(error)
        return None, check("structure", "valid ONNX", False, "refused", "accepted", f"{file}: not valid ONNX: {reason}")
    return subject, check("structure", "valid ONNX", True, "accepted", "accepted")


def overall(checks: Iterable[Check]) -> Verdict:
    """Combine verdicts: any fail makes 'fail', else any inconclusive makes 'inconclusive'."""
    verdicts = {c.verdict for c in checks}
    return "fail" if "fail" in verdicts else "inconclusive" if "inconclusive" in verdicts else "pass"


def _as_claimed(file: Path) -> tuple[tuple[Path, ...], Form]:
    """Return the files that hold a graph and the form it claims; none and the default form if the checks will fail."""
    try:
        return files_of(file), form_in(file)
    except Exception:  # protobuf has its own kinds
        return (), PLAIN


def throughput_batches(settings: VerifySettings, form: Form) -> tuple[int, ...]:
    """The batch sizes that images per second are measured at; none when they are left out."""
    if settings.throughput_seconds <= 0:
        return ()
    return (form.batch,) if form.batch else batches_up_to(settings.throughput_batch or settings.max_batch)
