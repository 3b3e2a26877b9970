"""growkit plan: what growing would give and cost, before anything is written."""

from typing import TYPE_CHECKING, Annotated

import typer

from growkit.settings import Loading
from growkit.text import counted
from growkit_cli.console import Console
from growkit_cli.options import AsJson, Sets, SourceArgument, To, with_loading
from growkit_cli.progress import telling

if TYPE_CHECKING:
    from growkit.plan import Plan


@with_loading
def plan(
    source: SourceArgument,
    to: To,
    loading: Loading,
    sets: Sets = None,
    batch_size: Annotated[int, typer.Option(help="Images per update.")] = 64,
    steps: Annotated[int, typer.Option(help="Updates of operator training.")] = 100,
    as_json: AsJson = False,
) -> None:
    """Say what growing would give and cost, before anything runs.

    Shown are sizes, how exact the start is, FLOPs and the largest intermediate, of Mango at ranks 1, 2, 4 and 8.

    Example: growkit plan deit_small.pth --to deit_base
    """
    from dataclasses import asdict

    from growkit.plan import plan_growth
    from growkit.ranges import refuse_number
    from growkit.source import load_source

    refuse_number("--steps", steps, least=1)
    console = Console(as_json)
    loaded = load_source(source, loading, say=console.say)
    with telling(console) as tell:
        planned = plan_growth(loaded, to, sets or (), batch_size=batch_size, progress=tell("planning"))
    for note in planned.notes:
        console.say(note)
    told = " ".join([f"{source} -> {to}", *(sets or ())])
    console.table(told, ("size", "source", "target"), _sizes(planned, batch_size))
    console.table(
        "methods",
        ("method", "starts where the source stands", "operator", "x plain target per update", "why not"),
        _methods(planned),
    )
    if planned.ranks:
        console.table(
            f"mango: what {counted(steps, 'update')} of {counted(batch_size, 'image')} cost",
            (
                "rank",
                "operator",
                "start off by",
                "GFLOP per update",
                "x plain target",
                "largest intermediate",
                "all, in target updates",
            ),
            _ranks(planned, steps),
        )
    console.result(asdict(planned))


def _sizes(planned: "Plan", batch_size: int) -> list[tuple[object, ...]]:
    from growkit.report.page import cell

    parameters = (f"{count / 1e6:,.3g} M" for count in planned.parameters)
    flops = (cell(count / 1e9) for count in planned.flops_per_step)
    return [
        *((size.name, size.source, size.target) for size in planned.sizes),
        ("parameters", *parameters),
        (f"GFLOP per update of {batch_size}", *flops),
    ]


def _methods(planned: "Plan") -> list[tuple[object, ...]]:
    whole = all(size.target % size.source == 0 for size in planned.sizes if size.name == "embed")
    exactly = "yes" if whole else "nearly"  # up to LayerNorm's eps, which matters if widths are not whole multiples
    return [
        (
            method.name,
            "–" if method.lossless is None else exactly if method.lossless else "no",
            f"{method.operator_parameters / 1e6:.2f} M" if method.operator_parameters else "–",
            f"{method.flops_per_step / planned.flops_per_step[1]:.2f}" if method.flops_per_step else "–",
            method.cannot or "",
        )
        for method in planned.methods
    ]


def _ranks(planned: "Plan", steps: int) -> list[tuple[object, ...]]:
    from growkit.report.page import cell

    plain = planned.flops_per_step[1]
    return [
        (
            cost.rank,
            f"{cost.operator_parameters / 1e6:.2f} M",
            f"{cost.gap:.0e}",
            cell(cost.flops_per_step / 1e9),
            f"{cost.flops_per_step / plain:.2f}",
            f"{cost.slice_bytes / 2**20:,.0f} MiB",
            f"{cost.flops_per_step * steps / plain:,.0f}",
        )
        for cost in planned.ranks
    ]
