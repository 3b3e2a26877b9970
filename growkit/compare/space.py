"""The search space of a sweep: the choices of a trial, and the arm and options that its answers give."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from optuna.trial import Trial

from growkit.arch.spec import LAYERS
from growkit.compare.arms import Arm, parse_arm
from growkit.compare.bench import Bench
from growkit.compare.settings import SweepSettings
from growkit.errors import GrowkitError
from growkit.methods import find
from growkit.methods.base import growing
from growkit.methods.mango import bond_ranks, takes_two_paths
from growkit.settings import GrowSettings


class SearchSpace:
    """The choices of a trial; choices that cannot matter for this pair or at this rank are skipped."""

    def __init__(self, bench: Bench, settings: SweepSettings):
        self.bench, self.settings = bench, settings
        grown = growing(bench.source.architecture, bench.target)
        self.staged = LAYERS in grown and len(grown) > 1
        self.combinations: dict[str, dict[str, str]] = {}
        for one in self._all({}):
            self.combinations.setdefault(self.key(one), one)

    def key(self, answers: dict[str, str]) -> str:
        """A key that is equal for equivalent answers, such as 1e-3 and 0.001."""
        return self.key_of(self.combine(answers)[1])

    def key_of(self, options: Mapping[str, Any]) -> str:
        """A key that is equal for options, as `combine` gives them, of trials that would be the same."""
        if options["method"] == "mango" and not options["steps"] and options.get("variant") in (None, "lossless"):
            # as it starts, a lossless ring differs only in whether it has a second path
            grow = GrowSettings(**{name: options[name] for name in ("rank", "ranks") if name in options})
            second = takes_two_paths(self.bench.source.architecture, self.bench.target, bond_ranks(grow))
            options = {**options, "rank": second, "ranks": None, "ring_order": None}
        return repr(sorted(options.items(), key=str))

    def questions(self, answers: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
        """Yield each choice's name and options; its answer must be in `answers` before the next one.

        Raises:
            GrowkitError: a method that cannot grow this pair, or an option that it does not have.
        """
        settings = self.settings
        yield "method", _listed(settings.methods)
        method, fixed = answers["method"], _fixed(answers["method"])
        grow, _ = self._grow({"method": method})
        learned = self.bench.costs.learned(grow)
        if grow.method == "mango":
            if not fixed & {"rank", "ranks"}:
                yield "rank", _listed(settings.rank_choices)
            if "ring_order" not in fixed and max(bond_ranks(self._grow(answers)[0])) > 1:
                yield "ring_order", _listed(settings.ring_orders)
        if self.staged and "stages" not in fixed:
            yield "stages", _listed(settings.stage_choices)
        if "noise" in find(grow.method).TAKES and "noise" not in fixed:
            yield "noise", _listed(settings.noises)
        if learned:
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
        """Draw answers from Optuna; it is not asked where there is only one option."""
        answers: dict[str, str] = {}
        for name, choices in self.questions(answers):
            answers[name] = trial.suggest_categorical(name, choices) if len(choices) > 1 else choices[0]
        return answers

    def combine(self, answers: dict[str, str]) -> tuple[Arm, dict[str, Any]]:
        """The arm for some answers, and its options by name: those chosen and those fixed in the method's text."""
        grow, given = self._grow(answers)
        steps = int(answers.get("operator_steps", 0))
        rate = float(answers["operator_lr"]) if steps else None
        chosen = {"method", *_fixed(answers["method"]), *given}
        options = {name: value for name, value in asdict(grow).items() if name in chosen}
        name = ":".join((grow.method, *(f"{key}={_text(options[key])}" for key in options if key != "method")))
        arm = Arm(f"{name}:steps={steps}", grow, operator_steps=steps, operator_lr=rate)
        return arm, {**options, "steps": steps, "operator_lr": rate, "lr": float(answers["lr"])}

    def _grow(self, answers: dict[str, str]) -> tuple[GrowSettings, dict[str, Any]]:
        """Growth settings for the answers so far, and those of them that were chosen."""
        grow = parse_arm(answers["method"]).grow
        assert grow is not None
        given: dict[str, Any] = {name: answers[name] for name in ("ring_order", "stages") if name in answers}
        if rank := answers.get("rank"):
            given |= {"ranks": rank.replace("x", ",")} if "x" in rank else {"rank": int(rank)}
        if "noise" in answers:
            given["noise"] = float(answers["noise"])
        return replace(grow, **given), given


def _listed(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",")))


def _fixed(method: str) -> set[str]:
    """Names of the options that a method's text fixes.

    Raises:
        GrowkitError: one of them is steps or lr, which have options of their own.
    """
    fixed = {part.partition("=")[0].replace("-", "_") for part in method.split(":")[1:]}
    for name, instead in (("steps", "--operator-steps"), ("lr", "--operator-lrs")):
        if name in fixed:
            raise GrowkitError(f"--methods {method}: a sweep takes {name} from {instead}, for every method alike")
    return fixed


def _text(value: Any) -> str:
    """A value as --methods takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value).replace(",", "x")
