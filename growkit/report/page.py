"""Reports as one HTML page that needs nothing else: no network, no script, no other file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from growkit import __version__
from growkit.files import whole_file
from growkit.report.plot import Bars, Plot, draw, scientific


@dataclass(frozen=True)
class Table:
    """Text and numbers. Columns after the first are set right when they hold a number."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True)
class Section:
    """A heading with text (one paragraph a line), a table and plots; each may be absent."""

    title: str
    text: str = ""
    table: Table | None = None
    plots: Sequence[Plot | Bars] = ()


@dataclass(frozen=True)
class Report:
    """What a page shows: a title, lines that sum it up, and sections."""

    title: str
    summary: Sequence[str]
    sections: Sequence[Section]


STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5a6675; --rule: #d9dee5; --grid: #e6eaef;
  --paper: #ffffff; --band: #f4f6f9; --line-0: #0b62c4; --line-1: #b84a00; --line-2: #00775a;
  --line-3: #9a3d86; --line-4: #6b5d00; --line-5: #4a5568; }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #e5e9ef; --soft: #a3aebc;
  --rule: #38424f; --grid: #2a333e; --paper: #14191f; --band: #1c232b; --line-0: #6cb1ff;
  --line-1: #ff9a5c; --line-2: #4fd1ab; --line-3: #e59ad2; --line-4: #d9c44f; --line-5: #b4bfcc; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1rem; letter-spacing: -0.01em; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 0 0 0.5rem; }
section { border-top: 1px solid var(--rule); margin-top: 2.5rem; padding-top: 1.5rem; }
p { margin: 0 0 0.4rem; max-width: 48rem; }
section > p, footer, .empty { color: var(--soft); font-size: 0.93rem; }
.scroll { overflow-x: auto; margin: 1rem 0 0; }
table { border-collapse: collapse; font-size: 0.93rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
th, td { text-align: left; vertical-align: top; padding: 0.4rem 1.75rem 0.4rem 0.6rem; }
th { color: var(--soft); font-weight: 600; border-bottom: 1px solid var(--soft); }
td { border-bottom: 1px solid var(--rule); max-width: 30rem; }
tbody tr:nth-child(even) { background: var(--band); }
th.number, td.number { text-align: right; padding: 0.4rem 0.6rem 0.4rem 1.75rem; }
td.number { white-space: nowrap; }
.plots { display: grid; gap: 1.5rem 2rem; margin-top: 1.25rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
figure { margin: 0; max-width: 40rem; }
figcaption { font-weight: 600; font-size: 0.93rem; margin-bottom: 0.5rem; }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif;
  font-variant-numeric: tabular-nums; }
footer { margin-top: 3rem; }
@media print { @page { margin: 16mm; } body { max-width: none; padding: 0; font-size: 10.5pt; }
  section { margin-top: 1.5rem; padding-top: 1rem; } .scroll { overflow: visible; }
  figure, tr, h2 { break-inside: avoid; } h2 { break-after: avoid; } }
"""


def write_report(path: Path, report: Report) -> None:
    """Write `report` to `path` as one HTML page, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(render(report), encoding="utf-8")


def render(report: Report) -> str:
    """The page. All text is escaped, and a browser is told to load and run nothing."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(report.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            f"<header>\n<h1>{escape(report.title)}</h1>",
            *(f"<p>{escape(line)}</p>" for line in report.summary),
            "</header>\n<main>",
            *(_section(section) for section in report.sections),
            f"</main>\n<footer>growkit {__version__}</footer>\n</body>\n</html>\n",
        ]
    )


def cell(value: object) -> str:
    """A value as a reader wants it: four digits, thousands apart, yes and no; not yet escaped."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"
    return scientific(value, 2)


def _section(section: Section) -> str:
    parts = [f"<section>\n<h2>{escape(section.title)}</h2>"]
    parts += [f"<p>{escape(line)}</p>" for line in section.text.splitlines() if line.strip()]
    if section.table is not None and section.table.rows:
        parts.append(_table(section.table))
    if section.plots:
        figures = (
            f"<figure><figcaption>{escape(plot.title)}</figcaption>{draw(plot)}</figure>" for plot in section.plots
        )
        parts.append("\n".join(['<div class="plots">', *figures, "</div>"]))
    return "\n".join([*parts, "</section>"])


def _table(table: Table) -> str:
    numeric = [
        index > 0 and any(isinstance(row[index], int | float) for row in table.rows)
        for index in range(len(table.columns))
    ]

    def line(tag: str, texts: Sequence[str]) -> str:
        cells = (
            f"<{tag} class={'number' if right else 'text'}>{escape(text)}</{tag}>"
            for text, right in zip(texts, numeric, strict=True)
        )
        return f"<tr>{''.join(cells)}</tr>"

    rows = "\n".join(line("td", [cell(value) for value in row]) for row in table.rows)
    head = line("th", table.columns)
    return f'<div class="scroll"><table>\n<thead>{head}</thead>\n<tbody>\n{rows}\n</tbody></table></div>'
