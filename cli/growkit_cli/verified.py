"""What a verification found, as a terminal shows it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from growkit.text import counted
from growkit_cli.console import Console

LINES = 5  # findings printed per group

if TYPE_CHECKING:
    from pathlib import Path

    from growkit.deploy.checks import Check
    from growkit.deploy.latency import Latency
    from growkit.deploy.throughput import Throughput
    from growkit.deploy.verify import Verification


def show(console: Console, verified: "Verification") -> None:
    """Print a summary of the checks and the times as tables, failures as lines, and the verdict last."""
    if verified.report["provider"]["note"]:
        console.say(verified.report["provider"]["note"])
    by_group = {group: [c for c in verified.checks if c.group == group] for group in (c.group for c in verified.checks)}
    console.table(
        f"{counted(len(verified.checks), 'check')}; the JSON file in or below RUN/verify has each",
        ("of", "passed", "nearest to what is allowed"),
        [
            (group, f"{sum(c.verdict == 'pass' for c in checks)} of {len(checks)}", _nearest(checks))
            for group, checks in by_group.items()
        ],
    )
    if verified.latency:
        _show_latency(console, verified.latency)
    if verified.throughput:
        _show_throughput(console, verified.throughput)
    if verified.assignment and verified.assignment.fallen_back:
        console.say(f"warning: {verified.assignment.line}")
    numerics = verified.report["numerics"] or {}
    if accuracy := numerics.get("accuracy"):
        console.say(
            f"top-1 {accuracy['top1']:.2%}, PyTorch's {accuracy['torch_top1']:.2%}, on {accuracy['samples']:,} images"
        )
    for group, checks in by_group.items():
        # the diagnosed cause comes before its consequences
        noes = sorted((c for c in checks if c.verdict != "pass"), key=lambda c: c.line != numerics.get("diagnosis"))
        for c in noes[:LINES]:
            console.say(f"{'FAILED' if c.verdict == 'fail' else 'warning:'} {c.group}: {c.line}")
        if noes[LINES:]:
            console.say(f"{group}: {len(noes) - LINES} more like these are in the report")
    untimed = verified.report["settings"]["latency"] and verified.parity and not verified.latency
    if untimed and verified.verdict == "fail":
        console.say("latency was not measured: the answers come first")
    console.say(f"verdict: {verified.verdict}")


def _show_latency(console: Console, latency: "Latency") -> None:
    console.table(
        f"times in ms on {latency.provider}, {counted(latency.threads, 'thread')}",
        ("file against", "batch", "ratio", "low", "high", "p50", "p99", "its p50"),
        [
            (
                c.baseline,
                c.batch,
                *(f"{ratio:.3f}" for ratio in (c.ratio, c.low, c.high)),
                *(f"{ms:.4g}" for ms in (c.subject_ms.p50, c.subject_ms.p99, c.baseline_ms.p50)),
            )
            for c in latency.comparisons
        ],
    )
    for batch, seconds in latency.compile_seconds.items():
        console.say(f"compiling PyTorch at batch {batch} took {seconds:.1f} s, not included in the times")
    for note in latency.notes:
        console.say(f"warning: {note}")


def _show_throughput(console: Console, throughput: "Throughput") -> None:
    console.table(
        f"throughput on {throughput.provider}, {counted(throughput.threads, 'thread')}, "
        "spinning, as is ONNX Runtime's default",
        ("batch", "images/s", "p50 ms", "p90", "p99", "GFLOP/s", "of peak"),
        [
            (
                rate.batch,
                *(f"{value:.4g}" for value in (rate.images_per_second, rate.ms.p50, rate.ms.p90, rate.ms.p99)),
                f"{rate.gflops:.3g}",
                f"{rate.share:.0%}",
            )
            for rate in throughput.rates
        ],
    )
    console.say(throughput.line)


def not_written(reference: "Path | None", verified: "Verification") -> str:
    """Say in a line why what was verified did not become the reference."""
    (why, *more) = sorted((c for c in verified.checks if c.verdict != "pass"), key=lambda c: c.verdict != "fail")
    others = f", and {len(more)} more" if more else ""
    return (
        f"{reference} was not written: only what passes becomes a reference, and this is "
        f"{'wrong' if why.verdict == 'fail' else 'inconclusive'} ({why.group}: {why.line}{others})"
    )


def _nearest(checks: "Sequence[Check]") -> str:
    """The numeric check that passed closest to its limit."""
    from growkit.deploy.checks import shown

    shares = [
        (c.measured / c.limit, c)
        for c in checks
        if c.verdict == "pass" and not isinstance(c.measured, str) and not isinstance(c.limit, str)
        if 0 <= c.measured <= c.limit and c.limit > 0  # the limit of a cosine is a minimum
    ]
    if not shares:
        return ""
    _, nearest = max(shares, key=lambda one: one[0])
    return f"{nearest.name}: {shown(nearest.measured)} of {shown(nearest.limit)}"
