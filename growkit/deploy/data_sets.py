"""Reference data beside a file: inputs and their outputs, in ONNX's test_data_set folders.

The folders are read by onnx_test_runner, onnxruntime_perf_test and onnx.backend.test.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from PIL import Image
from torch import nn

from growkit.deploy.form import PLAIN, Form
from growkit.deploy.inputs import as_model_takes
from growkit.deploy.numbers import relative, rms
from growkit.deploy.parts import whole_session
from growkit.deploy.pixels import INPUT, resized
from growkit.deploy.truth import Preprocessing, logits_of, noise_images, noise_pixels, preprocessing, truth_of
from growkit.deploy.whole import answer
from growkit.errors import GrowkitError, first_line
from growkit.files import refuse_no_file

BATCHES = (1, 5)  # of test_data_set_0 and test_data_set_1, unless the file has a fixed batch size


def write_data_sets(
    model: nn.Module,
    folder: Path,
    *,
    seed: int,
    form: Form = PLAIN,
    file: Path | None = None,
) -> None:
    """Write test_data_set_0 and test_data_set_1 in `folder`, of BATCHES or the file's fixed size.

    form  of the file they are for; sets the inputs and outputs
    file  its own outputs are stored if it is given, otherwise the float64 model's
    """
    truth, prepared = truth_of(model), preprocessing(model)
    session = None if file is None else whole_session(file, form)
    for index, batch in enumerate((form.batch, form.batch) if form.batch else BATCHES):
        fed = made_inputs(prepared, form, batch, seed + index)
        outputs = session.outputs(fed) if session else model_answers(truth, form, fed)
        target = folder / f"test_data_set_{index}"
        target.mkdir(parents=True)
        _write(target / "input_0.pb", INPUT if form.pixels else "input", fed)
        for place, (name, value) in enumerate(outputs.items()):
            stored = value.astype(np.int64 if name == "classes" else np.float32)
            _write(target / f"output_{place}.pb", name, stored)


def made_inputs(prepared: Preprocessing, form: Form, batch: int, seed: int) -> np.ndarray:
    """Make seeded images as a file of this form takes them."""
    if not form.pixels:
        return noise_images(prepared, batch, seed)
    unit = noise_pixels((prepared.input_size[0], *resized(prepared)), batch, seed)
    return np.ascontiguousarray(np.rint(255 * unit).astype(np.uint8).transpose(0, 2, 3, 1))


def read_data_sets(folder: Path) -> Iterator[tuple[str, np.ndarray, dict[str, np.ndarray]]]:
    """Yield (name, input, outputs by name) of each test_data_set_* in `folder`.

    Raises:
        GrowkitError: there is none, or a file is missing or damaged.
    """
    found = sorted(folder.glob("test_data_set_*"))
    if not found:
        raise GrowkitError(f"{folder} holds no test_data_set_*; `growkit export` writes them beside model.onnx")
    for data_set in found:
        _, fed = read_tensor(data_set / "input_0.pb")
        places = max(1, len(list(data_set.glob("output_*.pb"))))
        yield data_set.name, fed, dict(read_tensor(data_set / f"output_{place}.pb") for place in range(places))


def model_answers(model: nn.Module, form: Form, fed: np.ndarray) -> dict[str, np.ndarray]:
    """Run `model` on the input of a file of this form; return its outputs by the names of the file's."""
    if form.pixels:
        pictures = [Image.fromarray(levels.squeeze(-1) if levels.shape[-1] == 1 else levels) for levels in fed]
        fed = as_model_takes(preprocessing(model), pictures)
    return answer(form, logits_of(model, fed))


def off_from_stored(got: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> float:
    """Return the largest relative RMS error of the outputs; infinite if a class differs whose score is no near tie.

    Errors of logits are relative to their root mean square, those of probabilities to 1.
    """
    off = 0.0
    for name, value in wanted.items():
        if name != "classes":
            # not by their standard deviation: for one image and one or two classes it is tiny or zero
            unit = rms(value) if name == "logits" else 1.0
            one = relative(rms(got[name].astype(np.float64) - value), unit)
            off = max(off, one) if math.isfinite(one) else math.inf  # Python's max passes over NaN
    if "classes" in wanted and (got["classes"] != wanted["classes"]).any():
        scores = wanted["scores"].astype(np.float64)
        gaps = np.abs(np.diff(scores, axis=1))
        alone = np.ones(scores.shape, dtype=bool)
        alone[:, :-1] &= gaps > 1e-3
        alone[:, 1:] &= gaps > 1e-3
        alone[:, -1] = False  # the one after it is not stored
        if (alone & (got["classes"] != wanted["classes"])).any():
            return float("inf")
    return off


def _write(path: Path, name: str, value: np.ndarray) -> None:
    path.write_bytes(numpy_helper.from_array(value, name).SerializeToString(deterministic=True))


def read_tensor(path: Path) -> tuple[str, np.ndarray]:
    """Read the name and values of a tensor.

    Raises:
        GrowkitError: it is missing or damaged, or holds NaN or infinity.
    """
    try:
        refuse_no_file(path)
        tensor = onnx.load_tensor(str(path))
        array = numpy_helper.to_array(tensor).copy()  # its own is read-only
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError("it holds numbers that are not finite")
        return tensor.name, array
    except Exception as error:  # protobuf and numpy_helper raise a dozen kinds
        reason = first_line(error)
        raise GrowkitError(f"{path}: not a readable ONNX tensor ({reason}); export again") from None
