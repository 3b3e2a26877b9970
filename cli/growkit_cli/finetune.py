"""growkit finetune: train a grown model on."""

from pathlib import Path

from growkit.settings import FINETUNE_DEFAULTS
from growkit.train.settings import AUTO, FitSettings
from growkit_cli.console import Console
from growkit_cli.loading import load
from growkit_cli.options import (
    AsJson,
    Device,
    Force,
    From,
    FromSets,
    Model,
    NeededData,
    NoEma,
    Resume,
    Run,
    with_settings,
)
from growkit_cli.processes import on_processes
from growkit_cli.progress import ended, tell_trained, telling
from growkit_cli.typed import command_line


@with_settings(FitSettings, auto={"batch_size": AUTO}, **FINETUNE_DEFAULTS)
@on_processes
def finetune(
    data: NeededData,
    settings: FitSettings,
    model: Model = None,
    from_: From = None,
    from_sets: FromSets = None,
    no_ema: NoEma = False,
    device: Device = "auto",
    run: Run = Path("run"),
    force: Force = False,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Train a grown model on; the best by validation is kept, and the last to resume from.

    Example: growkit finetune --data images/ --epochs 20
    """
    from growkit.pipeline import finetune_model
    from growkit.record import RunFolder
    from growkit.train.distributed import leads

    console = Console(as_json, quiet=not leads())
    folder = RunFolder(run, command_line=command_line())
    path = str(model or folder.startable())
    console.say(f"fine-tuning {path}")
    loaded = load(console, path, from_, from_sets, ema=not no_ema)
    with telling(console) as tell:
        trained = finetune_model(
            folder,
            loaded,
            data,
            settings,
            device=device,
            force=force,
            resume=resume,
            say=console.say,
            tell=tell,
        )
    tell_trained(console, trained)
    ended(console, trained.fitted)
