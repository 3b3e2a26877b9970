"""Is the ONNX file as fast as its architecture allows? Interleaved pairs in random order.

Timing one side after the other reports over 10 % difference between a file and itself in a fifth of
the runs on a shared machine; pairs do not. Runs inside one session understate the variance, so
each side gets several fresh sessions and the bootstrap resamples sessions, then pairs. Before any
verdict the file is timed against itself: where even that differs, the machine is too noisy. Pairs
taken while other programs ran are dropped where enough others remain.
"""

import copy
import functools
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from growkit.deploy.capture import export_stock
from growkit.deploy.checks import Check, Verdict
from growkit.deploy.contention import CONTENDED, Contention
from growkit.deploy.form import Form
from growkit.deploy.parts import core_session, whole_session
from growkit.deploy.settings import VerifySettings
from growkit.deploy.truth import Preprocessing, noise_images, preprocessing
from growkit.errors import first_line
from growkit.float32 import multiplying

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


@dataclass(frozen=True)
class Latency:
    """Every comparison, the checks made of them, and where they ran.

    compile_seconds  what torch.compile took, by batch size; not part of any other time
    notes            what could not be compared, and why
    """

    comparisons: tuple[Comparison, ...]
    checks: tuple[Check, ...]
    provider: str
    threads: int
    compile_seconds: dict[int, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


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


def equivalence(comparison: Comparison, noise: float, limit: float) -> Verdict:
    """Judge by equivalence: pass when the whole interval is within `limit`, fail when it is above by more than `noise`.

    noise  of the same machine in the A/A run, as a fraction; above NOISY nothing passes
    """
    if comparison.low > limit * (1 + noise):
        return "fail"
    return "pass" if comparison.high <= limit and noise <= NOISY else "inconclusive"


@multiplying(tf32=False)  # for PyTorch; runtime.py does so for ONNX Runtime
def measure_latency(
    model: nn.Module,
    file: Path,
    settings: VerifySettings,
    *,
    stock: tuple[str, Mapping[str, Any]],
    form: Form | None = None,
    batches: tuple[int, ...] = (1, 8),
    progress: Callable[[int, str], None] = lambda done, note: None,
) -> Latency:
    """Time the ONNX `file` against itself, a stock export of the same architecture, and PyTorch.

    On a GPU every side takes images from host memory and returns logits to it. If PyTorch does not compile, a note
    says why.

    stock     name and arguments for timm.create_model
    form      of the file; if it takes pixels or outputs other than logits, only the network inside is timed
    progress  called with how many comparisons are done and which comes next

    Raises:
        GrowkitError: the provider does not run here.
    """
    form = form or Form()
    first = whole_session(file, form, provider=settings.provider)
    device = torch.device("cpu" if first.provider == "cpu" else "cuda")
    model = copy.deepcopy(model).eval().to(device)
    done = 0
    comparisons: list[Comparison] = []
    checks: list[Check] = []
    compile_seconds: dict[int, float] = {}
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        prepared = preprocessing(model)
        stock_file = Path(folder) / "stock.onnx"
        progress(done, "exporting the stock model")
        export_stock(*stock, torch.zeros(2, *prepared.input_size), stock_file)
        for batch in batches:
            images = noise_images(prepared, batch, settings.seed)
            tensor = torch.from_numpy(images)
            opening = functools.partial(_opening, images, prepared, first.provider)
            sides: dict[str, Callable[[], Call]] = {
                "itself": opening(file, form),
                "stock export": opening(stock_file, Form()),
                "PyTorch": functools.partial(_torch_call, model, tensor, device),
            }
            if settings.compiled and not notes:
                progress(done, f"compiling PyTorch at batch {batch}")
                try:
                    call, compile_seconds[batch] = _compile(model, tensor, device)
                    sides["PyTorch compiled"] = functools.partial(_same, call)
                except Exception as error:  # dynamo, the compiler and the driver each raise their own kinds
                    reason = first_line(error)
                    notes.append(f"PyTorch compiled was not timed, it does not compile here: {reason}")
            found = _compared(opening(file, form), sides, batch, settings, done, progress)
            done += 3 + settings.compiled
            comparisons += found.values()
            checks += _checks(found, settings)
        progress(done, "")
    return Latency(tuple(comparisons), tuple(checks), first.provider, first.threads, compile_seconds, tuple(notes))


def _opening(images: np.ndarray, prepared: Preprocessing, provider: str, file: Path, form: Form) -> Callable[[], Call]:
    """Return what opens a fresh session of the network in `file`, and returns the call that runs it on `images`."""

    def fresh() -> Call:
        session = core_session(file, form, prepared, provider=provider)
        return lambda: session.run(images)

    return fresh


def _compared(
    subject: Callable[[], Call],
    sides: Mapping[str, Callable[[], Call]],
    batch: int,
    settings: VerifySettings,
    done: int,
    progress: Callable[[int, str], None],
) -> dict[str, Comparison]:
    """Compare the file with each side by name; `done` comparisons were made before."""
    found: dict[str, Comparison] = {}
    for name, baseline in sides.items():
        progress(done + len(found), f"batch {batch} against {name}")
        found[name] = compare(
            subject,
            baseline,
            names=("file", name),
            batch=batch,
            seconds=settings.latency_seconds,
            seed=settings.seed + done + len(found),
            foreign=Contention().lap,
        )
    return found


def _checks(found: Mapping[str, Comparison], settings: VerifySettings) -> list[Check]:
    """Judge the comparisons at one batch size: with the stock export, and with PyTorch if its ratio is limited."""
    noise = found["itself"].noise
    checks = [latency_check(found["stock export"], noise, 1 + settings.latency_margin)]
    if settings.max_latency_ratio is not None:
        checks.append(latency_check(found["PyTorch"], noise, settings.max_latency_ratio))
    return checks


def _torch_call(model: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor, device: torch.device) -> Call:
    """Return a call that runs `model` on images from the host and copies its logits back."""

    @torch.inference_mode()
    def call() -> object:
        return model(tensor.to(device)).cpu()

    return call


def _compile(model: nn.Module, tensor: torch.Tensor, device: torch.device) -> tuple[Call, float]:
    """Compile the model for one batch size; return its call and the seconds that compiling took."""
    # fullgraph: past its recompilation limit torch would otherwise silently run uncompiled
    call = _torch_call(torch.compile(model, dynamic=False, fullgraph=True), tensor, device)
    start = time.perf_counter()
    call()
    return call, time.perf_counter() - start


def _same(call: Call) -> Call:
    return call


def latency_check(comparison: Comparison, noise: float, limit: float) -> Check:
    """Make the check of one comparison; its line has the interval and, where it matters, the noise."""
    verdict = equivalence(comparison, noise, limit)
    line = (
        f"batch {comparison.batch}: {comparison.ratio:.3f} x the time of {comparison.baseline} "
        f"[{comparison.low:.3f}, {comparison.high:.3f}], allowed {limit:.2f}"
    )
    itself = f"the file against itself may be off by {noise:.1%}"
    if noise > NOISY:
        noisy = "slower by more than the machine's noise" if verdict == "fail" else "the machine is too noisy"
        line += f"; {noisy}: {itself}"
        if comparison.foreign is not None and comparison.foreign > CONTENDED:
            line += f", and other programs took {comparison.foreign:.0%} of its processors"
    elif verdict == "inconclusive" and comparison.low > limit:
        line += f"; the interval is past the limit by no more than noise: {itself}"
    elif verdict == "inconclusive":
        line += "; the interval contains the limit, give it more time with --latency-seconds"
    name = f"batch {comparison.batch}: against {comparison.baseline}"
    return Check("latency", name, verdict, comparison.ratio, limit, line)
