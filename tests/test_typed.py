"""What is kept of the words a command was started with."""

import shlex

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


def test_words_are_those_after_the_program_and_a_command_run_by_another_has_its_own() -> None:
    told.clear()
    assert CliRunner().invoke(app, ["--loud", "outer", "two words", "it's"]).exit_code == 0
    whole = shlex.join(["growkit", "outer", "two words", "it's"])
    assert told == [whole, "growkit inner own --size 2", whole]
    assert command_line() == "growkit"
