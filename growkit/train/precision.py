"""What --precision and --tf32 mean on a device."""

from contextlib import AbstractContextManager

import torch

from growkit.errors import GrowkitError
from growkit.train.settings import FitSettings


def precision_on(device: torch.device, precision: str) -> str:
    """Resolve `precision` (auto, fp32, bf16, fp16) on `device` to one of the last three."""
    if precision != "auto":
        return precision
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "fp32"


def amp_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype that `precision` (auto, fp32, bf16, fp16) means on `device`."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return dtypes[precision_on(device, precision)]


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Mixed precision for forward passes on `device`; does nothing for fp32."""
    dtype = amp_dtype(precision, device)
    enabled = dtype is not torch.float32
    return torch.autocast(device.type, dtype=dtype if enabled else None, enabled=enabled)


def refuse_tf32(settings: FitSettings, device: torch.device) -> None:
    """Raise GrowkitError if --tf32 is given for a device without TF32."""
    if settings.tf32 and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise GrowkitError(f"--tf32: {device} does not multiply in TF32, GPUs from Ampere on do; leave it out here")
