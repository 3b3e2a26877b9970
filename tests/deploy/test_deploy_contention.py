"""What other programs take of the processors, on a made-up machine and on this one."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from growkit.deploy.contention import Contention, idle_seconds

linux = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc/stat")


class Machine:
    """Two processors; what is neither own nor idle is foreign."""

    def __init__(self) -> None:
        self.now = self.own = self.idle = 0.0

    def watch(self) -> Contention:
        return Contention(clock=lambda: self.now, own=lambda: self.own, idle=lambda: (self.idle, 2))

    def pass_time(self, wall: float, own: float, foreign: float) -> None:
        self.now += wall
        self.own += own
        self.idle += 2 * wall - own - foreign


def test_lap_is_the_share_of_others_since_the_last_lap() -> None:
    machine = Machine()
    watch = machine.watch()
    machine.pass_time(1.0, own=1.4, foreign=0.6)
    assert watch.lap() == pytest.approx(0.3)
    machine.pass_time(0.5, own=0.5, foreign=0.0)
    assert watch.lap() == pytest.approx(0.0)
    machine.pass_time(0.5, own=0.0, foreign=1.0)
    assert watch.lap() == pytest.approx(1.0)


def test_coarse_counters_do_not_leave_the_range_and_no_time_tells_nothing() -> None:
    machine = Machine()
    watch = machine.watch()
    assert watch.lap() is None
    machine.pass_time(0.01, own=0.02, foreign=-0.01)
    assert watch.lap() == 0.0
    machine.pass_time(0.01, own=0.0, foreign=0.03)
    assert watch.lap() == 1.0


def test_system_that_does_not_tell_is_unknown_not_calm() -> None:
    watch = Contention(idle=lambda: None)
    time.sleep(0.01)
    assert watch.lap() is None


@linux
def test_idle_time_is_that_of_this_processs_processors(tmp_path: Path) -> None:
    mine = sorted(os.sched_getaffinity(0))
    ticks = os.sysconf("SC_CLK_TCK")
    lines = ["cpu  9 9 9 999999 9 9 9 9 0 0"]
    lines += [f"cpu{number} 5 0 5 {3 * ticks} {ticks} 0 0 0 0 0" for number in mine]
    lines += [f"cpu{max(mine) + 1} 5 0 5 123456 0 0 0 0 0 0", "", "intr 12 3", "ctxt 5"]
    stat = tmp_path / "stat"
    stat.write_text("\n".join(lines) + "\n")
    assert idle_seconds(stat) == (4.0 * len(mine), len(mine))
    stat.write_text("\n".join(f"cpu{number} 0 0 0 0 0 0 0 0 0 0" for number in mine))
    assert idle_seconds(stat) is None
    assert idle_seconds(tmp_path / "absent") is None


@linux
def test_busy_neighbour_is_seen_and_own_work_is_not() -> None:
    processors = len(os.sched_getaffinity(0))
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.3)  # Python starts
        watch = Contention()
        time.sleep(0.5)
        share = watch.lap()
    finally:
        busy.kill()
        busy.wait()
    assert share is not None
    assert share * processors > 0.5
    start = time.perf_counter(), time.process_time()
    watch = Contention()
    while time.perf_counter() - start[0] < 0.5:
        pass
    own = (time.process_time() - start[1]) / (time.perf_counter() - start[0]) / processors
    share = watch.lap()
    assert share is not None
    assert share < 1 - own + 0.1
