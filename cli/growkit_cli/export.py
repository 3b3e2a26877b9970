"""growkit export: an ONNX file that is checked before it appears."""

from pathlib import Path
from typing import Annotated

import typer

from growkit.deploy.settings import ExportSettings, TritonSettings
from growkit.errors import GrowkitError
from growkit.settings import Loading
from growkit.train.settings import FitSettings
from growkit_cli.console import Console
from growkit_cli.options import AsJson, Data, Force, Model, Run, with_loading, with_settings
from growkit_cli.progress import telling
from growkit_cli.typed import command_line


@with_loading
@with_settings(ExportSettings)
@with_settings(TritonSettings, name="serving", prefix="triton_", panel="Model repository, with --triton")
@with_settings(FitSettings, name="reading", only=("data_dir", "val_split"))
def export(
    settings: ExportSettings,
    serving: TritonSettings,
    reading: FitSettings,
    loading: Loading,
    model: Model = None,
    onnx: Annotated[
        bool,
        typer.Option(
            "--onnx", help="Write ONNX: the only format so far, and what is written without this option, too."
        ),
    ] = True,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder to write; RUN/onnx when left out."),
    ] = None,
    triton: Annotated[
        Path | None, typer.Option("--triton", help="Triton model repository to write the file into as well.")
    ] = None,
    data: Data = None,
    run: Run = Path("run"),
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write a model as ONNX, with reference data beside it.

    The finished file is compared with PyTorch first: one that answers differently is discarded. With --data its
    accuracy is also compared with the model's, and int8-static takes its ranges from the training images.

    With --triton it also goes into a model repository, checked against Triton's published schema.

    Example: growkit export --onnx --precision int8 --data images/
    """
    from growkit.exporting import Repository, export_model
    from growkit.record import RunFolder

    console = Console(as_json)
    folder = RunFolder(run, command_line=command_line())
    chosen = model or folder.furthest()
    if triton is None and serving != TritonSettings():
        raise GrowkitError("the --triton-... options describe a model repository: give --triton DIR")
    console.say(f"exporting {chosen}")
    with console.working("exporting"), telling(console) as tell:
        exported = export_model(
            folder,
            str(chosen),
            settings,
            loading=loading,
            out=out,
            triton=Repository(folder=triton, settings=serving) if triton else None,
            data=data,
            reading=reading,
            force=force,
            say=console.say,
            tell=tell,
            show=lambda made: console.result(made.content),
        )
    if not exported.parity.passed:
        raise typer.Exit(1)
