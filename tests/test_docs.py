"""What the documents tell people to type exists, and what they link to is there."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import typer
from few_digits import write_few_digits

from growkit.compare.figures import figures_of
from growkit.compare.page import cost_table, main_table
from growkit.report.serving import GROUPS
from growkit_cli.main import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)|(?:src|href)=\"([^\"]+)\"")


def command_lines(text: str, program: str) -> list[str]:
    """Lines of the code blocks that call `program`, continued lines joined."""
    blocks = "\n".join(FENCE.findall(text)).replace("\\\n", " ")
    parts = re.split(r"\n|&&|;|\|", blocks)
    lines = [part.strip().removeprefix("$ ").strip() for part in parts]
    return [line for line in lines if line == program or line.startswith(f"{program} ")]


def complaint(line: str) -> str | None:
    """What the program's own parser holds against a growkit command line; nothing is run."""
    program: Any = typer.main.get_command(app)
    words = shlex.split(line, comments=True)[1:]
    if not words or words[0].startswith("-"):
        name, command = "growkit", program
    else:
        name, *words = words
        command = program.commands.get(name)
        if command is None:
            return f"no command {name!r}"
    context = command.context_class(command, info_name=name)
    try:
        given, extra, _ = command.make_parser(context).parse_args(list(words))
    except Exception as error:  # of click, which typer brings along under changing names
        return str(error)
    missing = [p.name for p in command.params if p.required and given.get(p.name) is None]
    if missing and "--help" not in words:
        return f"missing {missing}"
    return f"too many arguments {extra}" if extra else None


@pytest.mark.slow
def test_python_of_the_docs_goes_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = (block for block in FENCE.findall((ROOT / "docs" / "python.md").read_text(encoding="utf-8")))
    monkeypatch.chdir(tmp_path)
    write_few_digits(Path("images"))
    small = {
        "img_size": 8,
        "patch_size": 4,
        "in_chans": 1,
        "num_classes": 10,
        "embed_dim": 64,
        "depth": 2,
        "num_heads": 1,
    }
    torch.save({"model": timm.create_model("deit_tiny_patch16_224", **small).state_dict()}, "small.pth")
    shorter = code.replace('"steps": 20', '"steps": 2')
    assert shorter.count('"steps": 2}') == 1
    monkeypatch.setattr("sys.argv", ["growkit"])
    exec(compile(shorter, "python.md", "exec"), {})
    assert json.loads(Path("run/verify/report.json").read_text(encoding="utf-8"))["verdict"] == "pass"
    steps = json.loads(Path("run/record.json").read_text(encoding="utf-8"))["steps"]
    assert [step["command"] for step in steps] == ["grow", "finetune", "export", "verify"]


def slugs(text: str) -> set[str]:
    """Anchors of a document's headings, made as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path, text: str) -> list[str]:
    """Relative links of a document that lead nowhere."""
    broken = []
    for link in ("".join(pair) for pair in LINK.findall(FENCE.sub("", text))):
        file, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = path.parent / file if file else path
        there = text if not file else target.read_text("utf-8") if target.is_file() else ""
        if (file and not target.exists()) or (anchor and anchor not in slugs(there)):
            broken.append(link)
    return broken


def test_every_growkit_line_of_the_documents_parses() -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in DOCUMENTS}
    assert all(command_lines(texts[name], "growkit") for name in ("README.md", "ci.md", "adoption.md", "serving.md"))
    lines = [line for text in texts.values() for line in command_lines(text, "growkit")]
    complaints = {line: complaint(line) for line in lines}
    assert {line: said for line, said in complaints.items() if said} == {}


def test_adoption_names_options_and_gates_that_exist() -> None:
    text = (ROOT / "docs" / "adoption.md").read_text(encoding="utf-8")
    program: Any = typer.main.get_command(app)
    known = {option for command in program.commands.values() for p in command.params for option in p.opts}
    assert set(re.findall(r"--[a-z][a-z-]+", text)) <= known
    commands = {words.split()[0] for words in re.findall(r"`(?:growkit )?([a-z]+(?: --[^`]*)?)`", text)}
    assert commands - {"preprocessing"} <= set(program.commands)
    gates = text.partition("| gate |")[2].partition("\n\n")[0]
    for name in ("It starts where the source stands", "It is at least as accurate as its source", *GROUPS.values()):
        words = re.sub(r"^(It gives the model's|It) ", "", name)  # some share a row
        assert words in gates, name


def test_every_make_target_of_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w+):", makefile, re.MULTILINE))
    lines = command_lines((ROOT / "README.md").read_text(encoding="utf-8"), "make")
    assert {line.split()[1] for line in lines} <= targets
    assert {"make demo", "make test"} <= {" ".join(line.split()[:2]) for line in lines}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(path: Path) -> None:
    assert broken_links(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("growkit shrink a.pth", "shrink"),
        ("growkit grow a.pth --to deit_base --colour red", "--colour"),
        ("growkit grow --to deit_base", "missing"),
        ("growkit grow a.pth b.pth --to deit_base", "too many"),
        ("growkit grow a.pth --to", "--to"),
    ],
)
def test_wrong_command_line_is_found(line: str, reason: str) -> None:
    assert reason in (complaint(line) or "")


@pytest.mark.parametrize("line", ["growkit --help", "growkit grow --help", "growkit grow a.pth --to deit_base  # so"])
def test_right_command_line_is_accepted(line: str) -> None:
    assert complaint(line) is None


def test_command_lines_are_found_in_code_blocks_only() -> None:
    text = "growkit no\n```sh\n$ growkit a \\\n  --b && growkit c\ngrowkits d\n```\ngrowkit no\n"
    assert command_lines(text, "growkit") == ["growkit a    --b", "growkit c"]


def test_broken_link_is_found(tmp_path: Path) -> None:
    text = "# A title, here\n[a](#a-title-here) [b](#absent) [c](absent.md) [d](https://x.org/y)\n"
    assert broken_links(tmp_path / "x.md", text) == ["#absent", "absent.md"]


def test_what_eps_costs_is_the_most_that_was_measured() -> None:
    measured = re.findall(r"to eps, (\S+)", (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8"))
    for path in (ROOT / "README.md", ROOT / "docs" / "architecture.md"):
        (told,) = re.findall(r"differ\s+by at most (\S+) of", path.read_text(encoding="utf-8"))
        assert float(told) == max(map(float, measured)), path


def result_table(text: str) -> list[str]:
    """Rows of the document's table of results."""
    return [line for line in text.splitlines() if line.startswith("| ") and " ± " in line]


def test_tables_of_readme_and_result_files_follow_from_the_runs_on_file() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tables = []
    trained = "trained-source_2-cpu-cores_2026-11-30"
    for runs, document in (
        ("cifar10_2-cpu-cores_2026-11-24", "cifar10_2-cpu-cores_2026-11-24"),
        (f"cifar10-{trained}", f"cifar10-{trained}"),
        (f"cifar10-{trained.replace('_', '-12-epochs_', 1)}", f"cifar10-{trained}"),
    ):
        path = ROOT / f"examples/results/compare-{document}.md"
        figures = figures_of(json.loads((path.parent / f"compare-{runs}.json").read_text(encoding="utf-8")))
        main, cost = ([f"| {' | '.join(row)} |" for row in table(figures)[1]] for table in (main_table, cost_table))
        lines = path.read_text(encoding="utf-8").splitlines()
        assert not [row for row in (*main, *cost) if row not in lines]
        tables.append(main)
    assert len(tables[0]) > 8
    assert result_table(readme) == tables[0]
    # of each arm, at the full budget
    ends, twice = ({row.split(" | ")[0][2:]: row.split(" | ")[2] for row in table} for table in tables[1:])
    told = [ends[arm] for arm in ("mango:steps=0", "source trained longer", "bert2bert:variant=aki", "from scratch")]
    told += [twice[arm] for arm in ("mango:steps=0", "source trained longer")]
    assert re.findall(r"\bat\s(\d\d\.\d ± \d\.\d)", readme) == told
