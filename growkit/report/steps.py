"""The steps of a record as recorded, whatever they are called: options, machines, hashes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from growkit.report.facts import Step, mapping, number, words
from growkit.report.page import Section, Table, cell

LISTED = 8  # items of a list shown in a cell


def step_section(step: Step) -> Section:
    """A step's finishing time and options; its figures have sections of their own."""
    lines = [f"Finished {step.finished}."] if step.finished else []
    options = [
        f"{words(key)} {cell(value) if isinstance(value, bool) else _item(value)}"
        for key, value in _flat(step.options)
        if value is not None and value not in ("", [], {})
    ]
    if options:
        lines.append(f"Options: {', '.join(options)}.")
    return Section(step.name, "\n".join(lines))


def figures_table(figures: Mapping[str, Any]) -> Table:
    """Any figures, one row each."""
    return Table(("Figure", "Value"), [(key, _item(value)) for key, value in _flat(figures)])


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


def points(rows: Iterable[Mapping[str, Any]], x: str, y: str, scale: float = 1) -> list[tuple[float, float]]:
    """(x, scale y) of the rows that have both."""
    pairs = ((number(row.get(x)), number(row.get(y))) for row in rows)
    return [(at, scale * value) for at, value in pairs if at is not None and value is not None]
