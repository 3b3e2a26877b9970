"""Latency verdicts on made-up clocks, and one real measurement."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from deploy_models import ARGUMENTS, NAME, make_model
from torch import nn

from growkit.deploy import latency as latency_module
from growkit.deploy import runtime, timing
from growkit.deploy.contention import Contention
from growkit.deploy.latency import equivalence, latency_check, measure_latency
from growkit.deploy.runtime import PROVIDERS
from growkit.deploy.settings import VerifySettings
from growkit.deploy.timing import Comparison, Percentiles, compare, percentiles
from growkit.errors import GrowkitError


class Machine:
    """A clock that only its calls move. `drift` is a slowdown that comes and goes over seconds."""

    def __init__(self, seed: int, noise: float, drift: float = 0.0, session_noise: float = 0.0):
        self.now = 0.0
        self.generator = np.random.default_rng(seed)
        self.noise, self.drift, self.session_noise = noise, drift, session_noise
        self.opened = 0
        self.order: list[str] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def side(self, name: str, seconds: float) -> Callable[[], Callable[[], None]]:
        def fresh() -> Callable[[], None]:
            self.opened += 1
            bias = np.exp(self.session_noise * self.generator.standard_normal())

            def call() -> None:
                self.order.append(name)
                wave = 1 + self.drift * np.sin(self.now)
                jitter = np.exp(self.noise * self.generator.standard_normal())
                self.now += seconds * bias * wave * jitter

            return call

        return fresh

    def compare(self, ratio: float, seconds: float = 12.0) -> Comparison:
        return compare(
            self.side("subject", 0.02 * ratio),
            self.side("baseline", 0.02),
            seconds=seconds,
            clock=self.clock,
            sleep=self.sleep,
        )


@pytest.mark.parametrize("drift", [0.0, 0.5])
@pytest.mark.parametrize(("ratio", "verdict"), [(1.0, "pass"), (0.7, "pass"), (1.5, "fail")])
def test_ratio_gives_its_verdict_even_while_the_machine_drifts(ratio: float, verdict: str, drift: float) -> None:
    alone = Machine(1, noise=0.02, drift=drift).compare(1.0)
    measured = Machine(2, noise=0.02, drift=drift).compare(ratio)
    assert measured.low < ratio * 1.02
    assert measured.high > ratio * 0.98
    assert measured.subject_ms.p50 / measured.baseline_ms.p50 == pytest.approx(ratio, rel=0.15)
    assert equivalence(measured, alone.noise, 1.10) == verdict


@pytest.mark.parametrize(
    ("ratio", "verdict", "why"),
    [
        (0.5, "inconclusive", "the machine is too noisy: the file against itself may be off by"),
        (1.0, "inconclusive", "the machine is too noisy"),
        (1.3, "inconclusive", "the machine is too noisy"),
        (3.0, "fail", "slower by more than the machine's noise: the file against itself may be off by"),
    ],
)
def test_on_a_noisy_machine_nothing_passes_and_only_what_is_far_slower_fails(
    ratio: float, verdict: str, why: str
) -> None:
    alone = Machine(3, noise=0.3, session_noise=0.1).compare(1.0, seconds=3.0)
    measured = Machine(4, noise=0.3).compare(ratio, seconds=3.0)
    assert alone.noise > 0.05
    made = latency_check(measured, alone.noise, 1.10)
    assert made.verdict == verdict
    assert why in made.line


def test_interval_that_holds_the_limit_is_inconclusive() -> None:
    times = Percentiles(1, 1, 1)
    close = Comparison("file", "stock export", 1, 1.1, 1.08, 1.12, 3, 60, times, times)
    made = latency_check(close, noise=0.01, limit=1.10)
    assert made.verdict == "inconclusive"
    assert "--latency-seconds" in made.line


def test_session_bias_widens_the_interval() -> None:
    steady = Machine(5, noise=0.01).compare(1.0, seconds=1.0)
    biased = Machine(5, noise=0.01, session_noise=0.05).compare(1.0, seconds=1.0)
    assert biased.half_width > 2 * steady.half_width


def test_false_regressions_are_rare_over_many_runs() -> None:
    verdicts = []
    for seed in range(20):
        machine = Machine(100 + seed, noise=0.03, drift=0.3, session_noise=0.01)
        alone = machine.compare(1.0)
        verdicts.append(equivalence(machine.compare(1.0), alone.noise, 1.10))
    assert verdicts.count("fail") == 0
    assert verdicts.count("pass") >= 18


def test_pairs_are_interleaved_in_random_order_with_fresh_sessions() -> None:
    machine = Machine(6, noise=0.01)
    compared = machine.compare(1.0, seconds=100.0)
    assert compared.sessions == 3  # whose interval is narrow enough
    assert machine.opened == 2 * compared.sessions
    # the un-timed call and the timed one of a side follow each other; then it is the other's turn
    pairs = machine.order[6:86]  # the first session, after its three warming calls per side
    turns = [pairs[i] for i in range(0, len(pairs), 2)]
    firsts = turns[::2]
    assert pairs[0::2] == pairs[1::2]
    assert all(a != b for a, b in zip(turns[::2], turns[1::2], strict=True))
    assert {"subject", "baseline"} == set(firsts)


def test_time_runs_out_at_the_budget_and_percentiles_are_milliseconds() -> None:
    machine = Machine(7, noise=0.3)
    compared = machine.compare(1.0, seconds=6.0)
    assert machine.now < 8.0
    assert compared.baseline_ms.p50 == pytest.approx(20, rel=0.2)
    assert compared.baseline_ms.p50 < compared.baseline_ms.p90 < compared.baseline_ms.p99
    assert percentiles([place / 1000 for place in range(101)]) == Percentiles(*map(pytest.approx, (50, 90, 99)))


@pytest.mark.parametrize(("seconds", "opening", "pairs"), [(0.001, 0.0, 3 * 2), (3.0, 10.0, 3 * 12)])
def test_three_sessions_get_their_share_of_the_time_however_long_they_open(
    seconds: float, opening: float, pairs: int
) -> None:
    machine = Machine(10, noise=0.0)

    def opened() -> Callable[[], None]:
        machine.sleep(opening)
        return machine.side("", 0.02)()

    compared = compare(opened, opened, seconds=seconds, clock=machine.clock, sleep=machine.sleep)
    assert (compared.sessions, compared.pairs) == (3, pairs)  # a pair is two calls of each side and two pauses


@pytest.mark.parametrize(
    ("took", "calls", "repeats"),
    [
        ((0.001, 0.001, 0.001), 3, 4),
        ((0.020, 0.001, 0.009), 3, 4),
        ((0.020, 0.020, 0.020), 3, 1),
        ((1e-7, 1e-7, 1e-7), 3, 20),
        ((0.1, 0.001, 0.001), 1, 1),  # too slow to be asked again
    ],
)
def test_short_calls_are_repeated_until_they_last(took: tuple[float, ...], calls: int, repeats: int) -> None:
    machine, left = Machine(0, noise=0.0), list(took)
    assert timing._repeats(lambda: machine.sleep(left.pop(0)), machine.clock) == repeats
    assert len(left) == 3 - calls


def test_pair_of_short_calls_is_judged_by_the_median_of_each_sides() -> None:
    machine = Machine(0, noise=0.0)
    compare(machine.side("a", 0.001), machine.side("b", 0.001), seconds=0.001, clock=machine.clock, sleep=machine.sleep)
    assert sorted([machine.order[6:11], machine.order[11:16]]) == [["a"] * 5, ["b"] * 5]  # un-timed, then four
    assert timing._Pair(0, ([1.0, 1.0, 9.0], [2.0, 2.0, 2.0])).log_ratio == pytest.approx(np.log(0.5))


SEVEN = np.log(np.arange(1.0, 8.0))


@pytest.mark.parametrize(
    ("rounds", "low", "high"),
    [
        # of seven draws from 1 to 7 the median is 1 in 1.0 % of all cases, and 2 or less in 10.8 %
        ([np.full(5, one) for one in SEVEN], 2, 6),
        ([SEVEN], 2, 6),
        # of four draws all are the one short session in 0.4 %, three or more in 5.1 %
        ([np.log([2.0]), *[np.zeros(20)] * 3], 1, 1),
    ],
    ids=["sessions", "pairs", "short session"],
)
def test_interval_is_that_of_the_median_over_sessions_and_pairs_drawn_anew(
    rounds: list[np.ndarray], low: float, high: float
) -> None:
    assert timing._interval(rounds, np.random.default_rng(0)) == pytest.approx((low, high))


def test_noise_counts_a_ratio_on_either_side_of_one() -> None:
    times = Percentiles(1, 1, 1)
    for ratio in (0.9, 1.1):
        compared = Comparison("file", "itself", 1, ratio, ratio - 0.02, ratio + 0.02, 3, 60, times, times)
        assert compared.noise == pytest.approx(0.12)


@pytest.mark.parametrize(
    ("noise", "low", "high", "verdict", "why"),
    [
        (0.01, 1.02, 1.05, "fail", "allowed 1.00"),
        (0.01, 1.005, 1.05, "inconclusive", "past the limit by no more than noise"),
        (0.01, 0.99, 1.05, "inconclusive", "contains the limit"),
        (0.01, 0.90, 0.99, "pass", "allowed 1.00"),
        (0.06, 0.90, 0.99, "inconclusive", "too noisy"),
        (0.06, 1.05, 1.10, "inconclusive", "too noisy"),
        (0.06, 1.07, 1.10, "fail", "slower by more than the machine's noise"),
        (0.4, 2.9, 3.1, "fail", "may be off by 40.0%"),
    ],
)
def test_only_an_interval_past_the_limit_by_more_than_noise_fails(
    noise: float, low: float, high: float, verdict: str, why: str
) -> None:
    times = Percentiles(1, 1, 1)
    compared = Comparison("file", "PyTorch", 1, (low + high) / 2, low, high, 3, 60, times, times)
    made = latency_check(compared, noise=noise, limit=1.0)
    assert made.verdict == verdict
    assert why in made.line


class Neighbour:
    """Another program that comes and goes, and slows the subject down while it runs."""

    def __init__(self, machine: Machine, busy: Callable[[float], bool], told: bool = True):
        self.machine, self.busy, self.told = machine, busy, told
        self.asked = 0.0
        self.laps: list[float] = []

    def subject(self) -> Callable[[], None]:
        def call() -> None:
            slowed = 1.5 if self.busy(self.machine.now) else 1.0
            self.machine.now += 0.02 * slowed * np.exp(0.01 * self.machine.generator.standard_normal())

        return call

    def foreign(self) -> float | None:
        times = np.linspace(self.asked, self.machine.now, 100)
        self.laps.append(self.machine.now - self.asked)
        self.asked = self.machine.now
        return float(np.mean([0.5 * self.busy(time) for time in times])) if self.told else None

    def compare(self) -> Comparison:
        return compare(
            self.subject,
            self.machine.side("baseline", 0.02),
            seconds=12.0,
            clock=lambda: self.machine.now,
            sleep=self.machine.sleep,
            foreign=self.foreign,
        )


def now_and_then(now: float) -> bool:
    return now % 2 > 0.9


def test_pairs_taken_beside_another_program_are_dropped() -> None:
    neighbour = Neighbour(Machine(8, noise=0.01), now_and_then)
    compared = neighbour.compare()
    assert compared.ratio == pytest.approx(1.0, abs=0.02)
    assert compared.dropped >= compared.pairs / 2
    assert compared.subject_ms.p90 < 21  # a call beside the neighbour takes 30 ms
    assert compared.foreign == pytest.approx(0.5 * 0.55, abs=0.05)
    # asked before anything is timed, then never after a shorter window than /proc/stat resolves
    assert min(neighbour.laps[1:]) >= 0.25
    unknown = Neighbour(Machine(8, noise=0.01), now_and_then, told=False).compare()
    assert unknown.ratio > 1.2  # what dropping kept out
    assert (unknown.dropped, unknown.foreign) == (0, None)


def test_no_pair_is_dropped_where_too_few_would_remain() -> None:
    compared = Neighbour(Machine(9, noise=0.01), lambda now: True).compare()
    assert compared.ratio == pytest.approx(1.5, abs=0.05)
    assert compared.dropped == 0
    assert compared.foreign == pytest.approx(0.5)


def test_what_ran_before_the_first_pair_is_not_held_against_it() -> None:
    neighbour = Neighbour(Machine(8, noise=0.01), lambda now: now < 100)
    neighbour.machine.now = 100.0
    compared = neighbour.compare()
    assert (compared.dropped, compared.foreign) == (0, 0.0)


@pytest.mark.parametrize(
    ("sessions", "calm", "kept"), [(3, 10, 10), (3, 9, 19), (2, 10, 20)], ids=["enough", "few pairs", "few sessions"]
)
@pytest.mark.parametrize("told", [0.15, None])
def test_calm_pairs_alone_are_kept_where_they_are_ten_of_three_sessions(
    sessions: int, calm: int, kept: int, told: float | None
) -> None:
    pairs = [timing._Pair(place % sessions, ([1.0], [1.0]), told) for place in range(calm)]
    pairs += [timing._Pair(place % 3, ([1.0], [1.0]), 0.16) for place in range(10)]
    assert len(timing._calm(pairs)) == kept


def test_noisy_check_says_what_other_programs_took() -> None:
    times = Percentiles(1, 1, 1)
    crowded = Comparison("file", "PyTorch", 1, 1.0, 0.9, 1.1, 3, 60, times, times, dropped=0, foreign=0.4)
    assert "other programs took 40% of its processors" in latency_check(crowded, noise=0.2, limit=1.0).line
    calm = Comparison("file", "PyTorch", 1, 1.0, 0.9, 1.1, 3, 60, times, times, dropped=0, foreign=0.1)
    assert "other programs" not in latency_check(calm, noise=0.2, limit=1.0).line


def test_model_that_does_not_compile_is_a_note_and_the_rest_is_timed(
    model: nn.Module, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> nn.Module:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCH_LOGS")

    monkeypatch.setattr(torch, "compile", refuse)
    monkeypatch.setattr(latency_module, "export_stock", lambda *given: shutil.copy(exported, given[-1]))
    told: list[int] = []
    latency = measure_latency(
        model,
        exported,
        VerifySettings(latency_seconds=0.01, compiled=True),
        stock=(NAME, ARGUMENTS),
        batches=(1, 2),
        progress=lambda done, note: told.append(done),
    )
    assert [c.baseline for c in latency.comparisons] == ["itself", "stock export", "PyTorch"] * 2
    (note,) = latency.notes
    assert note.endswith("does not compile here: InvalidCxxCompiler: No working C++ compiler found")
    assert latency.compile_seconds == {}
    assert told[-1] == 8


def test_every_comparison_has_its_sides_its_time_its_own_seed_and_what_others_take(
    model: nn.Module, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    opened: list[str] = []

    def compared(subject, baseline, *, names, batch, seconds, seed, foreign):  # type: ignore[no-untyped-def]
        assert (seconds, foreign.__func__) == (7.0, Contention.lap)
        seeds.append(seed)
        subject(), baseline()
        times, ratio = Percentiles(1, 1, 1), 1.0 if names[1] == "itself" else 1.25
        return Comparison(*names, batch, ratio, ratio - 0.01, ratio + 0.01, 3, 60, times, times)

    monkeypatch.setattr(latency_module, "compare", compared)
    monkeypatch.setattr(latency_module, "core_session", lambda file, *_, **__: opened.append(file.name))
    monkeypatch.setattr(latency_module, "export_stock", lambda *given: None)
    settings = VerifySettings(latency_seconds=7.0, latency_margin=0.2, seed=5)
    latency = measure_latency(model, exported, settings, stock=(NAME, ARGUMENTS), batches=(1, 2))
    assert seeds == [5, 6, 7, 8, 9, 10]
    assert opened == ["model.onnx", "model.onnx", "model.onnx", "stock.onnx", "model.onnx"] * 2
    assert [(c.limit, c.verdict) for c in latency.checks] == [(1.2, "fail")] * 2


def test_a_torch_without_the_gpu_that_onnx_runtime_has_is_told_with_the_remedy(
    model: nn.Module, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROVIDERS, "cuda", PROVIDERS["cpu"])
    monkeypatch.setattr(runtime, "_wanted", lambda provider: {provider: {}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(GrowkitError, match=r"on cuda, but torch \S+ sees no GPU .* or give --no-latency$"):
        measure_latency(model, exported, VerifySettings(provider="auto"), stock=(NAME, ARGUMENTS))


@pytest.mark.slow  # compiles
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="no C++ compiler")
def test_compiled_pytorch_is_compared_and_its_compiling_is_not_in_the_times(model: nn.Module, exported: Path) -> None:
    settings = VerifySettings(latency_seconds=0.2, max_latency_ratio=1e-6, compiled=True)
    latency = measure_latency(model, exported, settings, stock=(NAME, ARGUMENTS), batches=(1,))
    assert latency.notes == ()
    (compared,) = (c for c in latency.comparisons if c.baseline == "PyTorch compiled")
    assert compared.baseline_ms.p99 / 1000 < latency.compile_seconds[1] / 10
    assert [c.name for c in latency.checks] == ["batch 1: against stock export", "batch 1: against PyTorch"]


def test_real_file_is_timed_against_itself_the_stock_export_and_pytorch(exported: Path) -> None:
    told: list[tuple[int, str]] = []
    products: set[str] = set()
    seen: set[tuple[bool, bool]] = set()
    model = make_model().train()
    model.register_forward_pre_hook(lambda own, _: seen.add((own.training, torch.is_inference_mode_enabled())))

    def progress(done: int, note: str) -> None:
        told.append((done, note))
        products.add(torch.backends.cudnn.conv.fp32_precision)

    settings = VerifySettings(latency_seconds=0.2, max_latency_ratio=1e-6)
    latency = measure_latency(model, exported, settings, stock=(NAME, ARGUMENTS), batches=(1,), progress=progress)
    assert "tf32" not in products  # ONNX Runtime does not multiply in it either
    assert seen == {(False, True)}
    assert model.training  # it is the user's
    assert [c.baseline for c in latency.comparisons] == ["itself", "stock export", "PyTorch"]
    assert [c.name for c in latency.checks] == [
        "batch 1: against stock export",
        "batch 1: against PyTorch",
    ]
    slow = latency.checks[1]
    assert slow.limit == 1e-6
    assert slow.verdict == "fail"  # however noisy the A/A run was
    assert (latency.provider, latency.threads) == ("cpu", torch.get_num_threads())
    assert all(0 < c.low <= c.ratio <= c.high for c in latency.comparisons)
    assert [done for done, _ in told] == [0, 0, 1, 2, 3]


@pytest.mark.slow
def test_deit_small_equals_its_stock_export(tmp_path: Path) -> None:
    import timm

    from growkit.deploy.export import export_onnx

    network = timm.create_model("deit_small_patch16_224").eval()
    export_onnx(network, tmp_path / "m.onnx")
    stock = ("deit_small_patch16_224", {})
    latency = measure_latency(
        network, tmp_path / "m.onnx", VerifySettings(latency_seconds=4), stock=stock, batches=(1,)
    )
    assert latency.checks[0].verdict in ("pass", "inconclusive"), latency.checks[0].line
