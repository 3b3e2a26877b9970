"""Reports as one self-contained HTML page: no network, no script, no other file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape as escape_markup
from pathlib import Path

from growkit import __version__
from growkit.files import whole_file
from growkit.report.plot import Chart, draw, scientific
from growkit.text import visible

WIDE = 9  # columns above which a table is printed smaller
WORD = 20  # letters above which a printed word may be broken
CONTENTS = 4  # number of sections from which a page lists them
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


class Mark(str):
    """A verdict: pass, fail, inconclusive, not done, or any other word; shown with a sign and a colour."""


SIGNS = {
    "pass": ("✓", "good"),
    "yes": ("✓", "good"),
    "fail": ("✗", "bad"),
    "no": ("✗", "bad"),
    "inconclusive": ("?", "unsure"),
    "not yet": ("?", "unsure"),
    "not done": ("–", "unsure"),
}


@dataclass(frozen=True)
class Table:
    """Text and numbers. Columns after the first are right-aligned if they hold a number."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True)
class Section:
    """A heading with text (one paragraph a line), code, a table, plots and smaller sections; all may be absent.

    A folded part of another section shows only its heading until it is opened, and everything in print.
    """

    title: str
    text: str = ""
    table: Table | None = None
    plots: Sequence[Chart] = ()
    code: Sequence[str] = ()
    parts: Sequence["Section"] = ()
    folded: bool = False


@dataclass(frozen=True)
class Gate:
    """A question, its verdict, and a line that says why."""

    name: str
    mark: Mark
    line: str


@dataclass(frozen=True)
class Report:
    """Content of a page: title, summary lines, sections, a verdict with the gates behind it, and what was left out."""

    title: str
    summary: Sequence[str]
    sections: Sequence[Section]
    verdict: Gate | None = None
    gates: Sequence[Gate] = ()
    left_out: Sequence[str] = ()


STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5a6675; --rule: #d9dee5; --grid: #e6eaef;
  --paper: #ffffff; --band: #f4f6f9; --line-0: #0b62c4; --line-1: #b84a00; --line-2: #00775a;
  --line-3: #9a3d86; --line-4: #6b5d00; --line-5: #4a5568; --good: #1a7040; --bad: #b3261e; --unsure: #8a5a00; }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #e5e9ef; --soft: #a3aebc;
  --rule: #38424f; --grid: #2a333e; --paper: #14191f; --band: #1c232b; --line-0: #6cb1ff;
  --line-1: #ff9a5c; --line-2: #4fd1ab; --line-3: #e59ad2; --line-4: #d9c44f; --line-5: #b4bfcc;
  --good: #5fd08c; --bad: #ff8a80; --unsure: #f0b849; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 60rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1rem; letter-spacing: -0.01em; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 0 0 0.5rem; }
h3 { font-size: 1rem; line-height: 1.4; margin: 0 0 0.3rem; }
section { border-top: 1px solid var(--rule); margin-top: 2.5rem; padding-top: 1.5rem; }
.part { margin-top: 1.5rem; }
p { margin: 0 0 0.4rem; max-width: 48rem; }
section p, footer, .empty { color: var(--soft); font-size: 0.93rem; }
a { color: var(--line-0); }
.verdict { border: 1px solid var(--rule); border-left: 0.4rem solid var(--soft); border-radius: 0.4rem;
  padding: 1rem 1.25rem; margin: 1.5rem 0 0; }
.verdict.good { border-left-color: var(--good); } .verdict.bad { border-left-color: var(--bad); }
.verdict.unsure { border-left-color: var(--unsure); }
.verdict p { margin: 0; } .verdict .answer { font-size: 1.2rem; font-weight: 600; }
.gates { list-style: none; margin: 1rem 0 0; padding: 0; }
.gates li { border-top: 1px solid var(--rule); padding: 0.55rem 0; display: grid; gap: 0 1rem;
  grid-template-columns: 8.5rem 16rem 1fr; }
.gates .line { color: var(--soft); font-size: 0.93rem; }
.mark { font-weight: 600; white-space: nowrap; }
.mark.good { color: var(--good); } .mark.bad { color: var(--bad); } .mark.unsure { color: var(--unsure); }
nav { margin-top: 1.5rem; font-size: 0.93rem; } nav a { display: inline-block; margin: 0.2rem 1rem 0.2rem 0; }
.scroll { overflow-x: auto; margin: 1rem 0 0; }
table { border-collapse: collapse; font-size: 0.93rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
th, td { text-align: left; vertical-align: top; padding: 0.4rem 1.5rem 0.4rem 0.6rem; }
th { color: var(--soft); font-weight: 600; border-bottom: 1px solid var(--soft); }
td { border-bottom: 1px solid var(--rule); max-width: 38rem; }
tbody tr:nth-child(even) { background: var(--band); }
th.number, td.number { text-align: right; padding: 0.4rem 0.6rem 0.4rem 1.5rem; }
td.number { white-space: nowrap; }
pre { margin: 1rem 0 0; padding: 0.7rem 0.9rem; background: var(--band); border-radius: 0.4rem; overflow-x: auto;
  font: 0.85rem/1.5 ui-monospace, Consolas, monospace; }
pre + pre { margin-top: 0.4rem; }
details { margin-top: 1rem; } summary { cursor: pointer; } summary h3 { display: inline; }
.plots { display: grid; gap: 1.5rem 2rem; margin-top: 1.25rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; max-width: 32rem; }
figcaption { font-weight: 600; font-size: 0.93rem; margin-bottom: 0.5rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; font: 12px system-ui, sans-serif;
  font-variant-numeric: tabular-nums; }
footer { margin-top: 3rem; }
@media (max-width: 40rem) { body { padding: 1.5rem 1rem 3rem; } h1 { font-size: 1.5rem; }
  .gates li { grid-template-columns: 1fr; } table { font-size: 0.87rem; }
  th, td { padding: 0.35rem 0.8rem 0.35rem 0.4rem; } th.number, td.number { padding: 0.35rem 0.4rem 0.35rem 0.8rem; } }
@media print { @page { margin: 16mm; } body { max-width: none; padding: 0; font-size: 10.5pt; }
  section { margin-top: 1.5rem; padding-top: 1rem; } nav { display: none; }
  .scroll { overflow: visible; } table { font-size: 8.5pt; } table.wide { font-size: 6.5pt; }
  .long { overflow-wrap: anywhere; }
  th, td, th.number, td.number { padding: 0.25rem 0.5rem; } td.number { white-space: normal; }
  pre { font-size: 8pt; white-space: pre-wrap; break-inside: avoid; }
  .plots { grid-template-columns: 1fr 1fr; } thead { display: table-header-group; }
  details::details-content { content-visibility: visible; display: block; height: auto; }
  .gates li { grid-template-columns: 6rem 12rem 1fr; padding: 0.3rem 0; }
  section p, .gates li, .gates .line { font-size: 9.5pt; }
  figure, tr, .verdict, .gates li { break-inside: avoid; } h2, h3, summary, figcaption { break-after: avoid; } }
"""


def write_report(path: Path, report: Report) -> None:
    """Write `report` to `path` as one HTML page, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(render(report), encoding="utf-8")


def render(report: Report) -> str:
    """Render the page. All text is escaped, and its policy forbids a browser to load, run or send anything."""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(report.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            f"<header>\n<h1>{escape(report.title)}</h1>",
            *(f"<p>{escape(line)}</p>" for line in (*report.summary, *report.left_out)),
            *_verdict(report),
            *_contents(report.sections),
            "</header>\n<main>",
            *(
                _section(section, f"s{index}" if report.sections[CONTENTS - 1 :] else "")
                for index, section in enumerate(report.sections, 1)
            ),
            f"</main>\n<footer>growkit {__version__}</footer>\n</body>\n</html>\n",
        ]
    )


def escape(text: str) -> str:
    """Escape text for the page: none of it is markup or invisible."""
    return escape_markup(visible(text))


def cell(value: object) -> str:
    """Format a value for reading: four digits, thousands separators, yes and no; not yet escaped."""
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
        exponent = int(f"{value:.3e}".partition("e")[2])  # of the rounded value: 9.9999 is 10.00
        return f"{value:,.{max(0, 3 - exponent)}f}"
    return scientific(value, 2)


def _verdict(report: Report) -> list[str]:
    if report.verdict is None:
        return []
    asked = report.verdict
    gates = "\n".join(
        f'<li>{_mark(gate.mark)}<b>{escape(gate.name)}</b><span class="line">{escape(gate.line)}</span></li>'
        for gate in report.gates
    )
    return [
        f'<div class="verdict {_sign(asked.mark)[1]}">',
        f'<p class="answer">{escape(asked.name)} {_mark(asked.mark)}</p>\n<p>{escape(asked.line)}</p>\n</div>',
        *([f'<ul class="gates">\n{gates}\n</ul>'] if gates else []),
    ]


def _sign(mark: str) -> tuple[str, str]:
    return SIGNS.get(mark, ("·", "plain"))


def _mark(mark: str) -> str:
    sign, colour = _sign(mark)
    return f'<span class="mark {colour}">{sign} {escape(mark)}</span>'


def _contents(sections: Sequence[Section]) -> list[str]:
    if len(sections) < CONTENTS:
        return []
    links = (f'<a href="#s{index}">{escape(section.title)}</a>' for index, section in enumerate(sections, 1))
    return ["<nav>", *links, "</nav>"]


def _section(section: Section, name: str) -> str:
    start = f'<section id="{name}">' if name else "<section>"
    return f"{start}\n<h2>{escape(section.title)}</h2>\n{_body(section)}\n</section>"


def _part(part: Section) -> str:
    title = f"<h3>{escape(part.title)}</h3>"
    if part.folded:
        return f"<details>\n<summary>{title}</summary>\n{_body(part)}\n</details>"
    return f'<div class="part">\n{title}\n{_body(part)}\n</div>'


def _body(section: Section) -> str:
    """Everything below a heading."""
    parts = [f"<p>{escape(line)}</p>" for line in section.text.splitlines() if line.strip()]
    codes = ("\n".join(map(escape, code.split("\n"))) for code in section.code)
    parts += [f'<pre tabindex="0">{code}</pre>' for code in codes]
    if section.table is not None and section.table.rows:
        parts.append(_table(section.table))
    if section.plots:
        figures = (
            f"<figure><figcaption>{escape(plot.title)}</figcaption>{draw(plot)}</figure>" for plot in section.plots
        )
        parts.append("\n".join(['<div class="plots">', *figures, "</div>"]))
    return "\n".join([*parts, *map(_part, section.parts)])


def _table(table: Table) -> str:
    numeric = [
        index > 0 and any(isinstance(row[index], int | float) for row in table.rows)
        for index in range(len(table.columns))
    ]

    def line(tag: str, values: Sequence[object]) -> str:
        cells = (
            f'<{tag} class="{_alignment(value, right)}">{_shown(value)}</{tag}>'
            for value, right in zip(values, numeric, strict=True)
        )
        return f"<tr>{''.join(cells)}</tr>"

    rows = "\n".join(line("td", row) for row in table.rows)
    head, wide = line("th", table.columns), ' class="wide"' if len(table.columns) > WIDE else ""
    whole = f"<table{wide}>\n<thead>{head}</thead>\n<tbody>\n{rows}\n</tbody></table>"
    return f'<div class="scroll" tabindex="0">{whole}</div>'


def _alignment(value: object, right: bool) -> str:
    """CSS classes of a cell: its alignment, and whether its words may be broken in print."""
    longest = max(map(len, cell(value).split()), default=0)
    return ("number" if right else "text") + (" long" if longest > WORD else "")


def _shown(value: object) -> str:
    return _mark(value) if isinstance(value, Mark) else escape(cell(value))
