"""Which device `--device` means."""

import torch

from growkit.errors import GrowkitError
from growkit.train.distributed import local_rank


def pick_device(name: str) -> torch.device:
    """The device of `--device auto|cpu|cuda[:N]`; under torchrun, cuda is the GPU with this process's number.

    Raises:
        GrowkitError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and local_rank() is not None:
        if name != "cuda":
            raise GrowkitError(f"--device {name}: torchrun gives each process a GPU of its own; give --device cuda")
        name = f"cuda:{local_rank()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise GrowkitError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        remedy = "--device cpu works" if local_rank() is None else "start as many with --nproc-per-node"
        raise GrowkitError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here; {remedy}")
    if device.index:  # else calls that name no device, such as pinning memory or asking a GPU's name, use the first
        torch.cuda.set_device(device)
    return device
