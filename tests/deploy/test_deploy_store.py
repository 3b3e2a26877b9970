"""One file or two; that none is from elsewhere is tested in test_deploy_bad_input.py."""

import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from deploy_models import tensors
from torch import nn

from growkit.deploy.export import export_onnx
from growkit.deploy.parity import check_parity
from growkit.deploy.store import files_of, read_graph, write_graph
from growkit.deploy.truth import noise_images, preprocessing
from growkit.errors import UnwritableError
from growkit.files import sha256_of


@pytest.fixture
def beside(model: nn.Module, tmp_path: Path) -> Path:
    """An export whose weights lie in a second file."""
    export_onnx(model, tmp_path / "model.onnx", external=True)
    return tmp_path / "model.onnx"


def test_weights_beside_the_file_are_found_by_onnx_runtime(model: nn.Module, exported: Path, beside: Path) -> None:
    assert sorted(p.name for p in beside.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert beside.stat().st_size < 30_000 < beside.with_name("model.onnx.data").stat().st_size
    images = {"input": noise_images(preprocessing(model), 2, 0)}
    one, two = (ort.InferenceSession(str(p), providers=["CPUExecutionProvider"]) for p in (exported, beside))
    assert np.array_equal(one.run(None, images)[0], two.run(None, images)[0])
    assert check_parity(model, beside).passed


def test_read_graph_gives_the_same_weights_from_one_file_and_from_two(exported: Path, beside: Path) -> None:
    one, two = (tensors(read_graph(path)) for path in (exported, beside))
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_hash_covers_both_files(beside: Path, exported: Path) -> None:
    before = sha256_of(*files_of(beside))
    data = beside.with_name("model.onnx.data")
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    assert sha256_of(*files_of(beside)) != before
    assert sha256_of(*files_of(exported)) == hashlib.sha256(exported.read_bytes()).hexdigest()


def test_writing_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx, "save_model", full)
    with pytest.raises(UnwritableError, match=r"m\.onnx.*the disk is full"):
        write_graph(read_graph(exported), tmp_path / "m.onnx", external=True)
    assert list(tmp_path.iterdir()) == []
