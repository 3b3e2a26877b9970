"""Quantise a finished float32 ONNX graph: its matrix products run in int8."""

import contextlib
import copy
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from growkit.deploy.calibration import refuse_images, runs
from growkit.errors import GrowkitError


def int8_dynamic(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return `proto` with int8 weights, one scale per output channel, and dynamically quantised activations.

    Every MatMul and Gemm by a weight is quantised. An activation has one scale for the whole batch, so an image's
    logits depend a little on its neighbours.

    Raises:
        GrowkitError: there is no such MatMul or Gemm.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    left = {node.name for node in proto.graph.node} - set(_by_weight(proto))

    def write(target: Path) -> None:
        quantize_dynamic(
            _copied(proto),
            target,
            per_channel=True,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
            # a Gemm is first split in two, which renames it
            nodes_to_exclude=[*left, *(f"{name}_MatMul" for name in left)],
        )

    return _quantised(proto, write)


def int8_static(proto: onnx.ModelProto, images: np.ndarray) -> onnx.ModelProto:
    """Return `proto` with int8 weights, one scale per output channel, and static scales for their input activations.

    images  calibration data (N, C, H, W) float32, normalised as for the model: the scales cover every activation
            seen on them. Every MatMul and Gemm by a weight is quantised.

    Raises:
        GrowkitError: images of another shape than the graph takes, or no such MatMul or Gemm.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    refuse_images(proto, images, "calibration images")

    def write(target: Path) -> None:
        quantize_static(
            _copied(proto),
            target,
            _reader(runs(proto, images)),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_quantize=_by_weight(proto),
            # biases, results and logits stay float32: a fused kernel gives float32 anyway
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"], "QuantizeBias": False},
        )

    return _quantised(proto, write)


def _by_weight(proto: onnx.ModelProto) -> list[str]:
    """Return the names of products with a weight; those of two activations, as in attention, stay float32."""
    weights = {t.name for t in proto.graph.initializer}
    found = [node.name for node in proto.graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in weights]
    if not found:
        raise GrowkitError("the graph holds no MatMul or Gemm by a weight: there is nothing to write in int8")
    return found


def _copied(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy, for the quantiser changes its input, without inner shapes, which it trips over (ort#25890)."""
    copied = copy.deepcopy(proto)
    copied.graph.ClearField("value_info")
    return copied


def _reader(batches: Iterator[dict[str, np.ndarray]]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(batches, None)

    return Reader()


def _quantised(proto: onnx.ModelProto, write: Callable[[Path], None]) -> onnx.ModelProto:
    """Return the graph that `write` writes, with IR, opsets, metadata and producer fields as in `proto`."""
    with tempfile.TemporaryDirectory(prefix="growkit-") as folder, _silent():
        target = Path(folder) / "model.onnx"
        write(target)
        made = onnx.load(str(target))
    made.graph.ClearField("value_info")
    made.ir_version = proto.ir_version
    for field in ("opset_import", "metadata_props"):
        made.ClearField(field)
        getattr(made, field).extend(getattr(proto, field))
    for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        setattr(made, field, getattr(proto, field))
    onnx.checker.check_model(made, full_check=True)
    return made


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    # it advises preprocessing that the exporter has already done
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
