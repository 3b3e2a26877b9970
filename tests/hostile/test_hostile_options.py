"""Every option of every command with values that nobody means: done, or refused in a line that names what is wrong.

pytest -m exhaustive tests/hostile/test_hostile_options.py tries them all.
"""

import dataclasses
import random
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from forked import Ended, Server
from judging import hold
from places import SIZES, TO

from growkit.text import visible
from growkit.train.settings import FitSettings
from growkit_cli import main as program

DATA = ("--data", "images", "--batch-size", 4, "--workers", 0, "--device", "cpu")
SHORT = (*DATA, "--steps", 2)
ONE = ("--lrs", "1e-3", "--evals", 1)
COMMANDS: dict[str, tuple[Any, ...]] = {
    "train": ("vit_tiny", *SIZES, "--set", "patch_size=8", *SHORT),
    "grow": ("small", *TO, *SHORT),
    "plan": ("small", *TO),
    "finetune": ("small", *SHORT, "--model-ema"),
    "evaluate": ("three/trained", *DATA),  # of the classes of the images
    "compare": ("small", *TO, *SHORT, "--methods", "net2net", "--controls", "none", "--seeds", 1, "--budgets", 1, *ONE),
    "sweep": (
        *("small", *TO, *DATA, "--steps", 8, *ONE, "--share", 1, "--trials", 1, "--operator-steps", 1),
        *("--operator-lrs", "1e-3", "--rank-choices", 2, "--noises", 1, "--stage-choices", "both"),
    ),
    "export": ("small", "--triton", "served"),
    "verify": ("fitting", "--run", "exported", "--no-latency"),
    "report": ("--run", "exported"),
}
TRAINING = {field.name for field in dataclasses.fields(FitSettings)}
NUMBERS = ("nan", "inf", "-inf", "-5", "99999999999999999999")  # no option of a number takes one of them
MORE_NUMBERS = ("0", "1e-320", "4294967296")
PATHS = ("", "no/such/path", "images", "x" * 300, "small/model.safetensors", "small/model.safetensors/y", "a\x1b[2Jb")
WORDS = ("", "word", "nan", "-5", "1e99", ",", "a=b=c", "1,,2", "a\x1b[2Jb", "no/such/path", "é", "x" * 5000)
ARGUMENTS = (
    *("depth", "=3", "nosuch=3", "depth=", "depth=0", "depth=-5", "depth=nan", "depth=1e99", "depth=[1]"),
    *("depth=99999999999999999999", "embed_dim=0", "embed_dim=-32", "embed_dim=3.5", "num_heads=0", "img_size=-1"),
    *("img_size=word", "patch_size=0", "in_chans=0", "num_classes=-1", "mlp_ratio=nan", "mlp_ratio=-1"),
    *("init_values=nan", "drop_path_rate=nan", "drop_path_rate=2", "qkv_bias=maybe", "class_token=-5"),
    *("norm_layer=os.system", "dtype=word", "device=cuda:9", "embed_layer=exec", "weight_init=word"),
)
Case = tuple[str, str, str]  # command, option and value


def cases() -> list[Case]:
    """All of them, but settings of training for `train` alone: other commands have the same ones."""
    found = []
    for name, command in typer.main.get_command(program.app).commands.items():  # type: ignore[attr-defined]
        for option in command.params if name in COMMANDS else ():
            if option.param_type_name != "option" or option.is_flag:
                continue
            if name in ("grow", "finetune", "compare", "sweep") and option.name in TRAINING and option.name != "steps":
                continue
            annotation = option.type_descriptor.annotation
            kinds, label = {annotation, *get_args(annotation)}, option.opts[0]
            values = ARGUMENTS if label in ("--set", "--from-set") else PATHS if Path in kinds else WORDS
            values = NUMBERS + MORE_NUMBERS if kinds & {int, float} else values
            found += [(name, label, value) for value in values]
    return found


CASES = cases()


@pytest.fixture(scope="module")
def place(server: Server, furnished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("place")
    shutil.copytree(furnished, root, dirs_exist_ok=True)
    (root / "run").rename(root / "exported")
    ended = server.run(root, ("train", *COMMANDS["train"], "--run", "three"))
    assert ended.status == 0, ended.err
    return root


def judged(server: Server, place: Path, folder: Path, case: Case) -> tuple[Ended, str | None]:
    """What is wrong with the answer; None where it is right."""
    command, option, value = case
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place, folder)
    before = contents(folder)
    # of memory there is less than what the largest of the numbers ask for, and more than any command needs here
    ended = server.run(folder, (command, *COMMANDS[command], option, value), deadline=30, memory=6 * 10**9)
    return ended, wrong(case, ended, before, contents(folder))


def contents(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.lstat().st_size for path in folder.rglob("*") if not path.is_dir()}


def wrong(case: Case, ended: Ended, before: dict[str, int], after: dict[str, int]) -> str | None:
    command, option, value = case
    if "Traceback" in ended.err or ended.status not in ((0, 1, 2) if command == "verify" else (0, 2)):
        return f"ended with {ended.status}: {ended.err[-300:]}"
    models = [name for name in before if name.startswith("small/")]
    if any(before[name] != after.get(name) for name in models):
        return "the model is lost"
    if "memory is used up" in ended.err:
        return "used up its memory"
    if ended.status != 2:
        return (
            "took it"
            if value in NUMBERS and (command, option, "1e-320") in CASES and option != "--source-flops"
            else None
        )
    lines = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    if "\x1b" in ended.err or len(lines) > 1 or any(len(line) > 1100 for line in lines):
        return f"said {ended.err[-300:]!r}"
    if "is nan at update" not in ended.err and before != after:  # a run that diverged keeps its last good weights
        return f"left {sorted(set(after) - set(before))[:5]}"
    words = [option.strip("-"), option.strip("-").rstrip("s"), visible(value)[:100] or "''"]
    words += ["no such file", "no model folder", "it is a folder"] * (not value)  # for an empty path is this folder
    words += [value.rpartition("/")[0]] * ("/" in value)  # what should hold it is what is wrong
    words += ["--triton"] * option.startswith("--triton") + [word for word in value.split("=") if "=" in value and word]
    return None if any(word in ended.err for word in words) else f"does not say what is wrong: {ended.err[-300:]}"


def test_sample_of_values(server: Server, place: Path, tmp_path: Path) -> None:
    drawn = random.Random(3).sample(CASES, 40)
    hold(drawn, lambda case: judged(server, place, tmp_path / "here", case))


@pytest.mark.exhaustive
@pytest.mark.parametrize("command", COMMANDS)
def test_every_value(command: str, server: Server, place: Path, tmp_path: Path) -> None:
    assert len(CASES) > 1500
    hold([case for case in CASES if case[0] == command], lambda case: judged(server, place, tmp_path / "here", case))


TWINS = {
    "ended with 1": "raise OverflowError('int too large')",
    "took it": "raise SystemExit(0)",
    "the model is lost": "open('small/model.safetensors', 'w').close(); raise SystemExit(2)",
    "left": "open('half', 'w').close(); raise SystemExit(2)",
    "said": r"import sys; sys.stderr.write('error: a\x1b[2Jb'); raise SystemExit(2)",
    "does not say": "import sys; sys.stderr.write('error: bad value'); raise SystemExit(2)",
}


@pytest.mark.parametrize("seen", TWINS)
def test_answers_that_are_wrong_are_found_out(seen: str, server: Server, place: Path, furnished: Path) -> None:
    case = ("plan", "--steps", "-5")
    before = contents(place)
    ended = server.run(place, ("plan",), spoil=TWINS[seen])
    problem = wrong(case, ended, before, contents(place))
    for name in ("half", "small/model.safetensors"):
        (place / name).unlink(missing_ok=True)
    shutil.copy(furnished / "small" / "model.safetensors", place / "small")
    assert problem is not None
    assert seen in problem
