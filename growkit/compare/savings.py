"""What growth saved, from curves of score over FLOPs: pure arithmetic on numbers that were measured elsewhere.

saving = 1 - C / C_scratch, where C is the compute to reach the final score of training from scratch, operator training
included. A run that never reaches it is censored: its true cost exceeds what it spent, so its spending is used for C
and gives an upper bound on its saving.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Point = tuple[float, float]  # FLOPs so far, score


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` paired seeds with its 95 % interval (Student's t); no interval for a single seed."""

    mean: float
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True)
class Saving:
    """A share of the compute of training from scratch; if `reached` < `seeds`, the mean is an upper bound."""

    mean: float
    low: float | None
    high: float | None
    reached: int
    seeds: int

    @property
    def bound(self) -> bool:
        """Whether some seed never reached the target, so that the true saving is at most the mean."""
        return self.reached < self.seeds


def sign_of(metric: str) -> int:
    """1 where a higher score is better, -1 where a lower one is."""
    return 1 if metric == "top1" else -1


def name_of(metric: str) -> str:
    """The metric as people call it."""
    return "top-1" if metric == "top1" else metric


def shown(score: float | None, metric: str) -> str:
    """The score as people read it: 53.21% for top-1, 1.2345 for a loss; a dash if there is none."""
    return "–" if score is None else f"{score:.2%}" if metric == "top1" else f"{score:.4f}"


def curve_of(run: Mapping[str, Any], metric: str) -> list[Point]:
    """FLOPs and score along a run, as `Bench.train` gives it."""
    return [(flops, top1 if metric == "top1" else loss) for flops, top1, loss in run["curve"]]


def cost_of(run: Mapping[str, Any], target: float, metric: str) -> float | None:
    """FLOPs after which a run first reached the score `target`; None if it never did."""
    return flops_to(curve_of(run, metric), target, higher=sign_of(metric) > 0)


def estimate(values: Sequence[float], seeds: int | None = None) -> Estimate | None:
    """Mean and 95 % interval; None without values.

    Of fewer values than `seeds` there is no interval: it would say nothing of the seeds that failed.
    """
    count = len(values)
    if not count:
        return None
    mean = sum(values) / count
    if count == 1 or (seeds is not None and count < seeds):
        return Estimate(mean, None, None, count)
    from scipy.stats import t

    half = float(t.ppf(0.975, count - 1)) * statistics.stdev(values) / count**0.5
    return Estimate(mean, mean - half, mean + half, count)


def flops_to(curve: Sequence[Point], target: float, *, higher: bool) -> float | None:
    """FLOPs at which a curve first reaches `target`, linearly interpolated; None if it never does.

    `higher` says that a higher score is better.
    """
    sign = 1 if higher else -1
    if not curve:
        return None
    if sign * curve[0][1] >= sign * target:
        return curve[0][0]
    for (before, low), (after, high) in pairwise(curve):
        if sign * high >= sign * target:
            return before + (after - before) * (target - low) / (high - low)
    return None


def saving(
    costs: Sequence[float | None],
    spent: Sequence[float],
    scratch: Sequence[float],
    *,
    source: float = 0.0,
    seeds: int | None = None,
) -> Saving | None:
    """The saving over paired seeds; None without any.

    Args:
        costs: FLOPs to the target for each seed, None where it was never reached.
        spent: total FLOPs of each seed's run.
        scratch: FLOPs of training from scratch to the same target.
        source: FLOPs of training the source, if they are to count.
        seeds: how many were requested; without an interval if training from scratch failed in some.
    """
    values = [
        1 - ((used if cost is None else cost) + source) / alone
        for cost, used, alone in zip(costs, spent, scratch, strict=True)
    ]
    found = estimate(values, seeds)
    if found is None:
        return None
    reached = sum(cost is not None for cost in costs)
    whole = reached == len(costs)
    return Saving(found.mean, found.low if whole else None, found.high if whole else None, reached, len(costs))
