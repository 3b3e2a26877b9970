"""growkit sweep: a pilot on a share of the data. Optuna tries settings, losers stop early, one is recommended."""

import random
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.pruners import SuccessiveHalvingPruner
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from growkit import __version__
from growkit.compare.arms import SCRATCH, Arm, parse_arm
from growkit.compare.bench import Bench
from growkit.compare.compare import (
    BEGUN,
    FAILURES,
    SCHEMA,
    Follow,
    Say,
    begin,
    bench_of,
    identity_of,
    read_own,
)
from growkit.compare.page import write_sweep_page
from growkit.compare.savings import flops_to
from growkit.compare.settings import SweepSettings, numbers
from growkit.errors import GrowkitError, UnwritableError, first_line
from growkit.files import refuse_existing, write_json
from growkit.methods import find
from growkit.methods.base import growing
from growkit.methods.mango import bond_ranks
from growkit.pictures import UnreadablePictureError
from growkit.record import RunFolder, hardware, versions
from growkit.settings import FINETUNE_DEFAULTS, OPERATOR_DEFAULTS, GrowSettings
from growkit.source import Source
from growkit.train.settings import FitSettings
from growkit.train.telling import Done, Tell, each, silent, unheard
from growkit.train.watch import StepRecord

NOTHING = "from-nothing"  # a folder for each rate
STUDY = "study.log"  # Optuna's journal of the trials that ended; they survive a killed process
HALVE = 2  # successive halving lets the better one of so many trials go on
REPEATS = 20  # so often Optuna may ask for what was tried before chance picks a trial
STATES = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "stopped early", TrialState.FAIL: "failed"}


@dataclass(frozen=True)
class Tried:
    """One trial: options as `growkit grow` and `finetune` call them; the score on held-out images where it ended."""

    number: int  # from 1
    options: dict[str, Any]
    state: str
    reason: str | None  # of a failure
    score: float | None
    step0: float | None
    operator_flops: float
    flops: float  # spent in all, up to where it ended or was stopped
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
    from_: str | None = None,
    from_sets: Sequence[str] = (),
    device: torch.device,
    force: bool = False,
    resume: bool = False,
    command: str = "",
    say: Say = lambda line: None,
    follow: Follow = lambda title, finished, total: unheard,
    tell: Tell = silent,
) -> Swept:
    """Find how to grow `source` into `to` by trials on a share of the data, in run/sweep.

    Every trial spends what training the target from nothing on that share costs for the recipe's epochs; so an
    expensive operator pays with fewer updates of fine-tuning. `from_` and `from_sets` are those that `source` was
    loaded with; the recommended commands repeat them.

    Raises:
        GrowkitError: a method that cannot grow this pair, operators that all cost more than a trial may spend, unusable
            data, every trial failed, or a sweep that is there already (without `resume` or `force`) or is another one.
        KeyboardInterrupt: stopped; `resume` goes on.
    """
    run.refuse_unusable()
    if not resume:
        refuse_existing(run.sweep, force, BEGUN)
    bench = bench_of(
        source,
        to,
        data,
        recipe,
        sets=sets,
        device=device,
        folder=run.sweep,
        split=settings,
        say=say,
        tell=tell,
    )
    pilot = Pilot(bench, settings, say=say, follow=follow)
    pilot.prepare(resume=resume)
    nothing = pilot.from_nothing()
    tried = [_tried(trial) for trial in pilot.run(nothing)]
    for line in bench.data.remarks:
        say(line)
    what = [source.path, "--to", to]
    what += ["--from", from_] if from_ else []
    for option, items in (("--from-set", from_sets), ("--set", sets)):
        for item in items:
            what += [option, item]
    return _conclude(pilot, tried, nothing, what, data, command)


class Pilot:
    """A folder of trials. What has ended is not run again, and what was broken off begins anew."""

    def __init__(self, bench: Bench, settings: SweepSettings, *, say: Say, follow: Follow):
        self.bench, self.settings, self.say, self.follow = bench, settings, say, follow
        self.space = Space(bench, settings)
        self.sign = 1 if settings.metric == "top1" else -1
        self.budget = bench.flops_per_step(Arm(SCRATCH)) * bench.full_steps
        self.left_out: list[str] = []  # a line on what `prepare` found too dear

    @property
    def total(self) -> int:
        """Trials to make."""
        return min(self.settings.trials, len(self.space.combinations))

    def prepare(self, *, resume: bool) -> None:
        """Refuse what cannot work before anything runs, and note what this sweep is.

        Raises:
            GrowkitError: no operator leaves anything of the budget, or the folder holds another sweep.
        """
        rates = numbers("--lrs", self.settings.lrs), numbers("--operator-lrs", self.settings.operator_lrs)
        self.bench.refuse_unusable(*rates)
        self._leave_out_what_is_too_dear()
        own = {**identity_of(self.bench), "settings": asdict(self.settings)}
        begin(self.bench, own, resume=resume, free=("trials",), say=self.say)

    def _leave_out_what_is_too_dear(self) -> None:
        """Raise GrowkitError where nothing else is left."""
        combinations = self.space.combinations
        arms = {key: self.space.combine(answers)[0] for key, answers in combinations.items()}
        told = self.bench.tell("counting what trials cost")
        costs = {key: self.bench.operator_flops(arms[key]) for key in each(list(arms), told)}
        dear = [key for key, arm in arms.items() if not self.bench.steps_left(arm, self.budget, costs[key])]
        if len(dear) == len(arms):
            cheapest = min(costs, key=costs.__getitem__)
            self.bench.steps_within(arms[cheapest], self.budget, costs[cheapest])  # which says why it cannot
        if dear:
            for key in dear:
                del combinations[key]
            names = list(dict.fromkeys(arms[key].name for key in dear))
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            self.left_out.append(
                f"{len(dear)} of {len(arms)} combinations are left out, their operators would take all of a trial's "
                f"{self.budget / 1e12:.3g} TFLOP: {', '.join(names[:3])}{more}"
            )
            self.say(self.left_out[0])

    def from_nothing(self) -> dict[str, Any]:
        """The target from nothing on the same share, at the best of its rates; what is there is not run again.

        Raises:
            GrowkitError: it failed at every rate.
            KeyboardInterrupt: stopped; the run at hand goes on the next time.
        """
        rates = numbers("--lrs", self.settings.lrs)
        # Growing is judged by this, so a grid that was made for grown models must not hold it back.
        made = [self._at_rate(lr) for lr in (*rates, 2 * rates[-1])]
        finished = [found for found in made if "failed" not in found]
        if not finished:
            raise GrowkitError(f"from nothing: failed at every rate, the first for this reason: {made[0]['failed']}")
        best = max(finished, key=lambda found: self.sign * self.score(found))
        self.say(
            f"from nothing: held-out {self.settings.metric} {self.score(best):.4f} after "
            f"{best['flops'] / 1e12:.3g} TFLOP, at lr {best['lr']:g}, the best of {len(made)}"
        )
        return best

    def _at_rate(self, lr: float) -> dict[str, Any]:
        """The result of training from nothing at a rate, or why it failed."""
        folder = self.bench.folder / NOTHING / f"lr{lr:g}"
        path = folder / "result.json"
        if path.exists() and "failed" not in (kept := read_own(path)):
            return kept
        arm, seed = Arm(SCRATCH), self.bench.recipe.seed
        try:
            found = self.bench.train(
                self.bench.start(arm, seed, None),
                arm,
                flops=self.budget,
                seed=seed,
                lr=lr,
                evals=self.settings.evals,
                folder=folder,
                progress=self.follow(f"from nothing, lr {lr:g}", 0, self.total),
            )
        except (UnreadablePictureError, UnwritableError):
            raise  # no run would fare better
        except FAILURES as error:
            found = {"failed": first_line(error)}
            self.say(f"from nothing, lr {lr:g}: failed ({found['failed']})")
        result = {"schema": SCHEMA, "growkit": __version__, "lr": lr, **found}
        write_json(path, result)
        return result

    def run(self, nothing: dict[str, Any]) -> list[FrozenTrial]:
        """Make every trial that is missing; all of them.

        Raises:
            KeyboardInterrupt: stopped; the trials that ended are kept.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        # of a killed process: Optuna would wait for it; who lives is told apart by the lock of the run folder
        (self.bench.folder / f"{STUDY}.lock").unlink(missing_ok=True)
        kept = self._study(
            seed=0, study_name="sweep", storage=JournalStorage(JournalFileBackend(str(self.bench.folder / STUDY)))
        )
        while len(ended := kept.trials) < self.total:
            study, trial, answers = self._next(ended)
            arm, options = self.space.combine(answers)
            trial.set_user_attr("options", options)
            progress = self.follow(f"trial {len(ended) + 1}", len(ended), self.total)
            try:
                score = self._score_of(trial, arm, options["lr"], nothing, progress)
            except optuna.TrialPruned:
                frozen = study.tell(trial, state=TrialState.PRUNED)
            except (UnreadablePictureError, UnwritableError):
                raise  # no run would fare better
            except FAILURES as error:
                trial.set_user_attr("reason", first_line(error))
                frozen = study.tell(trial, state=TrialState.FAIL)
            else:
                frozen = study.tell(trial, score)
            kept.add_trial(frozen)
            self._tell(kept.trials[-1])
        return ended

    def _study(self, *, seed: int, **where: Any) -> optuna.Study:
        return optuna.create_study(
            sampler=TPESampler(seed=seed, n_startup_trials=self.settings.trials // 2),
            pruner=SuccessiveHalvingPruner(min_resource=max(1, self.settings.evals // 4), reduction_factor=HALVE),
            direction="maximize" if self.sign > 0 else "minimize",
            load_if_exists=True,
            **where,
        )

    def _next(self, ended: Sequence[FrozenTrial]) -> tuple[optuna.Study, Trial, dict[str, str]]:
        """A trial of what was not tried yet, in a study in memory, and its answers.

        It is Optuna's choice, or any where Optuna goes on repeating itself. What it is depends on the trials that
        ended alone, so that a sweep that was stopped goes on as it would have gone.
        """
        seed = self.bench.recipe.seed + len(ended)
        study = self._study(seed=seed)
        study.add_trials(ended)
        untried = self.space.combinations.keys() - {repr(trial.user_attrs["options"]) for trial in ended}

        for _ in range(REPEATS):
            trial = study.ask()
            answers = self.space.draw(trial)
            if self.space.key(answers) in untried:
                return study, trial, answers
            study.tell(trial, state=TrialState.FAIL)
        left = [answers for key, answers in self.space.combinations.items() if key in untried]
        study.enqueue_trial(random.Random(seed).choice(left))
        trial = study.ask()
        return study, trial, self.space.draw(trial)

    def _score_of(self, trial: Trial, arm: Arm, lr: float, nothing: dict[str, Any], progress: Done) -> float:
        """Train a trial; its final score.

        Raises:
            optuna.TrialPruned: others were better at the same place.
        """
        settings, seed = self.settings, self.bench.recipe.seed
        start = self.bench.start(arm, seed, arm.operator_lr, progress)
        trial.set_user_attr("operator_flops", start.flops)
        trial.set_user_attr("step0", getattr(start.step0, settings.metric))
        trial.set_user_attr("flops", start.flops)
        place = 0

        def judge(record: StepRecord) -> None:
            nonlocal place
            if record.scores is None:
                return
            place += 1
            score = getattr(record.scores, settings.metric)
            trial.report(score, place)
            trial.set_user_attr("score", score)
            trial.set_user_attr("flops", start.flops + record.step * nothing["flops_per_step"])
            if record.step < record.total and trial.should_prune():
                raise optuna.TrialPruned

        result = self.bench.train(
            start,
            arm,
            flops=self.budget,
            seed=seed,
            lr=lr,
            evals=settings.evals,
            progress=progress,
            watch=judge,
        )
        trial.set_user_attr("cost", self.flops_to(result, self.score(nothing)))
        return self.score(result)

    def score(self, result: dict[str, Any]) -> float:
        """The final score of a run."""
        return float(result["final"][self.settings.metric])

    def flops_to(self, result: dict[str, Any], target: float) -> float | None:
        """FLOPs after which a run first had that score; None where it never had."""
        higher = self.settings.metric == "top1"
        curve = [(flops, top1 if higher else loss) for flops, top1, loss in result["curve"]]
        return flops_to(curve, target, higher=higher)

    def _tell(self, trial: FrozenTrial) -> None:
        tried = _tried(trial)
        shown = "–" if tried.score is None else f"{tried.score:.4f}"
        why = f" ({tried.reason})" if tried.reason else ""
        self.say(
            f"[{tried.number}/{self.total}] {_words(tried.options)}: {tried.state}{why}, {self.settings.metric} {shown}"
        )


class Space:
    """The choices of a trial; what cannot matter for this pair or at this rank is not asked."""

    def __init__(self, bench: Bench, settings: SweepSettings):
        self.bench, self.settings = bench, settings
        grown = growing(bench.source.architecture, bench.target)
        self.staged = "blocks" in grown and len(grown) > 1
        self.learned: dict[str, bool] = {}
        # Answers that come to the same, as 1e-3 and 0.001 do, are one combination.
        self.combinations = {self.key(one): one for one in self._all({})}

    def key(self, answers: dict[str, str]) -> str:
        """The same for answers that come to the same."""
        return repr(self.combine(answers)[1])

    def questions(self, answers: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
        """What is to be chosen and from what; each answer must be in `answers` before the next question.

        Raises:
            GrowkitError: a method that cannot grow this pair, or an option that it does not have.
        """
        settings = self.settings
        yield "method", _listed(settings.methods)
        method, fixed = answers["method"], _fixed(answers["method"])
        grow, _ = self._grow(answers)
        if method not in self.learned:
            self.learned[method] = self.bench.learned(grow)
        if grow.method == "mango":
            if not fixed & {"rank", "ranks"}:
                yield "rank", _listed(settings.rank_choices)
            if "ring_order" not in fixed and max(bond_ranks(self._grow(answers)[0])) > 1:
                yield "ring_order", _listed(settings.ring_orders)
        if self.staged and "stages" not in fixed:
            yield "stages", _listed(settings.stage_choices)
        if find(grow.method).NOISE and "noise" not in fixed:
            yield "noise", _listed(settings.noises)
        if self.learned[method]:
            yield "operator_steps", _listed(settings.operator_steps)
            if int(answers["operator_steps"]):
                yield "operator_lr", _listed(settings.operator_lrs)
        yield "lr", _listed(settings.lrs)

    def _all(self, answers: dict[str, str]) -> Iterator[dict[str, str]]:
        for name, choices in self.questions(answers):
            if name not in answers:
                for choice in choices:
                    yield from self._all({**answers, name: choice})
                return
        yield answers

    def draw(self, trial: Trial) -> dict[str, str]:
        """Optuna's answers; where there is one choice, Optuna is not asked."""
        answers: dict[str, str] = {}
        for name, choices in self.questions(answers):
            answers[name] = trial.suggest_categorical(name, choices) if len(choices) > 1 else choices[0]
        return answers

    def combine(self, answers: dict[str, str]) -> tuple[Arm, dict[str, Any]]:
        """The arm that answers make, and its options by name: those that were chosen and those of the method's text."""
        grow, given = self._grow(answers)
        steps = int(answers.get("operator_steps", 0))
        rate = float(answers["operator_lr"]) if steps else None
        chosen = {"method", *_fixed(answers["method"]), *given}
        options = {name: value for name, value in asdict(grow).items() if name in chosen}
        name = ":".join((grow.method, *(f"{key}={_text(options[key])}" for key in options if key != "method")))
        arm = Arm(f"{name}:steps={steps}", grow, operator_steps=steps, operator_lr=rate)
        return arm, {**options, "steps": steps, "operator_lr": rate, "lr": float(answers["lr"])}

    def _grow(self, answers: dict[str, str]) -> tuple[GrowSettings, dict[str, Any]]:
        """Settings of growing by the answers so far, and those of them that were chosen."""
        grow = parse_arm(answers["method"]).grow
        assert grow is not None
        given: dict[str, Any] = {name: answers[name] for name in ("ring_order", "stages") if name in answers}
        if "rank" in answers:
            given |= _ranks(answers["rank"])
        if "noise" in answers:
            given["noise"] = float(answers["noise"])
        return replace(grow, **given), given


def _listed(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",")))


def _fixed(method: str) -> set[str]:
    """Names of the options that a method's text settles.

    Raises:
        GrowkitError: one of them is not of growing.
    """
    fixed = {part.partition("=")[0].replace("-", "_") for part in method.split(":")[1:]}
    for name, instead in (("steps", "--operator-steps"), ("lr", "--operator-lrs")):
        if name in fixed:
            raise GrowkitError(f"--methods {method}: a sweep takes {name} from {instead}, for every method alike")
    return fixed


def _ranks(text: str) -> dict[str, Any]:
    """'4' is the rank of every bond, '4x4x1x4' one for each."""
    if "x" in text:
        return {"ranks": text.replace("x", ",")}
    if not text.isdecimal():
        raise GrowkitError(f"--rank-choices {text}: expected whole numbers, or one for each bond as in 4x4x1x4")
    return {"rank": int(text)}


def _text(value: Any) -> str:
    """A value as --methods takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value).replace(",", "x")


def _tried(trial: FrozenTrial) -> Tried:
    known = trial.user_attrs
    return Tried(
        number=trial.number + 1,  # as the counter shows it
        options=known["options"],
        state=STATES[trial.state],
        reason=known.get("reason"),
        score=known.get("score") if trial.value is None else trial.value,
        step0=known.get("step0"),
        operator_flops=known.get("operator_flops", 0),
        flops=known.get("flops", 0),
        flops_to_scratch=known.get("cost"),
    )


def _words(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items() if value is not None)


def _conclude(
    pilot: Pilot, tried: Sequence[Tried], nothing: dict[str, Any], what: Sequence[str], data: str, command: str
) -> Swept:
    bench, settings, folder, sign = pilot.bench, pilot.settings, pilot.bench.folder, pilot.sign
    finished = [one for one in tried if one.state == "finished"]
    if not finished:
        reason = next((one.reason for one in tried if one.reason), "every score was not a number")
        raise GrowkitError(f"no trial finished, the first for this reason: {reason}")
    # Equal within the error of the score, the one with the cheaper operator is the better buy.
    top = max(sign * one.score for one in finished if one.score is not None)
    count = nothing["final"]["count"]
    error = (top * (1 - top) / count) ** 0.5 if settings.metric == "top1" else 0.0
    equal = [one for one in finished if one.score is not None and sign * one.score >= top - error]
    best = min(equal, key=lambda one: (one.operator_flops, -sign * (one.score or 0.0)))
    order = sorted(
        tried, key=lambda one: (one.state != "finished", -sign * one.score if one.score is not None else 1e9)
    )
    target = pilot.score(nothing)
    alone = pilot.flops_to(nothing, target)
    assert alone is not None  # its own end is always reached
    saving = None if best.flops_to_scratch is None else 1 - best.flops_to_scratch / alone
    reasons = tuple(_reasons(best, tried, finished, equal, error, settings, target, saving, count))
    where = [] if folder.parent == Path("run") else ["--run", str(folder.parent)]
    commands = _commands(best, bench, settings, pilot.budget, what, data, where)
    content = {
        **identity_of(bench),
        "adapted": bench.source.adapted,
        "command": command,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": asdict(settings),
        "from_nothing": nothing,
        "trials": [asdict(one) for one in order],
        "recommended": asdict(best),
        "saving_on_pilot": saving,
        "left_out": pilot.left_out,
        "reasons": reasons,
        "commands": commands,
        "versions": versions(),
        "hardware": hardware(),
    }
    write_json(folder / "results.json", content)
    write_sweep_page(folder, content, order)
    bench.let_starts_go()
    return Swept(folder, tuple(order), best, target, saving, reasons, commands, content)


def _reasons(
    best: Tried,
    tried: Sequence[Tried],
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
    if len(tried) > 1:
        lines.append(
            f"it was chosen among {len(tried)} trials on the images it is reported on; expect less of it on others"
        )
    if len(equal) > 1:
        lines.append(
            f"{len(equal)} trials lie within one standard error ({error:.4f}); of these its operator is the cheapest"
        )
    better = max if name == "top1" else min
    for option in best.options:
        by_value: dict[str, float] = {}
        for one in finished:
            value, score = one.options.get(option), one.score
            if score is not None and value is not None:
                by_value[str(value)] = better(by_value.get(str(value), score), score)
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
    elif saving <= 0:
        lines.append("on the pilot it reached that score no sooner: do not expect a saving")
    else:
        lines.append(
            f"on the pilot it reached that score with {saving:.0%} less compute; expect no more than that of the full "
            "run, and that if more data changes both alike: one seed on a share is a hint"
        )
    return lines


def _commands(
    best: Tried,
    bench: Bench,
    settings: SweepSettings,
    budget: float,
    what: Sequence[str],
    data: str,
    where: Sequence[str] = (),
) -> tuple[str, str]:
    """The `grow` and `finetune` commands that do on all images what the trial did.

    `what` names source and target, `where` the run folder.
    """
    options, recipe = dict(best.options), bench.recipe
    steps, operator_lr, lr = (options.pop(name) for name in ("steps", "operator_lr", "lr"))
    grow = {**options, "seed": recipe.seed}
    if steps:
        absent = ("epochs", "seed", "model_ema", "model_ema_decay")
        trained = {"data": data, "steps": steps, "lr": operator_lr}
        grow |= trained | _differing(bench.operator, FitSettings(**OPERATOR_DEFAULTS), but=(*trained, *absent))
    left = 1 - best.operator_flops * settings.share / budget  # the operator costs the same, of more
    length = {"epochs": f"{recipe.epochs * left:g}"}
    if recipe.steps is not None:
        length = {"steps": f"{round(recipe.steps / settings.share * left)}"}
    tune = {"data": data, **length, "lr": lr, "seed": recipe.seed}
    tune |= _differing(recipe, FitSettings(**FINETUNE_DEFAULTS), but=("epochs", "steps", "lr", "seed"))
    words = ["growkit", "grow", *what, *_given(grow), *where], ["growkit", "finetune", *_given(tune), *where]
    return shlex.join(words[0]), shlex.join(words[1])


def _differing(settings: FitSettings, plain: FitSettings, *, but: Sequence[str]) -> dict[str, Any]:
    """Settings that are not the default of the command that takes them."""
    return {n: value for n, value in asdict(settings).items() if value != getattr(plain, n) and n not in but}


def _given(options: Mapping[str, Any]) -> list[str]:
    """Options as the command line takes them."""
    words = []
    for name, value in options.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", str(value)]
    return words
