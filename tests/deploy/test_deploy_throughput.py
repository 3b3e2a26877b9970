"""Images per second and shares of the peak, on made-up clocks and for a real file."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from deploy_models import make_model
from torch import nn

from growkit.deploy import throughput
from growkit.deploy.runtime import open_session
from growkit.deploy.settings import VerifySettings
from growkit.deploy.throughput import batches_up_to, count_macs, measure_throughput


class Machine:
    """A session takes 10 ms and 1 ms per image; a product of matrices what `products` says, in seconds.

    A list says it of each run.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, products: dict[int, Any]):
        self.now = 0.0
        self.products = products
        self.opened: list[dict[str, Any]] = []
        self.calls = 0
        monkeypatch.setattr(throughput, "open_session", self.open_product)
        monkeypatch.setattr(throughput, "core_session", self.open)

    def open_product(self, file: bytes, *, provider: str) -> Any:
        (tensor,) = onnx.load_model_from_string(file).graph.initializer
        return self.product(tensor.dims[0])

    def open(self, *_: object, provider: str, spinning: bool) -> Any:
        self.opened.append({"provider": provider, "spinning": spinning})
        return SimpleNamespace(run=self.run, provider="cpu", threads=3)

    def run(self, images: np.ndarray) -> None:
        self.calls += 1
        slow = 2.0 if self.calls <= 2 else 1.0  # the first calls of a session
        self.now += slow * (0.010 + 0.001 * len(images))

    def product(self, size: int) -> Any:
        def run(_: object) -> None:
            took = self.products[size]
            self.now += took.pop(0) if isinstance(took, list) else took

        binding = SimpleNamespace(bind_ortvalue_input=lambda *_: None, bind_output=lambda *_: None)
        inner = SimpleNamespace(io_binding=lambda: binding, run_with_iobinding=run)
        return SimpleNamespace(inner=inner, provider="cpu", input="input")


PRODUCTS = {512: 0.001, 1024: 0.005, 2048: 0.050}  # 268, 430 and 344 GFLOP/s


def test_rates_are_images_over_time_without_the_first_calls(
    model: nn.Module, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, PRODUCTS)
    told: list[tuple[int, str]] = []
    measured = measure_throughput(
        model,
        exported,
        VerifySettings(throughput_seconds=0.5),
        batches=(1,),
        clock=lambda: machine.now,
        progress=lambda done, note: told.append((done, note)),
    )
    (rate,) = measured.rates
    assert rate.images_per_second == pytest.approx(1 / 0.011)
    assert (rate.ms.p50, rate.ms.p99) == (pytest.approx(11), pytest.approx(11))
    assert rate.calls == pytest.approx(0.5 / 0.011, abs=1)
    assert rate.gflops == pytest.approx(2 * measured.macs_per_image / 0.011 / 1e9)
    assert rate.share == pytest.approx(rate.gflops / measured.peak_gflops)
    assert (measured.provider, measured.threads) == ("cpu", 3)
    assert machine.opened[-1] == {"provider": "cpu", "spinning": True}
    assert told == [(0, "images per second at batch 1"), (1, "")]


def test_budget_bounds_the_calls_but_a_few_are_always_made(
    model: nn.Module, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, PRODUCTS)
    settings = VerifySettings(throughput_seconds=0.0)
    measured = measure_throughput(model, exported, settings, batches=(1, 4), clock=lambda: machine.now)
    assert [rate.calls for rate in measured.rates] == [20, 3]
    assert measured.rates[1].images_per_second == pytest.approx(4 / 0.014)


def test_peak_is_the_best_size_and_looking_for_it_stops_where_products_are_slow(
    model: nn.Module, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, PRODUCTS)  # 4096 is never asked for
    settings = VerifySettings(throughput_seconds=0.0)
    measured = measure_throughput(model, exported, settings, batches=(1,), clock=lambda: machine.now)
    assert measured.peak_size == 1024
    assert measured.peak_gflops == pytest.approx(2 * 1024**3 / 0.005 / 1e9)


def test_peak_is_sought_again_between_the_rates(
    model: nn.Module, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, dict(PRODUCTS))
    monkeypatch.setattr(throughput, "Contention", lambda: SimpleNamespace(lap=lambda: 0.25))
    speeds = {0: 0.004, 1: 0.008}  # of the product after the rate at each batch size

    def progress(done: int, note: str) -> None:
        machine.products[1024] = speeds.get(done, 1.0)

    settings = VerifySettings(throughput_seconds=0.0)
    measured = measure_throughput(
        model, exported, settings, batches=(1, 4), clock=lambda: machine.now, progress=progress
    )
    assert measured.peak_gflops == pytest.approx(2 * 1024**3 / 0.004 / 1e9)
    assert measured.foreign == 0.25


def test_product_is_timed_after_its_first_run_and_the_best_of_five_bursts_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = [1.0, 0.0011, *[0.002] * 38, *[0.0011] * 19, *[0.002] * 38]  # 19 of 1.1 ms last 20
    machine = Machine(monkeypatch, {512: left})
    assert throughput._matmul_gflops(512, "cpu", lambda: machine.now) == pytest.approx(
        (2 * 512**3 / 0.0011 / 1e9, 0.0011)
    )
    assert left == []


def test_macs_are_those_of_the_architecture() -> None:
    # a transformer block by hand: qkv, scores, weighted sum, projection, two layers of the MLP
    tokens, width, depth, patch = 5, 64, 2, 8
    block = tokens * width * 3 * width + 2 * tokens * tokens * width + tokens * width * width
    block += 2 * tokens * width * 4 * width
    whole = (tokens - 1) * 3 * patch * patch * width + depth * block + width * 7
    network = make_model().train()
    assert count_macs(network, torch.zeros(1, 3, 16, 16)) == whole
    assert network.training  # it is the user's
    assert count_macs(make_model(), torch.zeros(3, 3, 16, 16)) == 3 * whole


@pytest.mark.slow
def test_macs_of_deit_small_are_the_published_ones() -> None:
    network = timm.create_model("deit_small_patch16_224").half()
    assert count_macs(network, torch.zeros(1, 3, 224, 224)) == pytest.approx(4.6e9, rel=0.01)


@pytest.mark.parametrize(("largest", "batches"), [(1, (1,)), (2, (1, 2)), (8, (1, 2, 4, 8)), (12, (1, 2, 4, 8, 12))])
def test_batch_sizes_double_up_to_the_largest(largest: int, batches: tuple[int, ...]) -> None:
    assert batches_up_to(largest) == batches


def test_real_file_has_rates_and_a_peak(model: nn.Module, exported: Path) -> None:
    measured = measure_throughput(model, exported, VerifySettings(throughput_seconds=0.02), batches=(1, 8))
    assert [rate.batch for rate in measured.rates] == [1, 8]
    for rate in measured.rates:
        assert 0 < rate.share < 1
        assert rate.ms.p50 <= rate.ms.p90 <= rate.ms.p99
    assert measured.peak_gflops > 1


def test_product_that_the_peak_is_taken_from_is_a_matrix_product() -> None:
    made = throughput._matmul(6)
    (weight,) = onnx.load_model_from_string(made).graph.initializer
    values = np.random.default_rng(0).standard_normal((6, 6), np.float32)
    wanted = values @ onnx.numpy_helper.to_array(weight)
    np.testing.assert_allclose(open_session(made).run(values), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("foreign", "warned"), [(0.4, True), (0.1, False), (None, False)])
def test_other_programs_are_warned_of(foreign: float | None, warned: bool) -> None:
    measured = throughput.Throughput((), 1, 400.0, 1024, "cpu", 1, foreign)
    assert ("; other programs took 40% of" in measured.line) is ("other programs" in measured.line) is warned
