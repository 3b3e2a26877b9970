"""The gate: parity, reference data, accuracy and latency of an ONNX file, and one verdict."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from growkit.deploy.checks import Check, Verdict, check, plain
from growkit.deploy.latency import Latency, measure_latency
from growkit.deploy.parity import Parity, check_parity
from growkit.deploy.runtime import Assignment, assignment, environment, open_session
from growkit.deploy.settings import VerifySettings
from growkit.deploy.throughput import Throughput, batches_up_to, measure_throughput
from growkit.errors import GrowkitError
from growkit.files import sha256_of


@dataclass(frozen=True)
class Verification:
    """Everything that was checked; `report` is what report.json holds."""

    checks: tuple[Check, ...]
    parity: Parity
    latency: Latency | None
    throughput: Throughput | None
    assignment: Assignment | None
    verdict: Verdict
    report: dict[str, Any]


def verify_onnx(
    model: nn.Module,
    file: Path,
    settings: VerifySettings,
    *,
    stock: tuple[str, Mapping[str, Any]],
    weights_sha256: str | None = None,
    labels: Sequence[str] | None = None,
    reference: Path | None = None,
    data: Iterable[tuple[Tensor, Tensor]] | None = None,
    progress: Callable[[int, str], None] = lambda done, note: None,
) -> Verification:
    """Check `file` against `model` and time it; latency only where parity holds.

    stock     name and arguments for timm.create_model, of the architecture that was never grown
    progress  told how many of the `timing_steps` are done, and which comes next

    The other arguments are those of check_parity.

    Raises:
        GrowkitError: a missing file, a provider that does not run here, unreadable reference data.
    """
    if settings.throughput_batch is not None and settings.throughput_batch < 1:
        raise GrowkitError(f"--throughput-batch {settings.throughput_batch}: expected 1 or more")
    parity = check_parity(
        model,
        file,
        provider=settings.provider,
        max_batch=settings.max_batch,
        seed=settings.seed,
        weights_sha256=weights_sha256,
        labels=list(labels) if labels is not None else None,
        reference=reference,
        data=data,
    )
    facts = environment()
    chosen, placed = "", None
    if parity.figures:  # it opens
        opened = open_session(file, provider=settings.provider)
        chosen, placed, facts = opened.note, assignment(opened), environment(opened)
        del opened
    latency = throughput = None
    if settings.latency and parity.passed:
        latency = measure_latency(
            model,
            file,
            stock=stock,
            provider=parity.provider,
            batches=batches_timed(settings),
            seconds=settings.latency_seconds,
            margin=settings.latency_margin,
            max_ratio=settings.max_latency_ratio,
            compiled=settings.compiled,
            seed=settings.seed,
            progress=progress,
        )
        before = comparisons_made(settings)
        if batches := throughput_batches(settings):
            throughput = measure_throughput(
                model,
                file,
                provider=parity.provider,
                batches=batches,
                seconds=settings.throughput_seconds,
                seed=settings.seed,
                progress=lambda done, note: progress(before + done, note),
            )
    checks = (*([provider_check(placed)] if placed else []), *parity.checks, *(latency.checks if latency else ()))
    verdicts = {c.verdict for c in checks}
    verdict: Verdict = "fail" if "fail" in verdicts else "inconclusive" if "inconclusive" in verdicts else "pass"
    report = {
        "schema": 1,
        "verdict": verdict,
        "onnx_sha256": sha256_of(file),
        "weights_sha256": weights_sha256,
        "provider": {
            "requested": settings.provider,
            "used": parity.provider,
            "note": chosen,
            "nodes": placed.nodes if placed else {},
            "fallen_back": [asdict(node) for node in placed.fallen_back] if placed else [],
        },
        "settings": asdict(settings),
        "environment": facts,
        "checks": [asdict(c) for c in checks],
        "numerics": parity.figures,
        "latency": asdict(latency) if latency else None,
        "throughput": asdict(throughput) if throughput else None,
    }
    return Verification(checks, parity, latency, throughput, placed, verdict, plain(report))


def provider_check(placed: Assignment) -> Check:
    """Fails when no node at all runs on the provider that was asked for."""
    running = placed.nodes.get(placed.provider, 0)
    return check("provider", f"nodes on {placed.provider}", running > 0, running, "1 or more", placed.line)


def batches_timed(settings: VerifySettings) -> tuple[int, ...]:
    """The batch sizes that latency is measured at."""
    return tuple(sorted({1, settings.max_batch}))


def comparisons_made(settings: VerifySettings) -> int:
    """How many latency comparisons there are."""
    return (3 + settings.compiled) * len(batches_timed(settings))


def throughput_batches(settings: VerifySettings) -> tuple[int, ...]:
    """The batch sizes that images per second are measured at; none when they are left out."""
    if settings.throughput_seconds <= 0:
        return ()
    return batches_up_to(settings.throughput_batch or settings.max_batch)


def timing_steps(settings: VerifySettings) -> int:
    """Total of what verify_onnx reports as progress."""
    return comparisons_made(settings) + len(throughput_batches(settings))
