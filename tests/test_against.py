"""`growkit evaluate --against`: what changed from a source to its model, in words, record and report."""

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import timm
import torch
from pairs import published_scale, tiny
from safetensors.torch import load_file, save_file
from test_cli import growkit, listing, write_images
from typer.testing import CliRunner

from growkit.errors import GrowkitError
from growkit.evaluation import Answering, _refuse_other_classes
from growkit.record import RunFolder
from growkit.report.behaviour import agreement_sections
from growkit.report.page import render
from growkit.report.run import run_report
from growkit.settings import Loading
from growkit.source import Source, load_source
from growkit_cli.main import app

NAMES = ("cat", "dog", "elk")
DATA = ("--data", "images", "--workers", "0")


def write(folder: Path, *, preprocessing: dict[str, object] | None = None, labels: object = None, **size: Any) -> None:
    """A model folder with random weights."""
    architecture = tiny(32, 1, 2, **size)
    arguments = {name: value for name, value in architecture.arguments.items() if name != "num_classes"}
    config: dict[str, Any] = {"architecture": architecture.name, "model_args": arguments, "label_names": labels}
    config["pretrained_cfg"] = preprocessing or {}
    timm.models.save_for_hf(published_scale(architecture), str(folder), model_config=config, safe_serialization=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a trained model of three classes and its ONNX file, and models beside it.

    first is the run's own model, damaged never answers elk, bare.pth is first without its sizes, and bare.onnx the file
    without its metadata.
    """
    root = tmp_path_factory.mktemp("against")
    write_images(root / "images", NAMES, 8)
    write_images(root / "renamed", ("ant", "dog", "elk"), 1)
    write_images(root / "fewer", NAMES[:2], 1)
    sizes = [f"--set={size}" for size in ("embed_dim=32", "depth=1", "num_heads=2", "img_size=16", "patch_size=8")]
    for command in (
        ["train", "vit_tiny", *sizes, "--data", f"{root}/images", "--epochs=10", "--lr=2e-3", "--batch-size=8"],
        ["export", "--exporter", "torchscript"],
    ):
        quick = ["--workers=0", "--scale-min=0.8"] if command[0] == "train" else []
        done = CliRunner().invoke(app, [*command, *quick, "--run", f"{root}/run"])
        assert done.exit_code == 0, done.output
    for name in ("first", "damaged", "renamed-model"):
        shutil.copytree(root / "run" / "trained", root / name)
    weights = load_file(root / "first" / "model.safetensors")
    torch.save(weights, root / "bare.pth")
    proto = onnx.load(root / "run" / "onnx" / "model.onnx")
    proto.ClearField("metadata_props")
    onnx.save(proto, root / "bare.onnx")
    weights["head.bias"][2] -= 1000
    save_file(weights, root / "damaged" / "model.safetensors")
    config = json.loads((root / "first" / "config.json").read_text())
    config["label_names"] = ["ant", "dog", "elk"]
    (root / "renamed-model" / "config.json").write_text(json.dumps(config))
    write(root / "seven")
    write(root / "headless", num_classes=0)
    preparing = {"mean": [0.1, 0.2, 0.3], "std": [0.9, 0.8, 0.7], "crop_pct": 0.8, "interpolation": "bilinear"}
    write(root / "otherwise", num_classes=3, img_size=24, preprocessing=preparing)
    return root


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in."""
    shutil.copytree(trained, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    status, out, err = growkit(capsys, "evaluate", *arguments, *DATA, "--json")
    assert status == 0, err
    return json.loads(out)


TURNED = ("turned_wrong", "turned_right", "changed_wrong")


@pytest.mark.parametrize("arguments", [("first",), ("run/onnx/model.onnx",), ("first", "--against", "damaged")])
def test_evaluation_needs_no_training_images(
    arguments: tuple[str, ...], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = evaluated(capsys, *arguments)
    shutil.rmtree(place / "images" / "train")
    assert evaluated(capsys, *arguments) == whole


def test_model_against_its_own_copy_changes_nothing_and_the_run_records_it(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluated(capsys, "--against", "first")
    assert found["agreement"] == {"count": 24, "share": 1.0}
    assert [found[name]["count"] for name in TURNED] == [0, 0, 0]
    assert found["source_scores"] == found["model_scores"]
    assert (found["model"], found["recorded"], found["mcnemar_p"]) == ("run/trained", True, 1.0)

    *_, step = json.loads((place / "run" / "record.json").read_text())["steps"]
    assert (step["command"], step["options"]["against"], step["options"]["model"]) == (
        "evaluate",
        "first",
        "run/trained",
    )
    assert step["figures"]["classes"] == found["classes"]
    assert set(step["hashes"]) == {"source", "model"}
    assert step["hashes"]["source"] == step["hashes"]["model"]
    page = (place / "run" / "report.html").read_text(encoding="utf-8")
    for words in ("Behaviour against the source", "0 turned wrong and 0 turned right", "elk"):
        assert words in page


def test_model_that_lost_a_class_shows_it_and_a_model_outside_the_run_is_not_recorded(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(place)
    found = evaluated(capsys, "damaged", "--against", "first")
    assert found["recorded"] is False
    assert listing(place) == before
    classes = {one["name"]: one for one in found["classes"]}
    assert list(classes) == list(NAMES)
    assert classes["elk"]["source"] > 0.5  # it was learned
    assert (classes["elk"]["model"], classes["elk"]["change"]) == (0.0, -classes["elk"]["source"])
    lost = round(classes["elk"]["source"] * 8)
    assert (found["turned_wrong"]["count"], classes["elk"]["turned_wrong"]) == (lost, lost)
    assert found["turned_wrong"]["share"] == pytest.approx(lost / 24)
    assert found["mcnemar_p"] == pytest.approx(2 / 2**lost)
    assert found["model_scores"]["top1"] < found["source_scores"]["top1"]


def test_damaged_model_is_told_in_words(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = growkit(capsys, "evaluate", "damaged", "--against", "first", *DATA)
    assert (status, err) == (0, "")
    assert out.startswith("evaluating damaged against first\n")
    assert "turned wrong and 0 turned right: exact McNemar p = " in out
    table = out[out.index("classes, worst change first") :]
    assert table.index("elk") < min(table.index("cat"), table.index("dog"))
    assert "-100.00" in table
    assert sum(line.startswith("│") for line in table.splitlines()) == 3, "a class is a line, 80 columns wide"
    assert out.endswith("not recorded: damaged is not in run/\n")


@pytest.mark.parametrize(
    ("model", "against"), [("run/onnx/model.onnx", "first"), ("first", "run/onnx/model.onnx")], ids=["onnx", "folder"]
)
def test_onnx_file_and_folder_agree_either_way_round(
    model: str, against: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluated(capsys, model, "--against", against)
    assert found["agreement"]["share"] == 1.0
    assert found["model_scores"] == pytest.approx(found["source_scores"], abs=1e-5)
    assert found["recorded"] is model.startswith("run/")
    damaged = evaluated(capsys, "damaged", "--against", "run/onnx/model.onnx")
    assert damaged["agreement"]["share"] < 1


def test_each_model_gets_images_of_its_own_size_and_normalisation(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluated(capsys, "first", "--against", "otherwise")
    for scores, name in ((found["model_scores"], "first"), (found["source_scores"], "otherwise")):
        alone = evaluated(capsys, name)
        assert scores == {key: alone[key] for key in scores}
    _, out, _ = growkit(capsys, "evaluate", "first", "--against", "otherwise", *DATA)
    assert "prepare images differently" in out
    _, out, _ = growkit(capsys, "evaluate", "first", "--against", "damaged", *DATA)
    assert "prepare images differently" not in out


def test_from_is_for_the_one_that_is_a_bare_checkpoint(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--from", "vit_tiny", "--from-set", "num_heads=2")  # a bare ViT would be taken for a DeiT
    assert evaluated(capsys, "first", "--against", "bare.pth", *sizes)["agreement"]["share"] == 1.0
    assert evaluated(capsys, "bare.pth", "--against", "first", *sizes)["agreement"]["share"] == 1.0
    status, _, err = growkit(capsys, "evaluate", "first", "--against", "bare.pth", *DATA)
    assert (status, "--from-set num_heads=N" in err) == (2, True)


def test_both_are_read_without_averaged_weights_where_that_is_asked(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def loaded(path: str, loading: Loading, **more: Any) -> Source:
        asked.append(loading.ema)
        return load_source(path, loading, **more)

    monkeypatch.setattr("growkit.evaluation.load_source", loaded)
    for words, ema in (((), True), (("--no-ema",), False)):
        evaluated(capsys, "first", "--against", "first", *words)
        assert asked == [ema, ema]
        asked.clear()


MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "source that is missing": (("--against", "nowhere.pth"), "nowhere.pth: no such file or folder"),
    "ONNX source that is missing": (("--against", "nowhere.onnx"), "nowhere.onnx: no such file"),
    "model that is missing": (("nowhere", "--against", "first"), "nowhere: no such file or folder"),
    "run without a model": (("--against", "first", "--run", "none"), "holds no model yet"),
    "source of other classes": (
        ("--against", "seven"),
        "seven has 7 classes and run/trained 3; compare with a source of the model's classes",
    ),
    "ONNX model of other classes": (("run/onnx/model.onnx", "--against", "seven"), "seven has 7 classes"),
    "source of other labels": (
        ("--against", "renamed-model"),
        "class 0 is ant in renamed-model and cat in run/trained; compare with a source of the model's classes",
    ),
    "data of other labels": (
        ("--against", "first", "--data", "renamed"),
        "--data renamed: its class 0 is ant and the models' is cat; give data with the models' classes",
    ),
    "data of fewer classes": (("--against", "first", "--data", "fewer"), "its 2 classes are not the models' 3"),
    "--batch-size auto": (("--batch-size", "-1"), "give a number here"),
    "data of fewer classes and no labels": (("seven",), "its 3 classes are not the model's 7; give data with"),
    "ONNX model of other data": (
        ("run/onnx/model.onnx", "--data", "fewer"),
        "its 2 classes are not the model's 3, elk is missing; give data with",
    ),
    "ONNX model that does not say how images are prepared": (
        ("bare.onnx",),
        "bare.onnx: its metadata does not say how images are prepared; export it with growkit",
    ),
    "model without a classifier": (("headless",), "headless has no classifier to judge; `growkit finetune headless`"),
    "source without a classifier": (("--against", "headless"), "headless has no classifier to judge"),
    "ONNX model on a device that is none": (
        ("run/onnx/model.onnx", "--device", "gpu"),
        "--device gpu: an ONNX file runs on auto, cpu or cuda",
    ),
    "ONNX model on another GPU": (("run/onnx/model.onnx", "--device", "cuda:1"), "CUDA_VISIBLE_DEVICES picks one"),
    "ONNX model in a precision": (
        ("run/onnx/model.onnx", "--precision", "fp16"),
        "run/onnx/model.onnx is an ONNX file: leave out --from, --from-set, --no-ema and --precision",
    ),
    "ONNX models against each other in a precision": (
        ("run/onnx/model.onnx", "--against", "run/onnx/model.onnx", "--precision", "fp16"),
        "run/onnx/model.onnx is an ONNX file",
    ),
    "--from of an ONNX model": (("run/onnx/model.onnx", "--from", "vit_tiny"), "model.onnx is an ONNX file: leave out"),
    "--from of two bare checkpoints": (
        ("bare.pth", "--against", "bare.pth", "--from-set", "num_heads=2"),
        "both bare checkpoints",
    ),
    "--from of two folders": (("first", "--against", "first", "--from", "vit_tiny"), "for bare checkpoints"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_line_and_exit_2_and_nothing_is_written(
    mistake: str, trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    arguments, said = MISTAKES[mistake]
    before = listing(trained)
    status, _, err = growkit(capsys, "evaluate", *DATA, *arguments)
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err
    assert listing(trained) == before


def test_command_that_is_advised_can_be_typed() -> None:
    old, new = (Answering(str(n), lambda images: images, {}, None, n, "") for n in (3, 7))
    with pytest.raises(GrowkitError, match="`growkit finetune SOURCE --data 'my images' --run OTHER` makes one"):
        _refuse_other_classes("my images", [], old, new)


def figures(classes: int) -> dict[str, Any]:
    """An agreement on so many classes, class n changed by n hundredths, the middle one by nothing."""
    scores = {"top1": 0.5, "top5": 0.75, "loss": 1.0, "ece": 0.125, "count": 100 * classes}
    part = {"count": 7, "share": 0.07}
    names = ("agreement", "both_right", "both_wrong", *TURNED)
    half = classes // 2
    return {
        "source_scores": scores,
        "model_scores": {**scores, "top1": 0.625, "loss": 0.75},
        **dict.fromkeys(names, part),
        "turned_wrong": {"count": 3, "share": 0.03},
        "mcnemar_p": 0.34375,
        "classes": [
            {
                "name": f"class{n}",
                "images": 100,
                "source": 0.5,
                "model": 0.5 + (n - half) / 100,
                "change": (n - half) / 100,
                "turned_wrong": max(0, half - n),
                "turned_right": max(0, n - half),
            }
            for n in reversed(range(classes))
        ],
    }


def test_sections_show_scores_predictions_and_classes() -> None:
    scores, predictions, classes = agreement_sections(figures(3))
    assert scores.title == "300 validation images"
    assert scores.table is not None
    assert list(scores.table.rows)[::2] == [
        ("top-1", "50.00%", "62.50%", "+12.50 points"),
        ("loss", "1.0000", "0.7500", "-0.2500"),
    ]
    assert predictions.table is not None
    assert ("turned wrong", "3", "3.00%") in predictions.table.rows
    assert predictions.text.startswith("3 turned wrong and 7 turned right: exact McNemar p = 0.34.")
    assert classes.text == ""
    assert classes.table is not None
    assert list(classes.table.rows) == [
        ("class0", "100", "50.00%", "49.00%", "-1.00", "1", "0"),
        ("class1", "100", "50.00%", "50.00%", "+0.00", "0", "0"),
        ("class2", "100", "50.00%", "51.00%", "+1.00", "0", "1"),
    ]


@pytest.mark.parametrize(("count", "shown"), [(20, range(20)), (21, [*range(10), *range(16, 21)])])
def test_of_many_classes_the_worst_and_the_best_are_shown_and_a_line_says_so(count: int, shown: range) -> None:
    section = agreement_sections(figures(count))[-1]
    assert section.table is not None
    assert [row[0] for row in section.table.rows] == [f"class{n}" for n in shown]
    said = "The 10 classes with the worst change and the 5 with the best, of 21."
    assert section.text == (said if count > 20 else "")


@pytest.mark.parametrize("broken", [False, True])
def test_report_shows_the_step_and_an_odd_one_still_makes_a_page(broken: bool, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    content = figures(3)
    if broken:
        content["classes"] = [{"name": "class0"}]
    run.add("evaluate", options={"against": "first"}, figures=content)
    report = run_report(run)
    (behaviour,) = [section for section in report.sections if section.title == "Behaviour against the source"]
    assert bool(behaviour.parts) is not broken
    assert ("damaged" in behaviour.text) is broken
    page = render(report)
    assert "against first" in page
    assert ("class0" in page) is not broken
