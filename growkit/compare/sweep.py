"""growkit sweep: a pilot on a share of the data. Optuna tries settings, losers stop early, one is recommended."""

import shlex
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, BruteForceSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from growkit import __version__
from growkit.compare.arms import SCRATCH, Arm, parse_arm
from growkit.compare.bench import Bench
from growkit.compare.compare import SCHEMA, Follow, Say, begin, bench_of, identity_of, read_own
from growkit.compare.page import write_sweep_page
from growkit.compare.savings import flops_to
from growkit.compare.settings import SweepSettings, numbers
from growkit.errors import GrowkitError
from growkit.files import refuse_existing, write_json
from growkit.grow import make_method
from growkit.methods.base import growing
from growkit.record import RunFolder, hardware, versions
from growkit.settings import GrowSettings
from growkit.source import Source
from growkit.train.loop import StepRecord
from growkit.train.settings import FitSettings

NOTHING = "from-nothing.json"
STUDY = "study.log"  # Optuna's journal; trials survive a killed process
HALVE = 2  # successive halving lets the better one of so many trials go on
STATES = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "stopped early", TrialState.FAIL: "failed"}


@dataclass(frozen=True)
class Tried:
    """One trial: options as `growkit grow` and `finetune` call them; the score on held-out images where it ended."""

    number: int
    options: dict[str, Any]
    state: str
    score: float | None
    step0: float | None
    operator_flops: float
    flops: float
    flops_to_scratch: float | None  # to what training from nothing ends the pilot with; None where never


@dataclass(frozen=True)
class Swept:
    """What a sweep found: trials best first, what training from nothing gave, and what to do."""

    folder: Path
    tried: tuple[Tried, ...]
    best: Tried
    scratch: float
    saving: float | None  # of the best over training from nothing, on the pilot; None where it never got there
    reasons: tuple[str, ...]
    commands: tuple[str, ...]
    content: dict[str, Any]


def sweep_settings(
    run: RunFolder,
    source: Source,
    to: str,
    data: str,
    settings: SweepSettings,
    recipe: FitSettings,
    *,
    sets: Sequence[str] = (),
    device: torch.device,
    force: bool = False,
    resume: bool = False,
    command: str = "",
    say: Say = lambda line: None,
    follow: Follow = lambda title, finished, total: lambda record: None,
) -> Swept:
    """Find how to grow `source` into `to` by trials on a share of the data, in run/sweep.

    Every trial spends what training the target from nothing on that share costs for the recipe's epochs; so an
    expensive operator pays with fewer updates of fine-tuning.

    Raises:
        GrowkitError: a method that cannot grow this pair, unusable data, every trial failed, or a sweep that is there
            already (without `resume` or `force`) or is another one.
        KeyboardInterrupt: stopped; `resume` goes on.
    """
    run.refuse_unusable()
    if not resume:
        refuse_existing(run.sweep, force)
    bench = bench_of(source, to, data, recipe, sets=sets, device=device, folder=run.sweep, split=settings, say=say)
    space = _Space(bench, settings)
    space.check()
    begin(run.sweep, {**identity_of(bench), "settings": asdict(settings)}, resume=resume, free=("trials",))

    path = run.sweep / NOTHING
    if not path.exists():
        watch = follow("from nothing", 0, settings.trials)
        write_json(path, {"schema": SCHEMA, "growkit": __version__, **_from_nothing(bench, settings, watch)})
    nothing = read_own(path)
    budget = nothing["flops"]
    say(f"from nothing: held-out {settings.metric} {_score(nothing, settings):.4f} after {budget / 1e12:.3g} TFLOP")
    study = _study(run.sweep, space, settings, seed=recipe.seed)

    def objective(trial: Trial) -> float:
        arm, operator_lr, options = space.draw(trial)
        trial.set_user_attr("options", options)
        for earlier in study.get_trials(states=(TrialState.COMPLETE,)):
            if earlier.user_attrs["options"] == options:  # Optuna may ask for the same again
                trial.set_user_attr("repeated", True)
                return float(earlier.values[0])
        watch = follow(f"trial {trial.number}", min(trial.number, settings.trials - 1), settings.trials)

        def judge(record: StepRecord) -> None:
            watch(record)
            if record.scores is None:
                return
            place = record.step * settings.evals // record.total
            trial.report(getattr(record.scores, settings.metric), place)
            trial.set_user_attr("score", getattr(record.scores, settings.metric))
            if place < settings.evals and trial.should_prune():
                raise optuna.TrialPruned

        start = bench.start(arm, recipe.seed, operator_lr, watch)
        trial.set_user_attr("operator_flops", start.flops)
        trial.set_user_attr("step0", getattr(start.step0, settings.metric))
        result = bench.train(
            start, arm, flops=budget, seed=recipe.seed, lr=options["lr"], evals=settings.evals, watch=judge
        )
        target = _score(nothing, settings)
        trial.set_user_attr("cost", flops_to(_curve(result, settings), target, higher=settings.metric == "top1"))
        trial.set_user_attr("flops", result["flops"])
        return _score(result, settings)

    def tell(study: optuna.Study, trial: FrozenTrial) -> None:
        if trial.user_attrs.get("repeated"):
            return
        tried = _tried(trial)
        shown = "–" if tried.score is None else f"{tried.score:.4f}"
        say(f"[{trial.number + 1}/{settings.trials}] {_words(tried.options)}: {tried.state}, {settings.metric} {shown}")

    left = settings.trials - len(_ended(study))
    if left > 0:
        try:
            study.optimize(objective, n_trials=left, callbacks=[tell], catch=(GrowkitError, RuntimeError, MemoryError))
        except KeyboardInterrupt:
            _again(study, study.trials[-1])
            raise
    return _conclude(run.sweep, study, bench, settings, recipe, nothing, source, to, data, sets, command)


class _Space:
    """The choices of a trial; what cannot matter for this pair or at this rank is not asked."""

    def __init__(self, bench: Bench, settings: SweepSettings):
        self.bench, self.settings = bench, settings
        grown = growing(bench.source.architecture, bench.target)
        self.staged = "blocks" in grown and len(grown) > 1

    def check(self) -> None:
        """Raise GrowkitError where a choice is none for this pair, before anything runs."""
        settings, pair = self.settings, (self.bench.source.architecture, self.bench.target)
        for text in settings.methods.split(","):
            drawn = parse_arm(text).grow
            assert drawn is not None
            for stages in settings.stage_choices.split(","):
                make_method(*pair, replace(drawn, stages=stages))
            if drawn.method == "mango":
                for rank in settings.rank_choices.split(","):
                    for order in settings.ring_orders.split(","):
                        make_method(*pair, replace(drawn, **_ranks(rank), ring_order=order))

    def draw(self, trial: Trial) -> tuple[Arm, float | None, dict[str, Any]]:
        """The arm of a trial, its operator's rate (None for none), and every option by name."""
        settings = self.settings

        def choose(name: str, choices: str) -> str:
            listed = choices.split(",")
            return str(trial.suggest_categorical(name, listed)) if len(listed) > 1 else listed[0]

        drawn = parse_arm(choose("method", settings.methods)).grow
        assert drawn is not None
        options: dict[str, Any] = {"method": drawn.method}
        if drawn.variant:
            options["variant"] = drawn.variant
        if drawn.method == "mango":
            rank = choose("rank", settings.rank_choices)
            options |= _ranks(rank)
            if rank != "1":
                options["ring_order"] = choose("ring_order", settings.ring_orders)
        if self.staged:
            options["stages"] = choose("stages", settings.stage_choices)
        options["noise"] = float(choose("noise", settings.noises))
        grow = GrowSettings(**{**asdict(drawn), **options})
        steps = 0
        if self.bench.learned(grow):
            steps = int(choose("operator_steps", settings.operator_steps))
        name = ":".join(f"{key}={value}" for key, value in options.items())
        arm = Arm(name.replace(",", "x") + f":steps={steps}", grow, operator_steps=steps)
        operator_lr = float(choose("operator_lr", settings.operator_lrs)) if steps else None
        options |= {"steps": steps, "operator_lr": operator_lr, "lr": float(choose("lr", settings.lrs))}
        return arm, operator_lr, options


def _ranks(text: str) -> dict[str, Any]:
    """'4' is the rank of every bond, '4x4x1x4' one for each."""
    if "x" in text:
        return {"ranks": text.replace("x", ",")}
    if not text.isdecimal():
        raise GrowkitError(f"--rank-choices {text}: expected whole numbers, or one for each bond as in 4x4x1x4")
    return {"rank": int(text)}


def _study(folder: Path, space: _Space, settings: SweepSettings, *, seed: int) -> optuna.Study:
    """The study in the folder, new or as it was left; every combination where there are few, else Optuna's TPE."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler: BaseSampler = TPESampler(seed=seed, n_startup_trials=settings.trials // 2)
    if _combinations(space) <= settings.trials:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # of its interface, since 2023
            sampler = BruteForceSampler(seed=seed)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / STUDY))),
        sampler=sampler,
        pruner=SuccessiveHalvingPruner(min_resource=max(1, settings.evals // 4), reduction_factor=HALVE),
        study_name="sweep",
        direction="maximize" if settings.metric == "top1" else "minimize",
        load_if_exists=True,
    )
    for trial in study.get_trials(states=(TrialState.RUNNING,)):  # the process was killed
        study.tell(trial.number, state=TrialState.FAIL)
        _again(study, trial)
    return study


def _again(study: optuna.Study, trial: FrozenTrial) -> None:
    """Try a trial's choices again, for it was broken off by no fault of theirs."""
    study.enqueue_trial(trial.params, user_attrs={"again": trial.number})


def _ended(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that came to an end of their own, repetitions among them."""
    broken = {trial.user_attrs.get("again") for trial in study.trials}
    return [trial for trial in study.trials if trial.state in STATES and trial.number not in broken]


def _combinations(space: _Space) -> int:
    """How many different trials there are."""
    settings = space.settings

    def count(choices: str) -> int:
        return len(choices.split(","))

    stages = count(settings.stage_choices) if space.staged else 1
    rest = stages * count(settings.noises) * count(settings.lrs)
    operator = sum(count(settings.operator_lrs) if int(s) else 1 for s in settings.operator_steps.split(","))
    total = 0
    for text in settings.methods.split(","):
        drawn = parse_arm(text).grow
        assert drawn is not None
        learned = operator if space.bench.learned(drawn) else 1
        ranks = settings.rank_choices.split(",") if drawn.method == "mango" else ["1"]
        total += rest * learned * sum(1 if rank == "1" else count(settings.ring_orders) for rank in ranks)
    return total


def _from_nothing(bench: Bench, settings: SweepSettings, watch: Any) -> dict[str, Any]:
    """The target from nothing on the same share, at the best rate of the grid it is given, which reaches higher."""
    arm = Arm(SCRATCH)
    flops = bench.flops_per_step(arm) * bench.full_steps
    rates = numbers("--lrs", settings.lrs)
    tried = []
    for lr in (*rates, 2 * rates[-1]):  # a fresh start bears a higher rate than a grown one
        start = bench.start(arm, bench.recipe.seed, None)
        tried.append(
            bench.train(start, arm, flops=flops, seed=bench.recipe.seed, lr=lr, evals=settings.evals, watch=watch)
        )
    sign = 1 if settings.metric == "top1" else -1
    return max(tried, key=lambda result: sign * _score(result, settings))


def _score(result: dict[str, Any], settings: SweepSettings) -> float:
    return float(result["final"][settings.metric])


def _curve(result: dict[str, Any], settings: SweepSettings) -> list[tuple[float, float]]:
    return [(flops, top1 if settings.metric == "top1" else loss) for flops, top1, loss in result["curve"]]


def _tried(trial: FrozenTrial) -> Tried:
    known = trial.user_attrs
    return Tried(
        number=trial.number,
        options=known.get("options", dict(trial.params)),
        state=STATES.get(trial.state, "unfinished"),
        score=trial.value if trial.value is not None else known.get("score"),
        step0=known.get("step0"),
        operator_flops=known.get("operator_flops", 0),
        flops=known.get("flops", 0),
        flops_to_scratch=known.get("cost"),
    )


def _words(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items() if value is not None)


def _conclude(
    folder: Path,
    study: optuna.Study,
    bench: Bench,
    settings: SweepSettings,
    recipe: FitSettings,
    nothing: dict[str, Any],
    source: Source,
    to: str,
    data: str,
    sets: Sequence[str],
    command: str,
) -> Swept:
    sign = 1 if settings.metric == "top1" else -1
    tried = [_tried(trial) for trial in _ended(study) if not trial.user_attrs.get("repeated")]
    finished = [one for one in tried if one.state == "finished"]
    if not finished:
        raise GrowkitError(f"no trial finished; {folder / STUDY} has the reasons, and other choices may do better")
    # Equal within the error of the score, the one with the cheaper operator is the better buy.
    top = max(sign * one.score for one in finished if one.score is not None)
    count = nothing["final"]["count"]
    error = (abs(top) * max(0.0, 1 - abs(top)) / count) ** 0.5 if settings.metric == "top1" else 0.0
    equal = [one for one in finished if one.score is not None and sign * one.score >= top - error]
    best = min(equal, key=lambda one: (one.operator_flops, -sign * (one.score or 0.0)))
    order = sorted(
        tried, key=lambda one: (one.state != "finished", -sign * one.score if one.score is not None else 1e9)
    )
    target = _score(nothing, settings)
    saving = None if best.flops_to_scratch is None else 1 - best.flops_to_scratch / nothing["flops"]
    reasons = tuple(_reasons(best, finished, equal, error, settings, target, saving, count))
    commands = _commands(best, source, to, data, sets, recipe)
    content = {
        **identity_of(bench),
        "command": command,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": asdict(settings),
        "from_nothing": nothing,
        "trials": [asdict(one) for one in order],
        "recommended": asdict(best),
        "saving_on_pilot": saving,
        "reasons": reasons,
        "commands": commands,
        "versions": versions(),
        "hardware": hardware(),
    }
    write_json(folder / "results.json", content)
    write_sweep_page(folder, content, order)
    return Swept(folder, tuple(order), best, target, saving, reasons, commands, content)


def _reasons(
    best: Tried,
    finished: Sequence[Tried],
    equal: Sequence[Tried],
    error: float,
    settings: SweepSettings,
    target: float,
    saving: float | None,
    count: int,
) -> list[str]:
    """Why the best is recommended, and how far that can be trusted."""
    name = settings.metric
    lines = [
        f"{name} {best.score:.4f} on {count} held-out images, against {target:.4f} from nothing for the same FLOPs",
    ]
    if len(equal) > 1:
        lines.append(
            f"{len(equal)} trials lie within one standard error ({error:.4f}); of these its operator is the cheapest"
        )
    better = max if name == "top1" else min
    for option in best.options:
        by_value: dict[str, float] = {}
        for one in finished:
            value, score = str(one.options.get(option)), one.score
            if score is not None:
                by_value[value] = better(by_value.get(value, score), score)
        if len(by_value) > 1:
            told = ", ".join(f"{value} {score:.4f}" for value, score in sorted(by_value.items()))
            lines.append(f"best {name} by {option}: {told}")
    sign = 1 if name == "top1" else -1
    if best.score is not None and best.step0 is not None and sign * best.score < sign * best.step0:
        lines.append(f"it ends below its start, {best.step0:.4f}: try lower --lrs or a longer pilot")
    if saving is None:
        lines.append("on the pilot it never reached what training from nothing ends with: do not expect a saving")
    elif saving == 1:
        lines.append(
            "it starts where training from nothing ends the pilot, so the pilot's saving is total by construction; "
            "longer pilots (--epochs, --share) tell more"
        )
    else:
        lines.append(
            f"on the pilot it reached that score with {saving:.0%} less compute; expect about that of the full run, if "
            "more data changes both alike: one seed on a share is a hint"
        )
    return lines


def _commands(
    best: Tried, source: Source, to: str, data: str, sets: Sequence[str], recipe: FitSettings
) -> tuple[str, ...]:
    """The `grow` and `finetune` commands of the full run."""
    options = best.options
    given = ["growkit", "grow", source.path, "--to", to]
    for item in sets:
        given += ["--set", item]
    for name in ("method", "variant", "rank", "ranks", "ring_order", "stages", "noise"):
        if options.get(name) is not None:
            given += ["--" + name.replace("_", "-"), str(options[name])]
    shared = _differing(recipe)
    if options["steps"]:
        given += ["--data", data, "--steps", str(options["steps"]), "--lr", f"{options['operator_lr']:g}"]
        given += [part for part in shared if part]
    tune = ["growkit", "finetune", "--data", data, "--lr", f"{options['lr']:g}", "--epochs", f"{recipe.epochs:g}"]
    return shlex.join(given), shlex.join([*tune, *shared])


def _differing(recipe: FitSettings) -> list[str]:
    """Options of the recipe that are not the defaults and that growing and fine-tuning share."""
    plain, words = asdict(FitSettings()), []
    for name, value in asdict(recipe).items():
        if value == plain[name] or name in ("epochs", "steps", "lr", "eval_every", "model_ema", "model_ema_decay"):
            continue
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", str(value)]
    return words
