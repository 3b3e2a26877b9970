"""A ring whose factors are float16, as on a GPU that may multiply in TF32: near float64, whatever the scale."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ring import Team, random_ring, rings

from growkit.core import half, ring_plan, ring_slices
from growkit.core.contract import float32_sums
from growkit.core.half import halved, may_halve, scales_of
from growkit.core.ring import RingOperator
from growkit.core.ring_plan import contraction_plan
from growkit.float32 import multiplying
from growkit.train.memory import Alive

ROUNDING = 2.0**-11  # of a float16 factor, relative


@pytest.fixture(autouse=True)
def halving(monkeypatch):
    monkeypatch.setattr("growkit.core.ring.may_halve", lambda x: x.dtype == torch.float32)


def gap(found, truth, size=None):
    """Relative to `size`, that of the sums without their signs: what cancels is not an error."""
    return float((found.double() - truth).norm() / (truth if size is None else size).norm())


def grown_and_gradients(ring, x, weights):
    grown = ring(x)
    return grown.detach(), *torch.autograd.grad((grown * weights).sum(), [x, *ring.cores.values()])


def sizes_of(ring, x, weights):
    ring = copy.deepcopy(ring)
    with torch.no_grad():
        for core in ring.cores.values():
            core.abs_()
    return grown_and_gradients(ring, x.detach().abs().requires_grad_(), weights.abs())


@given(rings, st.booleans(), st.sampled_from([0, -40, 40]), st.sampled_from([0, -60, 30]), st.sampled_from([0, 2**30]))
@settings(max_examples=60, deadline=None)
def test_float16_factors_give_what_float64_gives_but_for_their_rounding(case, in_slices, magnitude, steepness, room):
    """Weights and gradients of any magnitude: 2^-40 is far below what float16 holds, 2^30 far above."""
    exact, x = random_ring(*case)
    x = (x.detach() * 2.0**magnitude).requires_grad_()
    weights = torch.randn(exact(x).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = weights * 2.0**steepness
    truth, size = grown_and_gradients(exact, x, weights), sizes_of(exact, x, weights)
    rounded = copy.deepcopy(exact).float()
    rounded.room = room
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring_plan, "FEWEST_ELEMENTS", 8 if in_slices else ring_plan.FEWEST_ELEMENTS)
        contraction_plan.cache_clear()
        found = grown_and_gradients(rounded, x.detach().float().requires_grad_(), weights.float())
    contraction_plan.cache_clear()
    assert all(tensor.dtype == torch.float32 for tensor in found)
    assert max(map(gap, found, truth, size)) < 8 * ROUNDING  # of five factors and three intermediates
    assert gap(found[0], truth[0]) > 1e-6  # it is float16 that was measured


def test_room_holds_twice_as_many_intermediates_of_half_the_size(monkeypatch):
    monkeypatch.setattr(ring_plan, "FEWEST_ELEMENTS", 8)
    contraction_plan.cache_clear()
    exact, x = random_ring(*EXAMPLE)
    ring, x = exact.float(), x.detach().float()
    cores = [ring.cores[axis] for axis in ring.order]
    plan = ring.plan(x, cores, halves=True)
    held = []
    for slices in (0, 1):
        ring.room = 2 * plan.elements * slices
        with Alive() as alive:
            grown = ring(x)
        held.append(alive.now)
        del grown
    contraction_plan.cache_clear()
    assert plan.slices > 1
    assert held[1] - held[0] == 2 * plan.elements


@pytest.mark.parametrize("sign", [1, -1])
def test_nothing_overflows_where_everything_adds_up(sign):
    """As many summands as DeiT-S has, none of which cancels: by float16 alone 384 x 48 x 48 of them are infinite."""
    old, new = {"B": 12, "O": 384, "L": 12, "I": 2}, {"B": 12, "O": 2, "L": 12, "I": 384}
    exact = RingOperator(old, new, [4] * 4, dtype=torch.float64)
    with torch.no_grad():
        for core in exact.cores.values():
            core.fill_(sign * 0.9)
    x = torch.full([old[axis] for axis in "BOLI"], 0.9, dtype=torch.float64, requires_grad=True)
    weights = torch.full([new[axis] for axis in "BOLI"], 0.9, dtype=torch.float64)
    truth = grown_and_gradients(exact, x, weights)
    found = grown_and_gradients(copy.deepcopy(exact).float(), x.detach().float().requires_grad_(), weights.float())
    assert max(map(gap, found, truth)) < 8 * ROUNDING


def test_room_is_made_for_no_more_than_the_cores_can_do():
    """Copies of what they grow leave the factors at full scale."""
    ring, x = random_ring(*EXAMPLE)
    for core in ring.cores.values():
        core.data.copy_(torch.eye(core.shape[1], core.shape[2], dtype=torch.float64)[None, :, :, None])
    cores = [ring.cores[axis] for axis in ring.order]
    with torch.no_grad():
        _, scales, steeper = ring_slices._halved(ring.equation, ring.plan(x, cores), [x, *cores])
        assert torch.equal(scales, scales_of([x, *cores]))
    assert steeper == 1


def test_processes_share_a_ring_of_float16_factors():
    ring, x = random_ring(*EXAMPLE)
    ring, x = ring.float(), x.detach().float()
    weights = torch.randn(2, *ring(x).shape, generator=torch.Generator().manual_seed(1))
    weights[1] *= 2**20  # by the first process's own scale the sum would be infinite
    truth = grown_and_gradients(copy.deepcopy(ring).double(), x.double().requires_grad_(), weights.double().mean(0))
    team = Team(2)

    def work(number):
        own = copy.deepcopy(ring)
        own.processes = 2
        return grown_and_gradients(own, x.clone().requires_grad_(), weights[number])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring_slices, "dist", team)
        found = team.run(work)
    assert torch.equal(found[0][0], found[1][0])
    assert gap(found[0][0], truth[0]) < 10 * ROUNDING
    for expected, *parts in zip(truth[1:], *(gradients for _, *gradients in found), strict=True):
        assert gap(sum(parts) / 2, expected) < 10 * ROUNDING


def test_what_processes_add_up_stays_below_its_scale(monkeypatch):
    team, parts = Team(3), (0.1, -0.9, 0.9)
    monkeypatch.setattr(ring_slices, "dist", team)
    scales = team.run(lambda number: ring_slices._scale_of_sums(torch.full((2,), parts[number]), 3).item())
    assert scales == [4, 4, 4]  # the power of two above 3 times the largest


def test_without_gradients_a_ring_is_exact():
    """Growing and scoring stay in float32; steps of training alone are rounded."""
    exact, x = random_ring(*EXAMPLE)
    with torch.no_grad():
        assert gap(copy.deepcopy(exact).float()(x.float()), exact(x)) < 1e-6


@pytest.mark.parametrize("largest", [0.0, 1.0, 3.0, 65504.0, 1e-30, 1e30])
def test_halved_values_are_a_power_of_two_away(largest):
    values = largest * torch.tensor([[1.0, -0.5], [0.25, 0.0]])
    (scale,) = scales_of([values])
    made = halved(values.T, 1 / scale)
    assert made.is_contiguous()
    assert made.dtype == torch.float16
    assert torch.frexp(scale)[0] == 0.5
    assert not largest or 0.5 <= made.abs().max() <= 1
    assert torch.allclose(made.float() * scale, values.T, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("largest", [1e-45, 3e38])
def test_ends_of_the_range_make_no_nan(largest):
    values = torch.tensor([largest, 0.0])
    (scale,) = scales_of([values])
    assert not halved(values, 1 / scale).isnan().any()


def test_torch_is_left_as_it_was_set():
    place = torch.backends.cuda.matmul
    before = place.allow_fp16_reduced_precision_reduction, place.allow_fp16_reduced_precision_reduction_split_k
    try:
        for chosen in ((True, True), (False, True), (False, False)):
            place.allow_fp16_reduced_precision_reduction = chosen
            with float32_sums():
                assert not place.allow_fp16_reduced_precision_reduction
            found = place.allow_fp16_reduced_precision_reduction, place.allow_fp16_reduced_precision_reduction_split_k
            assert found == chosen
    finally:
        place.allow_fp16_reduced_precision_reduction = before


def test_a_cpu_never_halves():
    with multiplying(tf32=True):
        assert not may_halve(torch.ones(2))


def test_kernels_that_do_not_run_are_done_without(caplog):
    half._kernels.cache_clear()
    assert half._kernels(torch.device("cpu")) is half._kernels(torch.device("cpu")) is None
    assert len(caplog.messages) == 1
    assert "cuBLAS takes their place" in caplog.messages[0]


def test_memory_that_is_used_up_says_nothing_of_kernels(monkeypatch):
    kernels = pytest.importorskip("growkit.core.kernels")
    half._kernels.cache_clear()

    def full(device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kernels, "run_each", full)
    with pytest.raises(torch.OutOfMemoryError):
        half._kernels(torch.device("cpu"))
    monkeypatch.setattr(kernels, "run_each", lambda device: None)
    assert half._kernels(torch.device("cpu")) is kernels
    half._kernels.cache_clear()


EXAMPLE = ({"B": 3, "O": 6, "L": 2, "I": 5}, {"B": 3, "O": 8, "L": 4, "I": 7}, [2, 3, 2, 2], "BOLI", 0)


def test_slices_may_hold_twice_as_many_numbers_of_half_the_size(monkeypatch):
    ring, x = random_ring(*EXAMPLE)
    asked = []
    plan = lambda *given: asked.append(given[4]) or contraction_plan(*given)  # noqa: E731
    monkeypatch.setattr("growkit.core.ring.contraction_plan", plan)
    for kind in (torch.float64, torch.float32):  # only the second is halved here
        ring.to(kind)(x.to(kind))
    assert asked[1] == 2 * asked[0]
