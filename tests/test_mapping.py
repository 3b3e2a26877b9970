"""Checkpoints and states are mapped: what is not used of them takes no memory, and no page is copied at the start."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from growkit.checkpoint import read_checkpoint
from growkit.train.resume import load_state, save_state

SIZE = 2**26  # bytes
WEIGHTS = {"weight": torch.zeros(2**12, SIZE // 2**14)}
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def own_bytes() -> int:
    """Memory of this process that no file is behind."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


@pytest.mark.parametrize(
    ("name", "write", "read"),
    [
        ("source.pth", lambda path: torch.save(WEIGHTS, path), lambda path: read_checkpoint(path).state),
        ("source.safetensors", lambda path: save_file(WEIGHTS, path), lambda path: read_checkpoint(path).state),
        (
            "state.pt",
            lambda path: save_state(path.parent, {"identity": {}, "step": 1, "training": {}, **WEIGHTS}),
            lambda path: load_state(path.parent, {}),
        ),
    ],
)
def test_what_is_read_is_mapped(
    tmp_path: Path, name: str, write: Callable[[Path], object], read: Callable[[Path], dict[str, torch.Tensor]]
) -> None:
    path = tmp_path / name
    write(path)
    before = own_bytes()
    found = read(path)
    assert own_bytes() - before < SIZE / 4
    copied = found["weight"].clone()
    assert own_bytes() - before > SIZE * 3 / 4  # as it would be without
    assert torch.equal(copied, WEIGHTS["weight"])


def test_state_that_is_mapped_can_be_written_anew(tmp_path: Path) -> None:
    save_state(tmp_path, {"identity": {}, "step": 1, "training": {}, "moment": torch.ones(1000)})
    state = load_state(tmp_path, {})
    state["moment"] += 1
    save_state(tmp_path, state)
    state["moment"] += 1
    assert torch.equal(load_state(tmp_path, {})["moment"], torch.full((1000,), 2.0))
