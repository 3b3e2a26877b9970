"""Every form of a file does what it says, held against PyTorch, Pillow and torchvision."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from deploy_models import make_model
from PIL import Image
from timm.data import create_transform
from torch import nn

from growkit.deploy.export import export_onnx
from growkit.deploy.form import KEY, TARGETS, Form, form_of
from growkit.deploy.outputs import refuse_answers
from growkit.deploy.parity import check_parity
from growkit.deploy.pixels import with_pixels
from growkit.deploy.truth import Preprocessing, at_image_size, noise_images, preprocessing
from growkit.errors import GrowkitError


def opened(path: Path) -> ort.InferenceSession:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def answers(model: nn.Module, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(images)).numpy()


# targets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_target_decides_opset_and_ir(target: str, model: nn.Module, tmp_path: Path) -> None:
    made = export_onnx(model, tmp_path / "m.onnx", Form(target=target))
    proto = onnx.load(str(tmp_path / "m.onnx"))
    assert (proto.opset_import[0].version, proto.ir_version) == (made.opset, made.ir)
    # the smallest IR version that ONNX allows with that opset: what older runtimes still load
    assert made.ir == onnx.helper.find_min_ir_version_for(list(proto.opset_import))
    images = noise_images(preprocessing(model), 3, 1)
    got = opened(tmp_path / "m.onnx").run(None, {"input": images})[0]
    np.testing.assert_allclose(got, answers(model, images), atol=1e-5)


@pytest.mark.parametrize(
    ("form", "operator", "blocks"),
    [
        (Form(target="ort-1.23", attention="standard"), ("", "Attention"), 2),
        (Form(attention="contrib"), ("com.microsoft", "Attention"), 2),
        (Form(), ("", "Softmax"), 2),
    ],
)
def test_attention_is_the_operator_asked_for(
    form: Form, operator: tuple[str, str], blocks: int, model: nn.Module, tmp_path: Path
) -> None:
    export_onnx(model, tmp_path / "m.onnx", form)
    proto = onnx.load(str(tmp_path / "m.onnx"))
    assert sum((n.domain, n.op_type) == operator for n in proto.graph.node) == blocks
    assert check_parity(model, tmp_path / "m.onnx").passed


@pytest.mark.parametrize("arguments", [{"qk_norm": True}, {"qkv_bias": False, "num_heads": 1}])
@pytest.mark.parametrize("form", [Form(target="ort-1.23", attention="standard"), Form(attention="contrib")])
def test_fused_attention_holds_for_other_kinds_of_attention(
    form: Form, arguments: dict[str, bool], tmp_path: Path
) -> None:
    model = make_model(4, depth=1, **arguments)
    export_onnx(model, tmp_path / "m.onnx", form)
    parity = check_parity(model, tmp_path / "m.onnx")
    assert parity.passed, [c.line for c in parity.failed]


def test_torchscript_is_the_other_way_to_the_same_answers(model: nn.Module, tmp_path: Path) -> None:
    export_onnx(model, tmp_path / "m.onnx", Form(exporter="torchscript"))
    assert check_parity(model, tmp_path / "m.onnx").passed
    assert onnx.load(str(tmp_path / "m.onnx")).ir_version == 8


# batch and image size ---------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "exporter"), [(1, "dynamo"), (3, "torchscript")])
def test_static_batch_takes_that_batch_alone(batch: int, exporter: str, model: nn.Module, tmp_path: Path) -> None:
    export_onnx(model, tmp_path / "m.onnx", Form(batch=batch, exporter=exporter))
    session = opened(tmp_path / "m.onnx")
    assert session.get_inputs()[0].shape == [batch, 3, 16, 16]
    assert session.get_outputs()[0].shape == [batch, 7]
    images = noise_images(preprocessing(model), batch, 1)
    np.testing.assert_allclose(session.run(None, {"input": images})[0], answers(model, images), atol=1e-5)
    with pytest.raises(Exception, match="Got: 2 Expected"):
        session.run(None, {"input": np.zeros((2, 3, 16, 16), np.float32)})
    assert check_parity(model, tmp_path / "m.onnx").passed


def test_image_size_resamples_positions_as_timm_does(model: nn.Module, tmp_path: Path) -> None:
    larger = at_image_size(model, 32)
    assert preprocessing(model).input_size == (3, 16, 16)  # the model itself is left alone
    wanted = make_model()
    wanted.set_input_size(img_size=(32, 32))
    images = noise_images(preprocessing(larger), 2, 1)
    assert images.shape == (2, 3, 32, 32)
    assert np.array_equal(answers(larger, images), answers(wanted, images))
    export_onnx(larger, tmp_path / "m.onnx", Form(image_size=32, exporter="torchscript"))
    np.testing.assert_allclose(
        opened(tmp_path / "m.onnx").run(None, {"input": images})[0], answers(wanted, images), atol=1e-5
    )
    assert check_parity(model, tmp_path / "m.onnx").passed  # from the model as it is


def test_image_size_that_patches_do_not_fit_is_refused(model: nn.Module) -> None:
    with pytest.raises(GrowkitError, match="--image-size 20: patches are 8 wide; choose a multiple of 8"):
        at_image_size(model, 20)


# outputs ----------------------------------------------------------------------------------------


def test_probabilities_are_the_softmax(model: nn.Module, tmp_path: Path) -> None:
    export_onnx(model, tmp_path / "m.onnx", Form(output="probabilities"))
    images = noise_images(preprocessing(model), 4, 1)
    session = opened(tmp_path / "m.onnx")
    assert [o.name for o in session.get_outputs()] == ["probabilities"]
    wanted = torch.from_numpy(answers(model, images)).softmax(1).numpy()
    np.testing.assert_allclose(session.run(None, {"input": images})[0], wanted, atol=1e-6)


def test_top_k_is_the_largest_probabilities_and_their_classes(model: nn.Module, tmp_path: Path) -> None:
    export_onnx(model, tmp_path / "m.onnx", Form(output="top-3"))
    images = noise_images(preprocessing(model), 4, 1)
    session = opened(tmp_path / "m.onnx")
    assert [(o.name, o.type) for o in session.get_outputs()] == [
        ("scores", "tensor(float)"),
        ("classes", "tensor(int64)"),
    ]
    scores, classes = session.run(None, {"input": images})
    wanted = torch.from_numpy(answers(model, images)).softmax(1).topk(3)
    np.testing.assert_allclose(scores, wanted.values.numpy(), atol=1e-6)
    assert np.array_equal(classes, wanted.indices.numpy())


def test_more_answers_than_classes_are_refused(model: nn.Module, tmp_path: Path) -> None:
    refuse_answers(Form(output="top-7"), 7)
    with pytest.raises(GrowkitError, match="top-8: the model has 7 classes; choose top-7"):
        export_onnx(model, tmp_path / "m.onnx", Form(output="top-8"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("classes", "output", "why"),
    [(1, "probabilities", "one class: its probability is always 1"), (0, "top-1", "no classifier")],
)
def test_answers_that_say_nothing_are_refused(classes: int, output: str, why: str) -> None:
    with pytest.raises(GrowkitError, match=f"--output {output}: the model has {why}; choose logits"):
        refuse_answers(Form(output=output), classes)


# pixels -----------------------------------------------------------------------------------------

SMOOTH = [(3, 4), (40, 9), (300, 400), (77, 33), (33, 77), (256, 256), (501, 333), (20, 20), (255, 254)]


def photograph(height: int, width: int, seed: int) -> Image.Image:
    """Noise blurred to the scale of a photograph."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("crop_pct", "crop_mode"), [(0.9, "center"), (1.0, "center"), (0.875, "squash")])
def test_pixels_are_prepared_as_timm_prepares_them(interpolation: str, crop_pct: float, crop_mode: str) -> None:
    prepared = Preprocessing(
        (3, 56, 56), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), interpolation, crop_pct, crop_mode
    )
    identity = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 18]> g (float[batch, 3, 56, 56] input) => (float[batch, 3, 56, 56] logits)'
        "{ logits = Identity(input) }"
    )
    front = with_pixels(identity, prepared, None)
    onnx.checker.check_model(front, full_check=True)
    session = ort.InferenceSession(front.SerializeToString(), providers=["CPUExecutionProvider"])
    transform = create_transform(
        input_size=(3, 56, 56),
        mean=prepared.mean,
        std=prepared.std,
        interpolation=interpolation,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
    )
    differing = []
    for index, (height, width) in enumerate(SMOOTH):
        picture = photograph(height, width, index)
        got = session.run(None, {"image": np.asarray(picture)[None]})[0][0]
        wanted = transform(picture).numpy()
        levels = np.abs(got - wanted) * np.reshape(prepared.std, (3, 1, 1)) * 255
        assert levels.max() <= 1.01, (height, width)
        differing.append((levels > 0.5).mean())
    assert max(differing) < 0.02, differing


@pytest.mark.parametrize("size", [62, 63])
def test_pixels_that_need_no_resizing_come_out_bit_for_bit(size: int) -> None:
    prepared = Preprocessing((3, 56, 56), (0.4, 0.5, 0.6), (0.2, 0.3, 0.1), "bicubic", 56 / size, "center")
    graph = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 18]> g (float[batch, 3, 56, 56] input) => (float[batch, 3, 56, 56] logits)'
        "{ logits = Identity(input) }"
    )
    session = ort.InferenceSession(
        with_pixels(graph, prepared, None).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    transform = create_transform(**dataclasses.asdict(prepared))
    picture = photograph(size, size + 5, 1)
    got = session.run(None, {"image": np.asarray(picture)[None]})[0][0]
    assert np.array_equal(got, transform(picture).numpy())  # where the rest is odd, the crop goes to the even side


def test_whole_file_with_pixels_answers_pictures_like_the_model(model: nn.Module, tmp_path: Path) -> None:
    export_onnx(model, tmp_path / "m.onnx", Form(pixels=True, output="probabilities"))
    prepared = preprocessing(model)
    transform = create_transform(**dataclasses.asdict(prepared))
    session = opened(tmp_path / "m.onnx")
    for index, (height, width) in enumerate(SMOOTH):
        picture = photograph(height, width, index)
        got = session.run(None, {"image": np.asarray(picture)[None]})[0]
        wanted = torch.from_numpy(answers(model, transform(picture)[None].numpy())).softmax(1).numpy()
        np.testing.assert_allclose(got, wanted, atol=5e-3)
    parity = check_parity(model, tmp_path / "m.onnx")
    assert parity.passed, [c.line for c in parity.failed]
    assert {"pixels", "answers"} <= {c.group for c in parity.checks}


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"interpolation": "lanczos"}, "lanczos interpolation"), ({"crop_mode": "border"}, "crop mode border")],
)
def test_preprocessing_without_a_place_in_a_graph_is_refused_before_the_work(
    changed: dict[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: pytest.fail("exported"))
    model = make_model()
    model.pretrained_cfg = {**model.pretrained_cfg, **changed}
    with pytest.raises(GrowkitError, match=f"--pixels: {said}"):
        export_onnx(model, tmp_path / "m.onnx", Form(pixels=True))


# the form itself --------------------------------------------------------------------------------


def test_form_is_in_the_metadata_and_read_back(model: nn.Module, tmp_path: Path) -> None:
    form = Form(target="ort-1.18", batch=2, output="top-2", exporter="torchscript")
    export_onnx(model, tmp_path / "m.onnx", form)
    props = opened(tmp_path / "m.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(props[KEY]) == dataclasses.asdict(form)
    assert form_of(props) == form
    assert form_of({}) == Form()


@pytest.mark.parametrize(
    "claim", ["", "[]", "7", '{"precision": "fp3"}', '{"batch": 0}', '{"colour": 1}', '{"batch": "x"}', "null"]
)
def test_unreadable_form_is_refused_in_one_line(claim: str) -> None:
    with pytest.raises(GrowkitError, match=r"growkit\.form is not readable.*export it again"):
        form_of({KEY: claim})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"target": "ort-1.2"}, "--target ort-1.2: unknown; choose ort-1.15, ort-1.18 or ort-1.23"),
        ({"precision": "int4"}, "--precision int4: unknown"),
        ({"output": "top-0"}, "--output top-0: unknown"),
        ({"output": "top-"}, "--output top-: unknown"),
        ({"batch": 0}, "--batch 0: expected 1 to 4096"),
        ({"image_size": -1}, "--image-size -1"),
        ({"image_size": 8 * 10**6}, "--image-size 8000000: expected 1 to 2048"),
        ({"exporter": "torchscript", "target": "ort-1.23"}, "up to opset 20"),
        ({"attention": "standard"}, "--target ort-1.23"),
        ({"precision": "int8-static", "target": "ort-1.23"}, "int8-static: not for --target ort-1.23; ort-1.18 loads"),
    ],
)
def test_form_that_cannot_be_is_refused_by_its_option(given: dict[str, object], said: str) -> None:
    with pytest.raises(GrowkitError, match=said):
        Form(**given)  # type: ignore[arg-type]
