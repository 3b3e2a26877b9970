"""Is every weight in a file of lower precision the model's? The check is exact: rounding has one right answer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from growkit.deploy.sixteen_bits import rounded_to

HALF_STEP = 0.5001  # of a quantisation step; float32 division may tip a tie over


@dataclass(frozen=True)
class Stored:
    """A tensor as the file holds it.

    array  float32, float16, bfloat16 or int8
    scale  of int8: one step per channel, broadcastable to `array`; None if the graph has none, or anything but one
           scale per output channel with zero point 0
    """

    name: str
    array: np.ndarray
    scale: np.ndarray | None = None


def tensors_in(proto: onnx.ModelProto) -> list[tuple[str, np.ndarray]]:
    """Return every tensor stored in the graph with its name; one in a node's attribute is named after its output."""
    found = [(tensor.name, numpy_helper.to_array(tensor)) for tensor in proto.graph.initializer]
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                found.append((node.output[0], numpy_helper.to_array(attribute.t)))
    return found


def stored_in(proto: onnx.ModelProto) -> tuple[Stored, ...]:
    """Return every tensor of weights, int8 ones with the scales that the graph multiplies them by.

    Left out are integers, such as shapes, and the scale and zero point of an activation that is quantised and at once
    dequantised by the same two.
    """
    weights = dict(tensors_in(proto))
    graph = _Graph(proto, weights)
    scales: dict[str, np.ndarray | None] = {}
    for name, scale in graph.scales():
        first = scales.setdefault(name, scale)
        if first is None or scale is None or not np.array_equal(first, scale):
            scales[name] = None
    used = graph.explained_by_use()
    found = []
    for name, array in weights.items():
        if array.dtype.kind in "iub" and array.dtype not in (np.int8, np.uint8):
            continue
        if name not in used:
            found.append(Stored(name, array, scales.get(name)))
    return tuple(found)


def explain(found: Stored, candidates: Mapping[str, np.ndarray]) -> str | None:
    """Return the name of the float32 candidate that `found` holds, in its shape or transposed; None if there is none.

    float32 must be equal bit for bit; float16 and bfloat16 must be the nearest value, bit for bit; int8 must have the
    scale that each channel's largest value requires, and every weight within half a step.
    """
    same = _quantised if found.array.dtype == np.int8 else _rounded
    for name, candidate in candidates.items():
        for own in (candidate, candidate.T) if candidate.ndim == 2 else (candidate,):
            if same(found, own):
                return name
    return None


def _rounded(found: Stored, own: np.ndarray) -> bool:
    array = found.array
    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    if array.size != own.size or array.dtype.kind not in "fV":
        return False
    # the first few rule out nearly all candidates without copying a transpose
    if not np.array_equal(_bits(array.flat[:8]), _bits(rounded_to(own.flat[:8], kind))):
        return False
    return np.array_equal(_bits(array.reshape(-1)), _bits(rounded_to(own.reshape(-1), kind)))


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.dtype.itemsize}")


def _quantised(found: Stored, own: np.ndarray) -> bool:
    if found.scale is None or found.array.shape != own.shape:
        return False
    channel = tuple(axis for axis, size in enumerate(found.scale.shape) if size == 1)
    largest = np.abs(own).max(axis=channel, keepdims=True)
    step = np.where(largest > 0, largest / np.float32(127), np.float32(1))  # a channel of zeros has no scale of its own
    if not np.allclose(found.scale, step, rtol=1e-6, atol=0):
        return False
    return bool((np.abs(found.array * found.scale - own) <= HALF_STEP * found.scale).all())


class _Graph:
    """Which nodes make and read a tensor."""

    def __init__(self, proto: onnx.ModelProto, weights: Mapping[str, np.ndarray]):
        self.nodes = list(proto.graph.node)
        self.weights = weights
        self.maker = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def scales(self) -> Iterator[tuple[str, np.ndarray | None]]:
        """Yield (name of an int8 weight, its scales, or None where the graph is not as it should be)."""
        for node in self.nodes:
            if node.op_type == "DequantizeLinear" and node.input[0] in self.weights:
                axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
                yield node.input[0], self._shaped(node.input[0], node.input[1], node.input[2], axis)
            elif node.op_type == "MatMulInteger":
                found = self._scale_of_product(node)
                yield node.input[1], self._shaped(node.input[1], found, node.input[3], 1) if found else None

    def explained_by_use(self) -> set[str]:
        """Return the tensors that are not weights: scales and zero points of int8 weights, and of activations."""
        used: set[str] = set()
        for node in self.nodes:
            if node.op_type == "DequantizeLinear" and node.input[0] in self.weights:
                used |= set(node.input[1:])
            elif node.op_type == "MatMulInteger":
                used |= {node.input[3], self._scale_of_product(node) or ""}
            elif node.op_type == "QuantizeLinear":
                back = self.readers.get(node.output[0], [])
                if back and all(b.op_type == "DequantizeLinear" and b.input[1:] == node.input[1:] for b in back):
                    used |= set(node.input[1:])
        return used

    def _shaped(self, weight: str, scale: str, zero: str, axis: int) -> np.ndarray | None:
        array, steps, zeros = self.weights[weight], self.weights.get(scale), self.weights.get(zero)
        if steps is None or zeros is None or zeros.any() or zeros.dtype != np.int8:
            return None
        if array.ndim != 2 or axis not in (0, 1) or steps.shape != (array.shape[axis],):
            return None
        return steps[:, None] if axis == 0 else steps[None, :]

    def _scale_of_product(self, product: onnx.NodeProto) -> str | None:
        """Find the weight's scale of x @ w in int8, through Cast and both multiplications."""
        quantised = self.maker.get(product.input[0])
        if quantised is None or quantised.op_type != "DynamicQuantizeLinear":
            return None
        if product.input[2] != quantised.output[2]:
            return None
        cast = self._only_reader(product.output[0], "Cast")
        scaled = self._only_reader(cast.output[0], "Mul") if cast else None
        if cast is None or scaled is None:
            return None
        other = next((name for name in scaled.input if name != cast.output[0]), "")
        both = self.maker.get(other)
        if both is None or both.op_type != "Mul" or quantised.output[1] not in both.input:
            return None
        return next((name for name in both.input if name in self.weights), None)

    def _only_reader(self, name: str, op_type: str) -> onnx.NodeProto | None:
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and readers[0].op_type == op_type else None
