"""From the runs of a comparison to the figures of each arm."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from growkit.compare.arms import SCRATCH, Arm
from growkit.compare.savings import Estimate, Saving, cost_of, curve_of, estimate, saving, sign_of
from growkit.compare.settings import numbers, percent
from growkit.settings import GrowSettings

Run = Mapping[str, Any]  # the result.json of a run


@dataclass(frozen=True)
class BudgetFigures:
    """An arm's fully decayed runs at one share of the full budget; scores on the test images."""

    budget: float
    seeds: int  # requested; estimates count those that ran
    lr: float | None
    top1: Estimate | None
    loss: Estimate | None
    ahead: Estimate | None  # top-1 minus that of training from scratch at the same budget and seed
    flops: float | None


@dataclass(frozen=True)
class ArmFigures:
    """Results of an arm. step0 and after_operator are top-1 on held-out images; FLOPs are per seed, in seed order.

    No estimate has an interval if a seed failed.
    flops_to_target includes operator training, and is None where the target was never reached.
    """

    name: str
    control: bool
    step0: Estimate | None
    after_operator: Estimate | None
    operator_lr: float | None
    operator_flops: float
    budgets: tuple[BudgetFigures, ...]
    flops_to_target: tuple[float | None, ...]
    saving: Saving | None
    saving_including_source: Saving | None
    curve: tuple[tuple[float, Estimate], ...]  # FLOPs, metric on held-out images, along the full budget
    seconds: Estimate | None  # of the full budget, operator training and evaluation included
    failures: tuple[str, ...]


def arm_figures(
    runs: Sequence[Run],
    *,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    budgets: Sequence[float],
    metric: str,
    source_flops: float | None,
) -> tuple[ArmFigures, ...]:
    """Compute the figures of every arm, from runs that were scored on the test images.

    Args:
        runs: every run of the comparison.
        arms: every arm, including training from scratch.
        seeds: every seed; one whose run failed counts as never having reached the target.
        budgets: shares of the full budget; savings are measured along the largest.
        metric: top1 or loss, on held-out images; its final value from scratch is the target.
        source_flops: FLOPs of training the source; None if unknown.
    """
    chosen = [run for run in runs if run.get("test") is not None]
    full, many = max(budgets), len(seeds)
    targets = {run["seed"]: run for run in chosen if run["arm"] == SCRATCH and run["budget"] == full}

    def figures(arm: Arm) -> ArmFigures:
        own = [run for run in chosen if run["arm"] == arm.name]
        whole = sorted((run for run in own if run["budget"] == full), key=lambda run: run["seed"])
        by_seed = {run["seed"]: run for run in whole}
        paired = sorted(targets) if whole else []  # in some seed, training from scratch may have failed

        def costs(made: Mapping[int, Run]) -> list[float | None]:
            ends = {seed: targets[seed]["final"][metric] for seed in paired}
            return [cost_of(made[seed], end, metric) if seed in made else None for seed, end in ends.items()]

        own_costs, spent = costs(by_seed), [by_seed.get(seed, targets[seed])["flops"] for seed in paired]
        scratch = [cost for cost in costs(targets) if cost is not None]  # its own end is always reached
        untaught = (arm.grow is None and not arm.control) or arm.fresh_source  # nothing was trained before
        own_source = 0.0 if untaught else source_flops
        return ArmFigures(
            name=arm.name,
            control=arm.control,
            step0=estimate([run["step0"]["top1"] for run in whole if run["step0"]], many),
            after_operator=estimate([run["started_from"]["top1"] for run in whole if run["operator_flops"]], many),
            operator_lr=next((run["operator_lr"] for run in whole), None),
            operator_flops=max((run["operator_flops"] for run in whole), default=0),
            budgets=tuple(_budget(own, chosen, budget, many) for budget in budgets),
            flops_to_target=tuple(own_costs),
            saving=saving(own_costs, spent, scratch, seeds=many),
            saving_including_source=None
            if own_source is None
            else saving(own_costs, spent, scratch, source=own_source, seeds=many),
            curve=_mean_curve(whole, metric, many),
            seconds=estimate([run["seconds"] + run["operator_seconds"] for run in whole], many),
            failures=tuple(
                _failure(run) for run in runs if run["arm"] == arm.name and {"failed", "test_failed"} & run.keys()
            ),
        )

    return tuple(map(figures, arms))


def figures_of(content: Mapping[str, Any]) -> tuple[ArmFigures, ...]:
    """Compute the figures of every arm from the results.json of a comparison."""
    settings, first = content["settings"], content["recipe"]["seed"]
    return arm_figures(
        content["runs"],
        arms=[
            Arm(**{**arm, "name": str(arm["name"]), "grow": arm["grow"] and GrowSettings(**arm["grow"])})
            for arm in content["arm_settings"].values()
        ],
        seeds=range(first, first + settings["seeds"]),
        budgets=numbers("--budgets", settings["budgets"]),
        metric=settings["metric"],
        source_flops=content["source_flops"],
    )


def warnings(content: Mapping[str, Any], arms: Sequence[ArmFigures]) -> list[str]:
    """What makes the figures of a comparison doubtful, with a remedy; `content` is its results.json."""
    metric = content["settings"]["metric"]
    worse = [arm.name for arm in arms if arm.step0 and _ends_below_start(arm, metric)]
    told = [guessing(content, arms[0])]
    if worse:
        remedy = "try lower --lrs, or more --epochs or --steps"
        told.insert(0, f"worse at the end than at the start: {', '.join(worse)}; {remedy}")
    return [line for line in told if line]


def _ends_below_start(arm: ArmFigures, metric: str) -> bool:
    """Whether training worsened the mean score over seeds on held-out images."""
    scores = [score.mean for _, score in arm.curve]
    return bool(scores) and sign_of(metric) * (scores[-1] - scores[0]) < 0


def guessing(content: Mapping[str, Any], scratch: ArmFigures) -> str | None:
    """Return a warning if training from scratch ended no better than guessing, within two standard errors.

    The best guess without looking is the largest class.
    """
    found, images = scratch.budgets[-1].top1, content["images"]["test images"]
    chance = content["largest_class"] / images
    if found is None or found.mean > chance + 2 * (chance * (1 - chance) / images) ** 0.5:
        return None
    return (
        f"training from scratch learned next to nothing: top-1 {found.mean:.1%}, and guessing gives {chance:.1%}; "
        "savings say nothing then, give more --epochs or --steps, or a larger --share"
    )


def _budget(own: Sequence[Run], chosen: Sequence[Run], budget: float, seeds: int) -> BudgetFigures:
    mine = [run for run in own if run["budget"] == budget]
    base = {r["seed"]: r["test"]["top1"] for r in chosen if r["arm"] == SCRATCH and r["budget"] == budget}
    return BudgetFigures(
        budget=budget,
        seeds=seeds,
        lr=next((run["lr"] for run in mine), None),
        top1=estimate([run["test"]["top1"] for run in mine], seeds),
        loss=estimate([run["test"]["loss"] for run in mine], seeds),
        ahead=estimate([run["test"]["top1"] - base[run["seed"]] for run in mine if run["seed"] in base], seeds),
        flops=next((run["flops"] for run in mine), None),
    )


def _mean_curve(runs: Sequence[Run], metric: str, seeds: int) -> tuple[tuple[float, Estimate], ...]:
    """The mean over seeds at each evaluation; all seeds evaluate at the same updates."""
    points = []
    for places in zip(*(curve_of(run, metric) for run in runs), strict=False):
        found = estimate([score for _, score in places], seeds)
        assert found is not None
        points.append((places[0][0], found))
    return tuple(points)


def _failure(run: Run) -> str:
    why = run["failed"] if "failed" in run else f"on the test images: {run['test_failed']}"
    return f"budget {percent(run['budget'])}, seed {run['seed']}, lr {run['lr']:g}: {why}"
