"""Tiny models with every parameter random, and edits of an ONNX graph that plant defects.

timm's fresh models have zero biases, which hides whatever is lost of them.
"""

import numpy as np
import onnx
import timm
import torch
from onnx import numpy_helper
from torch import nn

NAME = "vit_tiny_patch16_224"
ARGUMENTS = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 7,
}


def make_model(seed: int = 0, name: str = NAME, **changed: int) -> nn.Module:
    """A tiny model in eval mode; norms scatter around 1 and the rest around 0."""
    model = timm.create_model(name, **{**ARGUMENTS, **changed})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            centre = 1.0 if "norm" in key and key.endswith("weight") else 0.0
            parameter.copy_(centre + 0.1 * noise)
    return model.eval()


def tensors(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Stored tensors by name."""
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


def replace(proto: onnx.ModelProto, name: str, value: np.ndarray | np.float32) -> None:
    """Give the stored tensor `name` another value."""
    (tensor,) = (t for t in proto.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), name))


def scalar(proto: onnx.ModelProto, value: float) -> str:
    """Name of the stored number `value`."""
    found = [n for n, v in tensors(proto).items() if v.size == 1 and np.allclose(v, value)]
    assert len(found) == 1, found
    return found[0]
