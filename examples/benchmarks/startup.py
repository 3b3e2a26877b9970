"""How long `growkit --help` takes, beside a bare `python -c pass` started in turn with it.

python examples/benchmarks/startup.py --runs 20 --out startup.json
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

from growkit.record import hardware, versions

COMMANDS = {
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
            subprocess.run(COMMANDS[name], check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
    return {name: taken[1:] for name, taken in seconds.items()}


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
