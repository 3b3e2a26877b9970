"""Scores against plain numpy, and what evaluate refuses."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from growkit.errors import GrowkitError
from growkit.train.data import Data
from growkit.train.precision import refuse_tf32
from growkit.train.progress import followed
from growkit.train.score import Scores, evaluate, predictor, read_through, worse
from growkit.train.settings import FitSettings


def by_hand(logits: np.ndarray, labels: np.ndarray) -> Scores:
    """The same scores, image by image, in numpy."""
    z = np.exp(logits - logits.max(1, keepdims=True))
    p = z / z.sum(1, keepdims=True)
    n, rows = len(labels), np.arange(len(labels))
    ranks = [int((row > row[label]).sum()) for row, label in zip(logits, labels, strict=True)]
    right, confidence, ece = np.array([r == 0 for r in ranks]), p.max(1), 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            gap = abs(right[inside].mean() - confidence[inside].mean())
            ece += inside.sum() / n * gap
    return Scores(
        top1=float(right.mean()),
        top5=sum(r < 5 for r in ranks) / n,
        loss=float(-np.log(p[rows, labels]).mean()),
        ece=ece,
        count=n,
    )


def in_batches(labels: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Batches whose images are their own numbers, for predictors that look logits up."""
    return list(zip(torch.arange(len(labels)).split(size), labels.split(size), strict=True))


@given(st.integers(0, 2**31), st.integers(2, 12), st.integers(1, 40), st.integers(1, 9))
def test_scores_are_those_of_plain_numpy(seed: int, classes: int, count: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (count, classes))
    labels = rng.integers(0, classes, count)
    table = torch.from_numpy(logits)
    scores = evaluate(lambda which: table[which], in_batches(torch.from_numpy(labels), size))
    expected = by_hand(logits, labels)
    assert scores.count == expected.count
    for name in ("top1", "top5", "loss", "ece"):
        assert getattr(scores, name) == pytest.approx(getattr(expected, name), abs=1e-12), name


def test_half_precision_logits_are_scored_in_full_and_the_surest_share_a_bin() -> None:
    table, labels = torch.tensor([[0.0, 99.0], [0.0, 3.7]]).half(), torch.tensor([0, 1])
    scores = evaluate(lambda which: table[which], in_batches(labels, 2))
    expected = by_hand(table.double().numpy(), labels.numpy())
    assert (scores.loss, scores.ece) == pytest.approx((expected.loss, expected.ece), abs=1e-12)


def test_a_score_is_worse_where_it_fell_by_more_than_two_standard_errors() -> None:
    """From 0.9 down, with 100 images, these are 0.106, 0.104 and 0.101."""
    scores = {top1: Scores(top1, 1.0, 0.0, 0.0, 100) for top1 in (0.76, 0.78, 0.8, 0.9)}
    assert [worse(scores[0.9], scores[top1]) for top1 in (0.76, 0.78, 0.8, 0.9)] == [True, True, False, False]
    assert not worse(scores[0.76], scores[0.9])


def test_sure_and_always_wrong_is_the_worst_calibration() -> None:
    labels = torch.zeros(4, dtype=torch.long)
    scores = evaluate(lambda which: torch.tensor([[0.0, 99.0]]).expand(4, 2), [(labels, labels)])
    assert (scores.top1, scores.ece) == (0.0, pytest.approx(1.0))


def test_sure_and_always_right_is_the_best_calibration() -> None:
    labels = torch.ones(4, dtype=torch.long)
    scores = evaluate(lambda which: torch.tensor([[0.0, 99.0]]).expand(4, 2), [(labels, labels)])
    assert (scores.top1, scores.ece) == (1.0, pytest.approx(0.0))


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ([[0.0, float("nan")]], [0], "outputs are not finite"),
        ([[0.0, 1.0]], [2], "has 2 outputs"),
        ([[0.0, 1.0]], [-1], "from -1 to -1"),
    ],
)
def test_scores_that_would_mean_nothing_are_refused(logits: list[list[float]], labels: list[int], message: str) -> None:
    batch = (torch.zeros(1), torch.tensor(labels))
    with pytest.raises(GrowkitError, match=message):
        evaluate(lambda images: torch.tensor(logits), [batch])


def test_no_images_are_refused() -> None:
    with pytest.raises(GrowkitError, match="no images"):
        evaluate(lambda images: images, [])


def test_predictor_evaluates_without_dropout_and_gives_modes_back() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2)).train()
    model[1].eval()
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model[1](x)
    assert torch.equal(predictor(model, "cpu")(x), expected)
    assert [module.training for module in model.modules()] == [True, True, False]


def test_predictor_runs_in_the_precision_asked_for() -> None:
    model, x = nn.Linear(3, 2), torch.ones(4, 3)
    assert predictor(model, "cpu", "bf16")(x).dtype is torch.bfloat16
    assert predictor(model, "cpu", "auto")(x).dtype is torch.float32


def test_scores_are_of_products_in_full_float32() -> None:
    class Watching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision))
            return x

    seen: list[tuple[str, str]] = []
    predictor(Watching(), "cpu", "fp32")(torch.ones(1, 2))
    assert seen == [("ieee", "ieee")]


def test_tf32_is_refused_where_nothing_multiplies_so(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_tf32(FitSettings(), torch.device("cpu"))
    for device, capability in (("cpu", (8, 0)), ("cuda", (7, 5))):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        with pytest.raises(GrowkitError, match=f"--tf32: {device} does not multiply in TF32"):
            refuse_tf32(FitSettings(tf32=True), torch.device(device))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    refuse_tf32(FitSettings(tf32=True), torch.device("cuda"))


def test_scoring_tells_how_far_it_is_before_and_after_each_batch() -> None:
    told: list[tuple[float, int, str]] = []

    def progress(done: float, total: int, note: str = "") -> None:
        told.append((done, total, note))

    batches = [(torch.zeros(n, 3), torch.zeros(n)) for n in (4, 4, 2)]
    assert list(followed(batches, 10, progress)) == batches
    assert [one[:2] for one in told] == [(0, 10), (4, 10), (8, 10), (10, 10)]
    assert not told[0][2]
    assert all(note.endswith(" images/s") for _, _, note in told[1:])


def test_reading_through_looks_at_every_image_and_makes_nothing_of_them(opened: Callable[[FitSettings], Data]) -> None:
    def refused(images: Tensor) -> Tensor:
        raise AssertionError

    told: list[tuple[float, int]] = []
    settings = FitSettings(batch_size=5, workers=0)
    data = replace(opened(settings), normalised=refused)
    progress = lambda done, total, note="": told.append((done, total))  # noqa: E731
    read_through(data, settings, torch.device("cpu"), progress=progress)
    assert told == [(0, 12), (5, 12), (10, 12), (12, 12)]
