"""growkit export: an ONNX file that is checked before it appears."""

from pathlib import Path
from typing import Annotated

import typer

from growkit.deploy.settings import ExportSettings, TritonSettings
from growkit.errors import GrowkitError
from growkit.files import without_folders
from growkit.train.settings import FitSettings
from growkit_cli.console import Console
from growkit_cli.loading import load
from growkit_cli.options import AsJson, Data, Force, From, FromSets, Model, NoEma, Run, with_settings
from growkit_cli.typed import command_line

CALIBRATION = 256  # images that int8-static takes its ranges from


@with_settings(ExportSettings)
@with_settings(TritonSettings, name="serving", prefix="triton_", panel="Model repository, with --triton")
def export(
    settings: ExportSettings,
    serving: TritonSettings,
    model: Model = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write ONNX, the one format so far.")] = True,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder to write; RUN/onnx when left out."),
    ] = None,
    triton: Annotated[
        Path | None, typer.Option("--triton", help="Triton model repository to write the file into, too.")
    ] = None,
    data: Data = None,
    data_dir: Annotated[str, typer.Option(help="Folder with the files of a timm dataset.")] = FitSettings.data_dir,
    val_split: Annotated[
        str, typer.Option(help="Split of a timm dataset, or folder beside train/.")
    ] = FitSettings.val_split,
    from_: From = None,
    from_sets: FromSets = None,
    no_ema: NoEma = False,
    run: Run = Path("run"),
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write a model as ONNX, with reference inputs and outputs beside it.

    The finished file is held against PyTorch first: one that answers differently never appears. With --data its
    accuracy is held against the model's, too, and int8-static takes its ranges from the training images.

    With --triton it goes into a model repository too, checked against Triton's published schema.

    Example: growkit export --onnx --precision int8 --data images/
    """
    from dataclasses import asdict, replace

    from growkit.deploy.folder import write_export
    from growkit.deploy.limits import LIMITS
    from growkit.deploy.outputs import refuse_answers
    from growkit.files import refuse_existing, refuse_unwritable, whole_folder
    from growkit.record import RunFolder

    console = Console(as_json)
    folder = RunFolder(run, command_line=command_line())
    folder.refuse_unusable()
    chosen = model or folder.furthest()
    target = out or folder.onnx
    if target.resolve() == Path.cwd():
        raise GrowkitError(f"--out {target}: the folder you stand in cannot be replaced; name another")
    refuse_unwritable(target.absolute().parent)
    refuse_existing(target, force, "export.json", elsewhere="--out writes elsewhere")
    if settings.max_accuracy_drop is not None and data is None:
        raise GrowkitError("--max-accuracy-drop is judged on labelled images: give --data")
    if triton is None and serving != TritonSettings():
        raise GrowkitError("the --triton-... options describe a model repository: give --triton DIR")
    if triton is not None and triton.resolve().is_relative_to(target.resolve()):
        raise GrowkitError(f"--triton {triton}: {target} is replaced whole by the next export; name one outside it")
    console.say(f"exporting {chosen}")
    source = load(console, str(chosen), from_, from_sets, ema=not no_ema)
    refuse_answers(settings.form(), source.architecture.classes)
    if triton:
        from growkit.deploy.triton import refuse_taken

        serving = replace(serving, name=serving.name or source.architecture.name)
        refuse_taken(triton, str(serving.name), serving, force)
    calibration = batches = None
    if data is not None:
        from growkit.evaluation import prepared_for, refuse_unjudgeable
        from growkit.train.batches import unaugmented, val_batches

        reading = FitSettings(data_dir=data_dir, val_split=val_split)
        opened = prepared_for(source, data, reading, image_size=settings.image_size)
        calibrates = settings.precision == "int8-static"
        try:
            refuse_unjudgeable(source, data, opened.classes)
            batches = val_batches(opened, reading)
        except GrowkitError as error:
            if not calibrates or settings.max_accuracy_drop is not None:
                raise
            console.say(f"accuracy is not judged: {error}")  # ranges need no labels
        if calibrates:
            calibration = unaugmented(opened, CALIBRATION, seed=settings.seed).numpy()
    elif settings.precision == "int8-static":
        raise GrowkitError("--precision int8-static takes its ranges from images: give --data, or use --precision int8")
    provenance = {
        "weights_sha256": source.sha256 or None,
        "architecture": source.architecture.name,
        "arguments": source.architecture.arguments,
        "history": without_folders(source.history),
    }
    with console.working("exporting"), whole_folder(target) as partial:
        exported = write_export(
            source.model(),
            partial,
            settings,
            labels=source.labels,
            provenance=provenance,
            calibration=calibration,
            data=batches,
            say=console.say,
        )
        console.result(exported.content)
        if not exported.parity.passed:
            for check in exported.parity.failed:
                console.say(f"FAILED {check.group}: {check.line}")
            console.say(f"{target} was not written: the file does not answer like the model")
            raise typer.Exit(1)
    made = exported.export
    figures = exported.parity.figures
    for choice in exported.choices:
        console.say(f"{choice.attention} attention: {choice.verdict}; {choice.why}")
    console.say(
        f"wrote {target / 'model.onnx'}: {made.form.precision}, {made.bytes / 1e6:.1f} MB, opset {made.opset}, "
        f"IR {made.ir}, {made.nodes} nodes" + (f", weights in {made.files[1]}" if made.files[1:] else "")
    )
    worst = max(batch["relative_rms"] for batch in figures["batches"].values())
    allowed = LIMITS[made.form.precision].relative_rms
    console.say(
        f"it answers like PyTorch: relative error {worst:.1e} (allowed {allowed:g}), "
        f"{figures['noise_ratio']:.2f} x PyTorch's own, {len(exported.parity.checks)} checks passed"
    )
    if "accuracy" in figures:
        scores = figures["accuracy"]
        console.say(
            f"top-1 {scores['top1']:.2%} against PyTorch's {scores['torch_top1']:.2%} on {scores['samples']} images"
        )
    elif made.form.precision != "fp32" and data is None:
        console.say("what that does to accuracy was not looked at: give --data, here or to `growkit verify`")
    folder.add(
        "export",
        options={
            "model": str(chosen),
            "out": str(target),
            "data": data,
            **asdict(settings),
            "triton": {"repository": str(triton), **asdict(serving)} if triton else None,
        },
        figures={"bytes": made.bytes, "nodes": made.nodes, "parity": figures},
        hashes={"weights": source.sha256, "model.onnx": made.sha256},
    )
    if triton:
        serve_by_triton(console, target, triton, serving, force)


def serve_by_triton(console: Console, target: Path, repository: Path, serving: TritonSettings, force: bool) -> None:
    """Write the exported folder into a model repository; the folder stays whatever becomes of it."""
    from growkit.deploy.triton import write_model_repository

    try:
        model = write_model_repository(target, repository, serving, force=force)
    except (GrowkitError, OSError) as error:
        raise GrowkitError(f"{target} was written, the model repository was not: {error}") from error
    kept = "" if model.configured else "; config.pbtxt was kept as it is"
    console.say(f"wrote {model.folder / str(model.version)}: a model repository for Triton and KServe{kept}")
