"""Golden references: what a model or an ONNX file answered when it was last known to be right.

reference.json  test_data_set_0/  test_data_set_1/

The folder is meant to be committed. Its data sets are in ONNX's own format, so the tools of the runtimes read them too.
A reference holds whatever it is held against to the answers, to the weights bit for bit, and to the preprocessing.
"""

import copy
import functools
import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from growkit import __version__
from growkit.deploy.bounded import bound_of, memory_bounded
from growkit.deploy.checks import Check, check
from growkit.deploy.form import form_of
from growkit.deploy.numbers import in_batches, relative, rms
from growkit.deploy.parts import core_session
from growkit.deploy.reference import Preprocessing, logits_of, noise_images, preprocessing, truth_of
from growkit.deploy.runtime import open_session
from growkit.deploy.store import files_of, json_in, props_of, read_graph, sha256_of_files
from growkit.errors import GrowkitError, first_line
from growkit.files import read_json, whole_folder, write_json
from growkit.record import versions

SCHEMA = 1
FILE, INPUT, OUTPUT = "reference.json", "input_0.pb", "output_0.pb"
DATA_SET = re.compile(r"test_data_set_\d+")
LARGEST = 2**31 - 1  # bytes of one protobuf message
# Relative RMS difference of the logits. One float32 rounding of its input moves an int8 file by up to 0.034.
TOLERANCE = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 3e-2, "int8": 1e-1}
CERTAIN = 2 * 10  # a winner that leads by this many tolerances must stay: none may move by over ten
QUANTISED = {"QuantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearMatMul", "ConvInteger", "QLinearConv"}
UPDATE = "`growkit verify --update-reference`"


@dataclass(frozen=True)
class DataSet:
    """images (B, C, H, W) and logits (B, classes), both float32."""

    name: str
    images: np.ndarray = field(repr=False)
    logits: np.ndarray = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a reference was written for, and what is held against one.

    of              'model' or 'onnx'
    precision       fp32, fp16, bf16 or int8
    preprocessing   what a server does to an image; empty where the model does not say
    tensors_sha256  of the weights by name, whatever file they lie in; of a float32 model
    weights_sha256  of the file that holds the model's weights; an ONNX file knows the one it was exported from
    """

    of: Literal["model", "onnx"]
    precision: str
    architecture: str | None = None
    preprocessing: dict[str, Any] = field(default_factory=dict)
    tensors_sha256: str | None = None
    weights_sha256: str | None = None
    onnx_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model or an ONNX file that answers.

    run       images (B, C, H, W) float32 -> logits (B, classes)
    answers   the same as a reference stores it: a model's float64 truth, what a file itself says
    provider  where ONNX Runtime runs a file, 'cpu' or 'cuda'
    """

    identity: Identity
    run: Callable[[np.ndarray], np.ndarray]
    answers: Callable[[np.ndarray], np.ndarray]
    provider: str | None = None
    labels: tuple[str, ...] | None = None  # class names in a file's metadata


@dataclass(frozen=True, kw_only=True)
class Golden:
    """A reference as it lies on disk; `tolerance` is the relative RMS difference it allows."""

    identity: Identity
    tolerance: float
    seed: int
    data_sets: tuple[DataSet, ...]

    @property
    def spread(self) -> float:
        """Standard deviation of all stored logits: differences are told relative to it."""
        return float(np.concatenate([d.logits.ravel() for d in self.data_sets]).std(dtype=np.float64))


# what is held --------------------------------------------------------------------------------


def model_subject(model: nn.Module, *, weights_sha256: str | None = None, architecture: str | None = None) -> Subject:
    """A PyTorch model, in its own precision and place; dropout and the like are off.

    Raises:
        GrowkitError: its weights are of a kind that has no tolerance.
    """
    if any(module.training for module in model.modules()):
        model = copy.deepcopy(model).eval()
    dtype = next(model.parameters()).dtype
    names = {torch.float32: "fp32", torch.float64: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    if dtype not in names:
        raise GrowkitError(f"model has {dtype} weights; expected one of {', '.join(map(str, names))}")
    described = bool(getattr(model, "pretrained_cfg", None))

    @torch.inference_mode()
    def run(images: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(images).to(next(model.parameters()))).double().cpu().numpy()

    @functools.cache
    def truth() -> nn.Module:
        return truth_of(model)

    return Subject(
        identity=Identity(
            of="model",
            precision=names[dtype],
            architecture=architecture,
            preprocessing=_as_json(asdict(preprocessing(model))) if described else {},
            tensors_sha256=tensors_sha256(model) if dtype is torch.float32 else None,
            weights_sha256=weights_sha256,
        ),
        run=run,
        answers=lambda images: logits_of(truth(), images),
    )


def onnx_subject(file: Path, *, provider: str = "cpu") -> Subject:
    """An ONNX file under ONNX Runtime: the network in it, from normalised images to logits, whatever its form.

    Raises whatever ONNX and ONNX Runtime raise when they refuse the file, and
        GrowkitError: no such file, weights that lie elsewhere, or a provider that does not run here.
    """
    if not file.is_file():
        raise GrowkitError(f"{file}: no such file; `growkit export --onnx` writes it")
    proto = read_graph(file, weights=False)
    props = props_of(proto)
    provenance, prepared, form = (
        _object(json_in(props, "growkit.provenance")),
        _object(json_in(props, "preprocessing")),
        form_of(props),
    )
    labels = json_in(props, "labels")
    files = files_of(file)
    bound = bound_of(files)
    with memory_bounded(bound, provider=provider):
        if prepared:
            session = core_session(file, form, Preprocessing(**prepared), "classes", provider=provider)
        else:
            session = open_session(file, provider=provider)

    def run(images: np.ndarray) -> np.ndarray:
        with memory_bounded(bound, images.nbytes, provider=session.provider):
            return in_batches(session, images, form.batch or len(images))

    return Subject(
        identity=Identity(
            of="onnx",
            precision=precision_of(proto),
            architecture=_text(provenance.get("architecture")),
            preprocessing=prepared,
            weights_sha256=_text(provenance.get("weights_sha256")),
            onnx_sha256=sha256_of_files(files),
        ),
        run=run,
        answers=run,
        provider=session.provider,
        labels=tuple(map(str, labels)) if isinstance(labels, list) else None,
    )


def precision_of(proto: onnx.ModelProto) -> str:
    """fp32, fp16, bf16 or int8: the lowest one that the file computes in."""
    kinds = {tensor.data_type for tensor in proto.graph.initializer}
    if QUANTISED & {node.op_type for node in proto.graph.node}:
        return "int8"
    if onnx.TensorProto.BFLOAT16 in kinds:
        return "bf16"
    return "fp16" if onnx.TensorProto.FLOAT16 in kinds else "fp32"


def tensors_sha256(model: nn.Module) -> str:
    """SHA-256 of every weight and buffer by name: the same from whatever file they were loaded."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# writing -------------------------------------------------------------------------------------


def reference_images(prepared: Preprocessing, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A noise image; three more, a black and a white one: (1, C, H, W) and (5, C, H, W) float32, normalised.

    Of 8-bit pixels, as photographs are: so they compress, and a file that takes pixels can be given the same images.
    """
    mean, std = (np.reshape(v, (-1, 1, 1)) for v in (prepared.mean, prepared.std))
    noise = np.rint(np.clip(noise_images(prepared, 4, seed) * std + mean, 0, 1) * 255)
    pixels = np.concatenate([noise, np.zeros_like(noise[:1]), np.full_like(noise[:1], 255)])
    images = ((pixels / 255 - mean) / std).astype(np.float32)
    return images[:1], images[1:]


def make_golden(subject: Subject, *, seed: int) -> Golden:
    """What `subject` answers to seeded images, as a reference in memory.

    Raises:
        GrowkitError: the size of the images is unknown, or an answer is NaN or infinite.
    """
    identity = subject.identity
    if not identity.preprocessing:
        raise GrowkitError(f"the {_word(identity)} does not say its input size, mean and std; set model.pretrained_cfg")
    data_sets = []
    for index, images in enumerate(reference_images(Preprocessing(**identity.preprocessing), seed)):
        data_set = DataSet(f"test_data_set_{index}", images, subject.answers(images).astype(np.float32))
        if not np.isfinite(data_set.logits).all():
            raise GrowkitError(f"the {_word(identity)} answers NaN or infinity, which can be no reference")
        data_sets.append(data_set)
    return Golden(identity=identity, tolerance=TOLERANCE[identity.precision], seed=seed, data_sets=tuple(data_sets))


def write_golden(folder: Path, golden: Golden) -> None:
    """Write a reference, whole or not at all; an older one in its place is replaced.

    Raises:
        GrowkitError: `folder` holds other things than a reference.
    """
    refuse_unreplaceable(folder)
    entries = []
    with whole_folder(folder.resolve()) as partial:  # a link to a folder stays one
        for data_set in golden.data_sets:
            (partial / data_set.name).mkdir()
            entry = {"name": data_set.name}
            for file, name, value in ((INPUT, "input", data_set.images), (OUTPUT, "logits", data_set.logits)):
                data = numpy_helper.from_array(value, name).SerializeToString(deterministic=True)
                (partial / data_set.name / file).write_bytes(data)
                entry[f"{name}_sha256"] = hashlib.sha256(data).hexdigest()
            entries.append(entry)
        content = {
            "schema": SCHEMA,
            **asdict(golden.identity),
            "tolerance": golden.tolerance,
            "seed": golden.seed,
            "data_sets": entries,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {**versions(), "growkit": __version__},
        }
        write_json(partial / FILE, content)


def update_golden(folder: Path, golden: Golden, subject: Subject) -> str:
    """As write_golden; returns what became of the reference that was there, in a sentence.

    Raises:
        GrowkitError: as write_golden.
    """
    try:
        change = f"replaced {folder}: {change_since(read_golden(folder), subject)}"
    except GrowkitError:
        there = (folder / FILE).exists()
        change = f"replaced {folder}, which could not be read" if there else f"wrote {folder}"
    write_golden(folder, golden)
    return change


def refuse_unreplaceable(folder: Path) -> None:
    """Raise GrowkitError where a new reference would take the place of something else."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise GrowkitError(f"{folder} is a file; --reference names a folder")
    for entry in sorted(folder.iterdir()):
        inside = sorted(entry.iterdir()) if DATA_SET.fullmatch(entry.name) and entry.is_dir() else [entry]
        for path in inside:
            if path.name not in ((INPUT, OUTPUT) if path.parent != folder else (FILE,)):
                raise GrowkitError(f"{path} is no part of a reference and would be lost; name another --reference")
    if any(folder.iterdir()) and not (folder / FILE).is_file():
        raise GrowkitError(f"{folder} holds no {FILE}, so it is not growkit's to replace; name another --reference")


def change_since(old: Golden, subject: Subject) -> str:
    """What replaces `old`, in a sentence: weights before and now, and how far the answers to its images move."""
    was, now = old.identity, subject.identity
    what, before, after = _told_apart(was, now) or ("weights", None, None)
    weights = f"{what} {_short(before)} -> {_short(after)}" if before != after else f"{what} {_short(after)} as before"
    if was.of != now.of:
        weights = f"it was of a {_word(was)}, is of a {_word(now)}; {weights}"
    if _size(was) != _size(now):
        return f"{weights}; images were {_shape(_size(was))}, are {_shape(_size(now))}"
    largest, moved = 0.0, 0.0
    for data_set in old.data_sets:
        got = subject.answers(data_set.images).astype(np.float32)
        if got.shape != data_set.logits.shape:
            return f"{weights}; {data_set.logits.shape[1]} classes before, {got.shape[1]} now"
        largest = max(largest, float(np.abs(got - data_set.logits.astype(np.float64)).max()))
        moved = max(moved, relative(rms(got.astype(np.float64) - data_set.logits), old.spread))
    return f"{weights}; logits move by up to {largest:.3g} (relative RMS {moved:.3g})"


# reading -------------------------------------------------------------------------------------


def read_golden(folder: Path) -> Golden:
    """Read a reference; nothing in it is believed before it is checked.

    Raises:
        GrowkitError: no such folder, no reference, or a damaged one.
    """
    path = folder / FILE
    if not folder.is_dir():
        raise GrowkitError(f"{folder}: no such folder; {UPDATE} writes a reference")
    if not path.is_file():
        raise GrowkitError(f"{folder} holds no {FILE}; {UPDATE} writes a reference")
    try:
        content = read_json(path)
    except RecursionError:
        raise GrowkitError(f"{path}: not readable as JSON (nested too deep)") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise GrowkitError(f"{path}: no reference of this growkit (schema {SCHEMA}); write it anew with {UPDATE}")
    try:
        identity = Identity(**{name: content[name] for name in Identity.__dataclass_fields__})
        tolerance, seed, listed = content["tolerance"], content["seed"], content["data_sets"]
        wanted = [(entry["name"], entry["input_sha256"], entry["logits_sha256"]) for entry in listed]
        hashes = (identity.tensors_sha256, identity.weights_sha256, identity.onnx_sha256, identity.architecture)
        sound = (
            identity.of in ("model", "onnx")
            and identity.precision in TOLERANCE
            and isinstance(tolerance, float)
            and 0 < tolerance < math.inf
            and isinstance(seed, int)
            and all(value is None or isinstance(value, str) for value in hashes)
            and all(value.isalnum() for value in hashes[:3] if value is not None)
            and len(_size(identity)) == 3
            and wanted != []
            and all(DATA_SET.fullmatch(name) for name, _, _ in wanted)
        )
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise GrowkitError(f"{path}: damaged; restore it, or write it anew with {UPDATE}")
    data_sets = []
    for name, input_sha256, logits_sha256 in wanted:
        images = _array(folder / name / INPUT, input_sha256, ndim=4)
        logits = _array(folder / name / OUTPUT, logits_sha256, ndim=2)
        if len(images) != len(logits) or list(images.shape[1:]) != _size(identity):
            raise GrowkitError(f"{folder / name}: damaged: {images.shape} images for {logits.shape} logits")
        data_sets.append(DataSet(name, images, logits))
    return Golden(identity=identity, tolerance=tolerance, seed=seed, data_sets=tuple(data_sets))


def _array(path: Path, sha256: str, *, ndim: int) -> np.ndarray:
    """The finite float32 tensor in a .pb file; no memory is taken for sizes that the file only claims."""
    if not path.is_file():  # a device or a pipe is none either
        raise GrowkitError(f"{path}: missing; restore it, or write the reference anew with {UPDATE}")
    if path.stat().st_size > LARGEST:
        raise GrowkitError(f"{path}: damaged: larger than an ONNX tensor can be")
    data = path.read_bytes()
    if data.startswith(b"version https://git-lfs"):
        raise GrowkitError(f"{path}: a Git LFS pointer; fetch the file with git lfs pull")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise GrowkitError(f"{path}: damaged: not the bytes that {FILE} was written with; restore it")
    tensor = onnx.TensorProto()
    try:
        tensor.ParseFromString(data)
    except Exception:  # protobuf has kinds of its own
        raise GrowkitError(f"{path}: damaged: not an ONNX tensor") from None
    dims = list(tensor.dims)
    if (
        tensor.data_type != onnx.TensorProto.FLOAT
        or len(dims) != ndim
        or min(dims) < 1
        or 4 * math.prod(dims) != len(tensor.raw_data)  # none where it says to lie in another file
    ):
        raise GrowkitError(f"{path}: damaged: not a float32 tensor of the size it claims")
    array = np.frombuffer(tensor.raw_data, "<f4").reshape(dims).astype(np.float32)
    if not np.isfinite(array).all():
        raise GrowkitError(f"{path}: damaged: holds NaN or infinity")
    return array


# holding -------------------------------------------------------------------------------------


def check_golden(golden: Golden, subject: Subject, *, tolerance: float | None = None) -> tuple[Check, ...]:
    """Hold `subject` against the reference: weights, preprocessing, and the answers to every stored image.

    tolerance  relative RMS difference of the logits; the reference's own when left out, or that of the
               subject's precision where the two differ
    """
    was, now = golden.identity, subject.identity
    word = _word(now)
    checks: list[Check] = []
    if hashes := _told_apart(was, now):
        what, before, after = hashes
        same = before == after
        line = (
            f"{word}: {what} {_short(after)}, as the reference"
            if same
            else (
                f"the reference was written for {what} {_short(before)}, this {word} has {_short(after)}: "
                f"run {UPDATE} if the change was meant"
            )
        )
        checks.append(check("golden", f"{word}: {what}", same, _short(after), _short(before), line))
    if was.architecture and now.architecture:
        same = was.architecture == now.architecture
        line = f"{word}: {now.architecture}" + ("" if same else f", the reference is of {was.architecture}")
        checks.append(check("golden", f"{word}: architecture", same, now.architecture, was.architecture, line))
    if now.preprocessing:
        differing = [key for key in was.preprocessing if now.preprocessing.get(key) != was.preprocessing[key]]
        said, meant = (
            ", ".join(f"{key} {given.get(key)}" for key in differing) or "equal"
            for given in (now.preprocessing, was.preprocessing)
        )
        line = f"{word}: preprocessing is " + ("the reference's" if not differing else f"{said}; was {meant}")
        checks.append(check("golden", f"{word}: preprocessing", not differing, said, meant, line))
    own = golden.tolerance if now.precision == was.precision else TOLERANCE[now.precision]
    limit = own if tolerance is None else tolerance
    other = "" if now.precision == was.precision else f"; the reference is of {was.precision}, this of {now.precision}"
    for data_set in golden.data_sets:
        checks += _answers(data_set, subject, limit, golden.spread, label=f"{data_set.name}: {word}", note=other)
    return tuple(checks)


def _answers(data_set: DataSet, subject: Subject, limit: float, spread: float, *, label: str, note: str) -> list[Check]:
    try:
        got = subject.run(data_set.images)
    except Exception as error:  # timm, torch and ONNX Runtime each have their own kinds
        shape = _shape(data_set.images.shape[1:])
        reason = first_line(error)
        line = f"{label} refuses the stored images of {shape}: the reference is another model's ({reason})"
        return [check("golden", label, False, "refused", "ok", line)]
    wanted = data_set.logits
    if got.shape != wanted.shape:
        line = (
            f"{label} answers {_shape(got.shape)}, stored is {_shape(wanted.shape)}: the reference is another model's"
        )
        return [check("golden", label, False, _shape(got.shape), _shape(wanted.shape), line)]
    off = relative(rms(got.astype(np.float64) - wanted), spread)
    line = f"{label}: answers differ by relative RMS {off:.3g}, allowed {limit:.3g}{note}"
    top = np.sort(wanted.astype(np.float64), axis=1)
    lead = top[:, -1] - top[:, -2] if wanted.shape[1] > 1 else np.zeros(len(wanted))
    certain = lead > CERTAIN * limit * spread
    changed = int((certain & (got.argmax(axis=1) != wanted.argmax(axis=1))).sum())
    told = f"{label}: {changed} of {int(certain.sum())} certain predictions changed"
    return [
        check("golden", label, off <= limit, off, limit, line),  # `not >` would let NaN pass
        check("golden", f"{label}, certain predictions changed", changed == 0, changed, 0, told),
    ]


def _told_apart(was: Identity, now: Identity) -> tuple[str, str, str] | None:
    """What tells the two apart and its hashes before and now: the whole file, else the weights; None if unknown."""
    for kind in ("onnx_sha256", "tensors_sha256", "weights_sha256"):
        before, after = getattr(was, kind), getattr(now, kind)
        if before and after:
            return ("SHA-256" if kind == "onnx_sha256" else "weights"), before, after
    return None


def _word(identity: Identity) -> str:
    return "file" if identity.of == "onnx" else "model"


def _size(identity: Identity) -> list[int]:
    return list(identity.preprocessing["input_size"])


def _shape(shape: tuple[int, ...] | list[int]) -> str:
    return " x ".join(map(str, shape))


def _short(sha256: str | None) -> str:
    return sha256[:12] if sha256 else "unknown"


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _object(value: Any) -> dict[str, Any]:
    """`value` where it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """`value` as it comes back from a JSON file: tuples are lists there."""
    return json.loads(json.dumps(value))
