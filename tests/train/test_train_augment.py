"""Colour jitter and random erasing of whole batches: torchvision's and timm's, image by image, and repeatable."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import functional
from train_samples import CONFIG, Net

from growkit.seeds import seeded
from growkit.train import augment
from growkit.train.augment import augmented, jittered
from growkit.train.batches import train_batches
from growkit.train.data import Data, open_data
from growkit.train.loop import fit
from growkit.train.normalise import Normalisation, values
from growkit.train.settings import FitSettings

Open = Callable[[FitSettings], Data]
NORMALISED = Normalisation((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
STILL = FitSettings(cache="device", batch_size=8, workers=0, color_jitter=0.0, scale_min=1.0, hflip=0.0)
ADJUST = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)


def batch(count: int, *, channels: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, channels, 6, 9), generator=draw, dtype=torch.uint8)


def lone(images: Tensor, settings: FitSettings, number: int = 0, *, whole: int | None = None, at: int = 0) -> Tensor:
    return augmented(images, NORMALISED, settings, number, whole=whole or len(images), part=slice(at, at + len(images)))


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_is_torchvisions_in_every_order(channels: int) -> None:
    orders = list(itertools.permutations(range(3)))
    images, factors = (
        values(batch(6, channels=channels)),
        torch.rand(6, 3, generator=torch.Generator().manual_seed(2)) * 3,
    )
    found = jittered(images.clone(), factors, torch.tensor(orders))
    for image, own, order, result in zip(images, factors, orders, found, strict=True):
        for kind in order:
            image = ADJUST[kind](image, own[kind].item())
        assert torch.allclose(
            result, image, atol=1e-3
        )  # of tensors, torchvision weighs red at 0.2989, of files at 0.299
    assert (found == 0).any()  # what leaves the range is cut off
    assert (found == 1).any()


def test_normalised_images_are_jittered_in_their_values_between_0_and_1(monkeypatch: pytest.MonkeyPatch) -> None:
    images, seen = batch(4), []

    def noted(values: Tensor, factors: Tensor, order: Tensor) -> Tensor:
        seen.append(values.clone())
        return jittered(values, factors, order)

    monkeypatch.setattr(augment, "jittered", noted)
    found = lone(images, replace(STILL, color_jitter=0.4))
    assert torch.equal(seen[0], images / 255)
    low, high = (NORMALISED(torch.full((1, 3, 1, 1), value, dtype=torch.uint8)) for value in (0, 255))
    assert (found >= low - 1e-5).all()
    assert (found <= high + 1e-5).all()
    assert not torch.allclose(found, NORMALISED(images), atol=0.05)


def test_factors_and_orders_of_jitter_are_torchvisions_in_their_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    monkeypatch.setattr(augment, "jittered", lambda values, *draws: seen.append(draws) or values)
    for jitter in (0.4, 1.5):
        lone(batch(1000), replace(STILL, color_jitter=jitter))
        factors, order = seen.pop()
        least, most = max(0.0, 1 - jitter), 1 + jitter
        assert (factors >= least).all()
        assert (factors <= most).all()
        assert torch.allclose(factors.mean(0), torch.full((3,), (least + most) / 2), atol=0.06)
        assert factors.min() < least + 0.01
        assert factors.max() > most - 0.01
        counts = torch.stack(list(torch.unique(order, dim=0, return_counts=True)[1:]))
        assert counts.shape[1] == 6  # every order of the three
        assert counts.min() > 110
        assert (order.sort(1).values == torch.arange(3)).all()


@pytest.mark.parametrize("probability", [0.5, 1.0])
def test_erasing_is_timms_of_one_image_after_the_other(probability: float) -> None:
    images = batch(12)
    plain, wanted = NORMALISED(images), NORMALISED(images)
    erase = RandomErasing(probability, mode="pixel", device="cpu")
    for place, image in enumerate(wanted):
        with seeded(3, "erasing", 7, place):
            erase(image)
    assert torch.equal(lone(images, replace(STILL, reprob=probability, seed=3), 7), wanted)
    erased = (wanted != plain).flatten(1).any(1)
    assert erased.all() if probability == 1 else 0 < erased.sum() < 12


@pytest.mark.parametrize("changes", [{"color_jitter": 0.4}, {"reprob": 0.5}, {"color_jitter": 0.4, "reprob": 0.5}])
def test_part_of_a_batch_gets_what_the_whole_one_gets_there(changes: dict[str, float]) -> None:
    images, settings = batch(16), replace(STILL, scale_min=0.2, hflip=0.5, **changes)
    whole = lone(images, settings)
    assert torch.equal(lone(images[8:], settings, whole=16, at=8), whole[8:])
    assert not torch.equal(lone(images[8:], settings), whole[8:])


def test_draws_differ_by_image_batch_and_seed_and_repeat(opened: Open) -> None:
    settings = replace(STILL, color_jitter=0.4, reprob=0.5)
    data = opened(settings)

    def images(first: int, last: int, **changes: int) -> list[Tensor]:
        return [found for found, _ in train_batches(data, replace(settings, **changes), first, last)]

    run = images(0, 6)
    assert all(torch.equal(one, again) for one, again in zip(run[3:], images(3, 6), strict=True))
    assert not torch.equal(run[0], images(0, 1, seed=1)[0])
    same = batch(1).expand(8, -1, -1, -1)
    changes: list[dict[str, float]] = [{"color_jitter": 0.4}, {"reprob": 1.0}, {"scale_min": 0.2}]
    for one in changes:  # each draws anew for each image and batch
        looks = lone(same, replace(STILL, **one)), lone(same, replace(STILL, **one), 1)
        assert len(torch.unique(torch.cat(looks), dim=0)) == 16


def test_what_train_does_by_default_goes_with_a_cache(images: Path) -> None:
    settings = FitSettings(cache="ram", batch_size=8, workers=0, steps=3, reprob=0.25)
    assert settings.color_jitter > 0
    fitted = fit(Net(), open_data(str(images), CONFIG, settings), settings)
    assert fitted.steps == 3
