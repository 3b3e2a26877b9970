"""Triton's kernels against torch, interpreted on the CPU: run by test_kernels.py. On a GPU test_gpu.py has them."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ring import random_ring

from growkit.core import contract, half, kernels, ring_plan
from growkit.core import ring as ring_module
from growkit.core.ring_plan import contraction_plan

ROUNDING = 2.0**-11  # of float16, relative


def close(found, truth):
    return float((found.double() - truth).norm()) <= ROUNDING * float(truth.norm())


def factors(new, summed, before, after):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator).half()
        for shape in ((new, summed), (before, summed, after), (before, new, after))
    ]


sizes = st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(1, 3), st.integers(1, 300))


def test_each_is_run_once():
    run = dict.fromkeys(("scaled", "product", "gradients"), 0)
    with pytest.MonkeyPatch.context() as patch:
        for name in run:
            made = getattr(kernels, name)
            patch.setattr(kernels, name, lambda *a, name=name, made=made: run.update({name: run[name] + 1}) or made(*a))
        kernels.run_each(torch.device("cpu"))
    assert run == {"scaled": 1, "product": 1, "gradients": 1}


@given(sizes)
@settings(max_examples=10, deadline=None)
def test_product_and_gradients_are_torchs(size):
    small, large, above = factors(*size)
    made = torch.full(above.shape, math.nan).half()
    assert kernels.product(small, large, made, 1, 1)
    assert close(made, small.double() @ large.double())
    of_small, of_large = kernels.gradients(small, large, above)
    assert of_small.dtype == torch.float32
    assert close(of_small, (above.double() @ large.double().mT).sum(0))
    assert close(of_large, small.double().mT @ above.double())


def test_product_is_written_in_the_order_asked_for():
    """(p, B) x (L, s) x i to B, L, p, s, i, as the product with the last core sums over p, s and i."""
    small, large, _ = factors(2 * 3, 5, 4 * 6, 7)
    truth = (small.double() @ large.double()).view(4, 6, 2, 3, 7)
    made = torch.full((6, 2, 4, 3, 7), math.nan).half().permute(2, 0, 1, 3, 4)
    assert kernels.product(small, large, made, 2, 2)
    assert close(made, truth)
    turned = torch.empty((7, 4, 6, 2, 3)).half().permute(1, 2, 3, 4, 0)
    assert not kernels.product(small, large, turned, 2, 2)  # columns that do not lie together


@pytest.mark.parametrize(
    "axes",
    [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3), (2, 1, 0, 3)],
    ids=["as it lies", "layers first", "turned", "from behind"],
)
def test_scaled_values_are_read_and_written_in_any_order_of_rows(axes):
    values = torch.randn(3, 5, 4, 6)[:, 1:4].permute(axes)
    scale = torch.tensor(0.25)
    made = torch.full(values.shape, math.nan).half()
    assert kernels.scaled(values, scale, made)
    assert torch.equal(made, (values / 4).half())
    place = torch.zeros(3, 5, 4, 6)
    assert kernels.scaled(made, scale, place[:, 1:4].permute(axes))
    assert torch.equal(place[:, 1:4].permute(axes), made.float() / 4)
    assert not place[:, ::4].any()  # what lies beside it is left alone
    assert not kernels.scaled(values.mT, scale, made.mT.contiguous())
    assert not kernels.scaled(values[..., :1].expand(values.shape), scale, made)  # one number in place of many


@given(st.lists(st.integers(1, 3), min_size=1, max_size=5), st.data())
@settings(max_examples=50, deadline=None)
def test_steps_reach_what_the_axes_reach(shape, data):
    axes = data.draw(st.permutations(range(len(shape))))
    tensor = torch.arange(math.prod(shape)).view(shape).permute(axes)
    steps = kernels.in_steps(tensor.shape, tensor.stride(), 5)
    assert len(steps) == 5
    assert torch.equal(tensor.as_strided(*zip(*steps, strict=True)).flatten(), tensor.flatten())
    needed = sum(size > 1 for size, _ in steps)
    assert not needed or kernels.in_steps(tensor.shape, tensor.stride(), needed - 1) is None


@pytest.mark.parametrize(("kilobytes", "stages"), [(99, 2), (163, 4), (227, 4)], ids=["RTX 4090", "A100", "H100"])
def test_as_many_tiles_are_on_their_way_as_fit(kilobytes, stages, monkeypatch):
    monkeypatch.setattr(kernels, "_of", lambda device: {"max_shared_mem": 1024 * kilobytes})
    assert kernels._stages((64, 64, 128), torch.device("cuda")) == stages
    assert 1 <= kernels._stages((128, 128, 64), torch.device("cuda")) <= stages


@pytest.mark.parametrize("ranks", [[1, 1, 1, 1], [2, 3, 2, 2]], ids=["bonds of one", "wider bonds"])
@pytest.mark.parametrize("room", [0, 2**30])
@pytest.mark.parametrize("in_slices", [False, True])
def test_ring_by_kernels_is_the_ring_by_torch(ranks, in_slices, room, monkeypatch):
    exact, x = random_ring({"B": 3, "O": 3, "L": 2, "I": 4}, {"B": 4, "O": 6, "L": 3, "I": 8}, ranks, "BOLI", 0)
    monkeypatch.setattr(ring_module, "may_halve", lambda x: True)
    monkeypatch.setattr(ring_plan, "FEWEST_ELEMENTS", 500 if in_slices else ring_plan.FEWEST_ELEMENTS)
    upstream = torch.randn(4, 6, 3, 8, generator=torch.Generator().manual_seed(1))
    together = []  # whether the last product finds what it sums over together
    folded = contract._parts

    def watched(pair, large, small, *, wide):
        together.append(bool(pair.lead) and not large.is_contiguous())
        return folded(pair, large, small, wide=wide)

    monkeypatch.setattr(contract, "_parts", watched)
    found = []
    for used in (None, kernels):
        for module in (half, contract):
            monkeypatch.setattr(module, "kernels_for", lambda tensor, used=used: used)
        contraction_plan.cache_clear()
        together.clear()
        ring = copy.deepcopy(exact).float()
        ring.room = room  # what is kept lies in memory as the next product takes it
        grown = ring(x.detach().float())
        found.append([grown.detach(), *torch.autograd.grad(grown, list(ring.parameters()), upstream)])
    contraction_plan.cache_clear()
    assert any(together) == (max(ranks) > 1)
    for by_torch, by_kernels in zip(*found, strict=True):
        assert (by_kernels - by_torch).norm() <= 2 * ROUNDING * by_torch.norm()
