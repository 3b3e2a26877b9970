"""What a user installs: the wheel holds the two packages and nothing else."""

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PACKAGES = {"growkit": ROOT / "growkit", "growkit_cli": ROOT / "cli" / "growkit_cli"}


def modules_of_checkout() -> set[str]:
    """Wheel names of every .py file of both packages, and of what tells type checkers to read growkit's."""
    return {"growkit/py.typed"} | {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in PACKAGES.items()
        for path in folder.rglob("*.py")
    }


def misfits(names: list[str], expected: set[str]) -> set[str]:
    """Files missing from a wheel, and files that have no place in it."""
    info = re.compile(r"growkit-[^/]+\.dist-info/")
    return {name for name in names if not info.match(name)} ^ expected


def test_stray_or_missing_file_is_found() -> None:
    names = ["growkit/a.py", "tests/test_a.py", "growkit-0.1.0.dist-info/METADATA"]
    assert misfits(names, {"growkit/a.py", "growkit/b.py"}) == {"tests/test_a.py", "growkit/b.py"}


@pytest.mark.slow  # pip fetches the build backend
def test_wheel_holds_only_the_two_packages(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("growkit-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (licence,) = [name for name in names if name.endswith("LICENSE")]
        (entries,) = [name for name in names if name.endswith("entry_points.txt")]
        assert misfits(names, modules_of_checkout()) == set()
        assert "Apache License" in archive.read(licence).decode()
        assert "growkit = growkit_cli.main:main" in archive.read(entries).decode()


# --- the versions that were tested

SYSTEM = {"sys_platform": "linux", "platform_machine": "x86_64", "platform_system": "Linux"}  # of constraints.txt


def declared() -> list[Requirement]:
    """What pyproject.toml asks for, extras included, on the system that constraints.txt is of."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    wanted = [Requirement(line) for line in lines if not line.startswith("growkit[")]
    return [one for one in wanted if one.marker is None or one.marker.evaluate(SYSTEM)]


def pins(text: str) -> dict[str, Version]:
    """Versions by package; a line that is no pin, as one with a path or an address, is an error."""
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            assert re.fullmatch(r"[A-Za-z0-9._-]+", name), line
            found[canonicalize_name(name)] = Version(version)
    return found


def unmet(wanted: list[Requirement], tested: dict[str, Version]) -> list[str]:
    """Requirements that no tested version is there for."""
    return [
        str(one) for one in wanted if (at := tested.get(canonicalize_name(one.name))) is None or at not in one.specifier
    ]


def test_every_dependency_has_a_floor_and_a_tested_version_above_it() -> None:
    tested = pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    assert unmet(declared(), tested) == []
    assert [str(one) for one in declared() if not any(part.operator == ">=" for part in one.specifier)] == []
    assert len(declared()) > 20
    assert all(version.local is None for version in tested.values())


def test_packages_that_growkit_imports_bring_no_package_that_is_not_pinned() -> None:
    tested = pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    asked = {canonicalize_name(one.name) for one in declared()}
    for name in asked & {"torch", "timm", "onnx", "optuna", "safetensors", "typer", "rich", "huggingface-hub"}:
        brought = [Requirement(line) for line in metadata.requires(name) or ()]
        needed = [one for one in brought if one.marker is None or one.marker.evaluate({**SYSTEM, "extra": ""})]
        assert [str(one) for one in needed if canonicalize_name(one.name) not in tested] == [], name


def test_dependency_that_was_not_tested_is_found() -> None:
    wanted = [Requirement("a>=2"), Requirement("b>=1"), Requirement("C.d>=1")]
    assert unmet(wanted, pins("# system\na==1.9\nc-d==1.0\n")) == ["a>=2", "b>=1"]
    for line in ("a @ file:///home/me/a", "-e /home/me/growkit", "a>=1"):
        with pytest.raises((ValueError, AssertionError)):
            pins(line)
