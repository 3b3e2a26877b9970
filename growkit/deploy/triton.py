"""A Triton model repository from an exported folder, and the KServe v2 metadata it implies.

NAME/config.pbtxt  NAME/metadata.json  NAME/labels.txt  NAME/warmup/*.bin  NAME/1/model.onnx

The config is built as the published protobuf message, not as text, and the result is checked before it appears.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from growkit.deploy.data_sets import read_tensor
from growkit.deploy.form import form_of
from growkit.deploy.settings import TritonSettings
from growkit.deploy.signature import Signature, Tensor, load_graph, signature_of
from growkit.deploy.store import files_of, json_in, object_in, props_of
from growkit.deploy.triton_check import (
    CONFIG,
    MODEL,
    check_model_repository,
    fits,
    kserve_metadata,
    lines_of,
    read_config,
    schema,
    served,
    signature_problems,
    takes_labels,
    versions_in,
)
from growkit.errors import GrowkitError
from growkit.files import plain, refuse_existing, refuse_unwritable, whole_folder, write_json
from growkit.ranges import refuse_choice
from growkit.text import clipped, some, visible

LABELS = "labels.txt"
VERSIONS_SERVED = 2  # the newest and, to roll back to without loading anything, the one before
KINDS = {"cpu": "KIND_CPU", "gpu": "KIND_GPU"}
WRITES = (
    *(CONFIG, "metadata.json", LABELS, "warmup/input_*.bin"),
    *(f"[0-9]*/{MODEL}", f"[0-9]*/{MODEL}/{MODEL}*"),
)
LEGAL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # it is a folder and part of a URL


@dataclass(frozen=True)
class ModelRepository:
    """A written model: its folder, the version that was added, and whether config.pbtxt was written or kept.

    remarks  where a server will not answer as this version's file does, or refuses what was kept, a line each
    """

    folder: Path
    version: int
    configured: bool
    remarks: tuple[str, ...] = ()


def write_model_repository(
    exported: Path, repository: Path, settings: TritonSettings, *, force: bool = False
) -> ModelRepository:
    """Write the model of `exported`, a folder of `growkit export`, into a Triton model repository.

    Weights are copied: a repository often lies on another file system, and a hard link would let an edit of one file
    change the other. A model that is already there gets another version, or with `force` another file for the version
    that `settings` names; its config.pbtxt and all else in its folder are kept as they are.

    Raises:
        GrowkitError: tritonclient is missing; a setting out of range; the version is there and `force` was not given;
            the config.pbtxt that is there is for other tensors or labels; the other versions want images prepared
            otherwise; the file or its data sets do not fit Triton.
    """
    proto = load_graph(exported / MODEL)
    props = props_of(proto)
    name = settings.name or str(object_in(props, "growkit.provenance").get("architecture") or "model")
    prepared = None if form_of(props).pixels else object_in(props, "preprocessing")
    refuse_taken(repository, name, settings, force, prepared)
    target, version = repository / name, settings.version or 1
    signature, labels = signature_of(proto), _labels(props)
    if (target / CONFIG).exists():  # perhaps tuned by hand, so it is kept even where its only version is replaced
        config = read_config(target)
        _refuse_another(target, config, signature, labels)
        with whole_folder(target / str(version), replace=force) as partial:
            _copy_model(exported, partial)
        write_json(target / "metadata.json", kserve_metadata(config, versions_in(target)))
        remarks = (*_remarks(target, version, config, labels), *check_model_repository(target))
        return ModelRepository(target, version, configured=False, remarks=remarks)
    samples = _samples(signature, exported)
    config = _configured(signature, samples, name, settings, labels)
    with whole_folder(target, replace=force) as partial:
        # first, so that a polling server sees a config whose name is not the folder's, and leaves it alone
        (partial / CONFIG).write_text(_text(config), encoding="utf-8")
        write_json(partial / "metadata.json", kserve_metadata(config, [version]))
        if labels is not None and any(output.label_filename for output in config.output):
            (partial / LABELS).write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
        (partial / "warmup").mkdir()
        for index, sample in enumerate(samples):  # raw little-endian bytes
            (partial / "warmup" / f"input_{index}.bin").write_bytes(np.ascontiguousarray(sample).tobytes())
        _copy_model(exported, partial / str(version))
        problems = check_model_repository(partial, name)
        if problems:
            raise GrowkitError(f"{target} was not written, Triton would refuse it: {'; '.join(problems)}")
    return ModelRepository(target, version, configured=True)


def refuse_taken(
    repository: Path, name: str, settings: TritonSettings, force: bool, prepared: Mapping[str, Any] | None = None
) -> None:
    """Raise GrowkitError for what would stop a later write; called before the work starts.

    `prepared` says how clients must prepare images, as Source.preprocessing does; None for a file that does so itself.
    """
    schema()
    if not LEGAL_NAME.fullmatch(name):
        raise GrowkitError(f"{name!r} is no Triton model name: --triton-name takes letters, digits, '.', '_' and '-'")
    refuse_choice("--triton-kind", settings.kind, KINDS)
    target = repository / name
    refuse_unwritable(target)
    there = versions_in(target)
    if there and settings.version is None:  # --force covers the exported folder, too; a version may be for rollback
        held = some([str(number) for number in there])
        raise GrowkitError(
            f"{target} holds version {held} already; --triton-version {max(there) + 1} adds one, "
            "--triton-name another model, --triton-version N with --force replaces one"
        )
    if settings.version in there and not force:
        raise GrowkitError(
            f"{target / str(settings.version)} already exists; --triton-version {max(there) + 1} adds a version, "
            "--triton-name another model, --force replaces it"
        )
    if there or (target / CONFIG).exists():
        read_config(target)  # it is kept as it is
    elif target.exists():
        refuse_existing(target, force, CONFIG, writes=WRITES, elsewhere="--triton-name another model")
    if others := [number for number in there if number != settings.version]:
        _refuse_prepared_otherwise(target, others, prepared)


def _text(config: Any) -> str:
    return str(schema()[1].MessageToString(config, as_utf8=True))


def _labels(props: Mapping[str, str]) -> list[str] | None:
    """Return the class names of the file's metadata, each on one line, for Triton reads them line by line.

    None where its answers are sorted: a place in them is a rank, though there may be as many as classes.
    """
    stored = None if form_of(props).top else json_in(props, "labels")
    return [visible(" ".join(str(label).split())) for label in stored] if isinstance(stored, list) else None


def _configured(
    signature: Signature,
    samples: Sequence[np.ndarray],
    name: str,
    settings: TritonSettings,
    labels: list[str] | None,
) -> Any:
    """Make the ModelConfig of a file with this signature; `samples` has an array for each input."""
    pb = schema()[0]
    batched = signature.batched
    config = pb.ModelConfig(name=name, backend="onnxruntime", max_batch_size=settings.max_batch if batched else 0)
    for tensors, add in ((signature.inputs, config.input.add), (signature.outputs, config.output.add)):
        for tensor in tensors:
            _fill(add(), tensor, batched)
    for output in config.output:
        if labels is not None and takes_labels(output, len(labels), batched):
            output.label_filename = LABELS
    if config.max_batch_size > 1:
        # no preferred sizes: they delay requests, and Triton recommends them only for TensorRT profiles
        config.dynamic_batching.max_queue_delay_microseconds = settings.queue_delay
    # set explicitly: ONNX Runtime on CPUs would get two instances, each with a thread per core
    config.instance_group.add(count=settings.instances, kind=KINDS[settings.kind])
    config.version_policy.latest.num_versions = VERSIONS_SERVED
    for size in sorted({1, max(1, config.max_batch_size)}):  # the largest too: memory runs out at load, not in traffic
        warmup = config.model_warmup.add(name=f"batch {size}", batch_size=size)
        for index, (tensor, sample) in enumerate(zip(signature.inputs, samples, strict=True)):
            warmup.inputs[tensor.name].data_type = f"TYPE_{tensor.datatype}"
            warmup.inputs[tensor.name].dims.extend(sample.shape[1:] if batched else sample.shape)
            warmup.inputs[tensor.name].input_data_file = f"input_{index}.bin"
    return config


def _fill(value: Any, tensor: Tensor, batched: bool) -> None:
    """Set name, type and dims of a ModelInput or ModelOutput; the dims of a batched model leave out the batch."""
    value.name = tensor.name
    value.data_type = "TYPE_STRING" if tensor.datatype == "BYTES" else f"TYPE_{tensor.datatype}"
    dims = tensor.shape[1:] if batched else tensor.shape
    value.dims.extend(dims or (1,))
    if batched and not dims:  # one number for each image; Triton still requires a dim
        value.reshape.SetInParent()


def _samples(signature: Signature, exported: Path) -> list[np.ndarray]:
    """Return an array for each input, batch included, from the first data set that fits; one image where batched."""
    from tritonclient.utils import np_to_triton_dtype

    for folder in sorted(exported.glob("test_data_set_*")):
        arrays = [read_tensor(folder / f"input_{index}.pb")[1] for index in range(len(signature.inputs))]
        if signature.batched:
            arrays = [array[:1] for array in arrays]
        if all(
            fits(array.shape, tensor.shape) and np_to_triton_dtype(array.dtype) == tensor.datatype
            for array, tensor in zip(arrays, signature.inputs, strict=True)
        ):
            return arrays
    wanted = ", ".join(f"{t.name} {t.datatype} {list(t.shape)}" for t in signature.inputs)
    raise GrowkitError(f"{exported}: no test_data_set_* fits the file's input ({wanted}); export again")


def _copy_model(exported: Path, version: Path) -> None:
    """Copy one file as VERSION/model.onnx; a model of several files into VERSION/model.onnx/, a folder of that name."""
    files = files_of(exported / MODEL)
    folder = version / MODEL if files[1:] else version
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, folder / file.name)


def _refuse_another(target: Path, config: Any, signature: Signature, labels: list[str] | None) -> None:
    """Raise GrowkitError unless a file fits the config and labels in `target`, which its versions share."""
    problems = signature_problems(config, signature)
    if labels is not None and (target / LABELS).is_file() and lines_of(target / LABELS) != labels:
        problems.append("the class names differ")
    if problems:
        raise GrowkitError(
            f"{target} serves another kind of model: {problems[0]}; choose another --triton-name, or move it away"
        )


def _refuse_prepared_otherwise(target: Path, versions: Sequence[int], prepared: Mapping[str, Any] | None) -> None:
    """Raise GrowkitError where images prepared for the newest of `versions` would be wrong for `prepared`."""
    files = [file for file in (target / str(version) / MODEL for version in reversed(versions)) if file.exists()]
    if not files or not prepared:
        return
    before = load_graph(files[0] / MODEL if files[0].is_dir() else files[0])
    was, now = object_in(props_of(before), "preprocessing"), plain(prepared)
    # the signature covers the size of images
    for key in sorted((was.keys() & now.keys()) - {"input_size"}):
        if was[key] != now[key]:
            told = [clipped(visible(str(value)), 60) for value in (was[key], now[key])]
            raise GrowkitError(
                f"{files[0].parent} wants images prepared otherwise: {key} {told[0]}, not {told[1]}; "
                "choose another --triton-name, or export both with --pixels"
            )


def _remarks(target: Path, version: int, config: Any, labels: list[str] | None) -> tuple[str, ...]:
    """Say where `version` is not served, or the class names that the versions in `target` share are not its own."""
    remarks = []
    if version not in served(config, versions_in(target)):
        remarks.append(f"no server loads version {version}: version_policy in {target / CONFIG} leaves it out")
    shared = next((output.label_filename for output in config.output if output.label_filename), None)
    batched = bool(config.max_batch_size)
    if shared and labels is None:
        remarks.append(f"the file names no classes; its answers go by the names in {target / shared}")
    elif labels is not None and not shared and any(takes_labels(o, len(labels), batched) for o in config.output):
        remarks.append(
            "its class names are not served, as earlier versions have none; they are with another --triton-name"
        )
    return tuple(remarks)
