"""What each file may import from growkit: the layers of docs/architecture.md, held over ast."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BASE = "errors ranges text files settings record checkpoint"
ALL = f"{BASE} pictures core arch methods source adapt lineage grow train deploy report"
MAY_IMPORT = {  # 'x' also covers the modules of package x, unless 'x.*' or their own name has a row
    "__init__": "",
    "errors": "",
    "text": "",
    "seeds": "",
    "ranges": "errors",
    "settings": "ranges",
    "unmeant": "ranges",
    "files": "errors",
    "float32": "",
    "mcnemar": "",
    "lock": "errors files",
    "record": "errors files",
    "checkpoint": "errors text files",
    "core": "errors core",
    "arch.spec": "errors text",
    "arch.recognise": "errors arch.spec arch.vit",
    "arch.*": "errors arch.spec",
    "arch": "errors arch",
    "methods": "errors ranges settings core arch.spec methods",
    "source": "errors seeds settings checkpoint arch",
    "adapt": "errors text seeds arch source",
    "lineage": "source",
    "grow": "ranges settings core arch methods",
    "pictures": "errors text",
    "train.settings": "errors ranges",
    "train": "errors ranges text files float32 mcnemar seeds pictures train",
    "deploy.settings": "ranges deploy.form",
    "deploy.form": "errors ranges",
    "deploy": "errors ranges text files float32 mcnemar record pictures deploy",
    "testing": "source deploy",
    "report.run": "errors text record report compare.page",
    "report": "errors text files record report",
    "plan": ALL,
    "compare.settings": "errors ranges settings",
    "compare": f"{ALL} unmeant plan job compare",
    "evaluation": "errors settings text record checkpoint source train deploy",
    "exporting": "errors settings unmeant files record source train deploy evaluation history",
    "verifying": "errors settings unmeant text files record source train deploy evaluation",
    "history": "record arch source lineage train",
    "job": "errors record train.progress",
    "stage": "errors unmeant text files checkpoint train job",
    "growing": f"{ALL} history job stage",
    "fitting": f"{ALL} history job stage",
    "demo": ALL,
}


def imports(source: str) -> list[str]:
    """Dotted names of what a file of growkit imports from growkit or growkit_cli."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found += [f"{module}.{alias.name}" for alias in node.names]
    return [name for name in found if name.startswith((".", "growkit.", "growkit_cli."))]


def row_of(module: str) -> str:
    """Of MAY_IMPORT, the row of `module` ('methods.mango'); it must have one."""
    parent = module.partition(".")[0]
    row = next((key for key in (module, f"{parent}.*", parent) if key in MAY_IMPORT), None)
    assert row, f"{module} has no row in MAY_IMPORT: say what it may import"
    return row


def violations(module: str, source: str) -> list[str]:
    """Imports that the row of `module` does not allow."""
    allowed = tuple(f"growkit.{name}." for name in ("__version__", *MAY_IMPORT[row_of(module)].split()))
    return [name for name in imports(source) if not f"{name}.".startswith(allowed)]


def modules() -> dict[str, Path]:
    """Every file of growkit by dotted name; a package goes by its own name."""
    found = {}
    for path in sorted((ROOT / "growkit").rglob("*.py")):
        parts = path.relative_to(ROOT / "growkit").with_suffix("").parts
        found[".".join(parts[:-1] if parts[1:] and parts[-1] == "__init__" else parts)] = path
    return found


@pytest.mark.parametrize("module", modules())
def test_file_imports_only_what_lies_below_it(module: str) -> None:
    assert violations(module, modules()[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("row", [row for row in MAY_IMPORT if ALL not in MAY_IMPORT[row]])
def test_no_direction_is_allowed_that_nothing_takes(row: str) -> None:
    """Later code would take it, and nobody have meant it."""
    taken = [name for module, path in modules().items() if row_of(module) == row for name in imports(path.read_text())]
    allowed = MAY_IMPORT[row].split()
    assert [other for other in allowed if not any(f"{n}.".startswith(f"growkit.{other}.") for n in taken)] == []


@pytest.mark.parametrize(
    ("module", "line", "culprit"),
    [
        ("core.ring", "from growkit.arch.spec import Space", "growkit.arch.spec.Space"),
        ("methods.mango", "from growkit.arch import find", "growkit.arch.find"),
        ("arch.vit", "from growkit.arch import find", "growkit.arch.find"),
        ("train.loop", "from growkit import grow", "growkit.grow"),
        ("deploy.export", "def f():\n    import growkit.methods.mango", "growkit.methods.mango"),
        ("growing", "from growkit_cli import console", "growkit_cli.console"),
        ("report.page", "from .plot import draw", ".plot.draw"),
        ("files", "from growkit.errors_of_others import x", "growkit.errors_of_others.x"),
    ],
)
def test_import_from_a_higher_layer_is_found(module: str, line: str, culprit: str) -> None:
    assert violations(module, line) == [culprit]


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("methods.mango", "from growkit.arch import spec"),
        ("growing", "from growkit import __version__\nimport growkit.grow\nimport torch"),
    ],
)
def test_import_from_a_lower_layer_is_allowed(module: str, line: str) -> None:
    assert violations(module, line) == []


def test_file_without_a_row_is_refused() -> None:
    with pytest.raises(AssertionError, match="newcomer has no row"):
        violations("newcomer", "")


def test_scipys_statistics_are_loaded_only_where_they_are_used() -> None:
    """They take half a second, which every command would wait for."""
    for module, path in modules().items():
        imported = [one for one in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(one, ast.ImportFrom)]
        assert not any((one.module or "").startswith("scipy.stats") for one in imported), module
