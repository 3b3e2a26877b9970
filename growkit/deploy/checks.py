"""One verdict of a verification: what was measured, what was allowed, and a line that says so."""

from dataclasses import dataclass
from typing import Literal

from growkit.errors import first_line

Verdict = Literal["pass", "fail", "inconclusive"]


@dataclass(frozen=True)
class Check:
    """A single check.

    group     provider, structure, weights, numbers, predictions, pixels, answers, pictures, accuracy, data sets,
              reference or latency
    name      unique inside the group, as in 'batch 5: relative RMS error'
    verdict   'inconclusive' where noise, or too little data or time, leaves it open
    measured  a number, or a word where there is none
    limit     what `measured` was compared with
    line      the finding as a sentence
    """

    group: str
    name: str
    verdict: Verdict
    measured: float | str
    limit: float | str
    line: str


def check(group: str, name: str, passed: bool, measured: float | str, limit: float | str, line: str = "") -> Check:
    """Make a check with two outcomes; without `line`, its line is made from name, measured and limit."""
    line = line or f"{name}: {shown(measured)}, allowed {shown(limit)}"
    return Check(group, name, "pass" if passed else "fail", measured, limit, line)


def refused(group: str, name: str, error: Exception) -> Check:
    """Make the check of a run that another library ended with `error`."""
    return check(group, f"{name}: runs", False, "refused", "ok", f"{name}: {first_line(error)}")


def shown(value: float | str) -> str:
    """Format a number with three significant digits, or one close to 1 by its difference; words stay as they are."""
    if isinstance(value, str):
        return value
    if value != 1 and f"{value:.3g}" == "1":
        return f"1 {'-' if value < 1 else '+'} {abs(1 - value):.2g}"
    return f"{value:.3g}"
