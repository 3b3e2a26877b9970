"""What the commands say and do about images that cannot be read, and about classes that are not the model's."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import program
import pytest
import timm
from pairs import published_scale, tiny
from PIL import Image

TO = ("--to", "vit_tiny", "--set", "embed_dim=64", "--set", "depth=2", "--set", "num_heads=4")
QUICK = ("--workers", "0", "--batch-size", "8", "--device", "cpu")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of the classes of an image folder: 24 to train on and 8 to evaluate on."""
    root = tmp_path_factory.mktemp("made")
    generator = np.random.default_rng(0)
    for split, each in (("train", 12), ("val", 4)):
        for index, label in enumerate(("cat", "dog")):
            (root / "images" / split / label).mkdir(parents=True)
            for number in range(each):
                pixels = generator.integers(0, 60, (16, 16, 3)) + 90 * index
                path = root / "images" / split / label / f"{number}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    architecture = tiny(32, 2, 2, num_classes=2)
    config = {"architecture": "vit_tiny_patch16_224", "model_args": dict(architecture.arguments)}
    del config["model_args"]["num_classes"]
    config |= {"num_classes": 2, "label_names": ["cat", "dog"]}
    timm.models.save_for_hf(published_scale(architecture), str(root / "small"), config, safe_serialization=True)
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, and where the commands run."""
    shutil.copytree(made, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture
def growkit(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the program in this process: exit status, stdout, stderr."""
    return partial(program.growkit, capsys)


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


DATA = ("--data", "images")
EXPORT = ("export", "small", "--exporter", "torchscript")  # the faster one
REFUSING = {
    "evaluate": ("evaluate", "small", *DATA, *QUICK),
    "evaluate with workers": ("evaluate", "small", *DATA, "--workers", "2", "--device", "cpu"),
    "evaluate against": ("evaluate", "small", "--against", "small", *DATA, *QUICK),
    "finetune": ("finetune", "small", *DATA, "--steps", "3", *QUICK),
    "train": (
        "train",
        "vit_tiny",
        "--set",
        "depth=1",
        "--set",
        "img_size=16",
        *DATA,
        "--steps",
        "3",
        "--log-every",
        "1",
        *QUICK,
    ),
    "grow": ("grow", "small", *TO, *DATA, "--steps", "3", *QUICK),
    "compare": (
        "compare",
        "small",
        *TO,
        *DATA,
        "--methods",
        "lemon",
        "--steps",
        "3",
        "--lrs",
        "1e-3",
        "--budgets",
        "1",
        "--seeds",
        "1",
        *QUICK,
    ),
    "export": (*EXPORT, *DATA, "--precision", "int8"),
}


@pytest.mark.parametrize("command", REFUSING)
def test_unreadable_image_to_evaluate_on_is_refused_by_name_and_nothing_is_left(
    place: Path, growkit: Run, command: str
) -> None:
    damage(place / "images" / "val" / "dog" / "2.png")
    status, out, err = growkit(*REFUSING[command])
    assert (status, err.count("\n")) == (2, 1), (out, err)
    assert err.startswith("error: images/val/dog/2.png: not a readable picture (")
    assert "top-1" not in out
    assert "1/3 loss" not in out  # no update before the refusal
    left = files(place / "run") if (place / "run").exists() else set()
    assert not [name for name in left if name.endswith((".safetensors", ".onnx", "record.json", ".partial"))]


def test_unreadable_pictures_and_images_are_refused_by_verify_and_calibration(place: Path, growkit: Run) -> None:
    status, _, err = growkit(*EXPORT)
    assert status == 0, err
    verify = ("verify", "small", "--no-latency")
    before = files(place)
    damage(place / "images" / "val" / "cat" / "0.png")
    damage(place / "images" / "train" / "dog" / "0.png")
    for arguments in (
        (*verify, *DATA, "--workers", "0"),
        (*verify, "--images", "images/val"),
        (*EXPORT, "--out", "static", "--precision", "int8-static", *DATA),
    ):
        status, out, err = growkit(*arguments)
        assert (status, err.count("\n")) == (2, 1), (arguments, out, err)
        assert ": not a readable picture (" in err
        assert "images/" in err
    assert files(place) == before


@pytest.mark.parametrize("command", ["finetune", "grow", "train"])
def test_unreadable_training_image_is_told_after_training(place: Path, growkit: Run, command: str) -> None:
    damage(place / "images" / "train" / "dog" / "2.png")
    status, out, err = growkit(*REFUSING[command], "--json")  # 3 updates of 8 images are an epoch
    assert status == 0, err
    json.loads(out)
    assert err.count("warning: training images that could not be read: 1, the next took their place; the first:") == 1
    assert "images/train/dog/2.png: not a readable picture (" in err


@pytest.mark.parametrize("command", ["finetune", "grow"])
def test_all_unreadable_training_images_are_on_record(place: Path, growkit: Run, command: str) -> None:
    for name in ("dog/2.png", "cat/1.png"):
        damage(place / "images" / "train" / name)
    status, out, err = growkit(*REFUSING[command])
    assert status == 0, err
    assert "could not be read: 2, the next took their place; the first: images/train/" in out
    assert out.count("; all are named in run/record.json") == 1
    (step,) = json.loads((place / "run" / "record.json").read_text())["steps"]
    assert sorted(line.partition(": not a readable")[0] for line in step["figures"]["unreadable"]) == [
        "images/train/cat/1.png",
        "images/train/dog/2.png",
    ]


def test_comparison_tells_of_unreadable_training_images(
    place: Path, growkit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("growkit.compare.compare.write_pages", lambda *_: None)
    damage(place / "images" / "train" / "dog" / "2.png")
    status, out, err = growkit(*REFUSING["compare"])
    assert status == 0, (out, err)
    assert out.count("warning: training images that could not be read: 1,") == 1


def test_data_whose_classes_are_in_another_place_is_not_scored_and_told_when_trained_on(
    place: Path, growkit: Run
) -> None:
    for split in ("train", "val"):
        (place / "images" / split / "cat").rename(place / "images" / split / "wolf")
    for arguments in (REFUSING["evaluate"], REFUSING["export"]):
        status, out, err = growkit(*arguments)
        assert (status, "top-1" in out) == (2, False)
        assert err == (
            "error: --data images: its class 0 is dog and the model's is cat; give data with the model's classes\n"
        )
    status, out, err = growkit(*REFUSING["finetune"])
    assert status == 0, err
    assert "the source calls its classes cat, dog, the data dog, wolf: they are taken in order" in out
