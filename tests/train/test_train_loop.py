"""What fit learns, leaves alone, reports and refuses."""

import json
import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from pairs import published_scale, tiny
from timm.loss import LabelSmoothingCrossEntropy
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import TensorDataset
from train_samples import Net

from growkit.errors import GrowkitError, Terminated
from growkit.grow import GrownModel, grow
from growkit.settings import GrowSettings
from growkit.train import loop, watch
from growkit.train import optimizer as optimizer_module
from growkit.train.batches import train_batches, val_batches
from growkit.train.data import Data
from growkit.train.loop import fit
from growkit.train.optimizer import optimizer_of
from growkit.train.score import Scores, evaluate, predictor
from growkit.train.settings import FitSettings
from growkit.train.watch import StepRecord

Open = Callable[[FitSettings], Data]
PLAIN = FitSettings(steps=4, batch_size=8, lr=0.01, workers=0, log_every=1, warmup_epochs=0.0, weight_decay=0.0)


def blobs(count: int = 64, classes: int = 2) -> Data:
    """Images a linear model can tell apart: their brightness is their class."""
    labels = torch.arange(count) % classes
    noise = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = TensorDataset(labels[:, None, None, None] * 2.0 - 1 + 0.5 * noise, labels)
    return Data(train=images, val=images, classes=[str(name) for name in range(classes)])


def scorer(data: Data, settings: FitSettings) -> Callable[[nn.Module], Scores]:
    return lambda model: evaluate(predictor(model, "cpu"), val_batches(data, settings))


def score_table(top1s: list[float], losses: list[float]) -> Callable[[nn.Module], Scores]:
    """An evaluation that gives one prepared score after the other."""
    rows = iter(zip(top1s, losses, strict=True))
    return lambda model: Scores(*(row := next(rows))[:1], 1.0, row[1], 0.0, 1)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_model_learns_what_can_be_learned() -> None:
    data, settings = blobs(), replace(PLAIN, steps=30, lr=0.02)
    before = scorer(data, settings)(Net())
    result = fit(model := Net(), data, settings, evaluate=scorer(data, settings))
    assert before.top1 < 0.8
    assert result.best_scores is not None
    assert result.best_scores.top1 == 1.0
    assert scorer(data, settings)(model).top1 == 1.0
    assert (result.steps, result.total, result.interrupted) == (30, 30, False)
    assert len(result.losses) == 30


def test_first_update_is_that_of_plain_torch(opened: Open) -> None:
    settings = replace(PLAIN, steps=1, weight_decay=0.1, clip_grad=0.5, smoothing=0.1)
    data, model, other = opened(settings), Net().eval(), Net().train()
    model.drop.p = other.drop.p = 0.0
    fit(model, data, settings)
    decayed = [p for p in other.parameters() if p.requires_grad and p.ndim > 1]
    spared = [p for p in other.parameters() if p.requires_grad and p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": spared, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}], lr=0.01
    )
    images, labels = next(train_batches(data, settings, 0, 1))
    LabelSmoothingCrossEntropy(0.1)(other(images), labels).backward()
    nn.utils.clip_grad_norm_(decayed + spared, 0.5)
    optimizer.step()
    for name, value in other.state_dict().items():
        assert torch.allclose(model.state_dict()[name], value, atol=1e-7), name


def test_float16_gradients_are_clipped_by_their_own_size_not_by_that_of_the_scaled_loss() -> None:
    fit(model := Net(), blobs(), replace(PLAIN, steps=1, lr=1.0, opt="momentum", precision="fp16", clip_grad=0.01))
    moved = [after - before for after, before in zip(model.parameters(), Net().parameters(), strict=True)]
    assert nn.utils.get_total_norm(moved).item() == pytest.approx(0.01, rel=1e-3)


def test_each_update_of_each_seed_drops_out_something_of_its_own() -> None:
    dropped: list[bytes] = []

    def note(module: nn.Module, _: object, out: Tensor) -> None:
        if module.training and not out.is_meta:
            dropped.append((out == 0).numpy().tobytes())

    for seed in (0, 1, 0):
        model = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(192, 2))
        model[1].register_forward_hook(note)
        fit(model, blobs(), replace(PLAIN, seed=seed))
    assert dropped[:4] == dropped[8:]
    assert len(set(dropped)) == 8


@pytest.mark.parametrize("name", ["mixup", "cutmix", "smoothing", "clip_grad", "weight_decay", "lr"])
def test_each_setting_changes_what_is_learned(name: str) -> None:
    values = {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.2, "clip_grad": 0.01}
    changed = replace(PLAIN, **{name: values.get(name, 0.3)})
    weights = []
    for settings in (PLAIN, changed, changed):
        fit(model := Net(), blobs(), settings)
        weights.append(model.head.weight)
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[0], weights[1])


def test_labels_of_mixed_images_are_smoothed_too() -> None:
    model = Struck()
    model.head.weight.requires_grad_(False)  # zeros: what is seen does not matter
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([1.0, 0.0]))
    data = blobs(classes=1)
    found = fit(model, data, replace(PLAIN, steps=1, mixup=0.8, smoothing=0.2)).losses
    expected = nn.CrossEntropyLoss(label_smoothing=0.2)(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert found == pytest.approx([expected.item()])


def test_accumulated_batches_make_the_update_of_one_large_batch() -> None:
    images = blobs(16)
    model, other = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), None
    other = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    other.load_state_dict(model.state_dict())
    small = fit(model, images, replace(PLAIN, steps=1, batch_size=4, grad_accum_steps=4))
    large = fit(other, images, replace(PLAIN, steps=1, batch_size=16))
    assert torch.allclose(model[1].weight, other[1].weight, atol=1e-6)
    assert small.losses == pytest.approx(large.losses, abs=1e-6)
    assert (small.images_per_step, small.flops_per_step) == (16, large.flops_per_step)


def test_learning_rate_rises_in_equal_steps_then_falls_as_a_cosine() -> None:
    records: list[StepRecord] = []
    settings = replace(PLAIN, epochs=2.0, steps=None, warmup_epochs=0.5, lr=0.1, min_lr=0.01)
    fit(Net(), blobs(), settings, on_step=records.append)
    fall = [0.01 + 0.09 * (1 + math.cos(math.pi * t / 12)) / 2 for t in range(12)]
    assert [r.lr for r in records] == pytest.approx([0.02, 0.04, 0.06, 0.08, *fall])
    assert [r.epoch for r in records] == [step / 8 for step in range(1, 17)]


def test_constant_schedule_keeps_the_learning_rate_and_a_run_warms_up_for_a_twentieth() -> None:
    records: list[StepRecord] = []
    settings = replace(PLAIN, steps=40, sched="constant", warmup_epochs=None, lr=0.3)
    fit(Net(), blobs(), settings, on_step=records.append)
    assert [r.lr for r in records] == pytest.approx([0.1, 0.2] + [0.3] * 38)


def test_frozen_parameters_stay_and_keep_no_gradient() -> None:
    model, before = Net(), state_of(Net())
    fit(model, blobs(), replace(PLAIN, weight_decay=0.1))
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    trained = {"head.weight", "head.bias", "norm.weight", "norm.bias"}
    assert changed == trained | {
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weights_built_in_the_forward_pass_are_trained_through_it() -> None:
    class Built(nn.Module):
        """A classifier whose weight is an operator times a frozen weight."""

        def __init__(self) -> None:
            super().__init__()
            self.skeleton = nn.Linear(192, 2).requires_grad_(False)
            self.operator = nn.Parameter(torch.eye(2))

        def forward(self, x: Tensor) -> Tensor:
            weights = {"weight": self.operator @ self.skeleton.weight}
            return functional_call(self.skeleton, weights, (x.flatten(1),))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Built()
    before = state_of(model)
    result = fit(model, blobs(), replace(PLAIN, steps=40, lr=0.3))
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert torch.equal(model.skeleton.weight, before["skeleton.weight"])
    assert not torch.equal(model.operator, before["operator"])
    # building the weight (2x2x192) is part of the step: one product forward, one back
    assert result.macs_per_step == 2 * (8 * 192 * 2) + 2 * (2 * 2 * 192)


def test_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(GrowkitError, match="every parameter of the model is frozen"):
        fit(Net().requires_grad_(False), blobs(), PLAIN)


def test_data_without_images_is_refused() -> None:
    with pytest.raises(GrowkitError, match="there are no images to train on"):
        fit(Net(), blobs(0), PLAIN)


@pytest.mark.parametrize("workers", [0, 1])
def test_no_global_random_state_is_changed(opened: Open, workers: int) -> None:
    settings = replace(PLAIN, mixup=0.8, cutmix=1.0, model_ema=True, workers=workers)
    model, data = Net(), opened(settings)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    fit(model, data, settings, evaluate=scorer(data, settings))
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_result_does_not_depend_on_global_random_state(opened: Open) -> None:
    settings = replace(PLAIN, mixup=0.8)
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        fit(model := Net(), opened(settings), settings)
        weights.append(model.head.weight)
    assert torch.equal(*weights)
    fit(model := Net(), opened(settings), replace(settings, seed=1))
    assert not torch.equal(model.head.weight, weights[0])


def test_best_is_the_highest_top1_then_the_lowest_loss_then_the_first() -> None:
    kept: list[float] = []
    result = fit(
        Net(),
        blobs(),
        replace(PLAIN, steps=5, eval_every=1 / 8),
        evaluate=score_table([0.5, 0.7, 0.7, 0.6, 0.7], [3.0, 2.0, 1.0, 0.1, 1.0]),
        on_best=lambda model, scores: kept.append(scores.loss),
    )
    assert kept == [3.0, 2.0, 1.0]
    assert (result.best_step, [step for step, _ in result.history]) == (3, [1, 2, 3, 4, 5])
    assert result.best_scores == result.history[2][1]


@pytest.mark.parametrize(
    ("every", "steps"), [(0.0, [20]), (1.0, [8, 16, 20]), (0.6, [5, 10, 15, 20]), (0.01, [*range(1, 21)])]
)
def test_evaluations_come_every_so_many_epochs_and_at_the_end(every: float, steps: list[int]) -> None:
    table = score_table([0.5] * 20, [1.0] * 20)
    result = fit(Net(), blobs(), replace(PLAIN, steps=20, eval_every=every), evaluate=table)
    assert [step for step, _ in result.history] == steps


def test_smallest_part_of_an_epoch_is_one_update() -> None:
    assert fit(Net(), blobs(), replace(PLAIN, steps=None, epochs=0.01)).total == 1


def test_evaluation_that_leaves_a_model_in_evaluation_mode_changes_nothing() -> None:
    def evaluating(model: nn.Module) -> Scores:
        return Scores(float(model.eval()(torch.zeros(1, 3, 8, 8)).isfinite().all()), 1.0, 1.0, 0.0, 1)

    often = replace(PLAIN, eval_every=1 / 8)  # after each update
    fit(watched := Net(), blobs(), often, evaluate=evaluating)
    fit(plain := Net(), blobs(), PLAIN)
    assert watched.drop.p > 0
    assert torch.equal(watched.head.weight, plain.head.weight)


def test_moving_average_is_what_is_judged_and_kept() -> None:
    settings = replace(PLAIN, steps=3, model_ema=True, model_ema_decay=0.9, eval_every=0.0)
    seen: list[nn.Module] = []
    weights: list[Tensor] = []

    def judge(model: nn.Module) -> Scores:
        seen.append(model)
        return Scores(1.0, 1.0, 0.0, 0.0, 1)

    model = Net()
    fit(
        model,
        blobs(),
        settings,
        evaluate=judge,
        on_step=lambda record: weights.append(model.head.weight.detach().clone()),
        on_best=lambda best, _: seen.append(best),
    )
    average = weights[0]  # timm: the first update is copied, then 1 - (1 + t) ** (-2 / 3)
    for t, new in enumerate(weights[1:], start=1):
        decay = min(0.9, 1 - (1 + t) ** (-2 / 3))
        average = decay * average + (1 - decay) * new
    assert seen[0] is seen[1] is not model
    assert torch.allclose(seen[0].head.weight, average, atol=1e-6)
    assert not torch.allclose(model.head.weight, average, atol=1e-6)


@pytest.mark.parametrize("model_ema", [False, True])
def test_start_is_shown_what_will_be_judged_once_and_before_anything_is_cleared(
    tmp_path: Path, model_ema: bool
) -> None:
    settings = replace(PLAIN, steps=2, model_ema=model_ema)
    seen: list[nn.Module] = []

    def judge(model: nn.Module) -> Scores:
        seen.append(model.eval())
        return Scores(1.0, 1.0, 0.0, 0.0, 1)

    model = Net()
    fit(model, blobs(), settings, folder=tmp_path, evaluate=judge, on_start=lambda started: seen.append(started.eval()))
    assert len(seen) > 1
    assert {id(one) for one in seen} == {id(seen[0])}
    assert (seen[0] is model) != model_ema
    before = (tmp_path / "state.pt").read_bytes()

    def fail(_: nn.Module) -> None:
        raise GrowkitError("an image cannot be read")

    fit(Net(), blobs(), settings, folder=tmp_path, resume=True, evaluate=judge, on_start=fail)
    with pytest.raises(GrowkitError, match="an image cannot be read"):
        fit(Net(), blobs(), settings, folder=tmp_path, evaluate=judge, on_start=fail)
    assert (tmp_path / "state.pt").read_bytes() == before


def test_start_that_was_scored_changes_nothing_of_training() -> None:
    fit(plain := Net(), blobs(), PLAIN)
    fit(shown := Net(), blobs(), PLAIN, on_start=lambda started: started.eval())
    assert shown.drop.p > 0
    assert torch.equal(plain.head.weight, shown.head.weight)


@pytest.mark.parametrize("opt", ["sgd", "momentum", "nesterov", "adamw"])
def test_update_that_float16_skips_leaves_the_optimizer_as_it_was(opt: str) -> None:
    """torch's fused SGD would go on with momentum from memory that nobody has written to."""
    model = Net()
    optimizer = optimizer_of(model, replace(PLAIN, opt=opt, lr=1e-3, precision="fp16"))
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for gradient in (math.inf, 0.0, 0.0):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        scaler.scale(torch.zeros(1))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    moments = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    assert all(torch.equal(value, torch.zeros_like(value)) for value in moments if value.ndim)


@pytest.mark.parametrize("opt", ["adafactor", "lookahead_novograd", "kronw"])
def test_optimizers_that_cannot_update_sharded_weights_are_refused(opt: str) -> None:
    with pytest.raises(GrowkitError, match=f"--opt {opt}: it cannot update sharded weights; leave out --shard"):
        optimizer_of(Net(), replace(PLAIN, opt=opt, shard=True))
    optimizer_of(Net(), replace(PLAIN, opt=opt))


def test_auto_precision_is_what_it_meant_when_a_run_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(PLAIN, steps=2)
    fit(Net(), blobs(), settings, folder=tmp_path)
    fit(Net(), blobs(), replace(settings, precision="fp32"), folder=tmp_path, resume=True)
    monkeypatch.setattr("growkit.train.loop.precision_on", lambda *_: "bf16")  # as on a GPU
    with pytest.raises(GrowkitError, match="started with --precision fp32, not bf16"):
        fit(Net(), blobs(), settings, folder=tmp_path, resume=True)


def test_moving_average_without_evaluation_is_refused() -> None:
    with pytest.raises(GrowkitError, match="--model-ema needs data to evaluate on"):
        fit(Net(), blobs(), replace(PLAIN, model_ema=True))


def test_metrics_file_holds_the_records(tmp_path: Path) -> None:
    records: list[StepRecord] = []
    data, settings = blobs(), replace(PLAIN, steps=10, log_every=3)
    judge = scorer(data, settings)
    result = fit(Net(), data, settings, folder=tmp_path, evaluate=judge, on_step=records.append)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [asdict(record) for record in records]
    assert [line["step"] for line in lines] == [3, 6, 8, 9, 10]
    assert [line["scores"] is not None for line in lines] == [False, False, True, False, True]
    assert [line["loss"] for line in lines] == [result.losses[line["step"] - 1] for line in lines]
    assert all(line["images_per_second"] > 0 for line in lines)


def test_how_far_a_run_is_shows_before_every_batch_however_rarely_it_records(tmp_path: Path) -> None:
    told: list[tuple[float, int, str]] = []

    def progress(done: float, total: int, note: str = "") -> None:
        told.append((done, total, note))

    data, settings = blobs(), replace(PLAIN, steps=4, grad_accum_steps=2, batch_size=4, eval_every=0.0, log_every=2)
    result = fit(Net(), data, settings, folder=tmp_path, evaluate=scorer(data, settings), progress=progress)
    assert [done for done, _, _ in told] == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4]
    assert {total for _, total, _ in told} == {4}
    notes = [note for _, _, note in told]
    assert not notes[0]
    assert all(note.endswith(" images/s") and "loss" not in note for note in notes[1:4])
    assert all(f"loss {result.losses[1]:.4f} lr" in note for note in notes[4:8])
    assert f"loss {result.losses[3]:.4f} top-1 {result.history[-1][1].top1:.2%} lr" in notes[8]
    told.clear()
    fit(Net(), data, replace(settings, log_every=4), folder=tmp_path, resume=True, progress=progress)
    assert [done for done, _, _ in told] == [4]


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[loop.FitResult, list[str]]]:
    """fit where each update takes two seconds of a clock: its result and notes; asked to stop before update `stop`."""

    def run(settings: FitSettings, stop: float = -1, **more: Any) -> tuple[loop.FitResult, list[str]]:
        told: list[str] = []
        seconds = [0.0]
        monkeypatch.setattr(loop.time, "perf_counter", lambda: seconds[0])

        def progress(done: float, total: int, note: str = "") -> None:
            told.append(note)
            seconds[0] += 2
            if done == stop:
                signal.raise_signal(signal.SIGINT)

        return fit(Net(), blobs(), settings, progress=progress, **more), told

    return run


def test_rate_before_the_first_record_counts_the_time_before_a_save(
    tmp_path: Path, ticking: Callable[..., tuple[loop.FitResult, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    saves: list[int] = []
    real = loop.resuming.save_state
    monkeypatch.setattr(loop.resuming, "save_state", lambda at, state: (saves.append(state["step"]), real(at, state)))
    _, told = ticking(replace(PLAIN, steps=5, log_every=50, save_seconds=3.0), folder=tmp_path)
    assert told[1:5] == [f"{PLAIN.batch_size / 2:.0f} images/s"] * 4
    assert saves == [2, 4, 5]


def test_rates_leave_out_the_time_before_the_first_update(
    ticking: Callable[..., tuple[loop.FitResult, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scoring the start of a run may take minutes."""

    def score(_: nn.Module) -> None:
        now = loop.time.perf_counter
        monkeypatch.setattr(loop.time, "perf_counter", lambda: now() + 100)

    result, told = ticking(PLAIN, on_start=score)
    assert told[1].endswith(f" {PLAIN.batch_size / 2:.0f} images/s")
    assert (result.seconds, result.images_per_second) == (110, PLAIN.batch_size / 2)


def test_slow_rates_have_two_digits(ticking: Callable[..., tuple[loop.FitResult, list[str]]]) -> None:
    _, told = ticking(replace(PLAIN, steps=3, batch_size=3, log_every=2))
    assert told[1] == "1.5 images/s"
    assert all(note.endswith(" 1.5 images/s") for note in told[2:])


def test_rates_of_an_interrupted_run_and_of_what_goes_on_count_their_own_time_once(
    tmp_path: Path, ticking: Callable[..., tuple[loop.FitResult, list[str]]]
) -> None:
    settings = replace(PLAIN, steps=9, log_every=50)
    for resume, steps, seconds in ((False, 4, 10), (True, 9, 8 + 12)):  # the state was saved after 8
        result, told = ticking(settings, stop=3, folder=tmp_path, resume=resume)
        assert (result.steps, result.seconds) == (steps, seconds)
        assert told[1:5] == [f"{PLAIN.batch_size / 2:.0f} images/s"] * 4
        assert result.images_per_second == PLAIN.batch_size / 2
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["images_per_second"] == PLAIN.batch_size / 2


@pytest.mark.parametrize("optimizer", ["adamw", "lookahead_adamw"])
def test_optimizer_that_is_known_and_cannot_be_made_is_not_said_to_be_mistyped(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("CUDA required")

    monkeypatch.setattr(optimizer_module, "create_optimizer_v2", refused)
    with pytest.raises(GrowkitError, match=r"\(CUDA required\); give adamw, sgd, lamb or another of timm's"):
        fit(Net(), blobs(), replace(PLAIN, opt=optimizer))


@pytest.mark.parametrize("how", ["raise", "SIGINT", "SIGTERM"])
def test_interrupt_ends_after_the_update_and_keeps_what_was_learned(tmp_path: Path, how: str) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def interrupt(record: StepRecord) -> None:
        if record.step == 3:
            if how == "raise":
                raise KeyboardInterrupt
            os.kill(os.getpid(), getattr(signal, how))

    model = Net()
    result = fit(model, blobs(), replace(PLAIN, steps=9), folder=tmp_path, on_step=interrupt)
    assert (result.steps, result.total, result.interrupted) == (3, 9, True)
    assert result.stopped_by == (None if how == "raise" else getattr(signal, how))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert saved["step"] == len(saved["losses"]) == 3
    assert torch.equal(saved["training"]["model"]["head.weight"], model.head.weight)
    fit(other := Net(), blobs(), replace(PLAIN, steps=9))
    assert not torch.equal(other.head.weight, model.head.weight)


def test_signal_during_an_update_lets_it_finish(tmp_path: Path) -> None:
    class Signalling(Net):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += self.training
            if self.calls == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return super().forward(x)

    result = fit(Signalling(), blobs(), replace(PLAIN, log_every=50), folder=tmp_path)
    assert (result.steps, result.interrupted, len(result.losses)) == (2, True, 2)


class Struck(nn.Module):
    """A linear model that is sent a signal, `at` training passes on or while it is scored a `scoring`th time."""

    def __init__(self, at: int = -1, scoring: int = -1, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.number = number
        self.head = nn.Linear(3 * 8 * 8, 2)
        self.at, self.scoring, self.passes, self.scored = at, scoring, 0, 0
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        self.passes += self.training
        self.scored += not self.training and len(x) > 1  # one image tells how many outputs there are
        if (self.passes, self.training) == (self.at, True) or (self.scored, self.training) == (self.scoring, False):
            self.at = self.scoring = -1
            os.kill(os.getpid(), self.number)
        return self.head(x.flatten(1))


@pytest.mark.parametrize(("at", "log_every", "recorded"), [(12, 50, []), (12, 1, [1, 2]), (17, 50, [])])
def test_signal_between_the_batches_of_an_update_lets_go_of_them(
    tmp_path: Path, at: int, log_every: int, recorded: list[int]
) -> None:
    """An update of a thousand batches may take longer than a scheduler waits. The last of four is one, too."""
    settings = replace(PLAIN, grad_accum_steps=5, log_every=log_every, opt="sgd")
    told: list[int] = []
    stopped = fit(model := Struck(at=at), blobs(), settings, folder=tmp_path, on_step=lambda now: told.append(now.step))
    assert (stopped.steps, stopped.interrupted, len(stopped.losses), model.passes) == (at // 5, True, at // 5, at)
    assert model.head.weight.grad is None
    assert told == recorded
    resumed = fit(other := Struck(), blobs(), settings, folder=tmp_path, resume=True)
    unbroken = fit(whole := Struck(), blobs(), settings)
    assert resumed.losses == unbroken.losses
    assert torch.equal(other.head.weight, whole.head.weight)


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_signal_before_anything_is_learned_leaves_nothing(
    tmp_path: Path, number: int, kind: type[BaseException]
) -> None:
    with pytest.raises(KeyboardInterrupt) as raised:
        fit(Struck(at=2, number=number), blobs(), replace(PLAIN, grad_accum_steps=5), folder=tmp_path)
    assert type(raised.value) is kind
    assert list(tmp_path.iterdir()) == []


def test_update_whose_batches_leave_a_trace_is_finished(tmp_path: Path) -> None:
    """Running statistics of batches that count for nothing would stay."""
    settings = replace(PLAIN, grad_accum_steps=5, log_every=50)
    struck = nn.Sequential(nn.BatchNorm2d(3), model := Struck(at=12))
    assert (fit(struck, blobs(), settings, folder=tmp_path).steps, model.passes) == (3, 15)


def scored_run(model: Struck, folder: Path, *, resume: bool = False, accumulate: int = 1) -> loop.FitResult:
    """Six updates, scored after each second one."""
    data = blobs()
    settings = replace(PLAIN, eval_every=0.25 * accumulate, steps=6, grad_accum_steps=accumulate)
    judge = scorer(data, replace(settings, batch_size=64))
    return fit(model, data, settings, evaluate=judge, folder=folder, resume=resume)


def lines_of(folder: Path) -> list[dict[str, object]]:
    """metrics.jsonl without rates."""
    return [{**json.loads(line), "images_per_second": 0} for line in (folder / "metrics.jsonl").open()]


@pytest.mark.parametrize(("at", "accumulate", "steps"), [(3, 1, 3), (4, 1, 4), (14, 4, 3), (10, 4, 2)])
def test_stop_after_a_scoring_keeps_it_and_one_before_does_without(
    tmp_path: Path, at: int, accumulate: int, steps: int
) -> None:
    """In the update after one, in the update that is to be scored, and between the batches of the two after one."""
    stopped = scored_run(model := Struck(at=at), tmp_path / "run", accumulate=accumulate)
    assert (stopped.steps, stopped.interrupted, [step for step, _ in stopped.history]) == (steps, True, [2])
    assert model.scored == 1
    assert len(torch.load(tmp_path / "run" / "state.pt", weights_only=True)["history"]) == 1
    resumed = scored_run(model := Struck(), tmp_path / "run", resume=True, accumulate=accumulate)
    unbroken = scored_run(Struck(), tmp_path / "unbroken", accumulate=accumulate)
    assert (resumed.history, resumed.losses, model.scored) == (unbroken.history, unbroken.losses, 2)
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "unbroken")


def test_signal_while_state_is_saved_before_scoring_comes_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing the state of a large model takes long, and schedulers give little time."""
    real = loop.resuming.save_state

    def slow(*given: object) -> None:
        real(*given)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.resuming, "save_state", slow)
    stopped = scored_run(model := Struck(), tmp_path)
    assert (stopped.steps, stopped.interrupted, model.scored, stopped.stopped_by) == (2, True, 0, signal.SIGTERM)


@pytest.mark.parametrize("scoring", [1, 3])  # in the run's midst, and the last one
def test_signal_while_scoring_ends_at_once_and_it_is_made_up_for(tmp_path: Path, scoring: int) -> None:
    stopped = scored_run(model := Struck(scoring=scoring), tmp_path / "run")
    assert (stopped.steps, stopped.interrupted, model.scored) == (2 * scoring, True, scoring)
    assert len(stopped.history) == scoring - 1
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == 2 * scoring
    resumed, unbroken = (scored_run(Struck(), tmp_path / name, resume=name == "run") for name in ("run", "unbroken"))
    assert (resumed.history, resumed.losses) == (unbroken.history, unbroken.losses)
    assert not resumed.interrupted
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "unbroken")


def test_signal_is_answered_where_it_does_not_end_a_run_at_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(Struck):
        def forward(self, x: Tensor) -> Tensor:
            made = super().forward(x)
            if self.training and self.passes == 2:
                time.sleep(0.5)
            return made

    for answered in (0.1, 60.0):
        caplog.clear()
        monkeypatch.setattr(watch, "ANSWERED", answered)
        assert fit(Slow(at=2), blobs(), PLAIN).steps == 2
        for waiting in threading.enumerate():
            if isinstance(waiting, threading.Timer):
                waiting.join(10)
                assert not waiting.is_alive()
        assert caplog.messages == ([watch.ANSWER] if answered < 0.5 else [])


def test_second_signal_stops_at_once() -> None:
    class Impatient(Net):
        def forward(self, x: Tensor) -> Tensor:
            if signal.getsignal(signal.SIGINT) is not before:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
            return super().forward(x)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(Impatient(), blobs(), PLAIN)
    assert signal.getsignal(signal.SIGINT) is before


class Exploding(Net):
    """Gives nan from its third training pass on."""

    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += self.training
        return super().forward(x) * (math.nan if self.passes > 2 else 1)


@pytest.mark.parametrize("log_every", [1, 50])
def test_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path: Path, log_every: int) -> None:
    settings = replace(PLAIN, steps=9, save_seconds=0.0, log_every=log_every)
    message = f"^the loss is nan at update 3; try a lower --lr.*update 2 is in {tmp_path}$"
    with pytest.raises(GrowkitError, match=message):
        fit(Exploding(), blobs(), settings, folder=tmp_path)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == 2
    assert all(value.isfinite().all() for value in state["training"]["model"].values())


class Overflowing(Net):
    """Has infinite gradients in the training passes that `when` names, from 1."""

    def __init__(self, when: Callable[[int], bool]) -> None:
        super().__init__()
        self.passes = 0
        self.when = when
        self.head.weight.register_hook(lambda grad: grad * (math.inf if self.when(self.passes) else 1))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += self.training
        return super().forward(x)


@pytest.mark.parametrize("model_ema", [False, True])
def test_weights_that_are_not_finite_are_never_scored_kept_or_saved(tmp_path: Path, model_ema: bool) -> None:
    """The loss of the update that breaks them is still finite, and it is where the run evaluates."""
    settings = replace(PLAIN, steps=9, save_seconds=0.0, eval_every=1 / 8, model_ema=model_ema)
    seen: list[bool] = []

    def look(model: nn.Module, *_: Scores) -> Scores:
        seen.append(all(bool(value.isfinite().all()) for value in model.state_dict().values()))
        return Scores(top1=len(seen) / 100, top5=1.0, loss=1.0, ece=0.0, count=1)

    message = f"^weights are not finite after update 3; try a lower --lr.*update 2 is in {tmp_path}$"
    with pytest.raises(GrowkitError, match=message):
        fit(Overflowing(lambda n: n == 3), blobs(), settings, folder=tmp_path, evaluate=look, on_best=look)
    assert seen == [True] * 4
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == 2
    held = {**state["training"]["model"], **state["training"]["ema"]}
    assert all(value.isfinite().all() for value in held.values())


def test_weights_that_are_not_finite_are_not_saved_where_a_run_is_stopped_either(tmp_path: Path) -> None:
    def stopped(number: int) -> bool:
        if number == 3:
            signal.raise_signal(signal.SIGINT)
        return number == 3

    with pytest.raises(GrowkitError, match=r"^weights are not finite after update 3; try .* --precision fp32$"):
        fit(Overflowing(stopped), blobs(), replace(PLAIN, log_every=50), folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_float16_may_skip_updates_but_not_all_of_them(tmp_path: Path) -> None:
    settings = replace(PLAIN, steps=60, precision="fp16", save_seconds=0.0)
    result = fit(Overflowing(lambda n: n % 4 == 0), blobs(), replace(settings, steps=40))
    assert not result.interrupted
    assert all(math.isfinite(loss) for loss in result.losses)
    message = r"^float16 overflows in update after update \(loss scale 2.0e-03 at update 25\); try --precision bf16"
    with pytest.raises(GrowkitError, match=message):
        fit(Overflowing(lambda n: True), blobs(), settings, folder=tmp_path)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 24


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_learns_and_leaves_float32_weights(precision: str) -> None:
    dtypes: set[torch.dtype] = set()
    model = Net()
    # FLOPs are counted on the meta device
    model.head.register_forward_hook(lambda *given: None if given[2].is_meta else dtypes.add(given[2].dtype))
    settings = replace(PLAIN, steps=30, lr=0.02, precision=precision)
    result = fit(model, blobs(), settings)
    assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert result.losses[-1] < 0.5 * result.losses[0]


@pytest.mark.parametrize(
    ("changes", "classes", "message"),
    [
        ({}, 3, "the data has 3 classes but the model has 2 outputs"),
        ({"mixup": 0.5, "batch_size": 7}, 2, "7 is odd; set --batch-size 6"),
        ({"mixup": 0.5, "batch_size": 1}, 2, "1 is odd; set --batch-size 2"),
        ({"warmup_epochs": 0.5}, 2, r"--warmup-epochs 0.5 \(4 updates\) must be shorter"),
        ({"opt": "sdg"}, 2, "--opt sdg: not an optimizer"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_a_line(changes: dict[str, object], classes: int, message: str) -> None:
    with pytest.raises(GrowkitError, match=message) as caught:
        fit(Net(), blobs(classes=classes), replace(PLAIN, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_label_beyond_the_outputs_is_refused_where_classes_have_no_names(mixup: float) -> None:
    data = replace(blobs(classes=3), classes=[])
    with pytest.raises(GrowkitError, match="but the model has 2 outputs"):
        fit(Net(), data, replace(PLAIN, mixup=mixup))


def test_label_beyond_the_outputs_is_refused_wherever_it_comes_first() -> None:
    settings, met = replace(PLAIN, steps=8), []
    images, labels = blobs().train.tensors
    numbered = Data(train=TensorDataset(images, torch.arange(64)), val=blobs().val, classes=[])
    _, last = next(train_batches(numbered, settings, 7, 8))
    data = replace(numbered, train=TensorDataset(images, labels.index_fill(0, last[-1:], 2)))
    with pytest.raises(GrowkitError, match="but the model has 2 outputs"):
        fit(Net(), data, settings, on_step=lambda record: met.append(record.step))
    assert met == [1, 2, 3, 4, 5, 6, 7]


def test_tensorboard_files_hold_losses_and_scores(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    data, settings = blobs(), replace(PLAIN, tensorboard=True)
    judge = scorer(data, settings)
    result = fit(Net(), data, settings, folder=tmp_path, evaluate=judge)
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [event.value for event in events.Scalars("loss")]
    assert losses == pytest.approx(result.losses, rel=1e-6)
    assert events.Scalars("val/top1")[0].step == 4


def test_tensorboard_holds_a_scored_step_once_where_a_run_was_killed_before_it_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    data, settings = blobs(), replace(PLAIN, tensorboard=True, eval_every=0.25)
    judge, real, calls = scorer(data, settings), loop.resuming.save_state, []

    def killing(*given: object) -> None:
        calls.append(1)
        if len(calls) == 2:  # the first is before scoring
            raise MemoryError
        real(*given)

    monkeypatch.setattr(loop.resuming, "save_state", killing)
    with pytest.raises(MemoryError):
        fit(Net(), data, settings, folder=tmp_path, evaluate=judge)
    fit(Net(), data, settings, folder=tmp_path, evaluate=judge, resume=True)
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("val/top1")] == [2, 4]
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert all(event.value > 0 for event in events.Scalars("images_per_second"))


def test_missing_tensorboard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(GrowkitError, match=r"pip install 'growkit\[tensorboard\]'"):
        fit(Net(), blobs(), replace(PLAIN, tensorboard=True), folder=tmp_path)


def grey_digits() -> tuple[nn.Module, Data]:
    """A timm ViT with drop path, and grey images for it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        digits = TensorDataset(torch.rand(16, 1, 8, 8), torch.arange(16) % 4)
        sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 24, "depth": 2, "num_classes": 4}
        model = timm.create_model("vit_tiny_patch16_224", **sizes, drop_path_rate=0.2)
    return model, Data(train=digits, val=digits, classes=list("abcd"))


def test_timm_vit_with_drop_path_trains_on_grey_digits() -> None:
    model, data = grey_digits()
    result = fit(model, data, replace(PLAIN, steps=12, batch_size=16, model_ema=False))
    assert result.losses[-1] < result.losses[0]
    assert result.flops_per_step == 2 * result.macs_per_step > 0


def test_blocks_computed_again_learn_the_same_and_cost_their_forward_pass() -> None:
    settings = replace(PLAIN, steps=6, batch_size=16)
    (plain, data), (again, _) = grey_digits(), grey_digits()
    usual = fit(plain, data, settings)
    recomputed = fit(again, data, replace(settings, grad_checkpointing=True))
    assert recomputed.losses == usual.losses
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in again.state_dict().items())
    assert usual.flops_per_step < recomputed.flops_per_step < 1.34 * usual.flops_per_step


def test_model_without_blocks_cannot_compute_them_again() -> None:
    with pytest.raises(GrowkitError, match="--grad-checkpointing: this model has no blocks"):
        fit(Net(), blobs(), replace(PLAIN, grad_checkpointing=True))


def test_only_training_runs_compiled_and_counts_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, bool]] = []

    def compiled(model: nn.Module, *, mode: str) -> Callable[[Tensor], Tensor]:
        return lambda images: (calls.append((mode, model.training)), model(images))[1]

    monkeypatch.setattr(torch, "compile", compiled)
    data, settings = blobs(), replace(PLAIN, compile="reduce-overhead")
    result = fit(Net(), data, settings, evaluate=scorer(data, settings))
    assert calls == [("reduce-overhead", True)] * 4
    assert result.flops_per_step == fit(Net(), data, PLAIN).flops_per_step


def test_progress_says_that_the_first_update_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, *, mode: model)
    for compile, first in (("default", "compiling first"), (None, "")):
        notes: list[str] = []
        settings = replace(PLAIN, compile=compile, log_every=1)
        fit(Net(), blobs(), settings, progress=lambda done, total, note="", notes=notes: notes.append(note))
        assert notes[0] == first
        assert "loss" in notes[-1]


def an_operator() -> nn.Module:
    source, target = tiny(16, 1, 2, num_classes=2), tiny(32, 1, 4, num_classes=2)
    return grow(source, target, published_scale(source).state_dict(), GrowSettings(rank=1))


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("make", [an_operator, lambda: published_scale(tiny(16, 1, 2, num_classes=2))])
def test_batches_add_up_where_every_gradient_comes_from_the_same_memory(
    make: Callable[[], nn.Module], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As CUDA graphs give them: autograd keeps the first as .grad, and the next run writes over it."""
    written: dict[str, np.ndarray] = {}

    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx, name: str, weight: Tensor) -> Tensor:
            ctx.name = name
            return weight.view_as(weight)

        @staticmethod
        def backward(ctx, grad: Tensor) -> tuple[None, Tensor]:
            memory = written.setdefault(ctx.name, np.empty(tuple(grad.shape), np.float32))
            memory[...] = grad.numpy()
            return None, torch.from_numpy(memory)

    def passed_on(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: Same.apply(name, weight) for name, weight in weights.items()}

    def compiled(model: nn.Module, *, mode: str) -> Callable[[Tensor], Tensor]:
        if not isinstance(model, GrownModel):
            return lambda images: functional_call(model, passed_on(dict(model.named_parameters())), images)
        own = model._weights_of
        model._weights_of = lambda grown: passed_on(own(grown))
        return model

    monkeypatch.setattr(torch, "compile", compiled)
    labels = torch.arange(24) % 2
    noise = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pairs = TensorDataset(labels[:, None, None, None] * 2.0 - 1 + 0.5 * noise, labels)
    data = Data(train=pairs, val=pairs, classes=["dark", "light"])
    settings = replace(PLAIN, batch_size=4, grad_accum_steps=3, opt="sgd")
    usual = fit(whole := make(), data, settings)
    assert fit(found := make(), data, replace(settings, compile=mode)).losses == pytest.approx(usual.losses, rel=1e-5)
    monkeypatch.setattr("growkit.train.training._own_gradients", lambda _: None)  # what the test would let through
    fit(wrong := make(), data, replace(settings, compile=mode))

    def away(model: nn.Module) -> float:
        both = zip(model.parameters(), whole.parameters(), strict=True)
        return max(float((one - other).detach().abs().max()) for one, other in both)

    assert away(found) < 1e-6 < 1e-4 < away(wrong)


@pytest.mark.slow  # the compiler takes its time
def test_compiled_network_learns_the_same_to_rounding() -> None:
    settings = replace(PLAIN, steps=6, batch_size=16)
    (plain, data), (compiled, _) = grey_digits(), grey_digits()
    for block in (*plain.blocks, *compiled.blocks):  # compiled dropout draws other numbers
        block.drop_path1.drop_prob = block.drop_path2.drop_prob = 0.0
    usual = fit(plain, data, settings)
    assert fit(compiled, data, replace(settings, compile="default")).losses == pytest.approx(usual.losses, rel=1e-4)


@pytest.mark.parametrize(("chosen", "inside"), [(True, "tf32"), (False, "ieee")])
def test_updates_alone_multiply_in_tf32(chosen: bool, inside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = torch.backends.cuda.matmul
    outside = place.fp32_precision
    seen: dict[bool, set[str]] = {True: set(), False: set()}  # by whether the model trains
    monkeypatch.setattr("growkit.train.loop.refuse_tf32", lambda *_: None)  # the setting is there without a GPU
    model, data = Net(), blobs()
    model.register_forward_pre_hook(
        lambda module, given: None if given[0].is_meta else seen[module.training].add(place.fp32_precision)
    )
    fit(model, data, replace(PLAIN, tf32=chosen), evaluate=scorer(data, PLAIN))
    assert seen == {True: {inside}, False: {"ieee"}}
    assert place.fp32_precision == outside


@pytest.mark.slow  # the compiler takes its time
@pytest.mark.parametrize("batches", [1, 2])
def test_compiled_operator_learns_the_same_and_its_ring_is_left_alone(
    batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ring is cut into slices here; compiled, each would be traced, and its planning too."""
    from torch._dynamo.utils import counters  # takes seconds to import

    monkeypatch.setattr("growkit.core.ring_plan.FEWEST_ELEMENTS", 2**8)
    source, target = (tiny(*size) for size in ((32, 2, 2), (64, 2, 4)))
    state = published_scale(source).state_dict()
    images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pairs = TensorDataset(images, torch.arange(16) % 7)
    data = Data(train=pairs, val=pairs, classes=list("abcdefg"))
    settings = replace(PLAIN, steps=4, batch_size=16 // batches, grad_accum_steps=batches)
    usual = fit(grow(source, target, state, GrowSettings(rank=2)), data, settings)
    torch.compiler.reset()
    counters.clear()
    compiled = fit(grow(source, target, state, GrowSettings(rank=2)), data, replace(settings, compile="default"))
    assert compiled.losses == pytest.approx(usual.losses, rel=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


def test_run_begun_anew_leaves_nothing_of_the_one_before_in_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    fit(Net(), blobs(), replace(PLAIN, tensorboard=True), folder=tmp_path)
    assert any((tmp_path / "tensorboard").iterdir())
    fit(Net(), blobs(), PLAIN, folder=tmp_path)
    assert not any((tmp_path / "tensorboard").iterdir())
