"""Line charts as inline SVG: readable on a phone, in print, in light and dark, without colour."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 440, 270  # small, so that text stays readable when scaled to a phone
TOP, BOTTOM = 30, HEIGHT - 44
POINTS = 400  # per series; more would only make the page heavy
LETTER = 7.2  # width of a character of 12 px text
LABEL = 16  # characters of a series' name beside its line
COLOURS = 6
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a plot: its name and its (x, y) points; points that are not finite are gaps."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Plot:
    """A line chart. `log_x` leaves out points whose x is not positive."""

    title: str
    series: Sequence[Series]
    x_label: str
    y_label: str
    log_x: bool = False


def scientific(value: float, digits: int) -> str:
    """1.2e-07 as 1.2×10⁻⁷."""
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa}×10{str(int(exponent)).translate(SUPERSCRIPT)}"


def draw(plot: Plot) -> str:
    """The chart as an <svg> element; its colours are the page's --line-0 to --line-5.

    A plot without a finite point becomes a sentence that says so.
    """
    lines = [_thin(series.points, plot.log_x) for series in plot.series]
    drawn = [point for line in lines for point in line if point is not None]
    if not drawn:
        return f'<p class="empty">{escape(plot.title)}: no finite values to plot</p>'
    names = [_short(series.name) for series in plot.series]
    xs, ys = [x for x, _ in drawn], [y for _, y in drawn]
    pad = 0.0 if min(xs) < max(xs) else 0.5
    x_low, x_high = min(xs) - pad, max(xs) + pad
    whole = not plot.log_x and all(x == round(x) for x in xs)
    x_ticks = _log_ticks(x_low, x_high) if plot.log_x else _ticks(x_low, x_high, whole=whole)
    y_ticks = _ticks(min(ys), max(ys), cover=True)
    left = 14 + LETTER * max(len(text) for _, text in y_ticks)
    right = WIDTH - (16 + LETTER * max(map(len, names)) if len(names) > 1 else 24)

    def across(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (right - left)

    def down(y: float) -> float:
        return TOP + (y_ticks[-1][0] - y) / (y_ticks[-1][0] - y_ticks[0][0]) * (BOTTOM - TOP)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(plot.title)}">',
        f'<text class="axis" x="{left:.1f}" y="14">{escape(plot.y_label)}</text>',
        f'<text class="axis" x="{right:.1f}" y="{HEIGHT - 6}" text-anchor="end">{escape(plot.x_label)}</text>',
    ]
    for y, text in y_ticks:
        parts.append(
            f'<path class="grid" d="M{left:.1f} {down(y):.1f}H{right:.1f}"/>'
            f'<text x="{left - 8:.1f}" y="{down(y) + 4:.1f}" text-anchor="end">{text}</text>'
        )
    for x, text in x_ticks:
        parts.append(
            f'<path class="tick" d="M{across(x):.1f} {BOTTOM}v5"/>'
            f'<text x="{across(x):.1f}" y="{BOTTOM + 19}" text-anchor="middle">{text}</text>'
        )
    ends: dict[int, float] = {}
    for index, line in enumerate(lines):
        corners = [point and (across(point[0]), down(point[1])) for point in line]
        parts.append(_line(corners, index, plot.series[index].name))
        ends.update((index, corner[1]) for corner in corners if corner)
    for index, height in _apart(ends).items() if len(names) > 1 else ():
        parts.append(
            f'<text class="name" style="fill:var(--line-{index % COLOURS})" x="{right + 9:.1f}" '
            f'y="{height + 4:.1f}">{escape(names[index])}</text>'
        )
    return "".join([*parts, "</svg>"])


def _thin(points: Sequence[Point], log_x: bool) -> list[Point | None]:
    """The points to draw, few enough; None where the line breaks."""
    every = max(1, math.ceil(len(points) / POINTS))
    return [
        (math.log10(x) if log_x else x, y) if math.isfinite(x) and math.isfinite(y) and (x > 0 or not log_x) else None
        for x, y in [*points[: len(points) - 1 : every], *points[-1:]]
    ]


def _line(corners: Sequence[Point | None], index: int, name: str) -> str:
    """One series: its line, and a dot at each point when they are few, else at the last."""
    path, joined = "", False
    for corner in corners:
        if corner:
            path += f"{'L' if joined else 'M'}{corner[0]:.1f} {corner[1]:.1f}"
        joined = corner is not None
    present = [corner for corner in corners if corner]
    dots = present if len(present) <= 12 else present[-1:]
    circles = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in dots)
    title = f"<title>{escape(name)}</title>"
    return f'<g class="line line-{index % COLOURS}">{title}<path d="{path}"/>{circles}</g>'


def _apart(ends: dict[int, float], gap: float = 15) -> dict[int, float]:
    """Heights of the names: those of the ends of their lines, moved until none overlap."""
    order = sorted(ends, key=ends.__getitem__)
    heights = dict(ends)
    for above, below in pairwise(order):
        heights[below] = max(heights[below], heights[above] + gap)
    floor = float(BOTTOM)
    for index in reversed(order):
        heights[index] = min(heights[index], floor)
        floor = heights[index] - gap
    return heights


def _short(name: str) -> str:
    return name if len(name) <= LABEL else name[: LABEL - 1] + "…"


def _ticks(low: float, high: float, *, cover: bool = False, whole: bool = False) -> list[tuple[float, str]]:
    """Places and texts of about five multiples of 1, 2 or 5 times a power of ten.

    They lie within [low, high], or reach around it with `cover`; `whole` allows integers only.
    """
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        pad = abs(low) / 4 or 0.5
        low, high = low - pad, high + pad
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if m == 10 or power * m >= rough)
    step = max(1.0, step) if whole else step
    outward = 1 if cover else 0
    first = math.ceil(low / step - outward + 1e-9 * (2 * outward - 1))
    last = math.floor(high / step + outward - 1e-9 * (2 * outward - 1))
    largest, power = max(abs(low), abs(high)), math.floor(math.log10(step) + 1e-9)
    ticks = [n * step for n in range(first, last + 1)]
    if 1e-3 <= largest < 1e6:
        return [(tick, f"{tick:,.{max(0, -power)}f}") for tick in ticks]
    return [(tick, _label(tick, math.floor(math.log10(largest)) - power)) for tick in ticks]


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """log10 and texts of ticks in 10**[low, high]: powers of ten, and between them when narrow."""
    span = high - low
    between = (1,) if span > 2.5 else (1, 3) if span > 1.3 else (1, 2, 5)
    every = max(1, math.ceil(span / 6))
    powers = [p for p in range(math.floor(low), math.ceil(high) + 1) if p % every == 0]
    ticks = [p + math.log10(m) for p in powers for m in between]
    inside = [tick for tick in ticks if low - 1e-9 <= tick <= high + 1e-9]
    return [(tick, _label(10**tick)) for tick in (inside if len(inside) > 1 else (low, high))]


def _label(value: float, digits: int = 2) -> str:
    """A tick's number: plain near one, else as a power of ten, without trailing zeros."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}" if abs(value) < 1e3 else f"{value:,.0f}"
    mantissa, _, power = scientific(value, digits).partition("×")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return power if mantissa == "1" else f"{mantissa}×{power}"
