"""A folder as a user has it: a small model and a few images; and commands that work there."""

from pathlib import Path
from typing import Any

import numpy as np
import timm
from pairs import published_scale, tiny
from PIL import Image

SIZES = ("--set", "embed_dim=16", "--set", "depth=2", "--set", "num_heads=2", "--set", "img_size=16")
TO = ("--to", "vit_tiny", "--set", "embed_dim=32", "--set", "depth=3", "--set", "num_heads=4")


def furnish(folder: Path) -> None:
    """Put `images` of three classes, the model `small` of seven and the model `fitting` of three into a folder."""
    for name, classes in (("small", 7), ("fitting", 3)):
        architecture = tiny(16, 2, 2, num_classes=classes)
        config: dict[str, Any] = {"architecture": "vit_tiny_patch16_224", "model_args": dict(architecture.arguments)}
        del config["model_args"]["num_classes"]
        model = published_scale(architecture)
        timm.models.save_for_hf(model, str(folder / name), model_config=config, safe_serialization=True)
    generator = np.random.default_rng(0)
    for split, each in (("train", 7), ("val", 4)):
        for index, label in enumerate(("cat", "dog", "elk")):
            (folder / "images" / split / label).mkdir(parents=True)
            for number in range(each):
                pixels = generator.integers(0, 60, (16, 16, 3)) + 60 * index
                Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / split / label / f"{number}.png")
