"""The whole way through the commands on real image files, and a run that is killed on the way."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from pairs import published_scale, tiny
from PIL import Image
from program import growkit
from safetensors.torch import load_file

SOURCE = tiny(32, 2, 2)
TARGET = ["--to", "vit_tiny", "--set", "embed_dim=64", "--set", "depth=3", "--set", "num_heads=4"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 16 x 16 colours with noise: 16 training and 6 validation images each."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 6)):
        for label, colour in enumerate(((200, 40, 40), (40, 200, 40), (40, 40, 200))):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                noise = generator.integers(0, 55, (16, 16, 3)) + np.array(colour)
                Image.fromarray(noise.astype(np.uint8)).save(folder / f"{index}.png")
    return root


QUICK = ["--workers", 0, "--batch-size", 8, "--scale-min", 0.8]


def test_the_whole_way_through_the_commands(images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    typed = []

    def run(*arguments: object) -> dict[str, object]:
        typed.append(["growkit", *map(str, arguments), "--json"])
        status, out, err = growkit(capsys, *arguments, "--json")
        assert status == 0, err
        return json.loads(out)

    small = ["embed_dim=32", "depth=2", "num_heads=2", "img_size=16", "patch_size=8"]
    sets = [word for item in small for word in ("--set", item)]
    trained = run("train", "vit_tiny", *sets, "--data", images, "--epochs", 4, "--lr", 2e-3, *QUICK)
    assert trained["best"]["top1"] > 0.5
    planned = run("plan", "run/trained", *TARGET)
    grown = run("grow", "run/trained", *TARGET, "--rank", 2, "--data", images, "--steps", 3, *QUICK)
    assert grown["scores"]["step0"] == pytest.approx(grown["scores"]["source"], abs=1e-5)
    assert len(grown["losses"]) == 3
    assert grown["parameters"] == planned["parameters"][1]
    sizes = json.loads(Path("run/grown/growkit.json").read_text())["sizes"]
    assert [list(sizes[side].values())[:3] for side in ("source", "target")] == [[32, 2, 2], [64, 3, 4]]
    assert sizes["target"]["parameters"] == grown["parameters"]
    tuned = run("finetune", "--data", images, "--epochs", 1, *QUICK)
    assert tuned["steps"] == 6
    run("export", "--onnx")
    torch_scores = run("evaluate", "--data", images, "--workers", 0)
    onnx_scores = run("evaluate", "run/onnx/model.onnx", "--data", images, "--workers", 0)
    for name in ("top1", "top5", "loss", "ece"):
        assert onnx_scores[name] == pytest.approx(torch_scores[name], abs=1e-6)
    report = run("verify", "--data", images, "--no-latency", "--workers", 0, "--junit", "junit.xml")
    assert report["verdict"] == "pass"
    assert Path("junit.xml").exists()
    told = run("report")
    marks = {gate["name"]: gate["mark"] for gate in told["gates"]}
    del marks["It is at least as accurate as its source"]  # of so few images nobody can tell
    assert {name for name, mark in marks.items() if mark != "pass"} == {"It is as fast as its architecture allows"}
    assert told["verdict"]["mark"] == "not yet"  # nobody timed it
    steps = json.loads(Path("run/record.json").read_text())["steps"]
    assert steps[0]["options"]["set"] == small
    operator = next(step for step in steps if step["command"] == "grow")["options"]["operator"]
    assert (operator["steps"], operator["batch_size"], operator["lr"]) == (3, 8, 1e-4)
    assert "epochs" not in operator  # the steps replace them
    names = [step["command"] for step in steps]
    assert names == ["train", "grow", "finetune", "export", "verify"]
    recorded = [shlex.split(step["command_line"]) for step in steps]
    assert recorded == [words for words in typed if words[1] in names]

    whole = Path("run/onnx/model.onnx").read_bytes()
    weight = load_file("run/finetuned/model.safetensors")["blocks.0.mlp.fc1.bias"].numpy().tobytes()
    at = whole.index(weight)
    Path("run/onnx/model.onnx").write_bytes(whole[: at + 2] + bytes([whole[at + 2] ^ 1]) + whole[at + 3 :])
    status, _, _ = growkit(capsys, "verify", "--no-latency")
    assert status == 1


def start(cwd: Path, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "growkit_cli", *map(str, arguments)]
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'cli'}"}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for_updates(process: subprocess.Popen[str], metrics: Path, updates: int) -> None:
    while not metrics.exists() or len(metrics.read_text().splitlines()) < updates:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_a_killed_run_resumes_to_the_same_bits(images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    timm.models.save_for_hf(published_scale(SOURCE), "small", safe_serialization=True)
    settings = ["--data", images, "--epochs", 6, "--lr", 1e-3, "--log-every", 1, "--save-seconds", 0, *QUICK]
    killed = start(tmp_path, "finetune", "small", *settings, "--run", "b")
    wait_for_updates(killed, Path("b/finetuned/last/metrics.jsonl"), 12)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    for run, resumed in (("b", ["--resume"]), ("a", [])):
        status, _, err = growkit(capsys, "finetune", "small", *settings, "--run", run, *resumed)
        assert status == 0, err
    for place in ("finetuned", "finetuned/last"):
        a, b = (load_file(f"{run}/{place}/model.safetensors") for run in ("a", "b"))
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("size", ["8", "auto"])
def test_fixed_rule_with_data_is_scored_and_told_to_have_nothing_to_train(images, tmp_path, capsys, monkeypatch, size):
    monkeypatch.chdir(tmp_path)
    torch.save(published_scale(SOURCE).state_dict(), "small.pth")
    words = ["--from-set", "num_heads=2", "--data", images, *QUICK, "--batch-size", size]
    status, out, err = growkit(capsys, "grow", "small.pth", *TARGET, *words, "--method", "lemon", "--json")
    assert status == 0
    assert "lemon is a fixed rule with nothing to train" in err
    told = json.loads(out)
    assert told["losses"] is None
    assert set(told["scores"]) == {"source", "step0"}
    assert told["scores"]["source"]["top1"] == told["scores"]["step0"]["top1"]
    assert not Path("run/grown/operator.safetensors").exists()
    assert timm.create_model("local-dir:run/grown", pretrained=True).embed_dim == 64


def test_learned_rival_is_trained_and_kept(images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(published_scale(SOURCE).state_dict(), "small.pth")
    words = ["--from-set", "num_heads=2", "--data", images, *QUICK, "--steps", 3, "--lr", 1e-3]
    status, out, _ = growkit(capsys, "grow", "small.pth", *TARGET, *words, "--method", "ligo", "--json")
    assert status == 0
    told = json.loads(out)
    assert len(told["losses"]) == 3
    operator = load_file("run/grown/operator.safetensors")
    assert operator["embed"].shape == (64, 32)
    assert sum(t.numel() for t in operator.values()) == told["operator_parameters"]


def test_comparison_from_the_command_line_prints_json_alone(images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(published_scale(SOURCE).state_dict(), "small.pth")
    recipe = ["--epochs", 2, "--operator-steps", 1, "--operator-lrs", "1e-3", "--lrs", "1e-3", "--budgets", 1]
    words = ["--from-set", "num_heads=2", "--data", images, *QUICK, *recipe, "--evals", 2, "--hold-out", 0.25]
    chosen = ["--methods", "mango,lemon", "--controls", "none", "--seeds", 1]
    status, out, err = growkit(capsys, "compare", "small.pth", *TARGET, *words, *chosen, "--json")
    assert status == 0, err
    content = json.loads(out)
    assert [arm["name"] for arm in content["arms"]] == ["from scratch", "mango", "lemon"]
    assert content["command"].startswith("growkit compare small.pth --to vit_tiny")
    assert "[3/3] lemon, budget 100%, seed 0" in err
    text = Path("run/compare/results.md").read_text(encoding="utf-8")
    assert "| lemon |" in text
    status, _, err = growkit(capsys, "compare", "small.pth", *TARGET, *words, *chosen)
    assert status == 2
    assert "already exists" in err


def test_every_command_tells_how_far_it_is(images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("growkit_cli.console.QUICK", 0.0)  # else what is done in a second leaves no line

    def told(*arguments: object) -> set[str]:
        """What reached its end, as in 'training vit_tiny 3/3'."""
        status, out, err = growkit(capsys, *arguments, "--data", images)
        assert status == 0, err
        return {line for line in out.splitlines() if re.match(r".* (\d+)/\1\b", line)}

    def ends(lines: set[str], *expected: str) -> None:
        assert {text for text in expected if not any(line.startswith(text) for line in lines)} == set()

    sizes = ["--set", "embed_dim=32", "--set", "depth=2", "--set", "num_heads=2", "--set", "img_size=16"]
    words = ["--steps", 3, *QUICK]
    lines = told("train", "vit_tiny", *sizes, "--set", "patch_size=8", *words)
    ends(lines, "reading the validation images 18/18", "training vit_tiny 3/3 loss", "scoring the validation images 18")
    lines = told("grow", "run/trained", *TARGET, "--rank", 2, *words)
    ends(lines, "scoring the source 18/18", "scoring the grown model 18/18", "training the operator 3/3 loss")
    lines = told("finetune", *words)
    ends(lines, "scoring the start 18/18", "fine-tuning 3/3 loss", "scoring the validation images 18/18")
    ends(told("evaluate"), "evaluating 18/18")
    ends(told("evaluate", "--against", "run/trained"), "evaluating 18/18")
    cached = told(
        "train", "vit_tiny", *sizes, "--set", "patch_size=8", *words, "--cache=ram", "--color-jitter=0", "--force"
    )
    ends(cached, "decoding the training images 48/48", "decoding the validation images 18/18")
