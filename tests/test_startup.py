"""`growkit --help` answers without loading what only work needs."""

import os
import pty
import subprocess
import sys
from types import SimpleNamespace

import pytest
import typer

from growkit import __version__
from growkit_cli.console import Console
from growkit_cli.main import app
from growkit_cli.progress import telling

HEAVY = {"torch", "torchvision", "timm", "onnx", "onnxruntime", "numpy", "sklearn"}
COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
RUN = """
import sys
sys.argv = ["growkit", *sys.argv[1:]]
from growkit_cli.main import main
try:
    main()
finally:
    sys.stderr.write(" ".join(sys.modules))
"""


def run(*arguments: str, program: str = RUN) -> tuple[str, set[str]]:
    """Standard output of a growkit command, and the heavy modules it loaded."""
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    return done.stdout, HEAVY & set(done.stderr.split())


def test_commands_are_registered() -> None:
    assert isinstance(app, typer.Typer)
    assert {"grow", "finetune", "export", "verify", "demo"} <= set(COMMANDS)


def test_help_lists_every_command_without_heavy_imports() -> None:
    output, heavy = run("--help")
    assert [name for name in COMMANDS if name not in output] == []
    assert heavy == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_command_loads_nothing_heavy(command: str) -> None:
    output, heavy = run(command, "--help")
    assert "Usage" in output
    assert heavy == set()


def test_version_is_printed_without_heavy_imports() -> None:
    assert run("--version") == (f"{__version__}\n", set())


def test_heavy_import_is_found() -> None:
    program = "import sys, numpy; sys.stderr.write(' '.join(sys.modules))"
    assert run(program=program) == ("", {"numpy"})


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
def test_terminal_and_pipe_get_a_line_before_anything_heavy_is_loaded(terminal: bool) -> None:
    # The first import of torch fails here: what was said until then is all there is.
    program = RUN.replace("import sys", "import sys; sys.modules['torch'] = None")
    ours, theirs = pty.openpty() if terminal else os.pipe()  # reading end, writing end
    try:
        command = [sys.executable, "-c", program, "evaluate", "none.pth", "--data", "none"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs)
        said = os.read(ours, 65536).decode().splitlines()
    finally:
        os.close(ours)
        os.close(theirs)
    assert (said[0], done.stdout) == (f"growkit {__version__}: evaluate", b"")


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_one_of_several_processes_says_the_first_line(rank: str, lines: int) -> None:
    program = RUN.replace("import sys", "import sys; sys.modules['torch'] = None")
    command = [sys.executable, "-c", program, "evaluate", "none.pth", "--data", "none"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "RANK": rank})
    assert done.stderr.splitlines().count(f"growkit {__version__}: evaluate") == lines


@pytest.mark.parametrize(("seconds", "lines"), [(0.1, 0), (2.0, 4)])
def test_scoring_shows_a_bar_with_its_rate_once_it_takes_long(
    seconds: float, lines: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(seconds * n for n in range(9))
    monkeypatch.setattr("growkit_cli.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    with telling(Console()) as tell:
        progress = tell("scoring the source")
        for done in (10, 20, 30, 40):
            progress(done, 40)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == lines
    assert said[:1] == (["scoring the source 10/40 5 images/s"] if lines else [])
