"""Numbers and words that settings and labels may hold; any other is refused, and the error names it."""

from collections.abc import Collection
from typing import Any

from growkit.errors import GrowkitError

MOST = 10**9  # of anything: steps, batches, seconds; larger numbers are typos, and overflow in libraries
SEEDS = 2**31 - 1  # NumPy takes 32 bits; the rest leaves room for adding to a seed


def option_of(name: str) -> str:
    """The setting of this name as it is typed: --batch-size."""
    return "--" + name.replace("_", "-")


def refuse_outside(settings: Any, *names: str, prefix: str = "", **limits: float) -> None:
    """Check that fields of `settings` are within the `limits` of refuse_number.

    `prefix` goes before the option's name, as in with_settings.

    Raises:
        GrowkitError: a field is outside, or not a number (NaN).
    """
    for name in names:
        refuse_number(option_of(prefix + name), getattr(settings, name), **limits)


def refuse_number(
    option: str,
    value: float | None,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float = MOST,
    below: float | None = None,
) -> None:
    """Check that one option's value is in a range: from `least` or above `above`, up to `most` or below `below`.

    A value that is None was left out, and passes.

    Raises:
        GrowkitError: it is outside, or not a number (NaN).
    """
    if value is None:
        return
    low = (least is None or value >= least) and (above is None or value > above)
    high = value < below if below is not None else value <= most
    if low and high:
        return
    words = [] if least is None else [f"{least:g} or more"]
    words += [] if above is None else [f"more than {above:g}"]
    if below is not None:
        words.append(f"less than {below:g}")
    elif most != MOST or low:  # MOST is far above any real value, so mention it only to those who exceed it
        words.append(f"at most {most}")
    told = value if isinstance(value, int) else f"{value:g}"
    raise GrowkitError(f"{option} {told}: expected {', and '.join(words)}")


def refuse_choice(option: str, value: object, choices: Collection[str]) -> None:
    """Check that one option's value is among its choices.

    Raises:
        GrowkitError: it is not.
    """
    if value not in choices:
        *others, last = choices
        raise GrowkitError(f"{option} {value}: unknown; choose {', '.join(others)} or {last}")


def refuse_labels(lowest: int, highest: int, outputs: int) -> None:
    """Check that labels are among the model's classes: 0 up to, not including, `outputs`.

    Raises:
        GrowkitError: a label has no logit.
    """
    if lowest < 0 or highest >= outputs:
        raise GrowkitError(
            f"labels run from {lowest} to {highest} but the model has {outputs} outputs; "
            "give the model as many classes as the data"
        )
