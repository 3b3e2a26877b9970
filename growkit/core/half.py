"""float16 factors where TF32 would do: also ten bits of mantissa, but half the memory and twice the rate.

float16 has only a part of TF32's range. So factors are scaled by powers of two, which changes no mantissa bit, until
`growkit.core.contract.growth` says that no intermediate leaves float16's range.
"""

import logging
import math
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from growkit.errors import first_line, is_memory_full

log = logging.getLogger(__name__)
ROOM = 2**15  # float16 ends a little below 2^16
FARTHEST = 100  # largest exponent of a scale: float32 holds this power of two and its reciprocal


def may_halve(x: Tensor) -> bool:
    """Whether torch is allowed to multiply float32 matrices like this one in TF32, on a GPU that can."""
    if not x.is_cuda or x.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0)


def scales_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return, for each tensor, the power of two over which its largest magnitude is 1/2 to 1. Waits for no GPU."""
    _, exponents = torch.frexp(torch.stack([torch.linalg.vector_norm(tensor, math.inf) for tensor in tensors]))
    return torch.exp2(exponents.clamp(-FARTHEST, FARTHEST).to(tensors[0].dtype))


def power_above(value: Tensor) -> Tensor:
    """A power of two that is not below the value, and at least 1."""
    _, exponent = torch.frexp(value)
    return torch.exp2(exponent.clamp(min=0).to(value.dtype))


def halved(values: Tensor, factor: Tensor) -> Tensor:
    """Return the values times `factor` (), the reciprocal of their scale, in float16 and contiguous.

    Values below 2^-14 of the scale lose bits; those below 2^-25 become zero.
    """
    half = torch.empty(values.shape, dtype=torch.float16, device=values.device)
    scaled(values, factor, half)
    return half


def scaled(values: Tensor, scale: Tensor, out: Tensor) -> None:
    """Write values * scale () to `out`, whatever its strides."""
    kernels = kernels_for(values)
    if not kernels or not kernels.scaled(values, scale, out):
        torch.mul(values, scale, out=out)


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """Return growkit.core.kernels if they run on the tensor's device, else None."""
    return _kernels(tensor.device) if tensor.is_cuda else None


@lru_cache
def _kernels(device: torch.device) -> ModuleType | None:
    """Try the kernels: Triton does not support every system that CUDA runs on, and it needs a C compiler."""
    try:
        from growkit.core import kernels

        kernels.run_each(device)
    except Exception as error:  # Triton's, the compiler's or the driver's
        if is_memory_full(error):
            raise  # which says nothing about the kernels
        log.warning("Triton's kernels do not run here, cuBLAS takes their place (%s)", first_line(error, 160))
        return None
    return kernels
