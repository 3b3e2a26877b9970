"""Every option of every command, found by introspection, mistyped: exit status 2 and one message that names it."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from program import COMMAND, growkit

COMMANDS: dict[str, Any] = COMMAND.commands  # type: ignore[attr-defined]


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the program says to the words, which it must refuse as bad usage."""
    status, out, err = growkit(capsys, *words)
    assert (status, out) == (2, ""), words
    assert "Traceback" not in err, words
    return err


def is_number(option: Any) -> bool:
    """Whether the option takes a number."""
    annotation = option.type_descriptor.annotation
    return bool({int, float} & {annotation, *get_args(annotation)})


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_mistyped_option_is_named(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    parameters = COMMANDS[command].params
    options = [p for p in parameters if p.param_type_name == "option"]
    assert options
    for option in options:
        name = option.opts[0]
        rest = [p for p in parameters if p.required and p is not option]
        needed = [w for p in rest for w in ((p.opts[0], "x") if p.param_type_name == "option" else ("x",))]
        mistakes = [[f"{name}-typo"]]
        if option.is_flag:
            mistakes.append([f"{name}=abc"])
        else:
            mistakes.append([name])
            if is_number(option):
                mistakes += [[name, "abc"], [name, ""]]
        for mistake in mistakes:
            assert name in refused(capsys, command, *needed, *mistake), (command, mistake)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_of_80_columns_names_every_option_whole(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = growkit(capsys, command, "--help")
    assert status == 0
    assert max(map(len, out.splitlines())) <= 80
    options = [p for p in COMMANDS[command].params if p.param_type_name == "option"]
    names = {name for option in options for name in (*option.opts, *option.secondary_opts)}
    assert names - set(re.findall(r"--?[a-z0-9-]+", out)) == set()


def test_help_says_in_a_whole_sentence_what_each_command_does(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = growkit(capsys, "--help")
    assert status == 0
    lines = [line.split(maxsplit=1) for line in out.partition("Commands:\n")[2].splitlines()]
    assert {name for name, _ in lines} == set(COMMANDS)
    assert [told for _, told in lines if told.endswith("...") or not told.endswith(".")] == []


@pytest.mark.parametrize(
    ("command", "stage", "told"),
    [
        (("finetune", "--data", "x"), "grown", "the run's grown model, else its trained one, when left out"),
        (("export",), "finetuned", "the run's furthest stage when left out"),
        (("evaluate", "--data", "x"), "finetuned", "the run's furthest stage when left out"),
    ],
)
def test_help_tells_which_stage_is_taken(
    command: tuple[str, ...], stage: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("trained", "grown", "finetuned"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    assert str(tmp_path / stage) in growkit(capsys, *command, "--run", tmp_path)[1]
    assert told in " ".join(growkit(capsys, command[0], "--help")[1].split())


def test_numbers_are_recognised() -> None:
    """Without this, a change in typer's internals would quietly leave the numbers out."""
    numbers = {p.opts[0] for p in COMMANDS["finetune"].params if p.param_type_name == "option" and is_number(p)}
    assert {"--epochs", "--lr", "--seed", "--workers"} <= numbers
