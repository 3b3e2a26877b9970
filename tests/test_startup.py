"""`growkit --help` answers without loading what only work needs."""

import itertools
import os
import pty
import subprocess
import sys
from types import SimpleNamespace

import pytest
import typer
from rich.console import Console as RichConsole

from growkit import __version__
from growkit_cli.console import Console
from growkit_cli.main import app
from growkit_cli.progress import following, telling

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
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "RANK": rank, "LOCAL_RANK": rank})
    assert done.stderr.splitlines().count(f"growkit {__version__}: evaluate") == lines


@pytest.mark.parametrize(("seconds", "lines"), [(0.1, 0), (2.0, 2), (6.0, 4)])
def test_scoring_within_training_has_a_bar_of_its_own_once_it_takes_long(
    seconds: float, lines: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(0, seconds)
    monkeypatch.setattr("growkit_cli.console.time", SimpleNamespace(monotonic=lambda: next(clock)))
    with telling(Console()) as tell:
        training, scoring = tell("training"), tell("scoring the source")
        training(0, 2)
        for done in (0, 10, 20, 30, 40):
            scoring(done, 40, "5 images/s")
        said = capsys.readouterr().out.splitlines()
        assert len(said) == lines
        assert said[-1:] == (["scoring the source 40/40 5 images/s"] if lines else [])
        training(1, 2, "loss 1.0")
        training(2, 2, "loss 0.5")
    said = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in said] == (
        ["training 1/2 loss 1.0", "training 2/2 loss 0.5"] if lines else []
    )


def test_lines_for_logs_say_how_long_it_will_take(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(100, 1000, 30))
    monkeypatch.setattr("growkit_cli.console.time", SimpleNamespace(monotonic=lambda: next(clock)))
    with Console().progress("training") as bar:
        for done in (20, 30, 40, 60):  # resumed at 20: what was done before took none of this time
            bar(60).update(done, "loss 1.0")
    assert capsys.readouterr().out.splitlines() == [
        "training 30/60 loss 1.0",
        "training 40/60 loss 1.0, 0:01:00 left",
        "training 60/60 loss 1.0",
    ]


def test_time_left_is_not_guessed_from_what_is_done_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first update may compile, or decode all images."""
    now = [0.0]
    monkeypatch.setattr("growkit_cli.console.time", SimpleNamespace(monotonic=lambda: now[0]))
    with Console().progress("training") as bar:
        for done in range(101):
            bar(100).update(done)
            now[0] += 0.5 if done else 60.0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["training 1/100", "training 11/100 0:00:44 left"]


def test_a_log_gets_few_lines_of_fast_work_and_some_of_slow_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lines_of(total: int, parts: int, seconds: float) -> list[str]:
        clock = itertools.count(0, seconds)
        monkeypatch.setattr("growkit_cli.console.time", SimpleNamespace(monotonic=lambda: next(clock)))
        with Console().progress("training") as bar:
            for done in range(total * parts + 1):
                bar(total).update(done / parts)
        return capsys.readouterr().out.splitlines()

    assert len(lines_of(1000, 1, 0.1)) == 20
    assert lines_of(9, 1, 0.1) == []  # all of it took less than a second
    slow = lines_of(2, 10, 12)  # two updates of ten batches of twelve seconds
    assert slow[:3] == ["training 0/2", "training 0/2 0:03:12 left", "training 0/2 0:02:36 left"]
    assert slow[-1] == "training 2/2"
    assert len(slow) == 8


def test_a_log_of_many_runs_gets_a_line_where_one_takes_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(0, 2)
    monkeypatch.setattr("growkit_cli.console.time", SimpleNamespace(monotonic=lambda: next(clock)))
    with following(Console(), "comparing") as follow:
        for number, totals in enumerate(((14,), (5, 40))):  # updates of two seconds, of operators and of models
            progress = follow(f"run {number}", number, 2)
            for total in totals:
                for done in range(total + 1):
                    progress(done, total, "loss 1.0")
    assert capsys.readouterr().out.splitlines() == [
        "run 1 15/40 loss 1.0, 0:00:50 left",
        "run 1 30/40 loss 1.0, 0:00:20 left",
    ]


def test_a_terminal_keeps_the_bar_of_long_work_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def last_of(seconds: float) -> str:
        screen = RichConsole(force_terminal=True, width=120)
        console = Console()
        console.rich = screen
        with console.progress("scoring") as bar:
            bar(9).update(0)
            assert "scoring" in capsys.readouterr().out  # at once
            for task in bar(9).live.tasks:  # type: ignore[attr-defined]
                task.start_time -= seconds
            bar(9).update(9)
        return capsys.readouterr().out.split("scoring")[-1]

    erased = "\x1b[1A\x1b[2K"
    assert last_of(0).endswith(erased)
    assert not last_of(2).endswith(erased)


def test_a_terminal_shows_how_long_work_takes_and_how_long_it_will(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.rich = RichConsole(force_terminal=True, width=120)
    with console.working("exporting"), console.progress("latency") as bar:
        bar(9).update(1, "first")
        console.say("a line")
    said = capsys.readouterr().out
    assert "exporting" in said
    assert "0:00:00" in said
    assert "-:--:--" in said  # time left
    assert "a line" in said


def test_time_left_is_known_where_an_update_takes_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    console = Console()
    console.rich = RichConsole(force_terminal=True, width=120, color_system=None, get_time=lambda: now[0])
    with console.progress("training") as bar:
        for done in range(5):
            bar(9).update(done)
            now[0] += 120
    assert "4/9 0:10:00 0:10:00" in capsys.readouterr().out


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_number_of_a_bar_is_cut_on_a_narrow_terminal(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.rich = RichConsole(force_terminal=True, width=width, color_system=None)
    note = "loss 2.1213 top-1 14.06% lr 3.8e-07 1254 images/s"
    with console.progress("training deit_tiny_patch16_224") as bar:
        bar(12000).update(3541, note)
    shown = capsys.readouterr().out
    assert "3541/12000 0:00:00 -:--:--" in shown
    assert note in shown


def test_a_terminal_that_cannot_move_its_cursor_gets_the_lines_of_a_log(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    console = Console()
    console.rich = RichConsole(force_terminal=True, width=80)
    with console.working("growing"), console.progress("scoring") as bar:
        bar(9).update(9)
    assert capsys.readouterr().out == ""


def test_the_bar_of_many_runs_moves_within_each_and_bars_that_end_close(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.rich = RichConsole(force_terminal=True, width=100, color_system=None)
    with following(console, "comparing") as follow, telling(console) as tell:
        progress = follow("mango", 1, 4)
        progress(0, 8)
        progress(6, 8, "loss 1.0")
        scoring = tell("scoring")
        scoring(0, 40)
        assert len(console.rich._live_stack) == 2
        scoring(40, 40)
        assert len(console.rich._live_stack) == 1
        for _ in range(2):  # the first one failed
            scoring = tell("scoring")
            scoring(20, 40)
            assert len(console.rich._live_stack) == 2
    shown = capsys.readouterr().out
    assert "1/4" in shown
    assert "mango: loss 1.0" in shown


def test_a_log_is_not_told_that_work_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    with Console().working("exporting"):
        pass
    assert capsys.readouterr().out == ""
