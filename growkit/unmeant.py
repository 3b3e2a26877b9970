"""Options that mean nothing because something else was not given, or was: a warning beats a silent nothing."""

from dataclasses import dataclass, fields
from typing import Any

from growkit.ranges import option_of

READING = ("batch_size", "workers", "data_dir", "val_split")  # of FitSettings: how labelled images are read


@dataclass(frozen=True)
class Need:
    """What some options need to have an effect.

    options  fields of `settings`, which tells whether they were given: they then differ from their defaults
    met      whether they have an effect
    otherwise  why they have none, as in 'without --data'
    prefix   goes before each option's name, as in with_settings
    """

    settings: Any
    options: tuple[str, ...]
    met: bool
    otherwise: str
    prefix: str = ""


def unmeant(*needs: Need) -> list[str]:
    """Return a warning for each need that is not met and some of whose options were given."""
    lines = []
    for need in needs:
        changed = {f.name for f in fields(need.settings) if getattr(need.settings, f.name) != f.default}
        given = [option_of(need.prefix + name) for name in need.options if name in changed and not need.met]
        if given:
            means = "mean" if given[1:] else "means"
            lines.append(f"warning: {', '.join(given)} {means} nothing {need.otherwise}")
    return lines


def unmeant_in_training(recipe: Any) -> list[str]:
    """Like `unmeant`, for the options of any training; `recipe` is its FitSettings."""
    return unmeant(
        Need(recipe, ("model_ema_decay",), recipe.model_ema, "without --model-ema"),
        Need(recipe, ("min_lr",), recipe.sched == "cosine", f"with --sched {recipe.sched}"),
    )
