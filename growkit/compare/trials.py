"""A finished trial of a sweep."""

from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

STATES = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "stopped early", TrialState.FAIL: "failed"}


@dataclass(frozen=True)
class Tried:
    """One trial: options as `growkit grow` and `finetune` name them; its last score on held-out images."""

    number: int  # from 1
    options: dict[str, Any]
    state: str
    reason: str | None  # of a failure
    score: float | None
    step0: float | None
    operator_flops: float
    flops: float  # spent in total, until it ended or was stopped
    flops_to_scratch: float | None  # to the pilot's final score from scratch; None if never reached


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
