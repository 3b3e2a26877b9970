"""Convert a finished float32 ONNX graph to float16 or bfloat16. What overflows stays float32.

onnxruntime.transformers.float16 is not used: between nodes kept in float32 it casts down and up again, so that what
overflows becomes inf after all; it raises small weights to 6e-8 and clips large ones; a tensor that two such nodes
read gives two nodes with the same name, which no runtime loads (1.31.1).
"""

import copy
from collections.abc import Collection

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from growkit.deploy.calibration import refuse_images, runs
from growkit.deploy.runtime import open_session
from growkit.errors import GrowkitError

FLOAT, HALF, BRAIN = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
SUFFIX = {FLOAT: "float32", HALF: "float16", BRAIN: "bfloat16"}
HEADROOM = 4  # images in service may drive an activation this much higher than those measured
LARGEST_HALF = 65504 / HEADROOM
SCORES = " scores"  # behind the name of an Attention's output: its scores, while they are measured


def half(proto: onnx.ModelProto, *, images: np.ndarray, keep: Collection[str] = ()) -> onnx.ModelProto:
    """Return `proto` in float16, its input and output in float32.

    images  (N, C, H, W) float32, normalised: where an activation exceeds 65504 / 4 on them, the nodes that
            make or read it stay float32. So do readers of a weight over 65504, or of a scalar that would become 0.
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
            # one weight among many may underflow; an epsilon may not
            if np.any(np.isinf(low) & np.isfinite(array)) or (array.size == 1 and array.any() and not low.any()):
                over.add(tensor.name)
    kept = {node.name for node in proto.graph.node if over & {*node.input, *node.output}}
    kept |= _without(proto, HALF) | {node.name for node in proto.graph.node if node.op_type in keep}
    return lowered(proto, HALF, kept)


def brain(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return `proto` in bfloat16, its input and output in float32.

    Nodes that have no bfloat16 version in the graph's opset stay float32: Conv below opset 22. Nothing overflows: the
    range is float32's. ONNX Runtime runs it on CUDA; its CPU provider has no bfloat16 kernels, see `emulated`.
    """
    return lowered(proto, BRAIN, _without(proto, BRAIN))


def rounded_to(array: np.ndarray, kind: int) -> np.ndarray:
    """Round float32 to the nearest value of `kind`, ties to even; overflow gives inf, underflow 0."""
    with np.errstate(over="ignore", under="ignore"):
        return array.astype(helper.tensor_dtype_to_np_dtype(kind))


def largest_activations(proto: onnx.ModelProto, images: np.ndarray) -> dict[str, float]:
    """Measure the largest absolute value of every float32 output of a node; an Attention's includes its scores.

    Raises:
        GrowkitError: images of another shape than the graph takes.
    """
    refuse_images(proto, images, "images")
    probe = copy.deepcopy(proto)
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
    sizes = [inner.run(None, fed) for fed in runs(proto, images)]
    found = {name: float(np.max(column)) for name, column in zip(names, zip(*sizes, strict=True), strict=True)}
    for name in [name for name in found if name.endswith(SCORES)]:
        within = name.removesuffix(SCORES)
        found[within] = max(found[within], found.pop(name))
    return found


def lowered(proto: onnx.ModelProto, kind: int, kept: Collection[str]) -> onnx.ModelProto:
    """Convert every float32 node of `proto` to `kind` except those named in `kept`; inputs and outputs stay float32.

    Casts are inserted only where the two types meet, one per tensor. A weight that both read is stored in both.
    """
    floats = _floats(proto)
    outputs = {value.name for value in proto.graph.output}
    made = _Lowered(proto, floats)
    for original in proto.graph.node:
        node = copy.deepcopy(original)
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            raise GrowkitError(f"{node.op_type} {node.name} has a graph of its own; only float32 is supported for it")
        reads = [index for index, name in enumerate(node.input) if name in floats]
        # a node without float inputs that outputs floats, as ConstantOfShape, sets their type itself
        own = kind if reads and node.name not in kept else FLOAT
        fixed = _fixed(proto, node)
        for index in reads:
            node.input[index] = made.named(node.input[index], FLOAT if index in fixed else own)
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == FLOAT:
                attribute.i = own
        lowered_outputs = [i for i, name in enumerate(original.output) if own != FLOAT and name in floats & outputs]
        for index in lowered_outputs:
            node.output[index] = made.fresh(node.output[index], own)
        made.proto.graph.node.append(node)
        for name, stored in zip(original.output, node.output, strict=True):
            if name in floats:
                made.names[name, own] = stored
        for index in lowered_outputs:
            made.cast(node.output[index], original.output[index], FLOAT)
            made.names[original.output[index], FLOAT] = original.output[index]
    onnx.checker.check_model(made.proto, full_check=True)
    return made.proto


class _Lowered:
    """A graph in the making, whose tensors get a name for each type in which they are read.

    names  (tensor, type) -> the name of that tensor in that type
    """

    def __init__(self, original: onnx.ModelProto, floats: set[str]):
        self.proto = copy.deepcopy(original)
        for part in ("node", "initializer", "value_info"):
            self.proto.graph.ClearField(part)
        self.proto.graph.initializer.extend(t for t in original.graph.initializer if t.data_type != FLOAT)
        self.weights = {t.name: t for t in original.graph.initializer if t.data_type == FLOAT}
        self.names = {(v.name, FLOAT): v.name for v in original.graph.input}
        self.taken = set(floats)

    def named(self, name: str, wanted: int) -> str:
        """Return the name of a tensor in the type wanted; where there is none yet, store or cast it."""
        if (name, wanted) not in self.names:
            there = next((stored for (known, _), stored in self.names.items() if known == name), None)
            self.names[name, wanted] = chosen = name if there is None else self.fresh(name, wanted)
            if name in self.weights:
                array = rounded_to(numpy_helper.to_array(self.weights[name]), wanted)
                self.proto.graph.initializer.append(numpy_helper.from_array(array, chosen))
            else:
                self.cast(there or name, chosen, wanted)
        return self.names[name, wanted]

    def fresh(self, name: str, wanted: int) -> str:
        """Return a name that no tensor has yet."""
        chosen = f"{name}_{SUFFIX[wanted]}"
        while chosen in self.taken:
            chosen += "_"
        self.taken.add(chosen)
        return chosen

    def cast(self, source: str, target: str, wanted: int) -> None:
        """Add a node that makes `target`, of the type wanted, from `source`."""
        self.proto.graph.node.append(helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=wanted))


def emulated(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a float16 or bfloat16 graph in float32 arithmetic, each node's result rounded to the graph's type.

    This equals kernels with float32 accumulation and runs on any provider; open it without graph optimisation.
    ONNX Runtime's CPU provider refuses bfloat16, and computes stretches of a float16 graph in float32 unrounded.
    """
    made = copy.deepcopy(proto)
    graph = made.graph
    graph.ClearField("node")
    low = {name: kind for name, kind in _kinds(proto).items() if kind in (HALF, BRAIN)}
    wide: dict[str, str] = {}
    for original in proto.graph.node:
        node = copy.deepcopy(original)
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
    """Return the indices of inputs that are always float32, such as the scales of Resize."""
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
            formal = formals[min(index, len(formals) - 1)]  # the last one may be variadic
            if name in floats and formal.type_str != "tensor(float)" and not takes.get(formal.type_str, False):
                found.add(node.name)
    return found
