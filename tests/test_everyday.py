"""growkit as a user meets it: checkpoints of every published form, everyday mistakes, and the whole way through."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from pairs import published_scale, randomised, tiny
from PIL import Image
from safetensors.torch import load_file, save_file

from growkit.arch import detect, find, parse_sets
from growkit.checkpoint import read_checkpoint
from growkit.errors import GrowkitError
from growkit.grow import lossless_gap
from growkit.source import load_source
from growkit_cli import main as program

SOURCE = tiny(32, 2, 2)
TARGET = ["--to", "vit_tiny", "--set", "embed_dim=64", "--set", "depth=3", "--set", "num_heads=4"]
HEADS = ["--from-set", "num_heads=2"]


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return published_scale(SOURCE).state_dict()


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


def growkit(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run the program in this process: exit status, stdout, stderr."""
    before = sys.argv
    sys.argv = ["growkit", *map(str, arguments)]
    try:
        program.main()
        status = 0
    except SystemExit as left:
        status = int(left.code or 0)
    finally:
        sys.argv = before
    out, err = capsys.readouterr()
    return status, out, err


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# ---- checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", ["plain", "model", "state_dict", "module.", "_orig_mod.module.", "legacy", "safetensors"]
)
def test_every_published_form_loads_the_same_weights(form, state, tmp_path):
    path = tmp_path / ("deit.safetensors" if form == "safetensors" else "deit.pth")
    if form == "safetensors":
        save_file(state, path)
    elif form in ("model", "state_dict"):
        torch.save({form: state, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, path)
    elif form.endswith("."):
        torch.save({form + key: value for key, value in state.items()}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form != "legacy")
    loaded = read_checkpoint(path)
    assert set(loaded.state) == set(state)
    assert all(torch.equal(loaded.state[key], state[key]) for key in state)
    assert not loaded.notes


@pytest.mark.parametrize(("plain", "averaged"), [("model", "model_ema"), ("state_dict", "state_dict_ema")])
def test_averaged_weights_are_taken_and_said(plain, averaged, state, tmp_path):
    other = {key: value + 1 for key, value in state.items()}
    torch.save({plain: state, averaged: other, "args": argparse.Namespace()}, tmp_path / "c.pth")
    taken = read_checkpoint(tmp_path / "c.pth")
    assert torch.equal(taken.state["head.bias"], other["head.bias"])
    assert averaged in taken.notes[0]
    raw = read_checkpoint(tmp_path / "c.pth", ema=False)
    assert torch.equal(raw.state["head.bias"], state["head.bias"])
    assert "not" in raw.notes[0]


def test_half_precision_is_read_as_float32_and_said(state, tmp_path):
    torch.save({key: value.half() for key, value in state.items()}, tmp_path / "h.pth")
    loaded = read_checkpoint(tmp_path / "h.pth")
    assert loaded.state["head.bias"].dtype is torch.float32
    assert "float16" in loaded.notes[0]


class Bomb:
    """A pickle that would run a command when loaded."""

    def __init__(self, flag: Path):
        self.flag = flag

    def __reduce__(self):
        return os.system, (f"touch {self.flag}",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("beside_weights", [True, False])
def test_a_pickle_that_would_run_code_does_not(zipped, beside_weights, state, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flag = tmp_path / "it-ran"
    content = {"model": state, "extra": Bomb(flag)} if beside_weights else Bomb(flag)
    torch.save(content, "bomb.pth", _use_new_zipfile_serialization=zipped)
    status, _, err = growkit(capsys, "grow", "bomb.pth", *TARGET)
    assert status == 2
    assert err.count("\n") == 1
    assert "runs no code" in err
    assert not flag.exists()
    torch.load("bomb.pth", weights_only=False)  # the twin: it is a real bomb
    assert flag.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_one_line(suffix, share, state, tmp_path):
    path = tmp_path / f"cut{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(GrowkitError, match="not readable") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [{}, {"a": 1}, [1], {"head.weight": torch.ones(2, dtype=torch.int64)}, "text"])
def test_a_file_without_weights_says_so(content, tmp_path):
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(GrowkitError, match=r"state dict|floating-point|weights"):
        read_checkpoint(tmp_path / "c.pth")


def test_every_parameter_of_the_published_sizes_has_a_row():
    for name in ("deit_tiny", "deit_small", "deit_base", "vit_base", "vit_large"):
        architecture = find(name)
        layers = range(architecture.spaces["blocks"].size)
        covered = [
            row.key.format(l=layer) for row in architecture.tensors for layer in (layers if row.layered else [0])
        ]
        assert sorted(covered) == sorted(architecture.shapes)


def test_split_and_join_are_inverse(state):
    joined = SOURCE.join(SOURCE.split(state))
    assert set(joined) == set(state)
    assert all(torch.equal(joined[key], state[key]) for key in state)


def test_head_count_comes_from_name_then_from_then_64_wide_heads():
    shapes = {key: torch.empty(shape, device="meta") for key, shape in find("vit_small_patch16_224").shapes.items()}
    finite = {key: torch.zeros(value.shape) for key, value in shapes.items()}
    named, how = detect(finite, hint="vit_small_patch16_224-abc")
    assert (named.name, "file's name" in how) == ("vit_small_patch16_224", True)
    given, how = detect(finite, name="deit_small", sets=["num_heads=12"])
    assert (given.spaces["attn"].group, "--from" in how) == (32, True)
    assumed, how = detect(finite)
    assert (assumed.spaces["attn"].group, "64-wide heads assumed" in how) == (64, True)


def test_heads_that_cannot_be_told_are_asked_for(state):
    with pytest.raises(GrowkitError, match="--from-set num_heads"):
        detect(state)
    assert detect(state, sets=["num_heads=2"])[0].spaces == SOURCE.spaces


@pytest.mark.parametrize("more", [{"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}, {"qkv_bias": False}])
def test_detection_rebuilds_what_was_there(more):
    architecture = tiny(64, 2, 1, **more)
    found, _ = detect(randomised(architecture).state_dict())
    assert found.shapes == architecture.shapes


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda s: s.pop("blocks.1.norm2.bias"), "lacks blocks.1.norm2.bias"),
        (lambda s: s.update({"odd": torch.ones(1)}), "unknown odd"),
        (lambda s: s.update({"norm.bias": torch.ones(5)}), r"norm.bias has shape \(5,\), expected \(32,\)"),
        (lambda s: s["norm.bias"].fill_(float("nan")), "norm.bias holds values that are not finite"),
        (lambda s: s.update({"dist_token": torch.ones(1, 1, 32)}), "distilled"),
        (lambda s: s.pop("patch_embed.proj.weight"), "patch_embed.proj.weight"),
    ],
)
def test_wrong_tensors_are_named(damage, says, state):
    wrong = {key: value.clone() for key, value in state.items()}
    damage(wrong)
    with pytest.raises(GrowkitError, match=says):
        detect(wrong, sets=["num_heads=2"])


@pytest.mark.parametrize("wrong", ["depth", "dpth=3"])
def test_a_wrong_set_is_explained(wrong):
    with pytest.raises(GrowkitError, match=r"KEY=VALUE|nearest: depth"):
        parse_sets([wrong])


# ---- everyday mistakes -------------------------------------------------------------------------------------------

MISTAKES = {
    "no such file": (["grow", "nothing.pth", *TARGET], "nothing.pth: no such file"),
    "a folder that is no model": (["grow", "empty", *TARGET], "empty: no model folder"),
    "a truncated file": (["grow", "cut.pth", *TARGET], "cut.pth: not readable"),
    "missing tensors": (["grow", "missing.pth", *HEADS, *TARGET], "lacks norm.bias"),
    "misshapen tensors": (["grow", "misshapen.pth", *HEADS, *TARGET], "head.bias has shape"),
    "an unknown target": (["grow", "good", "--to", "deit_smal"], "nearest: deit_small"),
    "another family": (["grow", "good", "--to", "resnet50"], "plain VisionTransformer"),
    "an unknown method": (["grow", "good", *TARGET, "--method", "mngo"], "nearest: mango"),
    "a smaller target": (["grow", "good", *TARGET, "--set", "embed_dim=16", "--set", "num_heads=1"], "would shrink"),
    "another head size": (["grow", "good", *TARGET, "--set", "num_heads=1"], "head size 16 -> 64"),
    "rank 0": (["grow", "good", *TARGET, "--rank", "0"], "--rank 0"),
    "three ranks": (["grow", "good", *TARGET, "--ranks", "1,2,3"], "--ranks 1,2,3"),
    "an empty data folder": (["grow", "good", *TARGET, "--data", "empty"], "empty"),
    "an unknown device": (["grow", "good", *TARGET, "--device", "tpu"], "--device tpu"),
    "no model in the run": (["export", "--onnx"], "run holds no model"),
    "nothing to fine-tune": (["finetune", "--data", "empty"], "holds no grown model"),
    "no ONNX file": (["evaluate", "none.onnx", "--data", "empty"], "none.onnx: no such file"),
    "nothing to verify": (["verify", "good"], "growkit export"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_exit_2_and_nothing_written(mistake, state, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    torch.save(state, "whole.pth")
    Path("cut.pth").write_bytes(Path("whole.pth").read_bytes()[:20000])
    torch.save({k: v for k, v in state.items() if k != "norm.bias"}, "missing.pth")
    timm.models.save_for_hf(published_scale(SOURCE), "good", safe_serialization=True)
    torch.save({**state, "head.bias": torch.ones(3)}, "misshapen.pth")
    arguments, says = MISTAKES[mistake]
    before = listing(tmp_path)
    status, _, err = growkit(capsys, *arguments)
    assert status == 2
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    assert says in err
    assert listing(tmp_path) == before


def test_an_output_that_exists_is_refused_and_kept(state, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    timm.models.save_for_hf(published_scale(SOURCE), "small", safe_serialization=True)
    assert growkit(capsys, "grow", "small", *TARGET)[0] == 0
    made = Path("run/grown/model.safetensors").read_bytes()
    status, _, err = growkit(capsys, "grow", "small", *TARGET, "--seed", 1)
    assert (status, "--force" in err) == (2, True)
    assert Path("run/grown/model.safetensors").read_bytes() == made
    assert growkit(capsys, "grow", "small", *TARGET, "--seed", 1, "--force")[0] == 0
    assert Path("run/grown/model.safetensors").read_bytes() != made
    assert not [name for name in listing(tmp_path) if "partial" in name]


# ---- the whole way -----------------------------------------------------------------------------------------------


def test_grow_writes_what_timm_alone_loads_and_starts_where_the_source_stands(state, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    timm.models.save_for_hf(published_scale(SOURCE), "small", safe_serialization=True)
    status, out, _ = growkit(capsys, "grow", "small", *TARGET, "--rank", 4, "--seed", 7, "--json")
    assert status == 0
    told = json.loads(out)
    assert told["step0_gap"] <= 1e-5
    grown = timm.create_model("local-dir:run/grown", pretrained=True).eval()
    stored = load_file("run/grown/model.safetensors")
    assert all(torch.equal(value, stored[key]) for key, value in grown.state_dict().items())
    assert lossless_gap(load_source("small").model(), grown, seed=3) <= 1e-5
    history = json.loads(Path("run/grown/growkit.json").read_text())
    assert history["settings"]["seed"] == 7
    assert history["settings"]["method"] == "mango"
    assert len(history["source"]["sha256"]) == 64
    assert history["step0_gap"] == told["step0_gap"]
    assert "torch" in history["versions"]
    assert str(tmp_path) not in Path("run/grown/growkit.json").read_text()


QUICK = ["--workers", 0, "--batch-size", 8, "--scale-min", 0.8]


def test_the_whole_way_through_the_commands(images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> dict[str, object]:
        status, out, err = growkit(capsys, *arguments, "--json")
        assert status == 0, err
        return json.loads(out)

    sizes = ["--set", "embed_dim=32", "--set", "depth=2", "--set", "num_heads=2", "--set", "img_size=16"]
    trained = run(
        "train", "vit_tiny", *sizes, "--set", "patch_size=8", "--data", images, "--epochs", 4, "--lr", 2e-3, *QUICK
    )
    assert trained["best"]["top1"] > 0.5
    planned = run("plan", "run/trained", *TARGET)
    grown = run("grow", "run/trained", *TARGET, "--rank", 2, "--data", images, "--steps", 3, *QUICK)
    assert grown["scores"]["step0"] == pytest.approx(grown["scores"]["source"], abs=1e-5)
    assert len(grown["losses"]) == 3
    assert grown["parameters"] == planned["parameters"][1]
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
    names = [step["command"] for step in json.loads(Path("run/record.json").read_text())["steps"]]
    assert names == ["train", "grow", "finetune", "export", "verify"]

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


def wait_for_line(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} was never printed")


def test_a_killed_run_resumes_to_the_same_bits(images, tmp_path):
    timm.models.save_for_hf(published_scale(SOURCE), str(tmp_path / "small"), safe_serialization=True)
    settings = ["--data", images, "--epochs", 12, "--lr", 1e-3, "--log-every", 1, "--save-seconds", 0, *QUICK]
    unbroken = start(tmp_path, "finetune", "small", *settings, "--run", "a")
    killed = start(tmp_path, "finetune", "small", *settings, "--run", "b")
    wait_for_line(killed, "fine-tuning 24/72")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    resumed = start(tmp_path, "finetune", "small", *settings, "--run", "b", "--resume")
    out, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, out
    out, _ = unbroken.communicate(timeout=120)
    assert unbroken.returncode == 0, out
    for place in ("finetuned", "finetuned/last"):
        a, b = (load_file(tmp_path / run / place / "model.safetensors") for run in ("a", "b"))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_ctrl_c_keeps_what_was_learned(images, tmp_path):
    timm.models.save_for_hf(published_scale(SOURCE), str(tmp_path / "small"), safe_serialization=True)
    process = start(tmp_path, "grow", "small", *TARGET, "--data", images, "--steps", 4000, "--log-every", 1, *QUICK)
    wait_for_line(process, "training the operator")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in out
    history = json.loads((tmp_path / "run/grown/growkit.json").read_text())
    assert history["operator"]["interrupted"]
    assert 0 < history["operator"]["steps"] < 4000
    assert timm.create_model(f"local-dir:{tmp_path / 'run/grown'}", pretrained=True)
