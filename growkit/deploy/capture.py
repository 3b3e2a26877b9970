"""From a PyTorch model to its graph: 'input' (batch, C, H, W) float32 -> 'logits' (batch, classes) float32."""

import contextlib
import io
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.onnx.errors import UnsupportedOperatorError

from growkit.deploy.attention import prepared
from growkit.deploy.form import Form
from growkit.deploy.store import LIMIT
from growkit.errors import GrowkitError, first_line


def captured(model: nn.Module, input_size: tuple[int, int, int], form: Form) -> onnx.ModelProto:
    """Export `model` to a float32 graph at the opset of `form`, with the exporter's annotations still in it.

    Raises:
        GrowkitError: the exporter does not support a part of the network.
    """
    # traced at batch 2: a size of 1 is a special case to torch.export and may be baked in
    example = torch.zeros(form.batch or 2, *input_size)
    return _exported(
        prepared(model, form.attention), example, form.exporter, dynamic=form.batch is None, opset_version=form.opset
    )


def export_stock(name: str, arguments: Mapping[str, Any], input_size: tuple[int, int, int], path: Path) -> None:
    """Write what a timm user gets without growkit: random weights, the exporter's own defaults.

    An export's latency is compared with it: the same architecture, never grown.
    """
    import timm

    model = timm.create_model(name, **arguments).eval()
    proto = _exported(model, torch.zeros(2, *input_size), "dynamo", dynamic=True)
    path.write_bytes(proto.SerializeToString())


def _exported(model: nn.Module, example: Tensor, exporter: str, *, dynamic: bool, **options: Any) -> onnx.ModelProto:
    names: dict[str, Any] = {"input_names": ["input"], "output_names": ["logits"], "verbose": False}
    shapes: dict[str, Any] = {}
    with _quiet(), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/model.onnx"
        if exporter == "torchscript":
            if dynamic:
                shapes = {"dynamic_axes": {"input": {0: "batch"}, "logits": {0: "batch"}}}
            try:
                torch.onnx.export(model, (example,), file, dynamo=False, **shapes, **names, **options)
            except UnsupportedOperatorError as error:
                # RMSNorm, for example
                raise GrowkitError(f"--exporter torchscript: {first_line(error)}; --exporter dynamo has it") from None
            proto = onnx.load(file)
            # it could not infer the feature width of a model without a head
            for dim, size in zip(proto.graph.output[0].type.tensor_type.shape.dim, model(example).shape, strict=True):
                if not dim.HasField("dim_value") and dim.dim_param != "batch":
                    dim.dim_value = size
            return proto
        if dynamic:
            shapes = {"dynamic_shapes": ({0: "batch"},)}
        program = torch.onnx.export(model, (example,), dynamo=True, **shapes, **names, **options)
        assert program is not None  # it is None only with f=
        if sum(t.nbytes for t in model.state_dict().values()) <= LIMIT:
            return program.model_proto
        program.save(file, external_data=True)
        return onnx.load(file)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # the exporter reports its stages on stdout, which is reserved for --json
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield
