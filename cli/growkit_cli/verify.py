"""growkit verify: the gate that CI runs before a file is served."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from growkit.deploy.settings import VerifySettings
from growkit.errors import GrowkitError
from growkit.train.settings import FitSettings
from growkit_cli.console import Console
from growkit_cli.loading import load
from growkit_cli.options import AsJson, Data, From, FromSets, Model, NoEma, Run, with_settings
from growkit_cli.typed import command_line
from growkit_cli.verified import show

if TYPE_CHECKING:
    from growkit.deploy.golden import Golden
    from growkit.deploy.verify import Verification
    from growkit.record import RunFolder
    from growkit.source import Source


@with_settings(VerifySettings)
def verify(
    settings: VerifySettings,
    model: Model = None,
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
        bool, typer.Option("--model-only", help="Hold the model against the reference; no ONNX file is looked for.")
    ] = False,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder with pictures of yours, compared beside the made ones.", show_default=False),
    ] = None,
    data: Data = None,
    data_dir: Annotated[str, typer.Option(help="Folder with the files of a timm dataset.")] = FitSettings.data_dir,
    val_split: Annotated[
        str, typer.Option(help="Split of a timm dataset, or folder beside train/.")
    ] = FitSettings.val_split,
    batch_size: Annotated[int, typer.Option(help="Images per batch of --data.")] = FitSettings.batch_size,
    workers: Annotated[int, typer.Option(help="Processes that read images.")] = FitSettings.workers,
    strict: Annotated[bool, typer.Option("--strict", help="Fail too what noise or lack of data leaves open.")] = False,
    junit: Annotated[Path | None, typer.Option(help="Write the checks as JUnit XML.", show_default=False)] = None,
    from_: From = None,
    from_sets: FromSets = None,
    no_ema: NoEma = False,
    run: Run = Path("run"),
    as_json: AsJson = False,
) -> None:
    """Check that an ONNX file answers like its model, and as fast as the architecture allows.

    MODEL may be an .onnx file: it is then held against --reference alone.

    Writes RUN/verify/report.json anew, or held-model.json or held-file.json where one alone is held against
    --reference; where answers differ, reproduce.py beside it shows it again.
    Exit status: 0 passed, 1 a check said no, 2 bad usage or input.

    Example: growkit verify --data imagenet/ --max-latency-ratio 1.0 --junit junit.xml
    """
    import time
    from dataclasses import asdict, replace
    from datetime import UTC, datetime

    from growkit.deploy.golden import make_golden, read_golden, refuse_unreplaceable
    from growkit.deploy.held import update_golden
    from growkit.deploy.junit import junit_xml
    from growkit.deploy.subject import model_subject, onnx_subject
    from growkit.deploy.verify import verify_alone
    from growkit.files import refuse_unwritable, whole_file, write_json
    from growkit.record import RunFolder

    console = Console(as_json)
    started, clock = datetime.now(UTC), time.monotonic()
    folder = RunFolder(run, command_line=command_line())
    folder.refuse_unusable()
    if junit is not None:
        refuse_unwritable(junit, suffix=".xml")
    if settings.max_accuracy_drop is not None and data is None:
        raise GrowkitError("--max-accuracy-drop is judged on labelled images: give --data")
    if settings.max_latency_ratio is not None and not settings.latency:
        raise GrowkitError("--max-latency-ratio is judged by timing: leave out --no-latency")
    chosen = model or folder.furthest()
    file = file_of(chosen, folder, onnx_file, model_only=model_only, more=bool(data or images), update=update_reference)
    file_only = chosen.suffix == ".onnx"
    golden = target = source = subject = None
    if update_reference:
        target = reference or reference_of(chosen, folder, model_only=model_only)
        refuse_unreplaceable(target)
        settings = replace(settings, latency=False)  # a reference holds no times
    elif reference is not None:
        golden = read_golden(reference)
    elif model_only or file_only:
        raise GrowkitError(f"nothing to hold {chosen} against; name --reference DIR, which --update-reference writes")
    if file is not None and not file.is_file():
        raise GrowkitError(f"{file}: no such file; `growkit export --onnx` writes it")
    against = reference if file_only else chosen
    console.say(f"verifying {file or chosen}" + (f" against {against}" if file else ""))
    if not file_only:
        source = load(console, str(chosen), from_, from_sets, ema=not no_ema)
    if source is None:
        assert golden is not None  # refused above
        verified = verify_alone(chosen, golden, settings)
    elif file is None:
        name = source.architecture.name
        subject = model_subject(source.model(), weights_sha256=source.sha256 or None, architecture=name)
        golden = golden or make_golden(subject, seed=settings.seed)
        verified = verify_alone(subject, golden, settings)
    else:
        reading = FitSettings(batch_size=batch_size, workers=workers, data_dir=data_dir, val_split=val_split)
        verified = with_file(console, source, file, settings, golden=golden, images=images, data=data, reading=reading)
    if whole := file is not None and source is not None:
        assert file is not None
        leave_script(console, verified, folder.verify, str(chosen), file, settings, from_, from_sets, not no_ema)
    show(console, verified)
    report = {
        "model": str(chosen) if source else None,
        "onnx": str(file) if file else None,
        "reference": str(reference or target) if golden or target else None,
        **verified.report,
    }
    if target is not None:
        if verified.verdict == "fail":
            console.say(f"{target} was not written: only what passes becomes a reference")
        else:
            if file is not None:
                subject = onnx_subject(file, provider=verified.report["provider"]["used"])
                golden = make_golden(subject, seed=settings.seed)
            assert golden is not None
            assert subject is not None
            report["reference_update"] = update_golden(target, golden, subject)
            console.say(f"{report['reference_update']}; hold it with --reference {target}")
    write_json(folder.verify / ("report.json" if whole else "held-file.json" if file else "held-model.json"), report)
    if junit is not None:
        seconds = time.monotonic() - clock
        with whole_file(junit) as partial:
            partial.write_text(
                junit_xml(verified.checks, suite="growkit verify", started=started, seconds=seconds), encoding="utf-8"
            )
    folder.add(
        "verify",
        options={
            "model": report["model"],
            "onnx": report["onnx"],
            "data": data,
            "reference": report["reference"],
            **asdict(settings),
        },
        figures={
            "verdict": verified.verdict,
            "failed": [c.line for c in verified.checks if c.verdict == "fail"],
            "numerics": verified.report["numerics"],
            "latency": verified.report["latency"],
            "throughput": verified.report["throughput"],
        },
        hashes={
            name: sha256
            for name, sha256 in (("weights", source and source.sha256), ("model.onnx", verified.report["onnx_sha256"]))
            if sha256
        },
    )
    console.result(report)
    if verified.verdict == "fail" or (strict and verified.verdict == "inconclusive"):
        raise typer.Exit(1)


def file_of(
    chosen: Path, run: "RunFolder", onnx_file: Path | None, *, model_only: bool, more: bool, update: bool
) -> Path | None:
    """The ONNX file to verify: `chosen` where that is one, none with --model-only; `more` needs model and file.

    Raises:
        GrowkitError: options that do not go together.
    """
    if chosen.suffix == ".onnx":
        if onnx_file or model_only or more or update:
            raise GrowkitError(
                f"{chosen}: an .onnx file alone is only held against --reference; for more name its model: "
                f"growkit verify MODEL --onnx-file {chosen}"
            )
        return chosen
    if not model_only:
        return onnx_file or run.onnx / "model.onnx"
    if onnx_file or more:
        raise GrowkitError("--model-only leaves the ONNX file, --data and --images out; drop one of them")
    return None


def reference_of(chosen: Path, run: "RunFolder", *, model_only: bool) -> Path:
    """Where a reference goes that is given no folder: by the model's stage, or that of the run's file."""
    stage = chosen.resolve().name if chosen.is_dir() else chosen.stem.replace(":", "-")
    return run.path / "reference" / (stage if model_only else "onnx")


def with_file(
    console: Console,
    source: "Source",
    file: Path,
    settings: VerifySettings,
    *,
    golden: "Golden | None",
    images: Path | None,
    data: str | None,
    reading: FitSettings,
) -> "Verification":
    """The ONNX file against its model: answers, a reference, accuracy on `data`, times."""
    from growkit.deploy.inputs import read_pictures
    from growkit.deploy.store import form_in
    from growkit.deploy.truth import at_image_size, preprocessing
    from growkit.deploy.verify import timing_steps, verify_onnx

    network, form = source.model(), form_in(file)
    prepared = preprocessing(at_image_size(network, form.image_size))
    pictures = read_pictures(images, prepared) if images is not None else None
    batches = None
    if data is not None:
        from growkit.evaluation import labelled
        from growkit.train.batches import val_batches

        batches = val_batches(labelled(data, source, reading, image_size=form.image_size), reading)
    console.say("comparing answers" + (", then times" if settings.latency else ""))
    with console.working("verifying"), console.progress("latency") as bar:
        total = timing_steps(settings, form)
        return verify_onnx(
            network,
            file,
            settings,
            stock=(source.architecture.name, source.architecture.arguments),
            weights_sha256=source.sha256 or None,
            labels=source.labels,
            data_sets=data_sets_beside(file),
            golden=golden,
            data=batches,
            batch_size=reading.batch_size,
            pictures=pictures,
            progress=lambda done, note: bar(total).update(done, note),
        )


def data_sets_beside(file: Path) -> Path | None:
    """The folder of a file's own reference data, where `growkit export` left them."""
    return file.parent if (file.parent / "test_data_set_0").is_dir() else None


def leave_script(
    console: Console,
    verified: "Verification",
    folder: Path,
    model: str,
    file: Path,
    settings: VerifySettings,
    from_: str | None,
    sets: list[str] | None,
    ema: bool,
) -> None:
    """Write reproduce.py into `folder` where a file answers unlike its model; one of an earlier run goes."""
    from growkit.deploy.reproduce import reproduction
    from growkit.files import whole_file

    script = folder / "reproduce.py"
    script.unlink(missing_ok=True)
    if verified.parity is None or verified.parity.passed:
        return
    text = reproduction(
        verified.parity,
        folder,
        model=model,
        file=file,
        settings=settings,
        data_sets=data_sets_beside(file),
        from_=from_,
        sets=sets or (),
        ema=ema,
    )
    with whole_file(script) as partial:
        partial.write_text(text, encoding="utf-8")
    console.say(f"python {script} shows it again")
