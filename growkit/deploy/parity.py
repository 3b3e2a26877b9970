"""Does the ONNX file answer like the PyTorch model? In structure, weights, numbers, predictions.

Numbers are held against the model in float64: PyTorch's float32 is itself only close to it.
Every mismatch is collected; the verdict comes last.
"""

import copy
import dataclasses
import hashlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from torch import Tensor, nn

from growkit.deploy.checks import Check, check
from growkit.deploy.export import IR, OPSET
from growkit.deploy.reference import (
    logits_of,
    noise_images,
    preprocessing,
    read_reference,
    truth_of,
)
from growkit.deploy.runtime import Session, open_session
from growkit.errors import GrowkitError, ParityError

RELATIVE_RMS = 1e-5  # 13 x float32 noise of DeiT-S, a third of the smallest defect tried
LARGEST = 1e-4  # largest difference, in standard deviations of the logits
NOISE_RATIO = 3.0  # error of the file / PyTorch's own float32 error, both against float64
INVARIANCE = 1e-6  # the same image in another batch
IMAGES = 8  # at 224 x 224; small images come cheaper and steady the noise ratio


@dataclass(frozen=True)
class Parity:
    """Every check that was made, and the figures behind them."""

    checks: tuple[Check, ...]
    figures: dict[str, Any]
    provider: str

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that said no."""
        return tuple(c for c in self.checks if c.verdict == "fail")

    @property
    def passed(self) -> bool:
        """No check said no."""
        return not self.failed

    def require(self) -> None:
        """Raise ParityError naming every check that said no."""
        if self.failed:
            raise ParityError("; ".join(c.line for c in self.failed))


def check_parity(
    model: nn.Module,
    file: Path,
    *,
    provider: str = "cpu",
    max_batch: int = 8,
    seed: int = 0,
    weights_sha256: str | None = None,
    labels: list[str] | None = None,
    reference: Path | None = None,
    data: Iterable[tuple[Tensor, Tensor]] | None = None,
) -> Parity:
    """Hold the finished ONNX `file` against the float32 `model` that it was exported from.

    max_batch       largest batch size tried, beside 1, 2 and 5
    weights_sha256  SHA-256 of the model's weight file; must be the one the file was exported from
    labels          class names that the file's metadata must hold
    reference       folder with test_data_set_*, written by the export
    data            labelled batches, images (B, C, H, W) and classes (B,), for accuracy

    Raises:
        GrowkitError: the file is missing, the provider does not run, the reference is unreadable.
    """
    if not file.is_file():
        raise GrowkitError(f"{file}: no such file; `growkit export --onnx` writes it")
    if max_batch < 1:
        raise GrowkitError(f"--max-batch {max_batch}: expected 1 or more")
    prepared = preprocessing(model)
    plain = copy.deepcopy(model).cpu().eval()
    truth = truth_of(plain)
    _, height, width = prepared.input_size
    count = min(8 * IMAGES, max(IMAGES, IMAGES * 224 * 224 // (height * width)))
    images = noise_images(prepared, max(count, max_batch), seed)
    expected = logits_of(truth, images)

    try:
        proto = onnx.load_model_from_string(file.read_bytes())
        onnx.checker.check_model(str(file), full_check=True)
        session = open_session(file, provider=provider)
    except GrowkitError:
        raise
    except Exception as error:  # the checker, protobuf and ONNX Runtime each have their own kinds
        broken = check("structure", "valid ONNX", False, "refused", "accepted", _first_line(error))
        return Parity((broken,), {}, "none")

    classes = expected.shape[1]
    checks = [
        check("structure", "valid ONNX", True, "accepted", "accepted"),
        *_structure(proto, prepared.input_size, classes),
        *_metadata(proto, dataclasses.asdict(prepared), weights_sha256, labels),
        *_weights(proto, plain),
    ]
    batches = sorted({1, 2, 5, max_batch})
    outcome = _Outcome(images, expected, logits_of(plain, images), batches)
    numbers, figures = outcome.judge(session)
    if any(c.verdict == "fail" and c.group == "numbers" for c in numbers):
        figures["diagnosis"] = outcome.diagnose(file, session)
        numbers.append(check("numbers", "where it comes from", False, "see line", "-", figures["diagnosis"]))
    checks += numbers
    if reference is not None:
        checks += _reference(session, plain, reference)
    if data is not None:
        more, figures["accuracy"] = _accuracy(session, plain, data)
        checks += more
    return Parity(tuple(checks), figures, session.provider)


# structure ------------------------------------------------------------------------------------


def _structure(proto: onnx.ModelProto, input_size: tuple[int, int, int], classes: int) -> list[Check]:
    opsets = {o.domain or "ai.onnx": o.version for o in proto.opset_import}
    used = {n.domain or "ai.onnx" for n in proto.graph.node}
    weights = {i.name for i in proto.graph.initializer}
    inputs = [_signature(v) for v in proto.graph.input if v.name not in weights]
    outputs = [_signature(v) for v in proto.graph.output]
    channels, height, width = input_size
    outside = sum(t.data_location == onnx.TensorProto.EXTERNAL for t in proto.graph.initializer)
    leaks = _leaks(proto)

    def exactly(name: str, got: list[str] | int | None, wanted: list[str] | int) -> Check:
        said, expected = ((", ".join(v) or "none") if isinstance(v, list) else str(v) for v in (got, wanted))
        line = f"{name}: {said}" + ("" if got == wanted else f", expected {expected}")
        return check("structure", name, got == wanted, said, expected, line)

    return [
        exactly("input", inputs, [f"input: float32 batch x {channels} x {height} x {width}"]),
        exactly("output", outputs, [f"logits: float32 batch x {classes}"]),
        exactly("opset", opsets.get("ai.onnx"), OPSET),
        exactly("IR version", proto.ir_version, IR),
        exactly("operator domains", sorted(used), ["ai.onnx"]),
        exactly("weights outside the file", outside, 0),
        exactly("paths of the exporting machine", leaks, []),
    ]


def _signature(value: onnx.ValueInfoProto) -> str:
    """'name: dtype d0 x d1'; every symbolic first dimension reads 'batch'."""
    tensor = value.type.tensor_type
    dims = [
        str(d.dim_value) if d.HasField("dim_value") else ("batch" if index == 0 else "?")
        for index, d in enumerate(tensor.shape.dim)
    ]
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
    return f"{value.name}: {dtype} {' x '.join(dims)}"


def _leaks(proto: onnx.ModelProto) -> list[str]:
    # without the weights: three bytes such as '.py' occur in them by chance
    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    for tensor in bare.graph.initializer:
        tensor.ClearField("raw_data")
    data = bare.SerializeToString()
    folders = {str(Path.home()), os.getcwd(), tempfile.gettempdir(), sys.prefix}
    needles = ["site-packages", ".py", *sorted(f + os.sep for f in folders if len(f) > 1)]
    return [needle for needle in needles if needle.encode() in data]


def _metadata(
    proto: onnx.ModelProto,
    prepared: Mapping[str, Any],
    weights_sha256: str | None,
    labels: list[str] | None,
) -> list[Check]:
    props = {p.key: p.value for p in proto.metadata_props}
    stored = _json(props.get("preprocessing"))
    wanted = json.loads(json.dumps(prepared))
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
        provenance = _json(props.get("growkit.provenance"))
        found = provenance.get("weights_sha256") if isinstance(provenance, dict) else None
        same = found == weights_sha256
        line = f"exported from weights {_short(found)}" + (
            "" if same else f", but this model's are {_short(weights_sha256)}: export it again"
        )
        checks.append(check("structure", "exported from this model", same, str(found), weights_sha256, line))
    if labels is not None:
        found = _json(props.get("labels"))
        same = found == labels
        line = "class names in the file are " + ("the model's" if same else "not the model's")
        checks.append(check("structure", "labels", same, str(found), str(labels), line))
    return checks


def _json(text: str | None) -> Any:
    try:
        return json.loads(text) if text is not None else None
    except ValueError:
        return text


def _short(sha256: str | None) -> str:
    return sha256[:12] if sha256 else "unknown"


# weights --------------------------------------------------------------------------------------


def _weights(proto: onnx.ModelProto, model: nn.Module) -> list[Check]:
    """Bit for bit, both ways: nothing of the model missing, nothing in the file unexplained.

    This is what sees a single weight off by 1 %, which drowns in float32 noise.
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

    stored = [(t.name, numpy_helper.to_array(t)) for t in proto.graph.initializer]
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                stored.append((node.output[0], numpy_helper.to_array(attribute.t)))
    stored = [(name, a) for name, a in stored if a.dtype.kind not in "iub"]

    known = _known_constants(model)
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
        else:
            unexplained.append(f"{name} {array.dtype} {list(array.shape)}")
    # equal tensors are stored once: what counts is that the bits are there
    found_bits = {_bits(state[name]) for name in found if name in state}
    missing = [n for n, a in state.items() if n not in found and _bits(a) not in found_bits]
    # the exporter leaves a bias out that is all zeros
    missing = [n for n in missing if state[n].ndim != 1 or state[n].any()]

    for node in proto.graph.node:
        constants += [
            f"{node.op_type} {node.name}: {a.name} = {a.f:.9g}"
            for a in node.attribute
            if a.type == onnx.AttributeProto.FLOAT and np.float32(a.f) not in known
        ]

    def none_of(name: str, culprits: list[str], told: str) -> Check:
        line = f"{name}: {told}" if not culprits else f"{name}: {_listed(culprits)}"
        return check("weights", name, not culprits, len(culprits), 0, line)

    return [
        none_of("missing from the file", missing, f"none of {len(state)} tensors, bit for bit"),
        none_of("not the model's", unexplained, f"none of {len(stored)} stored tensors"),
        none_of("unknown constants", constants, "none; every scale and epsilon is the model's"),
    ]


def _bits(array: np.ndarray) -> bytes:
    # reshaping keeps the bits in order, so the shape is not part of the key
    bits = hashlib.sha256(np.ascontiguousarray(array).data)
    return array.dtype.str.encode() + bits.digest()


def _listed(names: list[str]) -> str:
    """The first three names and how many more there are."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


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
    """The tensor whose values `array` repeats: Swin's table of positions, looked up ahead."""
    values = np.unique(array)
    for name, candidate in state.items():
        repeats = array.size > candidate.size > 1 and candidate.dtype == array.dtype
        if repeats and np.array_equal(values, np.unique(candidate)):
            return name
    return None


def _known_constants(model: nn.Module) -> set[np.float32]:
    """Numbers a file may hold beside weights: those of the operators' formulas, and every float
    that a module carries (scale, eps), with its square root: fused attention scales q and k by it.
    """
    formulas = {0.0, 0.5, 1.0, 2.0, math.sqrt(2), math.sqrt(0.5), -math.inf}
    formulas |= {math.sqrt(2 / math.pi), 0.044715, 1.702}  # tanh and quick GELU
    carried = {v for m in model.modules() for v in vars(m).values() if type(v) is float}
    carried |= {math.sqrt(v) for v in carried if v > 0}
    return {np.float32(v) for v in formulas | carried}


# numbers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Outcome:
    """What the model says to the images: in float64, in float32, and the batch sizes to try."""

    images: np.ndarray
    expected: np.ndarray
    plain: np.ndarray
    batches: list[int]

    def judge(self, session: Session) -> tuple[list[Check], dict[str, Any]]:
        """Run every batch size; checks of the groups numbers and predictions, and the figures."""
        spread = float(self.expected.std())
        checks: list[Check] = []
        per_batch: dict[str, Any] = {}
        got: dict[int, np.ndarray] = {}
        for batch in self.batches:
            try:
                got[batch] = self._run(session, batch)
            except Exception as error:  # ONNX Runtime has its own kinds; the batch is what counts
                line = f"batch {batch}: {_first_line(error)}"
                checks.append(check("numbers", f"batch {batch}: runs", False, "refused", "ok", line))
                continue
            made, figures = self._compare(got[batch], batch, spread)
            checks += made
            per_batch[str(batch)] = figures
        pooled = [(got[b], self.expected[: len(got[b])], self.plain[: len(got[b])]) for b in got]
        if pooled:
            off = _rms(np.concatenate([(g - e).ravel() for g, e, _ in pooled]))
            own = _rms(np.concatenate([(p - e).ravel() for _, e, p in pooled]))
            ratio = off / own if own > 0 else (1.0 if off == 0 else math.inf)
            checks.append(check("numbers", "error / PyTorch's own", ratio <= NOISE_RATIO, ratio, NOISE_RATIO))
            if 1 in got:
                checks += [self._invariant(got[1], got[b], b, spread) for b in got if b > 1]
            made, predictions = _predictions(
                np.concatenate([g for g, _, _ in pooled]),
                np.concatenate([e for _, e, _ in pooled]),
                "predictions",
            )
            checks += made
            overall = {"noise_ratio": ratio, "torch_relative_rms": _relative(own, spread)}
        else:
            overall, predictions = {}, {}
        return checks, {
            "images": len(self.images),
            "logits_std": spread,
            "batches": per_batch,
            **overall,
            "predictions": predictions,
        }

    def _run(self, session: Session, batch: int) -> np.ndarray:
        if batch == 1:
            return np.concatenate([session.run(image[None]) for image in self.images])
        return session.run(self.images[:batch])

    def _compare(self, got: np.ndarray, batch: int, spread: float) -> tuple[list[Check], dict[str, Any]]:
        wanted = self.expected[: batch if batch > 1 else len(self.images)]
        if got.shape != wanted.shape:
            line = f"batch {batch}: logits {got.shape}, expected {wanted.shape}"
            shape = check("numbers", f"batch {batch}: shape", False, str(got.shape), str(wanted.shape), line)
            return [shape], {}
        difference = got.astype(np.float64) - wanted
        finite = bool(np.isfinite(got).all())
        relative = _relative(_rms(difference), spread)
        largest = _relative(float(np.abs(difference).max()), spread)
        word = "yes" if finite else "no"
        return [
            check("numbers", f"batch {batch}: finite", finite, word, "yes"),
            # `not >` would let NaN pass
            check(
                "numbers",
                f"batch {batch}: relative RMS error",
                relative <= RELATIVE_RMS,
                relative,
                RELATIVE_RMS,
            ),
            check(
                "numbers",
                f"batch {batch}: largest error / std",
                largest <= LARGEST,
                largest,
                LARGEST,
            ),
        ], {
            "relative_rms": relative,
            "largest_over_std": largest,
            "largest": float(np.abs(difference).max()),
        }

    def _invariant(self, alone: np.ndarray, got: np.ndarray, batch: int, spread: float) -> Check:
        name = f"batch {batch}: same as one by one"
        if got.shape != alone[:batch].shape:
            return check("numbers", name, False, str(got.shape), str(alone[:batch].shape))
        moved = _relative(_rms(got.astype(np.float64) - alone[:batch]), spread)
        return check("numbers", name, moved <= INVARIANCE, moved, INVARIANCE)

    def diagnose(self, file: Path, session: Session) -> str:
        """Is it ONNX Runtime's graph optimiser, or the export?"""
        try:
            bare = open_session(file, provider=session.provider, optimise=False)
            checks, _ = self.judge(bare)
        except GrowkitError as error:
            return f"not found: without graph optimisation the file does not open ({error})"
        if any(c.verdict == "fail" and c.group == "numbers" for c in checks):
            return "an export bug: the errors stay with ONNX Runtime's graph optimisation off"
        return "an optimiser bug: with ONNX Runtime's graph optimisation off the numbers are right"


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def _relative(value: float, spread: float) -> float:
    if spread > 0:
        return value / spread
    return 0.0 if value == 0 else math.inf


def _predictions(got: np.ndarray, expected: np.ndarray, group: str) -> tuple[list[Check], dict[str, Any]]:
    """No certified prediction may change.

    Certified: the winner leads by more than twice the largest difference, so that no difference of
    that size can change it. A difference above its own limit does not stretch the certificate.
    """
    if got.shape != expected.shape or got.shape[1] < 2:
        return [], {}
    difference = np.abs(got.astype(np.float64) - expected)
    largest = np.nanmax(difference, initial=0.0)
    bound = min(float(largest), LARGEST * float(expected.std()))
    top = np.sort(expected, axis=1)
    certified = top[:, -1] - top[:, -2] > 2 * bound
    changed = got.argmax(axis=1) != expected.argmax(axis=1)
    broken = int((changed & certified).sum())
    line = (
        f"{broken} of {int(certified.sum())} certified predictions changed "
        f"({int(changed.sum())} of {len(changed)} in all)"
    )
    return [check(group, "certified predictions changed", broken == 0, broken, 0, line)], {
        "samples": len(changed),
        "certified": int(certified.sum()),
        "changed": int(changed.sum()),
        "certified_changed": broken,
        "largest_difference": float(largest),
    }


# reference data and accuracy -------------------------------------------------------------------


def _reference(session: Session, model: nn.Module, folder: Path) -> list[Check]:
    """Both the file and the model must give the stored logits."""
    checks = []
    for name, images, wanted in read_reference(folder):
        spread = float(wanted.std())
        for side, run in (("file", session.run), ("model", lambda x: logits_of(model, x))):
            label = f"{name}: {side}"
            try:
                got = run(images)
            except Exception as error:  # a reference of another model does not even fit
                line = f"{label} refuses the stored input: {_first_line(error)}"
                checks.append(check("reference", label, False, "refused", "ok", line))
                continue
            if got.shape != wanted.shape:
                checks.append(check("reference", label, False, str(got.shape), str(wanted.shape)))
                continue
            error_size = _relative(_rms(got.astype(np.float64) - wanted), spread)
            checks.append(check("reference", label, error_size <= RELATIVE_RMS, error_size, RELATIVE_RMS))
    return checks


def _accuracy(
    session: Session, model: nn.Module, data: Iterable[tuple[Tensor, Tensor]]
) -> tuple[list[Check], dict[str, Any]]:
    """Top-1 and top-5 of both on identical tensors, and what became of each sample."""
    got_parts, plain_parts, label_parts = [], [], []
    for images, classes in data:
        batch = np.ascontiguousarray(images.cpu().numpy(), dtype=np.float32)
        got_parts.append(session.run(batch))
        plain_parts.append(logits_of(model, batch))
        label_parts.append(classes.cpu().numpy())
    if not got_parts:
        raise GrowkitError("the data set holds no labelled sample; check --data")
    got, plain = np.concatenate(got_parts), np.concatenate(plain_parts)
    truth = np.concatenate(label_parts)
    spread = float(plain.std())
    relative = _relative(_rms(got.astype(np.float64) - plain), spread)
    largest = _relative(float(np.abs(got - plain).max()), spread)
    right, plain_right = _hits(got, truth, 1), _hits(plain, truth, 1)
    lost, won = int((plain_right & ~right).sum()), int((right & ~plain_right).sum())
    figures: dict[str, Any] = {
        "samples": len(truth),
        "top1": float(right.mean()),
        "torch_top1": float(plain_right.mean()),
        "top5": float(_hits(got, truth, 5).mean()),
        "torch_top5": float(_hits(plain, truth, 5).mean()),
        "n01": won,
        "n10": lost,
        "mcnemar_p": mcnemar_p(won, lost),
        "relative_rms": relative,
        "largest_over_std": largest,
    }
    made, figures["predictions"] = _predictions(got, plain, "accuracy")
    summary = (
        f"top-1 {figures['top1']:.4f} against PyTorch's {figures['torch_top1']:.4f} on "
        f"{len(truth)} samples; {won} won, {lost} lost, McNemar p = {figures['mcnemar_p']:.3g}"
    )
    return [
        *(dataclasses.replace(c, line=f"{summary}; {c.line}") for c in made),
        check("accuracy", "relative RMS difference", relative <= RELATIVE_RMS, relative, RELATIVE_RMS),
        check("accuracy", "largest difference / std", largest <= LARGEST, largest, LARGEST),
    ], figures


def _hits(logits: np.ndarray, classes: np.ndarray, k: int) -> np.ndarray:
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return np.asarray((best == classes[:, None]).any(axis=1))


def mcnemar_p(n01: int, n10: int) -> float:
    """Exact two-sided p of McNemar's test on the discordant pairs; 1 when there are none."""
    n = n01 + n10
    tail = sum(math.comb(n, k) for k in range(min(n01, n10) + 1))
    return min(1.0, 2 * tail / 2**n)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
