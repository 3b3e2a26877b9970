"""growkit verify: the gate that CI runs before a file is served."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from growkit.deploy.settings import VerifySettings
from growkit.train.settings import FitSettings
from growkit_cli.console import Console
from growkit_cli.options import AsJson, Data, From, FromSets, Model, Run, with_settings

if TYPE_CHECKING:
    from growkit.deploy.verify import Verification


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
            help="Folder with test_data_set_*; the ONNX file's own when left out.",
            show_default=False,
        ),
    ] = None,
    data: Data = None,
    data_dir: Annotated[str, typer.Option(help="Folder with the files of a timm dataset.")] = FitSettings.data_dir,
    val_split: Annotated[str, typer.Option(help="Split of a timm dataset.")] = FitSettings.val_split,
    batch_size: Annotated[int, typer.Option(help="Images per batch of --data.")] = FitSettings.batch_size,
    workers: Annotated[int, typer.Option(help="Processes that read images.")] = FitSettings.workers,
    strict: Annotated[bool, typer.Option("--strict", help="Fail too when the machine was too noisy to tell.")] = False,
    junit: Annotated[Path | None, typer.Option(help="Write the checks as JUnit XML.", show_default=False)] = None,
    from_: From = None,
    from_sets: FromSets = None,
    run: Run = Path("run"),
    as_json: AsJson = False,
) -> None:
    """Check that an ONNX file answers like its model, and as fast as the architecture allows.

    Writes RUN/verify/report.json anew; where answers differ, reproduce.py beside it shows it again.
    Exit status: 0 passed, 1 a check said no.

    Example: growkit verify --data imagenet/ --max-latency-ratio 1.0 --junit junit.xml
    """
    from dataclasses import asdict

    from growkit.deploy.junit import junit_xml
    from growkit.deploy.verify import batches_timed, verify_onnx
    from growkit.errors import GrowkitError
    from growkit.files import whole_file, write_json
    from growkit.record import RunFolder
    from growkit.source import load_source

    console = Console(as_json)
    folder = RunFolder(run)
    folder.refuse_unusable()
    chosen = model or folder.furthest()
    file = onnx_file or folder.onnx / "model.onnx"
    if not file.is_file():
        raise GrowkitError(f"{file}: no such file; `growkit export --onnx` writes it")
    console.say(f"verifying {file} against {chosen}")
    source = load_source(str(chosen), from_, from_sets or ())
    for note in source.notes:
        console.say(note)
    network = source.model()
    if reference is None and (file.parent / "test_data_set_0").is_dir():
        reference = file.parent
    batches = None
    if data is not None:
        from growkit.deploy.store import form_in
        from growkit.pipeline import labelled
        from growkit.train.data import val_batches

        reading = FitSettings(batch_size=batch_size, workers=workers, data_dir=data_dir, val_split=val_split)
        batches = val_batches(labelled(data, source, reading, image_size=form_in(file).image_size), reading)
    console.say("comparing answers" + (", then times" if settings.latency else ""))
    with console.progress("latency") as bar:
        total = 3 * len(batches_timed(settings))
        verified = verify_onnx(
            network,
            file,
            settings,
            stock=(source.architecture.name, source.architecture.arguments),
            weights_sha256=source.sha256 or None,
            labels=source.labels,
            reference=reference,
            data=batches,
            progress=lambda done, note: bar(total).update(done, note),
        )
    leave_script(console, verified, folder.verify, str(chosen), file, settings, reference, from_, from_sets)
    show(console, verified)
    report = {"model": str(chosen), "onnx": str(file), **verified.report}
    write_json(folder.verify / "report.json", report)
    if junit is not None:
        with whole_file(junit) as partial:
            partial.write_text(junit_xml(verified.checks, suite="growkit verify"), encoding="utf-8")
    folder.add(
        "verify",
        options={"model": str(chosen), "onnx": str(file), "data": data, **asdict(settings)},
        figures={
            "verdict": verified.verdict,
            "failed": [c.line for c in verified.checks if c.verdict == "fail"],
            "numerics": verified.report["numerics"],
            "latency": verified.report["latency"],
        },
        hashes={"weights": source.sha256, "model.onnx": verified.report["onnx_sha256"]},
    )
    console.result(report)
    if verified.verdict == "fail" or (strict and verified.verdict == "inconclusive"):
        raise typer.Exit(1)


def leave_script(
    console: Console,
    verified: "Verification",
    folder: Path,
    model: str,
    file: Path,
    settings: VerifySettings,
    reference: Path | None,
    from_: str | None,
    sets: list[str] | None,
) -> None:
    """Write reproduce.py into `folder` where answers differ; one of an earlier run goes."""
    from growkit.deploy.reproduce import reproduction
    from growkit.files import whole_file

    script = folder / "reproduce.py"
    script.unlink(missing_ok=True)
    if verified.parity.passed:
        return
    text = reproduction(
        verified.parity,
        folder,
        model=model,
        file=file,
        settings=settings,
        reference=reference,
        from_=from_,
        sets=sets or (),
    )
    with whole_file(script) as partial:
        partial.write_text(text, encoding="utf-8")
    console.say(f"python {script} shows it again")


def show(console: Console, verified: "Verification") -> None:
    """The checks and the times as tables, what went wrong as lines, and the verdict last."""
    from growkit.deploy.checks import shown

    for group in dict.fromkeys(c.group for c in verified.checks):
        console.table(
            group,
            ("check", "measured", "allowed", "verdict"),
            [
                (c.name, _short(shown(c.measured)), _short(shown(c.limit)), c.verdict)
                for c in verified.checks
                if c.group == group
            ],
        )
    if verified.latency:
        console.table(
            f"times in ms on {verified.latency.provider}, {verified.latency.threads} threads",
            ("file against", "batch", "ratio", "low", "high", "p50", "p99", "its p50"),
            [
                (
                    c.baseline,
                    c.batch,
                    f"{c.ratio:.3f}",
                    f"{c.low:.3f}",
                    f"{c.high:.3f}",
                    f"{c.subject_ms.p50:.3g}",
                    f"{c.subject_ms.p99:.3g}",
                    f"{c.baseline_ms.p50:.3g}",
                )
                for c in verified.latency.comparisons
            ],
        )
    for c in verified.checks:
        if c.verdict != "pass":
            word = "FAILED" if c.verdict == "fail" else "warning:"
            console.say(f"{word} {c.group}: {c.line}")
    if not verified.latency and verified.verdict == "fail":
        console.say("latency was not measured: the answers come first")
    console.say(f"verdict: {verified.verdict}")


def _short(text: str) -> str:
    """Long values are in report.json; the line of a failed check quotes them."""
    return text if len(text) <= 14 else text[:13] + "…"
