"""growkit finetune: fine-tune a grown model."""

from pathlib import Path

from growkit.settings import FINETUNE_DEFAULTS, Loading
from growkit.train.settings import AUTO, FitSettings
from growkit_cli.console import Console
from growkit_cli.options import (
    AsJson,
    Device,
    Force,
    NeededData,
    Resume,
    Run,
    Start,
    with_loading,
    with_settings,
)
from growkit_cli.processes import on_processes
from growkit_cli.progress import ended, tell_trained, telling
from growkit_cli.typed import command_line


@with_loading
@with_settings(FitSettings, auto={"batch_size": AUTO}, **FINETUNE_DEFAULTS)
@on_processes
def finetune(
    data: NeededData,
    settings: FitSettings,
    loading: Loading,
    model: Start = None,
    device: Device = "auto",
    run: Run = Path("run"),
    force: Force = False,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a grown model.

    The best weights by validation are kept, and the last ones to resume from.

    Example: growkit finetune --data images/ --epochs 20
    """
    from growkit.fitting import finetune_model
    from growkit.job import Job
    from growkit.record import RunFolder
    from growkit.source import load_source
    from growkit.train.distributed import leads

    console = Console(as_json, quiet=not leads())
    folder = RunFolder(run, command_line=command_line())
    path = str(model or folder.startable())
    console.say(f"fine-tuning {path}")
    loaded = load_source(path, loading, say=console.say)
    with telling(console) as tell:
        job = Job(folder, device, force, resume, console.say, tell)
        trained = finetune_model(job, loaded, data, settings)
    tell_trained(console, trained)
    ended(console, trained.fitted)
