"""growkit grow: a bigger model from a small one."""

from pathlib import Path

from growkit.settings import OPERATOR_DEFAULTS, GrowSettings, Loading
from growkit.train.settings import AUTO, FitSettings
from growkit_cli.console import Console
from growkit_cli.options import (
    AsJson,
    Data,
    Device,
    Force,
    Resume,
    Run,
    Sets,
    SourceArgument,
    To,
    with_loading,
    with_settings,
)
from growkit_cli.processes import on_processes
from growkit_cli.progress import ended, telling
from growkit_cli.typed import command_line


@with_loading
@with_settings(GrowSettings)
@with_settings(
    FitSettings,
    name="operator",
    panel="Operator training, with --data",
    skip=("seed", "epochs", "model_ema", "model_ema_decay"),
    docs={
        "steps": "Updates of operator training.",
        "shard": "Refused: every process holds the whole target to run it, and the operator is small.",
    },
    auto={"batch_size": AUTO},
    **OPERATOR_DEFAULTS,
)
@on_processes
def grow(
    source: SourceArgument,
    to: To,
    settings: GrowSettings,
    operator: FitSettings,
    loading: Loading,
    sets: Sets = None,
    data: Data = None,
    device: Device = "auto",
    run: Run = Path("run"),
    force: Force = False,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Grow a small trained transformer into a bigger one.

    The weights are made from the source's alone; with --data, learned methods (mango, ligo) then train their operator.
    Whether the grown model starts out answering like the source depends on --method; `growkit plan` says so.

    Example: growkit grow deit_small.pth --to deit_base --rank 4
    """
    from dataclasses import asdict

    from growkit.growing import grow_model
    from growkit.job import Job
    from growkit.record import RunFolder
    from growkit.source import load_source
    from growkit.train.distributed import leads

    console = Console(as_json, quiet=not leads())
    loaded = load_source(source, loading, say=console.say)
    with telling(console) as tell:
        job = Job(RunFolder(run, command_line=command_line()), device, force, resume, console.say, tell)
        grown = grow_model(job, loaded, to, settings, sets=sets or (), data=data, operator=operator)
    console.say(
        f"wrote {grown.folder}: {grown.target.name}, {grown.parameters / 1e6:.1f} M parameters"
        + (f" from an operator of {grown.operator_parameters / 1e6:.2f} M" if grown.operator_parameters else "")
    )
    console.result(
        {
            "folder": grown.folder,
            "source": {
                "path": source,
                "sha256": loaded.sha256,
                "architecture": loaded.architecture.name,
            },
            "target": {"architecture": grown.target.name, "arguments": grown.target.arguments},
            "step0_gap": grown.gap,
            "parameters": grown.parameters,
            "operator_parameters": grown.operator_parameters,
            "losses": grown.operator.losses if grown.operator else None,
            "scores": {name: asdict(found) for name, found in grown.scores.items()} if grown.scores else None,
        }
    )
    ended(console, grown.operator)
