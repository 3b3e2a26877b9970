"""Golden references: what a model or an ONNX file answered when it was last known to be right.

reference.json  test_data_set_0/  test_data_set_1/

The folder is meant to be committed. Its data sets are in ONNX's own format, so the tools of the runtimes read them too.
What is compared with a reference must have its answers, within a tolerance, its weights bit for bit, and its
preprocessing.
"""

import hashlib
import math
import re
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from growkit import __version__
from growkit.deploy.subject import Identity, Subject
from growkit.deploy.truth import Preprocessing, noise_pixels, normalised
from growkit.errors import GrowkitError
from growkit.files import read_json, refuse_foreign, whole_folder, write_json
from growkit.record import versions

SCHEMA = 1
FILE, INPUT, OUTPUT = "reference.json", "input_0.pb", "output_0.pb"
DATA_SET = re.compile(r"test_data_set_\d+")
WRITES = (FILE, f"test_data_set_[0-9]/{INPUT}", f"test_data_set_[0-9]/{OUTPUT}")
LARGEST = 2**31 - 1  # bytes of one protobuf message
# Relative RMS difference of the logits. One float32 rounding of its input moves an int8 file by up to 0.034.
TOLERANCE = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 3e-2, "int8": 1e-1}
UPDATE = "`growkit verify --update-reference`"


@dataclass(frozen=True)
class DataSet:
    """images (B, C, H, W) and logits (B, classes), both float32."""

    name: str
    images: np.ndarray = field(repr=False)
    logits: np.ndarray = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Golden:
    """A reference as stored on disk; `tolerance` is the relative RMS difference it allows."""

    identity: Identity
    tolerance: float
    seed: int
    data_sets: tuple[DataSet, ...]

    @property
    def spread(self) -> float:
        """Standard deviation of all stored logits: differences are reported relative to it."""
        return float(np.concatenate([d.logits.ravel() for d in self.data_sets]).std(dtype=np.float64))


def reference_images(prepared: Preprocessing, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return normalised float32 images: noise (1, C, H, W); three more, a black and a white one (5, C, H, W).

    Their pixels are 8-bit, as in photographs, so they compress and can be given to a file that takes pixels too.
    """
    noise = np.rint(255 * noise_pixels(prepared.input_size, 4, seed))
    pixels = np.concatenate([noise, np.zeros_like(noise[:1]), np.full_like(noise[:1], 255)])
    images = normalised(prepared, pixels / 255)
    return images[:1], images[1:]


def make_golden(subject: Subject, *, seed: int) -> Golden:
    """Run `subject` on seeded images; return its answers as a reference in memory.

    Raises:
        GrowkitError: the size of the images is unknown, or an answer is NaN or infinite.
    """
    identity = subject.identity
    if not identity.preprocessing:
        raise GrowkitError(f"the {identity.word} does not say its input size, mean and std; set model.pretrained_cfg")
    data_sets = []
    for index, images in enumerate(reference_images(Preprocessing(**identity.preprocessing), seed)):
        data_set = DataSet(f"test_data_set_{index}", images, subject.answers(images).astype(np.float32))
        if not np.isfinite(data_set.logits).all():
            raise GrowkitError(f"the {identity.word} answers NaN or infinity, which can be no reference")
        data_sets.append(data_set)
    return Golden(identity=identity, tolerance=TOLERANCE[identity.precision], seed=seed, data_sets=tuple(data_sets))


def write_golden(folder: Path, golden: Golden) -> None:
    """Write a reference, whole or not at all; an older one there is replaced.

    Raises:
        GrowkitError: `folder` holds other things than a reference.
    """
    refuse_unreplaceable(folder)
    entries = []
    with whole_folder(folder) as partial:
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


def refuse_unreplaceable(folder: Path) -> None:
    """Raise GrowkitError where a new reference would replace something else."""
    if folder.exists() and not folder.is_dir():
        raise GrowkitError(f"{folder} is a file; --reference names a folder")
    refuse_foreign(folder, FILE, writes=WRITES, elsewhere="name another --reference")


def read_golden(folder: Path) -> Golden:
    """Read a reference; nothing in it is trusted before it is checked.

    Raises:
        GrowkitError: no such folder, no reference, or a damaged one.
    """
    path = folder / FILE
    if not folder.is_dir():
        raise GrowkitError(f"{folder}: no such folder; {UPDATE} writes a reference")
    if not path.is_file():
        raise GrowkitError(f"{folder} holds no {FILE}; {UPDATE} writes a reference")
    content = read_json(path)
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise GrowkitError(f"{path}: no reference of this growkit (schema {SCHEMA}); write it anew with {UPDATE}")
    try:
        known = {name: content[name] for name in Identity.__dataclass_fields__ if name != "labels"}
        identity = Identity(**known, labels=content.get("labels"))
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
            and (identity.labels is None or all(isinstance(label, str) for label in identity.labels))
            and len(identity.size) == 3
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
        if len(images) != len(logits) or list(images.shape[1:]) != identity.size:
            raise GrowkitError(f"{folder / name}: damaged: {images.shape} images for {logits.shape} logits")
        data_sets.append(DataSet(name, images, logits))
    return Golden(identity=identity, tolerance=tolerance, seed=seed, data_sets=tuple(data_sets))


def _array(path: Path, sha256: str, *, ndim: int) -> np.ndarray:
    """Read the finite float32 tensor in a .pb file, allocating nothing for sizes that the file merely claims."""
    if not path.is_file():  # a device or a pipe is no file either
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
        or 4 * math.prod(dims) != len(tensor.raw_data)  # empty where it claims to be stored in another file
    ):
        raise GrowkitError(f"{path}: damaged: not a float32 tensor of the size it claims")
    array = np.frombuffer(tensor.raw_data, "<f4").reshape(dims).astype(np.float32)
    if not np.isfinite(array).all():
        raise GrowkitError(f"{path}: damaged: holds NaN or infinity")
    return array
