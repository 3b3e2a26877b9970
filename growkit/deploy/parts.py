"""Parts of a file as sessions of their own: the network between pixels and probabilities, and what lies in front."""

import contextlib
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from growkit.deploy.form import Form
from growkit.deploy.precision import emulated
from growkit.deploy.reference import Preprocessing
from growkit.deploy.runtime import Session, open_session
from growkit.deploy.store import read_graph
from growkit.errors import GrowkitError


def whole_session(file: Path, form: Form, *, provider: str = "cpu", **options: Any) -> Session:
    """The file itself.

    ONNX Runtime's CPU provider has no bfloat16: there its arithmetic is emulated, as precision.emulated says.
    """
    if form.precision == "bf16" and provider in ("cpu", "auto"):
        if provider == "auto":
            with contextlib.suppress(GrowkitError):
                return open_session(file, provider="cuda", **options)
        return _session(file, read_graph(file), form, provider="cpu", **options)
    return open_session(file, provider=provider, **options)


def core_session(
    file: Path, form: Form, prepared: Preprocessing, classes: int | str, *, rounded: bool = False, **options: Any
) -> Session:
    """Normalised images 'input' -> 'logits'; the file itself where it has nothing around the network.

    classes  how many; a word where that is not known
    rounded  emulate float16 and bfloat16, every node's result rounded, on the CPU

    Raises:
        ValueError: the graph has no such values in it.
    """
    if not form.pixels and form.output == "logits" and not rounded:
        return whole_session(file, form, **options)
    count = form.batch or "batch"
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, [count, *prepared.input_size])
    made = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [count, classes])
    if rounded:
        part = emulated(between(read_graph(file), given, made))
        return open_session(part.SerializeToString(), **{**options, "optimise": False})
    return _session(file, between(_graph(file, form), given, made), form, **options)


def front_session(file: Path, form: Form, prepared: Preprocessing, **options: Any) -> Session:
    """Pixels -> normalised images 'input'.

    Raises:
        ValueError: the graph has no such values in it.
    """
    proto = _graph(file, form)
    made = helper.make_tensor_value_info("input", TensorProto.FLOAT, [form.batch or "batch", *prepared.input_size])
    return _session(file, between(proto, proto.graph.input[0], made), form, **options)


def between(proto: onnx.ModelProto, given: onnx.ValueInfoProto, made: onnx.ValueInfoProto) -> onnx.ModelProto:
    """The part of the graph that makes the value `made` from the value `given`.

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


def _graph(file: Path, form: Form) -> onnx.ModelProto:
    # what is emulated is rewritten, weights and all; else ONNX Runtime reads them from beside the file
    return read_graph(file, weights=form.precision == "bf16")


def _session(file: Path, part: onnx.ModelProto, form: Form, *, provider: str = "cpu", **options: Any) -> Session:
    if form.precision == "bf16" and provider == "cpu":
        part, options = emulated(part), {**options, "optimise": False}
    return open_session(part.SerializeToString(), folder=file.parent, provider=provider, **options)
