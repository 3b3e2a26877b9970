"""The ring operator against its dense form: values, gradients, slices, layers."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from growkit.core import ring_plan, ring_slices
from growkit.core.contract import cheapest_orders
from growkit.core.ring import AXES, RingOperator
from growkit.core.ring_plan import contraction_plan
from growkit.errors import GrowkitError

sizes = st.fixed_dictionaries({axis: st.integers(1, 4) for axis in AXES})
rings = st.builds(
    lambda old, new, ranks, order, seed: (old, new, ranks, "".join(order), seed),
    sizes,
    sizes,
    st.lists(st.integers(1, 3), min_size=4, max_size=4),
    st.permutations(AXES),
    st.integers(0, 99),
)


def random_ring(old, new, ranks, order, seed):
    generator = torch.Generator().manual_seed(seed)
    ring = RingOperator(old, new, ranks, order, dtype=torch.float64)
    with torch.no_grad():
        for core in ring.cores.values():
            core.normal_(generator=generator)
    x = torch.randn([old[a] for a in AXES], generator=generator, dtype=torch.float64, requires_grad=True)
    return ring, x


def dense_from_loops(ring, x):
    """The definition, bond by bond, without einsum paths: sum of Kronecker-like products of four matrices."""
    total = 0
    ranks = ring.ranks
    position = {axis: n for n, axis in enumerate(ring.order)}
    for p in range(ranks[0]):
        for q in range(ranks[1]):
            for r in range(ranks[2]):
                for s in range(ranks[3]):
                    bonds = (p, q, r, s)
                    y = x
                    for place, axis in enumerate(AXES):
                        n = position[axis]
                        matrix = ring.cores[axis][bonds[n], :, :, bonds[(n + 1) % 4]]
                        y = torch.movedim(torch.movedim(y, place, -1) @ matrix, -1, place)
                    total = total + y
    return total


def dense_from_einsum(ring):
    """The operator as one tensor (b, o, l, i, B, O, L, I)."""
    cores = ring.equation.split("->")[0].split(",")[1:]
    return torch.einsum(f"{','.join(cores)}->boliBOLI", *(ring.cores[axis] for axis in ring.order))


@given(rings)
@settings(max_examples=60, deadline=None)
def test_ring_equals_its_definition_in_value_and_gradient(case):
    ring, x = random_ring(*case)
    expected = dense_from_loops(ring, x)
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs = [x, *ring.cores.values()]
    truth = torch.autograd.grad((expected * weight).sum(), inputs)
    actual = ring(x)
    got = torch.autograd.grad((actual * weight).sum(), inputs)
    for a, b in [(actual, expected), *zip(got, truth, strict=True)]:
        assert (a - b).norm() <= 1e-12 * b.norm().clamp(min=1e-300) + 1e-300


@given(rings)
@settings(max_examples=30, deadline=None)
def test_dense_operator_contracts_to_the_same(case):
    ring, x = random_ring(*case)
    dense = torch.einsum("boli,boliBOLI->BOLI", x, dense_from_einsum(ring))
    assert torch.allclose(ring(x), dense, rtol=1e-11, atol=1e-11)


@given(rings)
@settings(max_examples=30, deadline=None)
def test_slicing_changes_neither_value_nor_gradient(case):
    ring, x = random_ring(*case)
    whole = ring(x)
    truth = torch.autograd.grad(whole.square().sum(), list(ring.parameters()))
    limit = ring_plan.FEWEST_ELEMENTS
    ring_plan.FEWEST_ELEMENTS = 8
    contraction_plan.cache_clear()
    try:
        sliced = ring(x)
        got = torch.autograd.grad(sliced.square().sum(), list(ring.parameters()))
    finally:
        ring_plan.FEWEST_ELEMENTS = limit
        contraction_plan.cache_clear()
    assert torch.allclose(sliced, whole, rtol=1e-11, atol=1e-11)
    for a, b in zip(got, truth, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


@given(rings, st.floats(0, 1.5))
@settings(max_examples=40, deadline=None)
def test_intermediates_that_are_kept_change_no_bit(case, share):
    ring, x = random_ring(*case)
    cores = [ring.cores[axis] for axis in ring.order]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring_plan, "FEWEST_ELEMENTS", 8)
        contraction_plan.cache_clear()
        plan = ring.plan(x, cores)
        again = ring(x)
        truth = torch.autograd.grad(again.square().sum(), list(ring.parameters()))
        ring.room = int(share * plan.slices * plan.elements * x.element_size())
        kept = ring(x)
        found = torch.autograd.grad(kept.square().sum(), list(ring.parameters()))
    contraction_plan.cache_clear()
    assert torch.equal(kept, again)
    assert all(map(torch.equal, found, truth))


class Team:
    """torch.distributed among threads: what `ring` asks of it."""

    ReduceOp = torch.distributed.ReduceOp

    def __init__(self, size):
        self.barrier, self.given, self.own = threading.Barrier(size, timeout=60), [None] * size, threading.local()

    def get_rank(self):
        return self.own.rank

    def _exchanged(self, value):
        self.given[self.own.rank] = value
        self.barrier.wait()
        given = list(self.given)
        self.barrier.wait()
        return given

    def all_gather(self, parts, own):
        for part, theirs in zip(parts, self._exchanged(own), strict=True):
            part.copy_(theirs)

    def all_reduce(self, own, _):
        own.copy_(torch.stack(self._exchanged(own.clone())).amax(0))

    def reduce_scatter(self, total, parts):
        total.copy_(sum(theirs[self.own.rank] for theirs in self._exchanged(parts)))

    def run(self, work):
        """What work(number) gives in each of the threads."""

        def member(number):
            self.own.rank = number
            return work(number)

        with ThreadPoolExecutor(len(self.given)) as pool:
            return list(pool.map(member, range(len(self.given))))


@given(rings, st.integers(2, 4), st.booleans(), st.sampled_from([0, 2**10, 2**30]))
@settings(max_examples=60, deadline=None)
def test_processes_that_share_a_ring_get_it_whole_and_their_gradients_mean_its_own(case, count, in_slices, room):
    """Each process has other upstream gradients, for it has other images."""
    ring, x = random_ring(*case)
    assume(any(core.shape[2] % count == 0 for core in ring.cores.values()))
    whole = ring(x)
    weights = torch.randn(count, *whole.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs = [x, *ring.cores.values()]
    truth = torch.autograd.grad((whole * weights.mean(0)).sum(), inputs)
    team = Team(count)

    def work(number):
        own, mine = copy.deepcopy(ring), x.detach().clone().requires_grad_()
        own.processes, own.room = count, room
        grown = own(mine)
        return grown.detach(), torch.autograd.grad((grown * weights[number]).sum(), [mine, *own.cores.values()])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring_slices, "dist", team)
        patch.setattr(ring_plan, "FEWEST_ELEMENTS", 8 if in_slices else ring_plan.FEWEST_ELEMENTS)
        contraction_plan.cache_clear()
        found = team.run(work)
    contraction_plan.cache_clear()
    for grown, _ in found:
        assert torch.allclose(grown, whole, rtol=1e-11, atol=1e-11)
        assert torch.equal(grown, found[0][0])
    for expected, *parts in zip(truth, *(gradients for _, gradients in found), strict=True):
        assert torch.allclose(sum(parts) / count, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
@pytest.mark.parametrize("order", ["BOLI", "BIOL", "LBOI"])
def test_deit_small_to_base_costs_the_cheapest_order_in_bounded_memory(rank, order):
    old, new = {"B": 12, "O": 384, "L": 12, "I": 384}, {"B": 12, "O": 768, "L": 12, "I": 768}
    with torch.device("meta"):
        ring = RingOperator(old, new, [rank] * 4, order)
    x = tuple(old[axis] for axis in AXES)
    shapes = tuple(tuple(ring.cores[axis].shape) for axis in order)
    cheapest = cheapest_orders(ring.equation, x, shapes)[0].flops
    plan = contraction_plan(ring.equation, x, shapes, order)
    assert plan.flops <= 1.05 * cheapest
    assert plan.largest_elements <= ring_plan.SLICE_SHARE * 12 * 768 * 12 * 768


def test_cheapest_order_costs_what_was_published():
    # opt_einsum's optimum for DeiT-S -> DeiT-B, one forward application, in GFLOP.
    for rank, gflop in [(1, 99), (2, 408), (4, 1696), (8, 7306)]:
        x = (12, 384, 12, 384)
        cores = (
            (rank, 12, 12, rank),
            (rank, 384, 768, rank),
            (rank, 12, 12, rank),
            (rank, 384, 768, rank),
        )
        flops = cheapest_orders("boli,pbBq,qoOr,rlLs,siIp->BOLI", x, cores)[0].flops
        assert round(flops / 1e9) == gflop


@given(rings, st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_lossless_ring_is_the_sum_of_its_paths(case, count):
    old, new, ranks, order, seed = case
    ranks = [rank + count - 1 for rank in ranks]
    generator = torch.Generator().manual_seed(seed)

    def matrix(axis):
        return torch.randn(new[axis], old[axis], generator=generator, dtype=torch.float64)

    paths = [{axis: matrix(axis) for axis in AXES} for _ in range(count)]
    ring = RingOperator.lossless(paths, ranks, order, noise=1.0, generator=generator)
    x = torch.randn([old[a] for a in AXES], generator=generator, dtype=torch.float64)
    expected = sum(torch.einsum("boli,Bb,Oo,Ll,Ii->BOLI", x, *(path[a] for a in AXES)) for path in paths)
    assert torch.allclose(ring(x), expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():  # where silent bonds are left out
        assert torch.allclose(ring(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", ["BOLI", "BIOL"])
def test_extra_ring_slices_receive_gradient(order):
    generator = torch.Generator().manual_seed(0)
    sizes = dict.fromkeys(AXES, 3)
    path = {axis: torch.eye(3, dtype=torch.float64) for axis in AXES}
    ring = RingOperator.lossless([path], [3, 2, 4, 2], order, noise=1.0, generator=generator)
    x = torch.randn([sizes[a] for a in AXES], generator=generator, dtype=torch.float64)
    ring(x).square().sum().backward()
    for core in ring.cores.values():
        assert core.grad[0, :, :, 0].abs().max() > 0
        assert (core.grad[1:, :, :, 0].flatten(1).abs().amax(1) > 0).all()  # the zeros that are entered
    with torch.no_grad():
        for core in ring.cores.values():
            core -= 0.01 * core.grad
    ring.zero_grad()
    ring(x).square().sum().backward()
    for core in ring.cores.values():  # one step later every slice of every core is alive
        assert (core.grad.abs().amax(dim=(1, 2)) > 0).all()


def test_dead_bonds_are_left_out_only_where_they_are_silent():
    ring, x = random_ring(dict.fromkeys(AXES, 3), dict.fromkeys(AXES, 2), [3, 2, 3, 2], "BOLI", 0)
    with torch.no_grad():
        ring.cores["O"][1] = 0  # bond in front of O: only index 1 falls silent
        whole = torch.einsum("boli,boliBOLI->BOLI", x, dense_from_einsum(ring))
        assert torch.allclose(ring(x), whole)
        ring.cores["L"].zero_()
        assert ring(x).abs().max() == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=4, max_size=4), st.sampled_from(("BOLI", "IBOL", "BLOI")), st.data())
def test_ring_of_which_whole_slices_are_zero_is_the_same_with_and_without_gradients(ranks, order, data):
    ring, x = random_ring(dict.fromkeys(AXES, 2), dict.fromkeys(AXES, 3), ranks, order, 0)
    with torch.no_grad():
        for axis in AXES:
            core = ring.cores[axis]
            for dim in (0, 3):
                dead = data.draw(st.lists(st.sampled_from(range(core.shape[dim])), max_size=2))
                core.index_fill_(dim, torch.tensor(dead, dtype=torch.long), 0)
        assert torch.allclose(ring(x), torch.einsum("boli,boliBOLI->BOLI", x, dense_from_einsum(ring)))
    assert torch.allclose(ring(x), torch.einsum("boli,boliBOLI->BOLI", x, dense_from_einsum(ring)))


@pytest.mark.parametrize("order", ["BOL", "BOLL", "BOLIX", "boli"])
def test_a_wrong_ring_order_is_refused(order):
    with pytest.raises(GrowkitError, match="ring order"):
        RingOperator(dict.fromkeys(AXES, 2), dict.fromkeys(AXES, 2), [1] * 4, order)


@pytest.mark.parametrize("ranks", [[1, 1, 1], [1, 1, 1, 0], [2] * 5])
def test_wrong_ranks_are_refused(ranks):
    with pytest.raises(GrowkitError, match="ranks"):
        RingOperator(dict.fromkeys(AXES, 2), dict.fromkeys(AXES, 2), ranks)
