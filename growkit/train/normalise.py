"""Images in bytes until they are where they are used: a quarter of what float32 takes on the way there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normalisation:
    """What torchvision's ToTensor and Normalize do, bit for bit, of a batch and on its device.

    mean and std are of values between 0 and 1, one for each channel.
    """

    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) in bytes as the network takes them."""
        # a tensor of 255: CUDA divides by a plain number less exactly than the CPU
        full, mean, std = _per_channel(images.device, (255.0,), self.mean, self.std)
        # in place from here on: fresh memory costs a CPU more than the arithmetic
        return images.to(torch.float32, copy=True).div_(full).sub_(mean).div_(std)

    def changed(self, images: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Normalised images (N, C, H, W) after a `change` of their values between 0 and 1."""
        mean, std = _per_channel(images.device, self.mean, self.std)
        return change(images * std + mean).sub_(mean).div_(std)


def _per_channel(device: torch.device, *numbers: Sequence[float]) -> list[Tensor]:
    return [sent(torch.tensor(each), device).view(1, -1, 1, 1) for each in numbers]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; a copy to a GPU, from memory that stays in place, waits for nothing."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
