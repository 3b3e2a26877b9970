"""The report of a run, from its record.json alone."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from growkit.record import RunFolder
from growkit.report.page import Report, Section, Table, cell
from growkit.report.plot import Plot, Series

CLOCKS = ("step", "epoch", "images", "flops", "seconds")  # what a curve may run along, best first
LOSSES = ("loss",)
SCORES = ("score", "accuracy", "top1", "top5", "top-1", "top-5")
LISTED = 8  # items of a list shown in a cell
CLASSES, WORST, BEST = 20, 10, 5  # classes shown in full; of more, those that changed most


def run_report(run: RunFolder) -> Report:
    """One section per step of the run, then what it ran on and the hashes of its files.

    Raises:
        GrowkitError: record.json is not a record.
    """
    steps = run.steps()
    names = [f"{index}. {_command(step)}" for index, step in enumerate(steps, 1)]
    sections = [section for name, step in zip(names, steps, strict=True) for section in _step(name, step)]
    hashes = [
        (name, file, value)
        for name, step in zip(names, steps, strict=True)
        for file, value in _mapping(step.get("hashes")).items()
    ]
    if steps:
        sections.append(_machines(names, steps))
    if hashes:
        sections.append(Section("Files", table=Table(("Step", "File", "SHA-256"), hashes)))
    return Report(f"growkit run {run.path.name}", _summary(steps), sections)


def _summary(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    if not steps:
        return ["No steps yet."]
    commands = ", ".join(map(_command, steps))
    lines = [f"{len(steps)} {'step' if len(steps) == 1 else 'steps'}: {commands}."]
    finished = [_moment(step) for step in steps if step.get("finished")]
    if finished:
        lines.append(f"Last step finished {finished[-1]}.")
    return lines


def _command(step: Mapping[str, Any]) -> str:
    return str(step.get("command", "unnamed step"))


def _moment(step: Mapping[str, Any]) -> str:
    return str(step["finished"]).replace("T", " ").replace("+00:00", " UTC")


def _step(name: str, step: Mapping[str, Any]) -> list[Section]:
    """The step's figures and curves, then a section for each list of rows that is no curve."""
    if step.get("command") == "evaluate":
        try:
            changes = agreement_sections(step["figures"])
        except (AttributeError, KeyError, TypeError, ValueError):
            pass  # an odd record still makes a page, below
        else:
            return [Section(name, _told(step)), *(replace(one, title=f"{name}: {one.title}") for one in changes)]
    figures, tables, plots = [], [], []
    for key, value in _flat(_mapping(step.get("figures"))):
        rows = _rows(value)
        if rows is None:
            figures.append((key, _item(value)))
        elif (charts := _charts(key, rows)) is not None:
            plots += charts
        else:
            columns = list(dict.fromkeys(column for row in rows for column, _ in _flat(row)))
            cells = [[_item(dict(_flat(row)).get(column)) for column in columns] for row in rows]
            titles = [_words(column) for column in columns]
            tables.append(Section(f"{name}: {key}", table=Table(titles, cells)))
    table = Table(("Figure", "Value"), figures) if figures else None
    return [Section(name, _told(step), table, plots), *tables]


def _told(step: Mapping[str, Any]) -> str:
    """When the step finished, and its options."""
    lines = [f"Finished {_moment(step)}."] if step.get("finished") else []
    options = [
        f"{_words(key)} {_item(value)}"
        for key, value in _flat(_mapping(step.get("options")))
        if value not in (None, "", [], {})
    ]
    if options:
        lines.append(f"Options: {', '.join(options)}.")
    return "\n".join(lines)


def agreement_sections(figures: Mapping[str, Any]) -> list[Section]:
    """What changed from a source to its model: scores, predictions, classes; `figures` is an Agreement as a dict.

    Of more than 20 classes only the 10 with the worst change and the 5 with the best are shown, and the text says so.
    """
    source, model, classes = figures["source_scores"], figures["model_scores"], figures["classes"]
    scores = [
        *(
            (name, f"{source[key]:.2%}", f"{model[key]:.2%}", _points(model[key] - source[key]))
            for name, key in (("top-1", "top1"), ("top-5", "top5"))
        ),
        *(
            (name, f"{source[key]:.4f}", f"{model[key]:.4f}", f"{model[key] - source[key]:+.4f}")
            for name, key in (("loss", "loss"), ("calibration error (ECE)", "ece"))
        ),
    ]
    predictions = [
        (name, f"{figures[key]['count']:,}", f"{figures[key]['share']:.2%}")
        for name, key in (
            ("the same class", "agreement"),
            ("both right", "both_right"),
            ("turned right", "turned_right"),
            ("turned wrong", "turned_wrong"),
            ("both wrong", "both_wrong"),
            ("both wrong, from one class to another", "changed_wrong"),
        )
    ]
    ranked = sorted(classes, key=lambda one: (one["change"], -one["turned_wrong"]))
    some = len(ranked) > CLASSES
    rows = [
        (
            one["name"],
            f"{one['images']:,}",
            f"{one['source']:.2%}",
            f"{one['model']:.2%}",
            _points(one["change"]),
            f"{one['turned_wrong']:,}",
            f"{one['turned_right']:,}",
        )
        for one in ([*ranked[:WORST], *ranked[-BEST:]] if some else ranked)
    ]
    wrong, right = figures["turned_wrong"]["count"], figures["turned_right"]["count"]
    verdict = f"{wrong:,} turned wrong and {right:,} turned right: exact McNemar p = {figures['mcnemar_p']:.2g}."
    meaning = "p is how likely so uneven a split is, or a more uneven one, where both ways are equally likely."
    shown = f"The {WORST} classes with the worst change and the {BEST} with the best, of {len(ranked):,}."
    return [
        Section(f"{source['count']:,} validation images", table=Table(("score", "source", "model", "change"), scores)),
        Section("predictions", f"{verdict}\n{meaning}", Table(("prediction", "images", "share"), predictions)),
        Section(
            "classes, worst change first",
            shown if some else "",
            Table(("class", "images", "source", "model", "change", "turned wrong", "turned right"), rows),
        ),
    ]


def _points(change: float) -> str:
    """A difference of two shares in percentage points."""
    return f"{100 * change:+.2f} points"


def _machines(names: Sequence[str], steps: Sequence[Mapping[str, Any]]) -> Section:
    """Versions and hardware: one column for all steps, or one for each step that differs."""
    machines: list[tuple[list[str], dict[str, object]]] = []
    for name, step in zip(names, steps, strict=True):
        parts = (_mapping(step.get("hardware")), _mapping(step.get("versions")))
        machine = {key: _item(value) for part in parts for key, value in _flat(part)}
        if machines and machines[-1][1] == machine:
            machines[-1][0].append(name)
        else:
            machines.append(([name], machine))
    keys = list(dict.fromkeys(key for _, machine in machines for key in machine))
    rows = [(_words(key), *(machine.get(key) for _, machine in machines)) for key in keys]
    columns = [_span(of) if machines[1:] else "All steps" for of, _ in machines]
    return Section("Machine and versions", table=Table(("", *columns), rows))


def _span(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _flat(figures: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, Any]]:
    """Nested figures by their path: {'parity': {'max': 1}} gives 'parity: max'."""
    for key, value in figures.items():
        path = f"{above}: {_words(key)}" if above else _words(key)
        if isinstance(value, Mapping) and value:
            yield from _flat(value, path)
        else:
            yield path, value


def _words(key: object) -> str:
    return str(key).replace("_", " ")


def _item(value: object) -> object:
    """What one cell shows; a list becomes its first items."""
    if isinstance(value, list | tuple):
        more = f", … ({len(value)} in all)" if len(value) > LISTED else ""
        return ", ".join(map(cell, value[:LISTED])) + more
    return None if value == {} else value


def _rows(value: object) -> list[Mapping[str, Any]] | None:
    """`value` as rows when it is a list of mappings."""
    if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
        return value
    return None


def _charts(key: str, rows: Sequence[Mapping[str, Any]]) -> list[Plot] | None:
    """Charts of losses and of scores, else of every number; None when the rows are no curve."""
    clock = next((clock for clock in CLOCKS if any(_number(row.get(clock)) for row in rows)), None)
    if clock is None:
        return None
    columns = list(dict.fromkeys(column for row in rows for column in row))
    losses = [column for column in columns if str(column).endswith(LOSSES)]
    scores = [column for column in columns if str(column).endswith(SCORES)]
    others = [[column] for column in columns if column not in CLOCKS]
    charts = []
    for group in [losses, scores] if losses or scores else others:
        series = [
            Series(
                _words(column),
                [
                    (float(row[clock]), float(row[column]))
                    for row in rows
                    if _number(row.get(clock)) and _number(row.get(column))
                ],
            )
            for column in group
        ]
        series = [line for line in series if line.points]
        if series:
            label = series[0].name if len(series) == 1 else "loss" if group is losses else "score"
            charts.append(Plot(f"{key}: {label}", series, _words(clock), label))
    return charts or None


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
