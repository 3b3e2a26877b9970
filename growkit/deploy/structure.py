"""Does the file match its form: inputs, outputs, operators, metadata, and no trace of the exporting machine?"""

import dataclasses
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from growkit.deploy.checks import Check, check
from growkit.deploy.form import CONTRIB, Form
from growkit.deploy.pixels import INPUT
from growkit.deploy.store import json_in, nodes, object_in, props_of, without_weights
from growkit.deploy.truth import Preprocessing
from growkit.files import plain
from growkit.text import short, some

RANDOM = {
    "Bernoulli",
    "Dropout",  # exporters leave it out for inference
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}
OF_INT8 = {"int8": {"DynamicQuantizeLinear", "MatMulInteger"}, "int8-static": {"QuantizeLinear", "DequantizeLinear"}}
QUANTISERS = {
    "ConvInteger",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "MatMulInteger",
    "QLinearConv",
    "QLinearMatMul",
    "QuantizeLinear",
}
HALVES = {TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
BRANCHES = {"If", "SequenceMap"}  # store.read_graph reads no loops
OWN_MODEL = "exported from this model"  # the name of a check


def structure_checks(
    proto: onnx.ModelProto,
    form: Form,
    prepared: Preprocessing,
    classes: int,
    *,
    weights_sha256: str | None,
    labels: Sequence[str] | None,
) -> list[Check]:
    """Check the graph and its metadata against the form and the model's preprocessing, weights and labels."""
    opsets = {o.domain or "ai.onnx": o.version for o in proto.opset_import}
    inputs = [_signature(v) for v in proto.graph.input]  # a weight among them could be replaced by a caller
    outputs = [_signature(v) for v in proto.graph.output]
    channels, height, width = prepared.input_size
    batch = str(form.batch) if form.batch else "batch"
    given = (
        f"{INPUT}: uint8 {batch} x ? x ? x {channels}"
        if form.pixels
        else f"input: float32 {batch} x {channels} x {height} x {width}"
    )
    answers = {
        "logits": f"float32 {batch} x {classes}",
        "probabilities": f"float32 {batch} x {classes}",
        "scores": f"float32 {batch} x {form.top}",
        "classes": f"int64 {batch} x {form.top}",
    }

    domains = ["ai.onnx", CONTRIB] if form.attention == "contrib" else ["ai.onnx"]

    def exactly(name: str, got: list[str] | int | None, wanted: list[str] | int) -> Check:
        said, expected = ((some(v) or "none") if isinstance(v, list) else str(v) for v in (got, wanted))
        line = f"{name}: {said}" + ("" if got == wanted else f", expected {expected}")
        return check("structure", name, got == wanted, said, expected, line)

    return [
        exactly("input", inputs, [given]),
        exactly("output", outputs, [f"{name}: {answers[name]}" for name in form.outputs]),
        exactly("opset", opsets.get("ai.onnx"), form.opset),
        exactly("IR version", proto.ir_version, form.ir),
        exactly("operator domains", sorted({n.domain or "ai.onnx" for n in proto.graph.node}), domains),
        exactly("operators that have no place", _misplaced(proto, form), []),
        exactly(f"not {form.precision}", _not_in_precision(proto, form.precision), []),
        exactly("read by nobody", _unread(proto), []),
        exactly("paths of the exporting machine", _leaks(proto), []),
        *_metadata(proto, dataclasses.asdict(prepared), weights_sha256, labels),
    ]


def sizes_claimed(proto: onnx.ModelProto, form: Form) -> Check:
    """Check that the batch and image size that the form claims, if any, are those of the graph."""
    given = [_signature(v) for v in proto.graph.input]
    shape = [d.dim_value for v in proto.graph.input[:1] for d in v.type.tensor_type.shape.dim]
    right = form.batch is None or shape[:1] == [form.batch]
    right &= form.image_size is None or form.pixels or shape[2:] == [form.image_size] * 2
    told = f"batch {form.batch or 'any'}, image size {form.image_size or 'its own'}"
    return check("structure", "sizes", right, ", ".join(given), told, f"sizes: {', '.join(given)}, but claimed: {told}")


def _misplaced(proto: onnx.ModelProto, form: Form) -> list[str]:
    """Return operators that are random, or that may behave differently in a check and in use."""
    found = {node.op_type for node in nodes(proto)}
    fused = {"Attention"} if any(n.op_type == "Attention" and not n.domain for n in proto.graph.node) else set()
    return sorted(found & (RANDOM | BRANCHES)) + sorted(fused if form.attention != "standard" else ())


def _not_in_precision(proto: onnx.ModelProto, precision: str) -> list[str]:
    """Return what contradicts the claimed precision: a lower one would get looser limits.

    float16 may keep in float32 the layers that overflow, but not most weights. int8 must quantise every product with a
    weight, and none of two activations.
    """
    graph = proto.graph
    weights = {t.name: t for t in graph.initializer}
    maker = {name: node for node in graph.node for name in node.output}
    types = {t.data_type for t in (*weights.values(), *(a.t for n in graph.node for a in n.attribute))}
    types |= {a.i for n in graph.node if n.op_type == "Cast" for a in n.attribute if a.name == "to"}
    found = [f"a {kind} value" for value, kind in HALVES.items() if value in types and kind != precision]
    quantisers = {n.op_type for n in graph.node} & QUANTISERS
    found += sorted(quantisers - OF_INT8.get(precision, set()))
    if precision in HALVES.values():
        sizes = {kind: sum(math.prod(t.dims) for t in weights.values() if t.data_type == kind) for kind in (1, *HALVES)}
        found += [f"{sizes[1]} float32 weights"] if 2 * sizes[1] > sum(sizes.values()) else []
    elif precision in OF_INT8:
        by_weight = set(weights)
        if precision == "int8-static":
            by_weight = {n.output[0] for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in weights}
        right = 0
        for node in graph.node:
            if node.op_type not in ("MatMul", "Gemm", "MatMulInteger"):
                continue
            makers = [maker[name].op_type if name in maker else "" for name in node.input[:2]]
            low = node.op_type == "MatMulInteger" or "DequantizeLinear" in makers
            if low and node.input[1] not in by_weight:
                found.append(f"{node.op_type} {node.name} of two activations")
            elif low and precision == "int8-static" and makers[0] != "DequantizeLinear":
                found.append(f"{node.op_type} {node.name} of a float32 activation")
            elif not low and node.input[1] in weights:
                found.append(f"{node.op_type} {node.name} in float32")
            right += low
        found += [] if right else ["no product in int8"]
    return found


def _unread(proto: onnx.ModelProto) -> list[str]:
    """Stored tensors that no operator reads, and operators whose values lead to no output."""
    wanted = {value.name for value in proto.graph.output}
    unread = []
    for node in reversed(proto.graph.node):  # sorted: readers come after makers
        if wanted.isdisjoint(node.output):
            unread.append(f"{node.op_type} {node.output[0]}" if node.output else node.op_type)
        else:
            wanted.update(node.input)
            wanted.update(_read_inside(node))
    unread += [tensor.name for tensor in proto.graph.initializer if tensor.name not in wanted]
    return unread[::-1]


def _read_inside(node: onnx.NodeProto) -> set[str]:
    """Values that the branches of a node read."""
    graphs = [a.g for a in node.attribute if a.HasField("g")] + [g for a in node.attribute for g in a.graphs]
    inside = [inner for graph in graphs for inner in graph.node]
    names = {name for inner in inside for name in inner.input} | {v.name for g in graphs for v in g.output}
    return names.union(*(_read_inside(inner) for inner in inside))


def _signature(value: onnx.ValueInfoProto) -> str:
    """'name: dtype d0 x d1'; a symbolic first dimension reads 'batch', any other '?'."""
    if not value.type.HasField("tensor_type"):
        return f"{value.name}: {value.type.WhichOneof('value') or 'nothing'}"
    tensor = value.type.tensor_type
    dims = [
        str(d.dim_value) if d.HasField("dim_value") else ("batch" if index == 0 else "?")
        for index, d in enumerate(tensor.shape.dim)
    ]
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
    return f"{value.name}: {dtype} {' x '.join(dims)}"


def _leaks(proto: onnx.ModelProto) -> list[str]:
    # without the weights: three bytes such as '.py' occur in them by chance
    bare = without_weights(proto)
    data = bare.SerializeToString()
    folders = {str(Path.home()), os.getcwd(), tempfile.gettempdir(), sys.prefix}
    found = [folder + os.sep for folder in sorted(folders) if len(folder) > 1 and os.fsencode(folder + os.sep) in data]
    # a class, or a source, may be called deit.pytorch.pth
    others = [entry for entry in bare.metadata_props if entry.key not in ("labels", "growkit.provenance")]
    del bare.metadata_props[:]
    bare.metadata_props.extend(others)
    code = bare.SerializeToString()
    return [needle for needle in ("site-packages", ".py") if needle.encode() in code] + found


def _metadata(
    proto: onnx.ModelProto,
    prepared: Mapping[str, Any],
    weights_sha256: str | None,
    labels: Sequence[str] | None,
) -> list[Check]:
    props = props_of(proto)
    stored, wanted = json_in(props, "preprocessing"), plain(prepared)
    checks = [
        check(
            "structure",
            "preprocessing",
            stored == wanted,
            str(stored),
            str(wanted),
            f"preprocessing in the file: {stored}" + ("" if stored == wanted else f", the model's is {wanted}"),
        )
    ]
    if weights_sha256 is not None:
        found = object_in(props, "growkit.provenance").get("weights_sha256")
        same = found == weights_sha256
        line = f"exported from weights {short(found)}" + (
            "" if same else f", but this model's are {short(weights_sha256)}: export it again"
        )
        checks.append(check("structure", OWN_MODEL, same, str(found), weights_sha256, line))
    if labels is not None:
        found, own = json_in(props, "labels"), list(labels)
        same = found == own
        line = "class names in the file are " + ("the model's" if same else "not the model's")
        checks.append(check("structure", "labels", same, str(found), str(own), line))
    return checks
