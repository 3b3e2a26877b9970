"""What the ring costs: arithmetic counted forward and backward, plans found once, nothing big held."""

from itertools import permutations
from math import prod

import opt_einsum
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from growkit.core import ring_plan, ring_slices
from growkit.core.contract import Order, cheapest_orders
from growkit.core.ring import AXES, RingOperator
from growkit.core.ring_plan import ContractionPlan, _plans_along, contraction_plan
from growkit.train.memory import Alive

ORDERS = ["B" + "".join(rest) for rest in permutations("OLI")]
SMALL_TO_BASE = {"B": 12, "O": 384, "L": 12, "I": 384}, {"B": 12, "O": 768, "L": 12, "I": 768}
UNEVEN = [(1, 4, 2, 7), (8, 1, 3, 2), (10, 1, 1, 10)]
sizes = st.fixed_dictionaries({axis: st.integers(2, 6) for axis in AXES})


def on_meta(old, new, ranks, order):
    with torch.device("meta"):
        return RingOperator(old, new, ranks, order), torch.empty([old[axis] for axis in AXES])


class Products(TorchDispatchMode):
    """While entered, counts matrix products by torch's own formulas; its FlopCounterMode does more, and takes twice."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func.overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=made)
        return made


def counted(ring, x):
    """FLOPs of a forward pass and of the backward pass after it: matrix products, as torch counts them."""
    with Products() as forward:
        y = ring(x)
    with Products() as backward:
        y.backward(torch.empty_like(y))
    return forward.flops, backward.flops


def test_products_are_those_that_torch_counts():
    ring, x = on_meta(*SMALL_TO_BASE, (4, 4, 4, 4), "BOLI")
    with FlopCounterMode(display=False) as torchs:
        y = ring(x)
        y.backward(torch.empty_like(y))
    assert sum(counted(ring, x)) == torchs.get_total_flops() > 0


def optimum(ring, x):
    """FLOPs of opt_einsum's best order: forward, its gradients, and its intermediates once more.

    Each product has a gradient of its own cost for each operand that leads to a core; the source's weights get none.
    The last product makes no intermediate.
    """
    shapes = [tuple(x.shape), *(tuple(ring.cores[axis].shape) for axis in ring.order)]
    path, info = opt_einsum.contract_path(ring.equation, *shapes, shapes=True, optimize="optimal")
    operands = [(set(term), place > 0) for place, term in enumerate(ring.equation.split("->")[0].split(","))]
    forward, gradients = [], 0
    for step in path:
        (one, learns_one), (two, learns_two) = (operands.pop(place) for place in sorted(step, reverse=True))
        kept = (one | two) & set("BOLI").union(*(term for term, _ in operands))
        operands.append((kept, learns_one or learns_two))
        summed = kept != one | two
        forward.append((1 + summed) * prod(info.size_dict[letter] for letter in one | two))
        gradients += (learns_one + learns_two) * forward[-1]
    assert sum(forward) == info.opt_cost
    return sum(forward), gradients, sum(forward[:-1])


@pytest.mark.parametrize("ranks", [(4, 4, 4, 4), *UNEVEN], ids=str)
def test_intermediates_that_are_kept_are_not_counted_again_and_take_the_room_they_were_given(ranks):
    ring, x = on_meta(*SMALL_TO_BASE, ranks, "BOLI")
    shapes = tuple(tuple(ring.cores[axis].shape) for axis in ring.order)
    plan = contraction_plan(ring.equation, tuple(x.shape), shapes, ring.order)
    best, gradients, again = optimum(ring, x)
    each = 4 * plan.elements
    arithmetic, held = [], []
    for keeping in (0, plan.slices // 2, plan.slices):
        ring.room = keeping * each
        arithmetic.append(sum(counted(ring, x)))
        with Alive() as alive:
            y = ring(x)
        held.append(alive.now)
        del y
    half = plan.slices // 2 / plan.slices
    assert arithmetic[2] <= 1.05 * (best + gradients)
    assert arithmetic[0] - arithmetic[2] == pytest.approx(again, rel=0.05)
    assert arithmetic[0] - arithmetic[1] == pytest.approx(half * again, rel=0.05)
    assert [(size - held[0]) / (plan.slices * each) for size in held[1:]] == pytest.approx([half, 1], rel=1e-6)


def in_slices(ring, x):
    shapes = tuple(tuple(ring.cores[axis].shape) for axis in ring.order)
    plan = contraction_plan(ring.equation, tuple(x.shape), shapes, ring.order)
    return plan.width < ring.cores[plan.axis].shape[2]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("ranks", [(4, 4, 4, 4), *UNEVEN], ids=str)
def test_deit_small_to_base_counts_the_best_order_and_its_gradients(order, ranks):
    ring, x = on_meta(*SMALL_TO_BASE, ranks, order)
    best, gradients, again = optimum(ring, x)
    forward, backward = counted(ring, x)
    assert in_slices(ring, x)
    assert forward <= 1.05 * best
    assert forward + backward <= 1.05 * (best + gradients + again)


@pytest.mark.parametrize(
    ("ranks", "order"),
    [((1, 10, 1, 9), "IOBL"), ((10, 1, 7, 8), "IBLO"), ((1, 7, 1, 10), "LBIO"), ((3, 3, 1, 10), "BLOI")],
)
def test_deit_small_to_base_counts_the_best_order_where_that_takes_larger_slices(ranks, order):
    """Their cheapest orders make an intermediate of 135 MB, 0.4 of the result."""
    ring, x = on_meta(*SMALL_TO_BASE, ranks, order)
    best, gradients, again = optimum(ring, x)
    forward, backward = counted(ring, x)
    assert forward <= 1.05 * best
    assert forward + backward <= 1.05 * (best + gradients + again)


@pytest.mark.parametrize(("wide", "deep"), [((1024, 1280), (24, 32)), ((1024, 1408), (24, 40))])
def test_larger_slices_are_for_rings_that_need_them_alone(wide, deep, monkeypatch):
    old, new = ({"B": 12, "O": wide[n], "L": deep[n], "I": wide[n]} for n in (0, 1))
    ring, x = on_meta(old, new, (1, 1, 1, 1), "BOLI")
    asked = (ring.equation, tuple(x.shape), tuple(tuple(ring.cores[axis].shape) for axis in ring.order), ring.order)
    plan = contraction_plan.__wrapped__(*asked)
    monkeypatch.setattr(ring_plan, "MOST_SHARE", 0)
    assert plan == contraction_plan.__wrapped__(*asked)
    assert plan.largest_elements <= ring_plan.MOST_ELEMENTS


@given(sizes, sizes, st.lists(st.integers(1, 4), min_size=4, max_size=4), st.permutations(AXES))
@settings(max_examples=60, deadline=None)
def test_any_ring_counts_the_best_order_and_its_gradients(old, new, ranks, order):
    ring, x = on_meta(old, new, ranks, "".join(order))
    best, gradients, _ = optimum(ring, x)
    forward, backward = counted(ring, x)
    assert not in_slices(ring, x)
    assert forward <= 1.05 * best
    assert forward + backward <= 1.05 * (best + gradients)


wide = st.sampled_from([(192, 384), (384, 768), (320, 1024), (448, 1024), (768, 1024)])
deep = st.sampled_from([(2, 8), (4, 4), (6, 6), (12, 12), (12, 24)])
uneven = st.lists(st.one_of(st.just(1), st.integers(1, 10)), min_size=4, max_size=4)


@pytest.mark.parametrize("fewest", [ring_plan.FEWEST_ELEMENTS, ring_plan.FEWEST_ON_GPU])
@given(wide, deep, st.sampled_from([8, 12]), uneven, st.permutations(AXES))
@example((384, 768), (12, 12), 12, [7, 1, 4, 1], "IBLO")  # forwards as cheap in another order, backwards not
@example((192, 384), (2, 8), 8, [8, 2, 7, 1], "LOBI")
@example((448, 1024), (6, 6), 12, [4, 8, 1, 8], "OLBI")
@settings(max_examples=25, deadline=None)
def test_any_ring_in_slices_counts_the_best_order_and_its_gradients(fewest, wide, deep, matrices, ranks, order):
    """Except where that takes intermediates above half the result and 128 MB (256 MB on a GPU), and others do not."""
    old, new = ({"B": matrices, "O": wide[n], "L": deep[n], "I": wide[n]} for n in (0, 1))
    ring, x = on_meta(old, new, ranks, "".join(order))
    best, gradients, again = optimum(ring, x)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("growkit.core.ring.fewest_elements", lambda grown, gpu: fewest)
        forward, backward = counted(ring, x)
    cores = tuple(tuple(ring.cores[axis].shape) for axis in ring.order)
    asked, all_three = (ring.equation, tuple(x.shape), cores, ring.order), best + gradients + again
    for parts in (1, 2):  # alone, and one of two processes that share it
        plans = [plan for n in range(4) for plan in _plans_along(n, *asked, parts)]
        near = [plan for plan in plans if plan.flops <= 1.05 * best and plan.training_flops <= 1.05 * all_three]
        most = max(fewest, ring_plan.MOST_ELEMENTS, ring_plan.MOST_SHARE * prod(new.values()))
        if near and min(plan.largest_elements for plan in near) <= most:
            assert contraction_plan(*asked, fewest, parts) in near
            assert parts > 1 or forward <= 1.05 * best
            assert parts > 1 or forward + backward <= 1.05 * all_three


def test_counting_tells_a_dearer_order_from_the_best(monkeypatch):
    ring, x = on_meta(*SMALL_TO_BASE, (4,) * 4, "BOLI")
    best, *_ = optimum(ring, x)
    dearer = ((0, 1), (0, 2), (0, 1), (0, 1))  # B and L first
    found = Order(dearer, best, best, ring_plan.FEWEST_ELEMENTS, 0)
    monkeypatch.setattr(ring_plan, "cheapest_orders", lambda *_: (found,))
    contraction_plan.cache_clear()
    try:
        assert counted(ring, x)[0] > 1.5 * best
    finally:
        contraction_plan.cache_clear()


def test_a_plan_is_found_once_for_each_shape():
    ring, x = on_meta(*SMALL_TO_BASE, (2, 3, 1, 2), "BOLI")
    ring(x)
    searches = contraction_plan.cache_info().misses, cheapest_orders.cache_info().misses
    ring(x).sum().backward()
    assert (contraction_plan.cache_info().misses, cheapest_orders.cache_info().misses) == searches


def test_slices_on_a_gpu_are_fewer_and_cost_no_more():
    ring, x = on_meta(*SMALL_TO_BASE, (4,) * 4, "BOLI")
    shapes = tuple(tuple(ring.cores[axis].shape) for axis in ring.order)
    asked = (ring.equation, tuple(x.shape), shapes, ring.order)
    here, there = contraction_plan(*asked), contraction_plan(*asked, ring_plan.FEWEST_ON_GPU)
    assert (here.slices, there.slices) == (64, 12)
    assert there.flops == here.flops
    assert there.largest_elements <= ring_plan.FEWEST_ON_GPU


@pytest.mark.parametrize("count", [2, 5, 8, 24])
def test_processes_that_share_a_ring_take_equal_parts_of_its_arithmetic(count, monkeypatch):
    (ring, x), (shared, _) = (on_meta(*SMALL_TO_BASE, (4,) * 4, "BOLI") for _ in range(2))
    shared.processes = count
    alone, parts = counted(ring, x), []
    for rank in (0, count - 1):
        monkeypatch.setattr(ring_slices.dist, "get_rank", lambda rank=rank: rank)
        parts.append(counted(shared, x))
    assert parts[0] == parts[1]
    taken = 1 if count == 5 else count  # 5 divides none of 12 and 768: each grows it whole
    assert all(taken * part <= 1.05 * whole for part, whole in zip(parts[0], alone, strict=True))
    assert taken * sum(parts[0]) >= sum(alone) / 1.05
    shapes = tuple(tuple(ring.cores[axis].shape) for axis in ring.order)
    plan = contraction_plan(ring.equation, tuple(x.shape), shapes, ring.order, parts=count)
    assert (plan.parts, plan.flops) == (taken, taken * parts[0][0])
    assert plan.slices * plan.width == ring.cores[plan.axis].shape[2]  # all sizes here are whole multiples


@pytest.mark.parametrize("rank", [4, 10])
def test_nothing_of_rank_squared_times_the_model_is_held(rank):
    ring, x = on_meta(*SMALL_TO_BASE, (rank,) * 4, "BOLI")
    with Alive() as alive:
        y = ring(x)
        forward = alive.peak
        y.backward(torch.empty_like(y))
    model = y.untyped_storage().nbytes()
    cores = sum(core.untyped_storage().nbytes() for core in ring.cores.values())
    assert alive.largest == model  # of all that is ever made: the result itself
    # forward: the slices, the result they are joined to and a core in a product's order; backward: gradients too
    slice_bytes = ring_plan.SLICE_SHARE * model
    assert forward <= 2 * model + cores + 3 * slice_bytes
    assert alive.peak <= 2 * model + 4 * cores + 7 * slice_bytes


@pytest.mark.parametrize(
    ("grown", "plans", "taken"),  # of each plan its arithmetic, slices and largest intermediate
    [
        (2**24, [(100, 2, 2**22), (104, 4, 2**21)], 1),  # an eighth of what is grown
        (2**24, [(100, 2, 2**21), (104, 4, 2**20)], 0),  # no smaller than that at a price
        (2**24, [(100, 2, 2**22), (106, 4, 2**21)], 0),  # at most 5 % more arithmetic
        (2**24, [(100, 2, 2**24), (100, 4, 2**23)], 1),  # none so small: the smallest
        (2**10, [(100, 1, 2**18), (100, 4, 2**16)], 0),  # below 1 MB nothing is gained
        (2**26, [(100, 2, 2**26), (200, 4, 2**25)], 1),  # 128 MB whatever the arithmetic
        (2**30, [(100, 2, 2**29), (200, 4, 2**25)], 0),  # or half of what is grown
        (2**30, [(100, 2, 2**30), (200, 4, 2**29)], 1),
        (2**24, [(100, 8, 2**20), (100, 4, 2**21)], 1),  # few slices
    ],
)
def test_slices_are_as_large_as_an_eighth_of_what_is_grown_allows(grown, plans, taken, monkeypatch):
    made = [ContractionPlan((), "O", 1, slices, flops, flops, largest, 0) for flops, slices, largest in plans]
    monkeypatch.setattr(ring_plan, "_plans_along", lambda position, *_: made if position == 0 else [])
    monkeypatch.setattr(ring_plan, "cheapest_orders", lambda *_: (Order((), 100, 100, 0, 0),))
    cores = ((1, 1, grown, 1), (1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1))
    assert contraction_plan.__wrapped__("", (1,) * 4, cores, AXES) is made[taken]


@pytest.mark.parametrize(("largest", "most_slices"), [(2**25, 256), (2**25 + 1, 1024)])
def test_more_than_256_slices_are_tried_where_memory_asks_for_them_alone(largest, most_slices, monkeypatch):
    monkeypatch.setattr(ring_plan, "cheapest_orders", lambda *_: (Order((), 1, 1, largest, 0),))
    plans = ring_plan._plans_along(0, "", (1,) * 4, ((1, 1, 1024, 1),) * 4, AXES, 1)
    assert max(plan.slices for plan in plans) == most_slices


@pytest.mark.parametrize(
    ("ranks", "equation"),
    [((1, 1, 1, 1), "boli,bB,oO,lL,iI->BOLI"), ((1, 4, 1, 2), "boli,bBq,qoO,lLs,siI->BOLI")],
)
def test_bonds_of_one_index_are_left_out_of_the_products(ranks, equation, monkeypatch):
    ring, x = on_meta(*SMALL_TO_BASE, ranks, "BOLI")
    asked, contract = [], ring_slices.contract
    monkeypatch.setattr(ring_slices, "contract", lambda *args: asked.append(args[0]) or contract(*args))
    ring(x)
    assert set(asked) == {equation}
