"""ONNX files, what lies beside them and reference data that somebody damaged, or made to do harm.

Each is made again by its name: a function that changes a run folder in which growkit exported a tiny model. Those with
`beside` want one whose weights lie in a file of their own.
"""

import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from checkpoint_mutants import damaged
from onnx import TensorProto, helper, numpy_helper

Mutate = Callable[[Path, random.Random], None]
Change = Callable[[onnx.ModelProto], None]
HUGE = 10**11


def edited(change: Change, *, beside: bool = False) -> Mutate:
    def make(run: Path, rng: random.Random) -> None:
        path = run / "onnx" / "model.onnx"
        proto = onnx.load(str(path), load_external_data=False)
        change(proto)
        path.write_bytes(proto.SerializeToString())

    make.beside = beside  # type: ignore[attr-defined]
    return make


def first_weight(proto: onnx.ModelProto) -> onnx.TensorProto:
    return max(proto.graph.initializer, key=lambda tensor: int(np.prod(tensor.dims)))


def with_dims(*dims: int) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        tensor = first_weight(proto)
        del tensor.dims[:]
        tensor.dims.extend(dims)

    return change


def with_external(**entries: str) -> Change:
    """The first weight said to lie in a file."""

    def change(proto: onnx.ModelProto) -> None:
        tensor = first_weight(proto)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        del tensor.external_data[:]
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)

    return change


def with_meta(key: str, value: str) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        kept = [(entry.key, entry.value) for entry in proto.metadata_props if entry.key != key]
        del proto.metadata_props[:]
        for own, text in [*kept, (key, value)]:
            proto.metadata_props.add(key=own, value=text)

    return change


def before_logits(*nodes: onnx.NodeProto, constants: dict[str, np.ndarray] | None = None) -> Change:
    """Nodes put behind the graph; the last one's output is added to the logits, times zero."""

    def change(proto: onnx.ModelProto) -> None:
        graph = proto.graph
        for name, array in (constants or {}).items():
            graph.initializer.append(numpy_helper.from_array(array, name))
        (output,) = graph.output
        for node in graph.node:
            for at, name in enumerate(node.output):
                if name == output.name:
                    node.output[at] = "own_logits"
        graph.initializer.append(numpy_helper.from_array(np.zeros((), np.float32), "nought"))
        graph.node.extend(nodes)
        graph.node.append(helper.make_node("ReduceMean", [nodes[-1].output[0]], ["all_of_it"], keepdims=0))
        graph.node.append(helper.make_node("Mul", ["all_of_it", "nought"], ["none_of_it"]))
        graph.node.append(helper.make_node("Add", ["own_logits", "none_of_it"], [output.name]))

    return change


def large(count: int) -> dict[str, Change]:
    """Graphs of a few bytes that make tensors of so many numbers, or never end."""
    size, side = np.array([count], np.int64), math.sqrt(count) / 4
    one = np.ones((1,), np.float32)
    forever = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["went"]),
            helper.make_node("Add", ["so_far", "step"], ["further"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("so_far", TensorProto.FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("went", TensorProto.BOOL, []),
            helper.make_tensor_value_info("further", TensorProto.FLOAT, [1]),
        ],
        [numpy_helper.from_array(one, "step")],
    )
    return {
        "ConstantOfShape": before_logits(
            helper.make_node("ConstantOfShape", ["size"], ["big"], value=numpy_helper.from_array(one)),
            constants={"size": size},
        ),
        "Expand": before_logits(
            helper.make_node("Expand", ["one", "size"], ["big"]), constants={"size": size, "one": one}
        ),
        "Tile": before_logits(helper.make_node("Tile", ["one", "size"], ["big"]), constants={"size": size, "one": one}),
        "Range": before_logits(
            helper.make_node("Range", ["from", "to", "by"], ["big"]),
            constants={n: np.array(v, np.float32) for n, v in (("from", 0), ("to", count), ("by", 1))},
        ),
        "Loop": before_logits(
            helper.make_node("Loop", ["turns", "yes", "one"], ["big"], body=forever),
            constants={"turns": np.array(2**62, np.int64), "yes": np.array(True), "one": one},
        ),
        "Resize": before_logits(
            helper.make_node("Resize", ["square", "", "scales"], ["big"]),
            constants={"square": np.ones((1, 1, 4, 4), np.float32), "scales": np.array([1, 1, side, side], np.float32)},
        ),
        "Pad": before_logits(
            helper.make_node("Pad", ["one", "pads"], ["big"]),
            constants={"one": one, "pads": np.array([0, count], np.int64)},
        ),
        "OneHot": before_logits(
            helper.make_node("OneHot", ["which", "depth", "values"], ["big"]),
            constants={
                "which": np.zeros((1,), np.int64),
                "depth": np.array(count, np.int64),
                "values": np.array([0, 1], np.float32),
            },
        ),
    }


def nested(depth: int) -> Change:
    """If in If in If."""

    def change(proto: onnx.ModelProto) -> None:
        out = helper.make_tensor_value_info("inner", TensorProto.FLOAT, [1])
        value = numpy_helper.from_array(np.ones((1,), np.float32), "value")
        leaf = helper.make_graph([helper.make_node("Identity", ["value"], ["inner"])], "leaf", [], [out], [value])
        graph = leaf
        for _ in range(depth):
            node = helper.make_node("If", ["yes"], ["inner"], then_branch=graph, else_branch=leaf)
            graph = helper.make_graph([node], "branch", [], [out])
        top = helper.make_node("If", ["yes"], ["big"], then_branch=graph, else_branch=leaf)
        before_logits(top, constants={"yes": np.array(True)})(proto)

    return change


def graphs() -> dict[str, Change]:
    """Graphs that are none, or other ones."""

    def cyclic(proto: onnx.ModelProto) -> None:
        node = proto.graph.node[0]
        node.input[0] = proto.graph.node[-1].output[0]

    def twice(proto: onnx.ModelProto) -> None:
        proto.graph.node.append(proto.graph.node[0])

    def stray(proto: onnx.ModelProto) -> None:
        proto.graph.node[0].input[0] = "nowhere"

    def renamed(field: str, text: str) -> Change:
        def change(proto: onnx.ModelProto) -> None:
            if field == "op":
                proto.graph.node[3].op_type = text
            elif field == "domain":
                proto.graph.node[3].domain = text
                proto.opset_import.add(domain=text, version=1)
            elif field == "input":
                proto.graph.input[0].name = text
            elif field == "output":
                proto.graph.output[0].name = text
            else:
                proto.graph.node[3].name = text

        return change

    def emptied(proto: onnx.ModelProto) -> None:
        proto.ClearField("graph")

    def no_nodes(proto: onnx.ModelProto) -> None:
        del proto.graph.node[:]

    def no_weights(proto: onnx.ModelProto) -> None:
        del proto.graph.initializer[:]

    def no_shapes(proto: onnx.ModelProto) -> None:
        for value in (*proto.graph.input, *proto.graph.output):
            value.type.tensor_type.ClearField("shape")

    def doubled_output(proto: onnx.ModelProto) -> None:
        proto.graph.output.append(proto.graph.output[0])

    def more_inputs(proto: onnx.ModelProto) -> None:
        proto.graph.input.add().CopyFrom(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))

    def sized(axis: int, size: int) -> Change:
        def change(proto: onnx.ModelProto) -> None:
            proto.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = size

        return change

    def opset(version: int) -> Change:
        def change(proto: onnx.ModelProto) -> None:
            proto.opset_import[0].version = version

        return change

    def ir(version: int) -> Change:
        def change(proto: onnx.ModelProto) -> None:
            proto.ir_version = version

        return change

    def typed(kind: int) -> Change:
        def change(proto: onnx.ModelProto) -> None:
            first_weight(proto).data_type = kind

        return change

    def negated(proto: onnx.ModelProto) -> None:
        tensor = first_weight(proto)
        tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))

    def spoiled(value: float) -> Change:
        def change(proto: onnx.ModelProto) -> None:
            tensor = first_weight(proto)
            array = numpy_helper.to_array(tensor).copy()
            array.flat[0] = value
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

        return change

    def itself(proto: onnx.ModelProto) -> None:
        node = helper.make_node("F", ["x"], ["y"], domain="f")
        function = helper.make_function("f", "F", ["x"], ["y"], [node], [helper.make_opsetid("f", 1)])
        proto.functions.append(function)
        proto.opset_import.add(domain="f", version=1)
        proto.graph.node[3].op_type, proto.graph.node[3].domain = "F", "f"

    fields = ("op", "domain", "input", "output", "node")
    words = ("\x1b[2J\x1b[31m", "[red]x[/red]", "../../etc/passwd", "a\x00b", "\u202ex", "x" * 100_000, "", "<script>")
    return {
        **{f"{field} {text[:8]!r}": renamed(field, text) for field in fields for text in words},
        **{f"opset {version}": opset(version) for version in (-1, 0, 1, 99, 2**31 - 1)},
        **{f"IR {version}": ir(version) for version in (-1, 0, 99, 2**31 - 1)},
        **{f"type {kind}": typed(kind) for kind in (0, 2, 7, 8, 9, 14, 99, -1)},
        **{f"image {size} high": sized(2, size) for size in (0, -1, 1, 10**6, 2**62)},
        **{f"batch of {size}": sized(0, size) for size in (0, 1, 3, 2**62)},
        **{f"dims {dims}": with_dims(*dims) for dims in DIMS},
        **{f"value {value}": spoiled(value) for value in (float("nan"), float("inf"), 1e38)},
        "cyclic": cyclic,
        "twice": twice,
        "stray": stray,
        "emptied": emptied,
        "no nodes": no_nodes,
        "no weights": no_weights,
        "no shapes": no_shapes,
        "two outputs": doubled_output,
        "more inputs": more_inputs,
        "negated": negated,
        "calls itself": itself,
        "nested 30": nested(30),
        **{f"large {name}": change for name, change in large(HUGE).items()},
        **{f"8 GB {name}": change for name, change in large(2 * 10**9).items()},
    }


DIMS = ((-1,), (HUGE,), (2**62, 2**62), (0,), (1,) * 200, (2**31, 2**31, 2), (-(2**63),))


def metas() -> dict[str, Change]:
    """The file's own words, of other kinds than growkit writes."""
    keys = ("growkit.form", "growkit.provenance", "preprocessing", "labels", "growkit.precision")
    texts = {
        "nothing": "",
        "a number": "7",
        "a list": "[1, {}, null]",
        "a word": '"word"',
        "an object of lists": '{"precision": [], "mean": {}, "batch": "x", "target": 5}',
        "no json": "{",
        "deep": "[" * 50_000 + "]" * 50_000,
        "10 MB": json.dumps("x" * 10_000_000),
        "markup": json.dumps(["\x1b[2J[red]<script>alert(1)</script>"]),
        "large numbers": '{"batch": 1e999, "image_size": 99999999999999999999, "mean": [1e999], "std": [0]}',
    }
    return {f"meta {key} {name}": with_meta(key, text) for key in keys for name, text in texts.items()}


def externals() -> dict[str, Mutate]:
    """Weights in files that they should not come from."""
    made: dict[str, Mutate] = {}
    places = (
        "../../model.safetensors",
        "/etc/passwd",
        "/dev/zero",
        "model.onnx",
        ".",
        "",
        "nowhere",
        "a\x00b",
        "x" * 300,
        "sub/../w",
    )
    for place in places:
        made[f"external {place[:30]!r}"] = edited(with_external(location=place, offset="0", length="64"))
    for offset, length in (("0", str(HUGE)), ("-1", "64"), (str(2**63), "64"), ("x", "y"), ("0", "-5"), ("1e9", "0")):
        made[f"external {offset} {length}"] = edited(
            with_external(location="model.onnx.data", offset=offset, length=length), beside=True
        )

    def linked(target: str) -> Mutate:
        def make(run: Path, rng: random.Random) -> None:
            data = run / "onnx" / "model.onnx.data"
            data.unlink()
            data.symlink_to(target)

        make.beside = True  # type: ignore[attr-defined]
        return make

    for target in ("/dev/zero", "model.onnx.data", "/etc/hostname", "../grown/model.safetensors"):
        made[f"weights link to {target}"] = linked(target)

    def piped(run: Path, rng: random.Random) -> None:
        (run / "onnx" / "model.onnx.data").unlink()
        os.mkfifo(run / "onnx" / "model.onnx.data")

    piped.beside = True  # type: ignore[attr-defined]
    return {**made, "weights a pipe": piped}


def files(rounds: int) -> dict[str, Mutate]:
    """All mutants, by name; `rounds` of random damage to each kind of file."""
    found: dict[str, Mutate] = {f"graph {name}": edited(change) for name, change in (graphs() | metas()).items()}
    found |= externals()

    def hurt(name: str, how: str, beside: bool) -> Mutate:
        def make(run: Path, rng: random.Random) -> None:
            path = run / "onnx" / name
            path.write_bytes(damaged(path.read_bytes(), how, rng))

        make.beside = beside  # type: ignore[attr-defined]
        return make

    inside = ("model.onnx", "test_data_set_0/input_0.pb", "test_data_set_1/output_0.pb", "export.json")
    for name, beside in (*((name, False) for name in inside), ("model.onnx", True), ("model.onnx.data", True)):
        for how in ("cut", "flip", "out", "in", "zero"):
            for number in range(rounds):
                found[f"{name}{' beside' * beside} {how} {number}"] = hurt(name, how, beside)
    for name in inside:

        def replaced(run: Path, rng: random.Random, name: str = name, data: bytes = b"") -> None:
            (run / "onnx" / name).write_bytes(data)

        def to_pipe(run: Path, rng: random.Random, name: str = name) -> None:
            (run / "onnx" / name).unlink()
            os.mkfifo(run / "onnx" / name)

        def to_folder(run: Path, rng: random.Random, name: str = name) -> None:
            (run / "onnx" / name).unlink()
            (run / "onnx" / name).mkdir()

        def to_zeros(run: Path, rng: random.Random, name: str = name) -> None:
            (run / "onnx" / name).unlink()
            (run / "onnx" / name).symlink_to("/dev/zero")

        found |= {f"{name} empty": replaced, f"{name} a pipe": to_pipe, f"{name} a folder": to_folder}
        found[f"{name} links to zeros"] = to_zeros
    return found | references()


def references() -> dict[str, Mutate]:
    """Reference tensors of other kinds."""
    tensors: dict[str, Any] = {
        "NaN": np.full((1, 3, 16, 16), np.nan, np.float32),
        "other shape": np.zeros((1, 3, 8, 8), np.float32),
        "no batch": np.zeros((3, 16, 16), np.float32),
        "empty batch": np.zeros((0, 3, 16, 16), np.float32),
        "integers": np.zeros((1, 3, 16, 16), np.int64),
        "float64": np.zeros((1, 3, 16, 16), np.float64),
        "words": np.array(["a"], dtype=object),
        "scalar": np.zeros((), np.float32),
        "zeros": np.zeros((1, 3, 16, 16), np.float32),
    }
    made: dict[str, Mutate] = {}
    for place in ("input_0.pb", "output_0.pb"):
        for name, array in tensors.items():

            def make(run: Path, rng: random.Random, place: str = place, array: Any = array) -> None:
                tensor = numpy_helper.from_array(array, "input" if place.startswith("in") else "logits")
                (run / "onnx" / "test_data_set_0" / place).write_bytes(tensor.SerializeToString())

            made[f"reference {place} {name}"] = make
        for dims in DIMS:

            def lie(run: Path, rng: random.Random, place: str = place, dims: tuple[int, ...] = dims) -> None:
                path = run / "onnx" / "test_data_set_0" / place
                tensor = onnx.TensorProto.FromString(path.read_bytes())
                del tensor.dims[:]
                tensor.dims.extend(dims)
                path.write_bytes(tensor.SerializeToString())

            made[f"reference {place} dims {dims}"] = lie
    return made
