"""What growth saved, from curves of score over FLOPs: pure arithmetic on numbers that were measured elsewhere.

saving = 1 - C / C_scratch, where C is the compute to reach the score that training from scratch ends with, operator
training included. A run that never gets there is censored: its true cost is more than what it spent, so its saving is
at most what spending all that gives, and it counts as that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Point = tuple[float, float]  # FLOPs so far, score


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` paired seeds with its 95 % interval (Student's t); none for a single seed."""

    mean: float
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True)
class Saving:
    """A share of training from scratch's compute; where `reached` < `seeds`, the mean is an upper bound."""

    mean: float
    low: float | None
    high: float | None
    reached: int
    seeds: int

    @property
    def bound(self) -> bool:
        """Whether some seed never got there, so that the true saving is at most the mean."""
        return self.reached < self.seeds


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and 95 % interval; None without values."""
    count = len(values)
    if not count:
        return None
    mean = sum(values) / count
    if count == 1:
        return Estimate(mean, None, None, 1)
    from scipy.stats import t

    deviation = (sum((value - mean) ** 2 for value in values) / (count - 1)) ** 0.5
    half = float(t.ppf(0.975, count - 1)) * deviation / count**0.5
    return Estimate(mean, mean - half, mean + half, count)


def flops_to(curve: Sequence[Point], target: float, *, higher: bool) -> float | None:
    """FLOPs at which a curve first reaches `target`, between its points by a straight line; None where it never does.

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
    costs: Sequence[float | None], spent: Sequence[float], scratch: Sequence[float], *, source: float = 0.0
) -> Saving | None:
    """The saving over paired seeds; None without any.

    Args:
        costs: FLOPs to the target of each seed, None where it was never reached.
        spent: FLOPs that each seed's run took in all.
        scratch: FLOPs that training from scratch took to the same target.
        source: FLOPs of training the source, where they are to count.
    """
    values = [
        1 - ((used if cost is None else cost) + source) / alone
        for cost, used, alone in zip(costs, spent, scratch, strict=True)
    ]
    found = estimate(values)
    if found is None:
        return None
    reached = sum(cost is not None for cost in costs)
    whole = reached == len(costs)
    return Saving(found.mean, found.low if whole else None, found.high if whole else None, reached, len(costs))
