"""What a model comes from: every stage in order, whatever their files say, and nothing of the machine they lay on."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
from pairs import published_scale, tiny
from test_adapt import QUICK, ok, source_of
from test_cli import growkit, write_images
from test_report import Page

from growkit.checkpoint import HISTORY
from growkit.history import in_short, without_curves
from growkit.lineage import KEYS, MOST, ancestors, flops_of
from growkit.source import Source, load_source

SMALL = tiny(32, 2, 2)


def to(embed: int, depth: int) -> tuple[str, ...]:
    sizes = {"embed_dim": embed, "depth": depth, "num_heads": embed // 16}
    return ("--to", "vit_tiny", *(word for key, value in sizes.items() for word in ("--set", f"{key}={value}")))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_images(root, ("cat", "dog", "elk"), 8)
    return root


def sha256(path: Path) -> str:
    return hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()


def test_tiny_to_small_to_base_keeps_every_stage_in_order(images, tmp_path, capsys, monkeypatch):
    """Trained, grown, fine-tuned, grown again at another size: hashes chain, and what each cost is there."""
    monkeypatch.chdir(tmp_path)
    data = ("--data", images, "--data-dir", tmp_path, *QUICK)  # which no file that is served may tell
    sizes = ("--set", "embed_dim=16", "--set", "depth=1", "--set", "num_heads=1", "--set", "patch_size=8")
    ok(capsys, "train", "vit_tiny", *sizes, "--set", "img_size=16", *data, "--steps", 4, "--seed", 3, "--run", "one")
    ok(capsys, "grow", "one/trained", *to(32, 2), "--rank", 2, *data, "--steps", 2, "--seed", 5, "--run", "one")
    ok(capsys, "finetune", *data, "--steps", 3, "--run", "one")
    larger = (*to(48, 2), "--set", "img_size=24", "--method", "lemon", "--run", "two")
    ok(capsys, "grow", "one/finetuned", *larger)
    ok(capsys, "finetune", *data, "--steps", 1, "--run", "two")

    def kept(folder: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((tmp_path / folder / HISTORY).read_text())
        assert content["weights_sha256"] == sha256(tmp_path / folder)
        return content

    line = kept("two/finetuned")["ancestors"]
    folders = ["one/trained", "one/grown", "one/finetuned", "two/grown"]
    assert [entry["name"] for entry in line] == ["trained", "grown", "finetuned", "grown"]
    assert [entry["stage"] for entry in line] == ["trained", "grown", "finetuned", "grown"]
    assert [entry["sha256"] for entry in line] == [sha256(tmp_path / folder) for folder in folders]
    assert [entry["source"] for entry in line] == ["", *(entry["sha256"] for entry in line[:-1])]
    assert [(entry["width"], entry["layers"]) for entry in line] == [(16, 1), (32, 2), (32, 2), (48, 2)]
    assert [entry.get("method") for entry in line] == [None, "mango", None, "lemon"]
    assert [entry.get("rank") for entry in line] == [None, 2, None, None]
    assert [entry["seed"] for entry in line] == [3, 5, 0, 0]
    assert [entry["steps"] for entry in line] == [4, 2, 3, 0]
    assert [entry["images"] for entry in line] == [32, 16, 24, 0]
    told = [kept(folder).get("fit") or kept(folder).get("operator") for folder in folders]
    assert [entry["flops"] for entry in line] == [fit["flops"] if fit else 0 for fit in told]
    assert "img_size 16 -> 24" in line[-1]["adapted"]
    for earlier, folder in enumerate(folders):
        assert kept(folder)["ancestors"] == line[:earlier]
        assert kept(folder)["source"]["sha256"] == (line[earlier - 1]["sha256"] if earlier else "")
    for folder in (*folders, "two/finetuned"):
        assert str(tmp_path) not in (tmp_path / folder / HISTORY).read_text()
    spent = [fit["flops"] for fit in (*told[:3], kept("two/finetuned")["fit"])]
    assert flops_of(load_source("two/finetuned")) == sum(spent)

    page, _ = ok(capsys, "report", "--run", "two")
    report = Page(Path(page["report"]).read_text()).text
    assert "What it comes from, oldest first" in report
    made = ("trained, seed 3", "grown, by mango, rank 2, seed 5", "finetuned, seed 0")
    places = [report.index(words) for words in made]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("begins", "known"),
    [
        ({"stage": "trained", "source": "", "flops": 5}, 7.0),
        ({"stage": "trained", "source": ""}, None),
        ({"stage": "trained", "source": "ab", "flops": 5}, None),
        ({"stage": "given", "name": "timm:deit_tiny"}, None),
        ({"stage": "given", "name": "deit_tiny.pth", "sha256": "ab"}, None),
    ],
)
def test_cost_of_a_source_is_known_only_where_growkit_trained_it_from_scratch(begins, known):
    grown = {"stage": "grown", "ancestors": [begins], "operator": {"flops": 2.0}, "settings": {"method": "mango"}}
    source = source_of(SMALL)
    assert flops_of(replace(source, history=grown)) == known
    assert flops_of(replace(source, history={**grown, "ancestors": []})) is None
    assert flops_of(source) is None
    assert flops_of(replace(source, sha256="")) is None  # random weights: nothing was made


def test_weights_that_growkit_did_not_make_are_given():
    source = source_of(SMALL)
    (entry,) = ancestors(replace(source, path="/home/me/small.pth"))
    assert (entry["stage"], entry["name"], entry["sha256"]) == ("given", "small.pth", "ab")
    (entry,) = ancestors(replace(source, path="timm:deit_tiny_patch16_224"))
    assert (entry["stage"], entry["name"]) == ("given", "timm:deit_tiny_patch16_224")
    assert ancestors(replace(source, sha256="")) == []


def test_what_an_operators_training_took_is_unknown_rather_than_nothing_where_it_is_not_told() -> None:
    history = {"stage": "grown", "operator": {"steps": 5}, "settings": {"method": "mango", "ranks": "1,2,4,4"}}
    (entry,) = ancestors(replace(source_of(SMALL), history=history))
    assert (entry["method"], entry["rank"], entry["steps"]) == ("mango", "1,2,4,4", 5)
    assert not {"images", "flops"} & set(entry)
    (entry,) = ancestors(replace(source_of(SMALL), history={**history, "operator": {"images": 5}}))
    assert not {"steps", "flops"} & set(entry)


ODD: dict[str, Any] = {
    "no list": {"ancestors": {"stage": "grown"}},
    "entries that are none": {"ancestors": [1, None, "x", [], {"stage": {"deep": [1]}, "flops": [2]}]},
    "numbers that are none": {"ancestors": [{"flops": math.nan, "steps": math.inf, "images": 10**400, "seed": True}]},
    "words for numbers": {"stage": "trained", "fit": {"flops": "many"}},
    "far too many": {"ancestors": [{"stage": "grown"}] * 5000},
    "long words": {"ancestors": [{"name": "n" * 9000, "other": "o" * 9000}]},
    "parts of another kind": {"stage": [], "source": 3, "settings": "mango", "fit": [], "operator": 1},
}


@pytest.mark.parametrize("kind", ODD)
def test_whatever_a_history_says_what_is_passed_on_is_short_and_plain(kind: str) -> None:
    line = ancestors(replace(source_of(SMALL), history=ODD[kind]))
    assert 1 <= len(line) <= MOST
    assert line[-1]["sha256"] == "ab"  # the source itself
    for entry in line:
        assert set(entry) <= set(KEYS)
        assert all(type(v) in (str, int, float) and len(str(v)) <= 200 for v in entry.values())
    json.dumps(line, allow_nan=False)
    assert flops_of(replace(source_of(SMALL), history=ODD[kind])) is None


# Histories that are damaged, and those of other weights


def deep(levels: int) -> str:
    return '{"source": {"history": ' * levels + "{}" + "}}" * levels


HOSTILE = {
    "a list": "[1, 2]",
    "a word": '"grown"',
    "cut": '{"stage": "gro',
    "no text": "\xff\xfe",
    "a list 1,000 deep": "[" * 1000 + "]" * 1000,
    "a list 100,000 deep": '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "objects 400 deep": deep(200),
    "a word of 10 MB": json.dumps({"stage": "grown" * 2_000_000}),
    "a key of 10 MB": json.dumps({"stage" * 2_000_000: 1}),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "small"
    arguments = {name: value for name, value in SMALL.arguments.items() if name != "num_classes"}
    config = {"architecture": SMALL.name, "model_args": arguments}
    timm.models.save_for_hf(published_scale(SMALL), str(folder), model_config=config, safe_serialization=True)
    return folder


def read_with(folder: Path, history: str) -> Source:
    (folder / HISTORY).write_bytes(history.encode("latin-1"))
    return load_source(str(folder))


@pytest.mark.parametrize("kind", HOSTILE)
def test_damaged_history_is_left_out_with_a_line_and_the_model_grows(kind, small, tmp_path, capsys, monkeypatch):
    source = read_with(small, HOSTILE[kind])
    assert source.history is None
    unknown = "was left out: where these weights come from is not known"
    assert source.notes == (f"{small / HISTORY} is damaged and {unknown}",)
    monkeypatch.chdir(tmp_path)
    status, out, err = growkit(capsys, "grow", small, *to(48, 2), "--run", "run")
    assert (status, err) == (0, "")
    assert "is damaged and was left out" in out
    (entry,) = json.loads((tmp_path / "run" / "grown" / HISTORY).read_text())["ancestors"]
    assert (entry["stage"], entry["sha256"]) == ("given", sha256(small))


def test_history_of_other_weights_is_left_out_with_a_line(small: Path) -> None:
    own = read_with(small, json.dumps({"stage": "grown", "weights_sha256": sha256(small)}))
    assert (own.history or {}).get("stage") == "grown"
    other = read_with(small, json.dumps({"stage": "grown", "weights_sha256": "ab" * 32}))
    assert other.history is None
    assert "tells of other weights and was left out" in other.notes[0]


def test_who_is_served_a_model_gets_no_curves_of_its_training() -> None:
    fit = {"steps": 3, "losses": [2.0, 1.0], "history": [{"step": 1}], "settings": {"lr": 1e-3}}
    told = {"stage": "finetuned", "source": {"history": {"fit": {**fit, "training": [{"loss": 1.0}]}}}, "fit": fit}
    kept = {"steps": 3, "settings": {"lr": 1e-3}}
    assert without_curves(told) == {"stage": "finetuned", "source": {"history": {"fit": kept}}, "fit": kept}
    assert without_curves(None) is None


@pytest.mark.parametrize(("updates", "points"), [(0, 0), (1, 1), (200, 200), (201, 100), (999, 199)])
def test_record_keeps_at_most_200_points_of_a_loss_curve_each_at_its_own_update(updates: int, points: int) -> None:
    losses = [1 / step for step in range(1, updates + 1)]
    short = in_short({"steps": updates, "losses": losses, "settings": {"lr": 1e-3}})
    assert (short.keys(), len(short["training"])) == ({"steps", "training"}, points)
    assert all(point["loss"] == 1 / point["step"] for point in short["training"])


@pytest.mark.parametrize("kind", ["entries that are none", "parts of another kind"])
def test_odd_history_still_grows_and_reports(kind, small, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = read_with(small, json.dumps(ODD[kind]))
    assert source.notes == ()
    ok(capsys, "grow", small, *to(48, 2))
    ok(capsys, "report")
