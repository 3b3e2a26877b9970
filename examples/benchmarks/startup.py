"""How long `growkit --help` and a command's first line on a terminal take, beside a bare `python -c pass`.

All are started in turn.

python examples/benchmarks/startup.py --runs 20 --out startup.json
"""

import argparse
import json
import os
import pty
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

from growkit.record import hardware, versions

FIRST_LINE = "growkit plan, first line"
COMMANDS = {
    FIRST_LINE: [sys.executable, "-m", "growkit_cli", "plan", "none.pth", "--to", "deit_base"],
    "growkit --help": [sys.executable, "-m", "growkit_cli", "--help"],
    "python -c pass": [sys.executable, "-c", "pass"],
}


def measure(runs: int, seed: int) -> dict[str, list[float]]:
    """Seconds of each start by command, in random order within each round; one round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    order = random.Random(seed)
    for _ in range(runs + 1):
        for name in order.sample(list(COMMANDS), len(COMMANDS)):
            start = time.perf_counter()
            if name == FIRST_LINE:
                seconds[name].append(until_first_byte(COMMANDS[name]))
            else:
                subprocess.run(COMMANDS[name], check=True, stdout=subprocess.DEVNULL)
                seconds[name].append(time.perf_counter() - start)
    return {name: taken[1:] for name, taken in seconds.items()}


def until_first_byte(command: list[str]) -> float:
    """Seconds until a command writes to its terminal."""
    ours, theirs = pty.openpty()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs)
    os.read(ours, 1)
    seconds = time.perf_counter() - start
    process.kill()
    process.wait()
    os.close(ours)
    os.close(theirs)
    return seconds


def main() -> None:
    """Measure, print the medians, write JSON when --out names a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    seconds = measure(options.runs, options.seed)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    for name, median in medians.items():
        print(f"{name}: {median:.3f} s, median of {options.runs}, max {max(seconds[name]):.3f} s")
    if options.out:
        content = {
            "command": sys.argv,
            "median_seconds": medians,
            "seconds": seconds,
            "versions": versions(),
            "hardware": hardware(),
        }
        options.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
