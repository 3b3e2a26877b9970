"""growkit report: a whole run as one page."""

from pathlib import Path
from typing import Annotated

import typer

from growkit_cli.console import Console
from growkit_cli.options import AsJson, Run


def report(
    run: Run = Path("run"),
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Page to write; RUN/report.html when left out.", show_default=False),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 unless the answer to 'may it ship?' is yes.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write one page about a run: may it ship, what each step did.

    The page is made from the run folder alone, rewritten each time, and needs neither network nor scripts.

    Example: growkit report --run run
    """
    from dataclasses import asdict

    from growkit.files import refuse_unwritable
    from growkit.record import RunFolder
    from growkit.report.page import write_report
    from growkit.report.run import run_report

    console = Console(as_json)
    folder = RunFolder(run)
    page = out or folder.report
    refuse_unwritable(page, suffix=".html")
    made = run_report(folder)
    write_report(page, made)
    for line in made.left_out:
        console.say(f"warning: {run}: {line}")
    assert made.verdict is not None
    console.say(f"wrote {page}: may it ship? {made.verdict.mark}. {made.verdict.line}")
    console.result({"report": page, "verdict": asdict(made.verdict), "gates": [asdict(gate) for gate in made.gates]})
    if strict and made.verdict.mark != "yes":
        raise typer.Exit(1)
