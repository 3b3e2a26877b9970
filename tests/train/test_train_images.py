"""Images and image folders as they are found: every kind is read as timm reads it, or named in a line."""

import itertools
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder, find_images_and_targets
from torch import Tensor, nn
from train_samples import CONFIG, Net, write_images

from growkit.deploy.inputs import read_pictures
from growkit.deploy.truth import Preprocessing
from growkit.errors import GrowkitError
from growkit.pictures import UnreadablePictureError
from growkit.text import visible
from growkit.train.batches import train_batches, unaugmented, val_batches
from growkit.train.data import Data, hold_out, labels_of, open_data, size_of
from growkit.train.loop import fit
from growkit.train.score import read_through
from growkit.train.settings import FitSettings
from growkit.train.watch import StepRecord

RECORD = Path("record.json")
PLAIN = FitSettings(batch_size=4, workers=0, color_jitter=0.0, scale_min=1.0, hflip=0.0)
KINDS = pytest.mark.parametrize(
    "settings",
    [PLAIN, replace(PLAIN, reprob=1.0), replace(PLAIN, cache="ram")],
    ids=["ordinary", "erased", "resident"],
)
RNG = np.random.default_rng(0)
RGB = Image.fromarray(RNG.integers(0, 255, (12, 15, 3)).astype(np.uint8))
DEEP = Image.fromarray(np.arange(180, dtype=np.uint16).reshape(12, 15) * 300)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """3 images of each of two classes in train/ and in val/."""
    write_images(tmp_path / "data", "train", ["cat", "dog"], 3)
    write_images(tmp_path / "data", "val", ["cat", "dog"], 3)
    return tmp_path / "data"


def refusal(data: Path | str, settings: FitSettings = PLAIN, config: dict[str, Any] = CONFIG) -> str:
    """The one line that refuses to evaluate on `data`."""
    with pytest.raises(GrowkitError) as caught:
        list(val_batches(open_data(str(data), config, settings), settings))
    assert str(caught.value).isprintable()
    return str(caught.value)


def by_timm(path: Path, mode: str = "RGB") -> Tensor:
    """The picture as timm's own dataset and evaluation transform give it."""
    config = {**CONFIG, "input_size": (len(mode), 8, 8)}
    if mode == "L":
        config |= {name: (sum(CONFIG[name]) / 3,) for name in ("mean", "std")}
    dataset = timm.data.ImageDataset(str(path.parents[1]), input_img_mode=mode)
    dataset.transform = timm.data.create_transform(**config)
    names = [Path(name) for name, _ in dataset.reader.samples]
    return dataset[names.index(path)][0]


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be shown a quarter turned
    return exif


SAVED: dict[str, Callable[[Path], None]] = {
    "grey.png": lambda path: RGB.convert("L").save(path),
    "grey.jpg": lambda path: RGB.convert("L").save(path),
    "grey with alpha.png": lambda path: RGB.convert("LA").save(path),
    "alpha.png": lambda path: RGB.convert("RGBA").rotate(9).save(path),
    "palette.png": lambda path: RGB.convert("P").save(path),
    "palette with transparency.png": lambda path: RGB.convert("P").save(path, transparency=3),
    "one bit.png": lambda path: RGB.convert("1").save(path),
    "cmyk.jpg": lambda path: RGB.convert("CMYK").save(path),
    "orientation.jpg": lambda path: RGB.save(path, exif=turned()),
    "gif inside.png": lambda path: RGB.save(path, format="GIF", save_all=True, append_images=[RGB.rotate(90)]),
    "webp inside.jpeg": lambda path: RGB.save(path, format="WEBP", save_all=True, append_images=[RGB.rotate(90)]),
    "png inside.JPG": lambda path: RGB.save(path, format="PNG"),
    "tiff inside.jpg": lambda path: RGB.convert("CMYK").save(path, format="TIFF"),
    "one pixel.png": lambda path: RGB.resize((1, 1)).save(path),
    "thin.png": lambda path: RGB.resize((1, 900)).save(path),
    "[red]ünï\n\x1b[31m.png": lambda path: RGB.save(path),
}


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", SAVED)
def test_every_kind_of_picture_gives_the_tensor_that_timm_gives(folder: Path, name: str, mode: str) -> None:
    for split in ("train", "val"):
        SAVED[name](folder / split / "cat" / name)
    data = open_data(str(folder), {**CONFIG, "input_size": (len(mode), 8, 8)}, PLAIN)
    place = [path for path, _ in data.val.reader.samples].index(str(folder / "val" / "cat" / name))
    images = torch.cat([images for images, _ in val_batches(data, PLAIN)])
    assert torch.equal(images[place], by_timm(folder / "val" / "cat" / name, mode))
    assert sum(len(labels) for _, labels in train_batches(data, PLAIN, 0, 2)) == 8
    assert data.remarks(RECORD) == []


def cut(path: Path, left: float) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * left)])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "the file is empty"),
    "text": (lambda path: path.write_text("hello"), "what is inside is none of BMP, GIF, JPEG"),
    "head": (lambda path: cut(path, 0.1), "."),
    "truncated": (lambda path: (Image.effect_noise((99, 99), 90).save(path), cut(path, 0.7)), "truncated"),
    "truncated jpeg": (lambda path: (Image.effect_noise((99, 99), 90).save(path, "JPEG"), cut(path, 0.7)), "truncated"),
    "16 bits": (lambda path: DEEP.save(path), "levels of grey have more than 8 bits, PIL's mode I;16; save it with 8"),
    "floats": (lambda path: DEEP.convert("F").save(path, "TIFF"), "PIL's mode F"),
    "thin": (lambda path: RGB.resize((1, 10000)).save(path), "of 1 x 10000 pixels, one side is more than 1000 times"),
    "bomb": (lambda path: Image.new("1", (20000, 20000)).save(path), "exceeds limit of 178956970 pixels"),
    "PostScript": (lambda path: RGB.save(path, "EPS"), "what is inside is none of"),  # PIL would start Ghostscript
    "nowhere": (lambda path: (path.unlink(), path.symlink_to("nowhere")), "No such file"),
    "itself": (lambda path: (path.unlink(), path.symlink_to(path.name)), "Too many levels of symbolic links"),
    "pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "not a file"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_unreadable_image_for_evaluation_is_named_with_the_reason(folder: Path, what: str) -> None:
    damage, reason = BROKEN[what]
    damage(folder / "val" / "dog" / "1.png")
    said = refusal(folder)
    assert said.startswith(f"{folder}/val/dog/1.png: not a readable picture (")
    assert said.endswith("; replace it or take it away")
    assert reason in said


def test_image_that_may_not_be_read_is_to_be_allowed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"{folder}/val/dog/1.png"

    def denied(name: Any, *how: Any) -> Any:  # chmod stops no root
        if name == path:
            raise PermissionError(13, "Permission denied", name)
        return open(name, *how)

    monkeypatch.setattr("growkit.pictures.open", denied, raising=False)
    said = f"{path}: not a readable picture (Permission denied); allow reading it or take it away"
    assert refusal(folder) == said


def test_unreadable_image_is_named_alike_by_workers_by_a_cache_and_for_calibration(folder: Path) -> None:
    cut(folder / "val" / "dog" / "1.png", 0.8)
    said = refusal(folder)
    assert refusal(folder, replace(PLAIN, workers=2)) == said
    cached = replace(PLAIN, cache="ram", workers=1)
    assert refusal(folder, cached) == said
    for settings in (PLAIN, cached):
        with pytest.raises(UnreadablePictureError) as caught:
            read_through(open_data(str(folder), CONFIG, settings), settings, torch.device("cpu"))
        assert str(caught.value) == said
    shutil.copy(folder / "val" / "dog" / "1.png", folder / "train" / "dog" / "1.png")
    with pytest.raises(GrowkitError, match=r"train/dog/1\.png: not a readable picture"):
        unaugmented(open_data(str(folder), CONFIG, PLAIN), 6, seed=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_all_unreadable_images_for_evaluation_are_named_at_once(folder: Path, workers: int) -> None:
    settings = replace(PLAIN, workers=workers, batch_size=1)
    for name in ("cat/0.png", "cat/1.png", "dog/1.png"):
        cut(folder / "val" / name, 0.8)
    said = refusal(folder, settings)
    assert said.startswith(f"{folder}/val/cat/0.png: not a readable picture (")
    assert said.endswith(f"; also unreadable: {folder}/val/cat/1.png, {folder}/val/dog/1.png")


def test_name_with_control_characters_cannot_steer_the_terminal(folder: Path) -> None:
    (folder / "val" / "cat" / "\x1b[31m\nred\udcff.png").write_text("x")
    assert "/val/cat/\\x1b[31m\\nred\\udcff.png: not a readable" in refusal(folder)
    assert visible("ünï [red] 猫") == "ünï [red] 猫"


def trained(data: Data, settings: FitSettings, first: int, last: int) -> list[tuple[bytes, list[int]]]:
    """The training batches `first` to `last`: pixels and labels."""
    return [
        (images.numpy().tobytes(), labels.tolist()) for images, labels in train_batches(data, settings, first, last)
    ]


@KINDS
def test_next_image_stands_in_for_an_unreadable_one_in_training_and_it_is_told(
    folder: Path, settings: FitSettings
) -> None:
    """It is as if the next file lay in its place, with its label."""
    settings = replace(settings, batch_size=2, hflip=0.5, scale_min=0.2)
    last_cat, first_dog = folder / "train" / "cat" / "2.png", folder / "train" / "dog" / "0.png"
    shutil.copy(first_dog, last_cat)
    copied = open_data(str(folder), CONFIG, settings)
    expected = trained(copied, settings, 0, 6)
    assert copied.remarks(RECORD) == []
    cut(last_cat, 0.8)
    data = open_data(str(folder), CONFIG, settings)
    found = trained(data, settings, 0, 6)
    assert [pixels for pixels, _ in found] == [pixels for pixels, _ in expected]
    assert sorted(label for _, labels in found for label in labels) == [0] * 4 + [1] * 8
    (remark,) = data.remarks(RECORD)
    told = "warning: training images that could not be read: 1, the next took their place; the first: "
    assert remark.startswith(f"{told}{last_cat}: not a readable picture (")


def test_stand_ins_do_not_depend_on_workers_batches_or_where_a_run_begins(folder: Path) -> None:
    hard = replace(PLAIN, aa="rand-m9-mstd0.5", scale_min=0.2, hflip=0.5, batch_size=2)
    cut(folder / "train" / "cat" / "1.png", 0.5)
    cut(folder / "train" / "dog" / "2.png", 0.8)
    runs, remarks = [], []
    for settings in (hard, replace(hard, workers=2)):
        data = open_data(str(folder), CONFIG, settings)
        runs.append(trained(data, settings, 0, 6))
        remarks.append(data.remarks(RECORD))
    assert runs[0] == runs[1]
    assert remarks[0] == remarks[1]
    assert "read: 2," in remarks[0][0]
    data = open_data(str(folder), CONFIG, hard)
    assert trained(data, hard, 4, 6) == runs[0][4:]
    whole = [
        b"".join(pixels for pixels, _ in trained(data, replace(hard, batch_size=size), 0, 6 // size)) for size in (2, 6)
    ]
    assert whole[0] == whole[1]


def test_unreadable_images_in_a_row_are_each_told_by_their_own_name(folder: Path) -> None:
    for number in (1, 2):
        cut(folder / "train" / "cat" / f"{number}.png", 0.5)
    data = open_data(str(folder), CONFIG, PLAIN)
    trained(data, replace(PLAIN, batch_size=2), 0, 6)
    assert [line.partition(": ")[0] for line in sorted(data.unreadable)] == [
        str(folder / "train" / "cat" / f"{number}.png") for number in (1, 2)
    ]


def test_unreadable_images_that_were_met_before_a_run_was_stopped_are_told_too(folder: Path, tmp_path: Path) -> None:
    cut(folder / "train" / "cat" / "1.png", 0.5)
    settings = replace(PLAIN, batch_size=2, steps=6, save_seconds=0.0)
    met = []
    for steps in (3, 6):

        def stop(record: StepRecord, at: int = steps) -> None:
            if record.step == at < settings.steps:
                raise KeyboardInterrupt

        data = open_data(str(folder), CONFIG, settings)
        fit(Net(), data, replace(settings, log_every=1), folder=tmp_path / "run", resume=steps == 6, on_step=stop)
        met.append(list(data.unreadable))
        with Image.open(folder / "train" / "dog" / "1.png") as mended:  # so the second part meets none
            mended.save(folder / "train" / "cat" / "1.png")
    assert met[0] == met[1]
    assert len(met[0]) == 1


def test_parts_of_held_out_data_share_what_could_not_be_read(folder: Path) -> None:
    cut(folder / "train" / "cat" / "1.png", 0.5)
    data = open_data(str(folder), CONFIG, PLAIN)
    chosen, tested = hold_out(data, share=0.5, seed=0)
    trained(chosen, replace(PLAIN, batch_size=2), 0, 3)
    assert len(tested.remarks(RECORD)) == 1


@KINDS
@pytest.mark.parametrize("workers", [0, 2])
def test_training_on_images_that_many_cannot_be_read_of_is_refused(
    folder: Path, settings: FitSettings, workers: int
) -> None:
    settings = replace(settings, workers=workers)
    before = set(multiprocessing.active_children())
    for path in (folder / "train" / "dog").iterdir():
        path.write_bytes(b"")
    for batch_size in (6, 1):
        data = open_data(str(folder), CONFIG, replace(settings, batch_size=batch_size))
        with pytest.raises(UnreadablePictureError, match=r"^3 of the first \d training images .*train/dog/"):
            list(train_batches(data, replace(settings, batch_size=batch_size), 0, 24 // batch_size))
    for path in (folder / "train" / "cat").iterdir():
        path.write_bytes(b"")
    data = open_data(str(folder), CONFIG, settings)
    with pytest.raises(
        UnreadablePictureError, match=r"\(the file is empty\).*; nor can the 10 images after it"
    ) as caught:
        list(train_batches(data, settings, 0, 1))
    assert "\n" not in str(caught.value)
    assert not set(multiprocessing.active_children()) - before, "a process reads on for an error that is kept"


@pytest.mark.parametrize(
    ("names", "images", "batch_size"), [(["cat/1", "dog/5"], 24, 4), (["cat/1", "cat/9", "dog/5"], 30, 30)]
)
def test_two_or_a_tenth_of_many_unreadable_images_end_no_run(
    names: list[str], images: int, batch_size: int, tmp_path: Path
) -> None:
    write_images(tmp_path, "train", ["cat", "dog"], images // 2)
    write_images(tmp_path, "val", ["cat", "dog"], 1)
    for name in names:
        (tmp_path / "train" / f"{name}.png").write_bytes(b"")
    settings = replace(PLAIN, epochs=2, batch_size=batch_size)
    data = open_data(str(tmp_path), CONFIG, settings)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    assert fit(model, data, settings).steps == 2 * images // batch_size
    assert f"read: {len(names)}," in data.remarks(RECORD)[0]


def test_few_unreadable_images_end_no_run_that_knew_of_others(tmp_path: Path) -> None:
    """How many there may be is of what is read from here on, not of what a run met before it was stopped."""
    write_images(tmp_path, "train", ["cat", "dog"], 12)
    write_images(tmp_path, "val", ["cat", "dog"], 1)
    (tmp_path / "train" / "cat" / "1.png").write_bytes(b"")
    data = open_data(str(tmp_path), CONFIG, PLAIN)
    data.unreadable.update(dict.fromkeys("abc"))
    settings = replace(PLAIN, batch_size=2)
    for number in range(12):  # one of them begins with the image
        list(train_batches(data, settings, number, number + 1))
    assert len(data.unreadable) == 4


def test_images_removed_while_training_are_named(folder: Path) -> None:
    data = open_data(str(folder), CONFIG, PLAIN)
    batches = train_batches(data, PLAIN, 0, 9)
    next(batches)
    shutil.rmtree(folder)
    with pytest.raises(UnreadablePictureError, match=rf"^{folder}/train/\w+/\d.png: .*No such file"):
        list(batches)


def test_images_of_a_timm_dataset_are_not_silently_replaced_either(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "growkit.train.data.create_dataset",
        lambda name, split, **_: timm.data.ImageDataset("", reader=ReaderImageFolder(str(folder / split))),
    )
    settings = replace(PLAIN, val_split="val", batch_size=6)
    good = open_data("hfds/any", CONFIG, settings)
    assert torch.equal(next(val_batches(good, settings))[0][2], by_timm(folder / "val" / "cat" / "2.png"))
    for split in ("train", "val"):
        cut(folder / split / "cat" / "1.png", 0.8)
    assert refusal("hfds/any", settings).startswith("image 1: not a readable picture (")
    data = open_data("hfds/any", CONFIG, settings)
    next(train_batches(data, settings, 0, 1))
    assert "read: 1," in data.remarks(RECORD)[0]


@pytest.mark.parametrize("missing", ["image", "label"])
def test_image_or_label_that_a_timm_dataset_lacks_is_unreadable_and_labels_are_listed_without_reading(
    folder: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    class Reader(ReaderImageFolder):
        """Like timm's of hfds/..., which fails on an image that is None and gives such a label."""

        def iter_targets(self) -> Iterator[Any]:
            return (label for _, label in self.samples)

    readers = {split: Reader(str(folder / split)) for split in ("train", "val")}
    monkeypatch.setattr(
        "growkit.train.data.create_dataset", lambda name, split, **_: timm.data.ImageDataset("", reader=readers[split])
    )
    settings = replace(PLAIN, val_split="val", batch_size=6)
    data = open_data("hfds/any", CONFIG, settings)
    for reader in readers.values():
        path, label = reader.samples[1]
        reader.samples[1] = (None, label) if missing == "image" else (path, None)
    assert refusal("hfds/any", settings).startswith("image 1: not a readable picture (TypeError: ")
    next(train_batches(data, settings, 0, 1))
    assert "read: 1," in data.remarks(RECORD)[0]
    if missing == "image":
        assert labels_of(data.val) == [0, 0, 0, 1, 1, 1]
    else:
        with pytest.raises(GrowkitError, match=r"^image 1: not a readable picture"):
            labels_of(data.val)
    readers["train"].dataset = SimpleNamespace(column_names=["image", "fine_label"])
    assert "no column is called label, only image, fine_label;" in refusal(
        "hfds/any", replace(settings, val_split="train")
    )


def test_timms_torch_folder_is_the_folder_itself(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(PLAIN, data_dir=str(folder))
    named, given = open_data("Torch/Folder", CONFIG, settings), open_data(str(folder), CONFIG, settings)
    assert (named.identity, named.classes) == (given.identity, given.classes)
    monkeypatch.chdir(tmp_path)  # where a folder is there, it is meant
    assert open_data(shutil.copytree(folder, "wds/pets"), CONFIG, PLAIN).identity == given.identity
    shutil.move(folder / "val" / "dog", folder / "val" / "fox")
    assert "val/ has no images of dog and alone has fox" in refusal("torch/image_folder", settings)
    shutil.rmtree(folder / "train")
    assert "no such folder" in refusal("torch/folder", settings)


def test_folder_lists_what_timm_lists_with_the_same_labels(tmp_path: Path) -> None:
    names = ["class10", "class9", "Übung", "[red]", "a b", "10", "9"]
    write_images(tmp_path, "train", names, 11)
    write_images(tmp_path, "val", names, 2)
    data = open_data(str(tmp_path), CONFIG, PLAIN)
    samples, labels = find_images_and_targets(str(tmp_path / "train"))
    assert data.classes == sorted(labels, key=labels.__getitem__)
    assert sorted(data.train.reader.samples) == sorted(samples)
    of_class9 = [Path(path).stem for path, label in data.train.reader.samples if label == labels["class9"]]
    assert of_class9 == [str(number) for number in range(11)]


def test_hidden_and_foreign_files_are_passed_over_and_names_may_be_anything(folder: Path) -> None:
    expected = open_data(str(folder), CONFIG, PLAIN).identity
    for path in (".DS_Store", "._0.png", "Thumbs.db", "notes.txt"):
        for where in ("train", "train/cat"):
            if where != "train" or path != "._0.png":
                (folder / where / path).write_bytes(b"x")
    (folder / "train" / "._0.png").write_bytes(b"x")
    for where in ("train", "train/cat"):
        (folder / where / ".ipynb_checkpoints").mkdir()
        RGB.save(folder / where / ".ipynb_checkpoints" / "0.png")
    data = open_data(str(folder), CONFIG, PLAIN)
    assert (data.classes, data.identity) == (["cat", "dog"], expected)
    RGB.save(folder / "train" / "cat" / "1²2\udcff\n.webp")  # timm's order raises ValueError on this one
    assert labels_of(open_data(str(folder), CONFIG, PLAIN).train) == [0] * 4 + [1] * 3


def test_classes_that_differ_in_case_alone_have_an_order(folder: Path) -> None:
    alike = ["CAT", "CAt", "CaT", "Cat", "cAT", "cat"]  # equal to timm, whose order is that of hashes
    for split in ("train", "val"):
        for name in alike[:-1]:
            shutil.copytree(folder / split / "cat", folder / split / name)
    assert open_data(str(folder), CONFIG, PLAIN).classes == [*alike, "dog"]


LAYOUTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder within a class": (
        lambda f: (f / "val/cat/2019").mkdir(),
        "/val/cat/2019: a folder within a class; put its",
    ),
    "link back up": (lambda f: (f / "val/cat/up").symlink_to(".."), "/val/cat/up: a folder within a class"),
    "class that links back up": (lambda f: (f / "val/up").symlink_to(".."), "/val/up/train: a folder within a class"),
    "control characters": (
        lambda f: (f / "train/cat").rename(f / "train/c\x1b[31m\nat"),
        r"/train/c\x1b[31m\nat: a class whose name cannot be printed; rename it",
    ),
    "other case": (
        lambda f: (f / "val/cat").rename(f / "val/Cat"),
        "val/ has no images of cat and alone has Cat; rename Cat there",
    ),
    "one more in val": (
        lambda f: shutil.copytree(f / "val/cat", f / "val/owl"),
        "train/ has no images of owl; add some or remove val/owl",
    ),
    "one class": (
        lambda f: [shutil.rmtree(f / s / "dog") for s in ("train", "val")],
        "all images are of one class, cat",
    ),
    "other suffix": (
        lambda f: [p.rename(f"{p}.heic") for p in (f / "val/cat").iterdir()],
        "/val/cat: holds no images;",
    ),
    "test for val": (
        lambda f: (f / "val").rename(f / "test"),
        "/val: no such folder; make it, or name the one to evaluate on with --val-split: test",
    ),
}


def test_images_to_evaluate_on_need_no_others(folder: Path) -> None:
    shutil.rmtree(folder / "train")
    data = open_data(str(folder), CONFIG, PLAIN, training=False)
    assert data.classes == ["cat", "dog"]
    assert (size_of(data.train), size_of(data.val)) == (0, 6)
    assert sum(len(labels) for _, labels in val_batches(data, PLAIN)) == 6
    with pytest.raises(GrowkitError, match="/train: no such folder"):
        open_data(str(folder), CONFIG, PLAIN)
    with pytest.raises(GrowkitError, match=f"/val/val: no such folder; give --data {folder}$"):
        open_data(str(folder / "val"), CONFIG, PLAIN, training=False)


@pytest.mark.parametrize("what", LAYOUTS)
def test_folder_laid_out_wrongly_is_named_with_its_remedy(folder: Path, what: str) -> None:
    change, message = LAYOUTS[what]
    change(folder)
    said = refusal(folder)
    assert said.startswith(visible(folder))
    assert message in said


def test_data_that_means_a_folder_nearby_says_which(folder: Path, tmp_path: Path) -> None:
    for given in ("data/train", "data/train/cat", "."):
        assert refusal(tmp_path / given).endswith(f"/train: no such folder; give --data {folder}")
    assert refusal(folder / "val/cat/0.png").startswith(
        f"--data {folder}/val/cat/0.png: is a file; give one that holds"
    )
    assert refusal("torch").startswith("--data torch: no such folder")
    assert "Unknown torchvision dataset cifar100x" in refusal("torch/cifar100x")


def test_val_split_names_the_folder_to_evaluate_on(folder: Path) -> None:
    def count(settings: FitSettings) -> int:
        return size_of(open_data(str(folder), CONFIG, settings).val)

    write_images(folder, "test", ["cat", "dog"], 5)
    assert count(PLAIN) == 6
    assert count(replace(PLAIN, val_split="test")) == 10
    (folder / "val").rename(folder / "validation")
    assert count(PLAIN) == 6
    assert "/vall: no such folder; make it, or name" in refusal(folder, replace(PLAIN, val_split="vall"))


def test_folder_that_may_not_be_listed_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def denied(path: Any) -> Any:  # chmod stops no root
        if Path(path).name == "cat":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert (
        refusal(folder) == f"{folder}/train/cat: cannot be listed (Permission denied); allow it or take the folder away"
    )


def test_bombs_take_little_memory_and_time(tmp_path: Path) -> None:
    Image.new("1", (20000, 20000)).save(tmp_path / "square.png")
    Image.new("1", (60000, 1)).save(tmp_path / "thin.png")
    Image.new("1", (20000, 20000)).save(tmp_path / "fax.tif", compression="group4")
    RGB.save(tmp_path / "lying.gif")
    lying = bytearray((tmp_path / "lying.gif").read_bytes())
    lying[6:10] = b"\xff" * 4  # the screen, 65535 x 65535
    (tmp_path / "lying.gif").write_bytes(lying)
    assert all(path.stat().st_size < 2e6 for path in tmp_path.iterdir())
    script = """
import resource, sys
from growkit.pictures import UnreadablePictureError, open_picture
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        open_picture(path, "RGB")
        print("read", path)
    except UnreadablePictureError as error:
        print("refused")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    made = subprocess.run(
        [sys.executable, "-c", script, *map(str, sorted(tmp_path.iterdir()))],
        capture_output=True,
        text=True,
        timeout=60,
    )
    *lines, kilobytes = made.stdout.split("\n")[:-1]
    assert (lines, made.stderr) == (["refused"] * 4, "")
    assert int(kilobytes) < 50_000


PREPARED = Preprocessing((3, 8, 8), CONFIG["mean"], CONFIG["std"], "bicubic", 0.9, "center")


def test_pictures_to_verify_with_are_read_likewise(tmp_path: Path) -> None:
    for name in SAVED:
        SAVED[name](tmp_path / name)
    (tmp_path / ".hidden").mkdir()
    for name in ("._0.png", ".hidden/0.png"):
        (tmp_path / name).write_bytes(b"x")
    found = read_pictures(tmp_path, PREPARED)
    assert set(found) == {visible(name) for name in SAVED}
    for name in SAVED:
        with Image.open(tmp_path / name) as picture:
            assert np.array_equal(np.asarray(found[visible(name)]), np.asarray(picture.convert("RGB")))


def test_of_many_pictures_to_verify_with_some_of_everywhere_are_taken(tmp_path: Path) -> None:
    for number in range(100):
        RGB.save(tmp_path / f"{number:02d}.png")
    taken = [int(name.removesuffix(".png")) for name in read_pictures(tmp_path, PREPARED)]
    assert len(set(taken)) == 64
    assert max(later - earlier for earlier, later in itertools.pairwise([-1, *taken, 100])) <= 2


@pytest.mark.parametrize("what", BROKEN)
def test_unreadable_picture_to_verify_with_is_named(tmp_path: Path, what: str) -> None:
    damage, reason = BROKEN[what]
    RGB.save(tmp_path / "0.png")
    damage(tmp_path / "0.png")
    with pytest.raises(GrowkitError, match=rf"^{tmp_path}/0.png: not a readable picture \(") as caught:
        read_pictures(tmp_path, PREPARED)
    assert reason in str(caught.value)
    assert str(caught.value).isprintable()
