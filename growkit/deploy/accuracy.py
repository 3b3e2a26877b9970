"""Top-1 and top-5 of file and model on identical images, and how many images only one of them gets right."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from torch import Tensor, nn

from growkit.deploy.checks import Check, check, refused
from growkit.deploy.limits import Limits, accuracy_drop_interval, accuracy_verdict
from growkit.deploy.numbers import predictions, relative, rms
from growkit.deploy.truth import logits_of
from growkit.errors import GrowkitError
from growkit.mcnemar import mcnemar
from growkit.ranges import refuse_labels


def accuracy_checks(
    run: Callable[[np.ndarray], np.ndarray], model: nn.Module, data: Iterable[tuple[Tensor, Tensor]], limits: Limits
) -> tuple[list[Check], dict[str, Any]]:
    """Return checks and figures on labelled batches: images (B, C, H, W) and classes (B,).

    run  the file: images -> logits (B, classes); what it refuses, or answers with another shape, is a failed check

    Raises:
        GrowkitError: there is no labelled sample, or a label that has no logit.
    """
    answers = _answers(run, model, data)
    if isinstance(answers, Check):
        return [answers], {}
    got, plain, truth = answers
    refuse_labels(int(truth.min()), int(truth.max()), plain.shape[1])  # both get those wrong, hiding a loss
    spread = float(plain.std())
    off = relative(rms(got.astype(np.float64) - plain), spread)
    largest = relative(float(np.abs(got - plain).max()), spread)
    right, plain_right = _hits(got, truth, 1), _hits(plain, truth, 1)
    lost, won = int((plain_right & ~right).sum()), int((right & ~plain_right).sum())
    figures: dict[str, Any] = {
        "samples": len(truth),
        "top1": float(right.mean()),
        "torch_top1": float(plain_right.mean()),
        "top5": float(_hits(got, truth, 5).mean()),
        "torch_top5": float(_hits(plain, truth, 5).mean()),
        "n01": won,
        "n10": lost,
        "mcnemar_p": mcnemar(lost, won),
        "relative_rms": off,
        "largest_over_std": largest,
    }
    made, figures["predictions"] = predictions(got, plain, "accuracy", limits)
    summary = (
        f"top-1 {figures['top1']:.4f} against PyTorch's {figures['torch_top1']:.4f} on "
        f"{len(truth)} samples; {won} won, {lost} lost, McNemar p = {figures['mcnemar_p']:.3g}"
    )
    drop, low, high = accuracy_drop_interval(lost, won, len(truth))
    figures |= {"drop": drop, "drop_low": low, "drop_high": high}
    judged = []
    if limits.accuracy_drop is not None:
        judged.append(
            Check(
                "accuracy",
                "points of top-1 lost",
                accuracy_verdict(limits, drop, high, len(truth)),
                drop,
                limits.accuracy_drop,
                f"{summary}; {drop:+.2f} points lost [{low:.2f}, {high:.2f}], allowed {limits.accuracy_drop:g}",
            )
        )
    limited = [
        ("relative RMS difference", off, limits.relative_rms),
        ("largest difference / std", largest, limits.largest),
    ]
    return [
        *judged,
        *(dataclasses.replace(c, line=f"{summary}; {c.line}") for c in made),
        *(check("accuracy", n, v <= limit, v, limit) for n, v, limit in limited if limit is not None),
    ], figures


def _answers(
    run: Callable[[np.ndarray], np.ndarray], model: nn.Module, data: Iterable[tuple[Tensor, Tensor]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | Check:
    """Run file and model on all images; return the logits of both and the labels, or why they cannot be compared."""
    got, plain, labels = [], [], []
    for images, classes in data:
        batch = np.ascontiguousarray(images.cpu().numpy(), dtype=np.float32)
        plain.append(logits_of(model, batch))
        try:
            got.append(run(batch))
        except Exception as error:  # of ONNX Runtime's own kinds
            return refused("accuracy", "labelled images", error)
        if got[-1].shape != plain[-1].shape:
            return check("accuracy", "shape of logits", False, str(got[-1].shape), str(plain[-1].shape))
        labels.append(classes.cpu().numpy())
    if not got:
        raise GrowkitError("the data set holds no labelled sample; check --data")
    return np.concatenate(got), np.concatenate(plain), np.concatenate(labels)


def _hits(logits: np.ndarray, classes: np.ndarray, k: int) -> np.ndarray:
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return np.asarray((best == classes[:, None]).any(axis=1))
