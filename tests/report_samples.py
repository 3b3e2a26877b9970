"""A run folder as the commands leave it, small enough to write in a test; parts can be left out or spoiled."""

import json
import shlex
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from growkit.compare.arms import parse_arms
from growkit.compare.settings import SCHEMA, CompareSettings
from growkit.deploy.checks import check
from growkit.deploy.latency import Latency, latency_check
from growkit.deploy.settings import ExportSettings, VerifySettings
from growkit.deploy.throughput import Rate, Throughput
from growkit.deploy.timing import Comparison, Percentiles
from growkit.files import write_json
from growkit.record import RunFolder
from growkit.settings import FINETUNE_DEFAULTS, OPERATOR_DEFAULTS, GrowSettings
from growkit.train.agreement import Agreement, ClassChange, Part
from growkit.train.score import Scores
from growkit.train.settings import FitSettings

FILES = {name: name.encode() for name in ("grown/model.safetensors", "finetuned/model.safetensors", "onnx/model.onnx")}
SOURCE = "a1" * 32
GROWN, TUNED, ONNX = (sha256(content).hexdigest() for content in FILES.values())
SECTIONS = (
    "Source",
    "Growth",
    "Fine-tuning",
    "Behaviour against the source",
    "Savings",
    "ONNX parity",
    "Latency",
    "Provenance",
)


def scores(top1: float, loss: float = 0.5) -> dict[str, Any]:
    return asdict(Scores(top1=top1, top5=0.99, loss=loss, ece=0.03, count=1000))


def fit(best: float, **settings: Any) -> dict[str, Any]:
    """Figures of a training of 20 updates, evaluated twice."""
    history = [{"step": 10, **scores(best - 0.01, 0.6)}, {"step": 20, **scores(best)}]
    return {
        "steps": 20,
        "interrupted": False,
        "losses": [1 / step for step in range(1, 21)],
        "history": history,
        "best": scores(best),
        "best_step": 20,
        "flops_per_step": 10**9,
        "flops": 2 * 10**10,
        "images_per_second": 512.0,
        "seconds": 12.5,
        "settings": asdict(FitSettings(**settings)),
    }


def agreement(wrong: int, right: int, p: float, name: str = "cat") -> dict[str, Any]:
    part = Part(wrong, wrong / 1000)
    return asdict(
        Agreement(
            source_scores=Scores(**scores(0.8)),
            model_scores=Scores(**scores(0.8 + (right - wrong) / 1000)),
            agreement=Part(900, 0.9),
            both_right=Part(800 - wrong, 0.8 - wrong / 1000),
            both_wrong=Part(100, 0.1),
            turned_wrong=part,
            turned_right=Part(right, right / 1000),
            changed_wrong=Part(1, 0.001),
            mcnemar_p=p,
            classes=(ClassChange(name, 1000, 0.8, 0.81, 0.01, wrong, right),),
        )
    )


def timed(batch: int, baseline: str, ratio: float) -> Comparison:
    own, other = Percentiles(2.0 * ratio, 2.5, 3.0), Percentiles(2.0, 2.4, 2.9)
    return Comparison("file", baseline, batch, ratio, ratio - 0.02, ratio + 0.02, 3, 60, own, other)


def verification(**changes: Any) -> dict[str, Any]:
    """The report.json of a verification that passed."""
    compared = [
        timed(batch, name, ratio) for batch in (1, 8) for name, ratio in (("stock export", 0.99), ("PyTorch", 0.4))
    ]
    latency = Latency(
        tuple(compared), tuple(latency_check(one, 0.01, 1.1) for one in compared[::2]), provider="cpu", threads=2
    )
    checks = (
        check("structure", "valid ONNX", True, "accepted", "accepted"),
        check("weights", "missing from the file", True, 0, 0),
        *(check("numbers", f"batch {batch}: relative RMS error", True, 2e-7, 1e-5) for batch in (1, 2, 5, 8)),
        check("predictions", "certified predictions changed", True, 0, 0),
        check("accuracy", "certified predictions changed", True, 0, 0),
        *latency.checks,
    )
    told = asdict(latency)
    told.pop("checks")
    content = {
        "schema": 1,
        "verdict": "pass",
        "onnx_sha256": ONNX,
        "weights_sha256": TUNED,
        "checks": [asdict(one) for one in checks],
        "numerics": {
            "batches": {str(batch): {"relative_rms": 2e-7, "largest_over_std": 6e-7} for batch in (1, 2, 5, 8)},
            "noise_ratio": 1.1,
            "accuracy": {"samples": 1000, "top1": 0.85, "torch_top1": 0.85, "n01": 0, "n10": 0},
        },
        "latency": told,
        "throughput": asdict(
            Throughput(
                tuple(Rate(batch, 37.0 * batch, Percentiles(27.0, 28.0, 29.0), 20, 155.0, 0.47) for batch in (1, 8)),
                macs_per_image=2_100_000_000,
                peak_gflops=331.0,
                peak_size=1024,
                provider="cpu",
                threads=2,
            )
        ),
        **changes,
    }
    return json.loads(json.dumps(content))


def comparison(name: str = "deit_small_patch16_224") -> dict[str, Any]:
    """The results.json of a comparison of one method with training from scratch, one seed."""
    settings = CompareSettings(methods="mango", controls="none", seeds=1, budgets="1", lrs="1e-3")
    arms = parse_arms(settings, learned=lambda grow: True)

    def run(arm: str, ends: float) -> dict[str, Any]:
        curve = [[flops * 1e12, ends * flops / 4, 2 - flops / 4] for flops in range(5)]
        return {
            "arm": arm,
            "budget": 1.0,
            "seed": 0,
            "lr": 1e-3,
            "operator_lr": None,
            "operator_flops": 0,
            "operator_seconds": 0.0,
            "flops": 4e12,
            "seconds": 60.0,
            "step0": None,
            "started_from": None,
            "curve": curve,
            "final": scores(ends),
            "test": scores(ends),
        }

    described = {
        "arguments": {"num_classes": 3},
        "architecture": name,
        "spaces": {"blocks": 12, "embed": 384},
        "name": name,
        "sha256": SOURCE,
    }
    return {
        "schema": SCHEMA,
        "source": described,
        "target": described,
        "command": "growkit compare small.pth --to deit_base --data images/ --methods mango --seeds 1",
        "settings": asdict(settings),
        "recipe": asdict(FitSettings()),
        "operator": {},
        "data": {},
        "largest_class": 40,
        "images": {"training images": 1200, "held-out images": 100, "test images": 100},
        "full_flops": 4e12,
        "source_flops": 1e12,
        "arm_settings": {arm.name: asdict(arm) for arm in arms},
        "runs": [run(arm.name, 0.5 + 0.2 * index) for index, arm in enumerate(arms)],
        "versions": {"torch": "2.11"},
        "hardware": {"cpu": "a processor", "cores": 2, "torch_threads": 2},
    }


def write_run(folder: Path, *, compared: bool = False, name: str = "small.pth", label: str = "cat") -> RunFolder:
    """Grow, fine-tune, export, evaluate and verify, as recorded; every gate passes."""
    run = RunFolder(folder)
    sizes = {"embed_dim": 384, "depth": 12, "num_heads": 6, "num_classes": 3}
    origin = {"name": name, "sha256": SOURCE, "architecture": "deit_small_patch16_224", "arguments": sizes}
    operator = fit(0.0, **OPERATOR_DEFAULTS) | {"history": [], "best": None, "best_step": None}
    grow, tune = (
        GrowSettings(rank=4, seed=7),
        FitSettings(**{**FINETUNE_DEFAULTS, "epochs": 2.0, "grad_checkpointing": True}),
    )
    grown = {"source": {**origin, "history": None}, "to": "deit_base_patch16_224", "settings": asdict(grow)}
    grown |= {"step0_gap": 1e-6, "operator": operator, "weights_sha256": GROWN}
    write_json(run.grown / "growkit.json", {"stage": "grown", **grown})
    tuned = fit(0.85) | {"settings": asdict(tune)}
    begun = {"name": "grown", "sha256": GROWN}
    history = {"stage": "finetuned", "source": begun, "fit": tuned, "weights_sha256": TUNED}
    write_json(run.finetuned / "growkit.json", history)
    bigger = {**sizes, "embed_dim": 768, "num_heads": 12}
    write_json(run.finetuned / "config.json", {"model_args": bigger, "pretrained_cfg": {"license": "apache-2.0"}})
    provenance = {"weights_sha256": TUNED, "arguments": bigger}
    parity = {"checks": verification()["checks"][:6], "figures": verification()["numerics"]}
    exported = {"bytes": 343_000_000, "opset": 18, "ir": 8, "sha256": ONNX, "provenance": provenance, "parity": parity}
    write_json(run.onnx / "export.json", exported)
    for place, content in FILES.items():
        (folder / place).write_bytes(content)
    write_json(run.verify / "report.json", verification())
    if compared:
        write_json(run.compare / "results.json", comparison())

    at = {"source": scores(0.8), "step0": scores(0.8), "operator": scores(0.81)}
    figures = {"step0_gap": 1e-6, "parameters": 86_000_000, "operator_parameters": 900_000, "scores": at}
    typed = {
        "grow": ["small.pth", "--to", "deit_base", "--from", "deit_small", "--rank", "4", "--data", "my images"],
        "finetune": ["--data", "my images", "--epochs", "2", "--force"],
        "evaluate": ["--data", "my images", "--against", "small.pth", "--device", "cuda"],
        "export": ["--onnx", "--for", "cpu", "--triton", "models", "--triton-version", "2"],
        "verify": ["--data", "my images", "--val-split", "test", "--images", "photos", "--json"],
    }
    steps: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, str]]] = [
        (
            "grow",
            {"source": name, "to": "deit_base", "set": [], "data": "images", **asdict(grow)},
            {**figures, "operator": operator},
            {"source": SOURCE, "grown": GROWN},
        ),
        (
            "finetune",
            {"model": str(run.grown), "data": "images", **asdict(tune)},
            {"start": scores(0.81), **tuned},
            {"source": GROWN, "finetuned": TUNED},
        ),
        (
            "evaluate",
            {"model": str(run.finetuned), "against": name, "data": "images", "batch_size": 64},
            agreement(10, 60, 1e-9, label),
            {"source": SOURCE, "model": TUNED},
        ),
        (
            "export",
            {"model": str(run.finetuned), "out": str(run.onnx), **asdict(ExportSettings(max_batch=16))},
            {"bytes": 343_000_000},
            {"weights": TUNED, "model.onnx": ONNX},
        ),
        (
            "verify",
            {
                "model": str(run.finetuned),
                "onnx": str(run.onnx / "model.onnx"),
                "data": "images",
                **asdict(VerifySettings(latency_seconds=2.5)),
            },
            {"verdict": "pass"},
            {"weights": TUNED, "model.onnx": ONNX},
        ),
    ]
    made = [
        {**as_step(*one), "command_line": shlex.join(["growkit", one[0], *typed[one[0]], "--run", str(folder)])}
        for one in steps
    ]
    write_json(run.record, {"schema": 1, "steps": made})
    return run


def as_step(command: str, options: object, figures: object, hashes: object) -> dict[str, object]:
    return {
        "command": command,
        "finished": "2026-01-02T03:04:05+00:00",
        "options": options,
        "figures": figures,
        "hashes": hashes,
        "versions": {"torch": "2.11"},
        "hardware": {"cpu": "a processor", "cores": 2},
    }
