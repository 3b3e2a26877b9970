"""growkit demo: the whole workflow on scikit-learn's digits, by the commands a user would type."""

from pathlib import Path
from typing import Annotated

import typer

from growkit.files import LOCK, refuse_existing, refuse_unwritable
from growkit_cli.console import Console
from growkit_cli.guard import holding
from growkit_cli.options import AsJson, Force

INTERRUPTED = (130, 143)
RUNS = ("run", "from-scratch")
OWN = ("digits", *RUNS, "report.html")  # names that the demo writes in its folder


def demo(
    out: Annotated[Path, typer.Argument(help="Folder to write.")] = Path("growkit-demo"),
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Go the whole way on digits, in about two minutes.

    A small ViT is trained, grown, fine-tuned, exported and verified, and a report is written.

    Example: growkit demo
    """
    import shutil

    console = Console(as_json)
    writes = ("digits/*/[0-9]/*.png", *(f"{run}/**" for run in RUNS), "report.html")
    refuse_existing(out, force, "digits", LOCK, writes=writes, elsewhere="name another folder")
    refuse_unwritable(out)
    with holding(out):
        for run in filter(Path.is_dir, (out / name for name in RUNS)):
            with holding(run):  # remove nothing while a command is using one of them
                pass
        for old in (out / name for name in OWN):
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
            else:
                old.unlink(missing_ok=True)
        _demo(console, out)


def _demo(console: Console, out: Path) -> None:
    import shlex
    import sys
    import time
    from contextlib import nullcontext, redirect_stdout

    from growkit.demo import (
        AUGMENTATION,
        COLUMNS,
        INPUT,
        LARGE,
        SMALL,
        comparison,
        demo_report,
        equal_compute,
        write_digits,
    )
    from growkit.record import RunFolder
    from growkit.report.page import write_report
    from growkit_cli.main import app

    began = time.perf_counter()
    run, baseline = RunFolder(out / "run"), RunFolder(out / "from-scratch")
    digits = str(out / "digits")
    console.say(f"{write_digits(out / 'digits')} digits, 8 x 8 pixels, in {digits}")

    def growkit(*arguments: str) -> None:
        console.say("")
        console.say(f"$ growkit {shlex.join(arguments)}")
        # the commands' output is for people, so it goes to stderr too
        with redirect_stdout(sys.stderr) if console.as_json else nullcontext():
            status = app([*arguments], standalone_mode=False)
        if status in INTERRUPTED:
            raise typer.Exit(status)

    here = ("--run", str(run.path))
    data = ("--data", digits)
    growkit("train", "deit_tiny", *INPUT, *SMALL, *data, "--epochs", "30", "--lr", "2e-3", *AUGMENTATION, *here)
    growkit("plan", str(run.trained), "--to", "deit_tiny", *LARGE)
    growkit("grow", str(run.trained), "--to", "deit_tiny", *LARGE, "--rank", "2", *data, *AUGMENTATION, *here)
    growkit("finetune", *data, "--epochs", "12", *AUGMENTATION, *here)
    growkit("export", "--onnx", *here)
    growkit("evaluate", *data, "--against", str(run.trained), "--workers", "0", *here)
    growkit("verify", *data, "--latency-seconds", "2", "--workers", "0", *here)
    console.say("")
    console.say("The same bigger model from scratch, for the same compute:")
    steps = str(equal_compute(run))
    beside = ("--run", str(baseline.path))
    growkit("train", "deit_tiny", *INPUT, *LARGE, *data, "--steps", steps, "--lr", "2e-3", *AUGMENTATION, *beside)

    rows, _ = comparison(run, baseline)
    told = [(name, f"{top1:.1%}", f"{loss:.4f}", f"{tflop:.3f}") for name, top1, loss, tflop in rows]
    console.table("what growing gave, on the validation images", COLUMNS, told)
    write_report(out / "report.html", demo_report(run, baseline))
    console.say(f"report: {out / 'report.html'} ({time.perf_counter() - began:.0f} s in all)")
    console.result(
        {
            "report": out / "report.html",
            "models": [dict(zip(COLUMNS, row, strict=True)) for row in rows],
        }
    )
