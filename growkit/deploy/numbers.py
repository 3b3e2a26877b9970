"""Does the file answer like the model? Compared with the model in float64, which its float32 only approximates."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import chdtri  # scipy.stats would take half a second to load

from growkit.deploy.checks import Check, check, refused
from growkit.deploy.limits import Limits
from growkit.deploy.runtime import Session

RARE = 1e-4


@dataclass(frozen=True)
class Truth:
    """The images and the model's logits for them.

    images    (N, C, H, W) float32
    expected  logits in float64 (N, classes)
    plain     by batch size: logits of PyTorch in the file's own precision, in batches of that size
    extremes  by name: an image (1, C, H, W) and its logits in float64
    batches   batch sizes to try, smallest first; all images go through in the smallest
    """

    images: np.ndarray
    expected: np.ndarray
    plain: Mapping[int, np.ndarray]
    extremes: Mapping[str, tuple[np.ndarray, np.ndarray]]
    batches: tuple[int, ...]

    @property
    def spread(self) -> float:
        """Standard deviation of the logits: the unit of every error."""
        return float(self.expected.std())

    def own(self, batch: int | None = None) -> float:
        """Return PyTorch's relative RMS error in the file's precision, over all images or in one batch of this size.

        0 where it overflows.
        """
        plain = self.plain[self.batches[0] if batch is None else batch]
        error = relative(rms(plain - self.expected[: len(plain)]), self.spread)
        return error if math.isfinite(error) else 0.0


@np.errstate(invalid="ignore", over="ignore")  # checks of their own report NaN and infinities
def number_checks(session: Session, truth: Truth, limits: Limits) -> tuple[list[Check], dict[str, Any]]:
    """Run every batch size and every extreme; return checks of the groups numbers and predictions, and figures.

    session  images -> logits
    """
    checks: list[Check] = []
    per_batch: dict[str, Any] = {}
    got: dict[int, np.ndarray] = {}
    usual = truth.own()
    for batch in truth.batches:
        name = f"batch {batch}"
        try:
            answers = in_batches(session, truth.images if batch == truth.batches[0] else truth.images[:batch], batch)
        except Exception as error:  # of ONNX Runtime's own kinds; which batch fails is what counts
            checks.append(refused("numbers", name, error))
            continue
        # the smallest batch is run on all images and shows the true noise; a run of few may show more by chance
        noise = 0.0 if batch == truth.batches[0] else max(usual, truth.own(batch))
        made, figures = compared(name, answers, truth.expected[: len(answers)], truth.spread, limits, noise=noise)
        checks += made
        if figures:
            got[batch], per_batch[str(batch)] = answers, figures
    overall: dict[str, Any] = {}
    if got:
        pairs = [(g, truth.expected[: len(g)], truth.plain[b]) for b, g in got.items()]
        off = rms(np.concatenate([(g - e).ravel() for g, e, _ in pairs]))
        own = rms(np.concatenate([(p - e).ravel() for _, e, p in pairs]))
        ratio = off / own if own > 0 else (1.0 if off == 0 else math.inf)
        if math.isfinite(own):  # in float16 PyTorch may overflow where the file does not
            passed = ratio <= limits.noise_ratio
            checks.append(check("numbers", "error / PyTorch's own", passed, ratio, limits.noise_ratio))
        angles = float(np.median(np.concatenate([cosines(g, e) for g, e, _ in pairs])))
        checks.append(check("numbers", "median cosine", angles >= limits.cosine, angles, limits.cosine))
        if limits.invariance is not None and 1 in got:
            checks += [_invariant(got[1], got[b], b, truth.spread, limits.invariance) for b in got if b > 1]
        made, overall["predictions"] = predictions(
            np.concatenate([g for g, _, _ in pairs]), np.concatenate([e for _, e, _ in pairs]), "predictions", limits
        )
        checks += made
        overall |= {"noise_ratio": ratio, "torch_relative_rms": relative(own, truth.spread)}
    extremes: dict[str, Any] = {}
    for name, (image, wanted) in truth.extremes.items():
        try:
            answers = in_batches(session, image, truth.batches[0])
        except Exception as error:
            checks.append(refused("numbers", name, error))
            continue
        made, extremes[name] = compared(name, answers, wanted, truth.spread, limits, noise=usual)
        checks += made
    return checks, {
        "images": len(truth.images),
        "logits_std": truth.spread,
        "batches": per_batch,
        "extremes": extremes,
        **overall,
    }


def in_batches(session: Session, images: np.ndarray, batch: int) -> np.ndarray:
    """Run all images in batches of exactly this size; the last is padded, and the padding's answers are dropped."""
    lacking = -len(images) % batch
    filled = np.concatenate([images, np.repeat(images[-1:], lacking, axis=0)]) if lacking else images
    answers = [session.run(filled[start : start + batch]) for start in range(0, len(filled), batch)]
    return np.concatenate(answers)[: len(images)]


def compared(
    name: str,
    got: np.ndarray,
    wanted: np.ndarray,
    spread: float,
    limits: Limits,
    group: str = "numbers",
    *,
    noise: float = 0.0,
) -> tuple[list[Check], dict[str, Any]]:
    """Compare the logits of one run, (B, classes) each; return checks, and figures unless the shapes differ.

    noise  relative RMS error that the precision costs this model anyway; few values may show more by chance
    """
    if got.shape != wanted.shape:
        line = f"{name}: logits {got.shape}, expected {wanted.shape}"
        return [check(group, f"{name}: shape", False, str(got.shape), str(wanted.shape), line)], {}
    difference = got.astype(np.float64) - wanted
    finite = bool(np.isfinite(got).all())
    figures = {
        "relative_rms": relative(rms(difference), spread),
        "largest_over_std": relative(float(np.abs(difference).max()), spread),
        "largest": float(np.abs(difference).max()),
        "relative_rms_allowed": max(limits.relative_rms, noise * by_chance(got.size)),
    }
    limited = [
        ("relative RMS error", figures["relative_rms"], figures["relative_rms_allowed"]),
        ("largest error / std", figures["largest_over_std"], limits.largest),
    ]
    checks = [
        check(group, f"{name}: finite", finite, "yes" if finite else "no", "yes"),
        # not `v > limit`, which NaN is not
        *(check(group, f"{name}: {w}", v <= limit, v, limit) for w, v, limit in limited if limit is not None),
    ]
    figures["cosine_min"] = float(cosines(got, wanted).min())
    if wanted.shape[1] < 2:  # with one class the cosine is only a sign, which noise flips where the logit is near 0
        return checks, figures
    smallest = float(cosines(got, wanted, spread).min())
    checks.append(check(group, f"{name}: smallest cosine", smallest >= limits.cosine_min, smallest, limits.cosine_min))
    return checks, figures


def predictions(
    got: np.ndarray, expected: np.ndarray, group: str, limits: Limits
) -> tuple[list[Check], dict[str, Any]]:
    """Check that no certified prediction changes.

    Certified: the top-1 leads by more than twice the largest difference, so no difference of that size
    can change it. A difference above its own limit does not raise that threshold.
    """
    if got.shape != expected.shape or got.shape[1] < 2:
        return [], {}
    difference = np.abs(got.astype(np.float64) - expected)
    largest = float(np.nanmax(difference, initial=0.0))
    bound = largest if limits.largest is None else min(largest, limits.largest * float(expected.std()))
    top = np.sort(expected, axis=1)
    certified = top[:, -1] - top[:, -2] > 2 * bound
    changed = got.argmax(axis=1) != expected.argmax(axis=1)
    broken = int((changed & certified).sum())
    line = (
        f"{broken} of {int(certified.sum())} certified predictions changed "
        f"({int(changed.sum())} of {len(changed)} in all)"
    )
    return [check(group, "certified predictions changed", broken == 0, broken, 0, line)], {
        "samples": len(changed),
        "certified": int(certified.sum()),
        "changed": int(changed.sum()),
        "certified_changed": broken,
        "largest_difference": largest,
    }


def cosines(got: np.ndarray, wanted: np.ndarray, spread: float = 0.0) -> np.ndarray:
    """Return the cosine of the angle between the logits, image by image.

    spread  standard deviation of all logits. Where an image's logits are much smaller than that in model and file
            alike, as is common with few classes, their direction means little: noise turns it far. So the angle counts
            as the one by which the same noise would turn logits of the usual length.
    """
    a, b = got.astype(np.float64), wanted.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    length, longer = lengths[0] * lengths[1], np.maximum(*lengths)
    cosine = np.where(length > 0, (a * b).sum(axis=1) / np.where(length > 0, length, 1), 1.0)
    usual = spread * math.sqrt(wanted.shape[1])
    share = np.minimum(longer / usual, 1.0) if usual > 0 else 1.0
    return 1 - (1 - cosine) * share**2


def by_chance(values: int) -> float:
    """Return how many times its true RMS noise may reach over `values` values: it exceeds that once in 10,000 times.

    The root of a chi-square quantile over its degrees of freedom: 3.9 for one value, 2.1 for seven, 1.1 for a thousand.
    """
    return math.sqrt(chdtri(values, RARE) / values)


def rms(values: np.ndarray) -> float:
    """Root of the mean square."""
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def relative(value: float, spread: float) -> float:
    """Return `value` in units of `spread`."""
    if spread > 0:
        return value / spread
    return 0.0 if value == 0 else math.inf


def _invariant(alone: np.ndarray, got: np.ndarray, batch: int, spread: float, limit: float) -> Check:
    name = f"batch {batch}: same as one by one"
    moved = relative(rms(got.astype(np.float64) - alone[:batch]), spread)
    return check("numbers", name, moved <= limit, moved, limit)
