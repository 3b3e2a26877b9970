"""A trial of a sweep that ended."""

from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

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
    flops_to_scratch: float | None  # to what training from scratch ends the pilot with; None where never


def tried_of(trial: FrozenTrial) -> Tried:
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
