"""The whole workflow in miniature: scikit-learn's digits as an image folder, and a page with the results."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from growkit.errors import GrowkitError
from growkit.files import whole_folder
from growkit.record import RunFolder
from growkit.report.page import Report, Section, Table
from growkit.report.plot import Plot, Series
from growkit.report.run import run_report

# The source and the model it is grown into: DeiT's shape at the size of 8 x 8 images.
INPUT = ("--set", "img_size=8", "--set", "patch_size=2", "--set", "in_chans=1")
SMALL = ("--set", "embed_dim=32", "--set", "depth=2", "--set", "num_heads=2")
LARGE = ("--set", "embed_dim=64", "--set", "depth=4", "--set", "num_heads=4")
# Digits must not be mirrored and fill their image; starting workers takes longer than reading the images.
AUGMENTATION = (
    "--hflip",
    "0",
    "--scale-min",
    "0.8",
    "--color-jitter",
    "0",
    "--workers",
    "0",
    "--seed",
    "0",
)


def write_digits(folder: Path) -> int:
    """Write scikit-learn's 1,797 digits (8 x 8, grey) as an ImageFolder, a fifth of each class for validation.

    Returns the number of images.

    Raises:
        GrowkitError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise GrowkitError("the demo needs scikit-learn: pip install 'growkit[demo]'") from None
    from PIL import Image

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    with whole_folder(folder) as partial:
        seen: dict[int, int] = {}
        for index in order:
            label = int(digits.target[index])
            seen[label] = seen.get(label, 0) + 1
            split = "val" if seen[label] % 5 == 0 else "train"
            place = partial / split / str(label)
            place.mkdir(parents=True, exist_ok=True)
            pixels = (digits.images[index] * 255 / 16).round().astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{index:04d}.png")
    return len(order)


def equal_compute(run: RunFolder) -> int:
    """Updates from scratch that cost the bigger model as much as operator training and fine-tuning together.

    An update of the bigger model costs the same from scratch as in fine-tuning.
    """
    grown, tuned = figures(run, "grow"), figures(run, "finetune")
    spent = grown["operator"]["flops"] + tuned["flops"]
    return max(1, round(spent / tuned["flops_per_step"]))


def figures(run: RunFolder, command: str) -> dict[str, Any]:
    """The figures of the latest step of a command."""
    return next(dict(step["figures"]) for step in reversed(run.steps()) if step["command"] == command)


def demo_report(run: RunFolder, baseline: RunFolder) -> Report:
    """The run's own report, with a comparison to the same model trained from scratch for the same compute."""
    rows, plot = comparison(run, baseline)
    story = Section(
        title="What growing gave",
        text=(
            "Every score is on the same validation images. From scratch means the same bigger model, trained for the "
            "compute that operator training and fine-tuning took together; the source's own training is extra, "
            "since it was there.\n"
            "Eight-by-eight digits show that every step works. They do not show what growth saves: this is one "
            "seed, and one image more or less is 0.3 points."
        ),
        table=Table(COLUMNS, rows),
        plots=(plot,),
    )
    whole = run_report(run)
    return replace(
        whole, title="growkit demo: digits, a small ViT grown into a bigger one", sections=(story, *whole.sections)
    )


COLUMNS = ("model", "top-1", "loss", "TFLOP of training")


def comparison(run: RunFolder, baseline: RunFolder) -> tuple[list[tuple[str, float, float, float]], Plot]:
    """The demo's five models as table rows, and validation loss over training compute as a plot."""
    source, grown, tuned = (figures(run, command) for command in ("train", "grow", "finetune"))
    scratch = figures(baseline, "train")
    operator = grown["operator"]["flops"]
    scores = grown["scores"]

    def row(name: str, found: Mapping[str, Any], flops: float) -> tuple[str, float, float, float]:
        return name, found["top1"], found["loss"], flops / 1e12

    rows = [
        row("source", scores["source"], source["flops"]),
        row("grown, step 0", scores["step0"], 0),
        row("grown, operator trained", scores["operator"], operator),
        row("grown, fine-tuned", tuned["best"], operator + tuned["flops"]),
        row("from scratch, same compute", scratch["best"], scratch["flops"]),
    ]
    started = [(0.0, scores["step0"]["loss"]), (operator / 1e12, scores["operator"]["loss"])]
    plot = Plot(
        title="Validation loss over training compute",
        series=(
            Series("grown", [*started, *_curve(tuned, operator)]),
            Series("from scratch", _curve(scratch, 0)),
        ),
        x_label="TFLOP of training",
        y_label="validation loss",
    )
    return rows, plot


def _curve(fitted: Mapping[str, Any], before: float) -> list[tuple[float, float]]:
    return [((before + p["step"] * fitted["flops_per_step"]) / 1e12, p["loss"]) for p in fitted["history"]]
