"""growkit sweep: a pilot on a share of the data. Optuna tries settings, losers stop early, one is recommended."""

import os
import random
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.pruners import SuccessiveHalvingPruner
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from growkit import __version__
from growkit.compare.arms import SCRATCH, Arm, in_words
from growkit.compare.bench import Bench, RunFailedError, bench_of, failing
from growkit.compare.folder import begin, read_own, refuse_begun
from growkit.compare.recommend import Swept, conclude
from growkit.compare.savings import cost_of, name_of, shown, sign_of
from growkit.compare.settings import SCHEMA, SweepSettings, numbers
from growkit.compare.space import SearchSpace
from growkit.compare.trials import tried_of
from growkit.errors import GrowkitError
from growkit.files import write_json
from growkit.job import Job
from growkit.source import Source
from growkit.text import some
from growkit.train.progress import Progress, each
from growkit.train.settings import FitSettings
from growkit.train.watch import StepRecord

FROM_SCRATCH = "from-scratch"  # a folder for each rate
STUDY = "study.log"  # Optuna's journal of finished trials, which survives a killed process
HALVE = 2  # successive halving: the best of this many trials continues
REPEATS = 20  # after so many repeats by Optuna a trial is picked at random


def sweep_settings(
    job: Job,
    source: Source,
    to: str,
    data: str,
    settings: SweepSettings,
    recipe: FitSettings,
    *,
    sets: Sequence[str] = (),
) -> Swept:
    """Find how to grow `source` into `to` by trials on a share of the data, in run/sweep.

    Every trial spends the FLOPs of training the target from scratch on that share for the recipe's epochs, so an
    expensive operator leaves fewer updates for fine-tuning.

    Raises:
        GrowkitError: a method that cannot grow this pair, operators that all cost more than a trial may spend, unusable
            data, every trial failed, a sweep that exists (and the job neither resumes nor forces), or resuming a
            different one.
        KeyboardInterrupt: stopped; a job with `resume` continues it.
    """
    refuse_begun(job, job.run.sweep)
    bench = bench_of(job, job.run.sweep, source, to, data, recipe, split=settings, sets=sets)
    pilot = Pilot(job, bench, settings)
    pilot.prepare()
    if bench.source.own_head:
        own = float(getattr(bench.source_score(), settings.metric))
        job.say(f"the source itself: held-out {name_of(settings.metric)} {shown(own, settings.metric)}")
    scratch = pilot.from_scratch()
    tried = [tried_of(trial) for trial in pilot.run(scratch)]
    for line in bench.data.remarks(bench.folder / "results.json"):
        job.say(line)
    what = [source.path, "--to", to, *source.loading.words, *(word for item in sets for word in ("--set", item))]
    return conclude(
        bench,
        settings,
        tried,
        scratch,
        budget=pilot.budget,
        left_out=pilot.left_out,
        what=what,
        data=data,
        command=job.run.command_line,
    )


class Pilot:
    """A folder of trials. Finished ones are not repeated; an interrupted one starts anew."""

    def __init__(self, job: Job, bench: Bench, settings: SweepSettings):
        self.job, self.bench, self.settings = job, bench, settings
        self.space = SearchSpace(bench, settings)
        self.sign = sign_of(settings.metric)
        self.budget = bench.costs.flops_per_step(Arm(SCRATCH)) * bench.costs.full.total
        self.left_out: list[str] = []  # a line on what `prepare` found too expensive

    @property
    def total(self) -> int:
        """Trials to make."""
        return min(self.settings.trials, len(self.space.combinations))

    def prepare(self) -> None:
        """Refuse what cannot work before anything runs, and record what is swept.

        Raises:
            GrowkitError: every operator uses up the budget, or the folder holds another sweep.
        """
        rates = numbers("--lrs", self.settings.lrs), numbers("--operator-lrs", self.settings.operator_lrs)
        self.bench.refuse_settings(*rates)
        self._leave_out_what_is_too_dear()
        begin(self.job, self.bench, self.settings, free=("trials",), test=False)

    def _leave_out_what_is_too_dear(self) -> None:
        """Drop combinations whose operator uses up the budget; raise GrowkitError if none is left."""
        combinations = self.space.combinations
        arms = {key: self.space.combine(answers)[0] for key, answers in combinations.items()}
        told = self.job.tell("counting what trials cost")
        costs = {key: self.bench.costs.operator_flops(arms[key]) for key in each(list(arms), told)}
        dear = [key for key, arm in arms.items() if not self.bench.costs.steps_left(arm, self.budget, costs[key])]
        if len(dear) == len(arms):
            cheapest = min(costs, key=costs.__getitem__)
            self.bench.costs.steps_within(arms[cheapest], self.budget, costs[cheapest])  # raises, and says why
        if dear:
            for key in dear:
                del combinations[key]
            names = list(dict.fromkeys(arms[key].name for key in dear))
            self.left_out.append(
                f"{len(dear)} of {len(arms)} combinations are left out, their operators would take all of a trial's "
                f"{self.budget / 1e12:.3g} TFLOP: {some(names)}, at every rate"
            )
            self.job.say(self.left_out[0])

    def from_scratch(self) -> dict[str, Any]:
        """Train the target from scratch on the same share, at the best of its learning rates; runs on file are reused.

        Raises:
            GrowkitError: it failed at every rate.
            KeyboardInterrupt: stopped; the current run resumes the next time.
        """
        rates = numbers("--lrs", self.settings.lrs)
        # This is the baseline for growing, so a grid chosen for grown models must not limit it.
        made = [self._at_rate(lr) for lr in (*rates, 2 * rates[-1])]
        finished = [found for found in made if "failed" not in found]
        if not finished:
            raise GrowkitError(f"from scratch: failed at every rate, the first for this reason: {made[0]['failed']}")
        best = max(finished, key=lambda found: self.sign * self.score(found))
        metric = self.settings.metric
        self.job.say(
            f"from scratch: held-out {name_of(metric)} {shown(self.score(best), metric)} after "
            f"{best['flops'] / 1e12:.3g} TFLOP, at lr {best['lr']:g}, the best of {len(made)}"
        )
        return best

    def _at_rate(self, lr: float) -> dict[str, Any]:
        """Result of training from scratch at a learning rate, or why it failed; final once there are trials."""
        folder = self.bench.folder / FROM_SCRATCH / f"lr{lr!r}"
        path = folder / "result.json"
        if path.exists() and ("failed" not in (kept := read_own(path)) or (self.bench.folder / STUDY).exists()):
            return kept
        arm, seed = Arm(SCRATCH), self.bench.recipe.seed
        try:
            with failing():
                found = self.bench.train(
                    self.bench.start(arm, seed, None),
                    arm,
                    flops=self.budget,
                    seed=seed,
                    lr=lr,
                    evals=self.settings.evals,
                    folder=folder,
                    progress=self.job.follow(f"from scratch, lr {lr:g}", 0, self.total),
                )
        except RunFailedError as reason:
            found = {"failed": str(reason)}
            self.job.say(f"from scratch, lr {lr:g}: failed ({found['failed']})")
        result = {"schema": SCHEMA, "growkit": __version__, "lr": lr, **found}
        write_json(path, result)
        return result

    def run(self, scratch: dict[str, Any]) -> list[FrozenTrial]:
        """Make every missing trial; return all trials.

        Raises:
            KeyboardInterrupt: stopped; finished trials are kept.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        # left by a killed process, and Optuna would wait for it; the run folder's lock rules out a live one
        (self.bench.folder / f"{STUDY}.lock").unlink(missing_ok=True)
        journal = self.bench.folder / STUDY
        if journal.exists() and (cut := journal.read_bytes().rpartition(b"\n")[2]):
            os.truncate(journal, journal.stat().st_size - len(cut))  # a line that a power cut or a full disk ended
        try:
            storage = JournalStorage(JournalFileBackend(str(journal)))
        except ValueError:
            raise GrowkitError(f"{journal}: damaged; start anew with --force in place of --resume") from None
        kept = self._study(seed=0, study_name="sweep", storage=storage)
        while len(ended := kept.trials) < self.total:
            study, trial, answers = self._next(ended)
            arm, options = self.space.combine(answers)
            trial.set_user_attr("options", options)
            progress = self.job.follow(f"trial {len(ended) + 1}", len(ended), self.total)
            try:
                with failing():
                    score = self._score_of(trial, arm, options["lr"], scratch, progress)
            except optuna.TrialPruned:
                frozen = study.tell(trial, state=TrialState.PRUNED)
            except RunFailedError as reason:
                trial.set_user_attr("reason", str(reason))
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
        """Return the next untried combination as an in-memory study, a trial and its answers.

        Optuna chooses it, or chance if Optuna keeps repeating itself. The choice depends only on the finished trials,
        so that a stopped sweep continues as it would have without the stop.
        """
        seed = self.bench.recipe.seed + len(ended)
        study = self._study(seed=seed)
        study.add_trials(ended)
        untried = self.space.combinations.keys() - {self.space.key_of(trial.user_attrs["options"]) for trial in ended}

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

    def _score_of(self, trial: Trial, arm: Arm, lr: float, scratch: dict[str, Any], progress: Progress) -> float:
        """Train a trial and return its final score.

        Raises:
            optuna.TrialPruned: other trials were better at the same evaluation.
        """
        settings, seed = self.settings, self.bench.recipe.seed
        start = self.bench.start(arm, seed, arm.operator_lr, progress)
        trial.set_user_attr("operator_flops", start.flops)
        step0 = getattr(start.step0, settings.metric)
        trial.set_user_attr("step0", step0)
        if self.sign * step0 >= self.sign * self.score(scratch):  # known even if it is stopped
            trial.set_user_attr("cost", 0)
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
            trial.set_user_attr("flops", start.flops + record.step * scratch["flops_per_step"])
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
        trial.set_user_attr("cost", cost_of(result, self.score(scratch), settings.metric))
        return self.score(result)

    def score(self, result: dict[str, Any]) -> float:
        """The final score of a run."""
        return float(result["final"][self.settings.metric])

    def _tell(self, trial: FrozenTrial) -> None:
        tried = tried_of(trial)
        score = shown(tried.score, self.settings.metric)
        why = f" ({tried.reason})" if tried.reason else ""
        ended = f"{tried.state}{why}, {name_of(self.settings.metric)} {score}"
        self.job.say(f"[{tried.number}/{self.total}] {in_words(tried.options)}: {ended}")
