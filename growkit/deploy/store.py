"""An ONNX graph on disk: one file, or a small one with its weights in a second file beside it.

One protobuf message holds 2 GB, so bigger models need the second file. The location that a file states for its weights
is not trusted: only plain names in the file's own folder are read.
"""

import copy
import json
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import onnx
from onnx.external_data_helper import convert_model_to_external_data, load_external_data_for_model

from growkit.deploy.form import PLAIN, Form, form_of
from growkit.errors import GrowkitError, first_line
from growkit.files import refuse_no_file, whole_file, whole_files

LOOPS = ("Loop", "Scan")
LIMIT = 2**31 - 1 - 2**24  # bytes of weights in one file; the graph itself needs a few MB
SUFFIX = ".data"


def write_graph(proto: onnx.ModelProto, path: Path, *, external: bool = False) -> tuple[Path, ...]:
    """Write `proto` to `path`, whole or not at all; the weights to `path` + .data if asked for or over 2 GB.

    Returns the files written. Do not use `proto` afterwards: its weights may have moved out of it.
    """
    if not (external or weight_bytes(proto) > LIMIT):
        with whole_file(path) as partial:
            partial.write_bytes(proto.SerializeToString(deterministic=True))
        return (path,)
    data = path.with_name(path.name + SUFFIX)
    with whole_files(path.parent, data.name, path.name) as folder:
        convert_model_to_external_data(proto, all_tensors_to_one_file=True, location=data.name, size_threshold=1024)
        onnx.save_model(proto, f"{folder}/{path.name}")
        Path(folder, data.name).chmod(Path(folder, path.name).stat().st_mode)  # onnx: only its owner may read
    return path, data


def refuse_missing(file: Path) -> None:
    """Raise GrowkitError where there is no ONNX file."""
    if file.is_dir():
        raise GrowkitError(f"{file}: a folder; give the file in it, as in {file / 'model.onnx'}")
    if not file.is_file():
        raise GrowkitError(f"{file}: no such file; `growkit export --onnx` writes it")


def read_graph(path: Path, *, weights: bool = True) -> onnx.ModelProto:
    """Read a graph, with its weights in it wherever they are stored.

    Raises:
        GrowkitError: it is no file, places weights outside its folder, or they are missing or truncated; or it holds a
            loop, which may never end.
        Exception: what protobuf raises on bytes that are no ONNX file.
    """
    if path.exists():  # else onnx raises, and callers handle that
        refuse_no_file(path)
    proto = onnx.load_model(str(path), load_external_data=False)
    if loop := next((node.op_type for node in nodes(proto) if node.op_type in LOOPS), None):
        raise GrowkitError(f"{path}: holds a {loop}, which may never end and no ViT has; export the model again")
    for tensor in tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _refuse_outside(path, tensor)
    if weights:
        try:
            load_external_data_for_model(proto, str(path.parent))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            line = first_line(error, 160)
            raise GrowkitError(f"{path}: its weights beside it are unreadable ({line}); export again") from None
    return proto


def props_of(proto: onnx.ModelProto) -> dict[str, str]:
    """The file's own metadata."""
    return {entry.key: entry.value for entry in proto.metadata_props}


def json_in(props: Mapping[str, str], key: str) -> Any:
    """Parse the metadata under `key` as JSON: None if there is none, the text itself if it is not JSON."""
    text = props.get(key)
    try:
        return json.loads(text) if text is not None else None
    except (ValueError, RecursionError):  # deeply nested brackets
        return text


def object_in(props: Mapping[str, str], key: str) -> dict[str, Any]:
    """Parse the metadata under `key` as a JSON object; an empty one where it is anything else."""
    value = json_in(props, key)
    return value if isinstance(value, dict) else {}


def form_in(path: Path) -> Form:
    """Return the form that a file claims; the default one if it cannot be read, which its checks will report.

    Raises:
        GrowkitError: the claim is not one that growkit writes.
    """
    if path.exists():
        refuse_no_file(path)
    try:
        proto = onnx.load_model(str(path), load_external_data=False)
    except Exception:  # protobuf has its own kinds
        return PLAIN
    return form_of(props_of(proto))


def files_of(path: Path) -> tuple[Path, ...]:
    """The file and those beside it that hold its weights, in order of name.

    Raises:
        GrowkitError: as read_graph, or a file is missing.
    """
    proto = read_graph(path, weights=False)
    names = {_location(t) for t in tensors(proto) if t.data_location == onnx.TensorProto.EXTERNAL}
    files = (path, *(path.with_name(name) for name in sorted(names)))
    if missing := next((file.name for file in files if not file.exists()), None):
        raise GrowkitError(f"{path}: its weights beside it are unreadable ({missing} is missing); export again")
    return files


def bytes_unread(path: Path) -> int:
    """Count the bytes in the files beside `path` that lie after the end of their last tensor."""
    ends: dict[str, int] = {}
    for tensor in tensors(read_graph(path, weights=False)):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
            ends[_location(tensor)] = max(ends.get(_location(tensor), 0), end)
    return sum(max(0, path.with_name(name).stat().st_size - end) for name, end in ends.items())


def weight_bytes(proto: onnx.ModelProto) -> int:
    """Bytes of the stored tensors."""
    return sum(len(t.raw_data) for t in proto.graph.initializer)


def without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose stored tensors have no bytes."""
    bare = copy.deepcopy(proto)
    for tensor in tensors(bare):
        tensor.ClearField("raw_data")
    return bare


def tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Stored tensors: initializers and those in the attributes of nodes, functions and branches included."""
    for part in _parts(proto):
        if isinstance(part, onnx.GraphProto):
            yield from part.initializer
            for sparse in part.sparse_initializer:
                yield from (sparse.values, sparse.indices)
        for node in part.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors


def nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node, functions and branches included."""
    for part in _parts(proto):
        yield from part.node


def _parts(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    """The graph, the functions, and the branches within them, however deep."""
    waiting: deque[onnx.GraphProto | onnx.FunctionProto] = deque([proto.graph, *proto.functions])
    while waiting:
        part = waiting.popleft()
        yield part
        for node in part.node:
            for attribute in node.attribute:
                waiting += [attribute.g] if attribute.HasField("g") else []
                waiting += attribute.graphs


def _location(tensor: onnx.TensorProto) -> str:
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), "")


def _refuse_outside(path: Path, tensor: onnx.TensorProto) -> None:
    name = _location(tensor)
    alone = PurePosixPath(name).name == name == PureWindowsPath(name).name
    plain = alone and name not in ("", ".", "..") and "\0" not in name
    if plain and path.with_name(name).exists():
        refuse_no_file(path.with_name(name))
    if not plain or path.with_name(name).is_symlink():
        raise GrowkitError(
            f"{path}: tensor {tensor.name[:80]!r} says its weights lie in {name[:80]!r}, outside the file's folder; "
            "not read: get the file from someone you trust, or export it again"
        )
