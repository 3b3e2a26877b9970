"""Two calls timed against each other, in interleaved pairs and random order.

Timing one side after the other reports over 10 % difference between a file and itself in a fifth of the runs on a
shared machine; pairs do not. Runs inside one session understate the variance, so each side gets several fresh sessions
and the bootstrap resamples sessions, then pairs. Pairs taken while other programs ran are dropped where enough others
remain.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from growkit.deploy.contention import CONTENDED

SESSIONS = 3  # fresh ones per side before an interval is believed
PAIRS = 20  # per session
HALF_WIDTH = 0.03  # of the interval; narrower is not worth more time
NOISY = 0.05  # |ratio - 1| + half width of a file against itself
SAMPLE_SECONDS = 0.004  # a shorter call is repeated: one wake-up would drown it
SETTLE_SECONDS = 0.005  # lets the other side's threads go to sleep
RESAMPLES = 2000
WINDOW_SECONDS = 0.25  # over which the load of other programs is measured; /proc/stat is no finer
CALM_PAIRS = 10  # that must remain when contended ones are dropped

Call = Callable[[], object]


@dataclass(frozen=True)
class Percentiles:
    """Milliseconds of single calls."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Comparison:
    """Time of `subject` / time of `baseline` at one batch size; low and high bound it at 95 %.

    pairs    how many the ratio and the milliseconds are computed from
    dropped  pairs left out because other programs ran meanwhile
    foreign  share of the processors that other programs took, mean over all pairs; None: unknown
    """

    subject: str
    baseline: str
    batch: int
    ratio: float
    low: float
    high: float
    sessions: int
    pairs: int
    subject_ms: Percentiles
    baseline_ms: Percentiles
    dropped: int = 0
    foreign: float | None = None

    @property
    def half_width(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2

    @property
    def noise(self) -> float:
        """How far from 1 the ratio may be; for a file against itself, the machine's own noise."""
        return abs(self.ratio - 1) + self.half_width


@dataclass
class _Pair:
    """Seconds of the calls of each side, their session, and the share that other programs took meanwhile."""

    session: int
    seconds: tuple[list[float], list[float]]
    foreign: float | None = None

    @property
    def log_ratio(self) -> float:
        """Logarithm of the subject's median over the baseline's."""
        subject, baseline = map(np.median, self.seconds)
        return math.log(subject / baseline)


def compare(
    open_subject: Callable[[], Call],
    open_baseline: Callable[[], Call],
    *,
    names: tuple[str, str] = ("subject", "baseline"),
    batch: int = 1,
    seconds: float = 12.0,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    foreign: Callable[[], float | None] = lambda: None,
) -> Comparison:
    """Time two sides in interleaved pairs, in random order, each after an un-timed call of its own.

    open_subject, open_baseline  make a fresh session and return the call to be timed
    seconds  stops after this; earlier when the interval is narrow enough
    foreign  returns the share of the processors that others took since its last call; None: unknown
    """
    generator = np.random.default_rng(seed)
    deadline = clock() + seconds
    pairs: list[_Pair] = []
    opened = told = 0
    share = seconds / SESSIONS
    foreign()
    asked = clock()
    while True:
        calls = (open_subject(), open_baseline())
        repeats = [_repeats(call, clock) for call in calls]
        until = min(deadline, clock() + share) if opened >= SESSIONS else clock() + share
        first = len(pairs)
        while len(pairs) - first < PAIRS and (len(pairs) - first < 2 or clock() < until):
            pairs.append(_Pair(opened, _took(calls, repeats, generator, clock, sleep)))
            if clock() - asked >= WINDOW_SECONDS:
                taken = foreign()
                for pair in pairs[told:]:
                    pair.foreign = taken
                asked, told = clock(), len(pairs)
        opened += 1
        if opened >= SESSIONS:
            kept = _calm(pairs)
            rounds = _rounds(kept)
            low, high = _interval(rounds, generator)
            if (high - low) / 2 < HALF_WIDTH or clock() >= deadline:
                break
    known = [pair.foreign for pair in pairs if pair.foreign is not None]
    return Comparison(
        subject=names[0],
        baseline=names[1],
        batch=batch,
        ratio=math.exp(float(np.median(np.concatenate(rounds)))),
        low=low,
        high=high,
        sessions=len(rounds),
        pairs=len(kept),
        subject_ms=percentiles([taken for pair in kept for taken in pair.seconds[0]]),
        baseline_ms=percentiles([taken for pair in kept for taken in pair.seconds[1]]),
        dropped=len(pairs) - len(kept),
        foreign=float(np.mean(known)) if known else None,
    )


def _took(
    calls: Sequence[Call],
    repeats: Sequence[int],
    generator: np.random.Generator,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> tuple[list[float], list[float]]:
    """Time one pair; return the seconds of each side's calls."""
    took: tuple[list[float], list[float]] = ([], [])
    for side in generator.permutation(2):
        sleep(SETTLE_SECONDS)
        calls[side]()
        for _ in range(repeats[side]):
            start = clock()
            calls[side]()
            took[side].append(clock() - start)
    return took


def _calm(pairs: list[_Pair]) -> list[_Pair]:
    """Return the pairs taken while no other program ran, if enough pairs and sessions remain; else all."""
    calm = [pair for pair in pairs if pair.foreign is None or pair.foreign <= CONTENDED]
    return calm if len(calm) >= CALM_PAIRS and len({pair.session for pair in calm}) >= SESSIONS else pairs


def _rounds(pairs: list[_Pair]) -> list[np.ndarray]:
    """Group the log ratios by session."""
    sessions = dict.fromkeys(pair.session for pair in pairs)
    return [np.array([pair.log_ratio for pair in pairs if pair.session == session]) for session in sessions]


def _repeats(call: Call, clock: Callable[[], float]) -> int:
    """Return how many calls make a sample last SAMPLE_SECONDS; warms the session up too."""
    fastest = math.inf
    for _ in range(3):
        start = clock()
        call()
        fastest = min(fastest, clock() - start)
        if fastest > 10 * SAMPLE_SECONDS:  # no later call will be that much faster
            break
    return max(1, min(20, math.ceil(SAMPLE_SECONDS / max(fastest, 1e-6))))


def _interval(rounds: list[np.ndarray], generator: np.random.Generator) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median ratio, resampling sessions and then pairs within each."""
    counts = np.array([len(ratios) for ratios in rounds])
    padded = np.full((len(rounds), counts.max()), np.nan)
    for row, ratios in zip(padded, rounds, strict=True):
        row[: len(ratios)] = ratios
    chosen = generator.integers(len(rounds), size=(RESAMPLES, len(rounds), 1))
    draws = generator.random((RESAMPLES, len(rounds), counts.max()))
    drawn = padded[chosen, (draws * counts[chosen]).astype(int)]
    # each session is weighted by its number of pairs
    drawn[np.arange(counts.max()) >= counts[chosen]] = np.nan
    medians = np.nanmedian(drawn.reshape(RESAMPLES, -1), axis=1)
    low, high = np.exp(np.quantile(medians, (0.025, 0.975)))
    return float(low), float(high)


def percentiles(seconds: list[float]) -> Percentiles:
    """Compute the percentiles, in milliseconds, of single calls given in seconds."""
    p50, p90, p99 = np.quantile(np.array(seconds) * 1000, (0.5, 0.9, 0.99))
    return Percentiles(float(p50), float(p90), float(p99))
