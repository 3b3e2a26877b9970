"""The steps of a record as recorded, whatever they are called: options, figures, curves, machines, hashes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from growkit.report.facts import Step, mapping, number, words
from growkit.report.page import Section, Table, cell
from growkit.report.plot import Plot, Series

CLOCKS = ("step", "epoch", "images", "flops", "seconds")  # possible x axes of a curve, best first
LOSSES = ("loss",)
SCORES = ("score", "accuracy", "top1", "top5", "top-1", "top-5")
LISTED = 8  # items of a list shown in a cell


def step_sections(step: Step, *, figures: bool = True) -> list[Section]:
    """A step's finishing time, options, figures and curves, and a section for each other list of rows."""
    first, *others = figure_sections(step.name, step.figures if figures else {})
    lines = [f"Finished {step.finished}."] if step.finished else []
    options = [
        f"{words(key)} {cell(value) if isinstance(value, bool) else _item(value)}"
        for key, value in _flat(step.options)
        if value is not None and value not in ("", [], {})
    ]
    if options:
        lines.append(f"Options: {', '.join(options)}.")
    return [Section(first.title, "\n".join(lines), first.table, first.plots), *others]


def figure_sections(title: str, figures: Mapping[str, Any]) -> list[Section]:
    """Any figures: a table of single values with the curves as plots, then a section for each other list of rows."""
    single, tables, plots = [], [], []
    for key, value in _flat(figures):
        rows = _rows(value)
        if rows is None:
            single.append((key, _item(value)))
        elif (charts := _charts(key, rows)) is not None:
            plots += charts
        else:
            tables.append(Section(f"{title}: {key}", table=rows_table(rows)))
    return [Section(title, "", Table(("Figure", "Value"), single) if single else None, plots), *tables]


def rows_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows with different keys as one table."""
    flat = [dict(_flat(row)) for row in rows]
    columns = list(dict.fromkeys(column for row in flat for column in row))
    return Table(
        [words(column) for column in columns], [[_item(row.get(column)) for column in columns] for row in flat]
    )


def machines(steps: Sequence[Step]) -> Table:
    """Versions and hardware: one column for all steps, or one for each step that differs."""
    found: list[tuple[list[str], dict[str, str]]] = []
    for step in steps:
        parts = (mapping(step.content.get("hardware")), mapping(step.content.get("versions")))
        machine = {key: cell(_item(value)) for part in parts for key, value in _flat(part)}
        if found and found[-1][1] == machine:
            found[-1][0].append(step.name)
        else:
            found.append(([step.name], machine))
    keys = list(dict.fromkeys(key for _, machine in found for key in machine))
    columns = [_span(of) if found[1:] else "All steps" for of, _ in found]
    return Table(("", *columns), [(words(key), *(machine.get(key) for _, machine in found)) for key in keys])


def hashes(steps: Sequence[Step]) -> Table:
    """SHA-256 of what each step read and wrote."""
    return Table(
        ("Step", "File", "SHA-256"),
        [(step.name, file, value) for step in steps for file, value in step.hashes.items() if value],
    )


def _span(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def _flat(figures: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, Any]]:
    """Nested figures by their path: {'parity': {'max': 1}} gives 'parity: max'."""
    for key, value in figures.items():
        path = f"{above}: {words(key)}" if above else words(key)
        if isinstance(value, Mapping) and value:
            yield from _flat(value, path)
        else:
            yield path, value


def _item(value: object) -> object:
    """The content of one cell; of a list its first items."""
    if isinstance(value, list | tuple):
        more = f", … ({len(value)} in all)" if len(value) > LISTED else ""
        return ", ".join(map(cell, value[:LISTED])) + more
    return None if value == {} else value


def _rows(value: object) -> list[Mapping[str, Any]] | None:
    """`value` as rows if it is a list of mappings."""
    if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
        return value
    return None


def _charts(key: str, rows: Sequence[Mapping[str, Any]]) -> list[Plot] | None:
    """Charts of losses and of scores, else of every number; None if the rows are not a curve."""
    clock = next((clock for clock in CLOCKS if _runs(rows, clock)), None)
    if clock is None:
        return None
    columns = list(dict.fromkeys(column for row in rows for column in row))
    losses = [column for column in columns if str(column).endswith(LOSSES)]
    scores = [column for column in columns if str(column).endswith(SCORES)]
    others = [[column] for column in columns if column not in CLOCKS]
    charts = []
    for group in [losses, scores] if losses or scores else others:
        series = [Series(words(column), points(rows, clock, column)) for column in group]
        series = [line for line in series if line.points]
        if series:
            label = series[0].name if len(series) == 1 else "loss" if group is losses else "score"
            charts.append(Plot(f"{key}: {label}", series, words(clock), label))
    return charts or None


def _runs(rows: Sequence[Mapping[str, Any]], clock: str) -> bool:
    """Whether the rows have this clock, and it never decreases."""
    read = [at for row in rows if (at := number(row.get(clock))) is not None]
    return bool(read) and read == sorted(read)


def points(rows: Iterable[Mapping[str, Any]], x: str, y: str, scale: float = 1) -> list[tuple[float, float]]:
    """(x, scale y) of the rows that have both."""
    pairs = ((number(row.get(x)), number(row.get(y))) for row in rows)
    return [(at, scale * value) for at, value in pairs if at is not None and value is not None]
