"""A tiny image folder, and a tiny model with everything a resumed run could lose."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

CONFIG = {
    "input_size": (3, 8, 8),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.2, 0.2),
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
}


def write_images(root: Path, split: str, classes: list[str], each: int) -> None:
    """`each` images per class, brighter from class to class."""
    rng = np.random.default_rng(len(split))
    for number, name in enumerate(classes):
        (root / split / name).mkdir(parents=True)
        for index in range(each):
            pixels = rng.integers(0, 120, (10, 9, 3)) + 40 * number
            Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{index}.png")


class Net(nn.Module):
    """Dropout, running statistics and one frozen layer around a classifier."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.skeleton = nn.Linear(3 * 8 * 8, 12).requires_grad_(False)
            self.norm = nn.BatchNorm1d(12)
            self.drop = nn.Dropout(0.3)
            self.head = nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.norm(self.skeleton(x.flatten(1))).relu()))
