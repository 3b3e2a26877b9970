"""Classify images with a file of `growkit export`: ONNX Runtime, NumPy and Pillow, nothing else.

    python classify.py run/onnx/model.onnx photo.jpg

Size, mean, std and class names are the file's own metadata; the steps are those of timm's evaluation transform.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class Classifier:
    """An exported file and what it wants done to an image first."""

    def __init__(self, file: Path, threads: int = 0):
        """Load `file`; `threads` compute one answer, 0 means one for each core."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # a pool that spins between requests takes the cores from whoever decodes the next image
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.wanted = json.loads(metadata["preprocessing"])
        self.labels = json.loads(metadata["labels"]) if "labels" in metadata else None
        self.input = self.session.get_inputs()[0].name
        channels, height, width = self.wanted["input_size"]
        if self.wanted["crop_mode"] not in ("center", "squash") or height != width or channels not in (1, 3):
            raise ValueError(f"{file}: this example does not prepare images as {self.wanted}")

    def prepare(self, image: Image.Image) -> np.ndarray:
        """An image as (1, channels, height, width) float32."""
        channels, size, _ = self.wanted["input_size"]
        image = image.convert("RGB" if channels == 3 else "L")
        edge = math.floor(size / self.wanted["crop_pct"])
        width, height = image.size
        if self.wanted["crop_mode"] == "squash":
            scaled = (edge, edge)
        else:  # the shorter side becomes `edge`
            scaled = (edge, int(edge * height / width)) if width <= height else (int(edge * width / height), edge)
        image = image.resize(scaled, FILTERS[self.wanted["interpolation"]])
        left, top = (round((side - size) / 2) for side in scaled)
        pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255
        mean, std = (np.asarray(self.wanted[name], np.float32) for name in ("mean", "std"))
        return ((pixels.reshape(size, size, channels) - mean) / std).transpose(2, 0, 1)[None]

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Prepared images (B, channels, height, width) -> (B, classes)."""
        return self.session.run(["logits"], {self.input: np.ascontiguousarray(images)})[0]

    def best(self, image: Image.Image, count: int = 5) -> list[dict[str, object]]:
        """The `count` most likely classes of one image."""
        (logits,) = self.logits(self.prepare(image))
        odds = np.exp(logits - logits.max())
        order = np.argsort(-logits, kind="stable")[:count]
        return [
            {
                "class": int(index),
                "label": self.labels[index] if self.labels else None,
                "probability": float(odds[index] / odds.sum()),
            }
            for index in order
        ]


if __name__ == "__main__":
    model, *photos = sys.argv[1:]
    classifier = Classifier(Path(model))
    for photo in photos:
        print(json.dumps({"image": photo, "best": classifier.best(Image.open(photo))}))
