"""What --methods, --controls and the other options of a comparison mean."""

import pytest

from growkit.compare.arms import parse_arm, parse_arms
from growkit.compare.compare import Cell
from growkit.compare.figures import arm_figures
from growkit.compare.page import main_table
from growkit.compare.settings import CompareSettings, SweepSettings
from growkit.errors import GrowkitError


def learned(settings):
    return settings.method in ("mango", "ligo")


def names(**given):
    return [arm.name for arm in parse_arms(CompareSettings(**given), learned=learned)]


def test_training_from_scratch_comes_first_and_controls_last():
    assert names(methods="mango,lemon") == [
        "from scratch",
        "mango",
        "lemon",
        "random-pad",
        "mango, operator untrained",
        "mango, source untrained",
        "source trained longer",
    ]
    assert names(methods="lemon", controls="none") == ["from scratch", "lemon"]
    assert names(methods="lemon, ligo", controls="random-pad, source-longer")[1:4] == ["lemon", "ligo", "random-pad"]


def test_each_operator_is_left_untrained_in_one_arm():
    methods = "mango:steps=20,mango:steps=100,mango:rank=4,ligo:steps=0,ligo"
    untrained = names(methods=methods, controls="untrained-operator")[6:]
    assert untrained == ["mango:steps=20, operator untrained", "mango:rank=4, operator untrained"]


def test_options_of_an_arm_reach_its_settings():
    arm = parse_arm("mango:ranks=4x1x4x1:noise=0.5:steps=7:lr=0.01:vectors=false:ring-order=BIOL")
    assert (arm.grow.ranks, arm.grow.noise, arm.grow.vectors) == ("4,1,4,1", 0.5, False)
    assert (arm.grow.ring_order, arm.operator_steps, arm.operator_lr) == ("BIOL", 7, 0.01)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (" mango:ring-order=BIOL", "mango:ring_order=BIOL"),
        ("mango:lr=1e-3:rank=04:noise=1", "mango:rank=4:noise=1:lr=0.001"),
        ("mango:noise=1.0:lr=.001:rank=4", "mango:rank=4:noise=1:lr=0.001"),
        ("mango:vectors=false:ranks=4x1x4x1", "mango:ranks=4x1x4x1:vectors=false"),
    ],
)
def test_an_arm_has_one_name_however_its_options_are_spelled(text, name):
    assert parse_arm(text) == parse_arm(name)  # the same files
    assert parse_arm(text).name == name


def test_arms_that_differ_have_files_that_differ():
    texts = ["mango", "mango:rank=4", "mango:noise=0.1", "mango:noise=0.01", "mango:lr=1e-4", "mango:lr=1e-3"]
    texts += ["mango:noise=1e+9", "mango:noise=1e-9"]
    arms = [parse_arm(text) for text in texts]
    assert len({arm.slug for arm in arms}) == len(arms)
    assert len({Cell(arms[0], 1.0, 0, lr).slug for lr in (1e-3, 1.0000001e-3)}) == 2


def test_budgets_that_differ_have_names_that_differ():
    arm, shares = parse_arm("lemon"), (0.125, 0.12, 0.0004, 0.07, 1.0)
    names = [Cell(arm, share, 0, 1e-3).name for share in shares]
    assert [name.split(", ")[1] for name in names] == [f"budget {n}%" for n in ("12.5", "12", "0.04", "7", "100")]
    found = arm_figures([], arms=[arm], seeds=[0], budgets=shares, metric="top1", source_flops=None)
    columns, _ = main_table(found)
    assert columns[2:4] == ("test top-1 at 12.5%", "test top-1 at 12%")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mango:rang=4", "'rang=4' is no option; choose from .*rank"),
        ("mango:rank", "is no option"),
        ("mango:rank=four", "'four' is no value for rank"),
        ("mango:vectors=maybe", "no value for vectors"),
        ("mango:steps=-1", "steps -1: expected 0 or more"),
        ("mango:lr=nan", "lr nan: expected more than 0"),
        ("mango:lr=inf", "lr inf: expected more than 0"),
        ("mango,mango", "there twice"),
    ],
)
def test_wrong_arm_is_refused(text, says):
    with pytest.raises(GrowkitError, match=says):
        names(methods=text)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"seeds": 0}, "--seeds 0"),
        ({"budgets": "0.5"}, "largest must be 1"),
        ({"budgets": "0.5,2"}, "largest must be 1"),
        ({"budgets": "half,1"}, "--budgets"),
        ({"lrs": ""}, "--lrs"),
        ({"lrs": "-1"}, "--lrs"),
        ({"operator_lrs": "nan"}, "--operator-lrs"),
        ({"operator_steps": 0}, "--operator-steps"),
        ({"controls": "randompad"}, "--controls randompad: choose from random-pad"),
        ({"metric": "top5"}, "--metric top5"),
        ({"share": 0.0}, "--share"),
        ({"hold_out": 1.0}, "--hold-out"),
        ({"evals": 0}, "--evals"),
    ],
)
def test_wrong_settings_are_refused(given, says):
    with pytest.raises(GrowkitError, match=says):
        CompareSettings(**given)


@pytest.mark.parametrize("given", [{"trials": 0}, {"share": 2.0}, {"noises": "a"}, {"operator_steps": "-1"}])
def test_wrong_sweep_is_refused(given):
    with pytest.raises(GrowkitError, match="--"):
        SweepSettings(**given)
