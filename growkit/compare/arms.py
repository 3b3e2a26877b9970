"""Arms of a comparison: training from scratch, growth methods with their options, and controls."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from growkit.compare.settings import CompareSettings
from growkit.errors import GrowkitError
from growkit.ranges import refuse_number
from growkit.settings import GrowSettings

SCRATCH, LONGER = "from scratch", "source trained longer"
OPTIONS = {f.name: f.type for f in fields(GrowSettings) if f.name not in ("method", "seed")}
OPTIONS |= {"steps": int, "lr": float}


@dataclass(frozen=True)
class Arm:
    """One way to a trained model.

    name             its name in tables
    grow             how the target is grown; None for training from scratch and for the source trained longer
    operator_steps   updates of operator training, if the method has something to train; None for the default
    operator_lr      its learning rate; None for the best of the grid
    fresh_source     grow a source with random weights instead
    control          a baseline that methods should beat
    """

    name: str
    grow: GrowSettings | None = None
    operator_steps: int | None = None
    operator_lr: float | None = None
    fresh_source: bool = False
    control: bool = False

    @property
    def slug(self) -> str:
        """The name as a file name; distinct for distinct arms."""
        return re.sub(r"[^a-z0-9.=+]+", "-", self.name.lower()).strip("-")


def parse_arms(settings: CompareSettings, *, learned: Callable[[GrowSettings], bool]) -> list[Arm]:
    """List every arm of a comparison, training from scratch first.

    `learned` tells whether a method has something to train, for the control with an untrained operator.

    Raises:
        GrowkitError: an option that no method has, or the same arm twice.
    """
    arms = [Arm(SCRATCH), *(parse_arm(text) for text in settings.methods.split(","))]
    main = arms[1]
    assert main.grow is not None
    controls = settings.listed_controls()
    if "random-pad" in controls and not any(arm.grow and arm.grow.method == "random-pad" for arm in arms):
        arms.append(Arm("random-pad", GrowSettings(method="random-pad"), control=True))
    if "untrained-operator" in controls:
        for arm in arms[1:]:
            there = any(other.grow == arm.grow and other.operator_steps == 0 for other in arms)
            if arm.grow is not None and not there and learned(arm.grow):
                arms.append(replace(arm, name=f"{arm.name}, operator untrained", operator_steps=0, control=True))
    if "untrained-source" in controls:
        arms.append(replace(main, name=f"{main.name}, source untrained", fresh_source=True, control=True))
    if "source-longer" in controls:
        arms.append(Arm(LONGER, control=True))
    names = [arm.slug for arm in arms]
    twice = [arm.name for arm in arms if names.count(arm.slug) > 1]
    if twice:
        raise GrowkitError(f"--methods: {twice[0]} is there twice")
    return arms


def parse_arm(text: str) -> Arm:
    """Parse an arm from `method[:option=value]...`; options are those of `growkit grow`, `steps` and `lr`.

    Bond ranks are joined by x, as in mango:ranks=4x4x1x4, since commas separate the methods.

    Raises:
        GrowkitError: an unknown option or a value of the wrong kind.
    """
    method, *parts = text.strip().split(":")
    given: dict[str, Any] = {}
    typed: dict[str, str] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        key = key.replace("-", "_")
        if not equals or key not in OPTIONS:
            raise GrowkitError(f"--methods {text}: {part!r} is no option; choose from {', '.join(sorted(OPTIONS))}")
        try:
            given[key] = _value(OPTIONS[key], value)
        except ValueError:
            raise GrowkitError(f"--methods {text}: {value!r} is no value for {key}") from None
        typed[key] = value if isinstance(given[key], bool | str) else str(given[key]).removesuffix(".0")
    # one spelling, in one order: results are found by this name
    name = ":".join((method, *(f"{key}={typed[key]}" for key in OPTIONS if key in typed)))
    steps, rate = given.pop("steps", None), given.pop("lr", None)
    refuse_number(f"--methods {text}: steps", steps, least=0)
    refuse_number(f"--methods {text}: lr", rate, above=0)
    if "ranks" in given:
        given["ranks"] = given["ranks"].replace("x", ",")
    return Arm(name, GrowSettings(method=method, **given), operator_steps=steps, operator_lr=rate)


def in_words(options: Mapping[str, Any]) -> str:
    """Options with their values; None means left out and is skipped."""
    return ", ".join(f"{name} {value}" for name, value in options.items() if value is not None)


def _value(kind: Any, text: str) -> Any:
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError
        return text == "true"
    return kind(text) if kind in (int, float) else text
