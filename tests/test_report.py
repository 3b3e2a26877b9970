"""The report: one page that needs nothing else, shows its data and is not steered by it."""

import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from growkit.report.facts import Step
from growkit.report.page import STYLE, Gate, Mark, Report, Section, Table, cell, render, write_report
from growkit.report.plot import Bar, Bars, Dots, Plot, Point, Series, draw, save
from growkit.report.steps import machines, step_section

EVIL = "<script>alert('x')</script>\"&<img src=http://example.org/x onerror=y>"
ALONE = {"meta", "img", "br", "link"}  # elements without an end tag


class Page(HTMLParser):
    """What a browser makes of a page: its elements with attributes, its text, its open elements."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", list[str]()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ALONE:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def names(self) -> set[str]:
        return {name for name, _ in self.elements}


def plot(*series: Series, title: str = "title") -> Plot:
    return Plot(title, series, "step", "loss")


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("text")]


def lines(svg: str) -> list[str]:
    """The lines of series, as their paths."""
    paths = ElementTree.fromstring(svg).iter("path")
    drawn = [p.attrib["d"] for p in paths if re.search(r"fill: none; .*stroke: var\(--line-", p.get("style", ""))]
    return [re.sub(r"\s+", " ", path).replace(" L ", "L").replace("M ", "M") for path in drawn]


def evil_report() -> Report:
    series = [Series(EVIL, [(0, 1), (1, 2)]), Series("b", [(0, 2), (1, 3)])]
    drawing = Plot(EVIL, series, EVIL, EVIL)
    table = Table((EVIL, "n"), [(EVIL, 1), (Path(EVIL), EVIL)])
    return Report(EVIL, [EVIL], [Section(EVIL, EVIL, table, [drawing, plot(title=EVIL)])])


def test_markup_in_data_is_shown_and_never_becomes_elements() -> None:
    page = Page(render(evil_report()))
    assert page.open == []
    assert page.text.count(EVIL) >= 9
    assert not page.names() & {"script", "img"}
    assert not [attrs for _, attrs in page.elements if "onerror" in attrs]


def test_page_reader_finds_an_element_from_unescaped_data() -> None:
    page = Page(render(evil_report()).replace("</main>", f"{EVIL}</main>"))
    assert {"script", "img"} <= page.names()


def test_page_loads_nothing_and_forbids_loading() -> None:
    html = render(Report("title", [], [Section("s", plots=[plot(Series("a", [(0, 1)]))])]))
    page = Page(html)
    assert not page.names() & {"script", "link", "img", "iframe"}
    assert not [attrs for _, attrs in page.elements if "src" in attrs or not (attrs.get("href") or "#").startswith("#")]
    assert not re.search(r"https?:|@import|url\((?!#)", html)
    policies = [attrs["content"] for _, attrs in page.elements if "http-equiv" in attrs]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"]


def test_page_is_written_whole(tmp_path: Path) -> None:
    write_report(tmp_path / "run" / "report.html", Report("Größe × 10⁻³", [], []))
    assert "Größe × 10⁻³" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1,234,567"),
        (0.5, "0.5000"),
        (1234.56, "1,235"),
        (9.9999, "10.00"),
        (-99.999, "-100.0"),
        (999.99, "1,000"),
        (0.99999, "1.000"),
        (9.9994, "9.999"),
        (999999.9, "1,000,000"),
        (1.2e-7, "1.20×10⁻⁷"),
        (-2.5e18, "-2.50×10¹⁸"),
        (0.0, "0"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (True, "yes"),
        (None, "–"),
        ("as is", "as is"),
    ],
)
def test_cell_shows_value_as_a_reader_wants_it(value: object, text: str) -> None:
    assert cell(value) == text


def test_style_has_no_empty_lines() -> None:
    assert all(line.strip() for line in STYLE.strip("\n").split("\n"))


def test_columns_of_numbers_are_set_right() -> None:
    table = Table(("name", "loss", "note"), [("1", 0.5, "a"), ("2", None, "b")])
    page = Page(render(Report("t", [], [Section("s", table=table)])))
    classes = [attrs["class"] for tag, attrs in page.elements if tag == "td"]
    assert classes == ["text", "number", "text"] * 2


def test_line_passes_through_its_points_upwards() -> None:
    (path,) = lines(draw(plot(Series("a", [(0, 0), (1, 1), (2, 4)]))))
    x, y = zip(*(map(float, point.split()) for point in re.split("[ML]", path)[1:]), strict=True)
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    assert (y[0] - y[2]) == pytest.approx(4 * (y[0] - y[1]), abs=0.5)


def test_line_breaks_where_a_value_is_not_finite() -> None:
    points = [(0, 1), (1, 1), (2, math.nan), (3, math.inf), (4, 1), (5, 1)]
    (path,) = lines(draw(plot(Series("a", points))))
    assert re.sub("[^ML]", "", path) == "MLML"


@pytest.mark.parametrize("points", [[], [(0, math.nan)], [(math.inf, 1)]])
def test_plot_without_finite_points_says_so_and_saves_nothing(points: list[Point], tmp_path: Path) -> None:
    assert "title: no finite values" in draw(plot(Series("a", points)))
    assert save(plot(Series("a", points)), tmp_path, "a") == ()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "points",
    [
        [(3, 7)],
        [(0, 0), (1, 0)],
        [(0, 1e-12), (1, 2e-12)],
        [(0, -5e20), (1, 7e20)],
        [(0, 0.98123), (1, 0.981231)],
        [(1e9, 1), (1e9 + 1, 1)],
        [(0, 1), (0.5, 2), (1, 1e6)],
    ],
)
def test_drawing_stays_inside(points: list[Point]) -> None:
    svg = draw(plot(Series("a", points)))
    _, _, width, height = map(float, ElementTree.fromstring(svg).attrib["viewBox"].split())
    (path,) = lines(svg)
    for x, y in (point.split()[:2] for point in re.split("[ML]", path)[1:]):
        assert 0 <= float(x) <= width
        assert 0 <= float(y) <= height


def test_every_series_and_the_reference_are_named_as_they_are_called() -> None:
    names = ["_hidden", "$x_1$", "a & <b>", "from scratch", r"back\slash"]
    drawn = Plot("t", [Series(name, [(0, 0), (1, 1)]) for name in names], "x", "y", reference=("target", 0.5))
    assert {*names, "target"} <= set(texts(draw(drawn)))


def test_twelve_series_differ_in_more_than_colour() -> None:
    svg = draw(plot(*(Series(f"method {n}", [(0, n), (1, n)]) for n in range(12))))
    styles = [p.get("style", "") for p in ElementTree.fromstring(svg).iter("path")]
    told = {style for style in styles if re.search(r"fill: none; .*stroke: var\(--line-", style)}
    assert len(told) == 12


def test_band_is_drawn_from_low_to_high() -> None:
    points = [(0, 1), (1, 2)]
    plain, band = (draw(plot(Series("a", points, *more))) for more in ((), ([0, 1], [2, 3])))
    assert band.count("fill-opacity: 0.12") > plain.count("fill-opacity: 0.12") == 0


def test_long_series_are_thinned_and_keep_their_last_point() -> None:
    (path,) = lines(draw(plot(Series("a", [(step, step % 7) for step in range(100_001)]))))
    (ends,) = lines(draw(plot(Series("a", [(0, 0), (50_000, 6), (100_000, 100_000 % 7)]))))
    assert 50 <= len(re.findall("[ML]", path)) <= 402  # matplotlib leaves out what cannot be seen
    assert path.split("L")[-1] == ends.split("L")[-1]


def widths(svg: str) -> list[float]:
    """Lengths of the bars."""
    paths = [
        p.attrib["d"].split() for p in ElementTree.fromstring(svg).iter("path") if "opacity: 0.85" in p.get("style", "")
    ]
    return [float(d[4]) - float(d[1]) for d in paths]


def test_bars_are_as_long_as_their_values() -> None:
    found = widths(draw(Bars("t", [Bar("a", 10.0), Bar("b", 20.0), Bar("c", None, note="no run")], "%")))
    assert found[1] == pytest.approx(2 * found[0], rel=1e-3)
    assert found[2] == pytest.approx(0, abs=1e-6)


def test_bars_show_values_notes_and_whiskers() -> None:
    bars = [
        Bar("mango <b>", 59.31, 58.0, 60.5),
        Bar("ligo", -12.0, note="at most; 2 of 3 seeds got there"),
        Bar("x", None),
    ]
    svg = draw(Bars("t", bars, "top-1, %"))
    assert {"mango <b>", "ligo", "x", "59.3", "-12.0  at most; 2 of 3 seeds got there", "top-1, %"} <= set(texts(svg))
    bare = draw(Bars("t", [Bar(bar.name, bar.value, note=bar.note) for bar in bars], "top-1, %"))
    assert svg.count("<use") > bare.count("<use")


def test_bars_without_values_say_so() -> None:
    assert "t: no finite values" in draw(Bars("t", [Bar("a", None)], "%"))


def test_plots_of_one_page_share_no_ids_and_leave_the_page_alone() -> None:
    drawn = [plot(Series("a", [(0, n), (1, n + 1)])) for n in range(3)]
    html = render(Report("t", [], [Section("s", plots=[*drawn, Bars("b", [Bar("x", 1.0, 0.5, 1.5)], "%")])]))
    ids = re.findall(r' id="([^"]+)"', html)
    assert ids
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', html)) == set(ids)
    assert html.count("<style>") == 1


def test_colours_are_the_pages() -> None:
    svg = draw(plot(Series("a", [(0, 1), (1, 2)]), Series("b", [(0, 2), (1, 3)])))
    assert "var(--line-0)" in svg
    assert "var(--line-1)" in svg
    assert not set(re.findall(r"#[0-9a-f]{6}\b", svg)) - {"#000000", "#ffffff"}


def test_same_plot_same_bytes(tmp_path: Path) -> None:
    drawn = plot(Series("a", [(0, 1), (1, 2)]), Series("b", [(0, 2), (1, 3)]))
    assert draw(drawn) == draw(drawn)
    first, second = (save(drawn, tmp_path / name, "curve") for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_saved_files_stand_alone(tmp_path: Path) -> None:
    vector, pixels = save(plot(Series("a", [(0, 1), (1, 2)])), tmp_path, "curve")
    assert ElementTree.fromstring(vector.read_text()).tag.endswith("svg")
    assert "var(--" not in vector.read_text()
    with Image.open(pixels) as image:
        assert image.size[0] == 1200
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.png", "curve.svg"]


def step(command: str) -> dict[str, object]:
    return {
        "command": command,
        "finished": "2026-01-02T03:04:05+00:00",
        "options": {"seed": 3, "lr": 0.001, "to": None},
        "hashes": {"model.safetensors": "ab" * 32},
        "versions": {"torch": "2.15.0"},
        "hardware": {"cpu": "a processor"},
    }


def test_step_has_its_time_and_options() -> None:
    grow = step_section(Step(1, step("grow")))
    assert grow.title == "1. grow"
    assert grow.text == "Finished 2026-01-02 03:04:05 UTC.\nOptions: seed 3, lr 0.001."


def test_machines_that_differ_get_a_column_each() -> None:
    other = step("verify") | {"hardware": {"cpu": "another", "gpu": "H200", "cores": 2}}
    contents = (step("train"), step("grow"), other)
    table = machines([Step(number, content) for number, content in enumerate(contents, 1)])
    assert table == Table(
        ("", "1. train to 2. grow", "3. verify"),
        [("cpu", "a processor", "another"), ("torch", "2.15.0", "2.15.0"), ("gpu", None, "H200"), ("cores", None, "2")],
    )


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"command": None, "options": [1], "hashes": "x", "versions": 3},
        {"command": "train", "options": {"a": {"b": {}}, "losses": list(range(99)), "lr": math.nan}},
        {"command": EVIL, "options": {EVIL: {EVIL: EVIL}}, "hashes": {EVIL: EVIL}},
    ],
)
def test_odd_steps_still_make_a_page(odd: dict[str, object]) -> None:
    page = Page(render(Report("t", [], [step_section(Step(1, odd))])))
    assert page.open == []
    assert "script" not in page.names()


def test_folded_part_is_closed_on_screen_and_open_in_print() -> None:
    parts = [Section("hidden", "words", folded=True), Section("shown")]
    html = render(Report("t", [], [Section("s", parts=parts)]))
    assert re.search(r"<details>\s*<summary><h3>hidden</h3></summary>\s*<p>words</p>\s*</details>", html)
    assert "details::details-content { content-visibility: visible" in html.partition("@media print")[2]
    assert html.count("<details>") == 1


@pytest.mark.parametrize(
    ("word", "shown"),
    [("pass", "good"), ("fail", "bad"), ("inconclusive", "unsure"), ("not done", "unsure"), ("?", "plain")],
)
def test_verdict_and_its_gates_come_first_with_sign_and_colour(word: str, shown: str) -> None:
    gate = Gate("Is it?", Mark(word), EVIL)
    html = render(Report("t", [], [Section("s", table=Table(("", "v"), [("x", Mark(word))]))], gate, [gate]))
    assert Page(html).open == []
    assert html.index("Is it?") < html.index("<section")
    assert html.count(f'class="mark {shown}"') == 3
    assert f'class="verdict {shown}"' in html
    assert "<script" not in html


def test_long_page_has_contents_that_lead_to_its_sections() -> None:
    html = render(Report("t", [], [Section(f"part {n}") for n in range(4)]))
    links = re.findall(r'<a href="#([^"]+)">part \d</a>', html)
    assert links == re.findall(r'<section id="([^"]+)"', html)
    assert len(links) == 4
    assert "<nav>" not in render(Report("t", [], [Section("one")]))


def test_dots_show_values_and_the_level_they_are_held_against() -> None:
    rows = [Bar("batch 1, <b>", 0.9, 0.85, 1.0), Bar("batch 8, PyTorch", 0.5), Bar("none", None), Bar("nan", math.nan)]
    svg = draw(Dots("t", rows, "ratio", ("as fast", 1.0)))
    assert {"batch 1, <b>", "0.90", "0.50", "ratio (dashed: as fast)"} <= set(texts(svg))
    assert not {"none", "nan"} & set(texts(svg))
    assert "t: no finite values" in draw(Dots("t", rows[2:], "ratio", ("as fast", 1.0)))


BEYOND = {
    "an interval wider than any float": (-1e308, 1e308),
    "an endless interval": (-math.inf, math.inf),
    "an interval of no numbers": (math.nan, math.nan),
    "an interval the wrong way round": (3.0, 0.5),
    "an interval beside its value": (2.0, 3.0),
    "an integer too large for a float": (0.5, 10**400),
}


@pytest.mark.parametrize("kind", [Bars, Dots])
@pytest.mark.parametrize("what", BEYOND)
def test_interval_that_cannot_be_drawn_does_not_cost_the_value(
    what: str, kind: type[Bars | Dots], recwarn: pytest.WarningsRecorder
) -> None:
    bars = [Bar("a", 1.0, *BEYOND[what]), Bar("b", 0.5, 0.4, 0.6)]
    svg = draw(Bars("t", bars, "ratio") if kind is Bars else Dots("t", bars, "ratio", ("as fast", 1.0)))
    assert {"a", "b", "1" if kind is Bars else "1.00"} <= set(texts(svg))
    assert [str(warning.message) for warning in recwarn] == []


HUGE = 1e308
FAR_OFF: dict[str, Plot | Bars | Dots] = {
    "a bar": Bars("t", [Bar("a", HUGE), Bar("b", -HUGE), Bar("c", 1.0)], "x"),
    "a dot": Dots("t", [Bar("a", HUGE), Bar("c", 1.0)], "x", ("level", 1.0)),
    "y": plot(Series("a", [(0, 1), (1, HUGE), (2, -HUGE)])),
    "x": plot(Series("a", [(HUGE, 1), (-HUGE, 1), (1, 1)])),
    "a band": plot(Series("a", [(0, 1), (1, 2)], low=[-HUGE, 1], high=[HUGE, 2])),
    "a reference": Plot("t", [Series("a", [(0, 1), (1, 2)])], "x", "y", reference=("source", HUGE)),
}


@pytest.mark.parametrize("what", FAR_OFF)
def test_value_too_large_to_draw_leaves_the_rest(what: str, recwarn: pytest.WarningsRecorder) -> None:
    assert draw(FAR_OFF[what]).startswith("<svg")
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("value", [1.7e7, -1e99])
def test_large_values_beside_bars_are_short(value: float) -> None:
    assert f"{value:.3g}" in texts(draw(Bars("t", [Bar("a", value)], "ms")))
    assert f"{value:.3g}" in texts(draw(Dots("t", [Bar("a", value)], "ms", ("level", 1.0))))


def test_plot_that_matplotlib_refuses_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> bytes:
        raise ValueError("Axis limits cannot be NaN or Inf")

    monkeypatch.setattr("growkit.report.plot._render", refuse)
    assert "title: no finite values" in draw(plot(Series("a", [(0, 1)])))


def test_small_values_of_bars_keep_three_digits() -> None:
    svg = draw(Bars("t", [Bar("a", 0.1764), Bar("b", 12.34), Bar("c", 0.0)], "ms"))
    assert {"0.176", "12.3", "0.0"} <= set(texts(svg))
