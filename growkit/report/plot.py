"""Line charts and bars by matplotlib: inline SVG in a page's colours, and PNG and SVG files.

Readable on a phone, in print, in light and dark mode, and without colour: lines also differ in dash and marker.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growkit.files import whole_file
from growkit.text import clipped, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.8, 3.1  # inches, 72 SVG units each; small, so that text stays readable on a phone
POINTS = 400  # per series; more would only make the page heavy
DPI = 250  # of PNG files
TICK = 36  # characters of a label beside a bar, or on the y axis
TEXT = 80  # characters of any other text
LONG = 1e6  # from here on a value beside its bar has an exponent
FAR = 1e100  # larger values are not drawn: sums of what fits a float may not fit one
# The page's --line-0 to --line-5, --ink, --soft and --grid in light mode.
COLOURS = ("#0b62c4", "#b84a00", "#00775a", "#9a3d86", "#6b5d00", "#4a5568")
INK, SOFT, GRID = "#1c2430", "#5a6675", "#e6eaef"
VARIABLES = {colour: f"var(--line-{index})" for index, colour in enumerate(COLOURS)} | {
    INK: "var(--ink)",
    SOFT: "var(--soft)",
    GRID: "var(--grid)",
}
DASHES = ("-", (0, (6, 3)), (0, (2, 2)), (0, (8, 2, 2, 2)))
MARKERS = "os^Dv<>PX*hp"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "growkit",  # reproducible bytes
    "font.size": 10,
    "text.parse_math": False,  # a name may hold a dollar sign
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
}
TAG = re.compile(r"<[^>]*>")  # safe, since matplotlib writes < and > in text and attributes as entities
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a plot: (x, y) points, non-finite ones are gaps, and optionally a band from low to high."""

    name: str
    points: Sequence[Point]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Plot:
    """A line chart; `reference` is a named level."""

    title: str
    series: Sequence[Series]
    x_label: str
    y_label: str
    reference: tuple[str, float] | None = None


@dataclass(frozen=True)
class Bar:
    """One bar, with an optional interval and a note beside it; without a value only the note."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Bars:
    """Horizontal bars, the first on top."""

    title: str
    bars: Sequence[Bar]
    label: str


@dataclass(frozen=True)
class Dots:
    """Dots with intervals, the first on top, and a line at a named level."""

    title: str
    bars: Sequence[Bar]
    label: str
    level: tuple[str, float]


Chart = Plot | Bars | Dots


def scientific(value: float, digits: int) -> str:
    """1.2e-07 as 1.2×10⁻⁷; non-finite values unchanged."""
    if not math.isfinite(value):
        return f"{value:g}"
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa}×10{str(int(exponent)).translate(SUPERSCRIPT)}"


def draw(plot: Chart) -> str:
    """Draw a chart as an <svg> element in the page's colours; a sentence if there is nothing finite to show."""
    plot = _legible(plot)
    nothing = f'<p class="empty">{escape(plot.title)}: no finite values to plot</p>'
    if not _finite(plot):
        return nothing
    try:
        svg = _render(plot, "svg").decode()
    except ValueError:  # matplotlib's of values it cannot place; one plot must not cost the page
        return nothing
    svg = svg[svg.index("<svg") :]
    # styles would apply to the whole page
    svg = re.sub(r"(<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>)\s*", "", svg, flags=re.DOTALL)
    prefix = "p" + sha256(svg.encode()).hexdigest()[:8]
    used = {name for tag in TAG.findall(svg) for name in re.findall(r'(?:url\(#|href="#)([^)"]+)', tag)}

    def adapted(tag: str) -> str:
        """A tag in the page's font and colours; only referenced ids are kept, with a prefix unique to this plot."""
        tag = tag.replace("xlink:href", "href")
        tag = re.sub(r"font: ([^;\"]*?)'DejaVu Sans'[^;\"]*", r"font: \1system-ui, sans-serif", tag)
        for colour, variable in VARIABLES.items():
            tag = tag.replace(colour, variable)
        tag = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", tag)
        return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", tag)

    svg = TAG.sub(lambda found: adapted(found[0]), svg)  # text between tags is unchanged
    head = re.search(r'viewBox="[^"]*"', svg)
    assert head is not None
    style = "stroke-linejoin: round; stroke-linecap: butt"
    attributes = f'{head[0]} role="img" aria-label="{escape(plot.title)}" style="{style}"'
    return f"<svg {attributes}>" + svg[svg.index(">") + 1 :].strip()


def save(plot: Chart, folder: Path, name: str) -> tuple[Path, ...]:
    """Write `name`.svg and `name`.png into the folder, on white; no files if there is nothing finite to show."""
    plot = _legible(plot)
    if not _finite(plot):
        return ()
    paths = tuple(folder / f"{name}.{kind}" for kind in ("svg", "png"))
    for path in paths:
        with whole_file(path) as partial:
            partial.write_bytes(_render(plot, path.suffix[1:], alone=True))
    return paths


def _legible(drawn: Any) -> Any:
    """A chart, or a part of one, with its text cleaned and clipped, whatever file it came from."""
    if isinstance(drawn, str):
        return clipped(visible(drawn), TEXT)
    if isinstance(drawn, list | tuple):
        return tuple(map(_legible, drawn))
    if is_dataclass(drawn) and not isinstance(drawn, type):
        return replace(drawn, **{field.name: _legible(getattr(drawn, field.name)) for field in fields(drawn)})
    return drawn


def _finite(plot: Chart) -> bool:
    if not isinstance(plot, Plot):
        return any(_shown(bar) is not None for bar in plot.bars)
    points = (point for series in plot.series for point in series.points)
    return any(_drawable(x) and _drawable(y) for x, y in points)


def _render(plot: Chart, kind: str, *, alone: bool = False) -> bytes:
    """Render the chart as a file of this kind, without changing global matplotlib settings.

    `alone` has its title in it and a white background; on a page the figure around it has them.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        tall = HEIGHT + 0.17 * (len(plot.series) + 1) if isinstance(plot, Plot) else 1 + 0.33 * len(plot.bars)
        back = "white" if alone else "none"
        figure = Figure(figsize=(WIDTH, tall), layout="constrained", dpi=DPI, facecolor=back)
        axes = figure.subplots(subplot_kw={"facecolor": back})
        if isinstance(plot, Plot):
            _lines(figure, axes, plot)
        elif isinstance(plot, Bars):
            _bars(axes, plot)
        else:
            _dots(axes, plot)
        if alone:
            axes.set_title(plot.title, loc="left", fontsize=11, fontweight="bold")
        stream = io.BytesIO()
        # by the canvas itself: savefig draws everything twice
        if kind == "svg":
            FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None, "Creator": None})
        else:
            FigureCanvasAgg(figure).print_png(stream, metadata={"Software": None})
    return stream.getvalue()


def _lines(figure: "Figure", axes: "Axes", plot: Plot) -> None:
    drawn = []
    for index, series in enumerate(plot.series):
        kept = _thinned(series)
        xs = [series.points[i][0] for i in kept]
        ys = [_or_gap(series.points[i][1]) for i in kept]
        colour = COLOURS[index % len(COLOURS)]
        (line,) = axes.plot(
            xs,
            ys,
            color=colour,
            linestyle=DASHES[index % len(DASHES)],
            marker=MARKERS[index % len(MARKERS)],
            markevery=max(1, len(kept) // 8),
        )
        drawn.append(line)
        if series.low is not None and series.high is not None:
            low, high = ([_or_gap(band[i]) for i in kept] for band in (series.low, series.high))
            axes.fill_between(xs, low, high, color=colour, alpha=0.12, linewidth=0)
    names = [series.name for series in plot.series]
    if plot.reference is not None and _drawable(plot.reference[1]):
        drawn.append(axes.axhline(plot.reference[1], color=SOFT, linewidth=1, linestyle=(0, (1, 2))))
        names.append(plot.reference[0])
    axes.grid(True)
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(clipped(plot.y_label, TICK))
    if len(names) > 1:
        figure.legend(drawn, names, loc="outside lower left", ncols=1 if max(map(len, names)) > 26 else 2)


def _thinned(series: Series) -> list[int]:
    """Indices of the points to draw: few enough, and always the last."""
    count = len(series.points)
    every = max(1, math.ceil(count / POINTS))
    kept = sorted({*range(0, count, every), count - 1} if count else ())
    return [i for i in kept if _drawable(series.points[i][0])]


def _bars(axes: "Axes", plot: Bars) -> None:
    places = range(len(plot.bars))
    intervals = [_interval(bar) for bar in plot.bars]
    axes.barh(places, [value for value, _, _ in intervals], height=0.62, color=COLOURS[0], alpha=0.85)
    ends = []
    for place, (bar, (value, low, high)) in enumerate(zip(plot.bars, intervals, strict=True)):
        end = max(high, 0.0)
        if bar.low is not None and bar.high is not None:
            axes.errorbar(value, place, xerr=[[value - low], [high - value]], color=INK, capsize=3, linewidth=1.2)
        shown = "" if _shown(bar) is None else _digits(value)
        _write_beside(axes, (end, place), 5, shown, bar.note)
        ends.append(end)
    low = min(0.0, *(low for _, low, _ in intervals))
    longest = max(len(_tick(bar.note)) for bar in plot.bars)
    room = (max(ends) - low or 1.0) * (0.16 + 0.016 * longest)
    axes.set_xlim(low - 0.02 * (max(ends) - low or 1.0), max(ends) + room)
    axes.set_xticks([tick for tick in axes.get_xticks() if low <= tick <= max(ends)])  # none where only text is
    _name_rows(axes, plot.bars)
    axes.spines["left"].set_visible(low == 0)
    if low < 0:
        axes.axvline(0, color=SOFT, linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel(plot.label)


def _dots(axes: "Axes", plot: Dots) -> None:
    rows = [bar for bar in plot.bars if _shown(bar) is not None]
    level = plot.level[1]
    reach = [level]
    for place, bar in enumerate(rows):
        value, low, high = _interval(bar)
        xerr = [[value - low], [high - value]]
        axes.errorbar(value, place, xerr=xerr, fmt="o", color=COLOURS[0], ecolor=INK, capsize=3, linewidth=1.2)
        shown = f"{value:.2f}" if abs(value) < LONG else f"{value:.3g}"
        _write_beside(axes, (high, place), 6, shown, bar.note)
        reach += [low, high]
    span = (max(reach) - min(reach)) or 1.0
    axes.set_xlim(
        min(reach) - 0.06 * span, max(reach) + span * (0.2 + 0.02 * max(len(_tick(bar.note)) for bar in rows))
    )
    axes.axvline(level, color=SOFT, linewidth=1, linestyle=(0, (3, 2)))
    _name_rows(axes, rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(f"{plot.label} (dashed: {plot.level[0]})")


def _name_rows(axes: "Axes", bars: Sequence[Bar]) -> None:
    """Write the names of bars beside the y axis, and draw a grid across."""
    axes.set_yticks(range(len(bars)), [_tick(bar.name) for bar in bars])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(True, axis="x")


def _write_beside(axes: "Axes", place: Point, gap: int, value: str, note: str) -> None:
    """Write a bar's value and note to the right of its end."""
    text = "  ".join(part for part in (value, _tick(note)) if part)
    axes.annotate(text, place, xytext=(gap, 0), textcoords="offset points", va="center", fontsize=9)


def _tick(name: str) -> str:
    """A name or note clipped to leave room for its bar."""
    return clipped(name, TICK)


def _digits(value: float) -> str:
    """One decimal, or three significant digits below 10 and from a million."""
    return f"{value:.1f}" if 10 <= abs(value) < LONG or value == 0 else f"{value:.3g}"


def _shown(bar: Bar) -> float | None:
    """The value of a bar if it can be drawn, else None."""
    return bar.value if bar.value is not None and _drawable(bar.value) else None


def _interval(bar: Bar) -> tuple[float, float, float]:
    """Value, low and high of a bar as they can be drawn, low <= value <= high; an end that cannot be is the value."""
    value = _shown(bar) or 0.0
    low, high = (value if end is None or not _drawable(end) else end for end in (bar.low, bar.high))
    return value, min(low, value), max(high, value)


def _drawable(value: float) -> bool:
    """Whether a value is finite and within reach; of an integer too large for a float math.isfinite cannot tell."""
    return abs(value) <= FAR


def _or_gap(value: float) -> float:
    """The value if it can be drawn, else nan, at which a line breaks."""
    return value if _drawable(value) else math.nan
