"""Does the ONNX file match the PyTorch model in structure, weights, numbers and predictions?

Every mismatch is collected; the verdict comes last.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from PIL import Image
from torch import Tensor, nn

from growkit.deploy.accuracy import accuracy_checks
from growkit.deploy.bounded import bound_of, memory_bounded
from growkit.deploy.checks import Check, check, refused
from growkit.deploy.data_sets import model_answers, off_from_stored, read_data_sets
from growkit.deploy.diagnose import diagnose, failing_run, told
from growkit.deploy.form import PLAIN, Form, form_of
from growkit.deploy.inputs import as_model_takes, extremes, made_pictures
from growkit.deploy.limits import LIMITS, Limits
from growkit.deploy.numbers import Truth, compared, in_batches, number_checks
from growkit.deploy.parts import core_session, front_session, whole_session
from growkit.deploy.pixels import CHANNELS
from growkit.deploy.runtime import Session
from growkit.deploy.settings import VerifySettings
from growkit.deploy.store import bytes_unread, files_of, props_of, read_graph, refuse_missing
from growkit.deploy.structure import OWN_MODEL, sizes_claimed, structure_checks
from growkit.deploy.truth import (
    Preprocessing,
    at_image_size,
    logits_of,
    noise_images,
    preprocessing,
    truth_of,
)
from growkit.deploy.weights import weight_checks
from growkit.deploy.whole import answer_checks, pixel_checks
from growkit.deploy.yardstick import in_precision
from growkit.errors import GrowkitError, first_line

IMAGES = 8  # at 224 x 224; more if smaller, which are cheap and steady the noise ratio


@dataclass(frozen=True)
class Parity:
    """Every check that was made, and the figures behind them; `form` is what the file says it is."""

    checks: tuple[Check, ...]
    figures: dict[str, Any]
    provider: str
    form: Form
    files: tuple[Path, ...] = ()  # the file, and those beside it that hold its weights

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(c for c in self.checks if c.verdict == "fail")

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failed


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a file is checked with besides its model and made images; what is None is not checked.

    weights_sha256  SHA-256 of the model's weight file; must be the one the file was exported from
    labels          class names that the file's metadata must hold
    data_sets       folder with test_data_set_*, written by the export
    data            labelled batches, images (B, C, H, W) and classes (B,), for accuracy
    batch_size      images of the largest of these batches
    pictures        of the user, compared in addition to the made images
    """

    weights_sha256: str | None = None
    labels: Sequence[str] | None = None
    data_sets: Path | None = None
    data: Iterable[tuple[Tensor, Tensor]] | None = None
    batch_size: int = 1
    pictures: Mapping[str, Image.Image] | None = None


def check_parity(
    model: nn.Module, file: Path, settings: VerifySettings | None = None, material: Material = Material()
) -> Parity:
    """Compare the finished ONNX `file` with the float32 `model` that it was exported from; nothing is timed.

    Raises:
        GrowkitError: the file is missing or its weights lie elsewhere, the provider does not run, the data
            sets cannot be read.
    """
    refuse_missing(file)
    settings = settings or VerifySettings()
    valid, opened, proto = _opened(file, settings.provider)
    if opened is None:
        return Parity((valid,), {}, "none", PLAIN)
    form = opened.form
    sizes = sizes_claimed(proto, form)
    if sizes.verdict == "fail":  # images of a merely claimed size may exhaust memory
        return opened.parity([sizes])
    limits = LIMITS[form.precision]
    if settings.max_accuracy_drop is not None:
        limits = replace(limits, accuracy_drop=settings.max_accuracy_drop)
    plain = copy.deepcopy(at_image_size(model, form.image_size)).cpu().eval()
    prepared, truth = preprocessing(plain), truth_of(plain)
    known = _known(plain, truth, form, settings)
    checks = [valid, *_content(opened, proto, plain, known, settings.precision or form.precision, material)]
    del proto
    try:
        core, front = _parts(opened, prepared, settings.provider)
    except GrowkitError:
        raise
    except Exception as error:
        line = f"the network inside was not found: {first_line(error)}"
        checks.append(check("structure", "the network inside", False, "missing", "input -> logits", line))
        return opened.parity(checks)
    anothers = any(made.name == OWN_MODEL and made.verdict == "fail" for made in checks)
    made, figures = _numbers(opened, core, truth, known, limits, settings.seed, anothers=anothers)
    checks += made
    made, found = _around(opened, core, front, prepared, known, settings.seed, material.pictures or {})
    checks += made
    figures |= found
    if material.pictures:
        checks += _pictures(core, truth, prepared, known, limits, material.pictures)
    if material.data_sets is not None:
        checks += _stored(opened.session, plain, form, limits, material.data_sets)
    if material.data is not None:

        def run(batch: np.ndarray) -> np.ndarray:
            return in_batches(core, batch, form.batch or len(batch))

        made, scores = accuracy_checks(run, plain, material.data, limits)
        checks += made
        figures |= {"accuracy": scores} if scores else {}
    return opened.parity(checks, figures)


@dataclass(frozen=True)
class _Opened:
    """A file that ONNX and ONNX Runtime accept: the form it claims, and the bytes beside it that no tensor uses."""

    file: Path
    files: tuple[Path, ...]
    form: Form
    session: Session
    unread: int  # bytes

    def parity(self, checks: list[Check], figures: dict[str, Any] | None = None) -> Parity:
        """Return the findings on this file."""
        return Parity(tuple(checks), figures or {}, self.session.provider, self.form, self.files)


def _opened(file: Path, provider: str) -> tuple[Check, _Opened | None, onnx.ModelProto]:
    """Return whether `file` is valid, the opened file if it is, and its graph with the weights."""
    try:
        files = files_of(file)
        proto, unread = read_graph(file), bytes_unread(file)
        onnx.checker.check_model(str(file), full_check=True)
        form = form_of(props_of(proto))
        with memory_bounded(bound_of(files), provider=provider):  # no room for images: the size claimed is unchecked
            session = whole_session(file, form, provider=provider)
    except GrowkitError:
        raise
    except Exception as error:  # the checker, protobuf and ONNX Runtime each have their own kinds
        line = f"{file.name} is not a whole ONNX file, or does not open here: {first_line(error)}"
        return check("structure", "valid ONNX", False, "refused", "accepted", line), None, onnx.ModelProto()
    valid = check("structure", "valid ONNX", True, "accepted", "accepted")
    return valid, _Opened(file, files, form, session, unread), proto


def _known(plain: nn.Module, truth: nn.Module, form: Form, settings: VerifySettings) -> Truth:
    """Make the images that a file of this form is checked on, and compute the model's logits for them."""
    prepared = preprocessing(plain)
    _, height, width = prepared.input_size
    count = min(8 * IMAGES, max(IMAGES, IMAGES * 224 * 224 // (height * width)))
    images = noise_images(prepared, max(count, settings.max_batch, form.batch or 1), settings.seed)
    batches = (form.batch,) if form.batch else tuple(sorted({1, 2, 3, 5, settings.max_batch}))
    return Truth(
        images,
        logits_of(truth, images),
        _yardstick(plain, form, images, batches),
        {name: (image, logits_of(truth, image)) for name, image in extremes(prepared, settings.seed).items()},
        batches,
    )


def _yardstick(model: nn.Module, form: Form, images: np.ndarray, batches: tuple[int, ...]) -> dict[int, np.ndarray]:
    """Run PyTorch in the file's precision, in the same batches as the file: int8 scales depend on the batch."""
    network = model if form.precision == "fp32" else in_precision(model, form.precision.removesuffix("-static"))
    if form.precision != "int8":
        every = logits_of(network, images)
        return {batch: every[: len(images) if batch == batches[0] else batch] for batch in batches}
    first, *others = batches
    parts = [logits_of(network, images[start : start + first]) for start in range(0, len(images), first)]
    return {first: np.concatenate(parts)} | {batch: logits_of(network, images[:batch]) for batch in others}


def _content(
    opened: _Opened, proto: onnx.ModelProto, plain: nn.Module, known: Truth, precision: str, material: Material
) -> list[Check]:
    """Check what is stored: the files, the form, the metadata and the weights."""
    form, count = opened.form, len(opened.files)
    prepared, classes = preprocessing(plain), known.expected.shape[1]
    return [
        check("structure", "files", count <= 2, ", ".join(f.name for f in opened.files), "one, or two with weights"),
        check("structure", "bytes beside it that are no weights", opened.unread == 0, opened.unread, 0),
        check("structure", "precision", form.precision == precision, form.precision, precision),
        *structure_checks(
            proto, form, prepared, classes, weights_sha256=material.weights_sha256, labels=material.labels
        ),
        *weight_checks(proto, plain, form),
    ]


def _parts(opened: _Opened, prepared: Preprocessing, provider: str) -> tuple[Session, Session | None]:
    """Open the network inside, and the preprocessing before it if the file has one."""
    file, form = opened.file, opened.form
    around = form.pixels or form.output != "logits"
    core = core_session(file, form, prepared, provider=provider) if around else opened.session
    return core, front_session(file, form, prepared, provider=provider) if form.pixels else None


def _numbers(
    opened: _Opened, core: Session, truth: nn.Module, known: Truth, limits: Limits, seed: int, *, anothers: bool
) -> tuple[list[Check], dict[str, Any]]:
    """Check the network's answers to the made images, and find where wrong ones come from."""
    file, form, provider, prepared = opened.file, opened.form, opened.session.provider, preprocessing(truth)
    checks, figures = number_checks(core, known, limits)
    failing = failing_run(checks, known)
    if failing is not None and not anothers:  # in another model's file there is nothing to find
        found = diagnose(file, form, prepared, truth, failing, known.spread, limits, core)
        figures |= {"diagnosis": found.line, "layer": found.layer, "failing": told(failing, known, seed)}
        checks.append(check("numbers", "where it comes from", False, found.layer or "see line", "-", found.line))
    if form.precision == "fp16" and provider == "cpu":
        # the CPU leaves stretches of a float16 graph unrounded; elsewhere every node is rounded
        rounded = core_session(file, form, prepared, rounded=True)
        try:
            got = in_batches(rounded, known.images, known.batches[0])
            checks += compared("every node rounded", got, known.expected, known.spread, limits)[0]
        except Exception as error:  # of ONNX Runtime's own kinds, here and below
            checks.append(refused("numbers", "every node rounded", error))
    return checks, figures


def _around(
    opened: _Opened,
    core: Session,
    front: Session | None,
    prepared: Preprocessing,
    known: Truth,
    seed: int,
    pictures: Mapping[str, Image.Image],
) -> tuple[list[Check], dict[str, Any]]:
    """Check what surrounds the network inside: pixels before it, answers after it."""
    form, whole = opened.form, opened.session
    if front is not None and prepared.input_size[0] not in CHANNELS:
        return [check("pixels", "channels", False, prepared.input_size[0], "1 or 3")], {}
    if front is not None:
        pictures = {**made_pictures(prepared, seed), **pictures}
        checks, figures = pixel_checks(whole, front, core, prepared, form, pictures)
        return checks, {"pixels": figures}
    if form.output == "logits":
        return [], {}
    fed = known.images[: known.batches[-1]]
    name = f"batch {len(fed)}"
    try:
        return answer_checks(whole.outputs(fed), core.run(fed), form, name), {}
    except Exception as error:
        return [refused("answers", name, error)], {}


def _pictures(
    core: Session,
    truth: nn.Module,
    prepared: Preprocessing,
    known: Truth,
    limits: Limits,
    given: Mapping[str, Image.Image],
) -> list[Check]:
    """Check the network's answers to the user's pictures."""
    checks: list[Check] = []
    for name, picture in given.items():
        image = as_model_takes(prepared, [picture])
        try:
            got = in_batches(core, image, known.batches[0])
        except Exception as error:
            checks.append(refused("pictures", name, error))
            continue
        checks += compared(name, got, logits_of(truth, image), known.spread, limits, "pictures", noise=known.own())[0]
    return checks


def _stored(session: Session, model: nn.Module, form: Form, limits: Limits, folder: Path) -> list[Check]:
    """Check that both the file and the model give the stored answers."""
    checks = []
    for name, fed, wanted in read_data_sets(folder):
        for side, run in (("file", session.outputs), ("model", lambda fed: model_answers(model, form, fed))):
            label = f"{name}: {side}"
            try:
                got = run(fed)
            except Exception as error:  # data sets of another model do not even fit
                line = f"{label} refuses the stored input: {first_line(error)}"
                checks.append(check("data sets", label, False, "refused", "ok", line))
                continue
            if list(got) != list(wanted) or any(got[key].shape != value.shape for key, value in wanted.items()):
                shapes = [", ".join(f"{key} {value.shape}" for key, value in each.items()) for each in (got, wanted)]
                checks.append(check("data sets", label, False, *shapes))
                continue
            off = off_from_stored(got, wanted)
            checks.append(check("data sets", label, off <= limits.relative_rms, off, limits.relative_rms))
    return checks
