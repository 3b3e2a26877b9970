"""What is kept of the words a command was started with."""

import shlex

import pytest
import typer
from typer.testing import CliRunner

from growkit_cli.typed import Typed, command_line

app = typer.Typer()
told: list[str] = []


@app.callback()
def program(loud: bool = False) -> None:
    pass


@app.command(cls=Typed)
def inner(name: str, size: int = 1) -> None:
    told.append(command_line())


@app.command(cls=Typed)
def outer(names: list[str]) -> None:
    told.append(command_line())
    app(["inner", "own", "--size", "2"], standalone_mode=False)
    told.append(command_line())


def test_torchrun_is_told_with_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for hosts, line in ((1, "torchrun --nproc-per-node 2"), (3, "torchrun --nnodes 3 --nproc-per-node 2")):
        for name, value in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 2), ("WORLD_SIZE", 2 * hosts)):
            monkeypatch.setenv(name, str(value))
        told.clear()
        assert CliRunner().invoke(app, ["inner", "own"]).exit_code == 0
        assert told == [f"{line} -m -- growkit_cli inner own"]


def test_words_are_those_after_the_program_and_a_command_run_by_another_has_its_own() -> None:
    told.clear()
    assert CliRunner().invoke(app, ["--loud", "outer", "two words", "it's"]).exit_code == 0
    whole = shlex.join(["growkit", "outer", "two words", "it's"])
    assert told == [whole, "growkit inner own --size 2", whole]
    assert command_line() == "growkit"
