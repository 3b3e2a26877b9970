"""How many images fit: against counted peaks, and told when memory runs out."""

import copy
from dataclasses import replace
from functools import cache
from typing import Any
from weakref import ReferenceType, ref

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from growkit.arch import build, find
from growkit.core.ring import RingOperator
from growkit.core.ring_plan import contraction_plan
from growkit.errors import GrowkitError
from growkit.grow import GrownModel, grow
from growkit.settings import GrowSettings
from growkit.train import batch_size
from growkit.train.batch_size import largest_batch, with_batch_size
from growkit.train.data import Data
from growkit.train.loop import fit
from growkit.train.memory import keep_what_fits, step_peak
from growkit.train.optimizer import ADAMW_KEEPS, numbers_kept
from growkit.train.settings import AUTO, FitSettings

CPU = torch.device("cpu")
SETTINGS = FitSettings(steps=1, batch_size=32, workers=0, warmup_epochs=0.0)


def images(count: int = 64) -> Data:
    held = TensorDataset(torch.rand(count, 3, 8, 8), torch.arange(count) % 4)
    return Data(train=held, val=held, classes=list("abcd"))


def vit(depth: int = 1) -> nn.Module:
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": depth, "num_classes": 4}
    return timm.create_model("vit_tiny_patch16_224", **sizes)


class Full(nn.Module):
    """A network whose device holds `room` images."""

    def __init__(self, room: int, error: Exception) -> None:
        super().__init__()
        self.room, self.error, self.net = room, error, vit()

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.room:
            raise self.error
        return self.net(x)


def peak(model: nn.Module, count: int) -> int:
    """Bytes of a step beside the weights, which are there already."""
    own = 4 * sum(p.numel() for p in model.parameters())
    return step_peak(copy.deepcopy(model).train(), (count, 3, 8, 8), "fp32") - own


@cache
def room_for(count: int) -> float:
    """Free bytes in which a step of `vit` on so many images just fits."""
    return (peak(vit(), count) + 0.5) / batch_size.ROOM


def test_largest_batch_fits_and_the_next_larger_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = vit(), images()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for free, found in ((peak(model, 40), 40), (peak(model, 47), 40), (peak(model, 1) - 1, 0)):
        monkeypatch.setattr(batch_size, "free_bytes", lambda device, free=free: (free + 0.5) / batch_size.ROOM)
        assert largest_batch(model, data, SETTINGS, CPU) == found
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: room_for(3))
    assert 1 <= largest_batch(model, data, SETTINGS, CPU) <= 3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("changes", "copies"), [({"model_ema": True}, 1), ({"opt": "lookahead_adamw"}, 1), ({}, 0)])
def test_moving_average_and_what_the_optimizer_keeps_take_room(
    changes: dict[str, Any], copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, settings = 4 * sum(p.numel() for p in vit().parameters()), replace(SETTINGS, **changes)
    for free, found in ((copies * own + peak(vit(), 24) + 0.5, 24), (copies * own + peak(vit(), 24) - 0.5, 16)):
        monkeypatch.setattr(batch_size, "free_bytes", lambda device, free=free: free / batch_size.ROOM)
        assert largest_batch(vit(), images(512), settings, CPU) == found


def test_moving_average_that_is_there_already_is_not_counted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[FitSettings] = []
    monkeypatch.setattr(batch_size, "largest_batch", lambda *given, **_: counted.append(given[2]) or 8)
    settings = replace(SETTINGS, model_ema=True)
    with pytest.raises(GrowkitError), batch_size.telling_what_fits(vit(), images(), settings, CPU):
        raise torch.OutOfMemoryError("full")
    assert [one.model_ema for one in counted] == [False]


@pytest.mark.parametrize(
    ("opt", "numbers"), [("adamw", 2), ("sgd", 1), ("momentum", 1), ("lion", 1), ("lookahead_adamw", 3)]
)
def test_numbers_that_an_optimizer_keeps_for_each_weight_are_counted(opt: str, numbers: int) -> None:
    before = torch.get_rng_state()
    assert numbers_kept(replace(SETTINGS, opt=opt)) == numbers
    assert torch.equal(torch.get_rng_state(), before)


def test_optimizer_that_runs_on_gpus_alone_is_taken_for_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("CUDA only")

    monkeypatch.setattr(torch.optim.SGD, "step", refuse)
    assert numbers_kept(replace(SETTINGS, opt="sgd")) == ADAMW_KEEPS


@pytest.mark.parametrize("native", ["bf16", "fp32"])
def test_precision_that_is_chosen_by_the_device_is_counted_as_there(
    native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        batch_size, "precision_on", lambda device, precision: native if precision == "auto" else precision
    )
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: 3 * 2**20)
    sizes = [largest_batch(vit(), images(512), replace(SETTINGS, precision=name), CPU) for name in ("auto", native)]
    assert sizes[0] == sizes[1]
    other = "fp32" if native == "bf16" else "bf16"
    assert sizes[0] != largest_batch(vit(), images(512), replace(SETTINGS, precision=other), CPU)


@pytest.mark.parametrize("mixing", [{"mixup": 0.8}, {"cutmix": 1.0}])
def test_images_that_are_mixed_are_counted_in_pairs(mixing: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SETTINGS, batch_size=6, **mixing)
    with monkeypatch.context() as patch:  # six are thought to fit, and do not
        patch.setattr(batch_size, "_runs", lambda model, batch, count, *_: count < 6)
        patch.setattr(batch_size, "limited", lambda: True)
        assert largest_batch(vit(), images(7), settings, CPU) == 2
    assert [largest_batch(vit(), images(count), settings, CPU) for count in (1, 3, 7, 9)] == [0, 2, 6, 8]
    for size, says in (
        (6, "6 images a batch; --batch-size 2 --grad-accum-steps 3 fits, "),
        (2, "of cpu holds not even the two images that are mixed"),
    ):
        mixed = replace(settings, batch_size=size)
        with pytest.raises(GrowkitError, match=says), batch_size.telling_what_fits(vit(), images(), mixed, CPU):
            raise torch.OutOfMemoryError("full")


def test_blocks_computed_again_leave_room_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit(depth=4)
    free = (peak(model, 24) + 0.5) / batch_size.ROOM
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: free)
    again = replace(SETTINGS, grad_checkpointing=True)
    assert largest_batch(model, images(512), SETTINGS, CPU) == 24
    assert largest_batch(model, images(512), again, CPU) > 40


def test_grown_models_are_counted_with_their_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    source = find("vit_tiny", {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3})
    target = find("vit_tiny", {"img_size": 8, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 6})
    grown = grow(source, target, build(source.name, source.arguments).state_dict(), GrowSettings(rank=2))
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: 6 * 2**20)
    assert 8 <= largest_batch(grown, images(512), SETTINGS, CPU) < 512
    assert all(p.device == CPU for p in grown.parameters())


def ring_pair(depth: int = 2) -> GrownModel:
    source = find("vit_tiny", {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": depth, "num_heads": 3})
    target = find("vit_tiny", {"img_size": 8, "patch_size": 4, "embed_dim": 48, "depth": depth, "num_heads": 6})
    return grow(source, target, build(source.name, source.arguments).state_dict(), GrowSettings(rank=4))


def test_operators_fill_the_room_though_images_take_less_once_all_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("growkit.core.ring_plan.FEWEST_ELEMENTS", 30_000)  # 16 slices
    contraction_plan.cache_clear()
    model = ring_pair()
    own = 4 * sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    free = step_peak(ring_pair().train(), (400, 3, 8, 8), "fp32") - own
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: (free + 0.5) / batch_size.ROOM)
    found = largest_batch(model, images(512), SETTINGS, CPU)
    contraction_plan.cache_clear()
    assert 0.95 * 400 <= found <= 400


def test_trial_of_a_size_keeps_what_training_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "limited", lambda: True)
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: 20 * 2**20)
    seen, forward = [], RingOperator.forward
    monkeypatch.setattr(RingOperator, "forward", lambda ring, x: seen.append((x.device, ring.room)) or forward(ring, x))
    model = ring_pair()
    found = largest_batch(model, images(512), SETTINGS, CPU)
    tried = model.method.ring.room
    keep_what_fits(model, (found, 3, 8, 8), "fp32")
    assert tried == model.method.ring.room > 0
    assert seen[-1] == (CPU, tried)


def test_size_is_found_only_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    data = images()
    assert with_batch_size(vit(), data, SETTINGS, CPU) is SETTINGS
    assert with_batch_size(vit(), data, replace(SETTINGS, batch_size=AUTO), CPU).batch_size == 64
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: 1)
    saving = {"grad_checkpointing": True, "precision": "bf16"}
    for given, remedy in (({}, "--grad-checkpointing or --precision bf16 or a smaller"), (saving, "a smaller")):
        with pytest.raises(GrowkitError, match=f"holds not even one image; try {remedy} model, or free some"):
            with_batch_size(vit(), data, replace(SETTINGS, batch_size=AUTO, **given), CPU)


def test_loop_refuses_a_size_still_to_be_found() -> None:
    with pytest.raises(GrowkitError, match="--batch-size auto, or -1: only grow, finetune and train find it"):
        fit(vit(), images(), replace(SETTINGS, batch_size=AUTO))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] not enough memory: you tried"),
        RuntimeError("Failed to allocate memory for requested buffer of size 1024"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_running_out_of_memory_says_what_fits_for_the_same_images(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = Full(20, error), images()
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: room_for(20))
    says = "out of memory on cpu with 32 images a batch; --batch-size 16 --grad-accum-steps 2 fits and takes the same"
    with pytest.raises(GrowkitError, match=says):
        fit(model, data, SETTINGS)
    assert fit(model, data, replace(SETTINGS, batch_size=16, grad_accum_steps=2)).steps == 1


def test_running_out_of_memory_where_nothing_is_free_any_more_does_not_say_that_nothing_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is free then leaves out what the failed step will give back."""
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: 1)
    for size, says in (
        (4, "with 4 images a batch, and what is free now holds not even one"),
        (1, "not even one image"),
    ):
        settings = replace(SETTINGS, batch_size=size)
        with pytest.raises(GrowkitError, match=says), batch_size.telling_what_fits(vit(), images(), settings, CPU):
            raise torch.OutOfMemoryError("full")


def test_gradients_of_batches_before_take_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where batches add up, asked for or as the remedy, each but the first finds gradients there already."""
    counted: list[int] = []
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: room_for(24))
    monkeypatch.setattr(batch_size, "step_peak", lambda *given: counted.append(given[3]) or step_peak(*given))
    assert largest_batch(vit(), images(512), SETTINGS, CPU) == 24
    assert largest_batch(vit(), images(512), SETTINGS, CPU, 2) < 24
    assert set(counted) == {1, 2}
    for asked in (1, 5):
        counted.clear()
        settings = replace(SETTINGS, grad_accum_steps=asked)
        with (
            pytest.raises(GrowkitError, match=r"grad-accum-steps \d+ fits"),
            batch_size.telling_what_fits(vit(), images(), settings, CPU),
        ):
            raise torch.OutOfMemoryError("full")
        assert set(counted) == {2}
    counted.clear()
    with_batch_size(vit(), images(), replace(SETTINGS, batch_size=AUTO, grad_accum_steps=5), CPU)
    assert set(counted) == {2}


@pytest.mark.parametrize(
    ("changes", "count", "same"),
    [
        ({}, 64, True),
        ({}, 72, False),  # an epoch ends on other images
        ({"cache": "ram"}, 64, False),  # which draws crops by batch
        ({"mixup": 0.8}, 64, False),
    ],
)
def test_remedy_says_that_images_are_the_same_only_where_they_are(
    changes: dict[str, Any], count: int, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_size, "largest_batch", lambda *_, **__: 8)
    settings = replace(SETTINGS, batch_size=16, **changes)
    with pytest.raises(GrowkitError) as caught, batch_size.telling_what_fits(vit(), images(count), settings, CPU):
        raise torch.OutOfMemoryError("full")
    assert "--batch-size 8 --grad-accum-steps 2 fits" in str(caught.value)
    assert ("takes the same images an update" in str(caught.value)) == same


def test_what_did_not_fit_is_gone_before_something_smaller_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error lives on in whoever handles it, and in its frames what the network had computed."""
    computed: list[ReferenceType[Tensor]] = []

    class Runs(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            activations = x + 1
            computed.append(ref(activations))
            raise torch.OutOfMemoryError("full")

    def tries(*_: object, tried: bool) -> int:
        assert tried
        assert [there() for there in computed] == [None]
        return 8

    monkeypatch.setattr(batch_size, "largest_batch", tries)
    with (
        pytest.raises(GrowkitError, match="--batch-size 8"),
        batch_size.telling_what_fits(vit(), images(), SETTINGS, CPU),
    ):
        Runs()(torch.zeros(1))


def test_other_errors_of_torch_are_left_alone() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        fit(Full(20, RuntimeError("shapes differ")), images(), SETTINGS)


def test_an_odd_number_of_processes_finds_a_size_and_too_few_images_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: room_for(24))
    alone = largest_batch(vit(), images(512), SETTINGS, CPU)
    monkeypatch.setattr(batch_size.distributed, "size", lambda: 3)
    assert largest_batch(vit(), images(512), SETTINGS, CPU) == alone == 24
    with pytest.raises(GrowkitError, match="1 images do not divide among 3 processes"):
        largest_batch(vit(), images(1), SETTINGS, CPU)


def test_of_several_processes_the_one_with_the_least_room_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP keeps gradients from update to update, so they are there from the first batch on."""
    counted: list[int] = []
    auto = replace(SETTINGS, batch_size=AUTO)
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: room_for(24))
    monkeypatch.setattr(batch_size, "step_peak", lambda *given: counted.append(given[3]) or step_peak(*given))
    alone = largest_batch(vit(), images(512), SETTINGS, CPU, 2)
    counted.clear()
    monkeypatch.setattr(batch_size.distributed, "size", lambda: 2)
    for theirs in (alone, 8):
        monkeypatch.setattr(batch_size.distributed, "least", lambda own, theirs=theirs: min(own, theirs))
        assert with_batch_size(vit(), images(512), auto, CPU).batch_size == 2 * theirs
    assert set(counted) == {2}
    assert with_batch_size(vit(), images(8), auto, CPU).batch_size == 8  # there are no more
    monkeypatch.setattr(batch_size.distributed, "least", lambda own: 0)
    with pytest.raises(GrowkitError, match="holds not even one image"):
        with_batch_size(vit(), images(), auto, CPU)


def test_one_of_several_processes_says_what_should_fit_and_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP listens to every backward pass of the model: it would send what a trial made."""
    asked: list[bool] = []
    monkeypatch.setattr(batch_size, "largest_batch", lambda *_, tried: asked.append(tried) or 20)
    monkeypatch.setattr(batch_size.distributed, "size", lambda: 2)
    says = "out of memory on cpu with 48 images of each batch; --batch-size 32 --grad-accum-steps 6 should fit,"
    with (
        pytest.raises(GrowkitError, match=says),
        batch_size.telling_what_fits(vit(), images(512), replace(SETTINGS, batch_size=96, grad_accum_steps=2), CPU),
    ):
        raise torch.OutOfMemoryError("full")
    assert asked == [False]


def test_what_fits_beside_a_sharded_model_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size.distributed, "size", lambda: 2)
    monkeypatch.setattr(batch_size, "largest_batch", lambda *_: pytest.fail("counted"))
    with pytest.raises(GrowkitError, match="with --shard give the number"):
        with_batch_size(vit(), images(), replace(SETTINGS, batch_size=AUTO, shard=True), CPU)
    with (
        pytest.raises(GrowkitError, match="out of memory on cpu with 16 images of each batch; give a smaller"),
        batch_size.telling_what_fits(vit(), images(), replace(SETTINGS, shard=True), CPU),
    ):
        raise torch.OutOfMemoryError("full")
