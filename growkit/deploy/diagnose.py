"""Where an error comes from: ONNX Runtime's graph optimiser, or the export."""

from collections.abc import Callable

from growkit.deploy.limits import Limits
from growkit.deploy.numbers import Truth, number_checks
from growkit.deploy.runtime import Session
from growkit.errors import GrowkitError


def diagnose(unoptimised: Callable[[], Session], truth: Truth, limits: Limits) -> str:
    """One sentence about a file whose numbers are wrong; `unoptimised` opens it without graph optimisation."""
    try:
        checks, _ = number_checks(unoptimised(), truth, limits)
    except GrowkitError as error:
        return f"not found: without graph optimisation the file does not open ({error})"
    if any(c.verdict == "fail" and c.group == "numbers" for c in checks):
        return "an export bug: the errors stay with ONNX Runtime's graph optimisation off"
    return "an optimiser bug: with ONNX Runtime's graph optimisation off the numbers are right"
