"""The weights of a file in lower precision: nothing left out, nothing repeated wrongly, nothing unexplained."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from deploy_models import make_model
from onnx import numpy_helper

from growkit.deploy.export import export_onnx
from growkit.deploy.form import Form, form_of
from growkit.deploy.parity import _yardstick
from growkit.deploy.stored_weights import stored_in
from growkit.deploy.truth import logits_of, noise_images, preprocessing
from growkit.deploy.weights import weight_checks
from growkit.deploy.yardstick import in_precision

Change = Callable[[onnx.ModelProto], None]


def failed(path: Path, change: Change) -> set[str]:
    proto = onnx.load(str(path))
    change(proto)
    form = form_of({entry.key: entry.value for entry in proto.metadata_props})
    return {check.name for check in weight_checks(proto, make_model(), form) if check.verdict == "fail"}


def nothing(proto: onnx.ModelProto) -> None:
    pass


@pytest.fixture(scope="module")
def low(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("low") / "model.onnx"
    export_onnx(make_model(), path, Form(exporter="torchscript", batch=3, precision="fp16"))
    assert failed(path, nothing) == set()
    return path


def test_bias_that_is_left_out_is_missing(low: Path) -> None:
    def left_out(proto: onnx.ModelProto) -> None:
        name = [node for node in proto.graph.node if node.op_type == "Gemm"][-1].input.pop()
        kept = [tensor for tensor in proto.graph.initializer if tensor.name != name]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(kept)

    assert failed(low, left_out) == {"missing from the file"}


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_stray_integer_is_no_constant_of_a_formula(dtype: type, low: Path) -> None:
    def stray(proto: onnx.ModelProto) -> None:
        proto.graph.initializer.append(numpy_helper.from_array(np.ones((), dtype), "odd"))

    assert "unknown constants" in failed(low, stray)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_one_wrong_row_of_a_repeated_token_is_found(precision: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export_onnx(make_model(), path, Form(batch=3, precision=precision))
    assert failed(path, nothing) == set()
    (repeated,) = (one.name for one in stored_in(onnx.load(str(path))) if one.array.shape == (3, 1, 64))

    def one_row(proto: onnx.ModelProto) -> None:
        stored = [tensor for tensor in proto.graph.initializer if tensor.name == repeated]
        stored += [a.t for n in proto.graph.node if repeated in n.output for a in n.attribute if a.HasField("t")]
        (tensor,) = stored
        value = numpy_helper.to_array(tensor).copy()
        value[1, 0, 5] *= 2
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))

    assert "not the model's" in failed(path, one_row)


def test_int8_is_measured_in_batches_as_the_file_gets_them() -> None:
    model = make_model()
    network, images = in_precision(model, "int8"), noise_images(preprocessing(model), 8, 0)
    got = _yardstick(model, Form(precision="int8"), images, (1, 3))
    alone = np.concatenate([logits_of(network, images[index : index + 1]) for index in range(8)])
    assert np.array_equal(got[1], alone)
    assert np.array_equal(got[3], logits_of(network, images[:3]))
    assert not np.array_equal(got[3], alone[:3])


def test_tensors_that_rounding_makes_equal_may_be_stored_once(tmp_path: Path) -> None:
    """A layer scale that growing made even: two of them round to one bfloat16, and the exporter keeps one."""
    model = make_model(init_values=1e-5)
    with torch.no_grad():
        for block in model.blocks:
            block.ls1.gamma.fill_(0.2585)
            block.ls2.gamma.fill_(0.2584)
    form = Form(precision="bf16")
    export_onnx(model, tmp_path / "m.onnx", form)
    proto = onnx.load(str(tmp_path / "m.onnx"))
    assert [check.line for check in weight_checks(proto, model, form) if check.verdict == "fail"] == []
    with torch.no_grad():
        model.blocks[1].ls2.gamma.fill_(0.2685)  # another number in bfloat16, so the file lacks it
    verdicts = {check.name: check for check in weight_checks(proto, model, form) if check.verdict == "fail"}
    assert set(verdicts) == {"missing from the file"}
    assert "blocks.1.ls2.gamma" in verdicts["missing from the file"].line
