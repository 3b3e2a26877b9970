"""Numbers outside their ranges are refused by the option's name, in every settings class."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from growkit.compare.settings import CompareSettings, SweepSettings
from growkit.deploy.settings import ExportSettings, TritonSettings, VerifySettings
from growkit.errors import GrowkitError
from growkit.ranges import MOST, refuse_labels, refuse_number, refuse_outside
from growkit.settings import GrowSettings
from growkit.train.settings import FitSettings


@given(
    value=st.one_of(st.integers(), st.floats()),
    low=st.one_of(st.none(), st.integers(-5, 5)),
    strict=st.booleans(),
    high=st.one_of(st.none(), st.integers(6, 20)),
    below=st.booleans(),
)
def test_refuses_what_is_outside_and_nothing_else(
    value: float, low: int | None, strict: bool, high: int | None, below: bool
) -> None:
    ranges: dict[str, Any] = {}
    if low is not None:
        ranges["above" if strict else "least"] = low
    if high is not None:
        ranges["below" if below else "most"] = high
    inside = not math.isnan(value)
    inside = inside and (low is None or (value > low if strict else value >= low))
    inside = inside and (value <= MOST if high is None else value < high if below else value <= high)
    if inside:
        refuse_number("--it", value, **ranges)
    else:
        with pytest.raises(GrowkitError, match=r"^--it .*: expected "):
            refuse_number("--it", value, **ranges)


def test_names_the_option_and_passes_what_was_left_out() -> None:
    @dataclass
    class Settings:
        two_words: float | None

    refuse_outside(Settings(None), "two_words", least=0)
    with pytest.raises(GrowkitError, match=r"^--triton-two-words -1: expected 0 or more$"):
        refuse_outside(Settings(-1), "two_words", least=0, prefix="triton_")


def test_labels_are_those_that_have_a_logit() -> None:
    refuse_labels(0, 6, 7)
    for lowest, highest in ((0, 7), (-1, 6)):
        with pytest.raises(GrowkitError, match=f"labels run from {lowest} to {highest} but the model has 7 outputs"):
            refuse_labels(lowest, highest, 7)


@pytest.mark.parametrize(
    ("settings", "given", "said"),
    [
        (FitSettings, {"lr": float("nan")}, "--lr nan: expected more than 0"),
        (FitSettings, {"epochs": float("inf")}, "--epochs inf: expected more than 0, and at most 1000000000"),
        (FitSettings, {"mixup": 1e-320}, "--mixup 9.99989e-321: expected 0.001 or more"),
        (FitSettings, {"seed": 2**31}, "--seed 2147483648: expected 0 or more, and at most 2147483647"),
        (FitSettings, {"val_split": ""}, "--val-split '': expected the name of a split"),
        (GrowSettings, {"noise": -1.0}, "--noise -1: expected 0 or more"),
        (GrowSettings, {"rank": 0}, "--rank 0: expected 1 or more"),
        (CompareSettings, {"lrs": "1e-3,nan"}, "--lrs 1e-3,nan: expected numbers above 0"),
        (CompareSettings, {"hold_out": 1.0}, "--hold-out 1: expected more than 0, and less than 1"),
        (SweepSettings, {"share": 0.0}, "--share 0: expected 1e-06 or more, and at most 1"),
        (SweepSettings, {"ring_orders": "BOLI,BBLI"}, "--ring-orders BOLI,BBLI: expected orders of the letters BOLI"),
        (SweepSettings, {"rank_choices": "1,4x4"}, "--rank-choices 1,4x4: expected ranks such as 2"),
        (
            SweepSettings,
            {"stage_choices": "both,deep"},
            "--stage-choices both,deep: expected some of both, width-first",
        ),
        (ExportSettings, {"batch": 10**6}, "--batch 1000000: expected 1 to 4096"),
        (VerifySettings, {"latency_margin": -0.1}, "--latency-margin -0.1: expected 0 or more"),
        (TritonSettings, {"instances": 0}, "--triton-instances 0: expected 1 or more"),
    ],
)
def test_settings_hold_their_numbers(settings: Any, given: dict[str, Any], said: str) -> None:
    settings()  # the defaults are fine
    with pytest.raises(GrowkitError) as caught:
        settings(**given)
    assert str(caught.value).startswith(said)
