"""The gate: parity, reference data, accuracy and latency of an ONNX file, and one verdict."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from growkit.deploy.checks import Check, Verdict, plain
from growkit.deploy.latency import Latency, measure_latency
from growkit.deploy.parity import Parity, check_parity
from growkit.deploy.runtime import environment, open_session
from growkit.deploy.settings import VerifySettings
from growkit.files import sha256_of


@dataclass(frozen=True)
class Verification:
    """Everything that was checked; `report` is what report.json holds."""

    checks: tuple[Check, ...]
    parity: Parity
    latency: Latency | None
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
    progress  told how many comparisons are done, three per batch size of batches_timed

    The other arguments are those of check_parity.

    Raises:
        GrowkitError: a missing file, a provider that does not run here, unreadable reference data.
    """
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
    latency = None
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
            seed=settings.seed,
            progress=progress,
        )
    checks = (*parity.checks, *(latency.checks if latency else ()))
    verdicts = {c.verdict for c in checks}
    verdict: Verdict = "fail" if "fail" in verdicts else "inconclusive" if "inconclusive" in verdicts else "pass"
    opened = open_session(file, provider=parity.provider) if parity.figures else None
    report = {
        "schema": 1,
        "verdict": verdict,
        "onnx_sha256": sha256_of(file),
        "weights_sha256": weights_sha256,
        "provider": {"requested": settings.provider, "used": parity.provider},
        "settings": asdict(settings),
        "environment": environment(opened),
        "checks": [asdict(c) for c in checks],
        "numerics": parity.figures,
        "latency": asdict(latency) if latency else None,
    }
    return Verification(checks, parity, latency, verdict, plain(report))


def batches_timed(settings: VerifySettings) -> tuple[int, ...]:
    """The batch sizes that latency is measured at."""
    return tuple(sorted({1, settings.max_batch}))
