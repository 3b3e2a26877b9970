"""growkit verify: the gate that CI runs before a file is served."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from growkit.deploy.settings import VerifySettings
from growkit.errors import GrowkitError
from growkit.settings import Loading
from growkit.train.settings import FitSettings
from growkit.unmeant import READING
from growkit_cli.console import Console
from growkit_cli.options import AsJson, Data, ModelOrFile, Run, with_loading, with_settings
from growkit_cli.progress import telling
from growkit_cli.typed import command_line
from growkit_cli.verified import not_written, show

if TYPE_CHECKING:
    from growkit.record import RunFolder


@with_loading
@with_settings(VerifySettings)
@with_settings(FitSettings, name="reading", only=READING)
def verify(
    settings: VerifySettings,
    reading: FitSettings,
    loading: Loading,
    model: ModelOrFile = None,
    onnx_file: Annotated[
        Path | None,
        typer.Option(help="ONNX file; RUN/onnx/model.onnx when left out.", show_default=False),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Folder that --update-reference wrote; what is verified must answer like it.",
            show_default=False,
        ),
    ] = None,
    update_reference: Annotated[
        bool,
        typer.Option(
            "--update-reference",
            help="Write what is verified as the reference instead: --reference DIR, or RUN/reference/ by stage.",
        ),
    ] = False,
    model_only: Annotated[
        bool, typer.Option("--model-only", help="Compare the model alone with the reference; no ONNX file is used.")
    ] = False,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of your own pictures, compared beside the generated ones.", show_default=False),
    ] = None,
    data: Data = None,
    strict: Annotated[bool, typer.Option("--strict", help="Also fail what noise or lack of data leaves open.")] = False,
    junit: Annotated[Path | None, typer.Option(help="Write the checks as JUnit XML.", show_default=False)] = None,
    run: Run = Path("run"),
    as_json: AsJson = False,
) -> None:
    """Check that an ONNX file answers like its model, and as fast.

    MODEL may be an .onnx file: it is then only compared with --reference.

    Rewrites RUN/verify/report.json, or held-model.json or held-file.json if one alone is compared with --reference;
    if answers differ, reproduce.py beside it reproduces that. If the file is not the run's own, or was exported
    from another model, all this goes into RUN/verify/other, which the run's report leaves out.

    Exit status: 0 passed, 1 a check said no or --update-reference wrote none, 2 bad usage or input.

    Example: growkit verify --data imagenet/ --max-latency-ratio 1.0 --junit junit.xml
    """
    from functools import partial

    from growkit.record import RunFolder
    from growkit.verifying import Evidence, Reference, verify_run

    console = Console(as_json)
    folder = RunFolder(run, command_line=command_line())
    chosen = model or folder.furthest()
    file = file_of(chosen, folder, onnx_file, model_only=model_only, more=bool(data or images), update=update_reference)
    alone = chosen == file
    if update_reference:
        reference = reference or reference_of(chosen, folder, model_only=model_only)
    against = reference if alone else chosen
    console.say(f"verifying {file or chosen}" + (f" against {against}" if file and against else ""))
    with console.working("verifying"), telling(console) as tell:
        verified = verify_run(
            folder,
            settings,
            None if alone else str(chosen),
            file,
            loading=loading,
            reference=Reference(folder=reference, update=update_reference) if reference else None,
            evidence=Evidence(data=data, reading=reading, pictures=images),
            junit=junit,
            say=console.say,
            tell=tell,
            show=partial(show, console),
        )
    told = verified.report.get("reference_update")
    if update_reference:
        console.say(f"{told}; hold it with --reference {reference}" if told else not_written(reference, verified))
    console.result(verified.report)
    unwritten = update_reference and not told
    if verified.verdict == "fail" or unwritten or (strict and verified.verdict == "inconclusive"):
        raise typer.Exit(1)


def file_of(
    chosen: Path, run: "RunFolder", onnx_file: Path | None, *, model_only: bool, more: bool, update: bool
) -> Path | None:
    """The ONNX file to verify: `chosen` if it is one, none with --model-only; `more` needs model and file.

    Raises:
        GrowkitError: incompatible options.
    """
    if chosen.suffix == ".onnx":
        if onnx_file or model_only or more or update:
            raise GrowkitError(
                f"{chosen}: an .onnx file alone is only held against --reference; for more name its model: "
                f"growkit verify MODEL --onnx-file {chosen}"
            )
        return chosen
    if not model_only:
        return onnx_file or run.onnx_file
    if onnx_file or more:
        raise GrowkitError("--model-only leaves the ONNX file, --data and --images out; drop one of them")
    return None


def reference_of(chosen: Path, run: "RunFolder", *, model_only: bool) -> Path:
    """Default folder of a reference: named after the model's stage, or onnx for a file."""
    stage = (chosen.stem if chosen.is_file() else chosen.resolve().name).replace(":", "-")
    return run.path / "reference" / (stage if model_only else "onnx")
