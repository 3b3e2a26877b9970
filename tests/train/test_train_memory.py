"""Counted peak memory: against the profiler's allocations; of an operator's step beside a plain one."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from growkit.arch import build, find, find_target
from growkit.core import ring
from growkit.core.ring_plan import contraction_plan, fewest_elements
from growkit.grow import grow
from growkit.settings import GrowSettings
from growkit.train.made_weights import made_once
from growkit.train.memory import Alive, keep_what_fits, step_peak
from growkit.train.optimizer import optimizer_of
from growkit.train.settings import FitSettings

TINY = {"embed_dim": 64, "depth": 3, "num_heads": 2, "img_size": 64, "patch_size": 8, "num_classes": 10}
BIG = ["embed_dim=128", "depth=4", "num_heads=4"]
BATCH = (16, 3, 64, 64)


def network(rank):
    """The target itself at rank 0, else a ring around the source."""
    source = find("vit_tiny_patch16_224", TINY)
    target, _ = find_target(source, "vit_tiny_patch16_224", BIG)
    if not rank:
        return build(target.name, target.arguments)
    return grow(source, target, build(source.name, source.arguments).state_dict(), GrowSettings(rank=rank))


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize(("rank", "count"), [(0, 1), (0, 4), (1, 4), (4, 4)])
def test_counted_peak_is_the_peak_of_real_allocations(rank, count, batches):
    """Of the second update, which has the moments; with a single image, weights and their gradients outweigh it."""
    model, batch = network(rank).train(), (count, *BATCH[1:])
    keep_what_fits(model, batch, "fp32")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        images, labels = torch.randn(batch), torch.zeros(count, dtype=torch.long)
        optimizer = optimizer_of(model, FitSettings())
        for _ in range(2):
            with made_once(model, batches):
                for _ in range(batches):
                    nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    before = sum(t.numel() * 4 for t in [*model.parameters(), *model.buffers()])
    now = peak = before
    events = profiler.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert step_peak(network(rank).train(), batch, "fp32", batches) == pytest.approx(peak, rel=0.01)


def test_frozen_weights_take_no_gradients_and_no_moments():
    whole, frozen = network(0), network(0)
    frozen.blocks.requires_grad_(False)
    still = 4 * sum(p.numel() for p in frozen.blocks.parameters())
    peaks = [step_peak(model.train(), (4, *BATCH[1:]), "fp32") for model in (whole, frozen)]
    assert peaks[0] - peaks[1] == pytest.approx(3 * still, rel=0.1)


def test_storage_counts_until_its_last_view_is_gone():
    with Alive() as alive:
        whole = torch.empty(1000, device="meta")
        view = whole[:10]
        assert alive.now == 4000
        del whole
        assert alive.now == 4000
        del view
        assert alive.now == 0
    assert alive.peak == alive.largest == 4000


@pytest.mark.parametrize("recomputed", [False, True])
def test_intermediates_may_take_a_quarter_of_what_a_network_holds_for_its_gradients(recomputed):
    model = network(4)
    model.set_grad_checkpointing(recomputed)
    keep_what_fits(model, BATCH, "fp32")
    real = build(model.target.name, model.target.arguments).train()
    real.set_grad_checkpointing(recomputed)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        images = torch.randn(BATCH)
        outputs = real(images)
    held = sum(e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    assert outputs.requires_grad
    assert model.method.ring.room == pytest.approx((held - images.nbytes) / 4, rel=0.03)
    keep_what_fits(model, BATCH, "bf16")
    assert model.method.ring.room < (0.99 if recomputed else 0.8) * (held - images.nbytes) / 4


@pytest.fixture(scope="module")
def small_to_base():
    source = find("deit_small_patch16_224")
    target, _ = find_target(source, "deit_base_patch16_224")
    plain = step_peak(build(target.name, target.arguments, device="meta").train(), (256, 3, 224, 224), "bf16")
    return source, target, build(source.name, {}).state_dict(), plain


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "most"), [(1, 1.25), (4, 1.25), (10, 1.5)])
def test_operator_step_peaks_little_above_a_plain_step(small_to_base, rank, most):
    source, target, state, plain = small_to_base
    operator = grow(source, target, state, GrowSettings(rank=rank)).train()
    assert step_peak(operator, (256, 3, 224, 224), "bf16") <= most * plain


@pytest.mark.parametrize(
    ("batches", "depth", "rank", "most"),
    [
        pytest.param(batches, depth, rank, most, marks=pytest.mark.slow if drawn else pytest.mark.exhaustive)
        for batches, drawn_ranks in ((1, {(2, 1), (2, 4), (12, 10)}), (2, {(12, 4)}))
        for depth, rank, most in ((2, 1, 1.25), (2, 4, 1.25), (12, 4, 1.25), (12, 10, 1.5))
        for drawn in [(depth, rank) in drawn_ranks]
    ],
)
def test_operator_of_a_small_model_peaks_little_above_a_plain_step_at_any_batch(
    depth: int, rank: int, most: float, batches: int
) -> None:
    source = find("deit_tiny_patch16_224", {"depth": depth})
    target, _ = find_target(source, "deit_small_patch16_224", [f"depth={depth}"])
    batch = (1, 3, 224, 224)  # where activations weigh least
    plain = step_peak(build(target.name, target.arguments, device="meta").train(), batch, "bf16", batches)
    operator = grow(source, target, build(source.name, source.arguments).state_dict(), GrowSettings(rank=rank))
    assert step_peak(operator.train(), batch, "bf16", batches) <= most * plain


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "rank", "most"), [(2, 4, 1.25), (12, 4, 1.25), (12, 10, 1.5)])
def test_slices_for_a_gpu_outweigh_no_small_model(
    depth: int, rank: int, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring, "fewest_elements", lambda grown, gpu: fewest_elements(grown, gpu=True))
    source = find("deit_tiny_patch16_224", {"depth": depth})
    target, _ = find_target(source, "deit_small_patch16_224", [f"depth={depth}"])
    batch = (8, 3, 224, 224)
    plain = step_peak(build(target.name, target.arguments, device="meta").train(), batch, "bf16")
    operator = grow(source, target, build(source.name, source.arguments).state_dict(), GrowSettings(rank=rank))
    assert step_peak(operator.train(), batch, "bf16") <= most * plain


def test_slices_of_an_absolute_size_would_outweigh_a_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("growkit.core.ring_plan.FEWEST_ELEMENTS", 2**25)
    contraction_plan.cache_clear()
    try:
        with pytest.raises(AssertionError):
            test_operator_of_a_small_model_peaks_little_above_a_plain_step_at_any_batch(2, 4, 1.25, 1)
    finally:
        contraction_plan.cache_clear()
