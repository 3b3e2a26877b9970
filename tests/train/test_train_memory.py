"""How many images fit: counted against what torch itself says is kept, and told when memory runs out."""

from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from growkit.errors import GrowkitError
from growkit.train import memory
from growkit.train.data import Data
from growkit.train.loop import fit
from growkit.train.memory import kept_bytes, largest_batch, with_batch_size
from growkit.train.settings import AUTO, FitSettings

CPU = torch.device("cpu")
SETTINGS = FitSettings(steps=1, batch_size=32, workers=0, warmup_epochs=0.0)


def images(count: int = 64) -> Data:
    held = TensorDataset(torch.rand(count, 3, 8, 8), torch.arange(count) % 4)
    return Data(train=held, val=held, classes=list("abcd"))


def vit() -> nn.Module:
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_classes": 4}
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


def test_kept_bytes_are_those_of_the_products_operands() -> None:
    layer = nn.Linear(10, 7)
    x = torch.randn(5, 10)
    # the layer keeps its input; the square keeps the layer's output, the mean nothing
    assert kept_bytes(layer, x, "fp32") == 4 * (5 * 10 + 5 * 7)


def test_kept_bytes_grow_evenly_and_less_with_blocks_computed_again() -> None:
    model, x = vit(), torch.rand(8, 3, 8, 8)
    whole, half, quarter = (kept_bytes(model, x[:n], "fp32") for n in (8, 4, 2))
    assert whole - half == pytest.approx(2 * (half - quarter), rel=0.02)
    memory.recompute_blocks(model)
    assert kept_bytes(model, x, "fp32") < 0.4 * whole
    assert all(parameter.grad is None for parameter in model.parameters())


def test_largest_batch_fits_and_one_much_larger_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = vit(), images()
    states = 3 * 4 * sum(p.numel() for p in model.parameters())
    free = int((states + kept_bytes(model, torch.rand(40, 3, 8, 8), "fp32")) / memory.ROOM)
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    assert largest_batch(model, data, SETTINGS, CPU) == 40
    again = replace(SETTINGS, grad_checkpointing=True)
    assert largest_batch(vit(), data, again, CPU) == 64  # there are no more
    monkeypatch.setattr(memory, "free_bytes", lambda device: states)
    assert largest_batch(model, data, SETTINGS, CPU) == 0


def test_size_is_found_only_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    data = images()
    assert with_batch_size(vit(), data, SETTINGS, CPU) is SETTINGS
    assert with_batch_size(vit(), data, replace(SETTINGS, batch_size=AUTO), CPU).batch_size == 64
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1)
    with pytest.raises(GrowkitError, match="not even one image fits"):
        with_batch_size(vit(), data, replace(SETTINGS, batch_size=AUTO), CPU)


def test_loop_refuses_a_size_still_to_be_found() -> None:
    with pytest.raises(GrowkitError, match="--batch-size auto: only grow, finetune and train find it"):
        fit(vit(), images(), replace(SETTINGS, batch_size=AUTO))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce fail] not enough memory: you tried")]
)
def test_running_out_of_memory_says_what_fits_and_makes_the_same_update(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = Full(20, error), images()
    states = 3 * 4 * sum(p.numel() for p in model.parameters())
    free = int((states + kept_bytes(model.net, torch.rand(20, 3, 8, 8), "fp32")) / memory.ROOM)
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    says = "out of memory on cpu with 32 images a batch; --batch-size 16 --grad-accum-steps 2 fits and makes the same"
    with pytest.raises(GrowkitError, match=says):
        fit(model, data, SETTINGS)
    assert fit(model, data, replace(SETTINGS, batch_size=16, grad_accum_steps=2)).steps == 1


def test_other_errors_of_torch_are_left_alone() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        fit(Full(20, RuntimeError("shapes differ")), images(), SETTINGS)


def test_on_several_processes_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.distributed, "size", lambda: 2)
    monkeypatch.setattr(memory, "largest_batch", lambda *_: pytest.fail("tried"))
    with pytest.raises(GrowkitError, match="--batch-size auto looks for it on one process"):
        with_batch_size(vit(), images(), replace(SETTINGS, batch_size=AUTO), CPU)
    with (
        pytest.raises(GrowkitError, match="out of memory on cpu with 16 images of each batch; give a smaller"),
        memory.telling_what_fits(vit(), images(), SETTINGS, CPU),
    ):
        raise torch.OutOfMemoryError("full")
