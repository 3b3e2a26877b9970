"""One file or two, and none from elsewhere."""

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
from growkit.errors import GrowkitError, UnwritableError
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


@pytest.mark.parametrize("change", ["missing", "cut"])
def test_missing_or_cut_weights_are_refused_in_one_line(change: str, model: nn.Module, beside: Path) -> None:
    data = beside.with_name("model.onnx.data")
    if change == "missing":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(GrowkitError, match=r"weights beside it are unreadable.*export again") as caught:
        check_parity(model, beside)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "a/b", "..", "..\\secret", "C:\\x", "a\0b", ""])
def test_weights_outside_the_folder_are_never_read(location: str, model: nn.Module, beside: Path) -> None:
    (beside.parent.parent / "secret").write_bytes(beside.with_name("model.onnx.data").read_bytes())
    proto = onnx.load(str(beside), load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    beside.write_bytes(proto.SerializeToString())
    with pytest.raises(GrowkitError, match="outside the file's folder; not read"):
        check_parity(model, beside)


def test_a_link_to_weights_elsewhere_is_not_followed(model: nn.Module, beside: Path, tmp_path: Path) -> None:
    data = beside.with_name("model.onnx.data")
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(GrowkitError, match="outside the file's folder"):
        check_parity(model, beside)


def test_writing_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx, "save_model", full)
    with pytest.raises(UnwritableError, match=r"m\.onnx.*the disk is full"):
        write_graph(read_graph(exported), tmp_path / "m.onnx", external=True)
    assert list(tmp_path.iterdir()) == []
