"""From a PyTorch model to one ONNX file that opens where people serve.

opset 18 with IR 8 loads on ONNX Runtime 1.15 and newer; the exporter's own IR 10 needs 1.18.
"""

import contextlib
import copy
import hashlib
import io
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from growkit import __version__
from growkit.deploy.reference import preprocessing
from growkit.errors import GrowkitError
from growkit.files import whole_file

OPSET = 18
IR = 8
PROTOBUF_LIMIT = 2**31 - 1  # bytes in one protobuf message, so in one ONNX file


@dataclass(frozen=True)
class Export:
    """A finished ONNX file."""

    path: Path
    bytes: int
    sha256: str
    opset: int
    ir: int
    nodes: int


def export_onnx(
    model: nn.Module,
    example: Tensor,
    path: Path,
    *,
    labels: Sequence[str] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Export:
    """Write `model` to one ONNX file: 'input' (batch, C, H, W) -> 'logits' (batch, classes).

    model       float32 with a `pretrained_cfg`; it is copied, so its own state stays as it is
    example     (B, C, H, W); only its shape matters, and not its B
    labels      class names, stored in the file's metadata
    provenance  where the weights come from, JSON-able and free of paths, stored in the metadata

    The same model gives the same bytes in every process and folder.

    Raises:
        GrowkitError: weights that are not float32, or over 2 GB.
    """
    others = sorted({str(p.dtype) for p in model.parameters()} - {"torch.float32"})
    if others:
        raise GrowkitError(f"model has {others[0]} weights; export float32: call model.float() first")
    size = sum(t.nbytes for t in model.state_dict().values())
    if size > PROTOBUF_LIMIT - 2**24:  # the graph itself needs a few MB
        raise GrowkitError(
            f"model has {size / 1e9:.1f} GB of weights; one ONNX file holds 2 GB: choose a smaller target"
        )
    props = {
        "growkit.version": __version__,
        "growkit.provenance": json.dumps(dict(provenance or {}), sort_keys=True),
        "preprocessing": json.dumps(asdict(preprocessing(model))),
    }
    if labels is not None:
        props["labels"] = json.dumps(list(labels), ensure_ascii=False)
    # traced at batch 2: a size of 1 is a special case to torch.export and may be baked in
    traced = example[:1].cpu().repeat(2, *(1,) * (example.ndim - 1))
    proto = finished(_captured(_unfused(model), traced, opset_version=OPSET), props)
    data = proto.SerializeToString(deterministic=True)
    with whole_file(path) as partial:
        partial.write_bytes(data)
    return Export(
        path=path,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        opset=OPSET,
        ir=IR,
        nodes=len(proto.graph.node),
    )


def export_stock(name: str, arguments: Mapping[str, Any], example: Tensor, path: Path) -> None:
    """Write what a timm user gets without growkit: random weights, the exporter's own defaults.

    It is what an export's latency is held against: the same architecture that was never grown.
    """
    import timm

    model = timm.create_model(name, **arguments).eval()
    proto = _captured(model, example[:1].cpu().repeat(2, *(1,) * (example.ndim - 1)))
    path.write_bytes(proto.SerializeToString())


def finished(proto: onnx.ModelProto, props: Mapping[str, str]) -> onnx.ModelProto:
    """Set IR and metadata; strip what the exporter tells of its machine: paths, sources, notes."""
    graph = proto.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer, graph):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    # quantize_dynamic trips over the exporter's inner shapes (ort#25890); the checker infers them
    graph.ClearField("value_info")
    proto.ClearField("doc_string")
    proto.ClearField("metadata_props")
    proto.ir_version = IR
    onnx.helper.set_model_props(proto, dict(props))
    return proto


def _unfused(model: nn.Module) -> nn.Module:
    # explicit softmax gives fewer nodes than the exporter's decomposition of fused attention
    copied = copy.deepcopy(model).cpu().eval()
    for module in copied.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", False)  # noqa: B010  (a plain flag, not a submodule)
    return copied


def _captured(model: nn.Module, example: Tensor, **options: Any) -> onnx.ModelProto:
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: "batch"},),
            input_names=["input"],
            output_names=["logits"],
            verbose=False,
            **options,
        )
    assert program is not None  # it is only with f=
    return program.model_proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # the exporter reports its stages on stdout, which belongs to --json
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield
