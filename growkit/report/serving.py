"""ONNX parity and latency as sections of a page."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from growkit.report.facts import Facts, Step, formatted, mapping, number, rows, words
from growkit.report.growth import earlier_line
from growkit.report.page import Mark, Section, Table, cell
from growkit.report.plot import LONG, Bar, Bars, Chart, Dots
from growkit.report.steps import figures_table
from growkit.text import clipped, counted

GROUPS = {  # the known groups of checks, as statements for a reader
    "structure": "The ONNX file is well formed",
    "weights": "It holds the model's weights",
    "numbers": "It gives the model's numbers",
    "predictions": "It gives the model's answers",
    "pixels": "It prepares pictures as the model was trained",
    "answers": "Its answers follow from its logits",
    "pictures": "It agrees on your own pictures",
    "accuracy": "It scores like the model",
    "data sets": "It reproduces its reference data",
    "reference": "It answers as when it was accepted",
    "provider": "It runs where it was asked to",
    "latency": "It is as fast as its architecture allows",
}
TOLD = {"comparisons", "checks", "provider", "threads"}  # parts of the latency report shown elsewhere


def group_name(group: str) -> str:
    """A group of checks as a statement for a reader; an unknown group goes by its own name."""
    return GROUPS.get(group, words(group).capitalize())


def checks_of(content: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Checks by group, in the order they were made."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for one in rows(content.get("checks")):
        found.setdefault(str(one.get("group", "checks")), []).append(one)
    return found


def mark_of(checks: Iterable[Mapping[str, Any]]) -> Mark:
    """The worst verdict of several checks; an unknown verdict counts as inconclusive."""
    verdicts = {str(one.get("verdict")) for one in checks}
    return Mark("fail" if "fail" in verdicts else "pass" if verdicts <= {"pass"} else "inconclusive")


def checked(facts: Facts) -> Mapping[str, Any]:
    """The record that holds the checks: the verification, else the export's own."""
    return facts.verify if rows(facts.verify.get("checks")) else mapping(facts.export.get("parity"))


def parity_section(facts: Facts) -> Section:
    """Whether the ONNX file answers like the PyTorch model."""
    content = checked(facts)
    groups = {group: checks for group, checks in checks_of(content).items() if group != "latency"}
    if not groups:
        missing = "No ONNX file was written: `growkit export --onnx` writes one."
        if facts.here or facts.elsewhere:
            missing = f"{facts.elsewhere or 'model.onnx'} was not verified: `{facts.verify_command}` does it."
        return Section("ONNX parity", missing)
    verified = content is facts.verify
    figures = mapping(content.get("numerics" if verified else "figures"))
    lines = []
    if facts.export:
        size = number(facts.export.get("bytes"))
        large = f"{size / 1e6:.1f} MB, " if size else ""
        precision = mapping(facts.export.get("form")).get("precision")
        kind = f"{precision}, " if precision else ""
        lines.append(f"model.onnx: {kind}{large}opset {facts.export.get('opset')}, IR {facts.export.get('ir')}.")
    if not verified:
        lines.append(f"These are the export's own checks; `{facts.verify_command}` makes more, with data and times.")
    elif facts.elsewhere:
        lines.append(f"Verified was {facts.verify.get('onnx')}.")
    lines += _numbers(figures, groups)
    # comparisons of a model or file alone with a reference have other checks
    steps = tuple(filter(_is_whole, facts.all("verify"))) if verified else facts.all("export")
    sha256 = content.get("onnx_sha256") if verified else facts.export.get("sha256")
    # other files may have been exported and verified since; without the step of this one nothing is claimed
    shown = next((step for step in reversed(steps) if step.hashes.get("model.onnx") == sha256), None)
    lines += earlier_line(steps, shown) if shown else []
    parts = [_group(group, checks) for group, checks in groups.items()]
    return Section("ONNX parity", "\n".join(lines), _batches(mapping(figures.get("batches"))), parts=parts)


def _numbers(figures: Mapping[str, Any], groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """How far the file's numbers and answers are from the model's, beside what is allowed."""
    lines = []
    relative = (number(mapping(one).get("relative_rms")) for one in mapping(figures.get("batches")).values())
    if known := [one for one in relative if one is not None]:
        allowed = _allowed(groups, "relative RMS error")
        lines.append(f"Its numbers differ from the float64 model by {max(known):.1e} of their spread{allowed}.")
    ratio = number(figures.get("noise_ratio"))
    if ratio is not None:
        allowed = _allowed(groups, "error / PyTorch's own")
        lines.append(f"That is {ratio:.2f} times PyTorch's own error in the file's precision{allowed}.")
    if accuracy := mapping(figures.get("accuracy")):
        lines.append(
            f"On {cell(accuracy.get('samples'))} labelled images it turned {cell(accuracy.get('n01'))} answers right "
            f"and {cell(accuracy.get('n10'))} wrong against PyTorch."
        )
    return lines


def _is_whole(step: Step) -> bool:
    """Whether this verification compared a file with its model."""
    return bool(step.options.get("model")) and bool(step.options.get("onnx"))


def _allowed(groups: Mapping[str, Sequence[Mapping[str, Any]]], name: str) -> str:
    """The limit of the checks of that name, as the end of a sentence."""
    limits = [one.get("limit") for one in groups.get("numbers", ()) if str(one.get("name")).endswith(name)]
    limit = number(limits[0]) if limits else None
    return f", allowed {limit:.3g}" if limit is not None else ""


def _batches(batches: Mapping[str, Any]) -> Table | None:
    """The error at each batch size."""
    body = []
    for batch, figures in batches.items():
        errors = (formatted(mapping(figures).get(key), ".1e") for key in ("relative_rms", "largest_over_std"))
        body.append((str(batch), *errors))
    return Table(("batch", "relative error", "largest difference / spread"), body) if body else None


def _group(group: str, checks: Sequence[Mapping[str, Any]]) -> Section:
    """Checks of one group; folded where all passed."""
    mark = mark_of(checks)
    body = [
        (one.get("name"), Mark(str(one.get("verdict"))), _short(one, "measured"), _short(one, "limit"))
        for one in checks
    ]
    lines = [str(one.get("line")) for one in checks if one.get("verdict") != "pass"]
    return Section(
        f"{group_name(group)}: {mark} ({counted(len(checks), 'check')})",
        "\n".join(lines),
        Table(("check", "verdict", "measured", "allowed"), body),
        folded=mark == "pass",
    )


def _short(check: Mapping[str, Any], key: str) -> str:
    """A number with three digits; long text is clipped, since its check's line quotes it in full."""
    value = number(check.get(key))
    text = f"{value:.3g}" if value is not None else str(check.get(key))
    return clipped(text, 40)


def latency_section(facts: Facts) -> Section:
    """Whether the file is as fast as its architecture allows: ratios with intervals, then milliseconds."""
    timed = mapping(facts.verify.get("latency"))
    compared = rows(timed.get("comparisons"))
    if not compared:
        return Section("Latency", f"Not measured: `{facts.verify_command}` does it once the answers are right.")
    threads = number(timed.get("threads"))
    where = str(timed.get("provider")) + (f", {counted(threads, 'thread')}" if threads is not None else "")
    lines = [
        f"On {where}: time of the file / time of what it is compared with, timed in turns; below 1 the file is faster.",
        "The ratio against itself shows how small a difference this machine can resolve; bars are 95 % intervals.",
    ]
    names = [f"batch {cell(one.get('batch'))}, {one.get('baseline')}" for one in compared]
    ratios = [
        Bar(name, number(one.get("ratio")), number(one.get("low")), number(one.get("high")))
        for name, one in zip(names, compared, strict=True)
    ]
    plots: list[Chart] = [
        Dots("Time of the file against others", ratios, "ratio of times", ("as fast", 1.0)),
        Bars("Time per call, median", _medians(compared), "ms"),
    ]
    parts = [Section("Times in ms", table=_times(compared), folded=True), *_throughput(facts)]
    checks = checks_of(facts.verify).get("latency")
    if checks:
        parts.insert(0, _group("latency", checks))
    more = {key: value for key, value in timed.items() if value and key not in TOLD}
    if more:
        parts.append(Section("Further figures", table=figures_table(more)))
    return Section("Latency", "\n".join(lines), plots=plots, parts=parts)


def _medians(compared: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """One bar for the median time of each thing that was timed, by batch size."""
    found: dict[str, tuple[float, Bar]] = {}  # with the batch to sort by
    for one in compared:
        batch = number(one.get("batch"))
        for side in ("subject", "baseline"):
            name = f"batch {cell(one.get('batch'))}, {one.get(side)}"
            median = number(mapping(one.get(f"{side}_ms")).get("p50"))
            if one.get(side) != "itself" and median is not None:
                found.setdefault(name, (math.inf if batch is None else batch, Bar(name, median)))
    return [bar for _, bar in sorted(found.values(), key=lambda entry: entry[0])]  # stable within a batch


def _throughput(facts: Facts) -> list[Section]:
    """Images per second by batch size, and how much of the machine that is."""
    measured = mapping(facts.verify.get("throughput"))
    body = []
    for one in rows(measured.get("rates")):
        milliseconds = mapping(one.get("ms"))
        body.append(
            (
                cell(one.get("batch")),
                *(_digits(one.get(key)) for key in ("images_per_second", "gflops")),
                formatted(one.get("share"), ".0%"),
                *(_digits(milliseconds.get(key)) for key in ("p50", "p90", "p99")),
            )
        )
    if not body:
        return []
    size, foreign = cell(measured.get("peak_size")), number(measured.get("foreign"))
    peak = _digits(measured.get("peak_gflops"))
    text = f"The peak is {peak} GFLOP/s, of one float32 product of {size} x {size} matrices."
    if foreign is not None and measured.get("contended") is True:
        text += f" Other programs took {foreign:.0%} of the processors meanwhile."
    columns = ("batch", "images/s", "GFLOP/s", "of the peak", "p50 ms", "p90", "p99")
    return [Section("Throughput, as a server runs it", text, Table(columns, body))]


def _times(compared: Sequence[Mapping[str, Any]]) -> Table:
    """One row per comparison."""
    body = []
    for one in compared:
        own, other = mapping(one.get("subject_ms")), mapping(one.get("baseline_ms"))
        ratio, low, high = (_digits(one.get(key)) for key in ("ratio", "low", "high"))
        body.append(
            (
                f"{one.get('subject')} / {one.get('baseline')}",
                cell(one.get("batch")),
                f"{ratio} [{low}, {high}]",
                *(_digits(own.get(key)) for key in ("p50", "p90", "p99")),
                *(_digits(other.get(key)) for key in ("p50", "p90", "p99")),
                *(_digits(one.get(key)) for key in ("dropped", "foreign")),
            )
        )
    columns = ("compared", "batch", "ratio [95 %]", "p50", "p90", "p99", "its p50", "its p90", "its p99")
    return Table((*columns, "dropped", "foreign"), body)


def _digits(value: object) -> str:
    """Three digits, or all before the point up to a million; a dash if there is no number."""
    return formatted(value, ",.0f" if 999.5 <= abs(number(value) or 0) < LONG else ".3g")
