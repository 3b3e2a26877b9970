"""Evaluate models on labelled images and against each other: model folders, checkpoints and ONNX files."""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from growkit.checkpoint import PREPROCESSING
from growkit.deploy.subject import onnx_subject
from growkit.errors import GrowkitError, first_line
from growkit.record import RunFolder
from growkit.settings import Loading
from growkit.source import AS_IT_IS, FETCHED, Source, load_source
from growkit.text import first_difference
from growkit.train.agreement import Agreement, Predict, compare_answers, in_step
from growkit.train.batches import val_batches
from growkit.train.data import Data, open_data, size_of
from growkit.train.device import pick_device
from growkit.train.progress import Progress, Say, followed, no_progress, say_nothing
from growkit.train.score import Scores, evaluate, predictor, score_model
from growkit.train.settings import FitSettings

COMPARING = "comparing on the validation images"  # what commands call that work


@dataclass(frozen=True)
class Answering:
    """A model that classifies images, in torch or from an ONNX file, and its preprocessing."""

    path: str
    predict: Predict
    preprocessing: dict[str, Any]
    labels: tuple[str, ...] | None
    outputs: int
    sha256: str  # of the weights or the ONNX file


def prepared_for(
    source: Source, data: str, settings: FitSettings, *, image_size: int | None = None, training: bool = False
) -> Data:
    """Open data with the preprocessing of `source`; `image_size` replaces its image size, width and height.

    Without `training` there need not be training images.

    Raises:
        GrowkitError: unusable data.
    """
    prepared = dict(source.preprocessing)
    if image_size is not None:
        prepared["input_size"] = (prepared["input_size"][0], image_size, image_size)
    return open_data(data, prepared, settings, training=training)


def refuse_unjudgeable(source: Source, data: str, classes: Sequence[str]) -> None:
    """Raise GrowkitError if `source` cannot be scored on the labels of `data`: no classifier, or other classes."""
    outputs = source.architecture.classes
    _refuse_headless(source.path, outputs)
    _refuse_other_data(data, classes, outputs, source.labels)


def labelled(data: str, source: Source, settings: FitSettings, *, image_size: int | None = None) -> Data:
    """Open data to score `source` on, unchanged; arguments and errors are those of the two functions above."""
    opened = prepared_for(source, data, settings, image_size=image_size)
    refuse_unjudgeable(source, data, opened.classes)
    return opened


def _refuse_headless(path: str, outputs: int) -> None:
    """Raise GrowkitError if a model has no classifier: its features are not predictions."""
    if outputs == 0:
        raise GrowkitError(f"{path} has no classifier to judge; `growkit finetune {shlex.quote(path)}` gives it one")


def _refuse_other_data(
    data: str, classes: Sequence[str], outputs: int, labels: Sequence[str] | None, whose: str = "the model's"
) -> None:
    """Raise GrowkitError if the data's classes differ in number or name: every figure would be wrong."""
    told = ""
    if classes and len(classes) != outputs:
        told = f"{len(classes)} classes are not {whose} {outputs}"
        missing = [name for name in labels or () if name not in classes]
        told += f", {missing[0]} is missing" if missing else ""
    elif classes and labels and list(labels) != list(classes):
        at, one, other = first_difference(classes, labels)
        told = f"class {at} is {one} and {whose} is {other}"
    if told:
        raise GrowkitError(f"--data {data}: its {told}; give data with {whose} classes")


def evaluate_model(
    source: Source, data: str, settings: FitSettings, *, device: str = "auto", progress: Progress = no_progress
) -> Scores:
    """Score a model on the validation images of `data`."""
    chosen = pick_device(device)
    opened = labelled(data, source, settings)
    return score_model(source.model(), opened, settings, chosen, progress=progress)


def evaluate_onnx(
    path: Path, data: str, settings: FitSettings, *, device: str = "auto", progress: Progress = no_progress
) -> Scores:
    """Score an ONNX file on the validation images, prepared as the file's metadata says.

    Raises:
        GrowkitError: no such file, not readable by ONNX Runtime, or its metadata has no preprocessing.
    """
    answering = _answering_onnx(path, device)
    opened = open_data(data, answering.preprocessing, settings, training=False)
    _refuse_other_data(data, opened.classes, answering.outputs, answering.labels)
    return evaluate(answering.predict, followed(val_batches(opened, settings), size_of(opened.val), progress))


def _answering_onnx(path: Path, device: str) -> Answering:
    providers = {"auto": "auto", "cpu": "cpu", "cuda": "cuda", "cuda:0": "cuda"}
    if device not in providers:
        raise GrowkitError(f"--device {device}: an ONNX file runs on auto, cpu or cuda; CUDA_VISIBLE_DEVICES picks one")
    try:
        subject = onnx_subject(path, provider=providers[device])
        prepared = subject.identity.preprocessing
        if not prepared:
            raise GrowkitError(f"{path}: its metadata does not say how images are prepared; export it with growkit")
        # the network inside gives the number of classes, whatever outputs the file adds
        outputs = subject.run(np.zeros((1, *prepared["input_size"]), np.float32)).shape[1]
    except GrowkitError:
        raise
    except Exception as error:  # ONNX Runtime raises a dozen kinds for broken files
        reason = first_line(error, 200)
        if "NOT_IMPLEMENTED" in reason:  # a bfloat16 file on a CPU
            raise GrowkitError(
                f"{path}: ONNX Runtime has no kernels for it on this device ({reason});"
                f" `growkit verify --onnx-file {shlex.quote(str(path))} --data ...` scores it"
            ) from None
        raise GrowkitError(f"{path}: not readable as ONNX ({reason})") from None

    def predict(images: Tensor) -> Tensor:
        try:
            return torch.from_numpy(subject.run(images.numpy()))
        except Exception as error:  # of a dozen kinds, too
            reason = first_line(error, 200)
            raise GrowkitError(
                f"{path}: ONNX Runtime cannot run it on {len(images)} images ({reason}); "
                "give a smaller --batch-size, or export it again"
            ) from None

    return Answering(
        path=str(path),
        predict=predict,
        preprocessing=prepared,
        labels=None if subject.identity.labels is None else tuple(subject.identity.labels),
        outputs=outputs,
        sha256=subject.identity.onnx_sha256 or "",
    )


def _answering(path: str, loading: Loading, precision: str, device: str, say: Say) -> Answering:
    """Load what classifies images: an ONNX file, or whatever `load_source` takes."""
    if Path(path).suffix == ".onnx":
        return _answering_onnx(Path(path), device)
    loaded = load_source(path, loading, say=say)
    _refuse_headless(path, loaded.architecture.classes)
    chosen = pick_device(device)
    return Answering(
        path=path,
        predict=predictor(loaded.model().to(chosen), chosen, precision),
        preprocessing=loaded.preprocessing,
        labels=loaded.labels,
        outputs=loaded.architecture.classes,
        sha256=loaded.sha256,
    )


def _for_both(
    data: str, opened: Data, old: Answering, new: Answering, settings: FitSettings, say: Say
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the images as the old model takes them, as the new one does, and their labels."""
    if _prepares_alike(old, new):
        yield from ((images, images, labels) for images, labels in val_batches(opened, settings))
        return
    say("the two prepare images differently; each gets them its own way")
    others = open_data(data, old.preprocessing, settings, training=False)
    yield from in_step(val_batches(others, settings), val_batches(opened, settings))


def evaluate_against(
    run: RunFolder,
    model: str,
    against: str,
    data: str,
    settings: FitSettings,
    *,
    loading: Loading = AS_IT_IS,
    device: str = "auto",
    say: Say = say_nothing,
    progress: Progress = no_progress,
) -> tuple[Agreement, bool]:
    """Compare a model's predictions on the validation images of `data` with those of the source it came from.

    `model` and `against` are each a model folder, a checkpoint, timm:NAME or an .onnx file; each gets the images
    with its own preprocessing. Of `loading`, --no-ema applies to both, the rest to the one that is a bare checkpoint.

    If the model lies in the run folder, a step "evaluate" is added to the run's record; otherwise nothing is written.
    The second value tells whether it was recorded.

    Raises:
        GrowkitError: a model or the data cannot be read, or the models and the data have different classes.
    """
    recorded = run.holds(model)
    if recorded:
        run.refuse_unusable()
    bare = [path for path in (model, against) if _is_bare(path)]
    if (loading.from_ or loading.from_set) and len(bare) == 2:
        raise GrowkitError(
            f"--from: {model} and {against} are both bare checkpoints, and it cannot tell which is meant; "
            "give one as a model folder, as `growkit finetune` writes it"
        )

    meant = {path: loading if path in bare or not bare else Loading(ema=loading.ema) for path in (model, against)}
    new, old = (_answering(path, meant[path], settings.precision, device, say) for path in (model, against))
    opened = open_data(data, new.preprocessing, settings, training=False)
    _refuse_other_classes(data, opened.classes, old, new)
    batches = followed(_for_both(data, opened, old, new, settings, say), size_of(opened.val), progress)
    found = compare_answers(old.predict, new.predict, batches, new.labels or old.labels or opened.classes)
    if recorded:
        read = ("batch_size", "precision", "data_dir", "val_split")
        run.add(
            "evaluate",
            options={
                "model": model,
                "against": against,
                "data": data,
                **{name: getattr(settings, name) for name in read},
            },
            figures=asdict(found),
            hashes={"source": old.sha256, "model": new.sha256},
        )
    return found, recorded


def _is_bare(path: str) -> bool:
    """Whether this is a bare checkpoint file, which --from and --from-set are for."""
    return not path.startswith(FETCHED) and Path(path).suffix != ".onnx" and Path(path).is_file()


def _prepares_alike(old: Answering, new: Answering) -> bool:
    ways = [{key: either.preprocessing.get(key) for key in PREPROCESSING} for either in (old, new)]
    return json.dumps(ways[0]) == json.dumps(ways[1])  # JSON knows no tuples, and ONNX metadata are JSON


def _refuse_other_classes(data: str, classes: Sequence[str], old: Answering, new: Answering) -> None:
    """Raise GrowkitError if the two models have different classes, or the data has others."""
    made = f"`growkit finetune SOURCE --data {shlex.quote(data)} --run OTHER` makes one"
    remedy = f"compare with a source of the model's classes; {made}"
    if old.outputs != new.outputs:
        raise GrowkitError(f"{old.path} has {old.outputs} classes and {new.path} {new.outputs}; {remedy}")
    if old.labels and new.labels and old.labels != new.labels:
        at, one, other = first_difference(old.labels, new.labels)
        raise GrowkitError(f"class {at} is {one} in {old.path} and {other} in {new.path}; {remedy}")
    _refuse_other_data(data, classes, new.outputs, new.labels or old.labels, "the models'")
