"""Seeded faults: what can go wrong in an ONNX file, and which groups of the gate's checks must say so.

A fault changes a graph (`proto`) or the files of an export (`files`); `says_no` is exactly the groups that catch it,
predictions aside, which follow the numbers.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from deploy_models import make_model, replace, scalar, tensors
from onnx import TensorProto, helper, numpy_helper

from growkit.deploy.export import export_onnx
from growkit.deploy.form import CONTRIB, KEY, Form

Change = Callable[[onnx.ModelProto], None]


@dataclass(frozen=True)
class Base:
    """A clean file that faults are put into; `model` are make_model's arguments."""

    form: Form
    external: bool = False
    model: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True)
class Fault:
    says_no: frozenset[str]
    base: str = "plain"
    proto: Change | None = None
    files: Callable[[Path], None] | None = None


DEIT = (("name", "deit_tiny_patch16_224"),)  # its mean and std differ, and from channel to channel
SHA256 = "ab" * 32
LABELS = list("abcdefg")

BASES = {
    "plain": Base(Form()),
    "torchscript": Base(Form(target="ort-1.18", exporter="torchscript")),
    "standard": Base(Form(target="ort-1.23", attention="standard")),
    "contrib": Base(Form(attention="contrib")),
    "external": Base(Form(), external=True),
    "pixels": Base(Form(exporter="torchscript", pixels=True), model=DEIT),
    "probabilities": Base(Form(exporter="torchscript", output="probabilities")),
    "top-3": Base(Form(exporter="torchscript", output="top-3")),
    "served": Base(Form(exporter="torchscript", output="top-3", pixels=True), external=True, model=DEIT),
    "batch 3": Base(Form(exporter="torchscript", batch=3)),
    "square": Base(Form(exporter="torchscript"), model=(("mlp_ratio", 1.0),)),
    **{
        precision: Base(Form(exporter="torchscript", target="ort-1.18", precision=precision))
        for precision in ("fp16", "bf16", "int8", "int8-static")
    },
    "distilled": Base(Form(exporter="torchscript"), model=(("name", "deit_tiny_distilled_patch16_224"),)),
}


# ways to change a graph -------------------------------------------------------------------------


def together(*changes: Change) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        for one in changes:
            one(proto)

    return change


def nodes(proto: onnx.ModelProto, op: str) -> list[onnx.NodeProto]:
    return [node for node in proto.graph.node if node.op_type == op]


def maker(proto: onnx.ModelProto, value: str) -> onnx.NodeProto:
    return next(node for node in proto.graph.node if value in node.output)


def constant(proto: onnx.ModelProto, value: object, name: str) -> str:
    proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def behind(value: str | Callable[[onnx.ModelProto], str], *ops: tuple[str, list[object], dict[str, object]]) -> Change:
    """Put operators behind `value`: each (type, further inputs, attributes); 'value' among them is `value` itself."""

    def change(proto: onnx.ModelProto) -> None:
        name = value if isinstance(value, str) else value(proto)
        graph = proto.graph
        fed = any(entry.name == name for entry in graph.input)
        raw = name if fed else f"{name}_raw"
        place = 0 if fed else next(i for i, n in enumerate(graph.node) if name in n.output) + 1
        if not fed:
            node = graph.node[place - 1]
            node.output[list(node.output).index(name)] = raw
        last = f"{name}_fed" if fed else name
        if fed:
            for node in graph.node:
                node.input[:] = [last if entry == name else entry for entry in node.input]
        now = raw
        for index, (op, more, attributes) in enumerate(ops):
            out = last if index == len(ops) - 1 else f"{name}_{index}"
            inputs = [now]
            for entry in more:
                if isinstance(entry, str):
                    inputs.append(raw if entry == "value" else entry)
                else:
                    inputs.append(constant(proto, entry, f"{name}_c{index}_{len(inputs)}"))
            graph.node.insert(place + index, helper.make_node(op, inputs, [out], **attributes))
            now = out

    return change


def output_of(op: str, index: int = 0) -> Callable[[onnx.ModelProto], str]:
    return lambda proto: nodes(proto, op)[index].output[0]


def attribute(op: str, name: str, value: object, only: int | None = None) -> Change:
    """Set an attribute of every node of that type, or of one."""

    def change(proto: onnx.ModelProto) -> None:
        found = nodes(proto, op)
        for node in found if only is None else [found[only]]:
            kept = [a for a in node.attribute if a.name != name]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return change


def becomes(op: str, other: str, index: int = 0) -> Change:
    """Give one node another operator; attributes go."""

    def change(proto: onnx.ModelProto) -> None:
        node = nodes(proto, op)[index]
        node.op_type = other
        del node.attribute[:]

    return change


def reads(op: str, place: int, value: Callable[[onnx.ModelProto], str] | str, index: int = 0) -> Change:
    """Let one node read another value."""

    def change(proto: onnx.ModelProto) -> None:
        nodes(proto, op)[index].input[place] = value if isinstance(value, str) else value(proto)

    return change


def turned(op: str, index: int = 0) -> Change:
    """Exchange the first two inputs of one node."""

    def change(proto: onnx.ModelProto) -> None:
        node = nodes(proto, op)[index]
        node.input[0], node.input[1] = node.input[1], node.input[0]

    return change


def stored(choice: str | Callable[[str, np.ndarray], bool], change_value: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Change the one stored tensor of this name, or the first that `choice` accepts."""

    def change(proto: onnx.ModelProto) -> None:
        wanted = (lambda name, _: name == choice) if isinstance(choice, str) else choice
        name, value = next((n, v) for n, v in tensors(proto).items() if wanted(n, v))
        replace(proto, name, change_value(value.copy()).astype(value.dtype))

    return change


def shaped(*shape: int) -> Callable[[str, np.ndarray], bool]:
    return lambda _, value: value.shape == shape and value.dtype == np.float32


def metadata(key: str, change_value: Callable[[str], str]) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        (entry,) = (entry for entry in proto.metadata_props if entry.key == key)
        entry.value = change_value(entry.value)

    return change


def prepares(**changed: object) -> Change:
    return metadata("preprocessing", lambda text: json.dumps({**json.loads(text), **changed}))


def claims(**changed: object) -> Change:
    return metadata(KEY, lambda text: json.dumps({**json.loads(text), **changed}))


# faults of weights ------------------------------------------------------------------------------

QKV, WIDTH, HEAD = (64, 192), 64, 32


def rounded(dtype: torch.dtype, only: str | None = None) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        for name, value in tensors(proto).items():
            if value.dtype == np.float32 and (only is None or name.startswith(only)):
                replace(proto, name, torch.from_numpy(value.copy()).to(dtype).float().numpy())

    return change


def element(name: str, index: tuple[int, ...], factor: float) -> Change:
    def scaled(value: np.ndarray) -> np.ndarray:
        value[index] *= factor
        return value

    return stored(name, scaled)


def zeroed(name: str) -> Change:
    return stored(name, np.zeros_like)


def one_bit(choice: str | Callable[[str, np.ndarray], bool]) -> Change:
    def flipped(value: np.ndarray) -> np.ndarray:
        value.view(np.int32).reshape(-1)[11] ^= 1
        return value

    return stored(choice, flipped)


def columns(order: np.ndarray) -> Change:
    """Outputs of block 0's qkv in another order."""
    return together(
        stored(shaped(*QKV), lambda value: value[:, order]),
        stored("blocks.0.attn.qkv.bias", lambda value: value[order]),
    )


def exchanged(first: str | tuple[int, str], second: str | tuple[int, str]) -> Change:
    """Two stored tensors of the same shape change places; (place, input of which operator) names unnamed ones."""

    def change(proto: onnx.ModelProto) -> None:
        a, b = (one if isinstance(one, str) else nodes(proto, one[1])[one[0]].input[1] for one in (first, second))
        held = tensors(proto)
        replace(proto, a, held[b])
        replace(proto, b, held[a])

    return change


HEADS_OF_Q = np.r_[32:64, 0:32, 64:192]
HEADS_OF_ALL = np.r_[32:64, 0:32, 96:128, 64:96, 160:192, 128:160]
K_AND_V = np.r_[0:64, 128:192, 64:128]
Q_AND_K = np.r_[64:128, 0:64, 128:192]


def epsilon(value: float) -> Change:
    return attribute("LayerNormalization", "epsilon", value)


def attention_scale(value: float) -> Change:
    return lambda proto: replace(proto, scalar(proto, HEAD**-0.5), np.float32(value))


# faults of structure ----------------------------------------------------------------------------


def fixed_batch(proto: onnx.ModelProto) -> None:
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2


def folded_batch(proto: onnx.ModelProto) -> None:
    """At batch 1 all is well; above it, channels of different images change places."""
    behind("input", ("Transpose", [], {"perm": [1, 0, 2, 3]}), ("Reshape", [np.array([-1, 3, 16, 16])], {}))(proto)


def batch_as_tokens(proto: onnx.ModelProto) -> None:
    """Block 0 mixes the tokens of all images: (B, 5, 192) -> (1, 5 B, 192) and back."""
    joined = constant(proto, np.array([1, -1, 3, 2, 32]), "joined")
    nodes(proto, "Reshape")[1].input[1] = joined
    apart = constant(proto, np.array([-1, 5, 64]), "apart")
    nodes(proto, "Reshape")[2].input[1] = apart


def baked_batch(proto: onnx.ModelProto) -> None:
    """The class token is laid out for two images, whatever the batch."""
    constant(proto, np.array([2, 1, 64]), "two_images")
    nodes(proto, "Expand")[0].input[1] = "two_images"


def any_batch(proto: onnx.ModelProto) -> None:
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].Clear()
        value.type.tensor_type.shape.dim[0].dim_param = "batch"


def version(ir: int | None = None, opset: int | None = None) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        if ir is not None:
            proto.ir_version = ir
        if opset is not None:
            proto.opset_import[0].version = opset

    return change


def output_renamed(proto: onnx.ModelProto) -> None:
    maker(proto, "logits").output[0] = proto.graph.output[0].name = "scores"


def input_renamed(proto: onnx.ModelProto) -> None:
    for node in proto.graph.node:
        node.input[:] = ["pixels" if name == "input" else name for name in node.input]
    proto.graph.input[0].name = "pixels"


def second_output(proto: onnx.ModelProto) -> None:
    name = nodes(proto, "LayerNormalization")[-1].output[0]
    proto.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 5, 64]))


def leaked_path(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].doc_string = f"{Path.home()}/venv/lib/site-packages/timm/layers/mlp.py"


def weights_as_inputs(proto: onnx.ModelProto) -> None:
    """A weight that a caller may replace."""
    proto.graph.input.append(helper.make_tensor_value_info("head.bias", TensorProto.FLOAT, [7]))


def random_noise(proto: onnx.ModelProto) -> None:
    """Noise far below every limit, made of numbers that the model itself carries."""
    small = scalar(proto, HEAD**-0.5)
    behind(
        output_of("Conv"),
        ("RandomNormalLike", [], {"scale": 1e-6, "mean": 0.0}),
        ("Mul", [small], {}),
        ("Mul", [small], {}),
        ("Add", ["value"], {}),
    )(proto)


def random_function(proto: onnx.ModelProto) -> None:
    """The same in a function that the file brings along, under a name in ONNX Runtime's own domain."""
    noise = helper.make_node("RandomNormalLike", ["x"], ["noise"], scale=1e-9)
    added = helper.make_node("Add", ["x", "noise"], ["y"])
    opsets = [helper.make_opsetid("", 18)]
    proto.functions.append(helper.make_function(CONTRIB, "Quiet", ["x"], ["y"], [noise, added], opsets))
    behind(output_of("Conv"), ("Quiet", [], {"domain": CONTRIB}))(proto)


def dropout(proto: onnx.ModelProto) -> None:
    """Dropout as in training, with a probability of 0.5."""
    behind(output_of("LayerNormalization", 1), ("Dropout", [np.float32(0.5), np.array(True)], {}))(proto)


def trigger(proto: onnx.ModelProto) -> None:
    """Another answer only to an image whose first pixel is infinite; no check feeds one."""
    graph = proto.graph
    maker(proto, "logits").output[0] = "honest"
    graph.node.extend(
        [
            helper.make_node("IsInf", ["input"], ["infinite"]),
            helper.make_node("Cast", ["infinite"], ["infinite_as_number"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMax", ["infinite_as_number"], ["any"], keepdims=0),
            helper.make_node("Cast", ["any"], ["fires"], to=TensorProto.BOOL),
        ]
    )

    def branch(op: str, name: str) -> onnx.GraphProto:
        made = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, ["batch", 7])
        return helper.make_graph([helper.make_node(op, ["honest"], [f"{name}_out"])], name, [], [made])

    graph.node.append(
        helper.make_node(
            "If", ["fires"], ["logits"], then_branch=branch("Neg", "then"), else_branch=branch("Identity", "else")
        )
    )


def dead_node(proto: onnx.ModelProto) -> None:
    proto.graph.node.append(helper.make_node("Neg", ["logits"], ["nobody_reads_this"]))


def dead_weight(proto: onnx.ModelProto) -> None:
    """Every weight of the head once more, read by nobody."""
    constant(proto, tensors(proto)["head.weight"], "again")


def junk(proto: onnx.ModelProto) -> None:
    constant(proto, np.full((64, 64), 3.0, dtype=np.float32), "junk")


def last_bias_left_out(proto: onnx.ModelProto) -> None:
    del nodes(proto, "Gemm")[0].input[2:]


def half_and_back(value: str | Callable[[onnx.ModelProto], str], factor: float | None = None) -> Change:
    """A layer in float16; a factor takes it over 65504 there and back again."""
    scale = [] if factor is None else [("Mul", [np.float32(factor)], {})]
    back = [] if factor is None else [("Div", [np.float32(factor)], {})]
    casts = ("Cast", [], {"to": TensorProto.FLOAT16}), ("Cast", [], {"to": TensorProto.FLOAT})
    return behind(value, *scale, *casts, *back)


def number_in_half(proto: onnx.ModelProto) -> None:
    """A factor of one that a node holds in float16."""
    one = numpy_helper.from_array(np.float16(1), "one")
    held = helper.make_node("Constant", [], ["one_half"], value=one)
    proto.graph.node.insert(0, helper.make_node("Cast", ["one_half"], ["one"], to=TensorProto.FLOAT))
    proto.graph.node.insert(0, held)
    behind("logits", ("Mul", ["one"], {}))(proto)


def quick_gelu(proto: onnx.ModelProto) -> None:
    """x sigmoid(1.702 x), whose constant is a known one."""
    node = nodes(proto, "Gelu")[0]
    node.op_type = "Mul"
    del node.attribute[:]
    place = list(proto.graph.node).index(node)
    constant(proto, np.float32(1.702), "quick")
    proto.graph.node.insert(place, helper.make_node("Sigmoid", ["quick_x"], ["quick_s"]))
    proto.graph.node.insert(place, helper.make_node("Mul", [node.input[0], "quick"], ["quick_x"]))
    node.input.append("quick_s")


def skipped(op: str, index: int) -> Change:
    """One node leaves its first input as it is."""

    def change(proto: onnx.ModelProto) -> None:
        node = nodes(proto, op)[index]
        node.op_type = "Identity"
        del node.input[1:], node.attribute[:]

    return change


def residual(block: int, half: int) -> Callable[[onnx.ModelProto], onnx.NodeProto]:
    """The Add of two values that a norm reads later: after attention (half 0) and after the MLP (half 1)."""

    def find(proto: onnx.ModelProto) -> onnx.NodeProto:
        norm = nodes(proto, "LayerNormalization")[2 * block + half + 1]
        return maker(proto, norm.input[0])

    return find


def residual_dropped(block: int, half: int) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        node = residual(block, half)(proto)
        stays = node.input[1]
        node.op_type = "Identity"
        del node.input[:]
        node.input.append(stays)

    return change


def residual_of_the_norm(proto: onnx.ModelProto) -> None:
    """Post-norm for pre-norm: what is added is the normalised value."""
    residual(0, 0)(proto).input[0] = nodes(proto, "LayerNormalization")[0].output[0]


def interleaved_heads(proto: onnx.ModelProto) -> None:
    """qkv read as (heads, 3, width of a head), as other libraries store it."""
    nodes(proto, "Reshape")[1].input[1] = constant(proto, np.array([-1, 5, 2, 3, 32]), "interleaved")
    node = maker(proto, maker(proto, nodes(proto, "Slice")[0].input[0]).output[0])
    for entry in node.attribute:
        entry.ints[:] = [3, 0, 2, 1, 4]


def four_heads(proto: onnx.ModelProto) -> None:
    nodes(proto, "Reshape")[1].input[1] = constant(proto, np.array([-1, 5, 3, 4, 16]), "four_heads")


def logits_permuted(proto: onnx.ModelProto) -> None:
    order = np.array([1, 0, 2, 3, 4, 5, 6])
    behind("logits", ("Gather", [order], {"axis": 1}))(proto)


def one_head_left_out(proto: onnx.ModelProto) -> None:
    """Distilled DeiT answers with the mean of two heads; this is the first alone."""
    first = nodes(proto, "Gemm")[0]
    maker(proto, "logits").output[0] = "mean_of_two"
    proto.graph.node.append(helper.make_node("Identity", [first.output[0]], ["logits"]))


# faults of pixels and outputs -------------------------------------------------------------------


def resized_as_floats(proto: onnx.ModelProto) -> None:
    behind(lambda p: nodes(p, "Resize")[0].input[0], ("Cast", [], {"to": TensorProto.FLOAT}))(proto)


def crop_one_off(proto: onnx.ModelProto) -> None:
    behind("pixels_starts", ("Add", [np.array([0, 1])], {}))(proto)


def halves_down(proto: onnx.ModelProto) -> None:
    """A crop that starts at 1.5 starts at 1, not at the even 2."""
    maker(proto, "pixels_starts").input[1] = constant(proto, np.array([0]), "never_up")


def squashed(proto: onnx.ModelProto) -> None:
    """The long edge is resized like the short one."""
    maker(proto, "pixels_new").input[1] = "pixels_edges"


def width_always_first(proto: onnx.ModelProto) -> None:
    """Tall pictures are resized as wide ones are."""
    maker(proto, "pixels_scaled").input[0] = "pixels_turned"


def not_normalised(proto: onnx.ModelProto) -> None:
    node = maker(proto, "input")
    node.op_type = "Identity"
    node.input[:] = ["pixels_unit"]


def one_pixel_black(proto: onnx.ModelProto) -> None:
    mask = np.ones((16, 16), dtype=bool)
    mask[5, 6] = False
    constant(proto, mask, "where")
    proto.graph.node.insert(0, helper.make_node("Cast", ["where"], ["mask"], to=TensorProto.FLOAT))
    behind("pixels_levels", ("Mul", ["mask"], {}))(proto)


def constant_becomes(name: str, **value: object) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        node = maker(proto, name)
        del node.attribute[:]
        node.attribute.extend(helper.make_attribute(key, entry) for key, entry in value.items())

    return change


def at_temperature_2(proto: onnx.ModelProto) -> None:
    softmax = maker(proto, "probabilities")
    softmax.input[0] = "cooled"
    node = helper.make_node("Div", ["logits", constant(proto, np.float32(2), "two")], ["cooled"])
    proto.graph.node.insert(len(proto.graph.node) - 1, node)


def logits_not_probabilities(proto: onnx.ModelProto) -> None:
    """The K largest logits: the same classes, but scores that are no probabilities."""
    nodes(proto, "TopK")[0].input[0] = "logits"
    proto.graph.node.remove(next(n for n in nodes(proto, "Softmax") if "probabilities" in n.output))


def fewer_than_asked(proto: onnx.ModelProto) -> None:
    replace(proto, "top_count", np.array([2]))
    for value in proto.graph.output:
        value.type.tensor_type.shape.dim[1].dim_value = 2


def rows_turned(name: str) -> Change:
    """The answers of a batch in the order of the last image first."""
    start, end, axis, step = np.array([-1]), np.array([-(2**31)]), np.array([0]), np.array([-1])
    return behind(name, ("Slice", [start, end, axis, step], {}))


# faults of lower precision -----------------------------------------------------------------------


def quantised(proto: onnx.ModelProto) -> str:
    """Name of the first matrix of integers."""
    return next(n for n, v in tensors(proto).items() if v.ndim == 2 and v.dtype in (np.int8, np.uint8))


def channels_swapped(proto: onnx.ModelProto) -> None:
    """Two output channels of an int8 matrix change places; their scales stay."""
    stored(quantised(proto), lambda value: value[:, np.r_[1, 0, 2 : value.shape[1]]])(proto)


def one_step_off(proto: onnx.ModelProto) -> None:
    """One int8 weight is one step off: far below what rounding does anyway."""

    def stepped(value: np.ndarray) -> np.ndarray:
        value[3, 2] += 1 if value[3, 2] < np.iinfo(value.dtype).max else -1
        return value

    stored(quantised(proto), stepped)(proto)


def scale_of_the_largest(proto: onnx.ModelProto) -> None:
    """One scale for a matrix whose integers were made for one per channel."""
    stored(lambda name, v: name.endswith("_scale") and v.ndim == 1 and v.size > 1, lambda v: np.full_like(v, v.max()))(
        proto
    )


def scales_one_off(proto: onnx.ModelProto) -> None:
    """Each channel has its neighbour's scale."""
    stored(lambda name, v: name.endswith("_scale") and v.ndim == 1 and v.size > 1, lambda v: np.roll(v, 1))(proto)


def through_bfloat16(proto: onnx.ModelProto) -> None:
    """Weights in float16 that were rounded to bfloat16 before."""
    for name, value in tensors(proto).items():
        if value.dtype == np.float16:
            replace(proto, name, torch.from_numpy(value.copy()).bfloat16().half().numpy())


def zero_moved(proto: onnx.ModelProto) -> None:
    """The zero of the weights of an int8 product is one step off."""
    replace(proto, nodes(proto, "MatMulInteger")[0].input[3], np.full(192, 1, dtype=np.int8))


def zero_of_activation_moved(proto: onnx.ModelProto) -> None:
    name = nodes(proto, "QuantizeLinear")[0].input[2]
    stored(name, lambda zero: zero - 64 if zero > 128 else zero + 64)(proto)


def ranges(factor: float, index: int = 1) -> Change:
    """One activation's range is so many times as wide, there and back."""
    return lambda proto: stored(nodes(proto, "QuantizeLinear")[index].input[1], lambda v: v * np.float32(factor))(proto)


def scales(factor: float) -> Change:
    return stored(lambda name, v: name.endswith("_scale") and v.ndim == 1 and v.size > 1, lambda v: v * factor)


def channels_swapped_with_scales(proto: onnx.ModelProto) -> None:
    order = np.r_[1, 0, 2:192]
    stored(quantised(proto), lambda value: value[:, order])(proto)
    stored(lambda name, v: name.endswith("_scale") and v.shape == (192,), lambda v: v[order])(proto)


def heads_of_int8(proto: onnx.ModelProto) -> None:
    """Two heads of q change places, scales and all; the bias stays."""
    stored(quantised(proto), lambda value: value[:, HEADS_OF_Q])(proto)
    stored(lambda name, v: name.endswith("_scale") and v.shape == (192,), lambda v: v[HEADS_OF_Q])(proto)


def half_weight(factor: float) -> Change:
    return element("head.weight", (2, 5), factor)


def casts(there: int, back: int) -> Change:
    return behind(output_of("Gelu"), ("Cast", [], {"to": there}), ("Cast", [], {"to": back}))


def overflow(proto: onnx.ModelProto) -> None:
    """A factor beyond what float16 holds, there and back."""
    large = [np.float16(60000)]
    behind(output_of("Gelu"), ("Mul", large, {}), ("Div", large, {}))(proto)


def hotter(proto: onnx.ModelProto) -> None:
    """Attention scaled by 1/sqrt(31) in place of 1/sqrt(32)."""
    behind(nodes(proto, "Softmax")[0].input[0], ("Mul", [np.float32((32 / 31) ** 0.5)], {}))(proto)


def attention_in_int8(proto: onnx.ModelProto) -> None:
    """The product of q and k through eight bits."""
    eights = {node.output[0] for node in nodes(proto, "DequantizeLinear")}
    node = next(n for n in nodes(proto, "MatMul") if eights.isdisjoint(n.input))
    for side in (0, 1):
        behind(
            node.input[side],
            ("QuantizeLinear", [np.float32(0.05), np.array(128, dtype=np.uint8)], {}),
            ("DequantizeLinear", [np.float32(0.05), np.array(128, dtype=np.uint8)], {}),
        )(proto)


def float32_in_nodes(proto: onnx.ModelProto) -> None:
    """Every matrix is held by a node, where none is seen among the stored ones."""
    held = [tensor for tensor in proto.graph.initializer if len(tensor.dims) == 2]
    for tensor in held:
        proto.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
        proto.graph.initializer.remove(tensor)


def activation_left(proto: onnx.ModelProto) -> None:
    """A product of an int8 weight with an activation that was never rounded."""
    product = next(n for n in nodes(proto, "MatMul") if maker(proto, n.input[1]).op_type == "DequantizeLinear")
    product.input[0] = maker(proto, maker(proto, product.input[0]).input[0]).input[0]


def head_left(proto: onnx.ModelProto) -> None:
    """The head's weights in float32, as the library leaves them unless told: better numbers than were claimed."""
    integer = nodes(proto, "MatMulInteger")[-1]
    cast = next(n for n in proto.graph.node if n.input and n.input[0] == integer.output[0])
    product = next(n for n in proto.graph.node if cast.output[0] in n.input)
    source = maker(proto, integer.input[0])
    model = make_model()
    constant(proto, model.state_dict()["head.weight"].numpy().T.copy(), "plain_head")
    product.op_type = "MatMul"
    scale = maker(proto, next(name for name in product.input if name != cast.output[0]))
    del product.input[:]
    product.input.extend([source.input[0], "plain_head"])
    gone = {integer.input[1], integer.input[3], *scale.input}
    for node in (integer, cast, source, scale):
        proto.graph.node.remove(node)
    kept = [
        t for t in proto.graph.initializer if t.name not in gone or any(t.name in n.input for n in proto.graph.node)
    ]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)


# faults of files --------------------------------------------------------------------------------


def data_of(path: Path) -> Path:
    return path.with_name(path.name + ".data")


def stale_data(path: Path) -> None:
    """The weights beside it are another training's, in the same places."""
    weights = np.fromfile(data_of(path), np.float32)
    weights += np.random.default_rng(7).normal(0, 0.1, weights.size).astype(np.float32)
    weights.tofile(data_of(path))


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def places_exchanged(path: Path) -> None:
    """Two tensors of one shape read each other's bytes."""
    proto = onnx.load(str(path), load_external_data=False)
    first, second = (
        t for t in proto.graph.initializer if list(t.dims) == list(QKV) and t.data_location == TensorProto.EXTERNAL
    )
    places = [[(entry.key, entry.value) for entry in t.external_data] for t in (first, second)]
    for tensor, place in ((first, places[1]), (second, places[0])):
        del tensor.external_data[:]
        for key, value in place:
            tensor.external_data.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())


def data_with_more(path: Path) -> None:
    with data_of(path).open("ab") as stream:
        stream.write(b"\0" * 4096)


def another_models(path: Path) -> None:
    export_onnx(make_model(7), path, BASES["torchscript"].form, labels=LABELS, provenance={"weights_sha256": SHA256})


def of(*groups: str) -> frozenset[str]:
    return frozenset(groups)


BOTH, NUMBERS, WEIGHTS, STRUCTURE = of("weights", "numbers"), of("numbers"), of("weights"), of("structure")
ALL = of("structure", "weights", "numbers")
PIXELS, ANSWERS = of("pixels"), of("answers")

FAULTS: dict[str, Fault] = {
    # deployment.md B.2
    "tanh GELU": Fault(BOTH, "torchscript", attribute("Gelu", "approximate", "tanh")),
    "layer norm epsilon 1e-5": Fault(BOTH, proto=epsilon(1e-5)),
    "layer norm epsilon 1e-12": Fault(BOTH, proto=epsilon(1e-12)),
    "attention scale 1/sqrt(31)": Fault(BOTH, proto=attention_scale(31**-0.5)),
    "one bias element zeroed": Fault(BOTH, proto=element("blocks.0.attn.proj.bias", (3,), 0.0)),
    "one layer rounded to fp16": Fault(BOTH, proto=rounded(torch.float16, "blocks.0.attn.qkv.bias")),
    "two heads of q swapped": Fault(BOTH, proto=columns(HEADS_OF_Q)),
    "all weights fp16": Fault(BOTH, proto=rounded(torch.float16)),
    "all weights bf16": Fault(BOTH, proto=rounded(torch.bfloat16)),
    "proj bias dropped": Fault(BOTH, proto=zeroed("blocks.1.attn.proj.bias")),
    "qkv bias dropped": Fault(BOTH, proto=zeroed("blocks.0.attn.qkv.bias")),
    "position embedding shifted": Fault(BOTH, proto=stored("pos_embed", lambda v: np.roll(v, 1, axis=1))),
    "one weight +1 %": Fault(BOTH, proto=element("head.weight", (2, 5), 1.01)),
    # weights
    "one bias NaN": Fault(BOTH, proto=element("head.bias", (0,), float("nan"))),
    "one bias infinite": Fault(BOTH, proto=element("norm.bias", (0,), float("inf"))),
    "one bit of qkv": Fault(WEIGHTS, proto=one_bit(shaped(*QKV))),
    "one bit of the class token": Fault(WEIGHTS, proto=one_bit("cls_token")),
    "one bit of the patch embedding": Fault(WEIGHTS, proto=one_bit("patch_embed.proj.weight")),
    "one bit of the head": Fault(WEIGHTS, proto=one_bit("head.weight")),
    "k and v exchanged": Fault(BOTH, proto=columns(K_AND_V)),
    "q and k exchanged": Fault(BOTH, proto=columns(Q_AND_K)),
    "heads in another order than proj takes them": Fault(BOTH, proto=columns(HEADS_OF_ALL)),
    "channels blue to red": Fault(BOTH, proto=stored("patch_embed.proj.weight", lambda v: v[:, ::-1])),
    "patches read by columns": Fault(BOTH, proto=stored("patch_embed.proj.weight", lambda v: v.transpose(0, 1, 3, 2))),
    "two inputs of fc2 exchanged": Fault(BOTH, proto=stored(shaped(256, 64), lambda v: v[np.r_[1, 0, 2:256]])),
    "classes off by one": Fault(
        BOTH,
        proto=together(*(stored(f"head.{n}", lambda v: np.roll(v, 1, axis=0)) for n in ("weight", "bias"))),
    ),
    "norm1 and norm2 exchanged": Fault(BOTH, proto=exchanged("blocks.0.norm1.weight", "blocks.0.norm2.weight")),
    "proj of blocks 0 and 1 exchanged": Fault(NUMBERS, proto=exchanged((3, "MatMul"), (9, "MatMul"))),
    "fc1 transposed where it is square": Fault(
        NUMBERS, "square", lambda p: stored(nodes(p, "MatMul")[4].input[1], np.transpose)(p)
    ),
    "fc1 and fc2 exchanged where they are square": Fault(NUMBERS, "square", exchanged((4, "MatMul"), (5, "MatMul"))),
    "last bias left out": Fault(of("structure", "numbers"), proto=last_bias_left_out),
    "one of two heads left out": Fault(of("numbers", "structure"), "distilled", one_head_left_out),
    "junk among the weights": Fault(of("weights", "structure"), proto=junk),
    # what the graph computes, with every weight and constant in place
    "quick GELU": Fault(BOTH, "torchscript", quick_gelu),
    "ReLU for GELU": Fault(NUMBERS, "torchscript", becomes("Gelu", "Relu", 1)),
    "attention without scale": Fault(NUMBERS, proto=lambda p: replace(p, scalar(p, HEAD**-0.5), np.float32(1))),
    "attention without softmax": Fault(NUMBERS, proto=skipped("Softmax", 0)),
    "softmax over the queries": Fault(NUMBERS, proto=attribute("Softmax", "axis", -2)),
    "scale on q and on k": Fault(
        NUMBERS,
        proto=lambda p: behind(nodes(p, "Mul")[0].output[0], ("Mul", [scalar(p, HEAD**-0.5)], {}))(p),
    ),
    "class token at the end": Fault(NUMBERS, proto=turned("Concat", 1)),
    "answer of the first patch": Fault(
        of("numbers", "structure"), proto=lambda p: reads("Gather", 1, constant(p, np.array(1), "second"))(p)
    ),
    "position embedding added twice": Fault(
        NUMBERS, proto=lambda p: behind(p.graph.node[7].output[0], ("Add", ["pos_embed"], {}))(p)
    ),
    "residual around attention dropped": Fault(NUMBERS, proto=residual_dropped(1, 0)),
    "residual around the MLP dropped": Fault(NUMBERS, proto=residual_dropped(0, 1)),
    "post-norm": Fault(NUMBERS, proto=residual_of_the_norm),
    "last norm left out": Fault(of("numbers", "structure"), proto=skipped("LayerNormalization", 4)),
    "norm over tokens": Fault(
        NUMBERS,
        proto=lambda p: behind(
            nodes(p, "LayerNormalization")[0].input[0],
            ("ReduceMean", [np.array([1])], {"keepdims": 1}),
            ("Sub", ["value"], {}),
            ("Neg", [], {}),
        )(p),
    ),
    "patches one pixel off": Fault(NUMBERS, proto=attribute("Conv", "pads", [1, 1, 0, 0])),
    "patch grid by columns": Fault(NUMBERS, proto=behind(output_of("Conv"), ("Transpose", [], {"perm": [0, 1, 3, 2]}))),
    "four heads": Fault(NUMBERS, proto=four_heads),
    "heads interleaved": Fault(NUMBERS, proto=interleaved_heads),
    "head at half strength": Fault(NUMBERS, proto=attribute("Gemm", "alpha", 0.5)),
    "head without its bias by beta": Fault(NUMBERS, proto=attribute("Gemm", "beta", 0.0)),
    "logits of two classes exchanged": Fault(NUMBERS, proto=logits_permuted),
    "logits twice as large": Fault(NUMBERS, proto=behind("logits", ("Mul", [np.float32(2)], {}))),
    "logits all raised": Fault(NUMBERS, proto=behind("logits", ("Add", [np.float32(0.5)], {}))),
    "clipped where only extremes go": Fault(NUMBERS, proto=behind("input", ("Min", [np.float32(2)], {}))),
    "one layer in fp16": Fault(of("structure", "numbers"), proto=half_and_back(output_of("MatMul", 4))),
    "one number in fp16": Fault(STRUCTURE, proto=number_in_half),
    "fp16 overflow": Fault(ALL, proto=half_and_back(output_of("Conv"), 1e6)),
    # batches
    "fixed batch": Fault(of("structure", "numbers"), proto=fixed_batch),
    "batch baked into the class token": Fault(of("numbers", "structure"), proto=baked_batch),
    "batch folded into channels": Fault(NUMBERS, proto=folded_batch),
    "batch folded into tokens": Fault(NUMBERS, proto=batch_as_tokens),
    "mean over the batch taken off": Fault(
        NUMBERS,
        proto=behind(
            "input",
            ("ReduceMean", [np.array([0])], {"keepdims": 1}),
            ("Sub", ["value"], {}),
            ("Add", ["value"], {}),
        ),
    ),
    "answers of a batch turned round": Fault(NUMBERS, proto=rows_turned("logits")),
    "any batch where three was asked": Fault(STRUCTURE, "batch 3", any_batch),
    # structure
    "IR 10": Fault(STRUCTURE, proto=version(ir=10)),
    "opset 17": Fault(STRUCTURE, proto=version(opset=17)),
    "opset 20": Fault(STRUCTURE, proto=version(opset=20)),
    "opset of the future": Fault(STRUCTURE, proto=version(opset=99)),
    "output renamed": Fault(of("structure"), proto=output_renamed),
    "input renamed": Fault(of("structure"), proto=input_renamed),
    "second output": Fault(STRUCTURE, proto=second_output),
    "path inside": Fault(STRUCTURE, proto=leaked_path),
    "weights that a caller may replace": Fault(STRUCTURE, proto=weights_as_inputs),
    "noise below every limit": Fault(STRUCTURE, proto=random_noise),
    "noise in a function": Fault(STRUCTURE, "contrib", random_function),
    "dropout as in training": Fault(STRUCTURE, proto=dropout),
    "a branch that no check takes": Fault(STRUCTURE, proto=trigger),
    "a node that nobody reads": Fault(STRUCTURE, proto=dead_node),
    "a weight that nobody reads": Fault(STRUCTURE, proto=dead_weight),
    "wrong mean in the metadata": Fault(STRUCTURE, proto=prepares(mean=[0.485, 0.456, 0.406])),
    "wrong crop in the metadata": Fault(STRUCTURE, proto=prepares(crop_pct=1.0)),
    "wrong interpolation in the metadata": Fault(STRUCTURE, proto=prepares(interpolation="bilinear")),
    "preprocessing lost": Fault(STRUCTURE, proto=metadata("preprocessing", lambda _: "")),
    "labels in another order": Fault(STRUCTURE, proto=metadata("labels", lambda t: json.dumps(json.loads(t)[::-1]))),
    "exported from other weights": Fault(
        STRUCTURE, proto=metadata("growkit.provenance", lambda t: t.replace("abab", "cdcd"))
    ),
    "claims a fixed batch": Fault(of("structure"), proto=claims(batch=4)),
    "claims another runtime": Fault(STRUCTURE, proto=claims(target="ort-1.18")),
    "claims another operator set": Fault(STRUCTURE, proto=claims(attention="contrib")),
    "claims standard attention": Fault(STRUCTURE, "standard", claims(attention="unfused")),
    "metadata twice": Fault(STRUCTURE, proto=lambda p: p.metadata_props.add(key="labels", value=json.dumps(LABELS))),
    # fused attention
    "standard: causal": Fault(NUMBERS, "standard", attribute("Attention", "is_causal", 1)),
    "standard: another scale": Fault(BOTH, "standard", attribute("Attention", "scale", 31**-0.5)),
    "standard: default scale of four heads": Fault(
        NUMBERS,
        "standard",
        together(attribute("Attention", "q_num_heads", 4), attribute("Attention", "kv_num_heads", 4)),
    ),
    "standard: soft cap": Fault(NUMBERS, "standard", attribute("Attention", "softcap", 1.0)),
    "standard: q and k exchanged": Fault(NUMBERS, "standard", turned("Attention", 1)),
    "contrib: causal": Fault(NUMBERS, "contrib", attribute("Attention", "unidirectional", 1)),
    "contrib: another scale": Fault(BOTH, "contrib", attribute("Attention", "scale", 31**-0.5)),
    "contrib: scale left out of four heads": Fault(NUMBERS, "contrib", attribute("Attention", "num_heads", 4)),
    "contrib: rotary": Fault(NUMBERS, "contrib", attribute("Attention", "do_rotary", 1)),
    # pixels
    "pixels: resized as floats": Fault(PIXELS, "pixels", resized_as_floats),
    "pixels: no antialias": Fault(PIXELS, "pixels", attribute("Resize", "antialias", 0)),
    "pixels: bilinear": Fault(PIXELS, "pixels", attribute("Resize", "mode", "linear")),
    "pixels: nearest": Fault(
        PIXELS,
        "pixels",
        together(
            attribute("Resize", "mode", "nearest"),
            attribute("Resize", "antialias", 0),
            attribute("Resize", "exclude_outside", 0),
        ),
    ),
    "pixels: edges repeated outside the picture": Fault(PIXELS, "pixels", attribute("Resize", "exclude_outside", 0)),
    "pixels: coefficient -0.75": Fault(of("pixels", "weights"), "pixels", attribute("Resize", "cubic_coeff_a", -0.75)),
    "pixels: corners aligned": Fault(
        PIXELS, "pixels", attribute("Resize", "coordinate_transformation_mode", "align_corners")
    ),
    "pixels: crop one off": Fault(PIXELS, "pixels", crop_one_off),
    "pixels: halves rounded down": Fault(of("pixels", "structure"), "pixels", halves_down),
    "pixels: squashed": Fault(of("pixels", "structure"), "pixels", squashed),
    "pixels: width always first": Fault(PIXELS, "pixels", width_always_first),
    "pixels: edge one larger": Fault(PIXELS, "pixels", constant_becomes("pixels_edge", value_ints=[18])),
    "pixels: divided by 256": Fault(
        of("pixels", "weights"), "pixels", constant_becomes("pixels_most", value_float=256.0)
    ),
    "pixels: mean and std exchanged": Fault(PIXELS, "pixels", exchanged("pixels_mean", "pixels_std")),
    "pixels: not normalised": Fault(
        of("pixels", "structure"),
        "pixels",
        not_normalised,
    ),
    "pixels: blue to red": Fault(
        PIXELS, "pixels", behind("pixels_levels", ("Gather", [np.array([2, 1, 0])], {"axis": 1}))
    ),
    "pixels: height for width": Fault(PIXELS, "pixels", lambda p: attribute("Transpose", "perm", [0, 3, 2, 1], 0)(p)),
    "pixels: turned round": Fault(
        PIXELS,
        "pixels",
        behind("pixels_levels", ("Slice", [np.array([-1]), np.array([-(2**31)]), np.array([3]), np.array([-1])], {})),
    ),
    "pixels: one pixel black": Fault(PIXELS, "pixels", one_pixel_black),
    "pixels: one level brighter": Fault(PIXELS, "pixels", behind("pixels_levels", ("Add", [np.float32(1)], {}))),
    # answers
    "probabilities over the batch": Fault(ANSWERS, "probabilities", lambda p: attribute("Softmax", "axis", 0, -1)(p)),
    "log probabilities": Fault(ANSWERS, "probabilities", lambda p: becomes("Softmax", "LogSoftmax", -1)(p)),
    "logits called probabilities": Fault(ANSWERS, "probabilities", lambda p: skipped("Softmax", -1)(p)),
    "probabilities at temperature 2": Fault(ANSWERS, "probabilities", at_temperature_2),
    "softmax twice": Fault(ANSWERS, "probabilities", behind("probabilities", ("Softmax", [], {"axis": -1}))),
    "top of the logits": Fault(ANSWERS, "top-3", logits_not_probabilities),
    "smallest for largest": Fault(ANSWERS, "top-3", attribute("TopK", "largest", 0)),
    "classes counted from one": Fault(ANSWERS, "top-3", behind("classes", ("Add", [np.array(1)], {}))),
    "classes of the last image first": Fault(ANSWERS, "top-3", rows_turned("classes")),
    "scores smallest first": Fault(
        ANSWERS,
        "top-3",
        behind("scores", ("Slice", [np.array([-1]), np.array([-(2**31)]), np.array([1]), np.array([-1])], {})),
    ),
    "two where three were asked": Fault(of("structure", "answers"), "top-3", fewer_than_asked),
    "served: classes counted from one": Fault(ANSWERS, "served", behind("classes", ("Add", [np.array(1)], {}))),
    "served: divided by 256": Fault(
        of("pixels", "weights"), "served", constant_becomes("pixels_most", value_float=256.0)
    ),
    "served: weight +1 %": Fault(BOTH, "served", element("head.weight", (2, 5), 1.01)),
    # files
    "stale weights beside it": Fault(BOTH, "external", files=stale_data),
    "two tensors read each other's bytes": Fault(NUMBERS, "external", files=places_exchanged),
    "weights beside it cut short": Fault(of("refused"), "external", files=lambda path: cut(data_of(path), 0.5)),
    "weights beside it missing": Fault(of("refused"), "external", files=lambda path: data_of(path).unlink()),
    "more beside it than weights": Fault(STRUCTURE, "external", files=data_with_more),
    "file cut short": Fault(STRUCTURE, files=lambda path: cut(path, 0.5)),
    "file of nothing": Fault(STRUCTURE, files=lambda path: path.write_bytes(b"")),
    "file that is none": Fault(STRUCTURE, files=lambda path: path.write_bytes(b"no ONNX at all")),
    "another model's file": Fault(BOTH, "torchscript", files=another_models),
    "claims a precision that there is not": Fault(of("refused"), proto=claims(precision="fp8")),
    "claims a precision that is no word": Fault(of("refused"), proto=claims(precision=8)),
    # float16
    "fp16: rounded to bfloat16 before": Fault(BOTH, "fp16", through_bfloat16),
    "fp16: one weight +1 %": Fault(WEIGHTS, "fp16", half_weight(1.01)),
    "fp16: bias dropped": Fault(BOTH, "fp16", zeroed("blocks.0.attn.qkv.bias")),
    "fp16: layer norm epsilon 1e-3": Fault(NUMBERS, "fp16", epsilon(1e-3)),
    "fp16: positions shifted": Fault(BOTH, "fp16", stored("pos_embed", lambda v: np.roll(v, 1, axis=1))),
    "fp16: tanh GELU": Fault(WEIGHTS, "fp16", attribute("Gelu", "approximate", "tanh")),
    "fp16: a layer in bfloat16": Fault(STRUCTURE, "fp16", casts(TensorProto.BFLOAT16, TensorProto.FLOAT16)),
    "fp16: overflow": Fault(BOTH, "fp16", overflow),
    "fp16: claims bf16": Fault(STRUCTURE, "fp16", claims(precision="bf16")),
    "fp16: claims fp32": Fault(ALL, "fp16", claims(precision="fp32")),
    "fp16: claims int8": Fault(STRUCTURE, "fp16", claims(precision="int8")),
    # bfloat16
    "bf16: one weight +1 %": Fault(WEIGHTS, "bf16", half_weight(1.01)),
    "bf16: positions shifted": Fault(BOTH, "bf16", stored("pos_embed", lambda v: np.roll(v, 1, axis=1))),
    "bf16: bias dropped": Fault(BOTH, "bf16", zeroed("blocks.0.attn.qkv.bias")),
    "bf16: layer norm epsilon 1e-5": Fault(WEIGHTS, "bf16", epsilon(1e-5)),
    "bf16: claims fp16": Fault(STRUCTURE, "bf16", claims(precision="fp16")),
    # int8
    "int8: channels swapped": Fault(BOTH, "int8", channels_swapped),
    "int8: channels swapped with their scales": Fault(BOTH, "int8", channels_swapped_with_scales),
    "int8: one step off": Fault(WEIGHTS, "int8", one_step_off),
    "int8: one scale for all channels": Fault(BOTH, "int8", scale_of_the_largest),
    "int8: scales one channel off": Fault(BOTH, "int8", scales_one_off),
    "int8: scale +1 %": Fault(WEIGHTS, "int8", scales(1.01)),
    "int8: zero moved": Fault(WEIGHTS, "int8", zero_moved),
    "int8: heads swapped": Fault(BOTH, "int8", heads_of_int8),
    "int8: bias dropped": Fault(BOTH, "int8", zeroed("blocks.0.attn.qkv.bias")),
    "int8: positions shifted": Fault(BOTH, "int8", stored("pos_embed", lambda v: np.roll(v, 1, axis=1))),
    "int8: layer norm epsilon 1e-5": Fault(WEIGHTS, "int8", epsilon(1e-5)),
    "int8: attention scale 1/sqrt(31)": Fault(WEIGHTS, "int8", hotter),
    "int8: head left in float32": Fault(STRUCTURE, "int8", head_left),
    "int8: head left in float32 as it was": Fault(
        STRUCTURE, "int8", together(head_left, lambda p: becomes("MatMul", "Gemm", -1)(p))
    ),
    "int8: claims fp32": Fault(ALL, "int8", claims(precision="fp32")),
    "int8: claims fp16": Fault(of("structure", "numbers"), "int8", claims(precision="fp16")),
    "int8: claims int8-static": Fault(of("structure", "numbers"), "int8", claims(precision="int8-static")),
    "float32 claims int8": Fault(STRUCTURE, "torchscript", claims(precision="int8")),
    "float32 in nodes claims int8": Fault(
        STRUCTURE, "torchscript", together(float32_in_nodes, claims(precision="int8"))
    ),
    "float32 claims fp16": Fault(STRUCTURE, "torchscript", claims(precision="fp16")),
    "float32 with a small defect claims int8": Fault(
        of("structure", "weights"), "torchscript", together(epsilon(1e-5), claims(precision="int8"))
    ),
    # int8 by calibration
    "static: one step off": Fault(WEIGHTS, "int8-static", one_step_off),
    "static: channels swapped": Fault(BOTH, "int8-static", channels_swapped),
    "static: one scale for all channels": Fault(BOTH, "int8-static", scale_of_the_largest),
    "static: range halved": Fault(NUMBERS, "int8-static", ranges(0.5)),
    "static: range sixteen times as wide": Fault(NUMBERS, "int8-static", ranges(16)),
    "static: saturating scale": Fault(NUMBERS, "int8-static", ranges(0.1)),
    "static: zero of an activation moved": Fault(NUMBERS, "int8-static", zero_of_activation_moved),
    "static: bias dropped": Fault(BOTH, "int8-static", zeroed("blocks.0.attn.qkv.bias")),
    "static: product of q and k in int8": Fault(ALL, "int8-static", attention_in_int8),
    "static: an activation left in float32": Fault(STRUCTURE, "int8-static", activation_left),
    "static: claims int8": Fault(STRUCTURE, "int8-static", claims(precision="int8")),
}

LAYERS: dict[str, str] = {
    # the layer where the diagnosis must see a fault first; empty: every layer is right, what comes after them is wrong
    "tanh GELU": "blocks.0.mlp.act",
    "layer norm epsilon 1e-5": "blocks.0.norm1",
    "layer norm epsilon 1e-12": "blocks.0.norm1",
    "attention scale 1/sqrt(31)": "blocks.0.attn.attn_drop",
    "one bias element zeroed": "blocks.0.attn.proj",
    "one layer rounded to fp16": "blocks.0.attn.qkv",
    "two heads of q swapped": "blocks.0.attn.qkv",
    "all weights fp16": "patch_embed.proj",
    "all weights bf16": "patch_embed.proj",
    "proj bias dropped": "blocks.1.attn.proj",
    "qkv bias dropped": "blocks.0.attn.qkv",
    "position embedding shifted": "pos_drop",
    "one weight +1 %": "head",
    "one bias NaN": "head",
    "one bias infinite": "norm",
    "k and v exchanged": "blocks.0.attn.qkv",
    "q and k exchanged": "blocks.0.attn.qkv",
    "heads in another order than proj takes them": "blocks.0.attn.qkv",
    "channels blue to red": "patch_embed.proj",
    "patches read by columns": "patch_embed.proj",
    "classes off by one": "head",
    "norm1 and norm2 exchanged": "blocks.0.norm1",
    "proj of blocks 0 and 1 exchanged": "blocks.0.attn.proj",
    "fc1 transposed where it is square": "blocks.0.mlp.fc1",
    "fc1 and fc2 exchanged where they are square": "blocks.0.mlp.fc1",
    "last bias left out": "head",
    "one of two heads left out": "head_drop",
    "quick GELU": "blocks.0.mlp.act",
    "ReLU for GELU": "blocks.1.mlp.act",
    "attention without scale": "blocks.0.attn.attn_drop",
    "attention without softmax": "blocks.0.attn.attn_drop",
    "softmax over the queries": "blocks.0.attn.attn_drop",
    "scale on q and on k": "blocks.0.attn.attn_drop",
    "class token at the end": "pos_drop",
    "answer of the first patch": "fc_norm",
    "position embedding added twice": "blocks.0.norm1",
    "residual around attention dropped": "blocks.1.norm2",
    "residual around the MLP dropped": "blocks.0",
    "post-norm": "blocks.0.norm2",
    "last norm left out": "norm",
    "norm over tokens": "blocks.0.norm1",
    "patches one pixel off": "patch_embed.proj",
    "patch grid by columns": "patch_embed.norm",
    "four heads": "blocks.0.attn.q_norm",
    "heads interleaved": "blocks.0.attn.q_norm",
    "head at half strength": "head",
    "head without its bias by beta": "head",
    "logits of two classes exchanged": "",
    "logits twice as large": "",
    "logits all raised": "",
    "clipped where only extremes go": "patch_embed.proj",
    "one layer in fp16": "blocks.0.mlp.fc1",
    "batch folded into channels": "patch_embed.proj",
    "batch folded into tokens": "blocks.0.attn.q_norm",
    "mean over the batch taken off": "patch_embed.proj",
    "answers of a batch turned round": "",
    "standard: causal": "blocks.0.attn.norm",
    "standard: another scale": "blocks.0.attn.norm",
    "standard: default scale of four heads": "blocks.0.attn.norm",
    "standard: soft cap": "blocks.0.attn.norm",
    "standard: q and k exchanged": "blocks.1.attn.norm",
    "contrib: causal": "blocks.0.attn.norm",
    "contrib: another scale": "blocks.0.attn.norm",
    "contrib: scale left out of four heads": "blocks.0.attn.norm",
    "served: weight +1 %": "head",
    "stale weights beside it": "patch_embed.proj",
    "two tensors read each other's bytes": "blocks.0.attn.qkv",
    "another model's file": "patch_embed.proj",
    "fp16 overflow": "patch_embed.norm",
    "fp16: bias dropped": "blocks.0.attn.qkv",
    "fp16: positions shifted": "pos_drop",
    "fp16: layer norm epsilon 1e-3": "blocks.0.norm1",
    "bf16: bias dropped": "",
    "int8: bias dropped": "blocks.0.attn.qkv",
    "int8: heads swapped": "blocks.0.attn.qkv",
    "int8: scales one channel off": "blocks.0.attn.qkv",
    "static: bias dropped": "blocks.0.attn.qkv",
    "static: saturating scale": "blocks.0.attn.proj",
}
