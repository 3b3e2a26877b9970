"""A file that takes pixels or outputs other than logits: does the whole agree with its parts?

The network inside is checked on its own (numbers.py); here, what comes before and after it is checked.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from scipy.special import softmax

from growkit.deploy.checks import Check, check, refused
from growkit.deploy.form import Form
from growkit.deploy.inputs import as_file_takes, as_model_takes
from growkit.deploy.numbers import in_batches
from growkit.deploy.runtime import Session
from growkit.deploy.truth import Preprocessing

SOFTMAX = 1e-5  # largest difference of a probability from the softmax of the logits inside
LEVELS = 2  # of 255: how far one pixel may be off; seen: 1, and 2 where noise is enlarged a hundredfold
SHARE = 0.03  # of the pixels may be off at all; seen: 0.018
ROUNDING = 0.5  # of a level: a smaller difference does not count


def answer(form: Form, logits: np.ndarray) -> dict[str, np.ndarray]:
    """Return what a file of this form must output if the network inside gives `logits` (B, classes)."""
    if form.output == "logits":
        return {"logits": logits}
    probabilities = softmax(logits.astype(np.float64), axis=1)
    if form.top is None:
        return {"probabilities": probabilities}
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, : form.top]
    return {"scores": np.take_along_axis(probabilities, order, axis=1), "classes": order}


def answer_checks(got: Mapping[str, np.ndarray], logits: np.ndarray, form: Form, name: str) -> list[Check]:
    """Check the outputs `got` of the whole file against the `logits` of the network inside."""
    checks, expected = [], answer(form, logits)
    for output, wanted in expected.items():
        label = f"{name}: {output}"
        if output not in got or got[output].shape != wanted.shape:
            found = str(got[output].shape) if output in got else "missing"
            checks.append(check("answers", f"{label}: shape", False, found, str(wanted.shape)))
            continue
        if output == "classes":  # of equal probabilities either class may come first
            every = softmax(logits.astype(np.float64), axis=1)
            given = got[output]
            inside = ((given >= 0) & (given < every.shape[1])).all()
            taken = np.take_along_axis(every, given.clip(0, every.shape[1] - 1), axis=1)
            off = float(np.abs(taken - expected["scores"]).max()) if inside else float("inf")
        else:
            scale = max(1.0, float(np.abs(wanted).max()))
            off = float(np.abs(got[output] - wanted).max()) / scale
        checks.append(check("answers", f"{label}: off from the network's", off <= SOFTMAX, off, SOFTMAX))
    return checks


def pixel_checks(
    whole: Session,
    front: Session,
    core: Session,
    prepared: Preprocessing,
    form: Form,
    given: Mapping[str, Image.Image],
) -> tuple[list[Check], dict[str, Any]]:
    """Compare how the file and timm prepare each picture, in levels of 0..255; then check the whole file's outputs.

    front  the file's own preprocessing: pixels -> normalised image
    core   the network inside: normalised images -> logits
    """
    std = np.asarray(prepared.std, dtype=np.float64).reshape(1, -1, 1, 1)
    checks: list[Check] = []
    figures: dict[str, Any] = {}
    batch = form.batch or 2
    for name, picture in given.items():
        wanted = as_model_takes(prepared, [picture])
        levels = np.repeat(as_file_takes(picture), batch, axis=0)
        try:
            got = front.run(levels)
            answers = whole.outputs(levels)
            logits = in_batches(core, got, batch)
        except Exception as error:  # ONNX Runtime has its own kinds
            checks.append(refused("pixels", name, error))
            continue
        if got.shape[1:] != wanted.shape[1:]:
            checks.append(check("pixels", f"{name}: shape", False, str(got.shape[1:]), str(wanted.shape[1:])))
            continue
        off = np.abs(got.astype(np.float64) - wanted) * std * 255
        most, share = float(off.max()), float((off > ROUNDING).mean())
        figures[name] = {"levels": most, "share": share}
        checks += [
            check("pixels", f"{name}: levels off", most <= LEVELS + ROUNDING, most, LEVELS),
            check("pixels", f"{name}: share of pixels off", share <= SHARE, share, SHARE),
            *answer_checks(answers, logits, form, name),
        ]
    return checks, figures
