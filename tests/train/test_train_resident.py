"""Images in the device's memory: equal for evaluation, cropped and flipped repeatably for training."""

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from train_samples import CONFIG, Net

from growkit.errors import GrowkitError
from growkit.train import augment, batch_size, resident
from growkit.train.augment import _crops, crop_and_flip
from growkit.train.batches import _Places, train_batches, val_batches
from growkit.train.data import Data, hold_out, open_data
from growkit.train.loop import FREE_TO_CHANGE, fit
from growkit.train.progress import Progress
from growkit.train.resident import Decoded, Resident
from growkit.train.settings import FitSettings
from growkit.train.watch import StepRecord

Open = Callable[[FitSettings], Data]
ORDINARY = FitSettings(batch_size=8, workers=0, color_jitter=0.0, scale_min=0.3)
RESIDENT = replace(ORDINARY, cache="device")
WHOLE = replace(RESIDENT, scale_min=1.0, hflip=0.0)


def same(first: list[tuple[Tensor, Tensor]], second: list[tuple[Tensor, Tensor]]) -> bool:
    """Equal bit for bit, and as many."""
    pairs = zip(first, second, strict=False)
    return len(first) == len(second) and all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)


def as_evaluated(data: Data, config: dict[str, Any] = CONFIG) -> Any:
    """The training images, prepared as timm prepares those for evaluation."""
    plain: Any = copy.copy(data.train)
    plain.transform = timm.data.create_transform(**config)
    return plain


def batches(data: Data, settings: FitSettings, first: int = 0, last: int = 6) -> list[tuple[Tensor, Tensor]]:
    return list(train_batches(data, settings, first, last))


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the number of images of each dataset that is decoded."""
    seen: list[int] = []
    decode = Decoded._decode

    def counted(self: Decoded, device: torch.device) -> Tensor:
        seen.append(self.shape[0])
        return decode(self, device)

    monkeypatch.setattr(Decoded, "_decode", counted)
    return seen


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [(3, 8, 8), (1, 8, 8), (3, 7, 12), (3, 40, 40)])
def test_evaluation_batches_are_the_ordinary_ones_bit_for_bit(
    images: Path, size: tuple[int, ...], workers: int
) -> None:
    config = {**CONFIG, "input_size": size}
    ordinary, kept = (open_data(str(images), config, replace(s, workers=workers)) for s in (ORDINARY, RESIDENT))
    expected = list(val_batches(ordinary, ORDINARY))
    assert same(list(val_batches(kept, RESIDENT)), expected)
    assert expected[0][0].shape == (8, *size)


def test_batches_without_augmentation_are_the_images_as_evaluation_sees_them(images: Path) -> None:
    for size in ((3, 8, 8), (3, 7, 12)):
        config = {**CONFIG, "input_size": size}
        data = open_data(str(images), config, WHOLE)
        ordinary = open_data(str(images), config, ORDINARY)
        plain = as_evaluated(ordinary, config)
        places = [index for batch in _Places(data, WHOLE, 0, 6) for _, index in batch]
        expected = torch.stack([plain[place][0] for place in places])
        assert torch.equal(torch.cat([batch for batch, _ in batches(data, WHOLE)]), expected)


def test_hflip_of_one_mirrors_every_image_exactly_and_a_half_about_half(opened: Open) -> None:
    data = opened(WHOLE)
    straight = torch.cat([batch for batch, _ in batches(data, WHOLE, 0, 30)])
    mirrored = torch.cat([batch for batch, _ in batches(data, replace(WHOLE, hflip=1.0), 0, 30)])
    assert torch.equal(mirrored, straight.flip(3))
    assert not torch.equal(mirrored, straight)
    half = torch.cat([batch for batch, _ in batches(data, replace(WHOLE, hflip=0.5), 0, 30)])
    share = (half == mirrored).flatten(1).all(1).float().mean()
    assert 0.4 < share < 0.6
    assert ((half == mirrored).flatten(1).all(1) | (half == straight).flatten(1).all(1)).all()


def test_flip_of_a_crop_is_its_mirror_image(opened: Open) -> None:
    straight, mirrored = (batches(opened(RESIDENT), replace(RESIDENT, hflip=hflip)) for hflip in (0.0, 1.0))
    assert all(torch.equal(a[0], b[0].flip(3)) for a, b in zip(straight, mirrored, strict=True))


def test_order_of_images_is_that_of_the_ordinary_path(opened: Open) -> None:
    settings = replace(WHOLE, batch_size=5)
    kept, ordinary = opened(settings), opened(ORDINARY)
    plain = [as_evaluated(ordinary)[place][0] for place in range(26)]
    found = [
        next(place for place, image in enumerate(plain) if torch.equal(image, shown))
        for batch, _ in batches(kept, settings, 3, 12)
        for shown in batch
    ]
    expected = _Places(ordinary, replace(ORDINARY, batch_size=5), 3, 12)
    assert found == [index for batch in expected for _, index in batch]
    labels = [list(map(Tensor.tolist, (y for _, y in batches(d, settings, 3, 12)))) for d in (kept, ordinary)]
    assert labels[0] == labels[1]


@pytest.mark.parametrize("scale_min", [0.08, 0.5, 0.95])
@pytest.mark.parametrize("shape", [(32, 32), (32, 48)])
def test_crops_lie_inside_with_area_and_ratio_within_bounds(scale_min: float, shape: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(0)
    left, top, width, height = _crops(4000, shape, scale_min, draw)
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + width <= 1 + 1e-6).all()
    assert (top + height <= 1 + 1e-6).all()
    area, ratio = width * height, width * shape[1] / (height * shape[0])
    assert (area >= scale_min - 1e-6).all()
    assert (area <= 1 + 1e-6).all()
    cropped = area < 1
    assert (ratio[cropped] >= 3 / 4 - 1e-5).all()
    assert (ratio[cropped] <= 4 / 3 + 1e-5).all()
    if scale_min == 0.08:  # they differ: in size and shape, and lie everywhere
        assert area.min() < 0.1
        assert area.max() > 0.9
        assert ratio[cropped].min() < 0.76
        assert ratio[cropped].max() > 1.32
        assert abs(ratio[cropped & (area < 0.5)].log().mean()) < 0.02
        assert abs((left + width / 2).mean() - 0.5) < 0.02
        assert left.max() > 0.6


def test_crops_are_distributed_like_timms() -> None:
    transforms = pytest.importorskip("timm.data.transforms")
    from PIL import Image

    state = random.getstate()
    random.seed(0)
    image = Image.new("L", (200, 200))
    pick = transforms.RandomResizedCropAndInterpolation.get_params
    theirs = torch.tensor([pick(image, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(3000)]) / 200
    random.setstate(state)
    left, top, width, height = _crops(3000, (200, 200), 0.2, torch.Generator().manual_seed(0))
    for ours, other in zip((top, left, height, width), theirs.T, strict=True):
        for share in (0.1, 0.5, 0.9):
            assert abs(ours.quantile(share) - other.quantile(share)) < 0.04


def test_crop_shows_what_lies_in_its_box(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = torch.arange(12.0).view(1, 1, 1, 12) + 100 * torch.arange(8.0).view(1, 1, 8, 1)
    box = (0.5, 0.25, 0.25, 0.5)  # columns 6, 7, 8 and rows 2 to 5
    monkeypatch.setattr(augment, "_crops", lambda *_: [torch.tensor([part]) for part in box])
    shown = crop_and_flip(picture, replace(RESIDENT, hflip=0.0), torch.Generator())
    column = 6 - 0.5 + (torch.arange(12) + 0.5) * 3 / 12
    row = 2 - 0.5 + (torch.arange(8) + 0.5) * 4 / 8
    assert torch.allclose(shown[0, 0], column[None, :] + 100 * row[:, None], atol=1e-3)
    inner = interpolate(picture[..., 2:6, 6:9], (8, 12), mode="bilinear", align_corners=False)
    assert torch.allclose(shown[..., 1:-1, 2:-2], inner[..., 1:-1, 2:-2], atol=1e-3)


def test_crop_at_the_edge_repeats_the_edge_and_adds_no_black(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "_crops", lambda *_: [torch.tensor([part]) for part in (0.0, 0.5, 0.5, 0.5)])
    shown = crop_and_flip(torch.full((1, 1, 8, 8), 200.0), RESIDENT, torch.Generator())
    assert torch.allclose(shown, torch.full_like(shown, 200.0))


def test_training_batches_are_finite_differ_by_seed_epoch_and_image_and_leave_the_images_alone(opened: Open) -> None:
    settings = replace(RESIDENT, batch_size=26, scale_min=0.08)
    data = opened(settings)
    before = list(val_batches(data, settings))
    (first, _), (second, _) = batches(data, settings, 0, 2)
    other, _ = batches(data, replace(settings, seed=1), 0, 1)[0]
    for batch in (second, other):
        assert batch.isfinite().all()
        assert all((image != first).flatten(1).any(1).all() for image in batch)
    assert same(before, list(val_batches(data, settings)))


def test_batches_from_the_middle_are_those_of_the_whole_run(opened: Open) -> None:
    whole = batches(opened(RESIDENT), RESIDENT, 0, 8)
    assert same(whole[5:], batches(opened(RESIDENT), RESIDENT, 5, 8))
    assert not same(whole[4:7], batches(opened(RESIDENT), RESIDENT, 5, 8))


def test_batches_neither_use_nor_change_global_random_state(opened: Open) -> None:
    found = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
        found.append(batches(opened(RESIDENT), RESIDENT))
        assert random.getstate() == before[0]
        assert np.array_equal(np.random.get_state()[1], before[1])
        assert torch.equal(torch.get_rng_state(), before[2])
    assert same(*found)


def test_images_are_decoded_once_for_all_runs(opened: Open, decodings: list[int]) -> None:
    data, short = opened(RESIDENT), replace(RESIDENT, steps=2)
    assert decodings == []
    for seed in (0, 1):
        fit(Net(), data, replace(short, seed=seed))
    assert decodings == [26]


def test_parts_decode_their_own_images_once_and_no_others(opened: Open, decodings: list[int]) -> None:
    short = replace(RESIDENT, steps=2)
    chosen, tested = hold_out(opened(RESIDENT), share=0.3, keep=0.5, seed=0)
    for seed in (0, 1):
        fit(Net(), chosen, replace(short, seed=seed))
        fit(Net(), tested, replace(short, seed=seed))
    assert decodings == [12]
    for _ in range(2):
        list(val_batches(chosen, short))
    assert decodings == [12, 4]
    list(val_batches(tested, short))
    assert decodings == [12, 4, 8]


def test_all_images_take_their_room_before_a_batch_size_is_found(
    opened: Open, decodings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[list[int]] = []
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: (there.append([*decodings]), 1e9)[1])
    batch_size.largest_batch(Net(), opened(RESIDENT), RESIDENT, torch.device("cpu"))
    assert there == [[26, 12]]


def test_decoding_is_told_as_it_goes(images: Path) -> None:
    told: list[tuple[str, float, int, bool]] = []

    def tell(what: str) -> Progress:
        return lambda done, total, note="": told.append((what, done, total, note.endswith(" images/s")))

    data = open_data(str(images), CONFIG, RESIDENT, tell=tell)
    assert told == []
    for _ in range(2):
        list(val_batches(data, RESIDENT))
        batches(data, RESIDENT)
        assert told == [
            ("decoding the validation images", 0, 12, False),
            ("decoding the validation images", 12, 12, True),
            ("decoding the training images", 0, 26, False),
            ("decoding the training images", 26, 26, True),
        ]


def test_images_move_between_devices_without_decoding_and_only_a_move_needs_room(
    opened: Open, decodings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(resident, "free_bytes", lambda device: asked.append(device.type) or 1e9)
    data = opened(RESIDENT).train
    assert isinstance(data, Resident)
    for name in ("cpu", "cpu", "meta", "meta"):
        assert data.decoded.on(torch.device(name)).device.type == name
    assert asked == ["cpu", "meta"]
    assert decodings == [26]


def test_images_cached_in_ram_stay_there_and_give_what_those_on_the_device_give(
    opened: Open, decodings: list[int]
) -> None:
    in_ram = replace(RESIDENT, cache="ram")
    data = opened(in_ram)
    assert isinstance(data.train, Resident)
    assert data.train.decoded.on(torch.device("meta")).device.type == "cpu"
    images, _ = data.train.batch(torch.arange(3), torch.device("meta"))
    assert images.device.type == "meta"
    ours, theirs = (list(train_batches(opened(s), s, 0, 3)) for s in (in_ram, RESIDENT))
    assert all(
        torch.equal(a, b) for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=True)
    )


def test_run_that_was_stopped_and_resumed_ends_bit_for_bit_where_the_unbroken_one_does(
    opened: Open, tmp_path: Path
) -> None:
    settings = replace(RESIDENT, steps=9, grad_accum_steps=2, lr=0.01, mixup=0.5, log_every=2)

    def interrupt(record: StepRecord) -> None:
        raise KeyboardInterrupt

    whole, parts = Net(), []
    expected = fit(whole, opened(settings), settings)
    while not parts or parts[-1].interrupted:
        resumed = Net()
        resume = bool(parts)
        parts.append(
            fit(resumed, opened(settings), settings, folder=tmp_path, resume=resume, on_step=interrupt)
        )  # opened anew, as another process would
    assert len(parts) > 3
    assert parts[-1].losses == expected.losses
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())
    other = Net()
    fit(other, opened(settings), replace(settings, seed=1))
    assert not torch.equal(other.head.weight, whole.head.weight)


def test_ordinary_run_is_not_resumed_as_a_resident_one(opened: Open, tmp_path: Path) -> None:
    assert "cache" not in FREE_TO_CHANGE
    settings = replace(ORDINARY, steps=2)
    fit(Net(), opened(settings), settings, folder=tmp_path)
    kept = replace(settings, cache="device")
    with pytest.raises(GrowkitError, match="started with --cache none, not ram or device"):
        fit(Net(), opened(kept), kept, folder=tmp_path, resume=True)
    fit(Net(), opened(kept), kept, folder=tmp_path)
    fit(Net(), opened(kept), replace(kept, cache="ram"), folder=tmp_path, resume=True)


def test_augmentation_of_single_images_is_refused(images: Path) -> None:
    open_data(str(images), CONFIG, replace(ORDINARY, aa="rand-m9"))
    with pytest.raises(GrowkitError, match=r"^--cache .* on the device; leave out --aa, or --cache$"):
        open_data(str(images), CONFIG, replace(RESIDENT, aa="rand-m9"))


def test_images_that_would_not_fit_are_refused_with_their_size(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    need = 26 * 3 * 8 * 8
    monkeypatch.setattr(resident, "free_bytes", lambda device: need / 0.8 - 1)
    with pytest.raises(GrowkitError, match=r"^--cache device: 26 images take .* GB free on cpu; leave out") as caught:
        batches(opened(RESIDENT), RESIDENT)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(resident, "free_bytes", lambda device: need / 0.8 + 1)
    assert len(batches(opened(RESIDENT), RESIDENT)) == 6


def test_grey_images_train(images: Path) -> None:
    data = open_data(str(images), {**CONFIG, "input_size": (1, 8, 8)}, RESIDENT)
    assert batches(data, RESIDENT)[0][0].shape == (8, 1, 8, 8)
    settings = replace(RESIDENT, steps=2)
    assert fit(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), data, settings).steps == 2


def test_a_crop_that_never_fits_is_the_whole_image() -> None:
    left, top, width, height = _crops(50, (8, 80), 0.99, torch.Generator().manual_seed(0))
    assert torch.stack([left, top]).eq(0).all()
    assert torch.stack([width, height]).eq(1).all()


@pytest.mark.gpu
def test_gpu_gives_the_batches_of_the_cpu(opened: Open) -> None:
    data = opened(RESIDENT)
    for there, here in zip(train_batches(data, RESIDENT, 0, 6, device="cuda"), batches(data, RESIDENT), strict=True):
        assert there[0].is_cuda
        assert torch.allclose(there[0].cpu(), here[0], atol=1e-4)
    there, here = (list(val_batches(data, RESIDENT, device=device)) for device in ("cuda", "cpu"))
    assert same([(x.cpu(), y) for x, y in there], here)
