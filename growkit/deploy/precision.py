"""A finished float32 ONNX graph in fewer bits: float16, bfloat16, int8. What overflows stays float32.

onnxruntime.transformers.float16 is not used: between nodes that are to stay float32 it casts down and up again, so
that what overflows becomes inf after all; it lifts small weights to 6e-8 and cuts large ones; a tensor that two such
nodes read gives two nodes of one name, which no runtime loads (1.31.1).
"""

import contextlib
import logging
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from growkit.deploy.runtime import open_session
from growkit.errors import GrowkitError

FLOAT, HALF, BRAIN = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
SUFFIX = {FLOAT: "float32", HALF: "float16", BRAIN: "bfloat16"}
HEADROOM = 4  # images in service may drive an activation this much higher than those measured
LARGEST_HALF = 65504 / HEADROOM
SCORES = " scores"
CALIBRATED_AT_ONCE = 8  # images per run


# float16 and bfloat16 ---------------------------------------------------------------------------


def half(
    proto: onnx.ModelProto, *, images: np.ndarray, keep: Collection[str] = ()
) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """`proto` in float16, its input and output float32, and the names of the nodes that stay float32.

    images  (N, C, H, W) float32, normalised: where an activation exceeds 65504 / 4 on them, the nodes that
            make or read it stay float32. So do readers of a weight over 65504, or of a number that would be 0.
    keep    operators that stay float32 in any case

    Raises:
        GrowkitError: images of another shape than the graph takes.
    """
    largest = largest_activations(proto, images)
    over = {name for name, size in largest.items() if not size <= LARGEST_HALF}
    for tensor in proto.graph.initializer:
        if tensor.data_type == FLOAT:
            array = numpy_helper.to_array(tensor)
            low = rounded_to(array, HALF).astype(np.float32)
            # one weight may vanish among many; an epsilon may not
            if np.any(np.isinf(low) & np.isfinite(array)) or (array.size == 1 and array.any() and not low.any()):
                over.add(tensor.name)
    kept = {node.name for node in proto.graph.node if over & {*node.input, *node.output}}
    kept |= _without(proto, HALF) | {node.name for node in proto.graph.node if node.op_type in keep}
    return lowered(proto, HALF, kept), _in_order(proto, kept)


def brain(proto: onnx.ModelProto, *, keep: Collection[str] = ()) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """`proto` in bfloat16, its input and output float32, and the names of the nodes that stay float32.

    These are the ones without bfloat16 in the graph's opset: Conv below opset 22. Nothing overflows: the range is
    float32's. ONNX Runtime runs it on CUDA; its CPU provider has no bfloat16 kernels, see `emulated`.
    """
    kept = _without(proto, BRAIN) | {node.name for node in proto.graph.node if node.op_type in keep}
    return lowered(proto, BRAIN, kept), _in_order(proto, kept)


def rounded_to(array: np.ndarray, kind: int) -> np.ndarray:
    """float32 -> the nearest value of `kind`, ties to even; beyond its range inf, too small for it 0."""
    with np.errstate(over="ignore", under="ignore"):
        return array.astype(helper.tensor_dtype_to_np_dtype(kind))


def largest_activations(proto: onnx.ModelProto, images: np.ndarray) -> dict[str, float]:
    """The largest absolute value of every float32 tensor that a node makes; an Attention's counts its scores.

    Raises:
        GrowkitError: images of another shape than the graph takes.
    """
    _check_images(proto, images, "images")
    probe = onnx.ModelProto()
    probe.CopyFrom(proto)
    for node in probe.graph.node:
        if node.op_type == "Attention" and not node.domain:  # its scores are the fourth output
            node.output.extend([""] * (3 - len(node.output)) + [node.output[0] + SCORES])
    floats = _floats(proto)
    names = [name for node in probe.graph.node for name in node.output if name in floats or name.endswith(SCORES)]
    for name in names:
        probe.graph.node.append(helper.make_node("Abs", [name], [f"{name} size"]))
        probe.graph.node.append(helper.make_node("ReduceMax", [f"{name} size"], [f"{name} largest"], keepdims=0))
    del probe.graph.output[:]
    probe.graph.output.extend(helper.make_tensor_value_info(f"{name} largest", FLOAT, ()) for name in names)
    inner = open_session(probe.SerializeToString()).inner
    sizes = [inner.run(None, fed) for fed in _runs(proto, images)]
    found = {name: float(np.max(column)) for name, column in zip(names, zip(*sizes, strict=True), strict=True)}
    for name in [name for name in found if name.endswith(SCORES)]:
        within = name.removesuffix(SCORES)
        found[within] = max(found[within], found.pop(name))
    return found


def lowered(proto: onnx.ModelProto, kind: int, kept: Collection[str]) -> onnx.ModelProto:
    """`proto` with every float32 node in `kind` but those named in `kept`; inputs and outputs stay float32.

    Casts stand only where the two meet, one per tensor. A weight that both read is stored in both.
    """
    floats = _floats(proto)
    weights = {t.name: t for t in proto.graph.initializer if t.data_type == FLOAT}
    outputs = {value.name for value in proto.graph.output}
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    graph = made.graph
    for part in ("node", "initializer", "value_info"):
        graph.ClearField(part)
    graph.initializer.extend(t for t in proto.graph.initializer if t.data_type != FLOAT)
    # under which name a tensor is there in which kind
    there: dict[tuple[str, int], str] = {(v.name, FLOAT): v.name for v in graph.input}
    taken = set(floats) | set(weights)

    def fresh(name: str, wanted: int) -> str:
        chosen = f"{name}_{SUFFIX[wanted]}"
        while chosen in taken:
            chosen += "_"
        taken.add(chosen)
        return chosen

    def cast(source: str, target: str, wanted: int) -> None:
        graph.node.append(helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=wanted))

    def wanted_in(name: str, wanted: int) -> str:
        if (name, wanted) not in there:
            if name in weights:
                first = not any(key[0] == name for key in there)
                there[name, wanted] = name if first else fresh(name, wanted)
                array = rounded_to(numpy_helper.to_array(weights[name]), wanted)
                graph.initializer.append(numpy_helper.from_array(array, there[name, wanted]))
            else:
                source = next(stored for (key, _), stored in there.items() if key == name)
                there[name, wanted] = fresh(name, wanted)
                cast(source, there[name, wanted], wanted)
        return there[name, wanted]

    for original in proto.graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            raise GrowkitError(f"{node.op_type} {node.name} has a graph of its own; only float32 is supported for it")
        reads = [index for index, name in enumerate(node.input) if name in floats]
        # a node that makes floats of no floats, as ConstantOfShape, says itself of which kind
        own = kind if reads and node.name not in kept else FLOAT
        fixed = _fixed(proto, node)
        for index in reads:
            node.input[index] = wanted_in(node.input[index], FLOAT if index in fixed else own)
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == FLOAT:
                attribute.i = own
        graph.node.append(node)
        for index, name in enumerate(original.output):
            if name not in floats:
                continue
            there[name, own] = name
            if own != FLOAT and name in outputs:
                node = graph.node[-1]
                there[name, own] = node.output[index] = fresh(name, own)
                cast(there[name, own], name, FLOAT)
                there[name, FLOAT] = name
    order = {t.name: index for index, t in enumerate(proto.graph.initializer)}
    stored = sorted(graph.initializer, key=lambda t: order.get(t.name, len(order)))
    graph.ClearField("initializer")
    graph.initializer.extend(stored)
    onnx.checker.check_model(made, full_check=True)
    return made


def emulated(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A float16 or bfloat16 graph in float32 arithmetic, each node's result rounded as the graph says.

    That is what kernels with float32 sums give, and it runs on any provider; open it without graph optimisation.
    ONNX Runtime's CPU provider refuses bfloat16, and computes stretches of a float16 graph in float32 unrounded.
    """
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    graph = made.graph
    graph.ClearField("node")
    low = {name: kind for name, kind in _kinds(proto).items() if kind in (HALF, BRAIN)}
    wide: dict[str, str] = {}
    for original in proto.graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        if node.op_type == "Cast":
            graph.node.append(node)
            continue
        for index, name in enumerate(original.input):
            if name in low:
                if name not in wide:
                    wide[name] = f"{name} wide"
                    graph.node.append(helper.make_node("Cast", [name], [wide[name]], to=FLOAT))
                node.input[index] = wide[name]
        rounding = []
        for index, name in enumerate(original.output):
            if name in low:
                node.output[index] = f"{name} unrounded"
                rounding.append(helper.make_node("Cast", [node.output[index]], [name], to=low[name]))
        graph.node.append(node)
        graph.node.extend(rounding)
    return made


def _kinds(proto: onnx.ModelProto) -> dict[str, int]:
    """Element type of every tensor, inputs and weights included."""
    graph = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    return kinds | {t.name: t.data_type for t in graph.initializer}


def _floats(proto: onnx.ModelProto) -> set[str]:
    return {name for name, kind in _kinds(proto).items() if kind == FLOAT}


def _schema(proto: onnx.ModelProto, node: onnx.NodeProto) -> onnx.defs.OpSchema:
    versions = {o.domain: o.version for o in proto.opset_import}
    return onnx.defs.get_schema(node.op_type, versions[node.domain], node.domain)


def _fixed(proto: onnx.ModelProto, node: onnx.NodeProto) -> set[int]:
    """Inputs that are float32 whatever the others are, as the scales of Resize."""
    return {i for i, formal in enumerate(_schema(proto, node).inputs) if formal.type_str == "tensor(float)"}


def _without(proto: onnx.ModelProto, kind: int) -> set[str]:
    """Names of the nodes whose operator does not take `kind`, in the graph's opset."""
    word = f"tensor({SUFFIX[kind]})"
    floats = _floats(proto)
    found = set()
    for node in proto.graph.node:
        schema = _schema(proto, node)
        takes = {c.type_param_str: word in c.allowed_type_strs for c in schema.type_constraints}
        formals = schema.inputs
        for index, name in enumerate(node.input):
            formal = formals[min(index, len(formals) - 1)]  # the last one may take any number
            if name in floats and formal.type_str != "tensor(float)" and not takes.get(formal.type_str, False):
                found.add(node.name)
    return found


def _in_order(proto: onnx.ModelProto, names: Collection[str]) -> tuple[str, ...]:
    return tuple(node.name for node in proto.graph.node if node.name in names)


def _check_images(proto: onnx.ModelProto, images: np.ndarray, what: str) -> None:
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    wanted = tuple(d.dim_value for d in dims[1:])
    if images.ndim != 4 or images.shape[1:] != wanted or not len(images):
        takes = " x ".join(map(str, wanted))
        got = " x ".join(map(str, images.shape)) or "a single number"
        raise GrowkitError(f"{what} {got}: the model takes N x {takes}, N at least 1; prepare them as for the model")
    if images.dtype != np.float32:
        raise GrowkitError(f"{what} are {images.dtype}: the model takes normalised float32")
    if not np.isfinite(images).all():
        raise GrowkitError(f"{what} hold NaN or infinite values; look for damaged ones")


def _runs(proto: onnx.ModelProto, images: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """The images in batches that the graph takes; where it takes one size, the last image fills up the last batch."""
    given = proto.graph.input[0]
    batch = given.type.tensor_type.shape.dim[0].dim_value
    if batch:
        images = np.concatenate([images, np.repeat(images[-1:], -len(images) % batch, axis=0)])
    for start in range(0, len(images), batch or CALIBRATED_AT_ONCE):
        yield {given.name: images[start : start + (batch or CALIBRATED_AT_ONCE)]}


# int8 -------------------------------------------------------------------------------------------


def int8_dynamic(proto: onnx.ModelProto, *, keep: Collection[str] = ()) -> onnx.ModelProto:
    """`proto` with int8 weights, one scale per output channel, and activations scaled as they come.

    Every MatMul and Gemm by a weight is quantised but the nodes named in `keep`. The scale of an activation is that of
    the whole batch, so an image's logits depend a little on its neighbours.

    Raises:
        GrowkitError: there is no such MatMul or Gemm.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    left = {node.name for node in proto.graph.node} - set(_by_weight(proto, keep))

    def write(target: Path) -> None:
        quantize_dynamic(
            _copied(proto),
            target,
            per_channel=True,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
            # a Gemm is first split in two, and so has another name
            nodes_to_exclude=[*left, *(f"{name}_MatMul" for name in left)],
        )

    return _quantised(proto, write)


def int8_static(proto: onnx.ModelProto, images: np.ndarray, *, keep: Collection[str] = ()) -> onnx.ModelProto:
    """`proto` with int8 weights, one scale per output channel, and fixed scales for the activations they meet.

    images  calibration data (N, C, H, W) float32, normalised as for the model: the scales cover every activation
            seen on them. Every MatMul and Gemm by a weight is quantised but the nodes named in `keep`.

    Raises:
        GrowkitError: images of another shape than the graph takes, or no such MatMul or Gemm.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    _check_images(proto, images, "calibration images")

    def write(target: Path) -> None:
        quantize_static(
            _copied(proto),
            target,
            _reader(_runs(proto, images)),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_quantize=_by_weight(proto, keep),
            # biases, results and logits stay float32: a fused kernel gives float32 anyway
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"], "QuantizeBias": False},
        )

    return _quantised(proto, write)


def _by_weight(proto: onnx.ModelProto, keep: Collection[str]) -> list[str]:
    """Names of the products with a weight; those of two activations, as in attention, stay float32."""
    weights = {t.name for t in proto.graph.initializer}
    found = [
        node.name
        for node in proto.graph.node
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in weights and node.name not in keep
    ]
    if not found:
        raise GrowkitError("the graph holds no MatMul or Gemm by a weight: there is nothing to write in int8")
    return found


def _copied(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without inner shapes, which the quantiser trips over (ort#25890); it changes what it is given."""
    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    copied.graph.ClearField("value_info")
    return copied


def _reader(runs: Iterator[dict[str, np.ndarray]]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(runs, None)

    return Reader()


def _quantised(proto: onnx.ModelProto, write: Callable[[Path], None]) -> onnx.ModelProto:
    """What `write` leaves, with the IR, opsets, metadata and names of its maker as in `proto`."""
    with tempfile.TemporaryDirectory(prefix="growkit-") as folder, _silent():
        target = Path(folder) / "model.onnx"
        write(target)
        made = onnx.load(str(target))
    made.graph.ClearField("value_info")
    made.ir_version = proto.ir_version
    for field in ("opset_import", "metadata_props"):
        made.ClearField(field)
        getattr(made, field).extend(getattr(proto, field))
    for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        setattr(made, field, getattr(proto, field))
    onnx.checker.check_model(made, full_check=True)
    return made


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    # it advises a preparation that the exporter has already done
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
