"""growkit compare: every arm on the same images, in the same order, for the same compute; resumable run by run."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from growkit import __version__
from growkit.checkpoint import WEIGHTS, write_tensors
from growkit.compare.arms import Arm, parse_arms
from growkit.compare.bench import Bench, RunFailedError, bench_of, failing
from growkit.compare.figures import ArmFigures, arm_figures, warnings
from growkit.compare.folder import begin, described, read_own, refuse_begun
from growkit.compare.page import write_pages
from growkit.compare.savings import sign_of
from growkit.compare.settings import SCHEMA, CompareSettings, numbers, percent
from growkit.errors import GrowkitError
from growkit.files import whole_file, write_json
from growkit.job import Job
from growkit.lineage import flops_of
from growkit.source import Source
from growkit.train.data import labels_of
from growkit.train.progress import Progress, each
from growkit.train.settings import FitSettings

EXTENDABLE = ("methods", "controls", "seeds", "budgets", "source_flops")  # a resumed comparison may ask for more


@dataclass(frozen=True)
class Cell:
    """One run to make: an arm at a share of the full budget, with a seed and a learning rate."""

    arm: Arm
    budget: float
    seed: int
    lr: float

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.arm.name}, budget {percent(self.budget)}, seed {self.seed}, lr {self.lr:g}"

    @property
    def slug(self) -> str:
        """For files."""
        return f"{self.arm.slug}-b{self.budget!r}-s{self.seed}-lr{self.lr!r}"


class Comparison:
    """A folder of runs. Runs already on file are not repeated."""

    def __init__(self, job: Job, bench: Bench, settings: CompareSettings):
        self.job, self.bench, self.settings = job, bench, settings
        self.runs = bench.folder / "runs"
        self.arms = parse_arms(settings, learned=bench.costs.learned)
        self.budgets = numbers("--budgets", settings.budgets)
        self.lrs = numbers("--lrs", settings.lrs)
        self.operator_lrs = numbers("--operator-lrs", settings.operator_lrs)
        self.full = bench.costs.flops_per_step(self.arms[0]) * bench.costs.full.total
        self.seeds = range(bench.recipe.seed, bench.recipe.seed + settings.seeds)
        self.total = len(self.arms) * len(self.budgets) * (len(self.lrs) + len(self.seeds) - 1)
        self.finished = 0
        self._rates: dict[str, float | None] = {}  # of operator training, by arm; None where every rate failed

    def prepare(self) -> None:
        """Refuse what cannot work before anything runs, and record what is compared.

        Raises:
            GrowkitError: an arm's operator uses up the smallest budget, the last seed is too large, or the folder holds
                a comparison with other settings or of another version.
        """
        own_rates = [arm.operator_lr for arm in self.arms if arm.operator_lr is not None]
        self.bench.refuse_settings(self.lrs, [*self.operator_lrs, *own_rates])
        replace(self.bench.recipe, seed=self.seeds[-1])  # refuses a seed that is too large
        costs, share = self.bench.costs, self.budgets[0]
        spent = [
            (arm, costs.operator_flops(arm)) for arm in each(self.arms, self.job.tell("counting what methods cost"))
        ]
        # the dearest operator first, so that what its message allows holds for all; before it what trains none
        for arm, flops in sorted(spent, key=lambda one: (one[1] > 0, -one[1])):
            costs.steps_within(arm, self.full * share, flops, share=share)
        begin(self.job, self.bench, self.settings, free=EXTENDABLE, test=True)

    def run(self) -> list[dict[str, Any]]:
        """Make every missing run and score the chosen ones on the test images; return all results.

        Raises:
            KeyboardInterrupt: stopped; finished runs are kept, and the current one resumes the next time.
        """
        self.run_some(self.arms)
        self.bench.let_starts_go()
        return self.results()

    def run_some(self, arms: Sequence[Arm]) -> None:
        """Make the runs of some arms; processes that share the folder may each take different arms.

        Raises:
            KeyboardInterrupt: as `run`.
        """
        for seed in self.seeds:
            for arm in arms:
                for budget in self.budgets:
                    self._cell_of(arm, budget, seed)

    def _cell_of(self, arm: Arm, budget: float, seed: int) -> None:
        """Make the runs of one arm, budget and seed: the whole grid on the first seed, its best rate on the others."""
        grid, best, first = self.lrs, self.best(arm, budget), seed == self.seeds[0]
        if best is not None and (not first or _is_chosen(best)):
            grid = (best["lr"],)  # a choice is final: a rate that failed then is not tried again
        elif not first:
            self.finished += 1
            return  # every rate failed; the reasons are on file
        if first:
            self.finished += len(self.lrs) - len(grid)
        for lr in grid:
            self._run(Cell(arm, budget, seed, lr))
        chosen = self.best(arm, budget) if first else self._result(Cell(arm, budget, seed, grid[0]))
        if chosen is None or "failed" in chosen:
            return
        if chosen["test"] is None:
            self._test(Cell(arm, budget, seed, chosen["lr"]), chosen)
        if chosen["test"] is None:
            return  # its weights stay, so that --resume can try again
        for lr in self.lrs:  # also those left by a process that died before removing them
            (self.runs / Cell(arm, budget, seed, lr).slug / WEIGHTS).unlink(missing_ok=True)

    def best(self, arm: Arm, budget: float) -> dict[str, Any] | None:
        """The first seed's run that was chosen for the test images, else the best one so far; None if there is none."""
        made = [self._result(Cell(arm, budget, self.seeds[0], lr)) for lr in self.lrs]
        finished = [found for found in made if found is not None and "failed" not in found]
        metric = self.settings.metric
        return max(finished, key=lambda run: (_is_chosen(run), sign_of(metric) * run["final"][metric]), default=None)

    def results(self) -> list[dict[str, Any]]:
        """Every run on file that belongs to this comparison, failed ones too, in order."""
        cells = product(self.arms, self.budgets, self.seeds, self.lrs)
        return [found for cell in cells if (found := self._result(Cell(*cell))) is not None]

    def left_out(self) -> list[str]:
        """Methods, budgets and seeds on file that the settings do not ask for."""
        made = [read_own(path) for path in sorted(self.runs.glob("*/result.json"))]
        arms = {found["arm"] for found in made} - {arm.name for arm in self.arms}
        budgets = {found["budget"] for found in made} - set(self.budgets)
        seeds = {found["seed"] for found in made} - set(self.seeds)
        return [
            *sorted(arms),
            *(f"budget {one:g}" for one in sorted(budgets)),
            *(f"seed {one}" for one in sorted(seeds)),
        ]

    def _run(self, cell: Cell) -> None:
        found, folder = self._result(cell), self.runs / cell.slug
        self.finished += 1
        # one that is not tested yet is of no use without its weights
        if found is not None and "failed" not in found and (found["test"] or self.bench.kept(cell.arm, folder)):
            return
        facts = {
            "schema": SCHEMA,
            "growkit": __version__,
            "arm": cell.arm.name,
            "budget": cell.budget,
            "seed": cell.seed,
            "lr": cell.lr,
            "test": None,
        }
        try:
            with failing():
                operator_lr = self._operator_lr(cell.arm)
                start = self.bench.start(cell.arm, cell.seed, operator_lr, self._progress(f"operator of {cell.name}"))
                trained = self.bench.train(
                    start,
                    cell.arm,
                    flops=self.full * cell.budget,
                    seed=cell.seed,
                    lr=cell.lr,
                    evals=max(1, round(self.settings.evals * cell.budget)),
                    folder=folder,
                    progress=self._progress(cell.name),
                )
        except RunFailedError as reason:
            write_json(folder / "result.json", {**facts, "failed": str(reason)})
            self.job.say(f"[{self.finished}/{self.total}] {cell.name}: failed, the others go on ({reason})")
            return
        with whole_file(folder / WEIGHTS) as partial:
            write_tensors(partial, start.model.cpu().state_dict())
        write_json(folder / "result.json", {**facts, "operator_lr": operator_lr, **trained})
        self.job.say(
            f"[{self.finished}/{self.total}] {cell.name}: held-out top-1 {trained['final']['top1']:.2%}, "
            f"loss {trained['final']['loss']:.4f} in {trained['seconds']:.0f} s"
        )

    def _progress(self, title: str) -> Progress:
        return self.job.follow(title, self.finished - 1, self.total)

    def _operator_lr(self, arm: Arm) -> float | None:
        """The arm's operator learning rate: its own, or the one with the lowest held-out loss on the first seed."""
        if not self.bench.costs.operator_steps(arm):
            return None
        if arm.operator_lr is not None or len(self.operator_lrs) == 1:
            return arm.operator_lr or self.operator_lrs[0]
        made = (self._result(Cell(arm, budget, self.seeds[0], lr)) for budget in self.budgets for lr in self.lrs)
        used = [found["operator_lr"] for found in made if found is not None and "failed" not in found]
        if used:  # a choice is final
            return float(used[0])
        if arm.slug not in self._rates:
            self._rates[arm.slug] = self._best_operator_lr(arm)
        if (chosen := self._rates[arm.slug]) is None:
            raise GrowkitError(f"{arm.name}: its operator failed at every rate of {self.settings.operator_lrs}")
        return chosen

    def _best_operator_lr(self, arm: Arm) -> float | None:
        """Train the arm's operator at every rate, on the first seed; None if all fail."""
        tried: dict[float, float] = {}
        for lr in self.operator_lrs:
            try:
                with failing():
                    progress = self._progress(f"operator of {arm.name}, lr {lr:g}")
                    start = self.bench.start(arm, self.seeds[0], lr, progress)
            except RunFailedError as reason:
                self.job.say(f"operator of {arm.name}, lr {lr:g}: failed ({reason})")
                continue
            assert start.after_operator is not None
            tried[lr] = start.after_operator.loss
        return min(tried, key=tried.__getitem__, default=None)

    def _test(self, cell: Cell, result: dict[str, Any]) -> None:
        """Score a chosen run on the test images, once."""
        folder = self.runs / cell.slug
        try:
            with failing():
                model = self.bench.kept(cell.arm, folder)
                assert model is not None  # as _run left it, or found it
                result["test"] = asdict(self.bench.score(model, test=True))
            result.pop("test_failed", None)
        except RunFailedError as reason:
            result["test_failed"] = str(reason)
            self.job.say(f"{cell.name}: failed on the test images, the others go on ({reason})")
        write_json(folder / "result.json", result)

    def _result(self, cell: Cell) -> dict[str, Any] | None:
        path = self.runs / cell.slug / "result.json"
        return read_own(path) if path.exists() else None


def _is_chosen(run: dict[str, Any]) -> bool:
    """Whether a run was chosen for the test images, scored there or not."""
    return run["test"] is not None or "test_failed" in run


@dataclass(frozen=True)
class Compared:
    """Result of `compare_methods`: its folder, the figures of each arm, and everything as JSON."""

    folder: Path
    arms: tuple[ArmFigures, ...]
    content: dict[str, Any]


def compare_methods(
    job: Job,
    source: Source,
    to: str,
    data: str,
    settings: CompareSettings,
    recipe: FitSettings,
    *,
    sets: Sequence[str] = (),
) -> Compared:
    """Compare methods on growing `source` into `to`, in run/compare.

    `recipe` sets the full budget: the target trained from scratch for its epochs or steps.

    Raises:
        GrowkitError: a method that cannot grow this pair, a budget below an operator's cost, unusable data, a
            comparison that exists (and the job neither resumes nor forces), or resuming a different one.
        KeyboardInterrupt: stopped; a job with `resume` continues it.
    """
    folder, say = job.run.compare, job.say
    refuse_begun(job, folder)
    steps = settings.operator_steps
    bench = bench_of(job, folder, source, to, data, recipe, split=settings, operator_steps=steps, sets=sets)
    comparison = Comparison(job, bench, settings)
    comparison.prepare()
    runs = comparison.run()
    for line in bench.data.remarks(folder / "results.json"):
        say(line)
    for left in comparison.left_out():
        say(f"not in these figures, though run here: {left}; name it again to have it in")
    known = settings.source_flops if settings.source_flops is not None else flops_of(source)
    arms = arm_figures(
        runs,
        arms=comparison.arms,
        seeds=comparison.seeds,
        budgets=comparison.budgets,
        metric=settings.metric,
        source_flops=known,
    )
    content = {
        **described(bench, settings, job.run.command_line),
        "largest_class": max(Counter(labels_of(bench.test.val)).values()),
        "full_flops": comparison.full,
        "source_flops": known,
        "source_score": asdict(bench.source_score()),
        "own_head": bench.source.own_head,
        "arms": [asdict(arm) for arm in arms],
        "arm_settings": {arm.name: asdict(arm) for arm in comparison.arms},
        "runs": runs,
    }
    for told in warnings(content, arms):
        say(f"warning: {told}")
    write_json(folder / "results.json", content)
    write_pages(folder, content, arms)
    return Compared(folder, arms, content)
