"""Latency verdicts on made-up clocks, and one real measurement."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from deploy_models import ARGUMENTS, NAME
from torch import nn

from growkit.deploy.latency import (
    Comparison,
    Percentiles,
    compare,
    latency_check,
    measure_latency,
    verdict_of,
)


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
    assert verdict_of(measured, alone.noise, 1.10) == verdict


@pytest.mark.parametrize("ratio", [1.0, 1.5])
def test_noisy_machine_is_inconclusive_never_pass_or_fail(ratio: float) -> None:
    alone = Machine(3, noise=0.5, session_noise=0.2).compare(1.0, seconds=3.0)
    measured = Machine(4, noise=0.5).compare(ratio, seconds=3.0)
    assert alone.noise > 0.05
    made = latency_check(measured, alone.noise, 1.10)
    assert made.verdict == "inconclusive"
    assert "too noisy" in made.line


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
        verdicts.append(verdict_of(machine.compare(1.0), alone.noise, 1.10))
    assert verdicts.count("fail") == 0
    assert verdicts.count("pass") >= 18


def test_pairs_are_interleaved_in_random_order_with_fresh_sessions() -> None:
    machine = Machine(6, noise=0.01)
    compared = machine.compare(1.0, seconds=100.0)
    assert compared.sessions >= 3
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


def test_real_file_is_timed_against_itself_the_stock_export_and_pytorch(model: nn.Module, exported: Path) -> None:
    told: list[tuple[int, str]] = []
    latency = measure_latency(
        model,
        exported,
        stock=(NAME, ARGUMENTS),
        batches=(1,),
        seconds=0.2,
        max_ratio=1e-6,
        progress=lambda done, note: told.append((done, note)),
    )
    assert [c.baseline for c in latency.comparisons] == ["itself", "stock export", "PyTorch"]
    assert [c.name for c in latency.checks] == [
        "batch 1: against stock export",
        "batch 1: against PyTorch",
    ]
    slow = latency.checks[1]
    assert slow.limit == 1e-6
    assert slow.verdict in ("fail", "inconclusive")  # the latter where the A/A run was noisy
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
    latency = measure_latency(network, tmp_path / "m.onnx", stock=stock, batches=(1,))
    assert latency.checks[0].verdict in ("pass", "inconclusive"), latency.checks[0].line
