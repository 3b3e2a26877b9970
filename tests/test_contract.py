"""Products pair by pair against torch.einsum, along any order of pairs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growkit.core.contract import cheapest_orders, contract, gradients, growth, pairs_of

RING = ("boli", "pbBq", "qoOr", "rlLs", "siIp")
EQUATION = ",".join(RING) + "->BOLI"
sizes = st.fixed_dictionaries({index: st.integers(1, 4) for index in "boliBOLIpqrs"})
# in each step, which two of those that wait are multiplied: any two, neighbours on the ring or not
paths = st.tuples(*(st.permutations(range(n)).map(lambda order: tuple(sorted(order[:2]))) for n in (5, 4, 3, 2)))


@given(sizes, paths, st.integers(0, 99))
def test_any_order_gives_the_einsum_and_its_gradients(size, path, seed):
    generator = torch.Generator().manual_seed(seed)
    operands = [
        torch.randn([size[i] for i in term], generator=generator, dtype=torch.float64).requires_grad_() for term in RING
    ]
    expected = torch.einsum(EQUATION, *operands)
    grad = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    truth = torch.autograd.grad((expected * grad).sum(), operands)
    made = contract(EQUATION, path, operands)
    taped = torch.autograd.grad((made * grad).sum(), operands)
    bare = [operand.detach() for operand in operands]
    found = gradients(EQUATION, path, bare, grad, [True] * 5)
    for one, other in [(made, expected), *zip(taped, truth, strict=True), *zip(found, truth, strict=True)]:
        assert one.shape == other.shape
        assert (one - other).norm() <= 1e-12 * other.norm() + 1e-300
    kept: list[torch.Tensor] = []
    contract(EQUATION, path, bare, keep=kept)
    assert len(kept) == 3
    assert all(map(torch.equal, gradients(EQUATION, path, bare, grad, [True] * 5, kept), found))


def test_what_is_kept_is_not_made_again(monkeypatch):
    operands, made = [torch.ones([2] * len(term)) for term in RING], []
    path = ((0, 1), (0, 3), (0, 2), (0, 1))
    contract(EQUATION, path, operands, keep=made)
    monkeypatch.setattr("growkit.core.contract._product", None)  # whoever makes one fails
    assert all(part is not None for part in gradients(EQUATION, path, operands, torch.ones([2] * 4), [True] * 5, made))


@given(paths, st.sets(st.integers(0, 4)))
def test_gradients_that_nobody_asked_for_are_not_made(path, asked):
    operands = [torch.ones([2] * len(term)) for term in RING]
    wanted = [place in asked for place in range(5)]
    found = gradients(EQUATION, path, operands, torch.ones(2, 2, 2, 2), wanted)
    assert [part is not None for part in found] == wanted


def test_large_factor_is_never_copied_where_einsum_would_copy_it_four_times():
    """DeiT-S to DeiT-B at rank 4, a slice of 12: the cores O, B and L sum neighbours, I both ends."""
    size = dict(zip("boliBOLIpqrs", (12, 384, 12, 384, 12, 12, 12, 768, 4, 4, 4, 4), strict=True))
    shapes = [tuple(size[index] for index in term) for term in RING]
    path = cheapest_orders(EQUATION, shapes[0], tuple(shapes[1:]))[0].path
    pairs = pairs_of(EQUATION, path)
    assert [pair.of_small for pair in pairs] == ["qoOr", "pbBq", "rlLs", "siIp"]
    assert [(pair.lead, pair.summed) for pair in pairs] == [("", "o"), ("", "bq"), ("", "rl"), ("p", "si")]
    for pair in pairs:
        assert pair.lead + pair.before + pair.summed + pair.after == pair.of_large  # as it lies in memory


def test_bounds_of_float16_factors_are_summed_in_float32() -> None:
    """In float16, 70,000 ones are infinite, and every result would be scaled to zero."""
    large, small = torch.ones(70_000, 3, dtype=torch.half), torch.ones(70_000, 2, dtype=torch.half)
    forwards, backwards = growth("ab,ac,bd->cd", ((0, 1), (0, 1)), [large, small, torch.ones(3, 2, dtype=torch.half)])
    assert 70_000 <= forwards < torch.inf
    assert backwards < torch.inf


@given(sizes, paths)
def test_bounds_are_what_ones_add_up_to(size, path):
    operands = [torch.ones([size[index] for index in term]).requires_grad_() for term in RING]
    kept: list[torch.Tensor] = []
    whole = contract(EQUATION, path, operands, keep=kept)
    found = growth(EQUATION, path, [operand.detach() for operand in operands])
    upstream = torch.autograd.grad(whole.sum(), kept)
    for bound, made in zip(found, (kept, upstream), strict=True):
        assert float(bound) == pytest.approx(max(part.max().item() for part in made))
