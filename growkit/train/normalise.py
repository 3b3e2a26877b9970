"""Normalisation on the device: images stay uint8 until they are there, a quarter of the bytes that float32 takes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normalisation:
    """Does what torchvision's ToTensor and Normalize do, bit for bit, to a batch on its device.

    mean and std have one value per channel, for pixel values between 0 and 1.
    """

    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, images: Tensor) -> Tensor:
        """Turn uint8 images (N, C, H, W) into network input."""
        # a tensor of 255: CUDA divides by a plain number less exactly than the CPU
        full, mean, std = _per_channel(images.device, (255.0,), self.mean, self.std)
        # in place from here on: fresh memory costs a CPU more than the arithmetic
        return images.to(torch.float32, copy=True).div_(full).sub_(mean).div_(std)

    def changed(self, images: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply `change` to the values between 0 and 1 of normalised images (N, C, H, W), in place."""
        mean, std = _per_channel(images.device, self.mean, self.std)
        return change(images.mul_(std).add_(mean)).sub_(mean).div_(std)


def _per_channel(device: torch.device, *numbers: Sequence[float]) -> list[Tensor]:
    return [sent(torch.tensor(each), device).view(1, -1, 1, 1) for each in numbers]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on `device`; a copy to a GPU goes through pinned memory and does not block."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
