"""growkit compare: several methods and training from scratch under one budget."""

from pathlib import Path

import typer

from growkit.compare.settings import CompareSettings
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
@with_settings(CompareSettings)
@with_recipe("Training: what the full budget is, and how every arm spends its own")
def compare(
    source: SourceArgument,
    to: To,
    data: NeededData,
    settings: CompareSettings,
    recipe: FitSettings,
    loading: Loading,
    sets: Sets = None,
    device: Device = "auto",
    run: Run = Path("run"),
    force: Force = False,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Compare growth methods with training from scratch.

    All get the same images in the same order and the same compute, over several seeds. The full budget is what training
    the target from scratch costs for --epochs. Results, plots and report.html go into run/compare; --resume continues a
    stopped comparison, and may also add methods or seeds.

    Example: growkit compare deit_small.pth --to deit_base --data images/ --methods mango,ligo,bert2bert --seeds 3
    """
    from growkit.compare.compare import compare_methods
    from growkit.compare.page import cost_table, main_table
    from growkit.job import Job
    from growkit.record import RunFolder
    from growkit.source import load_source
    from growkit.text import counted

    console = Console(as_json)
    loaded = load_source(source, loading, say=console.say)
    with following(console, "comparing") as follow, telling(console, rarely=True) as tell:
        job = Job(RunFolder(run, command_line=command_line()), device, force, resume, console.say, tell, follow)
        compared = compare_methods(job, loaded, to, data, settings, recipe, sets=sets or ())
    images = counted(compared.content["images"]["test images"], "test image")
    console.table(f"{images}; ± is half a 95 % interval over seeds", *main_table(compared.arms, settings.metric))
    console.table("cost", *cost_table(compared.arms))
    for arm in compared.arms:
        for line in arm.failures:
            console.say(f"failed: {arm.name}, {line}")
    console.say(f"wrote {compared.folder}: report.html, results.json, plots/")
    console.result(compared.content)
    if any(arm.budgets[-1].top1 is None for arm in compared.arms):
        raise typer.Exit(1)  # an arm without any result
