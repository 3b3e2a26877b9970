"""Inputs and outputs of an ONNX file in the terms of KServe's protocol, without running it."""

from dataclasses import dataclass
from pathlib import Path

import onnx

from growkit.deploy.store import read_graph, refuse_missing
from growkit.errors import GrowkitError


@dataclass(frozen=True)
class Tensor:
    """An input or output of an ONNX file; `datatype` is KServe's name (FP32, UINT8), -1 a symbolic dim."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Signature:
    """What goes into an ONNX file and what comes out."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def batched(self) -> bool:
        """Whether every tensor starts with a symbolic dim, which is what Triton's batcher needs."""
        return all(t.shape[:1] == (-1,) for t in (*self.inputs, *self.outputs))


def load_graph(file: Path) -> onnx.ModelProto:
    """Read an ONNX file without the weights that lie beside it.

    Raises:
        GrowkitError: the file is missing or unreadable.
    """
    refuse_missing(file)
    try:
        return read_graph(file, weights=False)
    except GrowkitError:
        raise
    except Exception as error:  # protobuf's own kinds
        raise GrowkitError(f"{file}: not a readable ONNX file ({error})") from None


def signature_of(proto: onnx.ModelProto) -> Signature:
    """Return the inputs and outputs of an ONNX graph; initializers that are listed as inputs do not count.

    Raises:
        GrowkitError: a tensor without a shape, or of a type that Triton does not serve.
    """
    stored = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in stored]
    return Signature(tuple(map(_tensor, inputs)), tuple(map(_tensor, proto.graph.output)))


def _tensor(value: onnx.ValueInfoProto) -> Tensor:
    from tritonclient.utils import np_to_triton_dtype

    kind = value.type.tensor_type
    word = onnx.TensorProto.DataType.Name(kind.elem_type)
    datatype = np_to_triton_dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)) if kind.elem_type else None
    if datatype is None:
        raise GrowkitError(f"{value.name!r} is of type {word}, which Triton does not serve; export without --triton")
    if not kind.HasField("shape"):
        raise GrowkitError(f"{value.name!r} has no shape in the file, so Triton cannot be told one; export it again")
    dims = kind.shape.dim
    return Tensor(value.name, datatype, tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims))
