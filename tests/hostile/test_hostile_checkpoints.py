"""Damaged and hostile checkpoints and model folders: no code runs, nothing half-written, no wrong success.

Every mutant goes through `growkit grow` in a process of its own, with 1 GB of memory and 20 s of time beyond what
growkit takes itself. pytest -m exhaustive tests/hostile/test_hostile_checkpoints.py runs them all.
"""

import argparse
import json
import random
import shutil
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_mutants import CANARY, SOURCE, Mutate, files
from forked import Ended, Server
from judging import hold
from pairs import published_scale, tiny
from safetensors.torch import load_file
from torch import Tensor

from growkit.checkpoint import write_model

MEMORY, SECONDS = 10**9, 20
SIZES = ("--set", "embed_dim=16", "--set", "num_heads=2", "--set", "depth=3")
# widths stay and layers are copied: every tensor of the source is to be found again in what is grown
GROW = ("--to", "vit_tiny", *SIZES, "--method", "llama-pro", "--run", "run", "--device", "cpu")
BASE = tiny(16, 2, 2)


@pytest.fixture(scope="module")
def mutants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Mutate]:
    folder = tmp_path_factory.mktemp("good") / "model"
    folder.mkdir()
    model = published_scale(BASE)
    labels = list("abcdefg")
    prepared = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
    write_model(folder, model, preprocessing=prepared, labels=labels, history={"stage": "trained"})
    return files(dict(model.state_dict()), folder, seed=0, rounds=24)


def judged(server: Server, mutant: Mutate, name: str, folder: Path, **job: Any) -> tuple[Ended, str | None]:
    """What is wrong with the answer to a mutant; None where it is right."""
    shutil.rmtree(folder, ignore_errors=True)
    place = folder / "given"
    place.mkdir(parents=True)
    mutant(place, random.Random(name))
    (given,) = place.iterdir()
    before = listed(folder)
    bare = () if given.name == SOURCE else ("--from-set", "num_heads=2")
    job = {"memory": MEMORY, "deadline": SECONDS, **job}
    ended = server.run(folder, ("grow", f"given/{given.name}", *bare, *GROW), **job)
    return ended, wrong(ended, folder, given, before)


def listed(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def wrong(ended: Ended, folder: Path, given: Path, before: set[str]) -> str | None:
    if list(folder.rglob(CANARY)):
        return "code of the file ran"
    if "Traceback" in ended.err:
        return f"a traceback: {ended.err.splitlines()[-1]}"
    if "memory is used up" in ended.err:  # one line, and still more than the file is worth
        return "used up its memory"
    if ended.status not in (0, 1, 2):
        return f"ended with {ended.status}: {ended.err[-300:]}"
    made = {path for path in listed(folder) - before if not path.startswith("run")}
    if made:
        return f"made {made}"
    if ended.status:
        if (folder / "run").exists():
            return f"left {listed(folder / 'run')}"
        lines = ended.err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        if len(errors) != 1 or not all(line.isprintable() for line in lines):
            return f"said {ended.err[-300:]!r}"
        return None
    return not_grown_from(given, folder / "run" / "grown")


def not_grown_from(given: Path, grown: Path) -> str | None:
    """How a grown model differs from what an independent loader reads; None where it holds all of it."""
    state = independent(given)
    if state is None:
        return "grew what no other loader reads"
    made = load_file(grown / "model.safetensors")
    rest = [name for name in state if not name.startswith("blocks.")]
    differ = [name for name in rest if name not in made or not torch.equal(made[name], state[name].float())]
    if differ or not all(bool(torch.isfinite(tensor).all()) for tensor in made.values()):
        return f"grew something else: {differ[:3]}"
    layers = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    for layer in layers:
        own = {n.split(".", 2)[2]: t.float() for n, t in state.items() if n.startswith(f"blocks.{layer}.")}
        copies = ({n: made.get(f"blocks.{at}.{n}") for n in own} for at in range(3))
        if not any(all(c[n] is not None and torch.equal(c[n], t) for n, t in own.items()) for c in copies):
            return f"grew another layer {layer}"
    config = json.loads((grown / "config.json").read_text(), parse_constant=float)
    prepared = config["pretrained_cfg"]
    if not np.isfinite([*prepared["mean"], *prepared["std"]]).all() or not min(prepared["std"]) > 0:
        return f"prepares images by {prepared}"
    return None


def independent(given: Path) -> dict[str, Tensor] | None:
    """The weights as torch or safetensors reads them; None where they do not, or names collide."""
    path = given / "model.safetensors" if given.is_dir() else given
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # of whatever kind: it does not read the file, and growkit must not either
        return None
    state = content.get("model", content)
    plain = {str(name).removeprefix("module."): tensor for name, tensor in state.items()}
    return plain if len(plain) == len(state) else None


def test_sample_of_mutants(server: Server, mutants: dict[str, Mutate], tmp_path: Path) -> None:
    names = random.Random(1).sample(sorted(mutants), 36)
    hold(names, lambda name: judged(server, mutants[name], name, tmp_path / "here"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", range(4))
def test_every_mutant(part: int, server: Server, mutants: dict[str, Mutate], tmp_path: Path) -> None:
    assert len(mutants) >= 700
    hold(list(mutants)[part::4], lambda name: judged(server, mutants[name], name, tmp_path / "here"))


def test_undamaged_sources_grow(server: Server, mutants: dict[str, Mutate], tmp_path: Path) -> None:
    """Else every refusal would be a pass."""
    for name in ("zip.pth of float16", "legacy.pth of strided", "zip.pth of prefixed", "growkit.json a word"):
        ended, problem = judged(server, mutants[name], name, tmp_path / "here")
        assert (ended.status, problem) == (0, None), (name, ended.err)


TWINS = {
    "code of the file ran": (
        "gadget os.system",
        """
        import torch
        load = torch.load
        torch.load = lambda *a, **k: load(*a, **{**k, "weights_only": False, "mmap": False})
        """,
    ),
    "a traceback: ValueError": (
        "zip.pth of sparse",
        """
        import growkit.source
        def raised(*a, **k):
            raise ValueError("odd")
        growkit.source.read_checkpoint = raised
        """,
    ),
    "used up its memory": (
        "zip.pth of NaN",
        """
        import growkit.source
        growkit.source.read_checkpoint = lambda *a, **k: bytearray(3 * 10**9)
        """,
    ),
    "grew something else": (
        "zip.pth of float16",
        """
        import growkit.source
        read = growkit.source.read_checkpoint
        def other(*a, **k):
            found = read(*a, **k)
            found.state["cls_token"] += 1
            return found
        growkit.source.read_checkpoint = other
        """,
    ),
    "left": ("zip.pth of NaN", "import os; os.makedirs('run/grown')"),
    "made": ("zip.pth of NaN", "open('.source.partial', 'w').close()"),
    "said": ("zip.pth of NaN", r"import sys; sys.stderr.write('\x1b[2J')"),
    "ended with -14": ("zip.pth of NaN", "import time; time.sleep(60)"),
}


@pytest.mark.parametrize("seen", TWINS)
def test_growkit_that_trusts_what_it_is_given_is_found_out(
    seen: str, server: Server, mutants: dict[str, Mutate], tmp_path: Path
) -> None:
    name, spoil = TWINS[seen]
    deadline = 3 if seen.startswith("ended") else SECONDS
    _, problem = judged(server, mutants[name], name, tmp_path / "here", spoil=textwrap.dedent(spoil), deadline=deadline)
    assert problem is not None
    assert seen in problem
