"""A sweep's recommendation: the trial, the reasons, and the commands of the full run."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from growkit.compare.bench import Bench
from growkit.compare.folder import described
from growkit.compare.page import write_sweep_page
from growkit.compare.savings import cost_of, name_of, shown, sign_of
from growkit.compare.settings import SweepSettings
from growkit.compare.trials import Tried
from growkit.errors import GrowkitError
from growkit.files import write_json
from growkit.ranges import option_of
from growkit.settings import FINETUNE_DEFAULTS, OPERATOR_DEFAULTS
from growkit.train.settings import FitSettings


@dataclass(frozen=True)
class Swept:
    """Result of a sweep: trials best first, the saving, the reasons, and the commands to run."""

    folder: Path
    tried: tuple[Tried, ...]
    best: Tried
    saving: float | None  # of the best over training from scratch, on the pilot; None if it never reached that score
    reasons: tuple[str, ...]
    commands: tuple[str, ...]
    content: dict[str, Any]


@dataclass(frozen=True)
class _Choice:
    """The best trial, and all trials within one standard error of the best score."""

    best: Tried
    equal: tuple[Tried, ...]
    error: float


def conclude(
    bench: Bench,
    settings: SweepSettings,
    tried: Sequence[Tried],
    scratch: Mapping[str, Any],
    *,
    budget: float,
    left_out: Sequence[str],
    what: Sequence[str],
    data: str,
    command: str,
) -> Swept:
    """Recommend one of the trials, and write results.json and report.html.

    Args:
        scratch: the result of training from scratch.
        budget: FLOPs of a trial.
        left_out: lines on what was not tried.
        what: arguments for source and target in the recommended commands, which read `data`.
        command: the command that started the sweep.

    Raises:
        GrowkitError: no trial finished.
    """
    folder, metric = bench.folder, settings.metric
    choice = _choose(tried, metric, count=scratch["final"]["count"])
    target = float(scratch["final"][metric])
    alone = cost_of(scratch, target, metric)
    assert alone is not None  # its own end is always reached
    best = choice.best
    saving = None if best.flops_to_scratch is None else 1 - best.flops_to_scratch / alone
    source = bench.source_score() if bench.source.own_head else None  # with a new head it says nothing of the source
    known = None if source is None else float(getattr(source, metric))
    reasons = _reasons(choice, tried, scratch, metric, saving, known)
    where = [] if folder.parent == Path("run") else ["--run", str(folder.parent)]
    commands = _commands(best, bench, budget, what, data, where)
    order = tuple(sorted(tried, key=lambda one: (one.state != "finished", -_goodness(one, metric))))
    content = {
        **described(bench, settings, command),
        "source_score": source and asdict(source),
        "from_scratch": scratch,
        "trials": [asdict(one) for one in order],
        "recommended": asdict(best),
        "saving_on_pilot": saving,
        "left_out": left_out,
        "reasons": reasons,
        "commands": commands,
    }
    write_json(folder / "results.json", content)
    write_sweep_page(folder, content, order)
    bench.let_starts_go()
    return Swept(folder, order, best, saving, tuple(reasons), commands, content)


def _goodness(one: Tried, metric: str) -> float:
    """Higher is better; what has no score is worst."""
    return -math.inf if one.score is None else sign_of(metric) * one.score


def _choose(tried: Sequence[Tried], metric: str, *, count: int) -> _Choice:
    """Choose the trial with the cheapest operator among those within the error of the best score on `count` images."""
    finished = [one for one in tried if one.state == "finished"]
    if not finished:
        reason = next((one.reason for one in tried if one.reason), "every score was not a number")
        raise GrowkitError(f"no trial finished, the first for this reason: {reason}")
    top = max(_goodness(one, metric) for one in finished)
    error = (top * (1 - top) / count) ** 0.5 if metric == "top1" else 0.0
    equal = tuple(one for one in finished if _goodness(one, metric) >= top - error)
    return _Choice(min(equal, key=lambda one: (one.operator_flops, -_goodness(one, metric))), equal, error)


def _reasons(
    choice: _Choice,
    tried: Sequence[Tried],
    scratch: Mapping[str, Any],
    metric: str,
    saving: float | None,
    source: float | None = None,
) -> list[str]:
    """Say why the best is recommended, and how far that can be trusted; `source` is the source's own score."""
    best, count, target = choice.best, scratch["final"]["count"], scratch["final"][metric]
    lines = [
        f"{name_of(metric)} {shown(best.score, metric)} on {count} held-out images, against {shown(target, metric)} "
        "from scratch for the same FLOPs"
        + ("" if source is None else f"; the source itself has {shown(source, metric)}"),
    ]
    if source is not None and _goodness(best, metric) < sign_of(metric) * source:
        lines.append(
            f"warning: that is {'below' if metric == 'top1' else 'above'} the source itself ({shown(source, metric)}): "
            "give more --epochs (or --steps) or lower --lrs; if it stays so, the source may need no growing"
        )
    if len(tried) > 1:
        lines.append(
            f"it was chosen among {len(tried)} trials on the images it is reported on; expect less of it on others"
        )
    if len(choice.equal) > 1:
        priced = len({one.operator_flops for one in choice.equal}) > 1
        how, why = "have the best score", "it came first"
        if choice.error:
            how, why = f"lie within one standard error ({choice.error:.2%})", "it is the best"
        lines.append(f"{len(choice.equal)} trials {how}; of these {'its operator is the cheapest' if priced else why}")
    for option in best.options:
        by_value: dict[Any, Tried] = {}
        for one in tried:
            if one.state != "finished" or (value := one.options.get(option)) is None:
                continue
            by_value[value] = max(by_value.get(value, one), one, key=lambda of: _goodness(of, metric))
        if len(by_value) > 1:
            told = ", ".join(f"{value} {shown(one.score, metric)}" for value, one in sorted(by_value.items()))
            lines.append(f"best {name_of(metric)} by {option}: {told}")
    if best.step0 is not None and _goodness(best, metric) < sign_of(metric) * best.step0:
        worse = "below" if metric == "top1" else "above"
        lines.append(f"it ends {worse} its start, {shown(best.step0, metric)}: try lower --lrs or a longer pilot")
    if saving is None:
        lines.append("on the pilot it never reached what training from scratch ends with: do not expect a saving")
    elif saving == 1:
        lines.append(
            "it starts where training from scratch ends the pilot, so the pilot's saving is total by construction; "
            "longer pilots (--epochs or --steps, --share) tell more"
        )
    elif saving <= 0:
        lines.append("on the pilot it reached that score no sooner: do not expect a saving")
    else:
        lines.append(
            f"on the pilot it reached that score with {saving:.0%} less compute; expect at most that of the full "
            "run, and only if more data changes both alike: one seed on a share is a hint"
        )
    return lines


def _commands(
    best: Tried,
    bench: Bench,
    budget: float,
    what: Sequence[str],
    data: str,
    where: Sequence[str] = (),
) -> tuple[str, str]:
    """The `grow` and `finetune` commands that repeat the trial on all images.

    `what` names source and target, `where` the run folder.
    """
    options, recipe = dict(best.options), bench.recipe
    steps, operator_lr, lr = (options.pop(name) for name in ("steps", "operator_lr", "lr"))
    grow = {**options, "seed": recipe.seed}
    if steps:
        absent = ("epochs", "seed", "model_ema", "model_ema_decay")
        trained = {"data": data, "steps": steps, "lr": operator_lr}
        grow |= trained | _differing(bench.operator, FitSettings(**OPERATOR_DEFAULTS), but=(*trained, *absent))
    left = 1 - best.operator_flops * bench.share / budget  # the operator costs the same, out of a larger budget
    length = {"epochs": f"{recipe.epochs * left:g}"}
    if recipe.steps is not None:
        length = {"steps": f"{round(recipe.steps / bench.share * left)}"}
    tune = {"data": data, **length, "lr": lr, "seed": recipe.seed}
    if recipe.warmup_epochs is not None:
        tune["warmup_epochs"] = f"{recipe.warmup_epochs * left:g}"  # the same share of the run, as in every trial
    tune |= _differing(recipe, FitSettings(**FINETUNE_DEFAULTS), but=("epochs", "steps", *tune))
    words = ["growkit", "grow", *what, *_given(grow), *where], ["growkit", "finetune", *_given(tune), *where]
    return shlex.join(words[0]), shlex.join(words[1])


def _differing(settings: FitSettings, plain: FitSettings, *, but: Sequence[str]) -> dict[str, Any]:
    """Settings that differ from the defaults of the command that takes them."""
    return {n: value for n, value in asdict(settings).items() if value != getattr(plain, n) and n not in but}


def _given(options: Mapping[str, Any]) -> list[str]:
    """Options as the command line takes them."""
    words = []
    for name, value in options.items():
        if isinstance(value, bool):
            words.append(option_of(name if value else f"no_{name}"))
        else:
            words += [option_of(name), str(value)]
    return words
