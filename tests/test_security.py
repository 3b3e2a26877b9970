"""SECURITY.md promises what tests hold; and no file of growkit has the means to run what it reads."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
RUNNERS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
LOADERS = {"import_module", "run_path", "register_custom_ops_library"}
UNPICKLERS = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "subprocess"}


def promises() -> list[str]:
    """Rows of the table of promises."""
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.startswith("| **")]


def missing(row: str) -> list[str]:
    """Tests that a row names and that are not there."""
    found = []
    for file, name in NAMED.findall(row):
        path = ROOT / file
        tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
        if name not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}:
            found.append(f"{file}::{name}")
    return found


def test_every_promise_names_tests_that_exist() -> None:
    assert len(promises()) >= 10
    assert {row: missing(row) for row in promises() if missing(row) or not NAMED.search(row)} == {}


def test_promise_of_a_test_that_is_not_there_is_found() -> None:
    assert missing("`tests/test_security.py::test_nothing`, `tests/none.py::test_x`") == [
        "tests/test_security.py::test_nothing",
        "tests/none.py::test_x",
    ]


def dangers(source: str) -> list[str]:
    """Calls that could run or unpickle what was read, and imports of what does."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            modules = names if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in modules if name.partition(".")[0] in UNPICKLERS]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in RUNNERS or called.rpartition(".")[2] in LOADERS:
            found.append(called)
        if called == "torch.load" and given.get("weights_only") != "True":
            found.append("torch.load without weights_only")
        if given.get("allow_pickle", "False") != "False" or given.get("trust_remote_code", "False") != "False":
            found.append(f"{called} that trusts what it reads")
    return found


def test_no_source_file_unpickles_or_evaluates() -> None:
    files = [*(ROOT / "growkit").rglob("*.py"), *(ROOT / "cli").rglob("*.py")]
    found = {str(path.relative_to(ROOT)): dangers(path.read_text(encoding="utf-8")) for path in files}
    assert len(found) > 100
    assert {file: calls for file, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "import pickle",
        "from joblib import load",
        "eval(text)",
        "exec(text)",
        "os.system(text)",
        "importlib.import_module(name)",
        "options.register_custom_ops_library(path)",
    ],
)
def test_means_to_run_what_was_read_are_found(line: str) -> None:
    assert dangers(line) != []


def test_harmless_calls_are_none() -> None:
    assert dangers("re.compile(x); torch.compile(m); model.eval(); torch.load(p, weights_only=True)") == []
