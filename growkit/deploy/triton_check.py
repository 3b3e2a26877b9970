"""What a Triton server would refuse in a model repository, found without a server.

The rules are those of Triton's core and of its onnxruntime backend, taken from their sources; the schema is the
published one, from tritonclient.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from growkit.deploy.signature import Signature, load_graph, signature_of
from growkit.errors import GrowkitError

CONFIG = "config.pbtxt"
MODEL = "model.onnx"  # Triton's own name for it, as a file or as a folder of several


def check_model_repository(folder: Path, name: str | None = None) -> list[str]:
    """List what a Triton server would refuse in the model in `folder`, and what it would silently get wrong.

    Returns one line for each problem; none when config.pbtxt parses against the published schema and agrees with
    every version's ONNX file, the labels, the warm-up data and metadata.json. `name` is the folder's when left out.

    Raises:
        GrowkitError: tritonclient, which holds the schema, is missing.
    """
    schema()
    try:
        config = read_config(folder)
    except GrowkitError as error:
        return [str(error)]
    problems = []
    if config.name != (name or folder.name):
        problems.append(f"config.pbtxt: name {config.name!r} in a folder called {name or folder.name!r}")
    if config.backend != "onnxruntime":
        problems.append(f"config.pbtxt: backend {config.backend!r}, not 'onnxruntime'")
    versions = versions_in(folder)
    if not versions:
        problems.append("no version: a folder named 1, 2, ... holds the model")
    for version in versions:
        problems += [f"{version}/{MODEL}: {line}" for line in _file_problems(config, folder / str(version))]
    problems += [f"config.pbtxt: {line}" for line in _scheduling_problems(config)]
    problems += [f"warm-up: {line}" for line in _warmup_problems(config, folder)]
    problems += [f"labels: {line}" for line in _label_problems(config, folder)]
    try:
        stored = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [*problems, f"metadata.json: {error}"]
    if stored != kserve_metadata(config, versions):
        problems.append("metadata.json: not what config.pbtxt and the versions imply")
    return problems


def kserve_metadata(config: Any, versions: Sequence[int], *, platform: str = "onnxruntime_onnx") -> dict[str, Any]:
    """Return a server's answer to GET v2/models/NAME for a ModelConfig: name, versions, platform, inputs, outputs.

    Of `versions` those that it serves. Shapes start with -1 where the model is batched. Triton's name for the platform
    is the default; the protocol's own list calls it onnx_onnxv1.
    """
    batch = [-1] if config.max_batch_size else []

    def tensors(values: Any) -> list[dict[str, Any]]:
        return [{"name": v.name, "datatype": datatype_of(v), "shape": [*batch, *v.dims]} for v in values]

    return {
        "name": config.name,
        "versions": [str(version) for version in served(config, versions)],
        "platform": platform,
        "inputs": tensors(config.input),
        "outputs": tensors(config.output),
    }


def served(config: Any, versions: Sequence[int]) -> list[int]:
    """Return which of `versions` a server loads by the config's version_policy; without one, the newest alone."""
    there, policy = sorted(versions), config.version_policy
    if policy.HasField("specific"):
        return [version for version in there if version in policy.specific.versions]
    return there if policy.HasField("all") else there[-max(1, policy.latest.num_versions) :]


def schema() -> tuple[Any, Any]:
    """The published ModelConfig and protobuf's text format."""
    try:
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2
    except (ImportError, RuntimeError):  # tritonclient turns a missing grpcio into a RuntimeError
        raise GrowkitError(
            "tritonclient holds the schema of config.pbtxt and is not installed: pip install 'growkit[triton]'"
        ) from None
    return model_config_pb2, text_format


def read_config(folder: Path) -> Any:
    """The ModelConfig in a model's folder.

    Raises:
        GrowkitError: config.pbtxt is missing or does not follow the schema.
    """
    model_config, text_format = schema()
    file = folder / CONFIG
    try:
        return text_format.Parse(file.read_text(encoding="utf-8"), model_config.ModelConfig())
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise GrowkitError(f"{file}: not a model configuration ({error}); mend it, or move {folder} away") from None


def versions_in(folder: Path) -> list[int]:
    """Versions in a model's folder; Triton takes numbers from 1 on and nothing with a leading zero."""
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if re.fullmatch("[1-9][0-9]*", name))


def takes_labels(output: Any, count: int, batched: bool) -> bool:
    """Whether an output is a score for each class: Triton's classification reads labels by position.

    Without batching it ranks an output as a whole, so labels fit only a single image.
    """
    dims = list(output.dims)
    return dims == ([count] if batched else [1, count]) and datatype_of(output) in ("FP32", "FP16", "FP64", "BF16")


def datatype_of(value: Any) -> str:
    """Return KServe's name for a data_type: TYPE_FP32 -> FP32, TYPE_STRING -> BYTES."""
    word = str(schema()[0].DataType.Name(value.data_type).removeprefix("TYPE_"))
    return "BYTES" if word == "STRING" else word


def _file_problems(config: Any, version: Path) -> list[str]:
    """What is wrong with one version's ONNX file, or between it and the config."""
    file = version / MODEL
    file = file / MODEL if file.is_dir() else file
    try:
        proto = load_graph(file)
        problems = signature_problems(config, signature_of(proto))
    except GrowkitError as error:
        return [str(error)]
    for tensor in proto.graph.initializer:
        if uses_external_data(tensor):
            try:
                info = ExternalDataInfo(tensor)
            except ValueError as error:
                problems.append(f"{tensor.name} lies nowhere in the file beside it: {error}")
                continue
            data = file.parent / info.location
            if not data.is_file() or data.stat().st_size < (info.offset or 0) + (info.length or 0):
                problems.append(f"{info.location} is missing or too short for {tensor.name}")
    return problems


def signature_problems(config: Any, signature: Signature) -> list[str]:
    """Where a config and an ONNX file disagree, by the rules of Triton's onnxruntime backend."""
    problems = []
    if config.max_batch_size and not signature.batched:
        problems.append(f"max_batch_size {config.max_batch_size}, but not every tensor of the file has a free batch")
    for kind, values, tensors in (
        ("input", config.input, signature.inputs),
        ("output", config.output, signature.outputs),
    ):
        named = {tensor.name: tensor for tensor in tensors}
        if sorted(named) != sorted(value.name for value in values):
            problems.append(f"{kind}s {sorted(v.name for v in values)}, the file has {sorted(named)}")
            continue
        for value in values:
            tensor = named[value.name]
            dims = list(value.reshape.shape) if value.HasField("reshape") else list(value.dims)
            shape = [-1, *dims] if config.max_batch_size else dims
            if shape != list(tensor.shape) and not (tensor.shape == () and shape == [1]):
                problems.append(f"{kind} {value.name!r} of shape {shape}, the file has {list(tensor.shape)}")
            if datatype_of(value) != tensor.datatype:
                problems.append(f"{kind} {value.name!r} of type {datatype_of(value)}, the file has {tensor.datatype}")
            if any(dim < 1 and dim != -1 for dim in value.dims) or not value.dims:
                problems.append(f"{kind} {value.name!r} has dims {list(value.dims)}; Triton takes -1 or at least 1")
    return problems


def _scheduling_problems(config: Any) -> list[str]:
    problems = []
    if config.max_batch_size < 0:
        problems.append(f"max_batch_size {config.max_batch_size} is negative")
    if config.HasField("dynamic_batching"):
        if not config.max_batch_size:
            problems.append("dynamic_batching without max_batch_size")
        too_large = [s for s in config.dynamic_batching.preferred_batch_size if not 0 < s <= config.max_batch_size]
        if too_large:
            problems.append(f"preferred_batch_size {too_large[0]} is not in 1..{config.max_batch_size}")
    if not config.instance_group:
        problems.append("no instance_group: ONNX Runtime on CPUs would get two")
    problems += [f"instance_group of {group.count}" for group in config.instance_group if group.count < 1]
    return problems


def _warmup_problems(config: Any, folder: Path) -> list[str]:
    problems = []
    inputs = {value.name: value for value in config.input}
    for warmup in config.model_warmup:
        if not 1 <= warmup.batch_size <= max(1, config.max_batch_size):
            problems.append(f"{warmup.name!r} of {warmup.batch_size} requests, at most {max(1, config.max_batch_size)}")
        if sorted(warmup.inputs) != sorted(inputs):
            problems.append(f"{warmup.name!r} gives {sorted(warmup.inputs)}, the model takes {sorted(inputs)}")
            continue
        for name, given in warmup.inputs.items():
            if not fits(given.dims, inputs[name].dims) or given.data_type != inputs[name].data_type:
                problems.append(f"{name!r} is {datatype_of(given)} {list(given.dims)}, not what the input takes")
                continue
            problems += _data_problems(given, folder / "warmup" / given.input_data_file)
    return problems


def fits(dims: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether an array of these dims may be given where dims are `wanted`, of which -1 is any."""
    return len(dims) == len(wanted) and all(w in (-1, d) for d, w in zip(dims, wanted, strict=True))


def _data_problems(given: Any, file: Path) -> list[str]:
    """Whether a warm-up file is there and has exactly the bytes of its dims."""
    from tritonclient.utils import triton_to_np_dtype

    if not given.input_data_file:
        return []  # zeros or random numbers, which Triton makes itself
    wanted = int(np.prod(given.dims)) * np.dtype(triton_to_np_dtype(datatype_of(given))).itemsize
    if not file.is_file():
        return [f"{file.name} is missing"]
    return [] if file.stat().st_size == wanted else [f"{file.name} has {file.stat().st_size} bytes, not {wanted}"]


def _label_problems(config: Any, folder: Path) -> list[str]:
    problems = []
    for output in config.output:
        if not output.label_filename:
            continue
        file = folder / output.label_filename
        if not file.is_file() or not file.resolve().is_relative_to(folder.resolve()):
            problems.append(f"{output.label_filename} of {output.name!r} is not in the model's folder")
            continue
        try:
            count = len(lines_of(file))
        except GrowkitError as error:
            problems.append(str(error))
            continue
        if not takes_labels(output, count, bool(config.max_batch_size)):
            problems.append(f"{count} lines for {output.name!r} with dims {list(output.dims)}")
    return problems


def lines_of(file: Path) -> list[str]:
    """Return lines as Triton counts them: by newline alone.

    Raises:
        GrowkitError: the file is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise GrowkitError(f"{file}: not in UTF-8 ({error})") from None
