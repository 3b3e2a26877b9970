"""Are the file's weights the model's, bit for bit, and its constants those of the formulas?"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx
from torch import nn

from growkit.deploy.checks import Check, check
from growkit.deploy.form import Form
from growkit.deploy.pixels import CUBIC
from growkit.deploy.stored_weights import explain, stored_in, tensors_in
from growkit.deploy.truth import preprocessing
from growkit.text import some


def weight_checks(proto: onnx.ModelProto, model: nn.Module, form: Form) -> list[Check]:
    """Check that every stored tensor is the model's and none of the model's is missing, exactly in any precision."""
    return _whole(proto, model, form) if form.precision == "fp32" else _lowered(proto, model, form)


def _whole(proto: onnx.ModelProto, model: nn.Module, form: Form) -> list[Check]:
    """Compare bit for bit, both ways: nothing of the model missing, nothing in the file unexplained.

    This catches a single weight that is off by 1 %, whose effect drowns in float32 noise.
    """
    state = {name: t.numpy() for name, t in model.state_dict().items()}
    state = {name: a for name, a in state.items() if a.dtype.kind == "f"}
    # masks and index tables that a checkpoint does not hold but the network does
    buffers = {name: b.numpy() for name, b in model.named_buffers() if name not in state}
    by_bits: dict[bytes, str] = {}
    for name, array in (*state.items(), *buffers.items()):
        by_bits.setdefault(_bits(array), name)
        if array.ndim == 2:  # the exporter folds the transpose in front of a MatMul
            by_bits.setdefault(_bits(array.T), name)

    for name, array in _of_pixels(model, form).items():
        by_bits.setdefault(_bits(array), name)

    stored = [(name, array) for name, array in tensors_in(proto) if array.dtype.kind not in "iub"]
    known = _known_constants(model, form)
    found: set[str] = set()
    unexplained, constants = [], []
    for name, array in stored:
        own = state.get(name)
        if own is not None and _bits(array) not in (_bits(own), _bits(own.T)):
            unexplained.append(f"{name}{_where(array, state[name])}")
        elif _bits(array) in by_bits:
            found.add(by_bits[_bits(array)])
        elif array.size == 1:
            if np.float32(array.reshape(())) not in known:
                constants.append(f"{name} = {array.reshape(()):.9g}")
        elif (gathered := _gathered_from(array, state)) is not None:
            found.add(gathered)
        elif form.attention == "contrib" and array.ndim == 1 and not array.any():
            pass  # the operator needs a bias where the model has none; a lost bias is reported as missing
        else:
            unexplained.append(f"{name} {array.dtype} {list(array.shape)}")
    # equal tensors are stored once: what counts is that the bits are there
    found_bits = {_bits(state[name]) for name in found if name in state}
    missing = [n for n, a in state.items() if n not in found and _bits(a) not in found_bits]
    # the exporter leaves out a bias that is all zeros
    missing = [n for n in missing if state[n].ndim != 1 or state[n].any()]

    return _told(missing, unexplained, [*constants, *_odd_attributes(proto, model, known)], len(state), len(stored))


def _lowered(proto: onnx.ModelProto, model: nn.Module, form: Form) -> list[Check]:
    """Compare exactly, as rounding has one right answer: float16 and bfloat16 bit for bit, int8 by channel scale."""
    tensors = dict(model.state_dict()) | dict(model.named_buffers())
    state = {name: t.numpy() for name, t in tensors.items() if t.is_floating_point()}
    wanted = {name for name in model.state_dict() if name in state}
    state |= _of_pixels(model, form)
    known = _known_constants(model, form)
    found: set[str] = set()
    unexplained, constants = [], []
    stored = stored_in(proto)
    for one in stored:
        if (own := explain(one, state) or explain(replace(one, array=_once(one.array)), state)) is not None:
            found.add(own)
        elif one.array.size == 1:
            value = float(one.array.reshape(()))
            low = one.array.dtype
            if low.kind in "iu" or value not in {float(constant.astype(low)) for constant in known}:
                constants.append(f"{one.name} = {value:.9g}")
        else:
            unexplained.append(f"{one.name} {one.array.dtype} {list(one.array.shape)}")
    same = {_bits(state[name]) for name in found}
    missing = [n for n in wanted if n not in found and _bits(state[n]) not in same]
    # tensors that rounding makes equal are stored once as well
    missing = [n for n in missing if not any(explain(one, {n: state[n]}) for one in stored)]
    missing = sorted(n for n in missing if state[n].ndim != 1 or state[n].any())
    return _told(missing, unexplained, [*constants, *_odd_attributes(proto, model, known)], len(wanted), len(stored))


def _of_pixels(model: nn.Module, form: Form) -> dict[str, np.ndarray]:
    """Return what a file that takes pixels holds besides: mean and standard deviation, under names of their own."""
    if not form.pixels:
        return {}
    prepared = preprocessing(model)
    return {f"preprocessing {n}": np.asarray(getattr(prepared, n), dtype=np.float32) for n in ("mean", "std")}


def _once(array: np.ndarray) -> np.ndarray:
    """Return one of equal rows: with a fixed batch size the class token is stored once per image."""
    repeated = array.ndim > 1 and array[:1].tobytes() * len(array) == array.tobytes()
    return array[:1] if repeated else array


def _odd_attributes(proto: onnx.ModelProto, model: nn.Module, known: set[np.float32]) -> list[str]:
    tanh = [f"Gelu {n.name} by tanh" for n in proto.graph.node for a in n.attribute if a.s == b"tanh"]
    return ([] if _tanh_gelu(model) else tanh) + [
        f"{node.op_type} {node.name}: {a.name} = {a.f:.9g}"
        for node in proto.graph.node
        for a in node.attribute
        if a.type == onnx.AttributeProto.FLOAT and np.float32(a.f) not in known
    ]


def _told(missing: list[str], unexplained: list[str], constants: list[str], own: int, stored: int) -> list[Check]:
    def none_of(name: str, culprits: list[str], told: str) -> Check:
        line = f"{name}: {told}" if not culprits else f"{name}: {some(culprits)}"
        return check("weights", name, not culprits, len(culprits), 0, line)

    return [
        none_of("missing from the file", missing, f"none of {own} tensors, bit for bit"),
        none_of("not the model's", unexplained, f"none of {stored} stored tensors"),
        none_of("unknown constants", constants, "none; every scale and epsilon is the model's"),
    ]


def _bits(array: np.ndarray) -> bytes:
    # reshaping keeps the bits in order, so the shape is not part of the key
    bits = hashlib.sha256(np.ascontiguousarray(array).data)
    return array.dtype.str.encode() + bits.digest()


def _where(array: np.ndarray, wanted: np.ndarray) -> str:
    if array.size != wanted.size:
        return f" has shape {list(array.shape)}, the model's {list(wanted.shape)}"
    a, b = array.reshape(-1), wanted.reshape(-1)
    differing = np.flatnonzero(a != b)
    if not differing.size:
        return f" is {array.dtype}, the model's {wanted.dtype}"
    first = differing[0]
    return f" differs in {differing.size} of {a.size} values, first {a[first]:.9g} for {b[first]:.9g}"


def _gathered_from(array: np.ndarray, state: Mapping[str, np.ndarray]) -> str | None:
    """Return the tensor whose values `array` repeats: Swin's table of positions, gathered at export."""
    values = np.unique(array)
    for name, candidate in state.items():
        repeats = array.size > candidate.size > 1 and candidate.dtype == array.dtype
        if repeats and np.array_equal(values, np.unique(candidate)):
            return name
    return None


def _tanh_gelu(model: nn.Module) -> bool:
    """Whether some activation of the model is the tanh approximation of GELU; below float32 its error is noise."""
    names = ("gelutanh", "newgelu", "fastgelu")
    return any(
        getattr(m, "approximate", None) == "tanh" or any(name in type(m).__name__.lower() for name in names)
        for m in model.modules()
    )


def _known_constants(model: nn.Module, form: Form) -> set[np.float32]:
    """Return the numbers a file may hold besides weights: those of the operators' formulas, and every float
    that a module carries (scale, eps), with its square root, by which fused attention scales q and k.
    """
    formulas = {0.0, 0.5, 1.0, 2.0, math.sqrt(2), math.sqrt(0.5), -math.inf}
    formulas |= {math.sqrt(2 / math.pi), 0.044715} if _tanh_gelu(model) else set()
    formulas |= {1.702} if any("quickgelu" in type(m).__name__.lower() for m in model.modules()) else set()
    carried = {v for m in model.modules() for v in vars(m).values() if type(v) is float}
    carried |= {math.sqrt(v) for v in carried if v > 0}
    pixels = {255.0, CUBIC} if form.pixels else set()
    return {np.float32(v) for v in formulas | carried | pixels}
