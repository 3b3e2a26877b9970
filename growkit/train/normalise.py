"""Normalisation on the device: images stay uint8 until they are there, a quarter of the bytes that float32 takes."""

from collections.abc import Sequence
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
        return self.of(values(images))

    def of(self, values: Tensor) -> Tensor:
        """Turn images (N, C, H, W) with values between 0 and 1 into network input, in place."""
        # in place, because fresh memory costs a CPU more than the arithmetic
        own = (torch.tensor(each, dtype=values.dtype) for each in (self.mean, self.std))
        mean, std = (sent(each, values.device).view(1, -1, 1, 1) for each in own)
        return values.sub_(mean).div_(std)


def values(images: Tensor) -> Tensor:
    """Return uint8 images as float32 between 0 and 1."""
    # by a tensor of 255: CUDA divides by a plain number less exactly than the CPU
    full = sent(torch.tensor(255, dtype=torch.float32), images.device)
    # a GPU converts while it divides; a CPU would convert all into memory of its own first
    return torch.div(images, full) if images.is_cuda else images.float().div_(full)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on `device`; a copy to a GPU goes through pinned memory and does not block."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
