"""Classify images with a file made by `growkit export`: ONNX Runtime, NumPy and Pillow, nothing else.

    python classify.py run/onnx/model.onnx photo.jpg

Size, mean, std and class names come from the file's own metadata; the steps are those of timm's evaluation transform. A
file made with --pixels takes the image as it is; files made with --output probabilities or top-K work too.
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
    """An exported file and the image preprocessing it expects."""

    def __init__(self, file: Path, threads: int = 0):
        """Load `file`; `threads` threads compute one answer, 0 means one for each core."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # a pool that spins between requests takes the cores from whoever decodes the next image
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.wanted = json.loads(metadata["preprocessing"])
        self.labels = json.loads(metadata["labels"]) if "labels" in metadata else None
        (given,) = self.session.get_inputs()
        self.input, self.pixels = given.name, given.type == "tensor(uint8)"
        self.outputs = [output.name for output in self.session.get_outputs()]
        channels, height, width = self.wanted["input_size"]
        if isinstance(given.shape[0], int) and given.shape[0] != 1:
            raise ValueError(f"{file}: takes {given.shape[0]} images at a time, this example sends one")
        if self.wanted["crop_mode"] not in ("center", "squash") or height != width or channels not in (1, 3):
            raise ValueError(f"{file}: this example does not prepare images as {self.wanted}")

    def prepare(self, image: Image.Image) -> np.ndarray:
        """An image as (1, channels, height, width) float32; as (1, height, width, channels) uint8 for --pixels."""
        channels, size, _ = self.wanted["input_size"]
        image = image.convert("RGB" if channels == 3 else "L")
        if self.pixels:
            return np.asarray(image).reshape(1, image.height, image.width, channels)
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

    def answer(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Prepared images -> the file's outputs by name."""
        answers = self.session.run(self.outputs, {self.input: np.ascontiguousarray(images)})
        return dict(zip(self.outputs, answers, strict=True))

    def best(self, image: Image.Image, count: int = 5) -> list[dict[str, object]]:
        """The `count` most likely classes of one image, or fewer if the file returns fewer."""
        found = {name: value[0] for name, value in self.answer(self.prepare(image)).items()}
        if "classes" in found:  # top-K
            classes, odds = found["classes"], found["scores"]
        else:
            odds = found.get("probabilities")
            if odds is None:
                odds = np.exp(found["logits"] - found["logits"].max())
                odds /= odds.sum()
            classes = np.argsort(-odds, kind="stable")
            odds = odds[classes]
        return [
            {
                "class": int(index),
                "label": self.labels[index] if self.labels else None,
                "probability": float(probability),
            }
            for index, probability in list(zip(classes, odds, strict=True))[:count]
        ]


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: classify.py MODEL.onnx PHOTO...")
    try:
        classifier = Classifier(Path(sys.argv[1]))
    except Exception as error:  # ONNX Runtime's own are of many kinds
        sys.exit(f"{sys.argv[1]}: ONNX Runtime does not open it ({str(error).splitlines()[0]}); give a model.onnx")
    for photo in sys.argv[2:]:
        try:
            image = Image.open(photo)
            image.load()
        except OSError as error:
            sys.exit(f"{photo}: no readable picture ({error})")
        print(json.dumps({"image": photo, "best": classifier.best(image)}))
