"""Damaged and hostile ONNX files and reference data: no wrong yes, no traceback, no crash, bounded memory and time.

Every mutant goes through `growkit evaluate` and `growkit verify` in processes of their own, which may take 20 s and
6 GB. pytest -m exhaustive tests/hostile/test_hostile_onnx.py runs them all.
"""

import json
import random
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from forked import Ended, Server
from judging import hold
from onnx import numpy_helper
from onnx_mutants import Mutate, files
from pairs import published_scale, tiny
from PIL import Image

from growkit.checkpoint import write_model

MEMORY, SECONDS = 6 * 10**9, 20
VERIFY = ("verify", "--run", "run", "--no-latency")
EVALUATE = ("evaluate", "run/onnx/model.onnx", "--data", "images", "--workers", 0, "--device", "cpu", "--json")
MUTANTS = files(rounds=6)
LABELS = "abcdefg"


@pytest.fixture(scope="module")
def runs(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Runs with an exported model, by whether its weights lie beside it."""
    made = {}
    for beside in (False, True):
        folder = tmp_path_factory.mktemp("beside" if beside else "inside")
        (folder / "run" / "grown").mkdir(parents=True)
        prepared = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
        model = published_scale(tiny(32, 2, 2))
        labels = list(LABELS)
        write_model(folder / "run" / "grown", model, preprocessing=prepared, labels=labels, history={"stage": "grown"})
        ended = server.run(folder, ("export", "--onnx", "--run", "run", *["--external-data"] * beside))
        assert ended.status == 0, ended.err
        for split in ("train", "val"):
            for level, label in enumerate(LABELS):
                (folder / "images" / split / label).mkdir(parents=True)
                Image.new("RGB", (16, 16), (30 * level, 0, 90)).save(folder / "images" / split / label / "0.png")
        made[beside] = folder / "run"
    return made


def judged(
    server: Server,
    runs: dict[bool, Path],
    name: str,
    folder: Path,
    commands: Sequence[tuple[Any, ...]] = (EVALUATE, VERIFY),
    **job: Any,
) -> tuple[Ended, str | None]:
    """What is wrong with the answers to a mutant, the last one given; None where they are right."""
    mutant: Mutate = MUTANTS[name]
    sound = runs[getattr(mutant, "beside", False)]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copytree(sound, folder / "run")
    (folder / "images").symlink_to(sound.parent / "images")
    mutant(folder / "run", random.Random(name))
    before = contents(folder)
    for command in commands:
        ended = server.run(folder, command, **{"deadline": SECONDS, **job})
        if problem := wrong(ended, folder, before, sound, command):
            return ended, f"{command[0]}: {problem}"
    return ended, None


def contents(folder: Path) -> dict[str, int]:
    """Files with their sizes, but for what verify is there to write."""
    own = ("run/verify", "run/record.json")
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {
        name: path.lstat().st_size for name, path in paths.items() if not name.startswith(own) and not path.is_dir()
    }


def wrong(
    ended: Ended, folder: Path, before: dict[str, int], sound: Path, command: tuple[Any, ...] = VERIFY
) -> str | None:
    if "Traceback" in ended.err:
        return f"a traceback: {ended.err.splitlines()[-1]}"
    if ended.status not in (0, 1, 2):
        return f"ended with {ended.status}: {ended.err[-300:]}"
    if ended.memory > MEMORY:
        return f"took {ended.memory / 1e9:.1f} GB"
    if contents(folder) != before:
        return f"changed {set(contents(folder).items()) ^ set(before.items())}"
    if ended.status == 2:
        lines = ended.err.splitlines()
        if len([line for line in lines if line.startswith("error: ")]) != 1 or not all(map(str.isprintable, lines)):
            return f"said {ended.err[-300:]!r}"
    if any(not line.isprintable() for line in ended.out.splitlines()):
        return f"printed {ended.out[-300:]!r}"
    if ended.status:
        return None
    return scored(ended, folder) if command is EVALUATE else other_answers(folder / "run" / "onnx", sound / "onnx")


def scored(ended: Ended, folder: Path) -> str | None:
    """How the score is another than ONNX Runtime's answers give, on pictures normalised by hand; else None."""
    session = onnxruntime.InferenceSession(str(folder / "run" / "onnx" / "model.onnx"))
    files = sorted((folder / "images" / "val").rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(file)).transpose(2, 0, 1) for file in files])
    images = (pixels.astype(np.float32) / 255 - 0.5) / 0.5
    logits = session.run(None, {session.get_inputs()[0].name: images})[0]
    right = float((logits.argmax(1) == np.arange(len(LABELS))).mean())
    told = json.loads(ended.out)["top1"]
    return None if np.isfinite(logits).all() and abs(right - told) < 1e-6 else f"told {told}, it is {right}"


def other_answers(mutant: Path, sound: Path) -> str | None:
    """How a file answers, or what it holds, other than the sound one, as ONNX Runtime and NumPy see it; else None."""
    images = np.random.default_rng(5).standard_normal((3, 3, 16, 16)).astype(np.float32)
    answers, weights = [], []
    for place in (mutant, sound):
        file = str(place / "model.onnx")
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        answers.append(session.run(None, {session.get_inputs()[0].name: images})[0])
        stored = (numpy_helper.to_array(tensor, str(place)) for tensor in onnx.load(file).graph.initializer)
        weights.append(sorted((array.tobytes() for array in stored if array.size > 1), key=len))
    if answers[0].shape != answers[1].shape or not np.allclose(*answers, rtol=0, atol=1e-5):
        return "said yes to other answers"
    if weights[0] != weights[1]:
        return "said yes to other weights"
    for number in (0, 1):
        for kind in ("input_0.pb", "output_0.pb"):
            one, other = (
                numpy_helper.to_array(onnx.TensorProto.FromString((p / f"test_data_set_{number}" / kind).read_bytes()))
                for p in (mutant, sound)
            )
            if one.shape != other.shape or not np.allclose(one, other, rtol=0, atol=1e-3):
                return f"said yes to another {kind}"
    return None


def test_sample_of_mutants(server: Server, runs: dict[bool, Path], tmp_path: Path) -> None:
    names = random.Random(2).sample(sorted(MUTANTS), 16)
    hold(names, lambda name: judged(server, runs, name, tmp_path / "here"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", range(4))
def test_every_mutant(part: int, server: Server, runs: dict[bool, Path], tmp_path: Path) -> None:
    assert len(MUTANTS) >= 350
    hold(sorted(MUTANTS)[part::4], lambda name: judged(server, runs, name, tmp_path / "here"))


@pytest.mark.parametrize("beside", [False, True], ids=["inside", "beside"])
def test_undamaged_file_passes(beside: bool, server: Server, runs: dict[bool, Path], tmp_path: Path) -> None:
    """Else every refusal would be a pass."""
    shutil.copytree(runs[beside], tmp_path / "run")
    before = contents(tmp_path)
    ended = server.run(tmp_path, VERIFY)
    assert (ended.status, wrong(ended, tmp_path, before, runs[beside])) == (0, None), ended.err


TWINS = {
    "said yes to other answers": (
        "graph negated",
        """
        import growkit_cli.verify as v, sys
        raise SystemExit(0)
        """,
    ),
    "a traceback: ValueError": ("graph negated", "raise ValueError('odd')"),
    "took 2": ("graph negated", "b'x' * (2 * 10**9); raise SystemExit(2)"),
    "ended with -14": ("graph negated", "import time; time.sleep(60)"),
    "changed": ("graph negated", "open('run/onnx/.partial', 'w').close()"),
    "said": ("graph large Loop", r"import sys; sys.stderr.write('\\x1b[2J\\n')"),
}


@pytest.mark.parametrize("seen", TWINS)
def test_gate_that_trusts_what_it_is_given_is_found_out(
    seen: str, server: Server, runs: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "MEMORY", 2 * 10**9)  # 6 GB may take long to get
    name, spoil = TWINS[seen]
    deadline = 3 if seen.startswith("ended") else 6 * SECONDS
    job = {"spoil": textwrap.dedent(spoil), "deadline": deadline}
    _, problem = judged(server, runs, name, tmp_path / "here", (VERIFY,), **job)
    assert problem is not None
    assert seen in problem
