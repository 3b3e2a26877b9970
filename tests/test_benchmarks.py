"""The benchmarks run and write figures; how fast anything is, is not asserted here."""

import importlib.util
import json
import math
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import typer
from few_digits import write_few_digits
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from growkit.arch import build, find
from growkit.checkpoint import write_model
from growkit.train.data import Data
from growkit.train.loop import fit
from growkit.train.score import Scores, score_model
from growkit.train.settings import FitSettings
from growkit_cli.main import app

FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks"
SCRIPTS = sorted(FOLDER.glob("*.py"))
SMALL = ["embed_dim=32", "depth=2", "num_heads=2", "img_size=16", "patch_size=8"]
BIG = ["embed_dim=48", "depth=3", "num_heads=3"]


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Standard output of a benchmark in the process of the tests, which has imported torch already."""

    def run_here(script: str, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        monkeypatch.syspath_prepend(FOLDER)  # as the folder of a script is
        runpy.run_path(str(FOLDER / script), run_name="__main__")
        return capsys.readouterr().out

    return run_here


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "digits"
    write_few_digits(folder)
    return folder


def not_finite(content: Any, path: str = "") -> list[str]:
    """Where in parsed JSON a number is not finite."""
    if isinstance(content, dict):
        return [found for key, value in content.items() for found in not_finite(value, f"{path}.{key}")]
    if isinstance(content, list):
        return [found for n, value in enumerate(content) for found in not_finite(value, f"{path}[{n}]")]
    return [path] if isinstance(content, float) and not math.isfinite(content) else []


def test_number_that_is_not_finite_is_found() -> None:
    assert not_finite({"a": [1, {"b": math.nan}], "c": "x"}) == [".a[1].b"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_no_benchmark_hides_a_standard_module(script: Path) -> None:
    # A script's folder comes first on sys.path, for its neighbours too.
    assert script.stem not in sys.stdlib_module_names


def status_of(monkeypatch: pytest.MonkeyPatch, script: str, *words: str) -> object:
    """Run a script in this process, which must end at once; its exit status."""
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.syspath_prepend(FOLDER)  # as the folder of a script is
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(FOLDER / script), run_name="__main__")
    return left.value.code


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_of_benchmark_works(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(monkeypatch, script.name, "--help") == 0
    assert "usage" in capsys.readouterr().out


@pytest.mark.slow
def test_operator_benchmark_writes_finite_figures(run_here: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "operator.json"
    sizes = ["--small", ",".join(["vit_tiny", *SMALL]), "--big", ",".join(["vit_tiny", *BIG])]
    options = ["--ranks", 2, "--batch-size", 2, "--grad-accum-steps", 2, "--rounds", 1, "--device", "cpu", "--out", out]
    assert "promised" in run_here("operator_cost.py", *sizes, *options)
    content = json.loads(out.read_text(encoding="utf-8"))
    assert not_finite(content) == []
    (arithmetic,), (step,) = content["arithmetic"], content["steps"]
    assert arithmetic["flops"] >= arithmetic["best_flops"] > 0
    assert min(step[name] for name in ("time_ratio", "memory_ratio", "plain_peak_bytes")) > 0
    assert content["counted_memory"][0]["ratio"] > 0
    contests = {entry["name"]: entry for entry in content["contests"]}
    assert {"growkit", "one torch.einsum", "LiGO's operator"} <= set(contests)
    assert all(entry["both_ratio"] > 0 and entry["peak_ratio"] > 0 for entry in contests.values())
    assert content["versions"]["torch"]
    assert content["hardware"]["cores"] >= 1


def test_steps_for_a_gpu_run_one_by_one_with_options_that_exist_and_a_failing_one_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"  # says what it is asked to run, sees two GPUs, and fails at one step
    python.write_text(
        '#!/bin/sh\n[ "$1" = -c ] && echo 2 && exit\necho "$@"\ncase "$*" in *latency.py*) exit 3; esac\n'
    )
    python.chmod(0o755)
    (tmp_path / "train").mkdir()
    script = [FOLDER.parent / "gpu.sh", tmp_path, tmp_path / "out"]
    here = {**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}

    def steps(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*map(str, words)], capture_output=True, text=True, env=here)

    nowhere = steps(script[0], tmp_path / "out", tmp_path / "out")
    assert nowhere.returncode == 2
    assert nowhere.stderr == f"{tmp_path / 'out'}: no folder train/ in it; give a folder of images\n"
    wrong = steps(*script, "all")
    assert (wrong.returncode, wrong.stderr) == (2, "all: no such step\n")
    assert steps(*script, "several", "operator").returncode == 0
    done = steps(*script)
    assert done.returncode == 1
    names = ["tests", "operator", "rank10", "batches", "latency", "throughput", "reading", "savings", "several"]
    told = dict(line.split(": exit ") for line in done.stdout.splitlines())
    assert list(told) == names
    assert [name for name, left in told.items() if not left.startswith("0 after ")] == ["latency"]
    for name in names[1:]:
        words = (tmp_path / "out" / f"{name}.log").read_text().split()
        called = next(word for word in words if word.endswith(".py"))
        options = {word for word in words[words.index(called) :] if word.startswith("--")}
        assert status_of(monkeypatch, Path(called).name, "--help") == 0
        described = capsys.readouterr().out
        assert [option for option in options if option not in described] == [], name


@pytest.fixture
def calculated() -> Any:
    """examples/benchmarks/memory_table.py as a module."""
    spec = importlib.util.spec_from_file_location("memory_table", FOLDER / "memory_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_memory_table_is_printed_and_its_parameters_are_timms(
    calculated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calculated, "PAIRS", (("vit_tiny_patch16_224", "vit_small_patch16_224", ("depth=13",)),))
    monkeypatch.setattr("sys.argv", ["memory_table.py", "--batch-size", "2", "--out", str(tmp_path / "table.json")])
    calculated.main()
    (row,) = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))["calculated"]
    assert row["parameters"] == sum(
        p.numel() for p in timm.create_model("vit_small_patch16_224", depth=13).parameters()
    )
    plain, *operators = row["updates"]
    assert plain["held_bytes"] == 16 * row["parameters"]
    assert [one["update"] for one in operators] == ["operator, rank 1", "operator, rank 4"]
    assert plain["flops"] < operators[0]["flops"] < operators[1]["flops"]
    assert "| vit_small_patch16_224 depth=13 |" in capsys.readouterr().out


def test_activations_of_the_memory_table_are_those_of_a_real_forward_pass(calculated: Any) -> None:
    small = find("vit_tiny", {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 16, "patch_size": 8})
    model = build(small.name, small.arguments)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        torch.nn.functional.cross_entropy(model(torch.rand(3, 3, 16, 16)), torch.zeros(3, dtype=torch.long))
    real = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    real = {place: size for place, size in real.items() if place not in own}
    assert calculated.saved_bytes(small, 3, "fp32") == sum(real.values()) > 0
    # bf16 copies of the weights are kept, too, whatever the number of images; what an image adds is smaller
    added = [calculated.saved_bytes(small, 4, p) - calculated.saved_bytes(small, 3, p) for p in ("bf16", "fp32")]
    assert added[1] / 2 < added[0] < added[1]


@pytest.mark.slow  # two processes
def test_benchmark_of_several_processes_writes_finite_figures_and_shares_the_ring(tmp_path: Path) -> None:
    out = tmp_path / "several.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    sizes = ["--small", ",".join(["vit_tiny", *SMALL]), "--big", ",".join(["vit_tiny", *BIG])]
    options = ["--ranks", 2, "--batch-size", 2, "--rounds", 1, "--device", "cpu", "--out", out]
    words = [*command, FOLDER / "several_processes.py", *sizes, *options]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    content = json.loads(out.read_text(encoding="utf-8"))
    assert not_finite(content) == []
    assert content["processes"] == 2
    flops = {entry["update"]: entry["ring_flops_of_each_process"] for entry in content["updates"]}
    assert flops["plain"] == 0
    assert 0.5 < flops["shared"] / flops["every process all"] < 0.7  # vectors are grown by each


@pytest.mark.parametrize(
    ("script", "words", "told"),
    [
        ("operator_cost.py", ["--small", "nosuch"], "error: unknown architecture 'nosuch'; growkit grows timm's"),
        ("operator_cost.py", ["--ranks", "1,x"], "error: argument --ranks: invalid ranks_of value: '1,x'"),
        ("operator_cost.py", ["--rounds", "0"], "error: argument --rounds: 0: expected 1 or more"),
        ("operator_cost.py", ["--big", "deit_tiny,embed_dim=32,num_heads=1"], "error: embed: 64 -> 32 would shrink"),
        ("operator_cost.py", ["--out", "no/such/x.json"], "error: --out no/such/x.json: no such folder; make it"),
        ("startup.py", ["--runs", "0"], "error: --runs 0: expected 1 or more"),
        ("startup.py", ["--out", "no/such/x.json"], "error: --out no/such/x.json: no such folder; make it"),
        ("throughput.py", ["--data", ".", "--rounds", "0"], "error: --rounds 0: expected 1 or more"),
        ("throughput.py", ["--data", ".", "--device", "tpu"], "error: --device tpu"),
        ("throughput.py", ["--data", ".", "--out", "no/such/x.json"], "error: --out no/such/x.json: no such folder"),
        ("several_processes.py", [], "error: start it with torchrun --nproc-per-node N"),
    ],
)
def test_mistake_is_told_in_a_line_before_anything_runs(
    script: str,
    words: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status = status_of(monkeypatch, script, *words)
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert f"{script}: {told}" in err.splitlines()[-1]


@pytest.mark.slow
def test_operator_benchmark_counts_without_timing(
    run_here: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a GPU, too, where none is; but not the memory of what differs there alone."""
    monkeypatch.setattr("growkit.train.device.pick_device", torch.device)
    out = tmp_path / "operator.json"
    sizes = ["--small", ",".join(["vit_tiny", *SMALL]), "--big", ",".join(["vit_tiny", *BIG])]
    words = (*sizes, "--batch-size", 2, "--ranks", 2, "--count-only", "--device", "cuda", "--out", out)
    assert "counted" in run_here("operator_cost.py", *words)
    content = json.loads(out.read_text(encoding="utf-8"))
    assert not_finite(content) == []
    assert content["steps"] == []
    assert content["contests"][0]["peak_bytes"] > 0
    uncounted = [entry["name"] for entry in content["contests"] if "peak_bytes" not in entry]
    assert uncounted == ["growkit, TF32", "growkit, kept, TF32"]


@pytest.mark.slow  # two starts of torch
def test_grow_benchmark_writes_finite_figures_and_timm_loads_the_result(
    run_here: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "grow.json"
    sets = [word for item in SMALL for word in ("--small-set", item)]
    sets += [word for item in ("embed_dim=64", "depth=2", "num_heads=4") for word in ("--big-set", item)]
    told = run_here(
        "grow.py", "--small", "vit_tiny", "--big", "vit_tiny", *sets, "--rank", 2, "--runs", 1, "--out", out
    )
    assert "peak GiB" in told
    content = json.loads(out.read_text(encoding="utf-8"))
    assert not_finite(content) == []
    assert content["timm_logits_gap"] <= content["promised"]["logits_gap"]
    assert content["runs"][0]["peak_bytes"] > 0


@pytest.mark.slow  # two starts of every command
def test_startup_benchmark_writes_finite_figures_of_every_command(run_here: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "startup.json"
    told = run_here("startup.py", "--runs", 1, "--out", out)
    content = json.loads(out.read_text(encoding="utf-8"))
    assert not_finite(content) == []
    commands = {f"growkit {name}" for name in typer.main.get_command(app).commands}  # type: ignore[attr-defined]
    assert set(content["first_lines"]) == commands
    assert set(content["seconds"]) == {"growkit --help", "python -c pass", *commands}
    assert all(name in told and len(taken) == 1 and taken[0] > 0 for name, taken in content["seconds"].items())


@pytest.mark.slow
def test_latency_benchmark_writes_finite_figures(run_here: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "latency.json"
    options = ["--model", "test_vit", "--batches", 1, 2, "--seconds", 0.1, "--throughput-seconds", 0.1, "--out", out]
    assert "peak: " in run_here("latency.py", *options)
    content = json.loads(out.read_text(encoding="utf-8"))
    assert not_finite(content) == []
    baselines = ["itself", "stock export", "PyTorch"]
    assert [c["baseline"] for c in content["latency"]["comparisons"]] == baselines * 2
    assert [rate["batch"] for rate in content["throughput"]["rates"]] == [1, 2]
    assert all(rate["share"] > 0 for rate in content["throughput"]["rates"])
    assert list(content["nodes"]) == ["cpu"]


@pytest.mark.slow
def test_throughput_benchmark_writes_finite_figures(run_here: Callable[..., str], tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(2):
            folder = tmp_path / "images" / split / str(label)
            folder.mkdir(parents=True)
            for number in range(4):
                pixels = generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    out = tmp_path / "throughput.json"
    sets = [word for item in SMALL for word in ("--set", item)]
    options = ["--batch-size", 4, "--workers", 0, "--steps", 2, "--rounds", 1, "--device", "cpu", "--out", out]
    run_here("throughput.py", "--data", tmp_path / "images", "--model", "vit_tiny", *sets, *options)
    content = json.loads(out.read_text(encoding="utf-8"))
    assert not_finite(content) == []
    assert content["ratio"] > 0
    assert list(content["images_per_second"]) == ["growkit", "timm", "growkit, cache-ram", "growkit, cache-device"]
    assert all(0 < share < 1 for share in content["share_of_peak"].values())
    assert 0.5 < sum(content["shares_of_time"].values()) <= 1
    assert not any("Dispatch" in name for name in content["shares_of_time"])  # of counting FLOPs, before any update
    assert content["epochs_end_in_segments"]  # of a few images
    options = ["--batch-size", 4, "--workers", 1, "--steps", 2, "--rounds", 2, "--device", "cpu", "--out", out]
    augmented = ["--aa", "rand-m9-mstd0.5", "--reprob", 0.5]
    run_here("throughput.py", "--data", tmp_path / "images", "--read-only", *augmented, *options)
    content = json.loads(out.read_text(encoding="utf-8"))
    assert not_finite(content) == []
    assert list(content["ratios"]) == ["growkit"]
    assert min(content["ratios"]["growkit"]) > 0


def test_a_deadline_ends_training_once_whatever_it_does_then(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("savings", FOLDER / "savings.py")
    assert spec is not None
    assert spec.loader is not None
    savings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(savings)
    held = TensorDataset(torch.rand(32, 1, 4, 4), torch.arange(32) % 2)
    data = Data(train=held, val=held, classes=["a", "b"])
    settings = FitSettings(steps=8, batch_size=8, workers=0, warmup_epochs=0.0, eval_every=1.0, save_seconds=300)
    for place, (late, scoring) in enumerate([(3, False), (4, True)]):  # before the evaluation, and in it
        deadline = savings.Deadline(300)
        told = deadline.tell()

        def progress(done: float, total: int, note: str = "", *, told=told, deadline=deadline, late=late) -> None:
            if done == late:
                deadline.ends = 0
            told(done, total, note)

        def judge(model: nn.Module, *, deadline=deadline, told=told, scoring=scoring) -> Scores:
            if scoring:
                deadline.ends = 0
            told(0, 32)
            told(32, 32)
            return score_model(model, data, settings, torch.device("cpu"))

        folder = tmp_path / str(place)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
        found = fit(model, data, settings, folder=folder, evaluate=judge, progress=progress)
        assert (found.interrupted, found.steps) == (True, 4)
        assert torch.load(folder / "state.pt", weights_only=True)["step"] == 4


@pytest.mark.slow  # trains twice, once in two processes
def test_savings_stops_in_time_and_goes_on_to_results(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--source", "1,16,2", "--target", "width=1,32,4", "--pairs", "width"]
    inputs = [word for item in ("img_size=8", "patch_size=4", "in_chans=1") for word in ("--set", item)]
    short = ["--epochs", 1, "--batch-size", 16, "--operator-steps", 2, "--methods", "mango", "--device", "cpu"]
    words = ["--data", digits, *sizes, *inputs, *short]

    def savings(out: Path, *more: object) -> tuple[object, str]:
        """Its exit status and standard output, with its results in `out`, too."""
        asked = map(str, [*words, "--out", out, "--results", out / "results", *more])
        return status_of(monkeypatch, str(FOLDER / "savings.py"), *asked), capfd.readouterr().out

    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert savings(alone, "--minutes", 0.0001)[0] == 3
    assert not (alone / "results").exists()
    status, told = savings(alone)
    assert status == 0
    assert "| from scratch |" in told
    (found,) = (alone / "results").glob("savings-width_*.json")
    content = json.loads(found.read_text(encoding="utf-8"))
    assert not_finite(content) == []
    assert content["source_flops"] > 0
    assert {path.suffix for path in (alone / "results").iterdir()} == {".json", ".md", ".svg"}
    status, told = savings(shared, "--jobs", 2)
    assert status == 0
    assert [told.count(f"({part}) [") for part in range(2)] == [6, 6]
    assert not any(line.startswith("[") for line in told.splitlines()), "a run was left to the first process"
    (other,) = (shared / "results").glob("savings-width_*.json")
    finals = [
        {(r["arm"], r["lr"]): (r["final"], r["test"]) for r in runs}
        for runs in (content["runs"], json.loads(other.read_text(encoding="utf-8"))["runs"])
    ]
    assert len(finals[0]) == 12
    assert finals[0] == finals[1]


@pytest.mark.slow  # three exports
def test_precision_benchmark_writes_every_file_and_defect(
    digits: Path, run_here: Callable[..., str], tmp_path: Path
) -> None:
    sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = build("vit_tiny_patch16_224", {**sizes, "num_classes": 10})
    for parameter in model.parameters():  # fresh norms are equal, and each stored tensor is to be told apart
        torch.nn.init.normal_(parameter, std=0.2)
    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model", model, preprocessing=dict(model.pretrained_cfg), labels=None, history={})
    out = tmp_path / "precision.json"
    words = ["--model", tmp_path / "model", "--data", digits, "--images", 16, "--calibration", 8]
    told = run_here("precision.py", *words, "--samples", 40, "--seconds", 0.05, "--out", out)
    content = json.loads(out.read_text(encoding="utf-8"))
    assert "| trained | fp16 |" in told
    files = {(row["model"], row["file"]) for row in content["files"]}
    kinds = {"fp16", "bf16", "int8", "int8-static"}
    assert files >= {(name, kind) for name in ("trained", "overflowing", "random") for kind in kinds}
    assert all(row["unexplained"] == [] for row in content["files"])
    assert {row["file"] for row in content["defects"]} == kinds
    assert all(row["unexplained"] for row in content["defects"] if row["defect"] == "two channels of fc1 swapped")
