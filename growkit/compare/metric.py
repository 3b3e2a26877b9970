"""The score that arms and trials are judged by: top-1, or the loss."""

from collections.abc import Mapping
from typing import Any

from growkit.compare.savings import Point, flops_to


def sign_of(metric: str) -> int:
    """1 where a higher score is better, -1 where a lower one is."""
    return 1 if metric == "top1" else -1


def curve_of(run: Mapping[str, Any], metric: str) -> list[Point]:
    """FLOPs and score along a run, as `Bench.train` gives it."""
    return [(flops, top1 if metric == "top1" else loss) for flops, top1, loss in run["curve"]]


def cost_of(run: Mapping[str, Any], target: float, metric: str) -> float | None:
    """FLOPs after which a run first reached the score `target`; None if it never did."""
    return flops_to(curve_of(run, metric), target, higher=sign_of(metric) > 0)
