"""Factors in float16 where TF32 would do: ten bits of mantissa as well, half the memory, twice the rate.

Of TF32's range float16 has a part. So factors are scaled by powers of two, which changes no bit of a mantissa.
"""

import math
from types import ModuleType

import torch
from torch import Tensor


def may_halve(x: Tensor) -> bool:
    """Whether torch is allowed to multiply float32 matrices like this one in TF32, on a GPU that can."""
    if not x.is_cuda or x.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0)


def scale_of(values: Tensor) -> Tensor:
    """The power of two, shape (), over which the largest of the values lies between 1/2 and 1. Waits for no GPU."""
    _, exponent = torch.frexp(torch.linalg.vector_norm(values, math.inf))
    return torch.exp2(exponent.to(values.dtype))


def halved(values: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The values over `scale`, their own if none is given, in float16 and contiguous; and the scale.

    What is below 2^-14 of it loses bits, below 2^-25 it is zero.
    """
    scale = scale_of(values) if scale is None else scale
    half = torch.empty(values.shape, dtype=torch.float16, device=values.device)
    scaled(values, 1 / scale, half)
    return half, scale


def scaled(values: Tensor, scale: Tensor, out: Tensor) -> None:
    """Write values * scale () to `out`, whatever its strides."""
    kernels = kernels_for(values)
    if not kernels or not kernels.scaled(values, scale, out):
        torch.mul(values, scale, out=out)


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """growkit.core.kernels where they run."""
    if not tensor.is_cuda:
        return None
    try:
        from growkit.core import kernels
    except ImportError:  # triton is not made for every system that CUDA runs on
        return None
    return kernels
