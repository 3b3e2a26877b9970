"""A run that was stopped anywhere and resumed ends bit for bit where the unbroken one does."""

import json
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from train_samples import CONFIG, Net, write_images

from growkit.errors import GrowkitError, is_memory_full
from growkit.train import resume
from growkit.train.batches import val_batches
from growkit.train.data import Data, open_data
from growkit.train.loop import FitResult, fit
from growkit.train.resume import load_optimizer, load_trainable, trainable_state
from growkit.train.score import Scores, evaluate, predictor
from growkit.train.settings import FitSettings
from growkit.train.watch import StepRecord

Open = Callable[[FitSettings], Data]

# everything random or averaged at once: 26 images, 3 batches an epoch, 1.5 updates an epoch
ALL_ON = FitSettings(
    steps=9,
    batch_size=8,
    grad_accum_steps=2,
    lr=0.01,
    weight_decay=0.1,
    smoothing=0.1,
    mixup=0.8,
    cutmix=1.0,
    aa="rand-m9-mstd0.5",
    reprob=0.3,
    model_ema=True,
    model_ema_decay=0.9,
    eval_every=1.3,
    log_every=2,
    save_seconds=0.0,
    workers=0,
)


def test_updates_are_computed_as_this_run_computes_them_whatever_the_saved_one_did() -> None:
    """A run with --shard has no fused SGD: torch's DTensor would refuse it at the first update."""
    fused, plain = (torch.optim.SGD(Net().parameters(), lr=lr, fused=fused) for lr, fused in ((0.3, True), (0.1, None)))
    load_optimizer(plain, fused.state_dict())
    assert (plain.param_groups[0]["fused"], plain.param_groups[0]["lr"]) == (None, 0.3)
    load_optimizer(fused, plain.state_dict())
    assert fused.param_groups[0]["fused"] is True


class KilledError(Exception):
    """Stands for a killed process: nothing of fit runs after it, not even saving."""


class Run:
    """Runs of fit into one folder, and what they left."""

    def __init__(self, folder: Path, data: Data):
        self.folder, self.data, self.model = folder, data, Net()
        self.best: dict[str, Tensor] = {}

    def fit(self, settings: FitSettings, *, kill_at: int | None = None, **more: Any) -> FitResult:
        self.model = Net()
        if kill_at is not None:
            killing = self.model.head.register_forward_pre_hook(Kill(kill_at, settings))
        try:
            given = {"evaluate": self.judge, "on_best": self.keep, **more}
            return fit(self.model, self.data, settings, folder=self.folder, **given)
        finally:
            if kill_at is not None:
                killing.remove()

    def judge(self, model: nn.Module) -> Scores:
        return evaluate(predictor(model, "cpu"), val_batches(self.data, ALL_ON))

    def keep(self, model: nn.Module, scores: Scores) -> None:
        self.best = {name: value.clone() for name, value in model.state_dict().items()}

    def metrics(self) -> list[dict[str, Any]]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [{**json.loads(line), "images_per_second": 0} for line in lines]


class Kill:
    """Raises KilledError in the second batch of update `step`."""

    def __init__(self, step: int, settings: FitSettings):
        self.left = step * settings.grad_accum_steps

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        if module.training:
            self.left -= 1
            if self.left == 0:
                raise KilledError


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, opened: Open) -> tuple[Run, FitResult]:
    """A run that nobody stopped."""
    run = Run(tmp_path_factory.mktemp("unbroken"), opened(ALL_ON))
    return run, run.fit(ALL_ON)


def without_times(result: FitResult) -> FitResult:
    return replace(result, seconds=0.0, images_per_second=0.0)


@pytest.mark.parametrize("kill_at", [2, 3, 5, 9])
def test_killed_and_resumed_run_ends_where_the_unbroken_one_does(
    unbroken: tuple[Run, FitResult], tmp_path: Path, opened: Open, kill_at: int
) -> None:
    whole, expected = unbroken
    run = Run(tmp_path / "killed", opened(ALL_ON))
    with pytest.raises(KilledError):
        run.fit(ALL_ON, kill_at=kill_at)
    workers = replace(ALL_ON, workers=kill_at % 2)  # readers may change, the result may not
    result = run.fit(workers, resume=True)
    assert same(run.model.state_dict(), whole.model.state_dict())
    assert same(run.best, whole.best)
    assert run.metrics() == whole.metrics()
    assert without_times(result) == without_times(expected)
    ends = (torch.load(r.folder / "state.pt", weights_only=True)["training"] for r in (run, whole))
    first, second = ends
    assert same(first["ema"], second["ema"])
    assert str(first["optimizer"]) == str(second["optimizer"])


def test_loss_scale_of_float16_goes_on_where_it_was(tmp_path: Path, opened: Open) -> None:
    half = replace(ALL_ON, precision="fp16")
    run, whole = (Run(tmp_path / name, opened(half)) for name in ("killed", "whole"))
    with pytest.raises(KilledError):
        run.fit(half, kill_at=6)
    run.fit(half, resume=True)
    whole.fit(half)
    scalers = [torch.load(r.folder / "state.pt", weights_only=True)["training"]["scaler"] for r in (run, whole)]
    assert scalers[0] == scalers[1]
    assert scalers[0]["_growth_tracker"] == 9  # of updates in a row that did not overflow


@pytest.mark.parametrize("where", ["append_metrics", "save_state"])
@pytest.mark.parametrize("at", [2, 4, 9])
@pytest.mark.parametrize("judged", [True, False])
def test_run_killed_between_a_record_and_its_state_loses_no_line_of_metrics(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch, where: str, at: int, judged: bool
) -> None:
    settings = replace(ALL_ON, log_every=1, model_ema=False)
    runs = [Run(tmp_path / name, opened(settings)) for name in ("killed", "whole")]
    judge: dict[str, Any] = {} if judged else {"evaluate": None}
    calls, real = [], getattr(resume, where)

    def killing(*given: Any) -> None:
        calls.append(1)
        if len(calls) == at:
            raise KilledError
        real(*given)

    monkeypatch.setattr(resume, where, killing)
    with pytest.raises(KilledError):
        runs[0].fit(settings, **judge)
    monkeypatch.undo()
    results = [run.fit(settings, resume=run is runs[0], **judge) for run in runs]
    assert without_times(results[0]) == without_times(results[1])
    assert runs[0].metrics() == runs[1].metrics()
    assert same(runs[0].model.state_dict(), runs[1].model.state_dict())


def test_run_killed_while_it_is_scored_scores_when_it_goes_on(
    unbroken: tuple[Run, FitResult], tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, expected = unbroken
    slow = replace(ALL_ON, save_seconds=1e9)
    run = Run(tmp_path, opened(slow))
    monkeypatch.setattr(run, "judge", MagicMock(side_effect=KilledError))
    with pytest.raises(KilledError):
        run.fit(slow)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert (saved["step"], saved["history"]) == (2, [])
    monkeypatch.undo()
    result = run.fit(slow, resume=True)
    assert same(run.model.state_dict(), whole.model.state_dict())
    assert same(run.best, whole.best)
    assert run.metrics() == whole.metrics()
    assert without_times(result) == without_times(expected)


def test_interrupted_run_resumes_to_the_same_end_and_metrics(
    unbroken: tuple[Run, FitResult], tmp_path: Path, opened: Open
) -> None:
    whole, expected = unbroken
    run = Run(tmp_path / "interrupted", opened(ALL_ON))

    def interrupt(record: StepRecord) -> None:
        raise KeyboardInterrupt

    slow = replace(ALL_ON, save_seconds=1e9)
    parts = [run.fit(slow, on_step=interrupt)]
    while parts[-1].interrupted:
        parts.append(run.fit(slow, on_step=interrupt, resume=True))
    assert len(parts) > 3
    assert same(run.model.state_dict(), whole.model.state_dict())
    assert run.metrics() == whole.metrics()
    assert without_times(parts[-1]) == without_times(expected)


def test_run_of_numpys_numbers_goes_on_like_any_other(
    unbroken: tuple[Run, FitResult], tmp_path: Path, opened: Open
) -> None:
    """A rate is often one of np.logspace, and a score a mean that NumPy took."""
    whole, expected = unbroken
    numpys = replace(ALL_ON, lr=np.float64(ALL_ON.lr), steps=np.int64(9))
    run = Run(tmp_path, opened(numpys))

    def judge(model: nn.Module) -> Scores:
        scores = run.judge(model)
        return replace(scores, top1=np.float64(scores.top1), count=np.int64(scores.count))

    with pytest.raises(KilledError):
        run.fit(numpys, kill_at=5, evaluate=judge)
    result = run.fit(numpys, resume=True, evaluate=judge)
    assert same(run.model.state_dict(), whole.model.state_dict())
    assert run.metrics() == whole.metrics()
    assert without_times(result) == without_times(expected)


def test_run_without_the_saved_average_or_optimizer_would_end_elsewhere(
    unbroken: tuple[Run, FitResult], tmp_path: Path, opened: Open
) -> None:
    whole, _ = unbroken
    for lost in ("optimizer", "ema", "model"):
        run = Run(tmp_path / lost, opened(ALL_ON))
        with pytest.raises(KilledError):
            run.fit(ALL_ON, kill_at=5)
        state = torch.load(run.folder / "state.pt", weights_only=True)
        if lost == "optimizer":
            state["training"]["optimizer"]["state"] = {}
        else:
            state["training"][lost] = trainable_state(Net())
        torch.save(state, run.folder / "state.pt")
        run.fit(ALL_ON, resume=True)
        judged = "ema" if lost == "ema" else "model"
        ends = [torch.load(r.folder / "state.pt", weights_only=True)["training"][judged] for r in (run, whole)]
        assert not same(*ends), lost


def test_finished_run_resumes_to_its_own_result(unbroken: tuple[Run, FitResult]) -> None:
    whole, expected = unbroken
    run = Run(whole.folder, whole.data)
    assert without_times(run.fit(ALL_ON, resume=True)) == without_times(expected)


def test_state_holds_trained_parameters_and_buffers_but_no_frozen_weights() -> None:
    assert trainable_state(Net()).keys() == {
        *("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"),
        *("norm.num_batches_tracked", "head.weight", "head.bias"),
    }


@pytest.mark.parametrize("change", ["name", "shape"])
def test_state_of_another_model_is_refused(change: str) -> None:
    state = trainable_state(Net())
    value = state.pop("head.bias")
    state["head.bias" if change == "shape" else "tail.bias"] = torch.cat([value, value])
    with pytest.raises(GrowkitError, match=r"of another model \(head.bias differs\)"):
        load_trainable(Net(), state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.02}, "started with --lr 0.01, not 0.02"),
        ({"steps": 10}, "started with --steps 9, not 10"),
        ({"seed": 4}, "started with --seed 0, not 4"),
        ({"aa": None}, "started with --aa rand-m9-mstd0.5, not without it: give the same"),
        ({"opt": "sgd", "compile": "default"}, "started with no --compile, not default; --opt adamw, not sgd"),
        ({"model_ema": False}, "started with --model-ema, not without it"),
    ],
)
def test_resuming_with_other_settings_names_the_difference(
    unbroken: tuple[Run, FitResult], changes: dict[str, Any], message: str
) -> None:
    run = Run(unbroken[0].folder, unbroken[0].data)
    before = run.metrics()
    with pytest.raises(GrowkitError, match=message):
        run.fit(replace(ALL_ON, **changes), resume=True)
    assert run.metrics() == before


def test_resuming_for_longer_says_how(unbroken: tuple[Run, FitResult], tmp_path: Path) -> None:
    run = Run(unbroken[0].folder, unbroken[0].data)
    says = "; to train what it gave for longer, fine-tune that into another --run"
    for changes, told in (({"steps": 20}, True), ({"steps": 5}, False), ({"lr": 0.5}, False)):
        with pytest.raises(GrowkitError) as caught:
            run.fit(replace(ALL_ON, **changes), resume=True)
        assert str(caught.value).endswith(says) == told
    resume.save_state(tmp_path, {"identity": {"epochs": 1.5}, "step": 1, "training": {}})
    with pytest.raises(GrowkitError, match=f"started with --epochs 1.5, not 2.0: .*{says}$"):
        resume.load_state(tmp_path, {"epochs": 2.0})


def test_resuming_with_other_settings_names_all_of_them_at_once(unbroken: tuple[Run, FitResult]) -> None:
    run = Run(unbroken[0].folder, unbroken[0].data)
    says = r"started with --batch-size 8, not 4; --lr 0\.01, not 0\.5; --steps 9, not 5: give the same, or start"
    with pytest.raises(GrowkitError, match=says):
        run.fit(replace(ALL_ON, lr=0.5, batch_size=4, steps=5), resume=True)


def test_resuming_with_other_settings_reads_no_image(unbroken: tuple[Run, FitResult]) -> None:
    """With --cache, reading one means decoding all."""
    run = Run(unbroken[0].folder, replace(unbroken[0].data, train=MagicMock(**{"__len__.return_value": 26})))
    with pytest.raises(GrowkitError, match=r"started with --lr 0\.\d+, not 0\.5"):
        run.fit(replace(ALL_ON, lr=0.5), resume=True)
    assert not run.data.train.__getitem__.called


def test_resuming_with_other_data_names_the_difference(
    unbroken: tuple[Run, FitResult], images: Path, tmp_path: Path
) -> None:
    run = Run(unbroken[0].folder, unbroken[0].data)
    write_images(tmp_path / "other", "train", ["cat", "dog"], 14)
    write_images(tmp_path / "other", "val", ["cat", "dog"], 6)
    run.data = open_data(str(tmp_path / "other"), CONFIG, ALL_ON)
    with pytest.raises(GrowkitError, match=r"started with other training images \(some were added, .*\)[;:]"):
        run.fit(ALL_ON, resume=True)
    shutil.copytree(images, tmp_path / "same")
    place = next((tmp_path / "same" / "val").rglob("*.png"))
    place.rename(place.with_stem("another"))
    run.data = open_data(str(tmp_path / "same"), CONFIG, ALL_ON)
    with pytest.raises(GrowkitError, match=r"started with other validation images \(some were added, .*\): give"):
        run.fit(ALL_ON, resume=True)


def test_resuming_with_fewer_images_is_refused_where_no_file_is_named(unbroken: tuple[Run, FitResult]) -> None:
    """As of timm's datasets."""
    whole, _ = unbroken
    for part, told in (("train", "training images 26, not 8"), ("val", "validation images 12, not 8")):
        fewer = {part: Subset(getattr(whole.data, part), range(8))}
        with pytest.raises(GrowkitError, match=f"started with {told}: give"):
            Run(whole.folder, replace(whole.data, **fewer)).fit(ALL_ON, resume=True)


def test_other_classes_are_told_in_few_words(unbroken: tuple[Run, FitResult]) -> None:
    """A message may have a thousand classes to tell of."""
    run = Run(unbroken[0].folder, unbroken[0].data)
    data = run.data
    for classes, says in ((["cat", "cow"], "classes whose number 1 is dog, not cow"), (["cat"], "2 classes, not 1")):
        run.data = replace(data, classes=classes)
        with pytest.raises(GrowkitError, match=f"the run was started with {says}: give the same"):
            run.fit(ALL_ON, resume=True)


def test_resuming_without_a_state_is_refused(tmp_path: Path, opened: Open) -> None:
    with pytest.raises(GrowkitError, match="no state to resume from; start without --resume"):
        Run(tmp_path, opened(ALL_ON)).fit(ALL_ON, resume=True)


@pytest.mark.parametrize("content", [b"", b"rubbish", b"PK\x03\x04 cut off"])
def test_damaged_state_is_refused(tmp_path: Path, opened: Open, content: bytes) -> None:
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(GrowkitError, match=r"state.pt: damaged"):
        Run(tmp_path, opened(ALL_ON)).fit(ALL_ON, resume=True)


def test_state_of_which_a_bit_was_flipped_is_refused(tmp_path: Path, opened: Open) -> None:
    """torch loads it without a word."""
    run = Run(tmp_path, opened(ALL_ON))
    with pytest.raises(KilledError):
        run.fit(ALL_ON, kill_at=6)
    path = run.folder / "state.pt"
    content = bytearray(path.read_bytes())
    weights = torch.load(path, weights_only=True)["training"]["model"]
    place = content.index(max(weights.values(), key=torch.numel).numpy().tobytes()) + 5
    content[place] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)
    with pytest.raises(GrowkitError, match=r"state.pt: damaged"):
        run.fit(ALL_ON, resume=True)


@pytest.mark.parametrize(
    "content",
    [
        *({}, [1], {"identity": {}}, {"identity": {}, "step": 1}, {"identity": 5, "step": 1, "training": {}}),
        *({"identity": {}, "step": None, "training": {}}, {"identity": {}, "step": 1, "training": [1]}),
    ],
    ids=str,
)
def test_state_that_lacks_something_is_refused(content: object, tmp_path: Path, opened: Open) -> None:
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(GrowkitError, match=r"state.pt: damaged"):
        Run(tmp_path, opened(ALL_ON)).fit(ALL_ON, resume=True)


def test_state_that_cannot_be_read_for_now_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A remedy that deletes it, or a comparison that makes the run anew, would throw away what was learned."""
    resume.save_state(tmp_path, {"identity": {}, "step": 1, "training": {"weight": torch.zeros(2**24)}})
    assert resume.load_state(tmp_path, {})["step"] == 1
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**25, before[1]))
    try:
        with pytest.raises(RuntimeError) as caught:
            resume.load_state(tmp_path, {})
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert is_memory_full(caught.value)
    monkeypatch.setattr(Path, "open", MagicMock(side_effect=PermissionError))  # chmod stops no root
    with pytest.raises(GrowkitError, match=r"state.pt: cannot be read \(permission denied\); allow it"):
        resume.load_state(tmp_path, {})


def test_state_that_would_run_code_is_refused(tmp_path: Path, opened: Open) -> None:
    torch.save({"identity": KilledError}, tmp_path / "state.pt")
    with pytest.raises(GrowkitError, match=r"state.pt: damaged"):
        Run(tmp_path, opened(ALL_ON)).fit(ALL_ON, resume=True)


def test_new_run_in_the_folder_forgets_the_old_one(tmp_path: Path, opened: Open) -> None:
    run = Run(tmp_path, opened(ALL_ON))
    run.fit(ALL_ON)
    metrics = run.metrics()
    run.fit(ALL_ON)
    assert run.metrics() == metrics
    with pytest.raises(KilledError):
        run.fit(replace(ALL_ON, save_seconds=1e9), kill_at=1)
    assert not (run.folder / "state.pt").exists()


@pytest.mark.parametrize("torn", [b'{"step": 6, "to', b"5\n", b'{"loss": 2}\n', b'{"step": "x"}\n', b"\xff\xfe\n"])
def test_torn_last_line_of_metrics_is_written_again(
    torn: bytes, unbroken: tuple[Run, FitResult], tmp_path: Path, opened: Open
) -> None:
    whole, _ = unbroken
    run = Run(tmp_path / "torn", opened(ALL_ON))
    with pytest.raises(KilledError):
        run.fit(ALL_ON, kill_at=6)
    with (run.folder / "metrics.jsonl").open("ab") as stream:
        stream.write(torn)
    run.fit(ALL_ON, resume=True)
    assert run.metrics() == whole.metrics()
