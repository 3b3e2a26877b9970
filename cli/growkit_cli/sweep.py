"""growkit sweep: a pilot that recommends how to grow, before paying for the full run."""

from pathlib import Path

from growkit.compare.settings import SweepSettings
from growkit.settings import Loading
from growkit.train.settings import FitSettings
from growkit_cli.console import Console
from growkit_cli.options import (
    AsJson,
    Device,
    Force,
    NeededData,
    Resume,
    Run,
    Sets,
    SourceArgument,
    To,
    with_loading,
    with_recipe,
    with_settings,
)
from growkit_cli.progress import following, telling
from growkit_cli.typed import command_line


@with_loading
@with_settings(SweepSettings)
@with_recipe("Training: what a trial may spend, from scratch on its share of the data")
def sweep(
    source: SourceArgument,
    to: To,
    data: NeededData,
    settings: SweepSettings,
    recipe: FitSettings,
    loading: Loading,
    sets: Sets = None,
    device: Device = "auto",
    run: Run = Path("run"),
    force: Force = False,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Try settings of growth on a share of the data, recommend one.

    Tried are ranks, ring orders, stages, noise and operator training. Every trial spends the same compute; losers are
    stopped early. Results and report.html go into run/sweep.

    Example: growkit sweep deit_small.pth --to deit_base --data images/ --share 0.1 --epochs 10
    """
    from growkit.compare.page import trials_table
    from growkit.compare.savings import name_of
    from growkit.compare.sweep import sweep_settings
    from growkit.job import Job
    from growkit.record import RunFolder
    from growkit.source import load_source

    console = Console(as_json)
    loaded = load_source(source, loading, say=console.say)
    with following(console, "sweeping") as follow, telling(console, rarely=True) as tell:
        job = Job(RunFolder(run, command_line=command_line()), device, force, resume, console.say, tell, follow)
        swept = sweep_settings(job, loaded, to, data, settings, recipe, sets=sets or ())
    console.table(
        f"trials, best first, finished ones before stopped ones; {name_of(settings.metric)} on held-out images",
        *trials_table(swept.tried, settings.metric),
    )
    console.say(f"recommended: trial {swept.best.number}")
    for reason in swept.reasons:
        console.say(f"  {reason}")
    console.say("the full run:")
    for command in swept.commands:
        console.say(f"  {command}")
    console.say(f"wrote {swept.folder}: report.html, results.json")
    console.result(swept.content)
