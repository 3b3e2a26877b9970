"""growkit evaluate: scores of a model folder or an ONNX file, and what changed against the source it came from."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from growkit.errors import GrowkitError
from growkit.settings import Loading
from growkit.train.settings import FitSettings
from growkit_cli.console import Console
from growkit_cli.options import AsJson, Device, ModelOrFile, NeededData, Run, with_loading, with_settings
from growkit_cli.progress import telling
from growkit_cli.typed import command_line

if TYPE_CHECKING:
    from growkit.record import RunFolder


@with_loading
@with_settings(FitSettings, only=("batch_size", "workers", "precision", "data_dir", "dataset_download", "val_split"))
def evaluate(
    data: NeededData,
    settings: FitSettings,
    loading: Loading,
    model: ModelOrFile = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            help="Source to compare the model with, image by image: a folder, a checkpoint, timm:NAME, "
            "hf-hub:OWNER/NAME or an .onnx.",
            show_default=False,
        ),
    ] = None,
    device: Device = "auto",
    run: Run = Path("run"),
    as_json: AsJson = False,
) -> None:
    """Score a model or an .onnx file on the validation images.

    With --against it also tells which answers changed: turned wrong, turned right, class by class. If the model lies in
    the run folder, this is added to the run's record and RUN/report.html.

    Example: growkit evaluate --data images/ --against deit_small.pth
    """
    from growkit.record import RunFolder

    console = Console(as_json)
    folder = RunFolder(run, command_line=command_line())
    path = model or folder.furthest()
    files = all(Path(name).suffix == ".onnx" for name in (path, against or path))
    if files and (loading != Loading() or settings.precision != FitSettings.precision):
        raise GrowkitError(f"{path} is an ONNX file: leave out --from, --from-set, --no-ema and --precision")
    if against is None:
        _alone(console, path, data, settings, loading, device)
    else:
        _against(console, folder, path, against, data, settings, loading, device)


def _alone(console: Console, path: Path, data: str, settings: FitSettings, loading: Loading, device: str) -> None:
    from dataclasses import asdict

    from growkit.evaluation import evaluate_model, evaluate_onnx
    from growkit.source import load_source

    console.say(f"evaluating {path}")
    with telling(console) as tell:
        progress = tell("evaluating")
        if path.suffix == ".onnx":
            scores = evaluate_onnx(path, data, settings, device=device, progress=progress)
        else:
            loaded = load_source(str(path), loading, say=console.say)
            scores = evaluate_model(loaded, data, settings, device=device, progress=progress)
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


def _against(
    console: Console,
    folder: "RunFolder",
    path: Path,
    against: str,
    data: str,
    settings: FitSettings,
    loading: Loading,
    device: str,
) -> None:
    from dataclasses import asdict

    from growkit.evaluation import evaluate_against
    from growkit.report.behaviour import agreement_sections
    from growkit.report.page import write_report
    from growkit.report.run import run_report

    console.say(f"evaluating {path} against {against}")
    with telling(console) as tell:
        found, recorded = evaluate_against(
            folder,
            str(path),
            against,
            data,
            settings,
            loading=loading,
            device=device,
            say=console.say,
            progress=tell("evaluating"),
        )
    content = asdict(found)
    for section in agreement_sections(content):
        if section.table is not None:
            console.table(section.title, section.table.columns, section.table.rows)
        for line in section.text.splitlines():
            console.say(line)
    if recorded:
        write_report(folder.report, run_report(folder))
        console.say(f"recorded in {folder.record}; report: {folder.report}")
    else:
        console.say(f"not recorded: {path} is not in {folder.path}/")
    console.result({"model": path, "against": against, "data": data, "recorded": recorded, **content})
