"""Lower precision: what is written, what stays float32, and that every weight can be told from a damaged one."""

import math
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from deploy_models import make_model, replace, tensors
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from growkit.deploy.calibration import runs
from growkit.deploy.export import converted
from growkit.deploy.form import Form
from growkit.deploy.int8 import int8_dynamic, int8_static
from growkit.deploy.limits import LIMITS, Limits, accuracy_drop_interval, accuracy_verdict
from growkit.deploy.runtime import open_session
from growkit.deploy.sixteen_bits import (
    HALF,
    LARGEST_HALF,
    brain,
    emulated,
    half,
    largest_activations,
    lowered,
    rounded_to,
)
from growkit.deploy.stored_weights import explain, stored_in
from growkit.deploy.subject import precision_of
from growkit.deploy.truth import logits_of, noise_images, preprocessing, truth_of
from growkit.deploy.yardstick import in_precision
from growkit.errors import GrowkitError

Change = Callable[[onnx.ModelProto], None]
KINDS = ("fp16", "bf16", "int8", "int8-static")


@pytest.fixture(scope="module")
def proto(exported: Path) -> onnx.ModelProto:
    return onnx.load(str(exported))


@pytest.fixture(scope="module")
def images(model: nn.Module) -> np.ndarray:
    return noise_images(preprocessing(model), 32, 3)


@pytest.fixture(scope="module")
def files(proto: onnx.ModelProto, images: np.ndarray) -> dict[str, onnx.ModelProto]:
    """A healthy file of every precision; not to be changed."""
    return {
        "fp16": half(proto, images=images),
        "bf16": brain(proto),
        "int8": int8_dynamic(proto),
        "int8-static": int8_static(proto, images),
    }


def copied(proto: onnx.ModelProto) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    return made


def in_float32(proto: onnx.ModelProto) -> tuple[str, ...]:
    """Nodes that compute in float32, by the types that ONNX infers; casts come from the conversion."""
    graph = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    nodes = (node for node in graph.node if node.op_type != "Cast")
    return tuple(node.name for node in nodes if kinds[node.output[0]] == TensorProto.FLOAT)


def answers(proto: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """Logits, in the arithmetic that the graph asks for."""
    return open_session(emulated(proto).SerializeToString(), optimise=False).run(images)


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(np.mean((got.astype(np.float64) - wanted) ** 2)) / wanted.std())


def bare(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], opset: int = 18) -> onnx.ModelProto:
    """A graph from 'input' (batch, 1, 2, 2) to 'logits' of the same shape."""
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 1, 2, 2]) for name in ("input", "logits")]
    stored = [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "bare", value[:1], value[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


FACTOR = np.float32(3e5)


def on_stream(name: str) -> bool:
    """Whether a parameter writes to the residual stream; layer norms take a common factor of them out again."""
    parts = (".cls_token", ".pos_embed", ".patch_embed.", ".attn.proj.", ".fc2.")
    return any(part in f".{name}" for part in parts)


@pytest.fixture(scope="module")
def big(model: nn.Module) -> nn.Module:
    """The same function as `model`, with a residual stream that float16 cannot hold."""
    scaled = make_model()
    with torch.no_grad():
        for name, parameter in scaled.named_parameters():
            if on_stream(name):
                parameter *= float(FACTOR)
    return scaled


@pytest.fixture(scope="module")
def overflowing(model: nn.Module, proto: onnx.ModelProto) -> onnx.ModelProto:
    """The export of `big`, written without the exporter, which takes seconds."""
    made, own = copied(proto), {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for stored in stored_in(proto):
        if on_stream(explain(stored, own) or ""):
            replace(made, stored.name, stored.array * FACTOR)
    return made


# every precision --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_lower_precision_keeps_the_signature_opset_ir_and_metadata(
    kind: str, proto: onnx.ModelProto, files: dict[str, onnx.ModelProto]
) -> None:
    made = files[kind]
    assert list(made.graph.input) == list(proto.graph.input)
    assert list(made.graph.output) == list(proto.graph.output)
    assert made.ir_version == proto.ir_version == 8
    assert made.opset_import == proto.opset_import
    assert {node.domain for node in made.graph.node} == {""}
    assert made.metadata_props == proto.metadata_props
    assert (made.producer_name, made.producer_version) == (proto.producer_name, proto.producer_version)
    assert proto.producer_name == "pytorch"
    assert not made.graph.value_info
    names = Counter(node.name for node in made.graph.node)
    assert max(names.values()) == 1
    size = made.ByteSize() / proto.ByteSize()
    assert size < 0.6 if kind.startswith("int8") else size < 0.65  # a third of this tiny graph is no weights


@pytest.mark.parametrize("kind", KINDS)
def test_error_of_a_healthy_file_is_that_of_pytorch_in_its_precision(
    kind: str, model: nn.Module, images: np.ndarray, files: dict[str, onnx.ModelProto]
) -> None:
    truth = logits_of(truth_of(model), images)
    error = relative(answers(files[kind], images), truth)
    own = relative(logits_of(in_precision(model, kind.partition("-")[0]), images), truth)
    limits = LIMITS[kind]
    assert 0.5 < error / own < limits.noise_ratio
    assert error < limits.relative_rms / 2
    # what it is held against is no float32
    assert own > 50 * relative(logits_of(model, images), truth)


@pytest.mark.parametrize("kind", KINDS)
def test_same_graph_gives_the_same_bytes_and_stays_as_it_is(
    kind: str,
    proto: onnx.ModelProto,
    images: np.ndarray,
    files: dict[str, onnx.ModelProto],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = proto.SerializeToString(deterministic=True)
    again = {
        "fp16": lambda: half(proto, images=images),
        "bf16": lambda: brain(proto),
        "int8": lambda: int8_dynamic(proto),
        "int8-static": lambda: int8_static(proto, images),
    }[kind]()
    assert again.SerializeToString(deterministic=True) == files[kind].SerializeToString(deterministic=True)
    assert proto.SerializeToString(deterministic=True) == before
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path).encode() not in again.SerializeToString()


# float16 ----------------------------------------------------------------------------------------


def test_precision_is_seen_in_the_graph(proto: onnx.ModelProto, files: dict[str, onnx.ModelProto]) -> None:
    assert precision_of(proto) == "fp32"
    assert {kind: precision_of(file) for kind, file in files.items()} == {k: k.partition("-")[0] for k in KINDS}


def test_float16_weights_are_the_nearest_ones(proto: onnx.ModelProto, files: dict[str, onnx.ModelProto]) -> None:
    plain, low = tensors(proto), tensors(files["fp16"])
    assert set(plain) == set(low)
    for name, array in plain.items():
        if array.dtype == np.float32:
            assert low[name].dtype == np.float16, name
            np.testing.assert_array_equal(low[name], torch.from_numpy(array.copy()).half().numpy())


def test_what_overflows_stays_float32_and_the_logits_stay_right(
    overflowing: onnx.ModelProto, proto: onnx.ModelProto, images: np.ndarray
) -> None:
    wanted = open_session(overflowing.SerializeToString()).run(images)
    assert relative(wanted, open_session(proto.SerializeToString()).run(images)) < 1e-3  # epsilons no longer count
    sizes = largest_activations(overflowing, images)
    assert max(sizes.values()) > 65504
    made = half(overflowing, images=images)
    kept = in_float32(made)
    touched = {n.name for n in overflowing.graph.node for v in (*n.input, *n.output) if sizes.get(v, 0) > LARGEST_HALF}
    assert touched
    assert touched == set(kept)
    assert len(kept) < len(overflowing.graph.node) / 2
    error = relative(answers(made, images), wanted)
    assert error < LIMITS["fp16"].relative_rms
    # and served by the optimiser
    assert relative(open_session(made.SerializeToString()).run(images), wanted) < LIMITS["fp16"].relative_rms


def test_without_the_nodes_that_stay_float32_the_logits_are_lost(
    overflowing: onnx.ModelProto, images: np.ndarray
) -> None:
    assert not np.isfinite(answers(lowered(overflowing, HALF, ()), images)).all()


def test_nothing_that_overflows_is_ever_cast_to_float16(overflowing: onnx.ModelProto, images: np.ndarray) -> None:
    sizes = largest_activations(overflowing, images)
    made = half(overflowing, images=images)
    casts = [n for n in made.graph.node if n.op_type == "Cast" and n.attribute[0].i == TensorProto.FLOAT16]
    assert casts
    assert all(sizes.get(n.input[0], 0) <= LARGEST_HALF for n in casts)


def test_large_weights_and_vanishing_numbers_stay_float32_and_small_weights_round() -> None:
    small = np.array([1e-9, 4e-8, -1e-7, 0.1], dtype=np.float32).reshape(1, 1, 2, 2)
    graph = bare(
        [
            helper.make_node("Add", ["input", "small"], ["a"], name="rounds"),
            helper.make_node("Mul", ["a", "large"], ["b"], name="large"),
            helper.make_node("Div", ["b", "large"], ["c"], name="large again"),
            helper.make_node("Add", ["c", "epsilon"], ["logits"], name="epsilon"),
        ],
        {"small": small, "large": np.float32(7e4), "epsilon": np.float32(1e-12)},
    )
    made = half(graph, images=np.full((1, 1, 2, 2), 0.01, dtype=np.float32))
    assert in_float32(made) == ("large", "large again", "epsilon")
    stored = tensors(made)
    # to the nearest: neither lifted to the smallest number nor cut to the largest
    np.testing.assert_array_equal(stored["small"].reshape(-1), np.float16([0, 6e-8, -1.2e-7, 0.1]))
    assert stored["large"] == np.float32(7e4)
    assert stored["epsilon"] == np.float32(1e-12)
    assert stored["epsilon"].dtype == np.float32


node = helper.make_node
OPERATORS: dict[str, tuple[list[onnx.NodeProto], dict[str, np.ndarray], tuple[str, ...]]] = {
    "infinity and zero, which float16 has": (
        [node("Max", ["input", "w"], ["a"], name="max"), node("Add", ["a", "zero"], ["logits"], name="add")],
        {"w": np.array(-np.inf, np.float32), "zero": np.array(0, np.float32)},
        (),
    ),
    "operator without float16": (
        [node("Celu", ["input"], ["a"], name="celu"), node("Neg", ["a"], ["logits"], name="neg")],
        {},
        ("celu",),
    ),
    "floats made of none": (
        [
            node("Shape", ["input"], ["size"], name="shape"),
            node("ConstantOfShape", ["size"], ["a"], name="zeros"),
            node("Add", ["a", "input"], ["logits"], name="add"),
        ],
        {},
        ("zeros",),
    ),
    "whole numbers in between": (
        [
            node("Cast", ["input"], ["whole"], name="down", to=TensorProto.INT64),
            node("Cast", ["whole"], ["a"], name="up", to=TensorProto.FLOAT),
            node("Neg", ["a"], ["logits"], name="neg"),
        ],
        {},
        (),
    ),
    "scales that are always float32": (
        [node("Resize", ["input", "", "scales"], ["logits"], name="resize")],
        {"scales": np.ones(4, np.float32)},
        (),
    ),
}


@pytest.mark.parametrize("kind", OPERATORS)
def test_operator_is_float32_where_it_has_to_be_and_nowhere_else(kind: str) -> None:
    nodes, weights, kept = OPERATORS[kind]
    graph, pixels = bare(nodes, weights), np.float32([[[[1.5, -2], [3, 4]]]])
    made = half(graph, images=pixels)
    assert tuple(name for name in in_float32(made) if name != "shape") == kept
    wanted = open_session(graph.SerializeToString()).run(pixels)
    assert relative(open_session(made.SerializeToString()).run(pixels), wanted) < 1e-3


def test_weight_read_in_both_kinds_is_stored_in_both() -> None:
    weight = np.array([0.1, 0.2, 0.3, 0.4], dtype=np.float32).reshape(1, 1, 2, 2)
    graph = bare(
        [
            helper.make_node("Mul", ["input", "w"], ["a"], name="low"),
            helper.make_node("Mul", ["a", "w"], ["b"], name="kept"),
            helper.make_node("Mul", ["b", "w"], ["c"], name="kept too"),
            helper.make_node("Mul", ["c", "w"], ["logits"], name="low again"),
        ],
        {"w": weight},
    )
    made = lowered(graph, HALF, {"kept", "kept too"})
    assert sorted((a.dtype.name, a.reshape(-1)[0]) for a in tensors(made).values()) == [
        ("float16", np.float16(0.1)),
        ("float32", np.float32(0.1)),
    ]
    # in, up, down, out: none between the two that stay
    assert Counter(n.op_type for n in made.graph.node)["Cast"] == 4
    assert relative(answers(made, np.float32([[[[1, 2], [3, 4]]]])), weight**4 * [[1, 2], [3, 4]]) < 3e-3


def test_scores_inside_an_attention_node_keep_it_in_float32() -> None:
    node = helper.make_node("Attention", ["q", "q", "input"], ["logits"], name="attention", scale=1.0)
    graph = bare([helper.make_node("Mul", ["input", "w"], ["q"], name="q"), node], {"w": np.float32(200)}, opset=23)
    pixels = np.ones((1, 1, 2, 2), dtype=np.float32)
    assert largest_activations(graph, pixels)["logits"] == pytest.approx(2 * 200**2)  # the scores: q @ q
    made = half(graph, images=pixels)
    assert in_float32(made) == ("attention",)
    assert relative(answers(made, pixels) + pixels * [[0, 1], [2, 3]], 1 + pixels * [[0, 1], [2, 3]]) < 1e-3
    graph.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.float32(2), "w"))
    assert in_float32(half(graph, images=pixels)) == ()
    node.input[:] = ["input", "input", "q"]  # now the values, not the scores, are the larger ones
    graph = bare([graph.graph.node[0], node], {"w": np.float32(200)}, opset=23)
    assert largest_activations(graph, pixels)["logits"] == pytest.approx(200)


def test_float16_file_of_fewer_operators_has_them_in_float32(proto: onnx.ModelProto, images: np.ndarray) -> None:
    made = half(proto, images=images, keep=("LayerNormalization", "Softmax"))
    kept = in_float32(made)
    assert len(kept) == 7
    assert kept == tuple(n.name for n in proto.graph.node if n.op_type in ("LayerNormalization", "Softmax"))
    assert tensors(made)["norm.weight"].dtype == np.float32
    assert tensors(made)["head.weight"].dtype == np.float16


def test_graph_inside_a_node_is_refused() -> None:
    branch = helper.make_graph(
        [helper.make_node("Neg", ["input"], ["then"])],
        "branch",
        [],
        [helper.make_tensor_value_info("then", TensorProto.FLOAT, None)],
    )
    graph = bare(
        [helper.make_node("If", ["yes"], ["logits"], name="fork", then_branch=branch, else_branch=branch)],
        {"yes": np.array(True)},
    )
    with pytest.raises(GrowkitError, match="If fork"):
        lowered(graph, HALF, ())


# bfloat16 and arithmetic ------------------------------------------------------------------------


def test_bfloat16_graph_says_the_same_to_onnx_s_own_evaluator(
    proto: onnx.ModelProto, images: np.ndarray, files: dict[str, onnx.ModelProto]
) -> None:
    evaluated = ReferenceEvaluator(files["bf16"]).run(None, {"input": images[:8]})[0]
    wanted = open_session(proto.SerializeToString()).run(images[:8])
    assert evaluated.dtype == np.float32
    # it sums in bfloat16, kernels in float32
    assert relative(evaluated, wanted) < LIMITS["bf16"].relative_rms
    assert relative(answers(files["bf16"], images[:8]), evaluated) < LIMITS["bf16"].relative_rms


def test_conv_stays_float32_where_the_opset_has_it_not_in_bfloat16(proto: onnx.ModelProto) -> None:
    made = brain(proto)
    assert in_float32(made) == ("node_conv2d",)
    assert tensors(made)["patch_embed.proj.weight"].dtype == np.float32
    newer = copied(proto)
    newer.opset_import[0].version = 22
    assert in_float32(brain(newer)) == ()


def test_cpu_provider_has_no_bfloat16(files: dict[str, onnx.ModelProto]) -> None:
    # the day it has, the gate may open the file as it is
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        open_session(files["bf16"].SerializeToString())


def test_emulated_arithmetic_rounds_after_every_node() -> None:
    generator = np.random.default_rng(0)
    factor, term = generator.normal(size=(2, 1, 1, 2, 2)).astype(np.float32)
    nodes = [
        helper.make_node("Mul", ["input", "factor"], ["a"], name="mul"),
        helper.make_node("Add", ["a", "term"], ["logits"], name="add"),
    ]
    made = lowered(bare(nodes, {"factor": factor, "term": term}), HALF, ())
    pixels = generator.normal(size=(200, 1, 2, 2)).astype(np.float32)
    by_hand = (pixels.astype(np.float16) * factor.astype(np.float16)) + term.astype(np.float16)
    np.testing.assert_array_equal(answers(made, pixels), by_hand.astype(np.float32))
    unrounded = (pixels * factor + term).astype(np.float16)
    assert (by_hand != unrounded).any()


# int8 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "int8-static"])
def test_every_product_with_a_weight_is_int8_per_channel_and_no_other(
    kind: str, files: dict[str, onnx.ModelProto]
) -> None:
    eights = [s for s in stored_in(files[kind]) if s.array.dtype == np.int8]
    assert len(eights) == 9  # four per block, and the head
    for stored in eights:
        assert stored.scale is not None
        assert stored.scale.size in stored.array.shape
        assert len(np.unique(stored.scale)) > 1
    # q @ k and attention @ v stay float32, as does the patch embedding
    operators = Counter(n.op_type for n in files[kind].graph.node)
    assert operators["Conv"] == 1
    assert operators["Softmax"] == 2
    if kind == "int8":
        assert operators["MatMulInteger"] == 9
        assert operators["MatMul"] == 4
    else:
        assert operators["MatMul"] + operators["Gemm"] == 13
        assert operators["QuantizeLinear"] == 9  # inputs only: results and logits are not rounded to 8 bits


def test_dynamic_scales_follow_the_batch_and_static_ones_do_not(
    images: np.ndarray, files: dict[str, onnx.ModelProto]
) -> None:
    def moved(kind: str) -> float:
        session = open_session(files[kind].SerializeToString())
        return relative(np.concatenate([session.run(image[None]) for image in images[:8]]), session.run(images[:8]))

    assert 1e-4 < moved("int8") < LIMITS["int8"].relative_rms
    assert moved("int8-static") < 1e-5


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (np.zeros((4, 1, 16, 16), np.float32), "4 x 1 x 16 x 16"),
        (np.zeros((4, 3, 16, 8), np.float32), "4 x 3 x 16 x 8"),
        (np.zeros((3, 16, 16), np.float32), "3 x 16 x 16"),
        (np.zeros((0, 3, 16, 16), np.float32), "0 x 3 x 16 x 16"),
        (np.zeros((4, 3, 16, 16)), "float64"),
        (np.full((4, 3, 16, 16), np.nan, np.float32), "NaN"),
    ],
)
def test_calibration_images_that_do_not_fit_are_refused_in_one_line(
    bad: np.ndarray, told: str, model: nn.Module, proto: onnx.ModelProto
) -> None:
    with pytest.raises(GrowkitError, match=told) as caught:
        int8_static(proto, bad)
    assert str(caught.value).startswith("calibration images")
    assert "\n" not in str(caught.value)
    with pytest.raises(GrowkitError, match=told):
        half(proto, images=bad)
    for precision in ("fp16", "int8-static"):  # with made images beside them, too
        with pytest.raises(GrowkitError, match=told):
            converted(proto, preprocessing(model), Form(precision=precision), bad)


def test_images_fill_a_fixed_batch_by_repeating_the_last(proto: onnx.ModelProto) -> None:
    images, fixed = np.arange(7, dtype=np.float32).reshape(7, 1, 1, 1), copied(proto)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    assert [fed["input"].ravel().tolist() for fed in runs(fixed, images)] == [[0, 1, 2], [3, 4, 5], [6, 6, 6]]
    assert [len(fed["input"]) for fed in runs(proto, np.repeat(images, 3, axis=0))] == [8, 8, 5]


def test_graph_without_weights_to_quantise_is_refused() -> None:
    graph = bare([helper.make_node("Neg", ["input"], ["logits"], name="neg")], {})
    with pytest.raises(GrowkitError, match="nothing to write in int8"):
        int8_dynamic(graph)


# stored weights ---------------------------------------------------------------------------------


def unexplained(proto: onnx.ModelProto, model: nn.Module) -> set[str]:
    """Stored tensors that are not the model's, and the model's that are not stored."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    told = {s.name: explain(s, state) for s in stored_in(proto) if s.array.size > 1 or s.array.dtype.kind in "iu"}
    return {name for name, found in told.items() if found is None} | (set(state) - set(told.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_every_stored_tensor_is_explained_from_the_models(
    kind: str, model: nn.Module, files: dict[str, onnx.ModelProto]
) -> None:
    assert unexplained(files[kind], model) == set()
    # negative twin: by another model none is
    state = {name: tensor.numpy() for name, tensor in make_model(5).state_dict().items()}
    assert [s.name for s in stored_in(files[kind]) if explain(s, state) is not None] == []


def test_kept_float32_tensors_are_explained_bit_for_bit(
    big: nn.Module, overflowing: onnx.ModelProto, images: np.ndarray
) -> None:
    made = half(overflowing, images=images)
    assert {a.dtype.name for a in tensors(made).values()} >= {"float32", "float16"}
    assert unexplained(made, big) == set()


def bit(name: str) -> Change:
    def flip(proto: onnx.ModelProto) -> None:
        value = tensors(proto)[name].copy()
        value.view(f"u{value.dtype.itemsize}").reshape(-1)[5] ^= 1
        replace(proto, name, value)

    return flip


def swapped(name: str, axis: int) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        value = tensors(proto)[name]
        order = np.arange(value.shape[axis])
        order[[2, 9]] = order[[9, 2]]
        replace(proto, name, value.take(order, axis))

    return change


def rolled(name: str) -> Change:
    return lambda proto: replace(proto, name, np.roll(tensors(proto)[name], 1))


def shifted_zero(name: str) -> Change:
    return lambda proto: replace(proto, name, tensors(proto)[name] + np.int8(1))


def stepped(name: str) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        value = tensors(proto)[name].copy()
        value[3, 5] += 1 if value[3, 5] < 100 else -1
        replace(proto, name, value)

    return change


def exchanged(one: str, other: str) -> Change:
    """Two weights of the same shape read each other's scales."""

    def change(proto: onnx.ModelProto) -> None:
        names = {f"{one}_scale": f"{other}_scale", f"{other}_scale": f"{one}_scale"}
        for node in proto.graph.node:
            for index, name in enumerate(node.input):
                node.input[index] = names.get(name, name)

    return change


def in_steps(of: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Block 0's first MLP layer rightly rounded, but in other steps, made of each channel's largest weight."""

    def change(proto: onnx.ModelProto) -> None:
        weight = make_model().state_dict()["blocks.0.mlp.fc1.weight"].numpy().T
        scale = of(np.abs(weight).max(axis=0))
        replace(proto, "val_45_quantized", np.rint(weight / scale).clip(-127, 127).astype(np.int8))
        replace(proto, "val_45_scale", scale)

    return change


def twice(proto: onnx.ModelProto) -> None:
    """Two products read one weight, each with its own scale."""
    first, *_, second = [n for n in proto.graph.node if n.op_type == "MatMulInteger"][:5]  # qkv of both blocks
    second.input[1] = first.input[1]


def other_zero(proto: onnx.ModelProto) -> None:
    """An activation comes back by another zero than it went by."""
    stored = numpy_helper.from_array(tensors(proto)["layer_norm_zero_point"] + np.uint8(9), "other")
    proto.graph.initializer.append(stored)
    back = next(n for n in proto.graph.node if n.name == "layer_norm_DequantizeLinear")
    back.input[2] = "other"


def neighbours_range(proto: onnx.ModelProto) -> None:
    """An activation comes back by the scale and zero of another one."""
    back = next(n for n in proto.graph.node if n.name == "layer_norm_DequantizeLinear")
    back.input[1], back.input[2] = "layer_norm_1_scale", "layer_norm_1_zero_point"


def neighbours_zero(proto: onnx.ModelProto) -> None:
    """The first product subtracts the zero of another activation than it multiplies."""
    first, second = [n for n in proto.graph.node if n.op_type == "MatMulInteger"][:2]
    first.input[2] = second.input[2]


def neighbours_scale(proto: onnx.ModelProto) -> None:
    """The first product is scaled by another activation than it multiplies."""
    first, second = [n for n in proto.graph.node if n.op_type == "DynamicQuantizeLinear"][:2]
    both = next(n for n in proto.graph.node if n.op_type == "Mul" and n.input[0] == first.output[1])
    both.input[0] = second.output[1]


INT8: dict[str, tuple[Change, str]] = {
    "one weight one step off": (stepped("val_13_quantized"), "val_13_quantized"),
    "two channels swapped": (swapped("val_13_quantized", 1), "val_13_quantized"),
    "two rows swapped": (swapped("val_13_quantized", 0), "val_13_quantized"),
    "scales one channel off": (rolled("val_13_scale"), "val_13_quantized"),
    "zero is not 0": (shifted_zero("val_13_zero_point"), "val_13_quantized"),
    "scales of two layers exchanged": (exchanged("val_13", "val_58"), "val_13_quantized"),
    "one scale for all channels": (in_steps(lambda largest: largest.max() / 127 + 0 * largest), "val_45_quantized"),
    "steps of a 127.5th": (in_steps(lambda largest: largest / np.float32(127.5)), "val_45_quantized"),
    "a bias's bit": (bit("blocks.0.attn.qkv.bias"), "blocks.0.attn.qkv.bias"),
}
DAMAGED: list[tuple[str, str, Change, str]] = [
    *(("int8", name, *rest) for name, rest in INT8.items()),
    *(("int8-static", name, *rest) for name, rest in INT8.items()),
    ("int8", "a product's zero", neighbours_zero, "val_13_quantized"),
    ("int8", "a product's scale", neighbours_scale, "val_13_quantized"),
    ("int8", "a weight of two scales", twice, "val_13_quantized"),
    ("int8-static", "an activation's zero", other_zero, "other"),
    ("int8-static", "an activation's range", neighbours_range, "layer_norm_zero_point"),
    *(
        (kind, name, change, culprit)
        for kind in ("fp16", "bf16")
        for name, change, culprit in [
            ("a weight's bit", bit("val_13"), "val_13"),
            ("a bias's bit", bit("head.bias"), "head.bias"),
            ("two channels swapped", swapped("val_13", 1), "val_13"),
        ]
    ),
]


@pytest.mark.parametrize(("kind", "name", "change", "culprit"), DAMAGED, ids=[f"{d[0]}: {d[1]}" for d in DAMAGED])
def test_damaged_tensor_is_found_by_name(
    kind: str, name: str, change: Change, culprit: str, model: nn.Module, files: dict[str, onnx.ModelProto]
) -> None:
    damaged = copied(files[kind])
    change(damaged)
    assert culprit in unexplained(damaged, model)


def test_weight_off_by_more_than_half_a_step_is_found_though_quantised_afterwards(
    model: nn.Module, proto: onnx.ModelProto
) -> None:
    for share, found in ((0.0, False), (0.2, True)):
        edited = copied(proto)
        value = tensors(edited)["val_13"].copy()
        value[4, 7] += share * np.abs(value[:, 7]).max()
        replace(edited, "val_13", value)
        assert ("val_13_quantized" in unexplained(int8_dynamic(edited), model)) is found


def test_channel_of_zeros_is_explained() -> None:
    weight = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    weight[:, 1] = 0
    nodes = [
        helper.make_node("MatMul", ["input", "w"], ["a"], name="a"),
        helper.make_node("MatMul", ["a", "v"], ["logits"], name="b"),
    ]
    back = np.random.default_rng(1).normal(size=(3, 2)).astype(np.float32)
    stored = stored_in(int8_dynamic(bare(nodes, {"w": weight, "v": back})))
    assert [explain(s, {"w": weight, "v": back}) for s in stored] == ["w", "v"]


def test_rounding_gives_the_nearest_value_inf_or_zero() -> None:
    array = np.float32([1 / 3, 65519, 65520, 2.9e-8, 3.1e-8, -0.0])
    assert rounded_to(array, HALF).tolist() == [np.float16(1 / 3), 65504, math.inf, 0, np.float16(6e-8), 0]


# yardstick and limits ---------------------------------------------------------------------------


def test_unknown_precision_has_no_yardstick(model: nn.Module) -> None:
    with pytest.raises(GrowkitError, match="fp8"):
        in_precision(model, "fp8")


def test_yardstick_leaves_the_model_as_it_is(model: nn.Module, images: np.ndarray) -> None:
    before = logits_of(model, images)
    for precision in ("fp16", "bf16", "int8"):
        assert logits_of(in_precision(model, precision), images).dtype == np.float32
    np.testing.assert_array_equal(logits_of(model, images), before)
    np.testing.assert_array_equal(logits_of(in_precision(model, "fp32"), images), before)


@pytest.mark.parametrize("shift", [-5.0, 0.0, 5.0])
def test_yardstick_of_int8_rounds_as_torchs_own_fake_quantisation(shift: float) -> None:
    generator = torch.Generator().manual_seed(0)
    layer, given = nn.Linear(32, 4), shift + torch.randn(8, 32, generator=generator)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(4, 32, generator=generator) * torch.tensor([[1.0], [10.0], [0.1], [100.0]]))
        scales, zeros = layer.weight.abs().amax(1) / 127, torch.zeros(4, dtype=torch.int32)
        weight = torch.fake_quantize_per_channel_affine(layer.weight, scales, zeros, 0, -127, 127)
        low, high = min(0.0, float(given.min())), max(0.0, float(given.max()))  # 0 is always among the 256
        step = (high - low) / 255
        rounded = torch.fake_quantize_per_tensor_affine(given, step, round(-low / step), 0, 255)
        wanted = nn.functional.linear(rounded, weight, layer.bias)
        torch.testing.assert_close(in_precision(layer, "int8")(given), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_defect_that_the_weights_cannot_show_is_over_the_noise_ratio(
    kind: str, model: nn.Module, proto: onnx.ModelProto, images: np.ndarray
) -> None:
    damaged = copied(proto)
    for node in damaged.graph.node:
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                attribute.f = 0.3
    made = {
        "fp16": lambda: half(damaged, images=images),
        "bf16": lambda: brain(damaged),
        "int8": lambda: int8_dynamic(damaged),
        "int8-static": lambda: int8_static(damaged, images),
    }[kind]()
    truth = logits_of(truth_of(model), images)
    own = relative(logits_of(in_precision(model, kind.partition("-")[0]), images), truth)
    assert relative(answers(made, images), truth) / own > LIMITS[kind].noise_ratio


def test_interval_without_a_changed_sample_is_as_wide_as_their_number_allows() -> None:
    for samples in (50, 1000, 10000):
        drop, low, high = accuracy_drop_interval(0, 0, samples)
        z2 = 1.959964**2
        assert drop == 0
        assert high == pytest.approx(100 * z2 / (samples + z2))
        assert low == pytest.approx(-high)


def test_interval_turns_round_with_the_sides() -> None:
    drop, low, high = accuracy_drop_interval(12, 2, 50)
    other = accuracy_drop_interval(2, 12, 50)
    assert (drop, low, high) == pytest.approx((-other[0], -other[2], -other[1]))
    assert drop == pytest.approx(20)
    assert low < drop < high


@pytest.mark.parametrize(("samples", "lost", "won"), [(40, 0.05, 0.03), (60, 0.1, 0.02), (30, 0.02, 0.02)])
def test_interval_holds_the_truth_as_often_as_it_says(samples: int, lost: float, won: float) -> None:
    # summed over every outcome there is, exactly
    covered = 0.0
    for a in range(samples + 1):
        for b in range(samples - a + 1):
            ways = math.comb(samples, a) * math.comb(samples - a, b)
            chance = ways * lost**a * won**b * (1 - lost - won) ** (samples - a - b)
            if chance > 1e-9:
                _, low, high = accuracy_drop_interval(a, b, samples)
                covered += chance * (low <= 100 * (lost - won) <= high)
    assert covered > 0.93


@pytest.mark.parametrize(
    ("kind", "lost", "won", "samples", "verdict"),
    [
        ("fp16", 0, 0, 200, "pass"),
        ("fp16", 1, 0, 200, "pass"),  # half a point, but one sample
        ("fp16", 1, 0, 71, "pass"),  # 100 * (1 / 71) > 100 / 71
        ("fp16", 2, 0, 200, "fail"),
        ("fp16", 10, 0, 10000, "pass"),
        ("fp16", 11, 0, 10000, "fail"),
        ("int8", 0, 0, 200, "inconclusive"),  # up to 1.9 points may be lost
        ("int8", 0, 0, 1000, "pass"),
        ("int8", 30, 0, 1000, "fail"),
        ("int8", 60, 0, 10000, "pass"),
        ("int8", 90, 0, 10000, "inconclusive"),
        ("int8", 101, 0, 10000, "fail"),  # though the interval begins below the limit
        ("int8", 35, 30, 1000, "inconclusive"),
    ],
)
def test_lost_accuracy_is_judged_by_its_limit_and_interval(
    kind: str, lost: int, won: int, samples: int, verdict: str
) -> None:
    drop, _, high = accuracy_drop_interval(lost, won, samples)
    assert accuracy_verdict(LIMITS[kind], drop, high, samples) == verdict


def test_limits_loosen_with_the_precision() -> None:
    order = [LIMITS[kind] for kind in ("fp32", "fp16", "bf16", "int8")]
    values = [limits.relative_rms for limits in order]
    assert values == sorted(values)
    assert all(isinstance(limits, Limits) for limits in LIMITS.values())
