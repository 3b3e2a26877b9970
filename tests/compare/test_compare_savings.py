"""Savings, intervals and censoring, against NumPy, SciPy and by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from growkit.compare.arms import SCRATCH, Arm
from growkit.compare.figures import _ends_below_start, arm_figures, guessing
from growkit.compare.savings import Estimate, estimate, flops_to, saving
from growkit.settings import GrowSettings

scores = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=12)


def test_target_between_two_evaluations_is_found_on_the_line_between_them():
    curve = [(0, 0.1), (10, 0.3), (20, 0.7)]
    assert flops_to(curve, 0.5, higher=True) == pytest.approx(15)
    assert flops_to(curve, 0.3, higher=True) == pytest.approx(10)
    assert flops_to([(0, 2.0), (4, 1.0)], 1.25, higher=False) == pytest.approx(3)


def test_start_that_has_the_target_costs_nothing():
    assert flops_to([(0, 0.6), (10, 0.2)], 0.5, higher=True) == 0


def test_target_that_is_never_reached_has_no_cost():
    assert flops_to([(0, 0.1), (10, 0.4)], 0.5, higher=True) is None
    assert flops_to([(0, 0.1), (10, 0.4)], 0.05, higher=False) is None
    assert flops_to([], 0.5, higher=True) is None


@given(scores, st.floats(0, 1, width=32))
def test_first_crossing_is_where_a_fine_interpolation_first_has_it(values, target):
    curve = [(float(i), v) for i, v in enumerate(values)]
    found = flops_to(curve, target, higher=True)
    grid = np.linspace(0, len(values) - 1, 2000 * max(1, len(values) - 1) + 1)
    there = np.interp(grid, range(len(values)), values) >= target
    if found is None:
        assert max(values) < target
    else:
        assert not there[grid < found - 1e-6].any()
        assert np.interp(found, range(len(values)), values) == pytest.approx(target, abs=1e-6) or found == 0


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8))
def test_interval_is_students(values):
    found = estimate(values)
    if np.std(values) > 1e-6:
        low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
        assert (found.low, found.high) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))
    assert found.mean == pytest.approx(np.mean(values), abs=1e-9)


def test_one_seed_has_no_interval_and_none_no_estimate():
    assert estimate([0.5]).low is None
    assert estimate([]) is None


@pytest.mark.parametrize(
    ("top1", "images", "largest", "told"),
    [
        (0.111, 180, 18, True),
        (0.2, 180, 18, False),
        (0.111, 100_000, 10_000, False),  # little, but no chance
        (0.9, 100, 90, True),  # always the same answer
        (0.001, 5000, 5, True),
    ],
)
def test_training_from_scratch_that_only_guesses_is_told(top1, images, largest, told):
    content = {"largest_class": largest, "images": {"test images": images}}
    scratch = SimpleNamespace(budgets=[SimpleNamespace(top1=Estimate(top1, None, None, 3))])
    line = guessing(content, scratch)
    assert (line is not None) == told
    if told:
        assert f"top-1 {top1:.1%}, and guessing gives {largest / images:.1%}" in line
    assert guessing(content, SimpleNamespace(budgets=[SimpleNamespace(top1=None)])) is None


def test_saving_by_hand():
    found = saving([2.0, 4.0], [10.0, 10.0], [10.0, 8.0])
    assert found.mean == pytest.approx((0.8 + 0.5) / 2)
    assert not found.bound
    with_source = saving([2.0, 4.0], [10.0, 10.0], [10.0, 8.0], source=2.0)
    assert with_source.mean == pytest.approx((0.6 + 0.25) / 2)


def test_run_that_never_gets_there_counts_as_all_it_spent_and_bounds_the_saving():
    found = saving([2.0, None], [10.0, 9.0], [10.0, 10.0])
    assert found.bound
    assert (found.reached, found.seeds) == (1, 2)
    assert found.mean == pytest.approx((0.8 + 0.1) / 2)
    assert found.low is None  # an interval around a bound would be none


def run(arm, seed, spent, top1, seconds, **more):
    """What a comparison keeps of a run that reaches its score in the middle of what it spent."""
    return {
        "arm": arm,
        "seed": seed,
        "budget": 1.0,
        "lr": 1e-3,
        "flops": spent,
        "curve": [(0.0, 0.0, 9.0), (spent / 2, top1, 1.0), (spent, top1, 1.0)],
        "final": {"top1": top1, "loss": 2.0},
        "test": {"top1": top1, "loss": 1.0},
        "step0": None,
        "started_from": {"top1": 0.0},
        "operator_flops": 0.0,
        "operator_lr": None,
        "seconds": seconds,
        "operator_seconds": seconds / 2,
        **more,
    }


def test_figures_of_an_arm_are_of_its_own_runs():
    failed = {"arm": "lemon", "seed": 1, "budget": 1.0, "lr": 1e-3, "failed": "a disk was full"}
    runs = [
        *(run(SCRATCH, seed, 10.0, 0.5, 4.0) for seed in (0, 1)),
        run("lemon", 0, 4.5, 0.3, 3.0, budget=0.5, lr=2e-3),
        run("lemon", 0, 9.0, 0.4, 6.0),
        failed,
        run("ligo", 0, 10.0, 0.8, 8.0),
        run("ligo", 1, 10.0, 0.8, 8.0),
    ]
    arms = [Arm(SCRATCH), *(Arm(name, GrowSettings(method=name)) for name in ("lemon", "ligo"))]
    options = {"seeds": range(2), "budgets": [0.5, 1.0], "metric": "top1", "source_flops": None}
    scratch, lemon, ligo = arm_figures(runs, arms=arms, **options)
    assert [arm.failures for arm in (scratch, lemon, ligo)] == [
        (),
        ("budget 100%, seed 1, lr 0.001: a disk was full",),
        (),
    ]
    assert [arm.seconds.mean for arm in (scratch, lemon, ligo)] == [6.0, 9.0, 12.0]  # with the operator's
    assert lemon.saving.mean == pytest.approx(((1 - 9 / 5) + (1 - 10 / 5)) / 2)  # its own spending, or the whole budget
    assert (lemon.saving.reached, lemon.saving.low) == (0, None)
    assert [(budget.lr, budget.flops, budget.loss.mean) for budget in lemon.budgets] == [
        (2e-3, 4.5, 1.0),
        (1e-3, 9.0, 1.0),
    ]
    assert ligo.saving.mean == pytest.approx(1 - 10 / 2 * (5 / 8) / 5)


@pytest.mark.parametrize(
    ("metric", "scores", "worse"),
    [
        ("top1", (0.6, 0.7, 0.5), True),
        ("top1", (0.6, 0.5, 0.7), False),
        ("loss", (1.0, 2.0), True),
        ("loss", (2.0, 1.0), False),
    ],
)
def test_arm_that_ends_below_its_start_is_found(metric, scores, worse):
    arm = SimpleNamespace(curve=[(at, Estimate(score, None, None, 1)) for at, score in enumerate(scores)])
    assert _ends_below_start(arm, metric) == worse
