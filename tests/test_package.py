"""What a user installs: the wheel holds the two packages and nothing else."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"growkit": ROOT / "growkit", "growkit_cli": ROOT / "cli" / "growkit_cli"}


def modules_of_checkout() -> set[str]:
    """Wheel names of every .py file of both packages."""
    return {
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
