"""Parts of a file as sessions of their own: the network between pixels and probabilities, and the preprocessing."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from growkit.deploy.form import Form
from growkit.deploy.runtime import Session, on_cuda_or_cpu, open_session
from growkit.deploy.sixteen_bits import emulated
from growkit.deploy.store import read_graph
from growkit.deploy.truth import Preprocessing


def whole_session(file: Path, form: Form, **options: Any) -> Session:
    """Open the file itself."""
    return _session(file, form, **options)


def core_session(file: Path, form: Form, prepared: Preprocessing, *, rounded: bool = False, **options: Any) -> Session:
    """Open the network: normalised images 'input' -> 'logits'; the file itself if it has nothing around the network.

    `rounded` emulates float16 and bfloat16 on the CPU, rounding every node's result.

    Raises:
        ValueError: the graph has no such values in it.
    """
    if not form.pixels and form.output == "logits" and not rounded:
        return whole_session(file, form, **options)
    graph = inner_graph(file, form, prepared, weights=rounded or form.precision == "bf16")
    if rounded:
        return open_session(emulated(graph).SerializeToString(), **{**options, "optimise": False})
    return _session(file, form, graph, **options)


def inner_graph(file: Path, form: Form, prepared: Preprocessing, *, weights: bool = False) -> onnx.ModelProto:
    """Return the graph from normalised images 'input' to 'logits'; weights beside the file are read only on request.

    Raises:
        ValueError: the graph has no such values in it.
    """
    count = form.batch or "batch"
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, [count, *prepared.input_size])
    made = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [count, "classes"])
    return between(read_graph(file, weights=weights), given, made)


def tapped_session(graph: onnx.ModelProto, folder: Path, values: Sequence[str], **options: Any) -> Session:
    """Open `graph` with these inner values as its outputs; its weights may lie in `folder`."""
    tapped = copy.deepcopy(graph)
    del tapped.graph.output[:]
    tapped.graph.output.extend(onnx.ValueInfoProto(name=name) for name in values)  # ONNX Runtime infers the types
    return open_session(tapped.SerializeToString(), folder=folder, **options)


def front_session(file: Path, form: Form, prepared: Preprocessing, **options: Any) -> Session:
    """Open the file's own preprocessing: pixels -> normalised images 'input'.

    Raises:
        ValueError: the graph has no such values in it.
    """
    proto = read_graph(file, weights=form.precision == "bf16")
    made = helper.make_tensor_value_info("input", TensorProto.FLOAT, [form.batch or "batch", *prepared.input_size])
    return _session(file, form, between(proto, proto.graph.input[0], made), **options)


def between(proto: onnx.ModelProto, given: onnx.ValueInfoProto, made: onnx.ValueInfoProto) -> onnx.ModelProto:
    """Return the part of the graph that computes the value `made` from the value `given`.

    Raises:
        ValueError: there is no such part.
    """
    nodes = proto.graph.node
    maker = {output: index for index, node in enumerate(nodes) for output in node.output}
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    needed: set[int] = set()
    wanted, weights = [made.name], set()
    met = False
    while wanted:
        name = wanted.pop()
        if name == given.name:
            met = True
        elif name in stored:
            weights.add(name)
        elif name in maker:
            if maker[name] not in needed:
                needed.add(maker[name])
                wanted += [entry for entry in nodes[maker[name]].input if entry]
        else:
            raise ValueError(f"{made.name} is not made from {given.name} alone: {name} comes from elsewhere")
    if not met:
        raise ValueError(f"{made.name} is not made from {given.name}")
    part = onnx.ModelProto()
    part.ir_version = proto.ir_version
    part.opset_import.extend(proto.opset_import)
    part.functions.extend(proto.functions)
    part.graph.name = proto.graph.name
    part.graph.node.extend(node for index, node in enumerate(nodes) if index in needed)
    part.graph.initializer.extend(tensor for name, tensor in stored.items() if name in weights)
    part.graph.input.append(given)
    part.graph.output.append(made)
    return part


def _session(
    file: Path, form: Form, part: onnx.ModelProto | None = None, *, provider: str = "cpu", **options: Any
) -> Session:
    """Open the file, or a part of it.

    ONNX Runtime's CPU provider has no bfloat16, so its arithmetic is emulated there (see sixteen_bits.emulated).
    """
    if form.precision == "bf16" and provider == "auto":
        return on_cuda_or_cpu(lambda place: _session(file, form, part, provider=place, **options))
    if form.precision == "bf16" and provider == "cpu":
        part, options = emulated(read_graph(file) if part is None else part), {**options, "optimise": False}
    if part is None:
        return open_session(file, provider=provider, **options)
    return open_session(part.SerializeToString(), folder=file.parent, provider=provider, **options)
