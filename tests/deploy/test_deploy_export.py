"""The file opens where people serve, tells nothing of its machine, and is the same twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from deploy_models import make_model
from torch import nn

from growkit.deploy.capture import export_stock
from growkit.deploy.export import export_onnx
from growkit.deploy.form import Form
from growkit.deploy.parity import Material, check_parity
from growkit.deploy.truth import noise_images, preprocessing
from growkit.errors import GrowkitError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def exporting_once() -> None:
    """Here the exporter runs every time."""


def test_file_is_opset_18_ir_8_with_dynamic_batch_and_nothing_else(exported: Path) -> None:
    proto = onnx.load(str(exported), load_external_data=False)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 18)]
    assert proto.ir_version == 8
    onnx.checker.check_model(str(exported), full_check=True)
    (entry,), (out,) = proto.graph.input, proto.graph.output
    shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (entry, out)]
    assert (entry.name, out.name) == ("input", "logits")
    assert shapes == [["batch", 3, 16, 16], ["batch", 7]]
    assert len(proto.graph.value_info) == 0
    assert not any(n.doc_string or n.metadata_props for n in proto.graph.node)
    assert not any(t.external_data for t in proto.graph.initializer)
    assert sorted(p.name for p in exported.parent.iterdir()) == ["model.onnx"]


def test_file_opens_in_onnx_runtime_from_bytes_alone(model: nn.Module, exported: Path) -> None:
    session = ort.InferenceSession(exported.read_bytes(), providers=["CPUExecutionProvider"])
    images = noise_images(preprocessing(model), 3, 0)
    logits = session.run(["logits"], {"input": images})[0]
    with torch.inference_mode():
        expected = model(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_metadata_holds_what_a_server_needs(exported: Path) -> None:
    session = ort.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
    props = session.get_modelmeta().custom_metadata_map
    assert props["growkit.version"]
    assert json.loads(props["growkit.provenance"]) == {"weights_sha256": "ab" * 32}
    assert json.loads(props["labels"]) == list("abcdefg")
    assert json.loads(props["preprocessing"]) == {
        "input_size": [3, 16, 16],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
    }


def test_no_path_of_this_machine_is_inside(exported: Path) -> None:
    proto = onnx.load(str(exported))
    for tensor in proto.graph.initializer:
        tensor.ClearField("raw_data")  # random bits spell anything
    data = proto.SerializeToString()
    for needle in (
        "site-packages",
        ".py",
        str(Path.home()),
        os.getcwd(),
        sys.prefix,
        "stack_trace",
    ):
        assert needle.encode() not in data, needle


def test_same_bytes_in_another_process_and_folder(model: nn.Module, exported: Path, tmp_path: Path) -> None:
    script = """
import sys, torch
from pathlib import Path
from deploy_models import make_model
from growkit.deploy.export import export_onnx
export_onnx(make_model(), Path("other.onnx"), labels=list("abcdefg"),
            provenance={"weights_sha256": "ab" * 32})
"""
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""
    assert (tmp_path / "other.onnx").read_bytes() == exported.read_bytes()


def test_model_keeps_its_state_and_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = make_model(3)
    model.train()
    model.blocks[0].eval()
    attention = [m for m in model.modules() if hasattr(m, "fused_attn")]
    attention[0].fused_attn = True
    before = [m.training for m in model.modules()], [m.fused_attn for m in attention]
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    export_onnx(model, tmp_path / "m.onnx")
    after = [m.training for m in model.modules()], [m.fused_attn for m in attention]
    assert after == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_unfused_attention_gives_fewer_nodes_than_the_exporters_default(exported: Path, tmp_path: Path) -> None:
    from deploy_models import ARGUMENTS, NAME

    export_stock(NAME, ARGUMENTS, (3, 16, 16), tmp_path / "stock.onnx")
    nodes = [len(onnx.load(str(p)).graph.node) for p in (exported, tmp_path / "stock.onnx")]
    assert nodes[0] < nodes[1]


def test_half_precision_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(GrowkitError, match=r"torch\.bfloat16.*model\.float\(\)"):
        export_onnx(make_model().bfloat16(), tmp_path / "m.onnx")


def test_model_without_preprocessing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GrowkitError, match="pretrained_cfg"):
        export_onnx(nn.Linear(1, 1), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_names_that_look_like_code_are_names(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    labels = [".py", "site-packages", *"abcde"]
    named = {"source": {"name": "deit.pytorch.pth"}}
    export_onnx(model, path, Form(exporter="torchscript"), labels=labels, provenance=named)
    assert check_parity(model, path, material=Material(labels=labels)).passed
