"""From a PyTorch model to an ONNX file that common serving runtimes load: the graph, its form, its metadata.

opset 18 with IR 8, the default, loads on ONNX Runtime 1.15 and newer; the exporter's own IR 10 needs 1.18.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from torch import nn

from growkit import __version__
from growkit.deploy.calibration import refuse_images
from growkit.deploy.capture import captured
from growkit.deploy.form import KEY, PLAIN, Form
from growkit.deploy.inputs import extremes
from growkit.deploy.int8 import int8_dynamic, int8_static
from growkit.deploy.outputs import with_output
from growkit.deploy.pixels import refuse_unfit, with_pixels
from growkit.deploy.sixteen_bits import brain, half
from growkit.deploy.store import LIMIT, weight_bytes, write_graph
from growkit.deploy.truth import Preprocessing, noise_images, preprocessing
from growkit.errors import GrowkitError
from growkit.files import sha256_of

OUTER_SEEDS = range(1000, 1008)  # of the extremes that int8-static is calibrated with, besides the user's images


@dataclass(frozen=True)
class Export:
    """A finished ONNX file; bytes and sha256 include weights in a second file."""

    path: Path
    files: tuple[str, ...]
    bytes: int
    sha256: str
    opset: int
    ir: int
    nodes: int
    form: Form


def export_onnx(
    model: nn.Module,
    path: Path,
    form: Form = PLAIN,
    *,
    external: bool = False,
    calibration: np.ndarray | None = None,
    labels: Sequence[str] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Export:
    """Write `model` as ONNX: by default 'input' (batch, C, H, W) -> 'logits' (batch, classes), both float32.

    model       float32 with a `pretrained_cfg`; it is copied, so its own state stays as it is. Batch norms are merged
                into other weights, and `check_parity` then says that these are not the model's
    form        see form.Form; image_size is the caller's to apply (see truth.at_image_size)
    external    put the weights into a second file beside it, as anything over 2 GB must
    calibration  normalised images (N, C, H, W), from which int8-static takes its ranges
    labels      class names, stored in the file's metadata
    provenance  where the weights come from, JSON-able and free of paths, stored in the metadata

    The same model gives the same bytes in every process and folder.

    Raises:
        GrowkitError: weights that are not float32, or a form that does not fit the model.
    """
    others = sorted({str(p.dtype) for p in model.parameters()} - {"torch.float32"})
    if others:
        raise GrowkitError(f"model has {others[0]} weights; export float32: call model.float() first")
    prepared = preprocessing(model)
    if form.pixels:
        refuse_unfit(prepared)
    core = captured(model, prepared.input_size, form)
    if not any(node.op_type == "Attention" for node in core.graph.node):  # the operator cannot express the model's
        form = replace(form, attention="unfused")
    proto = converted(core, prepared, form, calibration)
    if form.pixels:
        proto = with_pixels(proto, prepared, form.batch)
    proto = with_output(proto, form)
    props = {
        "growkit.version": __version__,
        "growkit.provenance": json.dumps(dict(provenance or {}), sort_keys=True),
        KEY: form.text(),
        "preprocessing": json.dumps(asdict(prepared)),
    }
    if labels is not None:
        props["labels"] = json.dumps(list(labels), ensure_ascii=False)
    proto = finished(proto, form, props)
    nodes = len(proto.graph.node)
    files = write_graph(proto, path, external=external)
    return Export(
        path=path,
        files=tuple(file.name for file in files),
        bytes=sum(file.stat().st_size for file in files),
        sha256=sha256_of(*files),
        opset=form.opset,
        ir=form.ir,
        nodes=nodes,
        form=form,
    )


def converted(
    core: onnx.ModelProto, prepared: Preprocessing, form: Form, calibration: np.ndarray | None
) -> onnx.ModelProto:
    """Convert `core` to the precision of `form`; inputs and outputs stay float32.

    Raises:
        GrowkitError: int8-static without calibration images, images of another shape, or weights over 2 GB.
    """
    if form.precision == "fp32":
        return core
    if weight_bytes(core) > LIMIT:
        raise GrowkitError(f"--precision {form.precision}: weights over 2 GB are written in float32 alone")
    if calibration is not None:  # before made images are put beside them, which would hide that there are none
        refuse_images(core, calibration, "calibration images")
    if form.precision == "int8":
        return int8_dynamic(core)
    if form.precision == "int8-static":
        if calibration is None:
            raise GrowkitError("--precision int8-static takes its ranges from images: give --data")
        # black, white or noisy images occur in service, too; they widen the ranges a little at almost no cost
        outer = [image for seed in OUTER_SEEDS for image in extremes(prepared, seed).values()]
        return int8_static(core, np.concatenate([calibration, *outer]))
    if form.precision == "bf16":
        return brain(core)
    made = np.concatenate([noise_images(prepared, 8, 0), *extremes(prepared, 0).values()])
    images = made if calibration is None else np.concatenate([made, calibration])
    # ONNX Runtime's CPU provider has these two in float16 from 1.17 on
    keep = ("LayerNormalization", "Softmax") if form.target == "ort-1.15" else ()
    return half(core, images=images, keep=keep)


def finished(proto: onnx.ModelProto, form: Form, props: Mapping[str, str]) -> onnx.ModelProto:
    """Set IR and metadata; strip what the exporter reveals of its machine: paths, sources, notes."""
    graph = proto.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer, graph):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    # quantize_dynamic trips over the exporter's inner shapes (ort#25890); the checker infers them
    graph.ClearField("value_info")
    proto.ClearField("doc_string")
    proto.ClearField("metadata_props")
    proto.ir_version = form.ir
    onnx.helper.set_model_props(proto, dict(props))
    return proto
