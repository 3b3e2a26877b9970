"""What comes from files is shown letter for letter wherever it goes, and steers nothing."""

import ast
import io
import json
import os
import re
import shlex
import subprocess
import unicodedata
import xml.etree.ElementTree as ET
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from foreign_text import ANY, HOSTILE
from hypothesis import example, given, settings
from markdown_it import MarkdownIt
from report_samples import verification, write_run
from rich.console import Console as RichConsole
from test_report import Page

from growkit.compare.page import _in_markdown, _markdown_table
from growkit.deploy.checks import check
from growkit.deploy.form import Form
from growkit.deploy.junit import junit_xml
from growkit.deploy.parity import Parity
from growkit.deploy.reproduce import reproduction
from growkit.deploy.settings import TritonSettings, VerifySettings
from growkit.files import write_json
from growkit.report.commands import command_line, in_lines
from growkit.report.page import Gate, Mark, Report, Section, Table, render
from growkit.report.plot import Bar, Bars, Dots, Plot, Series, draw, save
from growkit.report.run import run_report
from growkit.settings import Loading
from growkit.text import clipped, visible
from growkit_cli import main as program
from growkit_cli.console import Console

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:constrained_layout not applied")  # of bars that are words alone
EACH = pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
TURNED = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
LONG = "x<" * 50_000


def is_plain(text: str) -> bool:
    """Nothing but characters that take a place on a line, by Python's own tables."""
    return len(text.splitlines()) <= 1 and not any(
        unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(one) in TURNED
        for one in text
    )


@given(ANY)
def test_text_that_is_shown_is_one_line_of_characters_and_keeps_all_others(text: str) -> None:
    shown = visible(text)
    assert is_plain(shown)
    shown.encode()
    kept = [one for one in text if visible(one) == one]
    rest = iter(shown)
    assert all(one in rest for one in kept)  # in their order


# --- pages and plots


def skeleton(html: str) -> list[tuple[str, list[str]]]:
    """Elements with the names of their attributes, in order."""
    page = Page(html)
    assert page.open == []
    return [(tag, list(attributes)) for tag, attributes in page.elements]


def page_of(text: str, plots: bool = False) -> Report:
    """A report with `text` everywhere."""
    line = Series(text, [(0, 1), (1, 2)])
    drawn = (
        Plot(text, [line, line], text, text, reference=(text, 1)),
        Bars(text, [Bar(text, 1.0, note=text), Bar("b", None, note=text)], "label"),
        Dots(text, [Bar(text, 1.0, note=text)], "label", (text, 1)),
        Plot(text, [], text, text),
    )
    gate = Gate(text, Mark(text), text)
    flat = text.replace("\n", " ")  # a text has a paragraph for each line
    flat = " ".join(flat.splitlines()) or "x"
    table = Table((text, text), [(text, text), (Path(text.replace("\0", "")), Mark(text))])
    part = Section(text, f"x{flat}", table, code=[text], folded=True)
    sections = [Section(text, f"x{flat}", table, drawn if plots else (), [text], [part])]
    sections += [Section(text)] * 3  # so that there is a list of them
    return Report(text, [text], sections, gate, [gate])


@given(ANY)
@settings(max_examples=60)
def test_text_changes_no_element_of_a_page(text: str) -> None:
    html = render(page_of(text))
    assert skeleton(html) == skeleton(render(page_of("x")))
    assert is_plain(html.replace("\n", ""))
    assert visible(text) in Page(html).text


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Elements of a harmless page with plots."""
    return {name for name, _ in skeleton(render(page_of("x", plots=True)))}


@EACH
def test_text_in_plots_adds_no_kind_of_element_and_is_drawn(text: str, known: set[str]) -> None:
    html = render(page_of(text, plots=True))
    found = skeleton(html)
    assert {name for name, _ in found} == known
    assert not [name for _, names in found for name in names if name.startswith("on") or name == "src"]
    drawings = [ET.fromstring(svg) for svg in re.findall("<svg.*?</svg>", html, re.DOTALL)]
    assert [clipped(visible(text), 36) in "".join(one.itertext()) for one in drawings] == [True] * 3


@pytest.mark.parametrize("name", ["element", "cdata", "NUL", "control characters", "half a pair", "no character"])
def test_plot_files_are_well_formed_and_hold_the_text(name: str, tmp_path: Path) -> None:
    text = HOSTILE[name]
    svg, png = save(Bars(text, [Bar(text, 1.0, note=text)], "label"), tmp_path, "drawn")
    root = ET.parse(svg).getroot()
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {clipped(visible(text), 80), clipped(visible(text), 36)} <= set(texts)
    assert not [e for e in root.iter() if e.tag.endswith(("}script", "}image", "}foreignObject"))]
    assert png.read_bytes().startswith(b"\x89PNG")


def test_text_of_any_length_is_whole_on_the_page_and_clipped_in_plots() -> None:
    assert LONG in Page(render(Report("t", [LONG], [Section("s", table=Table(("a",), [(LONG,)]))]))).text
    svg = draw(Plot("t", [Series(LONG, [(0, 1)]), Series("b", [(0, 1)])], "x", LONG))
    assert max(len(element.text or "") for element in ET.fromstring(svg).iter("text")) == 80


def test_report_of_a_run_full_of_hostile_text_has_the_elements_of_a_harmless_one(tmp_path: Path) -> None:
    pages = []
    for name, text in (("good", "x"), ("bad", " ".join(HOSTILE.values()).replace("\n", " "))):
        run = write_run(tmp_path / name, name=text, label=text)
        content = verification()
        content["checks"] = [{**one, "name": text, "line": text} for one in content["checks"]]
        write_json(run.verify / "report.json", content)
        pages.append(render(run_report(run)))
    good, bad = ({(tag, *names) for tag, names in skeleton(page)} for page in pages)
    assert bad == good
    assert is_plain(pages[1].replace("\n", ""))


# --- Markdown


def cells(markdown: str) -> list[str]:
    """All texts, as CommonMark with tables reads them; what is more than text goes by its kind."""
    blocks = [
        token.children or () for token in MarkdownIt("commonmark").enable("table").parse(markdown) if token.children
    ]
    kinds = ("text", "text_special")
    return ["".join(t.content if t.type in kinds else f"<{t.type}>" for t in block) for block in blocks]


@given(ANY)
def test_text_is_one_cell_of_a_markdown_table(text: str) -> None:
    text = f"a{text}z"
    found = cells(_markdown_table((("method", text), [(text, "b"), ("c", text)])))
    assert found == ["method", visible(text), visible(text), "b", "c", visible(text)]


@given(ANY)
def test_text_is_one_paragraph_of_markdown(text: str) -> None:
    text = f"a{text}z"
    assert cells(_in_markdown(text)) == [visible(text)]


# --- JUnit


@given(ANY)
@example(LONG)
def test_junit_is_well_formed_and_holds_the_text(text: str) -> None:
    checks = [check(text, text, False, text, text, text), check("a", text, True, 1, 1)]
    xml = junit_xml(checks, suite=text, started=datetime(2026, 1, 2, tzinfo=UTC), seconds=1)
    suite = ET.fromstring(xml.encode())[0]
    assert [case.get("name") for case in suite.iter("testcase")] == [visible(text)] * 2
    (failure,) = suite.iter("failure")
    assert (suite.get("name"), failure.get("message")) == (visible(text), visible(checks[0].line))


# --- terminal


def printed(act: Any, *, width: int = 10**6) -> str:
    """What a console prints on a terminal without colours."""
    stream = io.StringIO()
    terminal = partial(RichConsole, file=stream, force_terminal=True, color_system=None, width=width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("growkit_cli.console.RichConsole", terminal)
        act(Console())
    return stream.getvalue()


@given(ANY)
def test_terminal_shows_text_letter_for_letter_and_obeys_none(text: str) -> None:
    assert printed(lambda console: console.say(text)) == f"{visible(text)}\n"
    for width in (10**4, 20):  # as a table, and row by row
        said = printed(lambda console, width=width: console.table(text, ("a", text), [(text, text)]), width=width)
        assert is_plain(said.replace("\n", ""))
    table = printed(lambda console: console.table("t", ("a", "b"), [("x", f"({text})")]), width=10**4)
    assert f"({visible(text)})" in table


@EACH
def test_progress_shows_text_letter_for_letter(text: str) -> None:
    def act(console: Console) -> None:
        with console.progress(text) as bar:
            bar(10).update(10, text)

    said = printed(act, width=1000)
    assert visible(text) in re.sub(r"\x1b\[\??\d*[A-Za-z]", "", said)  # rich moves the cursor itself
    assert not re.search(r"\x1b(?!\[(\?25[lh]|2K|1A))", said)


@EACH
def test_error_is_one_line_that_the_terminal_only_shows(
    text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["growkit", "report", "--run", as_name(text).replace("/", "")])
    monkeypatch.setenv("GROWKIT_DEBUG", "")
    with pytest.raises(SystemExit) as left:
        program.main()
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert said.startswith("error: ")
    assert is_plain(said.removesuffix("\n"))


# --- scripts and shells


def as_name(text: str) -> str:
    """The name nearest to `text` that a file may have."""
    return os.fsdecode(text.replace("\0", "").encode("utf-8", "surrogatepass"))


def script(text: str, folder: Path) -> str:
    failing = {"run": text, "made": 1, "seed": 0, "used": 1, "batch": 1}
    parity = Parity((check("numbers", text, False, text, text, text),) * 2, {"failing": failing}, text, Form())
    path = folder / as_name(text)
    return reproduction(
        parity,
        folder,
        run=folder.parent,
        model=str(path),
        file=path,
        settings=VerifySettings(),
        data_sets=path,
        loading=repr(Loading(from_=text, from_set=[text])),
    )


@given(ANY)
@example('ends in a quote"')
@example(LONG)
def test_script_differs_in_its_constants_alone(text: str) -> None:
    written = script(text, Path("/a/verify"))
    written.encode()
    tree = ast.parse(written)
    plain = ast.parse(script("x", Path("/a/verify")))
    for one in (tree, plain):
        for node in ast.walk(one):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                node.value = ""
    assert ast.dump(tree) == ast.dump(plain)


@EACH
def test_script_names_the_very_files(text: str) -> None:
    tree = ast.parse(script(text, Path("/a/verify")))
    assigned = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id != "HERE"
    }
    assert Path("/a/verify", assigned["FILE"]) == Path("/a/verify", as_name(text))
    assert (assigned["PROVIDER"], assigned["FAILING"]["run"]) == (text, text)


@EACH
def test_commands_of_a_report_can_be_typed_into_a_shell(text: str, tmp_path: Path) -> None:
    text = text.replace("\0", "").encode("utf-8", "replace").decode()
    typed = ["growkit", "finetune", text, "--data", f"{text} --seed {text}", "--data-dir", f"'{text} --seed"]
    line = command_line(shlex.join(typed))
    shown = in_lines(line)
    done = subprocess.run(
        ["sh", "-c", shown.replace("growkit", "printf '%s\\0'", 1)], capture_output=True, check=True, cwd=tmp_path
    )
    assert done.stdout.decode().split("\0")[:-1] == typed[1:]
    assert not (tmp_path / "ran").exists()


def test_ci_examples_put_no_value_of_a_build_into_a_shell() -> None:
    """A branch or a title in `${{ }}` or an unquoted variable would be a command."""
    github = yaml.safe_load((ROOT / "examples/ci/github-actions.yml").read_text(encoding="utf-8"))
    gitlab = yaml.safe_load((ROOT / "examples/ci/gitlab-ci.yml").read_text(encoding="utf-8"))
    scripts = [step["run"] for job in github["jobs"].values() for step in job["steps"] if "run" in step]
    scripts += [line for key in ("before_script", "script") for line in gitlab["verify"][key]]
    assert len(scripts) > 5
    assert [line for line in scripts if "$" in line or "`" in line] == []


# --- Triton


@EACH
def test_triton_config_and_labels_hold_the_text(text: str, tmp_path: Path) -> None:
    pytest.importorskip("tritonclient.grpc", reason="needs the triton extra: pip install 'growkit[triton]'")
    import onnx
    from google.protobuf import text_format
    from onnx import TensorProto, helper, numpy_helper
    from tritonclient.grpc import model_config_pb2

    from growkit.deploy.triton import write_model_repository

    name = text.encode("utf-8", "replace").decode()  # protobuf takes no half pairs
    shape = ("batch", 2)
    node = helper.make_node("Identity", [name], ["logits"])
    ends = [helper.make_tensor_value_info(one, TensorProto.FLOAT, shape) for one in (name, "logits")]
    proto = helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:]))
    helper.set_model_props(proto, {"labels": json.dumps([text, "b"]), name: name})
    exported = tmp_path / "onnx"
    (exported / "test_data_set_0").mkdir(parents=True)
    onnx.save_model(proto, exported / "model.onnx")
    import numpy as np

    sample = numpy_helper.from_array(np.zeros((1, 2), np.float32)).SerializeToString()
    (exported / "test_data_set_0" / "input_0.pb").write_bytes(sample)
    folder = write_model_repository(exported, tmp_path / "models", TritonSettings(name="m")).folder
    config = text_format.Parse((folder / "config.pbtxt").read_text("utf-8"), model_config_pb2.ModelConfig())
    assert [one.name for one in config.input] == [name]
    assert len(config.model_warmup[0].inputs) == 1
    assert name in config.model_warmup[0].inputs
    labels = (folder / "labels.txt").read_bytes().decode().split("\n")
    assert labels == [visible(" ".join(text.split())), "b", ""]
    assert json.loads((folder / "metadata.json").read_text())["inputs"][0]["name"] == name
