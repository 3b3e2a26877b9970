"""growkit train: train a model from scratch, as a source for experiments or as the baseline."""

from pathlib import Path
from typing import Annotated

import typer

from growkit.train.settings import AUTO, FitSettings
from growkit_cli.console import Console
from growkit_cli.options import AsJson, Device, Force, NeededData, Resume, Run, Sets, with_settings
from growkit_cli.processes import on_processes
from growkit_cli.progress import ended, tell_trained, telling
from growkit_cli.typed import command_line


@with_settings(FitSettings, auto={"batch_size": AUTO})
@on_processes
def train(
    architecture: Annotated[str, typer.Argument(help="A timm name or a short one, such as deit_tiny.")],
    data: NeededData,
    settings: FitSettings,
    sets: Sets = None,
    device: Device = "auto",
    run: Run = Path("run"),
    force: Force = False,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Train a model from scratch, as a source or to compare with.

    Example: growkit train deit_tiny --set img_size=32 --set patch_size=4 --data images/
    """
    from growkit.fitting import train_model
    from growkit.job import Job
    from growkit.record import RunFolder
    from growkit.train.distributed import leads

    console = Console(as_json, quiet=not leads())
    with telling(console) as tell:
        job = Job(RunFolder(run, command_line=command_line()), device, force, resume, console.say, tell)
        trained = train_model(job, architecture, data, settings, sets=sets or ())
    tell_trained(console, trained)
    ended(console, trained.fitted)
