"""The commands beyond the common way: exit statuses, --json, mistakes in every option and file, and signals."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from pairs import published_scale, tiny
from PIL import Image
from program import growkit
from safetensors.torch import load_file, save_file
from typer.main import get_command

from growkit import __version__, source
from growkit.errors import GrowkitError
from growkit.growing import grow_model
from growkit.job import Job
from growkit.record import RunFolder
from growkit.settings import OPERATOR_DEFAULTS, GrowSettings
from growkit.train.score import Scores
from growkit.train.settings import FitSettings
from growkit_cli.console import Console
from growkit_cli.main import app
from growkit_cli.progress import tell_trained

ROOT = Path(__file__).parents[1]
TO = ("--to", "vit_tiny", "--set", "embed_dim=64", "--set", "depth=3", "--set", "num_heads=4")
QUICK = ("--workers", "0", "--batch-size", "8", "--scale-min", "0.8")
GROW = ("grow", "small", *TO)
EXPORT = ("export", "--exporter", "torchscript")  # the faster one


def listing(folder: Path) -> dict[str, bytes | None]:
    """Every file with its content, every folder with None."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def write_images(root: Path, labels: tuple[str, ...], each: int) -> None:
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for index, label in enumerate(labels):
            (root / split / label).mkdir(parents=True)
            for number in range(each):
                pixels = generator.integers(0, 60, (16, 16, 3)) + 60 * index
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / label / f"{number}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model, images of 3 classes, and files broken in every way."""
    root = tmp_path_factory.mktemp("place")
    model = published_scale(tiny(32, 2, 2))
    config = {"architecture": "vit_tiny_patch16_224", "model_args": dict(tiny(32, 2, 2).arguments)}
    del config["model_args"]["num_classes"]
    timm.models.save_for_hf(model, str(root / "small"), model_config=config, safe_serialization=True)
    torch.save(model.state_dict(), root / "bare.pth")
    write_images(root / "images", ("cat", "dog", "elk"), 5)
    (root / "half.pth").write_bytes((root / "bare.pth").read_bytes()[:2000])
    with (root / "pickle.pth").open("wb") as stream:
        pickle.dump(model.state_dict(), stream)
    torch.save({**model.state_dict(), "bn1.num_batches_tracked": torch.tensor(3)}, root / "resnet.pth")
    (root / "lfs.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    (root / "text.onnx").write_text("no model\n")
    (root / "cut.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch")
    (root / "folder.onnx").mkdir()
    (root / "a-file").write_text("x")
    (root / "none").mkdir()
    (root / "[red]odd.pth").write_text("x")
    (root / "half" / "train" / "cat").mkdir(parents=True)
    for name, change in {
        "no-name": lambda c: c.pop("architecture"),
        "other-name": lambda c: c.update(architecture="vit_tinny"),
        "other-args": lambda c: c["model_args"].update(embed_dim=48),
        "odd-args": lambda c: c["model_args"].update(wings=2),
        "other-kind": lambda c: c.update(architecture="resnet18", model_args={}),
        "list-args": lambda c: c.update(model_args=[1]),
    }.items():
        (root / name).mkdir()
        changed = json.loads((root / "small" / "config.json").read_text())
        change(changed)
        (root / name / "config.json").write_text(json.dumps(changed))
        (root / name / "model.safetensors").write_bytes((root / "small" / "model.safetensors").read_bytes())
    shutil.copytree(root / "small", root / "a-run" / "trained")
    (root / "odd-stage").mkdir()
    (root / "odd-stage" / "verify").touch()
    (root / "odd-record").mkdir()
    (root / "odd-record" / "record.json").write_text("[]")
    return root


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place, stood in."""
    monkeypatch.chdir(place)
    return place


DATA = ("--data", "images")
SWIN = "swin_tiny_patch4_window7_224"
MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "checkpoint cut short": (("grow", "half.pth", *TO), "so the file was cut short; fetch it again"),
    "pickle of Python's own": (("grow", "pickle.pth", *TO), "holds more than weights"),
    "network with batch norms": (("grow", "resnet.pth", *TO), "resnet.pth: has batch norms (bn1.num_batches_tracked)"),
    "Git LFS pointer": (("grow", "lfs.pth", *TO), "neither a zip archive nor a pickle"),
    "name with markup": (("grow", "[red]odd.pth", *TO), "[red]odd.pth: not readable"),
    "bare checkpoint without heads": (("grow", "bare.pth", *TO), "--from-set num_heads=N"),
    "--from that does not fit": (("grow", "bare.pth", "--from", "deit_distilled_tiny", *TO), "unknown architecture"),
    "--from-set that does not fit": (
        ("grow", "bare.pth", "--from-set", "num_heads=2", "--from-set", "depth=3", *TO),
        "error: bare.pth: weights do not fit what they were taken for (a ViT of 2 layers, 32 wide, from its shapes, "
        "--from-set num_heads=2, --from-set depth=3): lacks blocks.2.norm1.weight",
    ),
    "--from-set unknown": (("grow", "bare.pth", "--from-set", "heads=2", *TO), "no argument 'heads'"),
    "--from of a folder": (("grow", "small", "--from", "vit_tiny", *TO), "for bare checkpoints"),
    "--from of a name": (("grow", "timm:deit_tiny_patch16_224", "--from", "vit_tiny", *TO), "for bare checkpoints"),
    "--set of other classes than the data's": (
        ("train", "vit_tiny", *DATA, "--set", "img_size=16", "--set", "patch_size=8", "--set", "num_classes=7"),
        "--set num_classes=7: the data has 3 classes; leave it out",
    ),
    "config without a name": (("grow", "no-name", *TO), "names no architecture"),
    "config of an unknown name": (("grow", "other-name", *TO), "other-name: unknown architecture 'vit_tinny'"),
    "config of other sizes": (("grow", "other-args", *TO), "other-args: weights do not fit"),
    "config with odd arguments": (("grow", "odd-args", *TO), "wings"),
    "config of another kind": (("grow", "other-kind", *TO), "other-kind: resnet18 is timm's ResNet"),
    "config with a list": (("grow", "list-args", *TO), "list-args"),
    "timm:NAME unknown": (("grow", "timm:deit_tinny", *TO), "nearest: "),
    "--set without value": (("grow", "small", *TO, "--set", "depth"), "expected KEY=VALUE"),
    "--set of no argument": (("grow", "small", *TO, "--set", "deph=3"), "nearest: depth"),
    "--from-set of heads that do not divide": (
        ("grow", "bare.pth", *TO, "--from-set", "num_heads=3"),
        "bare.pth: num_heads=3: embed_dim=32 is no multiple of it, but of num_heads=2",
    ),
    "--tf32 on a CPU": ((*GROW, *DATA, *QUICK, "--tf32", "--device", "cpu"), "--tf32: cpu does not multiply in TF32"),
    "--set close to nothing": (
        ("grow", "small", *TO, "--set", "zzz=3"),
        "no argument 'zzz'; nearest: embed_dim, depth",
    ),
    "--set of a word": (("grow", "small", *TO, "--set", "depth=deep"), "depth=deep"),
    "--set of a negative number": (("grow", "small", *TO, "--set", "depth=-1"), "depth"),
    "--set of a zero": (("grow", "small", *TO, "--set", "depth=0"), "with depth 0 has no layers"),
    "--set against the source": (("grow", "small", *TO, "--set", "class_token=False"), "growing keeps it"),
    "shallower target": (("grow", "small", *TO, "--set", "depth=1"), "blocks: 2 -> 1 would shrink"),
    "--method close to nothing": ((*GROW, "--method", "zzz"), "nearest: stackbert"),
    "--rank below zero": ((*GROW, "--rank", "-1"), "--rank -1"),
    "--ranks of words": ((*GROW, "--ranks", "a,b,c,d"), "--ranks a,b,c,d"),
    "--ranks with a zero": ((*GROW, "--ranks", "1,1,0,1"), "--ranks 1,1,0,1"),
    "--ring-order of other letters": ((*GROW, "--ring-order", "BOLX"), "BOLX"),
    "--noise below zero": ((*GROW, "--noise", "-1"), "--noise -1"),
    "--device that is none": ((*GROW, "--device", "gpu"), "--device gpu"),
    "--device that holds no numbers": ((*GROW, "--device", "meta"), "--device meta: expected auto, cpu, cuda or"),
    "--data of nothing": ((*GROW, "--data", "nowhere"), "nowhere"),
    "--data of a file": ((*GROW, "--data", "a-file"), "a-file"),
    "--data with one split": ((*GROW, "--data", "half"), "half"),
    "--batch-size 0": ((*GROW, *DATA, "--batch-size", "0"), "--batch-size 0"),
    "--batch-size auto of compare": (("compare", "small", *TO, *DATA, "--batch-size", "-1"), "give a number here"),
    "--compile auto of compare": (("compare", "small", *TO, *DATA, "--compile", "auto", *QUICK), "name the mode here"),
    "--aa unknown": (("finetune", "small", *DATA, "--aa", "nonsense"), "--aa nonsense: no policy that timm knows"),
    "--opt unknown to compare": (("compare", "small", *TO, *DATA, "--opt", "adamm", *QUICK), "--opt adamm"),
    "--opt unknown to sweep": (("sweep", "small", *TO, *DATA, "--opt", "adamm", *QUICK), "--opt adamm"),
    "--opt unknown to a rule": (
        (*GROW, "--method", "lemon", *DATA, "--batch-size", "auto", "--opt", "adamm"),
        "nearest: adam, ",
    ),
    "--opt of second order": (("finetune", "small", *DATA, "--opt", "adahessian"), "--opt adahessian: it asks for"),
    "--compile unknown": (("finetune", "small", *DATA, "--compile", "fast"), "--compile fast: unknown; choose default"),
    "--cache unknown": (("finetune", "small", *DATA, "--cache", "disk"), "--cache disk: unknown; choose none"),
    "--steps 0": ((*GROW, *DATA, "--steps", "0"), "--steps 0"),
    "--lr 0": (("finetune", "small", *DATA, "--lr", "0"), "--lr 0"),
    "--opt unknown": (("finetune", "small", *DATA, "--opt", "adamm", *QUICK), "nearest: adam, "),
    "--opt like none": (
        ("finetune", "small", *DATA, "--opt", "?", *QUICK),
        "give adamw, sgd, lamb or another of timm's",
    ),
    "--sched unknown": (("finetune", "small", *DATA, "--sched", "step"), "--sched step"),
    "--precision unknown": (("finetune", "small", *DATA, "--precision", "fp8"), "--precision fp8"),
    "finetune without a model": (("finetune", *DATA), "growkit grow"),
    "finetune of nothing": (("finetune", "nowhere", *DATA), "nowhere: no such file"),
    "a name for its weights": (
        ("plan", "deit_small", *TO),
        "deit_small: no such file or folder; timm:deit_small_patch16_224 fetches the weights that timm publishes",
    ),
    "a file for its weights": (("plan", "deit_small.pth", *TO), "; timm:deit_small_patch16_224 fetches"),
    "a file for weights of a tag": (("plan", "vit_base_patch16_224.mae.pth", *TO), "; timm:vit_base_patch16_224.mae f"),
    "train of no architecture": (("train", "vit_tinny", *DATA), "nearest: vit_tiny"),
    "train on images below a patch": (
        ("train", "vit_tiny", *DATA, "--set", "img_size=8"),
        "images 8 wide hold no patch of 16; choose --set img_size=16 or more",
    ),
    "a run folder for its model": (
        ("plan", "a-run", *TO),
        "a-run: no model folder; give a-run/trained, the model in it",
    ),
    "train of another kind": (("train", "resnet18", *DATA), "resnet18"),
    **{
        f"{words[0]} of another kind's arguments": ((*words, "--set", "window_size=4"), "is timm's SwinTransformer")
        for words in (
            ("train", SWIN, *DATA),
            ("grow", "small", "--to", SWIN),
            ("plan", "small", "--to", SWIN),
            ("compare", "small", "--to", SWIN, *DATA),
        )
    },
    "export without a model": (("export", "--onnx"), "holds no model yet"),
    "verify without a model": (("verify",), "holds no model yet"),
    "verify of no file": (("verify", "small", "--onnx-file", "nowhere.onnx"), "nowhere.onnx: no such file"),
    "verify of a folder": (("verify", "small", "--onnx-file", "images"), "images: a folder; give the file in it"),
    "evaluate without a model": (("evaluate", *DATA), "holds no model yet"),
    "evaluate of no ONNX file": (("evaluate", "nowhere.onnx", *DATA), "nowhere.onnx: no such file"),
    "evaluate of text": (("evaluate", "text.onnx", *DATA), "text.onnx"),
    "evaluate of a cut ONNX file": (("evaluate", "cut.onnx", *DATA), "cut.onnx"),
    "evaluate of a folder named .onnx": (("evaluate", "folder.onnx", *DATA), "folder.onnx"),
    "plan of a smaller target": (("plan", "small", *TO, "--set", "depth=1"), "would shrink"),
    "plan of no batch": (("plan", "small", *TO, "--batch-size", "0"), "--batch-size 0"),
    "plan of no updates": (("plan", "small", *TO, "--steps", "0"), "--steps 0"),
    "--variant of no method": ((*GROW, "--variant", "aki"), "--variant aki: not a variant of mango"),
    "--stages of none": ((*GROW, "--stages", "depth"), "--stages depth: unknown; choose both"),
    "--cache with --aa": (("finetune", "small", *DATA, "--cache", "ram", "--aa", "rand-m9", *QUICK), "leave out --aa"),
    "export of more answers than classes": (
        ("export", "small", "--output", "top-8"),
        "--output top-8: the model has 7 classes; choose top-7 or fewer",
    ),
    "export of a number of answers that has no end": (
        ("export", "small", "--output", "top-" + 5000 * "9"),
        "choose logits, probabilities or top-K",
    ),
    "export of a Triton repository into what exports replace": (
        ("export", "small", "--triton", "run/onnx/models"),
        "run/onnx is replaced whole by the next export; name one outside it",
    ),
    "verify of a ratio that is not timed": (
        ("verify", "small", "--max-latency-ratio", "1", "--no-latency"),
        "--max-latency-ratio is judged by timing: leave out --no-latency",
    ),
    "compare of no seeds": (("compare", "small", *TO, *DATA, "--seeds", "0"), "--seeds 0"),
    "compare of no method": (("compare", "small", *TO, *DATA, "--methods", "mangoo"), "nearest: mango"),
    "compare of a rate that is none": (
        ("compare", "small", *TO, *DATA, "--methods", "mango:lr=nan"),
        "--methods mango:lr=nan: lr nan: expected more than 0",
    ),
    "compare of a method that cannot": (("compare", "small", *TO, *DATA, "--methods", "llama-pro"), "methods that can"),
    "compare of a budget that the operator eats": (
        ("compare", "small", *TO, *DATA, "--epochs", "9", "--batch-size", "8", "--budgets", "1", "--methods", "ligo"),
        "ligo: its operator takes",
    ),
    "compare of a budget below one update": (
        ("compare", "small", *TO, *DATA, "--epochs", "1", "--batch-size", "8", "--methods", "ligo"),
        "from scratch: a budget of",
    ),
    "compare without a target": (("compare", "small", "--to", "vit_tinny", *DATA), "nearest: vit_tiny"),
    "sweep of no trials": (("sweep", "small", *TO, *DATA, "--trials", "0"), "--trials 0"),
    "sweep of no rank": (("sweep", "small", *TO, *DATA, "--rank-choices", "0"), "--rank-choices 0"),
    "sweep of a lowest rate above others": (
        ("sweep", "small", *TO, *DATA, "--lrs", "1e-3", "--min-lr", "1e-2"),
        "--min-lr 0.01: expected at most the learning rate, 0.001",
    ),
    "compare of a decay that turns signs": (
        ("compare", "small", *TO, *DATA, "--lrs", "1e-3,2", "--weight-decay", "0.5"),
        "--weight-decay 0.5 at a learning rate of 2.0 turns the sign",
    ),
    "report into a model": (("report", "-o", "small/model.safetensors"), "it is there, and no .html file"),
    "JUnit into a model": (
        ("verify", "small", "--junit", "small/model.safetensors"),
        "it is there, and no .xml file",
    ),
    "a file's contents for its name": (("evaluate", "x" * 5000, *DATA), "xxx ... xxx"),
    "--run that is a file": ((*GROW, "--run", "a-file"), "a-file"),
    "--run of finetune that is a file": (("finetune", "small", *DATA, "--run", "a-file"), "a-file is a file"),
    "--run with a file for a folder": (
        ("grow", "small", *TO, "--run", "odd-stage"),
        "odd-stage/verify is a file where",
    ),
    "record that is none": ((*GROW, "--run", "odd-record"), "holds no list of steps"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_line_and_exit_2_and_nothing_is_written(
    mistake: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, said = MISTAKES[mistake]
    before = listing(here)
    status, _, err = growkit(capsys, *arguments)
    assert status == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert err == line + "\n"
    assert said in line
    assert listing(here) == before


@pytest.mark.parametrize(
    "words",
    [("--tf32", "--device", "cpu"), ("--min-lr", "1"), ("--opt", "adamm"), ("--weight-decay", "1", "--lr", "1")],
)
def test_settings_of_operator_training_are_refused_before_growing(
    words: tuple[str, ...], here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("growkit.growing.grow", lambda *_: pytest.fail("growing a large model takes half a minute"))
    before = listing(here)
    status, _, err = growkit(capsys, *GROW, *DATA, *words)
    assert status == 2
    assert err.startswith(f"error: {words[0]}")
    assert listing(here) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the CUDA device that must be missing here")
@pytest.mark.parametrize("arguments", [GROW, ("finetune", "small", *DATA), ("evaluate", "small", *DATA)])
def test_cuda_on_a_machine_without_it_is_refused_with_the_remedy(
    arguments: tuple[str, ...], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(here)
    status, _, err = growkit(capsys, *arguments, "--device", "cuda")
    assert status == 2
    assert err == "error: --device cuda: torch sees 0 CUDA devices here; --device cpu works\n"
    assert listing(here) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("grow",),
        ("grow", "small"),
        ("grwo", "small"),
        (*GROW, "--rank", "two"),
        (*GROW, "--depth", "3"),
        (*GROW, "--batch-size", "large"),
        (*GROW, "--batch-size", "-1"),
        (*GROW, "--run", ""),
        (),
    ],
)
def test_bad_usage_exits_2_and_writes_nothing(
    arguments: tuple[str, ...], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(here)
    status, out, err = growkit(capsys, *arguments)
    assert status == 2
    assert "Usage" in out + err
    assert "Traceback" not in err
    assert listing(here) == before


@pytest.mark.parametrize("arguments", [("--version",), ("--version", "grow"), ("--debug", "--version")])
def test_version_is_printed_without_a_command(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert growkit(capsys, *arguments) == (0, f"{__version__}\n", "")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("unable to mmap 4096 bytes from file <model.pth>: Cannot allocate memory (12)"),
        RuntimeError("Resource temporarily unavailable"),  # a thread cannot begin
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    ],
)
def test_memory_that_is_used_up_is_one_line(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*arguments: object, **given: object) -> None:
        raise error

    monkeypatch.setattr("growkit.source.load_source", read)
    status, _, err = growkit(capsys, "plan", "small.pth", *TO)
    assert status == 2
    assert err == "error: memory is used up; take smaller batches, images or models, or a machine with more\n"
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")  # any other is a fault of growkit's
    with pytest.raises(RuntimeError, match="mat1"):
        growkit(capsys, "plan", "small.pth", *TO)


def test_debug_lets_the_error_through_with_its_traceback(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(GrowkitError, match=r"nowhere\.pth: no such file or folder"):
        growkit(capsys, "--debug", "grow", "nowhere.pth", *TO)


@pytest.mark.parametrize("command", [GROW, ("plan", "small", *TO)])
def test_json_is_the_one_thing_on_stdout_and_people_read_stderr(
    command: tuple[str, ...],
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("growkit.plan.RANKS", (1,))
    here = ("--run", tmp_path / "run") if command[0] == "grow" else ()
    status, out, err = growkit(capsys, *command, *here, "--json")
    assert status == 0
    content = json.loads(out)  # fails on anything beside one object
    assert isinstance(content, dict)
    assert "target" in content
    assert "vit_tiny_patch16_224" in err
    status, people, err = growkit(capsys, *command, *here, *(("--force",) if here else ()))
    assert (status, err) == (0, "")
    assert "vit_tiny_patch16_224" in people


@pytest.mark.parametrize("command", [("grow", "nowhere.pth", *TO), ("plan", "nowhere.pth", *TO)])
def test_json_of_a_mistake_leaves_stdout_empty(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = growkit(capsys, *command, "--json")
    assert (status, out) == (2, "")
    assert err.startswith("error: nowhere.pth")


def test_counts_of_processes_mean_nothing_without_torchrun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "")
    status, out, err = growkit(capsys, "grow", tmp_path / "nowhere.pth", *TO, "--run", tmp_path / "run")
    assert (status, out, "Traceback" in err) == (2, "", False)
    assert "nowhere.pth" in err


def test_one_process_of_torchrun_runs_every_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert growkit(capsys, "plan", "nowhere.pth", *TO)[2] == "error: nowhere.pth: no such file or folder\n"


@pytest.mark.usefixtures("here")
def test_grow_says_which_options_mean_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quiet = (*GROW, "--method", "lemon", "--run", tmp_path, "--force")
    told = {"": (), "--rank means nothing to lemon\n": ("--rank", "4"), "mean nothing without --data": ("--steps", "5")}
    for line, given in told.items():
        status, out, err = growkit(capsys, *quiet, *given)
        assert status == 0, err
        assert line in out
        assert out.count("nothing") == len(given) // 2
    for given in (("--rank", "4"), ("--set", "num_classes=3")):  # no scores that a new head could spoil
        status, out, _ = growkit(capsys, *GROW, *given, "--run", tmp_path, "--force")
        assert (status, "nothing" in out) == (0, False)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("depth", "said"), [("2", True), ("3", False)])
def test_grow_to_the_sources_sizes_says_that_nothing_grows(
    depth: str, said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = [word for item in ("embed_dim=32", "num_heads=2", f"depth={depth}") for word in ("--set", item)]
    status, out, err = growkit(capsys, "grow", "small", "--to", "vit_tiny", *sizes, "--run", tmp_path)
    assert status == 0, err
    assert ("target has the source's sizes, so nothing grows; choose others by --to or --set\n" in out) == said


def test_grow_records_what_made_the_model(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, _ = growkit(
        capsys, "grow", "bare.pth", "--from-set", "num_heads=2", *TO, "--rank", "3", "--seed", "7", "--run", tmp_path
    )
    assert status == 0
    history = json.loads((tmp_path / "grown" / "growkit.json").read_text())
    assert history["source"]["name"] == "bare.pth"
    assert history["source"]["sha256"] == sha256(here / "bare.pth")
    assert history["source"]["arguments"]["num_heads"] == 2
    assert (history["settings"]["method"], history["settings"]["rank"], history["settings"]["seed"]) == ("mango", 3, 7)
    assert {"torch", "timm", "python"} <= set(history["versions"])
    assert history["growkit"] == __version__
    assert 0 <= history["step0_gap"] <= 1e-5
    assert history["weights_sha256"] == sha256(tmp_path / "grown" / "model.safetensors")
    (step,) = json.loads((tmp_path / "record.json").read_text())["steps"]
    assert step["hashes"] == {"source": history["source"]["sha256"], "grown": history["weights_sha256"]}
    assert (step["options"]["seed"], step["options"]["rank"]) == (7, 3)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (
            "auto",
            "--batch-size {eights} is the largest for {images} training images, so that the run is of 1 update;"
            " --lr 0.0001 is not scaled",
        ),
        ("1000", "--batch-size 1000: there are {images} training images, and a batch takes them all"),
    ],
)
def test_batch_size_that_is_not_as_asked_is_said_and_recorded(
    asked: str,
    told: str,
    here: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--batch-size", asked, "--steps", "1", "--workers", "0", "--run", tmp_path)
    status, out, _ = growkit(capsys, "finetune", "small", *DATA, *options)
    assert status == 0
    images = len(list((here / DATA[1] / "train").rglob("*.png")))
    eights = images // 8 * 8
    assert told.format(images=images, eights=eights) in out
    (step,) = json.loads((tmp_path / "record.json").read_text())["steps"]
    assert step["options"]["batch_size"] == (eights if asked == "auto" else 1000)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("--batch-size", "4", "--grad-accum-steps", "9"),
            "the run is of 1 update of 36 images, 3 epochs; a lower --g",
        ),
        (
            ("--batch-size", "4", "--epochs", "0.1"),
            "--epochs 0.1: the run is of 1 update of 4 images, 0.333 epochs; a lower --b",
        ),
        (
            ("--batch-size", "4", "--grad-accum-steps", "2"),
            "the run is of 2 updates of 8 images, 1.33 epochs; a lower --g",
        ),
        (
            ("--batch-size", "4", "--grad-accum-steps", "4", "--epochs", "1.9"),
            "the run is of 1 update of 16 images, 1.33 epo",
        ),
        (("--batch-size", "4", "--grad-accum-steps", "2", "--epochs", "3"), None),  # 2.67
        (("--batch-size", "4", "--grad-accum-steps", "3"), None),
        (("--batch-size", "4", "--grad-accum-steps", "9", "--steps", "1"), None),
    ],
)
def test_run_of_other_epochs_than_asked_for_is_told(
    words: tuple[str, ...], told: str | None, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = growkit(
        capsys, "finetune", "small", *DATA, "--epochs", "1", *words, "--workers", "0", "--run", tmp_path
    )
    assert status == 0
    assert told in out if told else "the run is of" not in out


def test_batch_that_memory_bounds_is_said_to_be_the_largest_that_fits(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("growkit.stage.with_batch_size", lambda *given: replace(given[2], batch_size=4))
    options = ("--batch-size", "auto", "--steps", "1", "--workers", "0", "--run", tmp_path)
    status, out, _ = growkit(capsys, "finetune", "small", *DATA, *options)
    assert (status, "--batch-size 4 is the largest that fits cpu; --lr 0.0001 is not scaled" in out) == (0, True)


@pytest.mark.parametrize("command", [("finetune", "small"), GROW])
@pytest.mark.parametrize(
    ("option", "seeks", "told", "value"),
    [
        ("batch-size", "batch_size.free_bytes", "--batch-size 8 is what the run was started with", 8),
        ("compile", "compiling._stopwatch", "--compile auto: not compiled, as the run was started", None),
    ],
)
def test_what_is_automatic_is_found_once_for_a_run(
    option: str,
    seeks: str,
    told: str,
    value: object,
    command: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    stopped: Callable[..., tuple[str, ...]],
) -> None:
    words = stopped(*command, f"--{option}", "auto")
    monkeypatch.setattr(f"growkit.train.{seeks}", lambda *_: pytest.fail("sought again"))
    status, out, err = growkit(capsys, *words, "--resume")
    assert status == 0, err
    assert told in out
    *_, step = json.loads((tmp_path / "record.json").read_text())["steps"]
    assert (step["options"].get("operator") or step["options"])[option.replace("-", "_")] == value


@pytest.mark.parametrize(("given", "kept"), [("default", "default"), ("auto", None)])
def test_compiling_means_nothing_to_a_rule_and_is_recorded_as_given(
    given: str, kept: str | None, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--method", "lemon", *DATA, "--compile", given, "--workers", "0", "--run", tmp_path)
    assert growkit(capsys, *GROW, *words)[0] == 0
    (step,) = json.loads((tmp_path / "record.json").read_text())["steps"]
    assert step["options"]["operator"]["compile"] == kept


def test_mistakes_are_told_before_compiling_is_tried(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("growkit.stage.with_compile", lambda *_: pytest.fail("tried"))
    words = ("--opt", "adamm", "--compile", "auto", "--workers", "0", "--run", tmp_path)
    status, _, err = growkit(capsys, "finetune", "small", *DATA, *words)
    assert (status, "nearest: adam" in err) == (2, True)


GOES_ON = "already exists; --resume goes on with it, --force replaces it, --run writes elsewhere"


def test_stopped_run_is_never_begun_anew_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stopped: Callable[..., tuple[str, ...]]
) -> None:
    words = stopped("finetune", "small")
    before = listing(tmp_path)
    status, _, err = growkit(capsys, *words)
    assert (status, listing(tmp_path)) == (2, before)
    assert f"finetuned {GOES_ON}" in err
    assert growkit(capsys, *words, "--resume")[0] == 0


def test_resumed_fine_tuning_still_tells_where_it_started_and_no_folder_of_the_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stopped: Callable[..., tuple[str, ...]]
) -> None:
    words = stopped("finetune", "small", "--data-dir", "clients/acme")
    scored = tmp_path / "finetuned" / "last" / "start.json"
    kept = json.loads(scored.read_text())
    assert growkit(capsys, *words, "--resume")[0] == 0
    for told in (tmp_path / "finetuned", tmp_path / "finetuned" / "last"):
        history = (told / "growkit.json").read_text()
        assert json.loads(history)["fit"]["start"] == kept
        assert "acme" not in history
    *_, step = json.loads((tmp_path / "record.json").read_text())["steps"]
    assert (step["figures"]["start"], step["options"]["data_dir"]) == (kept, "clients/acme")
    for damaged in ("[]", '{"top1": "a", "top5": 0, "loss": 1, "ece": 0, "count": 3}'):
        scored.write_text(damaged)  # what only tells is in nobody's way
        assert growkit(capsys, *words, "--resume")[0] == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--method", "mangoo"), "unknown method 'mangoo'"),
        (("--variant", "foo"), "--variant foo: not a variant"),
        (("--set", "dept=3"), "dept"),
        (("--rank", "4"), "already exists"),
    ],
)
@pytest.mark.usefixtures("here")
def test_mistyped_word_is_told_before_what_lies_there(
    words: tuple[str, ...],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert growkit(capsys, *GROW, "--run", tmp_path)[0] == 0
    status, _, err = growkit(capsys, *GROW, *words, "--run", tmp_path)
    assert (status, err.count("\n")) == (2, 1)
    assert says in err


@pytest.mark.parametrize("command", [("finetune", "small", *DATA), (*GROW, *DATA), ("train", "vit_tiny", *DATA)])
@pytest.mark.usefixtures("here")
def test_going_on_and_beginning_anew_are_not_asked_for_at_once(
    command: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, _, err = growkit(capsys, *command, "--run", tmp_path, "--resume", "--force")
    assert (status, "--resume goes on with a run and --force begins it anew: give one of them" in err) == (2, True)


@pytest.mark.usefixtures("here")
def test_onnx_file_where_a_model_is_wanted_is_told_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (("grow", "text.onnx", *TO), ("finetune", "text.onnx", *DATA), ("export", "text.onnx")):
        status, _, err = growkit(capsys, *command, "--run", tmp_path)
        assert (status, "text.onnx: an ONNX file is not read back into a model; give the folder" in err) == (2, True)


@pytest.mark.usefixtures("here")
def test_fine_tuning_anew_says_that_the_export_is_of_an_earlier_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("finetune", "small", *DATA, "--steps", "1", "--workers", "0", "--run", tmp_path)
    out = growkit(capsys, *words)[1]
    assert "was made of an earlier model" not in out
    assert growkit(capsys, *EXPORT, "--run", tmp_path)[0] == 0
    assert "was made of an earlier model" not in growkit(capsys, *words, "--resume")[1]
    assert "was made of an earlier model" not in growkit(capsys, *GROW, "--run", tmp_path)[1]  # which is not exported
    out = growkit(capsys, *words, "--force", "--lr", "3e-3")[1]
    assert f"warning: {tmp_path / 'onnx'} was made of an earlier model; `growkit export --force` makes it anew" in out
    shutil.rmtree(tmp_path / "finetuned")
    assert "was made of an earlier model" in growkit(capsys, *GROW, "--run", tmp_path, "--force")[1]


def test_operators_that_python_trains_have_the_commands_defaults(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[FitSettings] = []

    def opened(data: str, prepared: object, settings: FitSettings, **_: object) -> None:
        asked.append(settings)
        raise GrowkitError("enough")

    monkeypatch.setattr("growkit.growing.open_data", opened)
    run, small = RunFolder(tmp_path / "run"), source.load_source(place / "small")
    with pytest.raises(GrowkitError, match="enough"):
        grow_model(Job(run), small, "vit_tiny", GrowSettings(seed=3), sets=TO[3::2], data=str(place / "images"))
    assert asked == [FitSettings(**OPERATOR_DEFAULTS, seed=3)]


def test_growing_tells_how_far_it_is(place: Path, tmp_path: Path) -> None:
    told: list[tuple[str, float, int]] = []

    def tell(what: str) -> Callable[..., None]:
        return lambda done, total, note="": told.append((what, done, total))

    small = source.load_source(place / "small")
    grow_model(Job(RunFolder(tmp_path), tell=tell), small, "vit_tiny", GrowSettings(), sets=TO[3::2])
    assert told == [("growing", done, 3) for done in range(4)]


def test_random_weights_are_made_once_to_train_from_scratch(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second network, for what it takes of images, would lie in memory until training ends."""
    monkeypatch.chdir(place)
    made: list[object] = []
    untrained = source.untrained
    monkeypatch.setattr(source, "untrained", lambda *given, **more: made.append(given) or untrained(*given, **more))
    small = ("--set", "embed_dim=32", "--set", "depth=1", "--set", "num_heads=2", "--set", "img_size=32")
    status, _, err = growkit(capsys, "train", "vit_tiny", *small, *DATA, *QUICK, "--steps", "1", "--run", tmp_path)
    assert (status, len(made)) == (0, 1), err


@pytest.mark.parametrize(
    ("words", "sizes", "drawn"),
    [
        (("train", "vit_tiny"), ("embed_dim=32", "depth=1", "img_size=16", "num_heads=2"), "blocks.0.attn.qkv.weight"),
        (("finetune", "small"), (), "head.weight"),  # of other classes than the data's
        (("grow", "small", "--to", "vit_tiny"), ("embed_dim=32", "depth=3", "num_heads=2"), "head.weight"),
    ],
)
@pytest.mark.usefixtures("here")
def test_what_begins_at_random_is_drawn_by_the_seed(
    words: tuple[str, ...], sizes: tuple[str, ...], drawn: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for seed in ("1", "2"):
        sets = (word for size in sizes for word in ("--set", size))
        still = ("--steps", "1", "--lr", "1e-9", "--seed", seed, "--run", tmp_path / seed)
        status, _, err = growkit(capsys, *words, *sets, *DATA, *QUICK, *still)
        assert status == 0, err
        (written,) = (tmp_path / seed).glob("*/model.safetensors")
        found.append(load_file(written)[drawn])
    assert not torch.allclose(*found, atol=1e-3)


def test_operator_whose_training_was_killed_is_never_begun_anew_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stopped: Callable[..., tuple[str, ...]]
) -> None:
    words = stopped(*GROW)
    shutil.rmtree(tmp_path / "grown")  # as where it was killed
    before = listing(tmp_path)
    status, _, err = growkit(capsys, *words)
    assert (status, listing(tmp_path)) == (2, before)
    assert f"operator {GOES_ON}" in err
    sizes = " ".join(TO[3::2])
    for option, was, now in (
        ("--rank", "1", "3"),
        ("--seed", "0", "1"),
        ("--to", "vit_tiny_patch16_224", "deit_tiny_patch16_224"),
        ("--set", sizes, f"{sizes} drop_path_rate=0.5"),  # of the same shapes
    ):
        status, _, err = growkit(capsys, *words, option, now.split()[-1], "--resume")
        assert (status, listing(tmp_path)) == (2, before)
        assert f"the run was started with {option} {was}, not {now}: give the same" in err
    assert growkit(capsys, *words, "--resume")[0] == 0


def test_stages_that_do_not_follow_from_each_other_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stopped: Callable[..., tuple[str, ...]]
) -> None:
    words = stopped(*GROW)
    tune = ("finetune", *DATA, "--steps", "1", "--workers", "0", "--run", tmp_path)
    status, out, _ = growkit(capsys, *tune)
    assert (status, "was stopped; `growkit grow --resume` goes on with it" in out) == (0, True)
    told = "finetuned was not made of this grown model; "
    status, out, _ = growkit(capsys, *words, "--resume")
    assert (status, told in out) == (0, True)
    status, out, _ = growkit(capsys, *tune, "--force")
    assert (status, "was stopped" in out) == (0, False)
    status, out, _ = growkit(capsys, *words, "--resume")  # to the same weights, as a job that is begun again does
    assert (status, told in out) == (0, False)


@pytest.mark.parametrize("left", [(), ("metrics.jsonl",), ("start.json",)])
@pytest.mark.usefixtures("here")
def test_what_a_run_leaves_that_was_killed_before_it_saved_anything_is_in_nobodys_way(
    left: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("finetune", "small", *DATA, "--steps", "1", "--workers", "0", "--run", tmp_path)
    last = tmp_path / "finetuned" / "last"
    last.mkdir(parents=True)
    for name in left:
        (last / name).write_text("{}\n")
    (last.parent / "notes.txt").write_text("mine")
    status, _, err = growkit(capsys, *words)
    assert (status, (last.parent / "notes.txt").read_text()) == (2, "mine")
    assert "already exists; --force" in err
    (last.parent / "notes.txt").unlink()
    assert growkit(capsys, *words)[0] == 0


@pytest.mark.parametrize(
    ("words", "stage", "entry"),
    [
        (GROW, "grown", "NOTES.md"),
        ((*GROW, *DATA, "--resume"), "grown", "NOTES.md"),
        (("export", "small"), "onnx", "NOTES.md"),
        (("export", "small"), "onnx", "model.safetensors"),  # a model's own folder, named by --out
        (("compare", *GROW[1:], *DATA), "compare", "runs/mango/thoughts.txt"),
    ],
)
def test_force_never_loses_what_growkit_did_not_write(
    words: tuple[str, ...],
    stage: str,
    entry: str,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place)
    mark = {"grown": "model.safetensors", "onnx": "export.json", "compare": "begun.json"}[stage]
    for name in (mark, entry):
        (tmp_path / stage / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / stage / name).write_text("mine")
    before = listing(tmp_path)
    force = () if "--resume" in words else ("--force",)
    status, _, err = growkit(capsys, *words, "--run", tmp_path, *force)
    assert (status, listing(tmp_path)) == (2, before)
    assert f"{entry} in it, which growkit did not write, would be lost; name another folder" in err


def test_export_replaces_nothing_that_another_wrote_meanwhile(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_export(model: object, folder: Path, *_: object, **__: object) -> SimpleNamespace:
        (folder / "model.onnx").write_text("ours")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "model.onnx").write_text("theirs")
        return SimpleNamespace(parity=SimpleNamespace(passed=True))

    monkeypatch.chdir(place)
    monkeypatch.setattr("growkit.exporting.write_export", write_export)
    status, _, err = growkit(capsys, "export", "small", "--out", tmp_path / "out", "--run", tmp_path / "run")
    assert (status, "out was written by another command meanwhile; --force replaces it" in err) == (2, True)
    assert listing(tmp_path) == {"out": None, "out/model.onnx": b"theirs"}


def test_training_that_does_harm_is_said(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    interrupted_at: Callable[[int], None],
) -> None:
    monkeypatch.chdir(place)
    found = iter((0.9, 0.5))
    for module in ("growing", "fitting"):
        monkeypatch.setattr(f"growkit.{module}.score_model", lambda *_, **__: Scores(next(found), 1.0, 1.0, 0.0, 15))
    words = ("finetune", "small", *DATA, "--steps", "1", "--workers", "0", "--run", tmp_path)
    status, out, _ = growkit(capsys, *words)
    assert status == 0
    assert "warning: that is below the start, 90.00%: try a lower --lr" in out
    for after in (0.9, 0.85, 0.5):  # one of 15 images is chance
        found = iter((0.9, 0.9, after))
        status, out, _ = growkit(capsys, *GROW, *DATA, "--steps", "1", "--workers", "0", "--run", tmp_path, "--force")
        assert status == 0
        assert f"on the validation images top-1 90.00% -> {after:.2%}, loss 1.0000 -> 1.0000" in out
        assert ("warning: training the operator did harm: try a lower --lr" in out) == (after == 0.5)
        note = f"note: top-1 fell from 90.00% to {after:.2%} on 15 images, which may be chance"
        assert (note in out) == (after == 0.85)
    found = iter((0.9, 0.5))
    interrupted_at(2)
    status, out, _ = growkit(capsys, *words, "--steps", "3", "--force")
    assert (status, "best at update 1: top-1 50.00%" in out, "below the start" in out) == (130, True, False)  # so far


def test_every_command_that_reads_a_checkpoint_can_be_told_what_is_in_it() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for name in ("plan", "grow", "finetune", "evaluate", "compare", "sweep", "export", "verify"):
        known = {
            option for parameter in commands[name].params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        assert {"--from", "--from-set", "--no-ema"} <= known, name


@pytest.mark.parametrize(("width", "told"), [("64", "yes"), ("48", "nearly")])
@pytest.mark.usefixtures("here")
def test_plan_says_how_exactly_a_start_is_the_source(
    width: str, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("growkit.plan.RANKS", (1,))
    heads = str(int(width) // 16)
    sizes = ("--set", f"embed_dim={width}", "--set", "depth=3", "--set", f"num_heads={heads}")
    status, out, _ = growkit(capsys, "plan", "small", "--to", "vit_tiny", *sizes)
    assert status == 0
    (line,) = [line for line in out.splitlines() if line.split()[1:2] == ["mango"]]
    assert line.split()[3] == told


def test_table_too_wide_for_the_terminal_is_printed_row_by_row_and_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = ("method", *(f"a long column {n}" for n in range(9)), "why not")
    rows = [("mango", *(["0.123456"] * 9), "")]
    monkeypatch.setenv("COLUMNS", "60")
    Console().table("title", columns, rows)
    narrow = capsys.readouterr().out
    assert narrow.startswith("title\nmango\n  a long column 0: 0.123456\n")
    assert narrow.count("0.123456") == 9
    assert "why not" not in narrow
    monkeypatch.setenv("COLUMNS", "200")
    Console().table("title", columns, rows)
    assert "┃ a long column 0 ┃" in capsys.readouterr().out


def sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def interrupted_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Send this process SIGINT, as Ctrl-C does, when an update of training is done."""
    from growkit.train import training

    real = training.Training.update

    def arm(step: int) -> None:
        def update(self, number, batches):  # type: ignore[no-untyped-def]
            loss = real(self, number, batches)
            if number == step:
                signal.raise_signal(signal.SIGINT)
            return loss

        monkeypatch.setattr(training.Training, "update", update)

    return arm


@pytest.fixture
def stopped(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    interrupted_at: Callable[[int], None],
) -> Callable[..., tuple[str, ...]]:
    """Train for one of three updates; the command, with which it goes on."""

    def stop(*command: str) -> tuple[str, ...]:
        words = (*command, *DATA, "--steps", "3", "--workers", "0", "--run", str(tmp_path))
        monkeypatch.chdir(place)
        interrupted_at(1)
        assert growkit(capsys, *words)[0] == 130
        monkeypatch.undo()
        monkeypatch.chdir(place)
        return words

    return stop


@pytest.mark.parametrize(("rate", "told"), [(50.0, "wrote"), (0.0, "kept")])
def test_end_of_training_tells_what_all_of_its_updates_took(
    rate: float, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {"steps": 20, "flops_per_step": 3 * 10**12, "macs_per_step": 0, "seconds": 4.0, "images_per_second": rate}
    fitted = SimpleNamespace(**counts, best_scores=None, best_step=None, history=(), interrupted=False)
    tell_trained(Console(), SimpleNamespace(folder="run/trained", fitted=fitted, scores_at_start=None))
    out = capsys.readouterr().out
    assert f"{told} run/trained after 20 updates in 4 s (" in out
    assert out.endswith("60 TFLOP)\n")


@pytest.mark.parametrize("command", ["finetune", "train"])
def test_interrupted_training_exits_130_and_resumes_to_the_same_bits(
    command: str,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    interrupted_at: Callable[[int], None],
) -> None:
    monkeypatch.chdir(place)
    sizes = ("--set", "embed_dim=32", "--set", "depth=1", "--set", "num_heads=2", "--set", "img_size=16")
    start = ("finetune", "small") if command == "finetune" else ("train", "vit_tiny", *sizes, "--set", "patch_size=8")
    settings = (*DATA, "--steps", "6", "--lr", "1e-3", *QUICK)
    folder = "finetuned" if command == "finetune" else "trained"
    status, _, err = growkit(capsys, *start, *settings, "--run", tmp_path / "whole")
    assert status == 0, err

    interrupted_at(3)
    status, _, err = growkit(capsys, *start, *settings, "--run", tmp_path / "broken")
    assert (status, err) == (130, "interrupted; what was learned is saved, --resume goes on\n")
    history = json.loads((tmp_path / "broken" / folder / "last" / "growkit.json").read_text())
    assert (history["fit"]["interrupted"], history["fit"]["steps"]) == (True, 3)
    assert timm.create_model(f"local-dir:{tmp_path / 'broken' / folder}", pretrained=True)

    monkeypatch.undo()
    monkeypatch.chdir(place)
    refused, _, err = growkit(capsys, *start, *settings, "--run", tmp_path / "broken")
    assert (refused, "--force" in err) == (2, True)
    other, _, err = growkit(capsys, *start, *settings, "--lr", "2e-3", "--run", tmp_path / "broken", "--resume")
    assert (other, "the run was started with --lr 0.001, not 0.002" in err) == (2, True)
    status, out, err = growkit(capsys, *start, *settings, "--run", tmp_path / "broken", "--resume")
    assert (status, "goes on after update 3\n" in out) == (0, True), err
    status, out, err = growkit(capsys, *start, *settings, "--run", tmp_path / "broken", "--resume")
    assert (status, "nothing was left to train" in out, "images/s" in out) == (0, True, False), err
    for stage in (folder, f"{folder}/last"):
        whole, broken = (load_file(tmp_path / run / stage / "model.safetensors") for run in ("whole", "broken"))
        assert [name for name in whole if not torch.equal(whole[name], broken[name])] == []


def test_pixels_that_training_from_scratch_does_not_read_are_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    sizes = ("embed_dim=32", "depth=1", "num_heads=2", "img_size=15", "patch_size=8")
    words = ("train", "vit_tiny", *(word for size in sizes for word in ("--set", size)), *DATA, *QUICK, "--steps", "1")
    status, out, _ = growkit(capsys, *words, "--run", tmp_path)
    assert (status, "the last 7 pixels of each row and column are in no patch and not read\n" in out) == (0, True)
    for more in ("img_size=16",), ("dynamic_img_size=true", "dynamic_img_pad=true"):
        sets = (word for size in more for word in ("--set", size))
        status, out, _ = growkit(capsys, *words, *sets, "--run", tmp_path, "--force")
        assert (status, "not read" in out) == (0, False)


def test_resuming_where_nothing_was_begun_begins_and_says_so(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    words = ("finetune", "small", *DATA, *QUICK, "--steps", "2", "--resume", "--run", tmp_path)
    status, out, _ = growkit(capsys, *words)
    assert (status, "nothing to resume: it begins now\n" in out) == (0, True)
    shutil.rmtree(tmp_path / "finetuned" / "last")
    before = listing(tmp_path)
    status, _, err = growkit(capsys, *words)  # a model that could be lost
    assert (status, "no state to resume from; start without --resume" in err) == (2, True)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("command", [("finetune", "small"), GROW])
def test_training_is_not_resumed_with_another_model(
    command: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    stopped: Callable[..., tuple[str, ...]],
) -> None:
    words = stopped(*command)
    shutil.copytree("small", tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    save_file({**weights, "head.bias": weights["head.bias"] + 1}, tmp_path / "other" / "model.safetensors")
    before = listing(tmp_path)
    status, _, err = growkit(capsys, words[0], tmp_path / "other", *words[2:], "--resume")
    assert (status, "the run was started with another model (its weights differ): give the same" in err) == (2, True)
    assert listing(tmp_path) == before
    assert growkit(capsys, *words, "--resume")[0] == 0


def test_training_from_scratch_is_not_resumed_with_another_architecture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stopped: Callable[..., tuple[str, ...]]
) -> None:
    sizes = ("embed_dim=32", "depth=1", "num_heads=2", "img_size=16", "patch_size=8")
    words = stopped("train", "vit_tiny", *(word for size in sizes for word in ("--set", size)))
    status, _, err = growkit(capsys, *words, "--set", "drop_path_rate=0.5", "--resume")
    assert (status, "the run was started with no drop_path_rate, not 0.5: give the same" in err) == (2, True)
    assert growkit(capsys, *words, "--resume")[0] == 0


def test_moving_average_is_what_a_run_that_was_stopped_before_its_first_score_writes(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    interrupted_at: Callable[[int], None],
) -> None:
    monkeypatch.chdir(place)
    interrupted_at(3)
    words = ("finetune", "small", *DATA, *QUICK, "--steps", "6", "--lr", "1e-2", "--eval-every", "0", "--model-ema")
    assert growkit(capsys, *words, "--run", tmp_path)[0] == 130
    state = torch.load(tmp_path / "finetuned" / "last" / "state.pt", weights_only=True)["training"]
    assert not torch.equal(state["ema"]["head.weight"], state["model"]["head.weight"])
    for folder in ("finetuned", "finetuned/last"):
        written = load_file(tmp_path / folder / "model.safetensors")
        assert all(torch.equal(written[name], state["ema"][name]) for name in written)


@pytest.mark.parametrize("at", [2, 5])
def test_interrupted_operator_training_writes_the_grown_model_unscored_and_exits_130(
    at: int,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    interrupted_at: Callable[[int], None],
) -> None:
    monkeypatch.chdir(place)
    interrupted_at(at)
    status, out, err = growkit(capsys, *GROW, *DATA, "--steps", "5", *QUICK, "--run", tmp_path, "--json")
    assert status == 130
    assert "Traceback" not in err
    assert len(json.loads(out)["losses"]) == at
    assert json.loads(out)["scores"].keys() == {"source", "step0"}
    assert json.loads((tmp_path / "record.json").read_text())["steps"][-1]["figures"]["scores"] is None
    assert timm.create_model(f"local-dir:{tmp_path / 'grown'}", pretrained=True)
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".partial")] == []
    monkeypatch.undo()
    monkeypatch.chdir(place)
    status, out, err = growkit(capsys, *GROW, *DATA, "--steps", "5", *QUICK, "--run", tmp_path, "--json", "--resume")
    assert status == 0, err
    assert json.loads(out)["scores"].keys() == {"source", "step0", "operator"}


@pytest.mark.usefixtures("here")
def test_data_of_other_classes_gets_a_new_head_and_labels_that_evaluate_and_export_keep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = growkit(capsys, *GROW, *DATA, "--steps", "1", *QUICK, "--run", tmp_path)
    assert status == 0, err
    assert "the source has 7 classes, the data 3: a new head starts from scratch" in out
    assert "train it on these classes first: growkit finetune small --data images --run OTHER, and take" in out
    config = json.loads((tmp_path / "grown" / "config.json").read_text())
    assert (config["num_classes"], config["label_names"]) == (3, ["cat", "dog", "elk"])
    history = json.loads((tmp_path / "grown" / "growkit.json").read_text())
    assert (history["source"]["own_head"], history["lossless"]) == (False, True)
    write_images(tmp_path / "others", ("cat", "dog"), 2)
    status, _, err = growkit(capsys, *EXPORT, "--run", tmp_path)
    assert status == 0, err
    before = listing(tmp_path)
    status, _, err = growkit(capsys, "verify", "--run", tmp_path, "--data", tmp_path / "others", "--workers", "0")
    assert (status, err.count("\n")) == (2, 1)
    assert "its 2 classes are not the model's 3" in err
    assert listing(tmp_path) == before


@pytest.mark.usefixtures("here")
def test_verify_of_a_file_that_is_no_onnx_is_a_check_that_says_no(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    junit = tmp_path / "junit.xml"
    status, out, err = growkit(
        capsys, "verify", "small", "--onnx-file", "text.onnx", "--run", tmp_path / "run", "--junit", junit
    )
    assert (status, err) == (1, "")
    assert "FAILED structure: " in out
    assert out.rstrip().endswith("verdict: fail")
    assert '<failure message="' in junit.read_text()


def run(cwd: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """growkit as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'cli'}", "GROWKIT_DEBUG": ""}
    command = [sys.executable, "-m", "growkit_cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_process_of_its_own_ends_with_the_same_status_and_line(place: Path) -> None:
    refused = run(place, "grow", "lfs.pth", *TO)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.splitlines()[0].startswith("growkit ")  # before torch is loaded
    assert (
        refused.stderr.split("\n", 1)[1]
        == "error: lfs.pth: not readable as a torch checkpoint (neither a zip archive nor a pickle)\n"
    )


FULL = "error: stdout: cannot be written (the disk is full); free some space there and try again; "


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ('"$@"', 0, ""),
        ('"$@" >&- 2>&-', 0, ""),
        ('"$@" >said', 0, r"wrote \xfc.html: may it ship? not yet"),
        ('"$@" >/dev/full 2>said', 2, f"growkit {__version__}: report\n{FULL}"),
        ('"$@" >said 2>/dev/full', 0, r"wrote \xfc.html"),
        ('head -c 490 /dev/zero >said; ulimit -f 1; "$@" 2>>said', 2, "\0"),  # 22 bytes are free, and no page fits
    ],
    ids=["reader gone", "closed", "ascii", "full", "full for messages", "full for an error"],
)
def test_work_and_its_status_do_not_depend_on_who_reads(words: str, status: int, said: str, tmp_path: Path) -> None:
    RunFolder(tmp_path / "run").add("grow", options={}, figures={})
    command = ["sh", "-c", words, "sh", sys.executable, "-m", "growkit_cli", "report", "--out", "ü.html"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'cli'}", "PYTHONIOENCODING": "ascii"}
    reading, gone = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=gone, stderr=gone)
    finally:
        os.close(gone)
    assert done.returncode == status
    assert (tmp_path / "ü.html").exists() == ("ulimit" not in words)
    if "said" in words:
        assert (tmp_path / "said").read_text().startswith(said)


def test_closed_streams_take_any_character_and_are_there_for_children_and_busy_ones_are_waited_for() -> None:
    child = "import os, sys; os.fstat(1); print(os.open(os.devnull, os.O_RDONLY), file=sys.stderr)"
    script = (
        "import subprocess, sys; from growkit_cli.streams import ready; sys.stderr.write('first '); ready();"
        "print(chr(252)); print('second', file=sys.stderr);"
        f"subprocess.run([sys.executable, '-c', {child!r}], check=True); print('x' * 10**6, file=sys.stderr)"
    )
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = {**os.environ, **ascii_only, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'cli'}"}
    command = ["sh", "-c", '"$@" >&-', "sh", sys.executable, "-c", script]
    reading, busy = os.pipe()
    os.set_blocking(busy, False)  # as another program that shares it may have done
    with subprocess.Popen(command, stderr=busy, env=environment) as started, open(reading, encoding="utf-8") as pipe:
        os.close(busy)
        time.sleep(1)  # until the pipe is full
        assert pipe.read() == f"first second\n3\n{'x' * 10**6}\n"
    assert started.returncode == 0


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_demo_removes_nothing_that_is_not_its_own(
    force: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos" / "digits").mkdir(parents=True)
    (tmp_path / "photos" / "a.jpg").write_text("seaside")
    before = listing(tmp_path)
    status, _, err = growkit(capsys, "demo", tmp_path / "photos", *force)
    assert status == 2
    assert ("a.jpg in it, which growkit did not write, would be lost" if force else "already exists") in err
    assert "name another folder" in err
    assert listing(tmp_path) == before


def test_demo_never_replaces_a_run_that_it_did_not_make(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / "grown").mkdir(parents=True)
    (tmp_path / "run" / "grown" / "model.safetensors").write_text("weeks")
    before = listing(tmp_path)
    status, _, err = growkit(capsys, "demo", tmp_path, "--force")
    assert (status, listing(tmp_path)) == (2, before)
    assert "it holds no digits; name another folder" in err


def test_page_that_is_a_folder_is_refused_by_its_own_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.html").mkdir()
    status, _, err = growkit(capsys, "report", "--run", tmp_path)
    assert (status, err) == (2, f"error: {tmp_path}/report.html: cannot be written (it is a folder); name a file\n")


def test_demo_asks_for_the_lock_of_its_runs_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("digits/train/0", "run/grown", "from-scratch/trained"):
        (tmp_path / name).mkdir(parents=True)
    asked: list[Path] = []

    @contextmanager
    def holding(folder: Path) -> Iterator[None]:
        asked.append(folder.relative_to(tmp_path))
        yield

    monkeypatch.setattr("growkit_cli.demo.holding", holding)
    monkeypatch.setattr("growkit_cli.demo._demo", lambda *_: None)
    assert growkit(capsys, "demo", tmp_path, "--force")[0] == 0
    assert asked == [Path(), Path("run"), Path("from-scratch")]
    assert listing(tmp_path) == {}


def test_demo_says_nothing_on_stdout_but_its_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        print("a line of the first command")
        raise GrowkitError("enough")

    monkeypatch.setattr("growkit.fitting.train_model", fail)
    status, out, err = growkit(capsys, "demo", tmp_path / "demo", "--json")
    assert (status, out) == (2, "")
    assert "a line of the first command" in err


@pytest.mark.usefixtures("here")
def test_tensorboard_files_of_a_run_that_was_killed_before_it_saved_anything_are_in_nobodys_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = tmp_path / "finetuned" / "last" / "tensorboard" / "events.out.tfevents.1.host.1.0"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"")
    words = ("finetune", "small", *DATA, "--steps", "1", "--workers", "0", "--run", tmp_path)
    assert (growkit(capsys, *words)[0], left.exists()) == (0, False)


@pytest.mark.usefixtures("here")
def test_tensorboard_that_is_not_installed_costs_nothing_of_the_run_that_was_to_be_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("finetune", "small", *DATA, "--steps", "1", "--workers", "0", "--run", tmp_path)
    assert growkit(capsys, *words)[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    status, _, err = growkit(capsys, *words, "--force", "--tensorboard")
    assert (status, "pip install 'growkit[tensorboard]'" in err) == (2, True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("here")
def test_last_weights_are_those_whose_scores_are_the_last_with_a_moving_average_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--steps", "4", "--lr", "1e-2", "--eval-every", "0", "--model-ema", "--run", tmp_path)
    assert growkit(capsys, "finetune", "small", *DATA, *QUICK, *words)[0] == 0
    last = tmp_path / "finetuned" / "last"
    (*_, line) = (last / "metrics.jsonl").read_text().splitlines()
    status, out, _ = growkit(capsys, "evaluate", last, *DATA, "--workers", "0", "--json")
    assert (status, json.loads(out)["loss"]) == (0, pytest.approx(json.loads(line)["scores"]["loss"], rel=1e-6))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--model-ema-decay", "0.9"), ["warning: --model-ema-decay means nothing without --model-ema"]),
        (("--sched", "constant", "--min-lr", "1e-6"), ["warning: --min-lr means nothing with --sched constant"]),
        (("--model-ema", "--model-ema-decay", "0.9", "--min-lr", "1e-6"), []),
    ],
)
@pytest.mark.usefixtures("here")
def test_training_says_which_options_mean_nothing(
    words: tuple[str, ...], told: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = growkit(capsys, "finetune", "small", *DATA, *QUICK, "--steps", "1", *words, "--run", tmp_path)
    assert (status, [line for line in out.splitlines() if line.startswith("warning")]) == (0, told)
