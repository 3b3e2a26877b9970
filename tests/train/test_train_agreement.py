"""What changed between two models, against plain numpy and values worked out by hand."""

import math
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from growkit.errors import GrowkitError
from growkit.mcnemar import mcnemar
from growkit.train.agreement import Agreement, Part, compare_answers, in_step
from growkit.train.score import evaluate

PARTS = [field.name for field in fields(Agreement) if field.type is Part]


def batches(labels: np.ndarray, size: int) -> list[tuple[Tensor, Tensor]]:
    """Batches whose images are their own numbers, for predictors that look logits up."""
    truth = torch.from_numpy(labels)
    return list(zip(torch.arange(len(truth)).split(size), truth.split(size), strict=True))


def compared(source: np.ndarray, model: np.ndarray, labels: np.ndarray, size: int = 4) -> Agreement:
    """The comparison of two tables of logits, one row per image; the model's images are numbered from 100."""
    one, other = torch.from_numpy(source), torch.from_numpy(model)
    there = [(images + 100, truth) for images, truth in batches(labels, size)]
    return compare_answers(
        lambda which: one[which], lambda which: other[which - 100], in_step(batches(labels, size), there)
    )


def one_hot(*answers: int, classes: int = 4) -> np.ndarray:
    """Logits that answer these classes."""
    return 5.0 * np.eye(classes)[list(answers)]


@given(st.integers(0, 2**31), st.integers(2, 9), st.integers(1, 40), st.integers(1, 9))
def test_comparison_is_that_of_plain_numpy(seed: int, classes: int, count: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    source = rng.normal(0, 3, (count, classes))
    model = source + rng.normal(0, 2, (count, classes))
    labels = rng.integers(0, classes, count)
    found = compared(source, model, labels, size)

    before, after = source.argmax(1), model.argmax(1)
    images = list(zip(labels.tolist(), before.tolist(), after.tolist(), strict=True))
    expected = {
        "agreement": sum(b == a for _, b, a in images),
        "both_right": sum(b == t and a == t for t, b, a in images),
        "both_wrong": sum(t not in (b, a) for t, b, a in images),
        "turned_wrong": sum(b == t != a for t, b, a in images),
        "turned_right": sum(a == t != b for t, b, a in images),
        "changed_wrong": sum(len({t, b, a}) == 3 for t, b, a in images),
    }
    assert list(expected) == PARTS
    for name, number in expected.items():
        part = getattr(found, name)
        assert (part.count, part.share) == (number, pytest.approx(number / count)), name
    wrong, right = expected["turned_wrong"], expected["turned_right"]
    tail = sum(math.comb(wrong + right, k) for k in range(min(wrong, right) + 1)) / 2 ** (wrong + right)
    assert found.mcnemar_p == pytest.approx(min(1.0, 2 * tail))

    assert [one.name for one in found.classes] == [str(label) for label in np.unique(labels)]
    for one in found.classes:
        own = [(b == t, a == t) for t, b, a in images if t == int(one.name)]
        assert one.images == len(own)
        assert one.source == pytest.approx(np.mean([b for b, _ in own]))
        assert one.model == pytest.approx(np.mean([a for _, a in own]))
        assert one.change == pytest.approx(one.model - one.source)
        assert (one.turned_wrong, one.turned_right) == (own.count((True, False)), own.count((False, True)))

    for scores, logits in ((found.source_scores, source), (found.model_scores, model)):
        table = torch.from_numpy(logits)
        alone = evaluate(lambda which, table=table: table[which], batches(labels, size))  # type: ignore[misc]
        assert scores == alone


@pytest.mark.parametrize(
    ("wrong", "right", "p"),
    [
        (0, 0, 1.0),  # nothing turned
        (3, 3, 1.0),
        (1, 0, 1.0),
        (1, 5, 14 / 64),  # 2 (1 + 6) of 2^6
        (5, 1, 14 / 64),
        (2, 10, 158 / 4096),  # 2 (1 + 12 + 66) of 2^12
        (0, 10, 2 / 1024),
    ],
)
def test_mcnemar_is_the_binomial_sum_worked_out_by_hand(wrong: int, right: int, p: float) -> None:
    assert mcnemar(wrong, right) == pytest.approx(p, rel=1e-12)


def test_model_against_itself_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 1, (30, 5)), rng.integers(0, 5, 30)
    found = compared(logits, logits, labels)
    assert found.agreement == Part(30, 1.0)
    assert [getattr(found, name).count for name in ("turned_wrong", "turned_right", "changed_wrong")] == [0, 0, 0]
    assert 0 < found.both_right.count < 30
    assert (found.source_scores, found.mcnemar_p) == (found.model_scores, 1.0)
    assert {one.change for one in found.classes} == {0.0}


def test_every_kind_of_change_is_told_apart() -> None:
    labels = np.array([0, 0, 1, 1, 2])
    source = one_hot(0, 0, 2, 2, 3)  # right, right, wrong, wrong, wrong
    model = one_hot(0, 1, 1, 3, 3)  # right, turned wrong, turned right, another wrong class, the same wrong class
    found = compared(source, model, labels, size=2)
    counts = {name: getattr(found, name).count for name in PARTS}
    assert counts == {
        "agreement": 2,
        "both_right": 1,
        "both_wrong": 2,
        "turned_wrong": 1,
        "turned_right": 1,
        "changed_wrong": 1,
    }
    rows = [(one.name, one.images, one.source, one.model, one.change) for one in found.classes]
    assert rows == [("0", 2, 1.0, 0.5, -0.5), ("1", 2, 0.0, 0.5, 0.5), ("2", 1, 0.0, 0.0, 0.0)]
    assert [(one.turned_wrong, one.turned_right) for one in found.classes] == [(1, 0), (0, 1), (0, 0)]


def test_model_that_lost_one_class_shows_up_in_that_class_alone() -> None:
    labels = np.arange(40) % 4
    damaged = one_hot(*labels)
    damaged[:, 2] = -9  # never answers class 2 again
    found = compared(one_hot(*labels), damaged, labels)
    assert (found.turned_wrong, found.turned_right) == (Part(10, 0.25), Part(0, 0.0))
    assert found.mcnemar_p == pytest.approx(2 / 1024)
    assert {one.name: one.change for one in found.classes} == {"0": 0.0, "1": 0.0, "2": -1.0, "3": 0.0}


def test_classes_go_by_the_names_given() -> None:
    images, labels = torch.zeros(2), torch.tensor([2, 0])
    logits = torch.zeros(2, 3)
    found = compare_answers(lambda _: logits, lambda _: logits, [(images, images, labels)], ["cat", "dog", "elk"])
    assert [one["name"] for one in asdict(found)["classes"]] == ["cat", "elk"]


@pytest.mark.parametrize(
    ("source", "model", "message"),
    [
        ([[0.0, 1.0, 2.0]], [[0.0, 1.0]], "source answers 3 classes and the model 2"),
        ([[0.0, float("nan")]], [[0.0, 1.0]], "the source's outputs are not finite"),
        ([[0.0, 1.0]], [[0.0, float("inf")]], "the model's outputs are not finite"),
        ([[1.0]], [[1.0]], "has 1 outputs"),
    ],
)
def test_comparison_that_would_mean_nothing_is_refused(
    source: list[list[float]], model: list[list[float]], message: str
) -> None:
    batch = (torch.zeros(1), torch.zeros(1), torch.tensor([1]))
    with pytest.raises(GrowkitError, match=message):
        compare_answers(lambda _: torch.tensor(source), lambda _: torch.tensor(model), [batch])


def test_no_images_are_refused() -> None:
    with pytest.raises(GrowkitError, match="no images"):
        compare_answers(lambda images: images, lambda images: images, [])


def test_images_in_another_order_are_refused() -> None:
    labels = np.array([0, 1, 1, 0])
    with pytest.raises(GrowkitError, match="batch 1 has other labels"):
        list(in_step(batches(labels, 2), batches(labels[[0, 1, 0, 1]], 2)))
