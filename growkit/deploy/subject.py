"""What can be compared with a reference: a PyTorch model, or an ONNX file under ONNX Runtime."""

import copy
import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from torch import nn

from growkit.deploy.bounded import bound_of, memory_bounded
from growkit.deploy.form import form_of
from growkit.deploy.numbers import in_batches
from growkit.deploy.parts import core_session
from growkit.deploy.runtime import open_session
from growkit.deploy.store import files_of, json_in, object_in, props_of, read_graph, refuse_missing
from growkit.deploy.structure import QUANTISERS
from growkit.deploy.truth import Preprocessing, logits_of, preprocessing, truth_of
from growkit.errors import GrowkitError
from growkit.files import plain, sha256_of


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a reference was written for, or what is compared with one.

    of              'model' or 'onnx'
    precision       fp32, fp16, bf16 or int8
    preprocessing   what a server does to an image; empty where the model does not say
    tensors_sha256  of a float32 model's weights by name, whatever file they lie in
    weights_sha256  of the file that holds the model's weights; an ONNX file records the one it was exported from
    labels          class names in order, where they are known
    """

    of: Literal["model", "onnx"]
    precision: str
    architecture: str | None = None
    preprocessing: dict[str, Any] = field(default_factory=dict)
    tensors_sha256: str | None = None
    weights_sha256: str | None = None
    onnx_sha256: str | None = None
    labels: list[str] | None = None

    @property
    def word(self) -> str:
        """What messages call it."""
        return "file" if self.of == "onnx" else "model"

    @property
    def size(self) -> list[int]:
        """Channels, height and width of its images."""
        return list(self.preprocessing["input_size"])


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model or an ONNX file that answers.

    run       images (B, C, H, W) float32 -> logits (B, classes)
    answers   as `run`, but as a reference stores it: a model's float64 logits, a file's own
    provider  where ONNX Runtime runs a file, 'cpu', 'cuda' or 'tensorrt'
    """

    identity: Identity
    run: Callable[[np.ndarray], np.ndarray]
    answers: Callable[[np.ndarray], np.ndarray]
    provider: str | None = None


def model_subject(
    model: nn.Module,
    *,
    weights_sha256: str | None = None,
    architecture: str | None = None,
    labels: Sequence[str] | None = None,
) -> Subject:
    """Wrap a PyTorch model, in its own precision and on its own device; dropout and the like are off.

    Raises:
        GrowkitError: it has no weights, or weights of a dtype that has no tolerance.
    """
    if any(module.training for module in model.modules()):
        model = copy.deepcopy(model).eval()
    first = next(model.parameters(), None)
    if first is None:
        raise GrowkitError(f"{type(model).__name__} has no weights to hold against anything")
    dtype = first.dtype
    names = {torch.float32: "fp32", torch.float64: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    if dtype not in names:
        raise GrowkitError(f"model has {dtype} weights; expected one of {', '.join(map(str, names))}")
    described = bool(getattr(model, "pretrained_cfg", None))

    @torch.inference_mode()
    def run(images: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(images).to(first)).double().cpu().numpy()

    @functools.cache
    def truth() -> nn.Module:
        return truth_of(model)

    return Subject(
        identity=Identity(
            of="model",
            precision=names[dtype],
            architecture=architecture,
            preprocessing=plain(asdict(preprocessing(model))) if described else {},
            tensors_sha256=tensors_sha256(model) if dtype is torch.float32 else None,
            weights_sha256=weights_sha256,
            labels=None if labels is None else list(labels),
        ),
        run=run,
        answers=lambda images: logits_of(truth(), images),
    )


def onnx_subject(file: Path, *, provider: str = "cpu") -> Subject:
    """Open an ONNX file under ONNX Runtime: the network in it, from normalised images to logits, whatever its form.

    Raises whatever ONNX and ONNX Runtime raise when they refuse the file, and
        GrowkitError: no such file, weights that lie elsewhere, or a provider that does not run here.
    """
    refuse_missing(file)
    proto = read_graph(file, weights=False)
    props = props_of(proto)
    provenance, prepared = object_in(props, "growkit.provenance"), object_in(props, "preprocessing")
    form, labels, files = form_of(props), json_in(props, "labels"), files_of(file)
    bound = bound_of(files)
    with memory_bounded(bound, provider=provider):
        if prepared:
            session = core_session(file, form, Preprocessing(**prepared), provider=provider)
        else:
            session = open_session(file, provider=provider)

    def run(images: np.ndarray) -> np.ndarray:
        with memory_bounded(bound, images.nbytes, provider=session.provider):
            return in_batches(session, images, form.batch or len(images))

    return Subject(
        identity=Identity(
            of="onnx",
            precision=precision_of(proto),
            architecture=_text(provenance.get("architecture")),
            preprocessing=prepared,
            weights_sha256=_text(provenance.get("weights_sha256")),
            onnx_sha256=sha256_of(*files),
            labels=list(map(str, labels)) if isinstance(labels, list) else None,
        ),
        run=run,
        answers=run,
        provider=session.provider,
    )


def precision_of(proto: onnx.ModelProto) -> str:
    """Return the lowest precision that the file computes in: fp32, fp16, bf16 or int8."""
    kinds = {tensor.data_type for tensor in proto.graph.initializer}
    if QUANTISERS & {node.op_type for node in proto.graph.node}:
        return "int8"
    if onnx.TensorProto.BFLOAT16 in kinds:
        return "bf16"
    return "fp16" if onnx.TensorProto.FLOAT16 in kinds else "fp32"


def tensors_sha256(model: nn.Module) -> str:
    """Return the SHA-256 of every weight and buffer by name, whatever file they are from and what wraps them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        name = re.sub(r"^(module\.|_orig_mod\.)+", "", name)  # put there by torch.compile and data parallelism
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
