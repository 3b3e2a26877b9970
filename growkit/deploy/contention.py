"""How much of this process's processors other programs took, from Linux's /proc/stat."""

import os
import time
from collections.abc import Callable
from pathlib import Path

CONTENDED = 0.15  # share of the processors that others take; above it, timings are not to be trusted


class Contention:
    """A stopwatch for the load of other programs: each lap is their share since the last one.

    Time that is neither idle nor this process's own counts as theirs, including time stolen by other
    virtual machines. /proc/stat counts in hundredths of a second: laps under a quarter of a second say little.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.perf_counter,
        own: Callable[[], float] = time.process_time,
        idle: Callable[[], tuple[float, int] | None] = lambda: idle_seconds(),
    ):
        self._clock, self._own, self._idle = clock, own, idle
        self._last = self._now()

    def lap(self) -> float | None:
        """Return the share of the processors, 0 to 1, that others took since the last lap; None if unknown."""
        before, self._last = self._last, self._now()
        if before is None or self._last is None or self._last[0] <= before[0]:
            return None
        wall, own, idle, processors = (*(b - a for a, b in zip(before[:3], self._last[:3], strict=True)), before[3])
        return min(1.0, max(0.0, 1 - (own + idle) / (wall * processors)))

    def _now(self) -> tuple[float, float, float, int] | None:
        found = self._idle()
        return (self._clock(), self._own(), *found) if found else None


def idle_seconds(stat: Path = Path("/proc/stat")) -> tuple[float, int] | None:
    """Return the total idle seconds since boot of the processors this process may use, and their number.

    None where the file is absent or, as in some sandboxes, all zeros.
    """
    try:
        lines = stat.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    rows = [[int(word) for word in words] for name, *words in map(str.split, filter(None, lines)) if name in mine]
    if not any(map(any, rows)):
        return None
    idle = sum(row[3] + row[4] for row in rows)  # idle and iowait
    return idle / os.sysconf("SC_CLK_TCK"), len(rows)
