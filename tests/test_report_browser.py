"""The report in a real browser: no network, no sideways scrolling on a phone, nothing lost in print."""

import base64
import re
import shutil
import subprocess
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pytest
from browser import Browser, browser, find
from foreign_text import HOSTILE
from report_samples import SECTIONS, verification, write_run
from test_report import EVIL

from growkit.files import write_json
from growkit.report.page import render, write_report
from growkit.report.plot import Bar, Bars, save
from growkit.report.run import run_report

PROGRAM = find()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="no chromium or google-chrome on the PATH"),
]
LONG = "a_class_with_a_very_long_name_" * 8
OPEN = "document.querySelectorAll('details').forEach(e => e.open = true)"
PRINTED = 673  # pixels of A4 between its margins
OVER = """[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)
  .map(e => e.tagName + ': ' + e.textContent.slice(0, 60))"""
HIDDEN = """[...document.querySelectorAll('details > *')].filter(e => !e.checkVisibility({contentVisibilityAuto: true}))
  .map(e => e.textContent.slice(0, 60))"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PROGRAM is not None
    with browser(PROGRAM, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything on it, long and hostile names among it, and a check that failed."""
    run = write_run(tmp_path_factory.mktemp("page") / "run", compared=True, name=EVIL, label=LONG)
    content = verification()
    content["checks"][2] |= {"verdict": "fail", "line": LONG}
    content["latency"] |= {"throughput": [{"batch": 1, "images_per_second": 777.0, "percent_of_peak": 3.5}]}
    for one in content["latency"]["comparisons"]:
        one |= {"gflops": 123.4, "percent_of_peak": 41.5, "compiled_ms": {"p50": 1.25, "p90": 2.25}}
    write_json(run.verify / "report.json", content)
    write_report(run.report, run_report(run))
    return run.report


def test_page_asks_for_nothing_and_breaks_no_rule(tab: Browser, page: Path) -> None:
    tab.open(page)
    assert tab.asked == [page.as_uri()]
    assert tab.complaints == []
    assert tab.value("document.title").startswith("deit_small_patch16_224 grown")
    assert tab.value("document.scripts.length + document.images.length") == 0


def test_page_that_loads_and_runs_something_is_found_out(tab: Browser, page: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.html"
    addition = '<script>console.log("x")</script><img src="http://localhost:9/x.png"></body>'
    other.write_text(page.read_text(encoding="utf-8").replace("</body>", addition), encoding="utf-8")
    tab.open(other)
    assert len([said for said in tab.complaints if "Content Security Policy" in said]) == 2
    bare = other.read_text(encoding="utf-8").replace("Content-Security-Policy", "x-none")
    other.write_text(bare, encoding="utf-8")
    tab.open(other)
    assert "http://localhost:9/x.png" in tab.asked


def test_no_script_of_a_file_runs_even_without_the_policy(tab: Browser, tmp_path: Path) -> None:
    """Escaping holds by itself: the policy, which would forbid scripts, is taken out of the page."""
    text = " ".join(HOSTILE.values())
    run = write_run(tmp_path / "run", compared=True, name=text, label=text)
    content = verification()
    content["checks"] = [{**one, "name": text, "line": text, "group": text} for one in content["checks"]]
    content["latency"]["comparisons"] += [{"baseline": text, "ratio": 1.0, "batch": text}]
    write_json(run.verify / "report.json", content)
    html = render(run_report(run)).replace("Content-Security-Policy", "x-none")
    assert html.count("window.ran") > 20
    run.report.write_text(html, encoding="utf-8")
    tab.open(run.report)
    tab.value("document.querySelectorAll('*').forEach(e => { e.click && e.click(); e.onload && e.onload(); })")
    assert tab.value("window.ran") is None
    assert tab.asked == [run.report.as_uri()]
    svg, _ = save(Bars(text, [Bar(text, 1.0, note=text)], "label"), tmp_path, "plot")
    tab.open(svg)
    assert tab.value("window.ran") is None
    assert tab.value("document.querySelector('svg') !== null")

    run.report.write_text(html.replace("&lt;", "<").replace("&gt;", ">"), encoding="utf-8")
    tab.open(run.report)
    assert tab.value("window.ran") == 1


@pytest.mark.parametrize("width", [360, 1100])
@pytest.mark.parametrize("opened", [False, True])
def test_page_is_never_wider_than_the_window(width: int, opened: bool, tab: Browser, page: Path) -> None:
    tab.open(page, width=width)
    if opened:
        tab.value(OPEN)
    assert tab.value("innerWidth") == width
    assert tab.value("document.documentElement.scrollWidth") <= width


def test_page_that_is_too_wide_is_found_out(tab: Browser, page: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide.html"
    text = page.read_text(encoding="utf-8").replace(".scroll { overflow-x: auto;", ".scroll {")
    wide.write_text(text, encoding="utf-8")
    tab.open(wide, width=360)
    assert tab.value("document.documentElement.scrollWidth") > 360
    tab.open(wide, width=PRINTED)
    assert tab.value(OVER) != []
    assert tab.value(HIDDEN) != []  # on a screen what is folded is out of sight


def test_text_is_large_enough_on_a_phone(tab: Browser, page: Path) -> None:
    tab.open(page, width=360)
    tab.value(OPEN)
    sizes = tab.value("""[...document.querySelectorAll('p, td, li, svg text')].map(e =>
        parseFloat(getComputedStyle(e).fontSize) * (e.getCTM ? Math.hypot(e.getCTM().a, e.getCTM().b) : 1))""")
    assert len(sizes) > 100
    assert min(sizes) > 7.5


def test_nothing_is_cut_or_hidden_in_print(tab: Browser, page: Path) -> None:
    tab.open(page, width=PRINTED, media="print")
    assert tab.value(OVER) == []
    assert tab.value(HIDDEN) == []


@pytest.mark.skipif(shutil.which("pdftotext") is None, reason="no pdftotext on the PATH")
def test_pdf_holds_every_word_of_the_page(tab: Browser, page: Path, tmp_path: Path) -> None:
    tab.open(page)
    pdf = tmp_path / "report.pdf"
    pdf.write_bytes(base64.b64decode(tab.call("Page.printToPDF", preferCSSPageSize=True)["data"]))
    done = subprocess.run(["pdftotext", "-raw", pdf, "-"], capture_output=True, check=True, text=True)
    printed = "".join(done.stdout.split())
    body = page.read_text(encoding="utf-8")
    body = body[body.index("<main>") : body.index("</main>") + len("</main>")]
    text = unescape(re.sub(r"<[^>]*>", " ", body))
    wanted = [word for word in text.split() if len(word) < 20]  # longer ones may be broken
    assert len(wanted) > 500
    assert [word for word in dict.fromkeys(wanted) if word not in printed] == []
    assert all(title.replace(" ", "") in printed for title in SECTIONS)
