"""How far a file of each precision may be from its model; None where a rule says nothing there."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one precision; errors are against the model in float64, in standard deviations of its logits."""

    relative_rms: float
    largest: float | None
    noise_ratio: float | None
    invariance: float | None
    cosine: float | None
    cosine_min: float | None
    accuracy_drop: float


LIMITS = {
    "fp32": Limits(
        relative_rms=1e-5,  # 13 x float32 noise of DeiT-S, a third of the smallest defect tried
        largest=1e-4,
        noise_ratio=3.0,
        invariance=1e-6,
        cosine=None,
        cosine_min=None,
        accuracy_drop=0.0,
    ),
}
