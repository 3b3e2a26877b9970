"""Every mutant held to what is judged of it."""

import time
from collections.abc import Callable, Iterable

from forked import Ended

Judge = Callable[[str], tuple[Ended, str | None]]  # of a mutant's name: how it ended, and what is wrong with that


def hold(names: Iterable[str], judge: Judge) -> None:
    """Judge mutants one by one, tell of each that was answered wrongly, and fail if there is any."""
    start, problems = time.monotonic(), {}
    statuses: dict[int, int] = {}
    for name in names:
        ended, problem = judge(name)
        statuses[ended.status] = statuses.get(ended.status, 0) + 1
        if problem:
            print(f"{name}: {problem}", flush=True)
            problems[name] = problem
    print(f"{sum(statuses.values())} mutants, {time.monotonic() - start:.0f} s, by exit status {statuses}")
    assert problems == {}
