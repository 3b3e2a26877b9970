"""Grown models match reference outputs that neither torch, nor timm, nor growkit made (tests/golden/make_vit.py)."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pairs import tiny

from growkit.deploy.export import export_onnx
from growkit.deploy.runtime import open_session
from growkit.grow import grow
from growkit.settings import GrowSettings

GOLDEN = Path(__file__).parent / "golden"
LOGITS = np.array(json.loads((GOLDEN / "vit.json").read_text())["logits"])
spec = importlib.util.spec_from_file_location("make_vit", GOLDEN / "make_vit.py")
assert spec is not None
assert spec.loader is not None
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)

SOURCE = tiny(reference.EMBED, reference.DEPTH, reference.HEADS)
# (embed, depth, heads) of the target, rank, and how far LayerNorm's eps lets it stand off
TARGETS = [((64, 2, 4), 1, 1e-12), ((64, 4, 4), 4, 1e-12), ((48, 3, 3), 1, 1e-5), ((80, 5, 5), 2, 1e-5)]


def grown(sizes: tuple[int, int, int], rank: int) -> torch.nn.Module:
    state = {name: torch.from_numpy(value) for name, value in reference.parameters().items()}
    return grow(SOURCE, tiny(*sizes), state, GrowSettings(rank=rank)).materialize()


@pytest.mark.parametrize(("sizes", "rank", "limit"), TARGETS)
def test_grown_model_answers_like_the_reference(sizes, rank, limit):
    with torch.no_grad():
        logits = grown(sizes, rank)(torch.from_numpy(reference.images())).numpy()
    assert np.abs(logits - LOGITS).max() <= limit


@pytest.mark.parametrize(("sizes", "rank", "limit"), TARGETS[1::2])  # one of each limit, and the most layers
def test_grown_onnx_file_answers_like_the_reference(sizes, rank, limit, tmp_path):
    images = reference.images().astype(np.float32)
    export_onnx(grown(sizes, rank).float(), tmp_path / "model.onnx")
    logits = open_session(tmp_path / "model.onnx").run(images)
    assert np.abs(logits - LOGITS).max() <= max(limit, 1e-5)


def test_stored_logits_are_those_of_the_script():
    assert np.abs(reference.forward(reference.parameters(), reference.images()) - LOGITS).max() <= 1e-12


def test_a_grown_weight_off_by_a_hundredth_shows():
    model = grown((64, 2, 4), 1)
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight[3, 5] += 0.01
        logits = model(torch.from_numpy(reference.images())).numpy()
    assert np.abs(logits - LOGITS).max() > 1e-6
