"""growkit evaluate: top-1, top-5, loss and calibration of a model folder or an ONNX file."""

from pathlib import Path

from growkit.train.settings import FitSettings
from growkit_cli.console import Console
from growkit_cli.options import AsJson, Device, From, FromSets, Model, NeededData, Run, with_settings

DATA_OPTIONS = ("batch_size", "workers", "precision", "data_dir", "dataset_download", "val_split")
OTHERS = tuple(name for name in FitSettings.__dataclass_fields__ if name not in DATA_OPTIONS)


@with_settings(FitSettings, skip=OTHERS)
def evaluate(
    data: NeededData,
    settings: FitSettings,
    model: Model = None,
    from_: From = None,
    from_sets: FromSets = None,
    device: Device = "auto",
    run: Run = Path("run"),
    as_json: AsJson = False,
) -> None:
    """Score a model folder, a checkpoint or an .onnx file on the validation images.

    Example: growkit evaluate run/onnx/model.onnx --data images/
    """
    from dataclasses import asdict

    from growkit.pipeline import evaluate_model, evaluate_onnx
    from growkit.record import RunFolder
    from growkit.source import load_source

    console = Console(as_json)
    path = model or RunFolder(run).furthest()
    console.say(f"evaluating {path}")
    if path.suffix == ".onnx":
        provider = device if device in ("auto", "cpu") else "cuda"
        scores = evaluate_onnx(path, data, settings, provider=provider)
    else:
        loaded = load_source(str(path), from_, from_sets or ())
        for note in loaded.notes:
            console.say(note)
        scores = evaluate_model(loaded, data, settings, device=device)
    console.table(
        f"{scores.count} validation images",
        ("score", "value"),
        [
            ("top-1", f"{scores.top1:.2%}"),
            ("top-5", f"{scores.top5:.2%}"),
            ("loss", f"{scores.loss:.4f}"),
            ("calibration error (ECE)", f"{scores.ece:.4f}"),
        ],
    )
    console.result({"model": path, **asdict(scores)})
