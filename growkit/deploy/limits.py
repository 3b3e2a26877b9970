"""How far a file of each precision may be from the model, and how sure its accuracy must be.

The numbers behind them: examples/results/precision_2-cpu-cores_2026-11-24.md, made by
examples/benchmarks/precision.py.
"""

import math
from dataclasses import dataclass

from growkit.deploy.checks import Verdict

Z95 = 1.959964  # normal quantile of a two-sided 95 % interval


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a file of one precision must keep to; None: not judged."""

    relative_rms: float
    """Largest RMS error of the logits / their standard deviation: a ceiling, whatever the model."""
    noise_ratio: float
    """Largest error / that of PyTorch in the same precision (growkit.deploy.yardstick), both against float64."""
    cosine: float
    """Smallest median, over images, of the cosine between the file's logits and the model's."""
    cosine_min: float
    """Smallest cosine of a single image."""
    largest: float | None
    """Largest difference of one logit / standard deviation of the logits."""
    invariance: float | None
    """Largest relative RMS change of an image's logits when it comes in another batch."""
    accuracy_drop: float | None
    """Largest loss of top-1 accuracy, in points, where there is labelled data; one sample is always allowed."""
    whole_interval: bool = False
    """Whether the 95 % interval of the loss must lie below accuracy_drop too; if it does not, more data is needed."""


LIMITS = {
    "fp32": Limits(
        relative_rms=1e-5,
        noise_ratio=3.0,
        cosine=0.999999,
        cosine_min=0.999999,
        largest=1e-4,
        invariance=1e-6,
        accuracy_drop=None,
    ),
    "fp16": Limits(
        relative_rms=5e-3,
        noise_ratio=2.0,
        cosine=0.9999,
        cosine_min=0.9995,
        largest=None,
        invariance=1e-3,
        accuracy_drop=0.1,
    ),
    "bf16": Limits(
        relative_rms=3e-2,
        noise_ratio=2.0,
        cosine=0.999,
        cosine_min=0.995,
        largest=None,
        invariance=1e-2,
        accuracy_drop=0.5,
    ),
    # 5.6e-2: 25 dB of signal to noise
    "int8": Limits(
        relative_rms=5.6e-2,
        noise_ratio=1.5,
        cosine=0.999,
        cosine_min=0.995,
        largest=None,
        invariance=None,  # activations are scaled over the batch
        accuracy_drop=1.0,
        whole_interval=True,
    ),
    "int8-static": Limits(
        relative_rms=5.6e-2,
        noise_ratio=2.0,
        cosine=0.999,
        cosine_min=0.995,
        largest=None,
        invariance=1e-2,
        accuracy_drop=1.0,
        whole_interval=True,
    ),
}
"""By precision; 'int8' scales activations dynamically, 'int8-static' by calibration data."""


def accuracy_verdict(limits: Limits, drop: float, high: float, samples: int) -> Verdict:
    """Judge a loss on so many samples, and the upper end of its interval."""
    allowed = limits.accuracy_drop
    if allowed is None:
        return "pass"
    if limits.whole_interval:
        return "pass" if high <= allowed else "fail" if drop > allowed else "inconclusive"
    return "pass" if drop <= max(allowed, 100 / samples) * (1 + 1e-9) else "fail"


def accuracy_drop_interval(lost: int, won: int, n: int) -> tuple[float, float, float]:
    """Return the points of accuracy that a file loses against the model: (drop, low, high), the 95 % interval.

    lost, won  how many of the n samples only the model gets right, and only the file

    The interval is Tango's (1998), from the score test for paired proportions. If no sample changes it still has the
    width that N implies, where a bootstrap's and Wald's are empty.
    """

    def score(drop: float) -> float:
        """Return the standard errors between the drop seen and a true `drop`; falls as `drop` grows."""
        b = (2 * n - lost + won) * drop - lost - won
        c = -won * drop * (1 - drop)
        # maximum-likelihood share of samples won, under `drop`
        share = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
        variance = n * (2 * share + drop * (1 - drop))
        distance = lost - won - n * drop
        return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)

    def crossing(level: float, low: float, high: float) -> float:
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if score(middle) > level else (low, middle)
        return (low + high) / 2

    seen = (lost - won) / n
    return 100 * seen, 100 * crossing(Z95, -1.0, seen), 100 * crossing(-Z95, seen, 1.0)
