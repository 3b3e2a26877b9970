"""Weights that are made anew for every batch are made once an update: the same gradients, counted once."""

import itertools
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from pairs import PAIRS, can_grow, published_scale, randomised, tiny
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from growkit.arch import build
from growkit.core import ring_slices
from growkit.core.ring import RingOperator
from growkit.core.ring_plan import contraction_plan
from growkit.grow import GrownModel, grow
from growkit.settings import GrowSettings
from growkit.train.data import Data
from growkit.train.flops import count_making, count_step
from growkit.train.loop import fit
from growkit.train.made_weights import made_once, shared
from growkit.train.memory import keep_what_fits
from growkit.train.settings import FitSettings
from growkit.train.training import Training

PLAIN = FitSettings(steps=3, batch_size=4, lr=0.01, workers=0, log_every=1, warmup_epochs=0.0)
SIZES = (32, 2, 2), (48, 3, 3)
METHODS = {
    "mango": GrowSettings(rank=2),
    "mango in two stages": GrowSettings(rank=2, stages="width-first"),
    "mango, vectors fixed": GrowSettings(rank=1, vectors=False),
    "ligo": GrowSettings(method="ligo"),
}


def grown(settings: GrowSettings = METHODS["mango"], dtype: torch.dtype = torch.float64) -> GrownModel:
    source, target = (tiny(*size) for size in SIZES)
    return grow(source, target, published_scale(source).to(dtype).state_dict(), settings)


def batches(count: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(4, 3, 16, 16, generator=generator, dtype=dtype), (torch.arange(4) + n) % 7) for n in range(count)
    ]


@pytest.mark.parametrize(
    ("name", "pair"),
    [
        (name, pair)
        for name, (pair, (source, _)) in itertools.product(("mango", "ligo"), PAIRS.items())
        if source.classes and can_grow(name, None, pair)
    ],
)
def test_operator_of_every_pair_is_trained(name: str, pair: str) -> None:
    source, target = PAIRS[pair]
    model = grow(source, target, randomised(source, dtype=torch.float32).state_dict(), METHODS[name])
    before = {name: value.clone() for name, value in model.method.named_parameters()}
    images = TensorDataset(torch.randn(4, 3, 16, 16), torch.arange(4))
    fitted = fit(model, Data(images, images, [str(label) for label in range(7)]), replace(PLAIN, steps=1))
    assert fitted.flops_per_step > 0
    moved = {name: value for name, value in model.method.named_parameters() if not torch.equal(value, before[name])}
    assert moved
    assert all(value.isfinite().all() for value in moved.values())


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("recomputed", [False, True])
def test_gradients_are_the_sum_of_each_batch_with_weights_of_its_own(name: str, recomputed: bool) -> None:
    apart, together = grown(METHODS[name]), grown(METHODS[name])
    together.set_grad_checkpointing(recomputed)
    for images, labels in batches(3):
        cross_entropy(apart(images), labels).backward()
    with together.weights_once():
        for images, labels in batches(3):
            cross_entropy(together(images), labels).backward()
        assert all(gradient is None for gradient in gradients(together).values())
    expected, found = gradients(apart), gradients(together)
    moved = [key for key, gradient in expected.items() if gradient is not None]
    assert moved
    for key in expected:
        if key in moved:
            assert torch.allclose(found[key], expected[key], rtol=1e-12, atol=1e-15), key
        else:
            assert found[key] is None


def test_accumulated_update_makes_the_weights_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, weights = [], GrownModel.weights
    monkeypatch.setattr(GrownModel, "weights", lambda model: made.append(1) or weights(model))
    pairs = TensorDataset(*map(torch.cat, zip(*batches(6, torch.float32), strict=True)))
    data = Data(train=pairs, val=pairs, classes=list("abcdefg"))
    counts, losses = [], []
    for size, accumulated in ((24, 1), (4, 6)):
        model = grown(dtype=torch.float32)
        made.clear()
        losses.append(fit(model, data, replace(PLAIN, batch_size=size, grad_accum_steps=accumulated)).losses)
        counts.append(len(made))
    # beside one for each update: for the number of outputs, for FLOPs of the network, for those of the making
    assert counts == [3 + 3, 3 + 3]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def rooms_of(model: nn.Module) -> list[int]:
    return [part.room for part in model.modules() if isinstance(part, RingOperator)]


@pytest.mark.parametrize("name", ["mango", "mango in two stages"])
def test_training_keeps_intermediates_and_learns_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("growkit.core.ring_plan.FEWEST_ELEMENTS", 32_000)  # slices, small as these networks are
    contraction_plan.cache_clear()
    pairs = TensorDataset(*map(torch.cat, zip(*batches(2, torch.float32), strict=True)))
    data, rooms, fitted, states = Data(train=pairs, val=pairs, classes=list("abcdefg")), [], [], []
    keeping, contract = [], ring_slices.contract
    monkeypatch.setattr(
        ring_slices, "contract", lambda *given: keeping.append(given[-1] is not None) or contract(*given)
    )
    for share in (0, 50):  # of next to nothing
        assert not any(keeping)
        monkeypatch.setattr("growkit.train.memory.KEPT_SHARE", share)
        model = grown(METHODS[name], torch.float32)
        fitted.append(fit(model, data, PLAIN))
        rooms.append(rooms_of(model))
        states.append({key: value.clone() for key, value in model.method.state_dict().items()})
    assert fit(model, data, PLAIN).flops_per_step == fitted[1].flops_per_step  # of a model that keeps from before
    contraction_plan.cache_clear()
    assert any(keeping)
    alone = grown(METHODS["mango"], torch.float32)
    keep_what_fits(alone, (PLAIN.batch_size, 3, 16, 16), "fp32")
    assert all(room == 0 for room in rooms[0])
    assert len(rooms[1]) == (2 if "two" in name else 1)
    assert rooms[1] == [rooms_of(alone)[0] // len(rooms[1])] * len(rooms[1])
    assert fitted[0].losses == fitted[1].losses
    assert fitted[0].flops_per_step == fitted[1].flops_per_step
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_update_counts_each_batch_and_the_making_once() -> None:
    pairs = TensorDataset(*map(torch.cat, zip(*batches(6, torch.float32), strict=True)))
    data = Data(train=pairs, val=pairs, classes=list("abcdefg"))
    _, target = (tiny(*size) for size in SIZES)
    network = count_step(build(target.name, target.arguments), batches(1, torch.float32)[0], cross_entropy)
    for name, method in METHODS.items():
        if not method.vectors:  # then the network's own vectors need no gradients
            continue
        once = count_making(grown(method))
        found = [
            fit(grown(method, torch.float32), data, replace(PLAIN, steps=1, grad_accum_steps=count)).flops_per_step
            for count in (1, 3)
        ]
        assert found == [count * network.flops_per_step + once for count in (1, 3)], name


def test_making_in_one_piece_and_in_slices_counts_the_same_for_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU takes larger slices than a CPU, and a step is counted where it runs."""
    model, batch = grown(), batches(1)[0]
    monkeypatch.setattr(
        RingOperator,
        "plan",
        lambda ring, x, cores, plan=RingOperator.plan, **how: (
            plan(ring, x, cores, **how) if x.is_meta else replace(plan(ring, x, cores, **how), slices=2, width=24)
        ),
    )
    counted = count_step(model, batch, cross_entropy)
    monkeypatch.undo()
    assert counted == count_step(model, batch, cross_entropy)


def test_weights_that_were_made_are_gone_when_gradients_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = TensorDataset(*map(torch.cat, zip(*batches(6, torch.float32), strict=True)))
    data = Data(train=pairs, val=pairs, classes=list("abcdefg"))
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []
    weights, backward = GrownModel.weights, torch.autograd.backward

    def noting(model: GrownModel) -> dict[str, Tensor]:
        found = weights(model)
        made[:] = [weakref.ref(w.untyped_storage()) for w in found.values() if w.requires_grad]
        return found

    def looking(tensors: Any, *more: Any, **given: Any) -> None:
        if isinstance(tensors, list) and isinstance(tensors[0], GradientEdge):
            alive.append(sum(storage() is not None for storage in made))
        backward(tensors, *more, **given)

    monkeypatch.setattr(GrownModel, "weights", noting)
    model = grown(dtype=torch.float32)
    settings = replace(PLAIN, grad_accum_steps=2)
    training = Training(model, data, settings, torch.device("cpu"), updates=1, warmup=0)
    monkeypatch.setattr(torch.autograd, "backward", looking)
    training.update(1, iter(batches(2, torch.float32)))
    assert alive == [0]
    assert len(made) > 20


def test_plain_network_makes_nothing_and_counts_nothing() -> None:
    source = tiny(*SIZES[0])
    model = build(source.name, source.arguments)
    assert count_making(model) == 0
    with made_once(model, 3):
        cross_entropy(model(batches(1, torch.float32)[0][0]), torch.arange(4)).backward()
    assert all(gradient is not None for gradient in gradients(model).values())


def test_single_batch_goes_straight_to_the_parameters() -> None:
    model = grown()
    with made_once(model, 1):
        ((images, labels),) = batches(1)
        cross_entropy(model(images), labels).backward()
        assert any(gradient is not None for gradient in gradients(model).values())


def test_failure_between_batches_leaves_no_gradients_and_weights_are_made_anew() -> None:
    model, ((images, labels),) = grown(), batches(1)
    before = model(images)

    def fail() -> None:
        with model.weights_once():
            cross_entropy(model(images), labels).backward()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert all(gradient is None for gradient in gradients(model).values())
    assert torch.equal(model(images), before)
    with torch.no_grad():
        for core in model.method.ring.cores.values():
            core.mul_(1.5)
    assert not torch.allclose(model(images), before)


@pytest.mark.parametrize("name", ["mango", "mango in two stages"])
def test_rings_are_shared_inside_alone_also_after_a_failure(name: str) -> None:
    model = grown(METHODS[name])
    rings = [part for part in model.modules() if isinstance(part, RingOperator)]
    assert len(rings) == (2 if "stages" in name else 1)

    def fail() -> None:
        with shared(model, 4):
            assert {ring.processes for ring in rings} == {4}
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert {ring.processes for ring in rings} == {1}


def test_nothing_trained_in_the_method_is_no_error() -> None:
    source, target = PAIRS["twice as wide"]
    model = grow(source, target, published_scale(source).double().state_dict(), GrowSettings(method="lemon"))
    assert not list(model.parameters())
    with model.weights_once():
        assert model(batches(1)[0][0]).requires_grad is False
