"""Batches that depend on seed, epoch and image alone; wrong folders, and how they say so."""

import copy
import errno
import multiprocessing
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from multiprocessing import reduction
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from train_samples import CONFIG, write_images

from growkit.errors import GrowkitError
from growkit.seeds import seeded
from growkit.train import loading, posterize
from growkit.train.batches import (
    _ahead,
    _copying,
    _Places,
    _read_to_train,
    batches_per_epoch,
    read_to_evaluate,
    train_batches,
    unaugmented,
    val_batches,
)
from growkit.train.data import Data, channel_config, hold_out, labels_of, open_data, size_of
from growkit.train.erasing import ErasedBatch, Erasing, together
from growkit.train.loading import PATIENCE, _quiet_worker
from growkit.train.normalise import Normalisation
from growkit.train.settings import FitSettings

Open = Callable[[FitSettings], Data]
CALM = FitSettings(batch_size=4, workers=1)
HARD = FitSettings(batch_size=8, workers=0, aa="rand-m9-mstd0.5", reprob=0.5, color_jitter=0.0)


def same(first: list[tuple[Tensor, Tensor]], second: list[tuple[Tensor, Tensor]]) -> bool:
    """Equal bit for bit, and as many."""
    pairs = zip(first, second, strict=False)
    return len(first) == len(second) and all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)


def test_worker_count_does_not_change_the_batches(opened: Open) -> None:
    none, one, two = (list(train_batches(opened(HARD), replace(HARD, workers=workers), 0, 5)) for workers in (0, 1, 2))
    assert same(none, one)
    assert same(none, two)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("reprob", [0.0, 0.7])
def test_batches_are_what_timms_transform_of_each_image_makes(opened: Open, reprob: float, workers: int) -> None:
    """It normalises and erases floats, image by image; growkit does so of whole batches, which travel in bytes."""
    settings = replace(HARD, reprob=reprob, workers=workers)
    data = opened(settings)
    config = {name: CONFIG[name] for name in ("input_size", "mean", "std", "interpolation")}
    full: Any = copy.copy(data.train)
    full.transform = timm.data.create_transform(
        **config, is_training=True, auto_augment=settings.aa, color_jitter=None, re_prob=reprob, re_mode="pixel"
    )
    expected = list(train_batches(Data(full, data.val, data.classes), settings, 0, 3))
    found = list(train_batches(data, settings, 0, 3))
    assert same(found, expected)
    assert all(images.dtype == torch.float32 and images.is_contiguous() for images, _ in found)
    sampler = _Places(data, settings, 0, 3)
    for read, labels in _read_to_train(data, settings, sampler, torch.device("cpu")):
        assert (read.images if isinstance(read, ErasedBatch) else read).dtype == torch.uint8
        assert len(labels) == 8


@given(
    shape=st.tuples(st.sampled_from([1, 3]), st.integers(1, 40), st.integers(1, 40)),
    probability=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_what_is_erased_is_what_timm_erases(shape: tuple[int, int, int], probability: float, seed: int) -> None:
    erasing, timms = Erasing(probability), RandomErasing(probability, mode="pixel", device="cpu")
    with seeded(seed):
        images = torch.randint(0, 256, (6, *shape), dtype=torch.uint8)
    normalised = Normalisation([0.5] * shape[0], [0.25] * shape[0])
    with seeded(seed, "erase"):
        batch = together([erasing(image) for image in images])
    with seeded(seed, "erase"):
        expected = torch.stack([timms(normalised(image[None])[0]) for image in images])
    assert torch.equal(batch.images, images)
    assert torch.equal(batch.over(normalised(batch.images)), expected)


def test_normalised_images_are_float32_whatever_the_default_is() -> None:
    images = torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4)
    normalised = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    expected = normalised(images)
    torch.set_default_dtype(torch.float64)
    try:
        found = normalised(images)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_batches_from_the_middle_are_those_of_the_whole_run(opened: Open) -> None:
    whole = list(train_batches(opened(HARD), HARD, 0, 8))
    assert same(whole[5:], list(train_batches(opened(HARD), HARD, 5, 8)))
    assert not same(whole[4:7], list(train_batches(opened(HARD), HARD, 5, 8)))


def test_batches_before_the_first_are_not_read() -> None:
    read: list[int] = []

    class Counting(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            read.append(index)
            return super().__getitem__(index)

    images = Counting(torch.zeros(40, 1), torch.zeros(40, dtype=torch.long))
    data = Data(train=images, val=images, classes=[])
    list(train_batches(data, FitSettings(batch_size=4, workers=0), 7, 9))
    assert len(read) == 8


def test_seed_and_epoch_change_order_and_augmentation(opened: Open) -> None:
    settings = replace(HARD, batch_size=26)
    (first, second), (other, _) = (
        list(train_batches(opened(settings), replace(settings, seed=seed), 0, 2)) for seed in (0, 1)
    )
    for batch in (second, other):
        assert not torch.equal(first[1], batch[1])
        # the same 26 images, differently augmented: no image of the one is in the other
        assert all((image != first[0]).flatten(1).any(1).all() for image in batch[0])


def test_epoch_holds_each_image_once_and_leaves_out_the_partial_batch() -> None:
    numbers = torch.arange(11)
    data = Data(train=TensorDataset(numbers, numbers), val=TensorDataset(numbers), classes=[])
    settings = FitSettings(batch_size=4, workers=0)
    assert batches_per_epoch(data, settings) == 2
    batches = [labels for _, labels in train_batches(data, settings, 0, 4)]
    epochs = torch.cat(batches[:2]), torch.cat(batches[2:])
    assert [len(set(epoch.tolist())) for epoch in epochs] == [8, 8]
    assert epochs[0].tolist() != epochs[1].tolist()


def test_fewer_images_than_a_batch_make_one_batch() -> None:
    numbers = torch.arange(3)
    data = Data(train=TensorDataset(numbers, numbers), val=TensorDataset(numbers), classes=[])
    settings = FitSettings(batch_size=4, workers=0)
    assert batches_per_epoch(data, settings) == 1
    batches = [sorted(labels.tolist()) for _, labels in train_batches(data, settings, 0, 2)]
    assert batches == [[0, 1, 2], [0, 1, 2]]


def test_evaluation_sees_every_image_once_without_chance(opened: Open, images: Path) -> None:
    settings = FitSettings(batch_size=5, workers=0)
    batches = list(val_batches(opened(settings), settings))
    assert [len(labels) for _, labels in batches] == [5, 5, 2]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0] * 6 + [1] * 6
    assert same(batches, list(val_batches(opened(settings), replace(settings, seed=3, workers=1))))
    # by hand: the shorter side of 9x10 to floor(8 / 0.9) = 8, the middle, (x - mean) / std
    picture = Image.open(images / "val" / "cat" / "0.png").resize((8, 8), Image.Resampling.BICUBIC)
    expected = (np.asarray(picture) / 255 - CONFIG["mean"]) / CONFIG["std"]
    assert np.allclose(batches[0][0][0].permute(1, 2, 0).numpy(), expected, atol=1e-5)
    assert all(read.dtype == torch.uint8 for read, _ in read_to_evaluate(opened(settings), settings))


def test_reading_batches_changes_no_global_random_state(opened: Open) -> None:
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    list(train_batches(opened(HARD), HARD, 0, 2))
    list(val_batches(opened(HARD), replace(HARD, workers=1)))
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_seeded_draws_depend_on_all_parts_and_leave_no_trace() -> None:
    def draw(*parts: int | str) -> tuple[float, float, float]:
        with seeded(*parts):
            return random.random(), np.random.rand(), torch.rand(1).item()

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    assert draw(1, "a", 2) == draw(1, "a", 2)
    assert len({draw(1, "a", 2), draw(1, "a", 3), draw(1, "b", 2), draw(12, "a")}) == 4
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("aa", ["rand-m9-mstd0.5-inc1", "rand-m2-mstd0.5", "v0", "original"])
def test_policies_draw_a_thousand_times_without_failing(aa: str, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """posterize at 0 bits, which Pillow 13 refuses, comes once in some hundred draws."""
    for name in posterize.NAMES:
        monkeypatch.setitem(timm.data.auto_augment.NAME_TO_OP, name, posterize._posterize)
    draw: Any = open_data(str(images), CONFIG, replace(HARD, aa=aa, reprob=0.0)).train
    picture = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    with seeded(0):
        assert all(draw.transform(picture).shape == (3, 8, 8) for _ in range(1000))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_posterize_keeps_as_many_bits_as_it_is_asked_for(mode: str) -> None:
    picture = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).convert(mode)
    for bits in range(9):
        left = np.asarray(picture) & (256 - 2 ** (8 - bits))
        assert np.array_equal(np.asarray(posterize.posterize(picture, bits)), left)


@pytest.mark.parametrize("aa", [None, "rand-m9-mstd0.5", "augmix-m3-w3", "original"])
@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 8), (1, 32), (3, 32)])
def test_augmentation_works_on_small_and_grey_images(images: Path, aa: str | None, channels: int, side: int) -> None:
    settings = replace(HARD, batch_size=26, aa=aa, color_jitter=0.4)
    config = {**CONFIG, "input_size": (channels, side, side)}
    data = open_data(str(images), config, settings)
    for batch, _ in (*train_batches(data, settings, 0, 2), *val_batches(data, settings)):
        assert batch.shape[1:] == (channels, side, side)
        assert batch.isfinite().all()


def test_grey_images_are_normalised_by_the_mean_of_the_means() -> None:
    config = channel_config({**CONFIG, "input_size": (1, 8, 8)})
    assert config["mean"] == (pytest.approx(0.4),)
    assert config["std"] == (pytest.approx(0.2),)
    assert channel_config(CONFIG) == CONFIG


def test_classes_come_in_label_order_and_opening_reads_no_image(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("class10", "class9"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "broken.jpg").write_bytes(b"not an image")
    data = open_data(str(tmp_path), CONFIG, HARD)
    assert data.classes == ["class9", "class10"]


def damage(root: Path, what: str) -> None:
    """Make a good image folder a bad one."""
    if what == "root":
        shutil.rmtree(root)
    elif what in ("train", "val", "val/dog"):
        shutil.rmtree(root / what)
    elif what == "empty":
        shutil.rmtree(root / "train")
        (root / "train").mkdir()
    elif what == "empty class":
        (root / "train" / "owl").mkdir()
    elif what == "loose":
        shutil.copy(root / "train" / "cat" / "0.png", root / "train" / "0.png")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("root", "^--data {root}: no such folder; give one that holds train/ and val/"),
        ("train", "^{root}/train: no such folder; put training images in"),
        ("val", "^{root}/val: no such folder"),
        ("empty", "^{root}/train: holds no images; put them into one folder per class"),
        ("empty class", "^{root}/train/owl: holds no images; add some or remove"),
        ("loose", "^{root}/train/0.png: belongs to no class"),
        ("val/dog", "^{root}: .* same classes, but val/ has no images of dog"),
    ],
)
def test_wrong_folder_is_named_with_its_remedy(tmp_path: Path, what: str, message: str) -> None:
    root = tmp_path / "data"
    write_images(root, "train", ["cat", "dog"], 1)
    write_images(root, "val", ["cat", "dog"], 1)
    open_data(str(root), CONFIG, HARD)
    damage(root, what)
    with pytest.raises(GrowkitError, match=message.format(root=root)) as caught:
        open_data(str(root), CONFIG, HARD)
    assert "\n" not in str(caught.value)


def test_data_is_told_apart_by_its_files_not_by_its_place(images: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(images, moved)
    identity = open_data(str(images), CONFIG, HARD).identity
    assert open_data(str(moved), CONFIG, HARD).identity == identity
    (moved / "train" / "cat" / "0.png").rename(moved / "train" / "cat" / "new.png")
    assert open_data(str(moved), CONFIG, HARD).identity != identity


def write_mnist(root: Path, train: int, test: int) -> None:
    """MNIST's files, as torchvision keeps them, with grey noise for digits."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", train), ("t10k", test)):
        pixels = np.random.default_rng(count).integers(0, 255, (count, 28, 28)).astype(np.uint8)
        head = struct.pack(">IIII", 0x803, count, 28, 28)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        head = struct.pack(">II", 0x801, count)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())


@pytest.mark.parametrize("channels", [1, 3])
def test_timm_dataset_string_opens_from_data_dir(tmp_path: Path, channels: int) -> None:
    write_mnist(tmp_path, 6, 4)
    settings = replace(HARD, batch_size=4, data_dir=str(tmp_path))
    config = {**CONFIG, "input_size": (channels, 28, 28)}
    data = open_data("torch/mnist", config, settings)
    assert len(data.classes) == 10
    (batch, labels), *rest = val_batches(data, settings)
    assert (batch.shape, labels.tolist(), rest) == ((4, channels, 28, 28), [0, 1, 2, 3], [])
    assert next(train_batches(data, settings, 0, 1))[0].shape == (4, channels, 28, 28)
    on_train = open_data("torch/mnist", config, replace(settings, val_split="train"))
    assert sum(len(labels) for _, labels in val_batches(on_train, settings)) == 6


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("torch/mnist", "^--data torch/mnist, split train: Dataset not found.* --dataset-download"),
        ("torch/mnits", "^--data torch/mnits, split train: Unknown torchvision dataset mnits"),
        ("tensor/mnist", "^--data tensor/mnist: no such folder"),
    ],
)
def test_timm_dataset_that_does_not_open_says_so_in_a_line(tmp_path: Path, data: str, message: str) -> None:
    with pytest.raises(GrowkitError, match=message) as caught:
        open_data(data, CONFIG, replace(HARD, data_dir=str(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", ["wds/imagenet", "tfds/mnist", "HFIDS/any"])
def test_streams_are_refused_before_anything_is_fetched(data: str) -> None:
    with pytest.raises(GrowkitError, match="a stream cannot be read in a repeatable order"):
        open_data(data, CONFIG, HARD)


PLAIN = FitSettings(batch_size=4, workers=0, color_jitter=0.0)
KINDS = pytest.mark.parametrize("settings", [PLAIN, replace(PLAIN, cache="device")], ids=["ordinary", "resident"])


def shown(data: Data, settings: FitSettings) -> list[Tensor]:
    """The images for evaluation."""
    return [image for batch, _ in val_batches(data, settings) for image in batch]


def among(image: Tensor, others: list[Tensor]) -> bool:
    return any(torch.equal(image, other) for other in others)


@KINDS
def test_what_is_chosen_by_and_what_is_tested_on_share_out_the_validation_images(
    opened: Open, settings: FitSettings
) -> None:
    data = opened(settings)
    whole = shown(data, settings)
    chosen, tested = hold_out(data, share=0.3, keep=0.5, seed=1)
    assert [labels_of(part) for part in (chosen.val, tested.val)] == [[0] * 2 + [1] * 2, [0] * 4 + [1] * 4]
    parts = shown(chosen, settings), shown(tested, settings)
    assert len({image.numpy().tobytes() for part in parts for image in part}) == 12
    for part in parts:
        order = [next(place for place, other in enumerate(whole) if torch.equal(image, other)) for image in part]
        assert order == sorted(order)
    assert chosen.train is tested.train
    assert labels_of(chosen.train) == [0] * 6 + [1] * 6  # half of 13
    assert hold_out(data, share=0.3, seed=1)[0].train is data.train
    assert chosen.classes == tested.classes == data.classes


def test_labels_of_training_images_are_not_read_where_all_are_kept() -> None:
    class Untold(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            raise AssertionError("read")

    labels = torch.arange(8) % 2
    val = TensorDataset(torch.rand(8, 3, 4, 4), labels)
    chosen, _ = hold_out(Data(Untold(val.tensors[0], labels), val, ["a", "b"]), share=0.5, seed=0)
    assert size_of(chosen.train) == 8


@KINDS
def test_no_image_is_both_trained_on_and_evaluated_and_evaluation_is_not_augmented(
    opened: Open, settings: FitSettings
) -> None:
    chosen, tested = hold_out(opened(settings), share=0.5, keep=0.5, seed=1)
    still = replace(settings, scale_min=1.0, hflip=0.0)
    for_still = hold_out(opened(still), share=0.5, keep=0.5, seed=1)
    for part, plain in zip((chosen, tested), for_still, strict=True):
        assert same(list(val_batches(part, settings)), list(val_batches(plain, still)))
    trained = [image for batch, _ in train_batches(for_still[0], still, 0, 3) for image in batch]
    assert len(trained) == 12
    assert not any(among(image, shown(part, settings)) for image in trained for part in (chosen, tested))


def test_split_depends_on_its_seed_alone_and_is_the_same_for_both_kinds(opened: Open) -> None:
    kept = replace(PLAIN, cache="device")

    def images(settings: FitSettings, seed: int, **given: float) -> list[Tensor]:
        return shown(hold_out(opened(settings), share=0.5, seed=seed, **given)[0], settings)

    first = images(PLAIN, 1)
    torch.manual_seed(99)
    images(PLAIN, 2)
    for other in (images(PLAIN, 1), images(kept, 1), images(PLAIN, 1, keep=0.2)):
        assert torch.equal(torch.stack(other), torch.stack(first))
    assert not torch.equal(torch.stack(images(PLAIN, 2)), torch.stack(first))
    before = torch.get_rng_state()
    images(kept, 3)
    assert torch.equal(torch.get_rng_state(), before)
    still = replace(PLAIN, scale_min=1.0, hflip=0.0, cache="device")
    halves = [hold_out(opened(still), share=0.5, keep=0.5, seed=seed)[0] for seed in (1, 1, 2)]
    trained = [
        {image.numpy().tobytes() for batch, _ in train_batches(d, still, 0, 3) for image in batch} for d in halves
    ]
    assert trained[0] == trained[1] != trained[2]


def test_split_is_part_of_the_identity(opened: Open) -> None:
    data = opened(PLAIN)
    given = {"share": 0.3, "keep": 0.5, "seed": 1}
    identity = hold_out(data, **given)[0].identity
    assert identity == hold_out(data, **given)[1].identity
    assert {**data.identity, **identity} == identity != data.identity
    for change in ({"share": 0.31}, {"keep": 0.6}, {"seed": 2}):
        assert hold_out(data, **{**given, **change})[0].identity != identity


def test_split_that_cannot_be_made_says_so(opened: Open) -> None:
    message = r"^class cat: too few validation images \(6\) to choose .* 0.99 .*; add images or .* --hold-out$"
    with pytest.raises(GrowkitError, match=message) as caught:
        hold_out(opened(PLAIN), share=0.99, seed=0)
    assert "\n" not in str(caught.value)


def test_smallest_share_keeps_an_image_of_each_class_and_one_image_cannot_be_split(tmp_path: Path) -> None:
    write_images(tmp_path, "train", ["cat", "dog"], 2)
    write_images(tmp_path, "val", ["cat", "dog"], 2)
    chosen, tested = hold_out(open_data(str(tmp_path), CONFIG, PLAIN), share=0.01, keep=0.01, seed=0)
    assert (labels_of(chosen.train), labels_of(chosen.val), labels_of(tested.val)) == ([0, 1], [0, 1], [0, 1])
    (tmp_path / "val" / "dog" / "0.png").unlink()
    with pytest.raises(GrowkitError, match=r"^class dog: too few validation images \(1\) .*; add images, or leave the"):
        hold_out(open_data(str(tmp_path), CONFIG, PLAIN), share=0.5, seed=0)


@KINDS
def test_timm_datasets_are_split_by_their_labels(tmp_path: Path, settings: FitSettings) -> None:
    write_mnist(tmp_path, 20, 60)
    settings = replace(settings, data_dir=str(tmp_path))
    parts = hold_out(open_data("torch/mnist", {**CONFIG, "input_size": (1, 28, 28)}, settings), share=0.5, seed=0)
    for part in parts:
        assert sorted(labels_of(part.val)) == sorted(list(range(10)) * 3)
        given = torch.cat([labels for _, labels in val_batches(part, settings)])
        assert given.tolist() == labels_of(part.val)


def test_labels_are_read_off_the_images_where_no_list_is_kept() -> None:
    numbers = torch.arange(12)
    images = TensorDataset(numbers, numbers % 3)
    data = Data(train=images, val=images, classes=[])
    parts = [torch.cat([batch for batch, _ in val_batches(d, PLAIN)]) for d in hold_out(data, share=0.5, seed=0)]
    assert sorted(torch.cat(parts).tolist()) == numbers.tolist()
    assert all((part % 3).bincount().tolist() == [2, 2, 2] for part in parts)
    with pytest.raises(GrowkitError, match=r"^class 0: too few"):
        hold_out(data, share=0.9, seed=0)


def test_unaugmented_images_are_training_images_prepared_as_for_evaluation(
    opened: Callable[[FitSettings], Data],
) -> None:
    data = opened(HARD)
    got = unaugmented(data, 5, seed=1)
    assert len(got) == 5
    assert len(unaugmented(data, 10**6, seed=1)) == size_of(data.train)
    assert torch.equal(got, unaugmented(data, 5, seed=1))
    assert not torch.equal(got, unaugmented(data, 5, seed=2))
    paths = [data.train.reader[index][0] for index in range(size_of(data.train))]
    evaluated = timm.data.create_transform(**CONFIG)
    plain = {evaluated(Image.open(path).convert("RGB")).numpy().tobytes() for path in paths}
    assert all(one.numpy().tobytes() in plain for one in got)


def test_worker_tells_of_errors_but_not_of_the_death_of_whom_it_serves(capfd: pytest.CaptureFixture[str]) -> None:
    """As Python's thread tells it that hands images on, in a process whose signals are its own."""
    errors = (EOFError(), ConnectionResetError(), ValueError("odd"))

    def work() -> None:
        _quiet_worker(multiprocessing.Pipe()[1], 0)
        for error in errors:
            sys.excepthook(type(error), error, None)

    worker = multiprocessing.get_context("fork").Process(target=work)
    worker.start()
    worker.join()
    said = capfd.readouterr().err
    assert worker.exitcode == 0
    assert [type(error).__name__ for error in errors if type(error).__name__ in said] == ["ValueError"]


def test_there_are_no_more_readers_than_batches_and_torch_says_nothing_of_their_number(opened: Open) -> None:
    """It warns where there are more than cores."""
    settings, before = FitSettings(batch_size=8, workers=64), set(multiprocessing.active_children())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = train_batches(opened(settings), settings, 0, 3)
        next(batches)
        assert len(set(multiprocessing.active_children()) - before) == 3
        assert len(list(batches)) == 2


def test_readers_leave_an_interrupt_to_the_main_process() -> None:
    class Deaf(Dataset[Any]):
        """Labels tell whether a process hears Ctrl-C."""

        def __len__(self) -> int:
            return 4

        def __getitem__(self, _: int) -> tuple[Tensor, int]:
            return torch.zeros(1), int(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)

    data = Data(train=Deaf(), val=Deaf(), classes=[])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background commands ignore it
    try:
        for workers in (0, 1):
            settings = FitSettings(batch_size=4, workers=workers)
            for batches in (train_batches(data, settings, 0, 1), val_batches(data, settings)):
                ((_, deaf),) = batches
                assert deaf.tolist() == [workers] * 4
    finally:
        signal.signal(signal.SIGINT, before)


def test_readers_serve_on_for_a_while_after_sigterm() -> None:
    """Schedulers send it to all processes of a job; training saves before it ends."""

    class Struck(Dataset[Any]):
        """Labels tell how many seconds a reader has left."""

        def __len__(self) -> int:
            return 8

        def __getitem__(self, _: int) -> tuple[Tensor, int]:
            os.kill(os.getpid(), signal.SIGTERM)
            return torch.zeros(1), signal.alarm(PATIENCE)

    data = Data(train=Struck(), val=Struck(), classes=[])
    for batches in (train_batches(data, CALM, 0, 2), val_batches(data, CALM)):
        left = torch.cat([labels for _, labels in batches])
        assert len(left) == 8
        assert ((left > 0) & (left <= PATIENCE)).all()


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch looks whether readers live after 5 s without a batch."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))
    monkeypatch.setattr(loading, "_most", [1024])


class Deadly(Dataset[Any]):
    """Images whose labels tell them apart; image `at` ends the process that reads for another, `times` in all."""

    def __init__(self, folder: Path, number: int, at: int, times: int):
        self.folder, self.number, self.at, self.times, self.main = folder, number, at, times, os.getpid()

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        deaths = len(list(self.folder.iterdir()))
        if os.getpid() != self.main and index == self.at and deaths < self.times:
            (self.folder / str(deaths)).touch()
            os.kill(os.getpid(), self.number)
        return torch.full((1, 2, 2), float(index)), index


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS, signal.SIGALRM])
@pytest.mark.parametrize(("times", "left"), [(1, ["2 read on"]), (9, ["2 read on", "1 read on", "without processes"])])
def test_images_are_read_on_where_a_process_that_reads_is_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, number: int, times: int, left: list[str]
) -> None:
    """The system kills one where memory runs out; that must not end a run at night."""
    settings = FitSettings(batch_size=4, workers=5)
    for name, batches in (("train", lambda data, own: train_batches(data, own, 0, 12)), ("val", val_batches)):
        (tmp_path / name).mkdir()
        loading._most[0] = 1024
        caplog.clear()
        deadly = Deadly(tmp_path / name, number, 13, times)
        found = list(batches(Data(train=deadly, val=deadly, classes=[]), settings))
        calm = Deadly(tmp_path / name, number, -1, 0)
        assert same(found, list(batches(Data(train=calm, val=calm, classes=[]), replace(settings, workers=0))))
        assert len(caplog.messages) == len(left)
        assert all(words in line for words, line in zip(left, caplog.messages, strict=True))
        readers = set(multiprocessing.active_children())
        again = batches(Data(train=calm, val=calm, classes=[]), settings)  # which asks for five again
        next(again)
        assert len(set(multiprocessing.active_children()) - readers) == loading._most[0] == 2 // len(left)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(
    ("times", "told"), [(1, ["all are begun once more"]), (3, ["all are begun once more", "1 read on"]), (0, [])]
)
def test_images_are_read_where_a_process_that_reads_never_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, times: int, told: list[str]
) -> None:
    """As a fork of Python 3.11 may hang, for ever, before any line of Python."""
    begin, before = loading._quiet_worker, set(multiprocessing.active_children())

    def hang(cry: Any, number: int) -> None:
        hung = len(list(tmp_path.iterdir()))
        if hung < times and number == 1:
            (tmp_path / str(hung)).touch()
            signal.pause()
        begin(cry, number)

    monkeypatch.setattr(loading, "_quiet_worker", hang)
    monkeypatch.setattr(loading, "BORN", 2.0)
    calm = Deadly(tmp_path, 0, -1, 0)
    found = list(val_batches(Data(train=calm, val=calm, classes=[]), FitSettings(batch_size=4, workers=2)))
    assert torch.cat([labels for _, labels in found]).tolist() == list(range(24))
    assert len(caplog.messages) == len(told)
    assert all(words in line for words, line in zip(told, caplog.messages, strict=True))
    for left in set(multiprocessing.active_children()) - before:
        left.join(5)
        assert not left.is_alive()


FULL = "unable to write to file </torch_1>: No space left on device (28)"


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (RuntimeError(FULL), "shared memory (/dev/shm) is full"),
        (OSError(errno.ENOSPC, "No space left on device"), "a process that reads images cannot begin (No space left"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "a process that reads images cannot begin (Cannot allocate"),
        (RuntimeError("can't start new thread"), "a process that reads images cannot begin (can't start new thread)"),
    ],
)
def test_images_are_read_without_processes_where_there_is_no_memory_for_these(
    fault: Exception, told: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Docker gives /dev/shm 64 MB, and each such process hands images over in there, or semaphores."""
    main = os.getpid()

    class Full(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            if os.getpid() != main:
                raise fault
            return super().__getitem__(index)

    if FULL not in fault.args:
        process = isinstance(fault, OSError)
        starts = (multiprocessing.Process, "start") if process else (multiprocessing.queues.Queue, "_start_thread")
        begun = getattr(*starts)

        def start(starting: Any) -> None:
            if os.getpid() == main and (len(caplog.messages) or set(multiprocessing.active_children()) - before):
                raise fault
            begun(starting)  # the first process of two

        monkeypatch.setattr(*starts, start)
    before = set(multiprocessing.active_children())
    data = Data(train=(images := Full(torch.rand(8, 1), torch.arange(8))), val=images, classes=[])
    found = list(val_batches(data, FitSettings(batch_size=4, workers=2)))
    assert torch.cat([labels for _, labels in found]).tolist() == list(range(8))
    assert all(line.startswith(told) for line in caplog.messages)
    assert "images are read without processes of their own" in caplog.messages[-1]
    for left in set(multiprocessing.active_children()) - before:
        left.join(5)
        assert not left.is_alive()


@pytest.mark.usefixtures("soon")
def test_a_crash_of_a_process_that_reads_is_refused_in_one_line(tmp_path: Path) -> None:
    """The next one would crash by the same image, and the main process after it."""
    deadly = Deadly(tmp_path, signal.SIGSEGV, 13, 9)
    settings = FitSettings(batch_size=4, workers=2)
    with pytest.raises(GrowkitError, match=r"^a process that reads images crashed \(SIGSEGV\): an image, or the"):
        list(val_batches(Data(train=deadly, val=deadly, classes=[]), settings))


@pytest.mark.usefixtures("soon")
def test_no_reader_outlives_one_that_was_killed(tmp_path: Path) -> None:
    deadly = Deadly(tmp_path, signal.SIGKILL, 13, 1)
    batches = val_batches(Data(train=deadly, val=deadly, classes=[]), FitSettings(batch_size=4, workers=4))
    before = set(multiprocessing.active_children())
    next(batches)
    first = set(multiprocessing.active_children()) - before
    assert len(list(batches)) == 5
    assert len(first) >= 3
    assert not any(reader.is_alive() for reader in first)


@pytest.mark.usefixtures("soon")
def test_a_reader_killed_while_it_hands_images_over_ends_nothing(tmp_path: Path) -> None:
    """Its pipes close before the system gives its status."""

    class Handing(Deadly):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            if os.getpid() != self.main and index == 13 and not list(self.folder.iterdir()):
                reduction.send_handle = self.die
            return torch.full((1, 2, 2), float(index)), index

        def die(self, *_: object) -> None:
            (self.folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    for number in range(5):
        (tmp_path / str(number)).mkdir()
        loading._most[0] = 1024
        handing = Handing(tmp_path / str(number), 0, 0, 0)
        found = val_batches(Data(train=handing, val=handing, classes=[]), FitSettings(batch_size=4, workers=2))
        assert torch.cat([labels for _, labels in found]).tolist() == list(range(24))
        assert list((tmp_path / str(number)).iterdir())


@pytest.mark.slow  # each process imports torch anew
@pytest.mark.parametrize("method", sorted(set(multiprocessing.get_all_start_methods()) - {"fork"}))
def test_images_are_read_by_processes_that_are_not_forked(method: str, tmp_path: Path) -> None:
    """As on macOS, and on Linux from Python 3.14 on."""
    write_images(tmp_path / "images", "train", ["cat", "dog"], 8)
    write_images(tmp_path / "images", "val", ["cat", "dog"], 2)
    program = tmp_path / "program.py"
    program.write_text(f"""
import multiprocessing
import torch
from growkit.train.batches import train_batches
from growkit.train.data import open_data
from growkit.train.settings import FitSettings

def read(workers):
    settings = FitSettings(batch_size=8, workers=workers, aa="rand-m9-mstd0.5", reprob=0.5)
    return list(train_batches(open_data({str(tmp_path / "images")!r}, {CONFIG!r}, settings), settings, 0, 3))

if __name__ == "__main__":
    multiprocessing.set_start_method({method!r})
    for (one, _), (other, _) in zip(read(0), read(2), strict=True):
        assert torch.equal(one, other)
""")
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    own = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, env=own, check=False)
    assert done.returncode == 0, done.stderr


def test_readers_end_with_a_program_that_still_holds_them(tmp_path: Path) -> None:
    """As where an error ends it; Python sends them SIGTERM then, and waits."""
    program = """
import torch
from torch.utils.data import TensorDataset
from growkit.train.batches import val_batches
from growkit.train.data import Data
from growkit.train.settings import FitSettings
images = TensorDataset(torch.rand(64, 1), torch.arange(64))
batches = val_batches(Data(train=images, val=images, classes=[]), FitSettings(batch_size=4, workers=2))
next(batches)
raise SystemExit("an error")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE / 2)
    assert (done.returncode, done.stderr) == (1, "an error\n")


@pytest.mark.parametrize(("workers", "says"), [(2, "of our own"), (0, "of our own"), (0, "unable to write to file")])
def test_an_error_that_comes_of_no_death_is_raised(
    workers: int, says: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Faulty(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            raise ValueError(says)

    if not workers:
        monkeypatch.setattr(loading, "wait", lambda *_, **__: pytest.fail("waited for nobody"))
    before = set(multiprocessing.active_children())
    data = Data(train=(images := Faulty(torch.zeros(8))), val=images, classes=[])
    with pytest.raises(ValueError, match=says):
        list(val_batches(data, FitSettings(batch_size=4, workers=workers)))
    assert caplog.messages == []
    for left in set(multiprocessing.active_children()) - before:  # torch would wait for each, once it collects them
        left.join(5)
        assert not left.is_alive()


@pytest.mark.usefixtures("soon")
def test_a_dead_reader_interrupts_nothing_else(tmp_path: Path) -> None:
    """torch's own way raises its death in the main thread at once: in the middle of an update, or of writing a file."""
    deadly = Deadly(tmp_path, signal.SIGKILL, -1, 0)
    before = set(multiprocessing.active_children())
    batches = val_batches(Data(train=deadly, val=deadly, classes=[]), FitSettings(batch_size=4, workers=1))
    next(batches)
    (reader,) = set(multiprocessing.active_children()) - before
    reader.kill()
    reader.join()
    time.sleep(0.1)  # Python would run a handler of the signal in here
    assert len(list(batches)) == 5


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_a_gpu_gets_the_batches_that_the_cpu_gets(opened: Open, workers: int) -> None:
    settings = replace(HARD, workers=workers)
    on_cpu, on_gpu = (
        (
            *train_batches(opened(settings), settings, 0, 7, device=device),
            *val_batches(opened(settings), settings, device=device),
        )
        for device in ("cpu", "cuda")
    )
    for here, there in zip(on_cpu, on_gpu, strict=True):
        assert there[0].is_cuda
        assert not there[1].is_cuda
        assert torch.equal(here[0], there[0].cpu())
        assert torch.equal(here[1], there[1])


@pytest.mark.parametrize("reprob", [0.0, 0.7])
def test_batches_copied_ahead_are_those_that_are_not(
    opened: Open, reprob: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a GPU's path does but for the copying, on tensors of the CPU."""
    monkeypatch.setattr("growkit.train.batches._copying", lambda _: MagicMock())
    for name in ("stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: MagicMock())
    settings = replace(HARD, reprob=reprob)
    data = opened(settings)
    cpu = torch.device("cpu")
    read = _read_to_train(data, settings, _Places(data, settings, 0, 4), cpu)
    assert same(list(_ahead(cpu, data.normalised, read)), list(train_batches(data, settings, 0, 4)))


def test_batches_are_copied_to_a_gpu_while_the_one_before_is_worked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams that note what is asked of them stand in for the GPU's; no batch is copied over one that is in use.

    Later runs over images copy on the stream of the first: torch would keep the memory of each stream for it alone.
    """
    happened: list[str] = []
    events = iter(range(1, 99))

    class Stream:
        def __init__(self, name: object) -> None:
            self.name = name if isinstance(name, str) else "copying"
            if self.name == "copying":
                happened.append("a stream to copy on")

        def record_event(self) -> int:
            event = next(events)
            happened.append(f"{self.name}: event {event}")
            return event

        def wait_event(self, event: int) -> None:
            happened.append(f"{self.name}: wait for {event}")

    class Images:
        def __init__(self, name: str) -> None:
            self.name = name

        def to(self, _: object, *, non_blocking: bool) -> "Images":
            assert non_blocking
            happened.append(f"copy {self.name}")
            return Images(self.name)

    monkeypatch.setattr("growkit.train.batches._copying", lru_cache(_copying.__wrapped__))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream("working"))

    def normalised(images: Any) -> Any:
        happened[-1] += ", normalise"
        return images

    given: Any = ((Images(name), torch.tensor(number)) for number, name in enumerate("ABC"))
    for images, label in _ahead(torch.device("cuda"), normalised, given):
        assert images.name == "ABC"[label]
        happened.append(f"work on {images.name}")
    assert happened == [
        *("a stream to copy on", "working: event 1", "copying: wait for 1"),
        *("copy A, normalise", "copying: event 2", "copy B, normalise", "copying: event 3"),
        *("working: wait for 2", "work on A", "working: event 4", "copying: wait for 4"),
        *("copy C, normalise", "copying: event 5", "working: wait for 3", "work on B"),
        *("working: event 6", "copying: wait for 6", "working: wait for 5", "work on C"),
        *("working: event 7", "copying: wait for 7"),
    ]
    happened.clear()
    given = ((Images(name), torch.tensor(number)) for number, name in enumerate("ABC"))
    batches = _ahead(torch.device("cuda"), normalised, given)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert happened[:2] == ["working: event 8", "copying: wait for 8"]
    assert happened[-3:] == ["working: wait for 9", "working: event 11", "copying: wait for 11"]
