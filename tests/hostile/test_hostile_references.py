"""Damaged golden references: held or refused in a line, never a traceback, a hang or a yes to other answers.

pytest -m exhaustive tests/hostile/test_hostile_references.py tries them all.
"""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checkpoint_mutants import damaged
from forked import Ended, Server
from judging import hold
from onnx import numpy_helper

WAYS = {
    "model": ("verify", "run/grown", "--model-only", "--reference", "golden", "--run", "new"),
    "file": ("verify", "run/onnx/model.onnx", "--reference", "golden", "--run", "new"),
    "both": ("verify", "--run", "run", "--reference", "golden", "--no-latency"),
}
TENSORS = [f"test_data_set_{number}/{kind}_0.pb" for number in (0, 1) for kind in ("input", "output")]
FILES = ["reference.json", *TENSORS]
VALUES = (None, -1, True, 1e300, float("nan"), 10**30, "\x1b[2J", "x" * 10_000, [], {})
Mutate = Callable[[Path, random.Random], None]


def in_the_place_of(name: str, what: str) -> Mutate:
    def make(folder: Path, rng: random.Random) -> None:
        path = folder / name
        path.unlink()
        if what == "empty":
            path.touch()
        elif what == "folder":
            path.mkdir()
        elif what == "pipe":
            os.mkfifo(path)
        elif what == "zeros":
            path.symlink_to("/dev/zero")

    return make


def hurt(name: str, how: str) -> Mutate:
    return lambda folder, rng: (folder / name).write_bytes(damaged((folder / name).read_bytes(), how, rng)) and None


def entry(place: tuple[Any, ...], value: object) -> Mutate:
    """reference.json with another value at a place."""

    def make(folder: Path, rng: random.Random) -> None:
        told = json.loads((folder / "reference.json").read_text())
        inside = told
        for key in place[:-1]:
            inside = inside[key]
        inside[place[-1]] = value
        (folder / "reference.json").write_text(json.dumps(told))

    return make


def places(inside: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, value in inside.items() if isinstance(inside, dict) else enumerate(inside):
        yield (*before, key)
        if isinstance(value, dict | list):
            yield from places(value, (*before, key))


def files(told: dict[str, Any]) -> dict[str, Mutate]:
    """All mutants by name, of a reference whose reference.json holds `told`."""
    found = {
        f"{name} {how} {number}": hurt(name, how)
        for name in FILES
        for how in ("cut", "flip", "out", "in", "zero")
        for number in (0, 1)
    }
    found |= {
        f"{name} {what}": in_the_place_of(name, what)
        for name in FILES
        for what in ("missing", "empty", "folder", "pipe", "zeros")
    }
    decisive = {key: value for key, value in told.items() if key != "versions"}  # which nothing is decided by
    for place in (*places(decisive), ("versions",)):
        for value in VALUES:
            found[f"{'.'.join(map(str, place))} {str(value)[:9]!r}"] = entry(place, value)
    return found


@pytest.fixture(scope="module")
def sound(server: Server, furnished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and a reference of its model."""
    root = tmp_path_factory.mktemp("sound")
    shutil.copytree(furnished / "run", root / "run")
    write = ("verify", "run/grown", "--model-only", "--update-reference", "--reference", "golden", "--run", "run")
    ended = server.run(root, write)
    assert ended.status == 0, ended.err
    return root


@pytest.fixture(scope="module")
def mutants(sound: Path) -> dict[str, Mutate]:
    return files(json.loads((sound / "golden" / "reference.json").read_text()))


def judged(server: Server, sound: Path, mutant: Mutate, name: str, folder: Path) -> tuple[Ended, str | None]:
    """What is wrong with the answers to a mutant, the last one given; None where they are right."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound, folder)
    mutant(folder / "golden", random.Random(name))
    # entries are read in one place, whatever is held against them; files are looked for by each way
    for way in WAYS if name.startswith(tuple(FILES)) or name == "none" else ("both",):
        ended = server.run(folder, WAYS[way], deadline=20, memory=2 * 10**9)
        if problem := wrong(ended, folder / "golden", sound / "golden"):
            return ended, f"{way}: {problem}"
    return ended, None


def wrong(ended: Ended, mutant: Path, sound: Path) -> str | None:
    if "Traceback" in ended.err or ended.status not in (0, 1, 2) or "memory is used up" in ended.err:
        return f"ended with {ended.status}: {ended.err[-300:]}"
    if ended.status == 2:
        lines = ended.err.splitlines()
        if len([line for line in lines if line.startswith("error: ")]) != 1 or not all(map(str.isprintable, lines)):
            return f"said {ended.err[-300:]!r}"
    return other_answers(mutant, sound) if ended.status == 0 else None


def other_answers(mutant: Path, sound: Path) -> str | None:
    """The first tensor that NumPy finds to be another than the sound reference's."""
    for name in TENSORS:
        one, other = (
            numpy_helper.to_array(onnx.TensorProto.FromString((folder / name).read_bytes()))
            for folder in (mutant, sound)
        )
        if one.shape != other.shape or not np.allclose(one, other, rtol=0, atol=1e-3):
            return f"said yes to another {name}"
    return None


def test_sample_of_references(server: Server, sound: Path, mutants: dict[str, Mutate], tmp_path: Path) -> None:
    names = random.Random(4).sample(sorted(mutants), 12)
    hold(names, lambda name: judged(server, sound, mutants[name], name, tmp_path / "here"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", range(2))
def test_every_reference(part: int, server: Server, sound: Path, mutants: dict[str, Mutate], tmp_path: Path) -> None:
    assert len(mutants) > 250
    hold(list(mutants)[part::2], lambda name: judged(server, sound, mutants[name], name, tmp_path / "here"))


def test_undamaged_reference_is_met(server: Server, sound: Path, tmp_path: Path) -> None:
    """Else every refusal would be a pass."""
    ended, problem = judged(server, sound, lambda folder, rng: None, "none", tmp_path / "here")
    assert (ended.status, problem) == (0, None), ended.err


def test_yes_to_another_reference_is_found_out(server: Server, sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    shutil.copytree(sound, folder)
    path = folder / "golden" / TENSORS[1]
    stored = onnx.TensorProto.FromString(path.read_bytes())
    path.write_bytes(numpy_helper.from_array(-numpy_helper.to_array(stored), stored.name).SerializeToString())
    for command in WAYS.values():
        assert server.run(folder, command).status == 2  # its hash is another
        ended = server.run(folder, command, spoil="raise SystemExit(0)")
        assert wrong(ended, folder / "golden", sound / "golden") == f"said yes to another {TENSORS[1]}"
