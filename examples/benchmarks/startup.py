"""How long `growkit --help` and the first line of every command take, beside a bare `python -c pass`.

    python examples/benchmarks/startup.py --runs 20 --out startup.json

All are started in turn, in random order. A command gets a source, a target and images that do not exist: it prints its
first line before it looks for them, and is then killed at once.
"""

import argparse
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import typer

from growkit import __version__
from growkit.record import hardware, versions
from growkit_cli.main import app

HELP, BARE = "growkit --help", "python -c pass"
PROMISED = {"help_seconds": 0.3, "first_line_seconds": 3.0}
PROGRAM = [sys.executable, "-m", "growkit_cli"]


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="starts of each; one more warms up")
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument("--out", type=Path, help="JSON file with hardware and versions")
    options = parser.parse_args()
    if options.runs < 1:
        parser.error(f"--runs {options.runs}: expected 1 or more")
    if options.out and not options.out.absolute().parent.is_dir():
        parser.error(f"--out {options.out}: no such folder; make it first")
    load = os.getloadavg()[0]
    commands = commands_of_growkit()
    seconds = measure(commands, options.runs, options.seed)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    print(f"seconds of {options.runs} starts of each; load before {load:.1f}")
    row = "{:24} {:>8} {:>8} {:>8} {:>8}".format
    print(row("", "median", "min", "max", "promised"))
    for name, taken in seconds.items():
        promised = PROMISED["first_line_seconds"] if name in commands else PROMISED["help_seconds"]
        shown = (medians[name], min(taken), max(taken))
        print(row(name, *(f"{s:.3f}" for s in shown), "-" if name == BARE else f"{promised:.1f}"))
    if options.out:
        content = {
            "command": shlex.join(sys.argv),
            "options": {"runs": options.runs, "seed": options.seed},
            "load_before": load,
            "promised": PROMISED,
            "first_lines": {name: shlex.join(["growkit", *words]) for name, words in commands.items()},
            "median_seconds": medians,
            "seconds": seconds,
            "versions": versions(),
            "hardware": hardware(),
        }
        options.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def commands_of_growkit() -> dict[str, list[str]]:
    """Each command's words by `growkit NAME`: only the arguments that it requires."""
    found = {}
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        required = [parameter for parameter in command.params if parameter.required]
        given = [word for p in required for word in ([p.opts[0]] if p.param_type_name == "option" else []) + ["none"]]
        found[f"growkit {name}"] = [name, *given]
    return found


def measure(commands: dict[str, list[str]], runs: int, seed: int) -> dict[str, list[float]]:
    """Seconds of each start by name, in random order within each round; the first round is a warm-up."""
    names = [HELP, *commands, BARE]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(seed)
    for _ in range(runs + 1):
        for name in order.sample(names, len(names)):
            if name in commands:
                seconds[name].append(until_first_byte(commands[name]))
            else:
                start = time.perf_counter()
                words = [*PROGRAM, "--help"] if name == HELP else [sys.executable, "-c", "pass"]
                subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
                seconds[name].append(time.perf_counter() - start)
    return {name: taken[1:] for name, taken in seconds.items()}


def until_first_byte(words: list[str]) -> float:
    """Seconds until a command writes anything, which must be its greeting line: a usage error would come sooner."""
    with tempfile.TemporaryDirectory() as folder:  # a command may write there before it is killed
        start = time.perf_counter()
        process = subprocess.Popen(
            [*PROGRAM, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0, cwd=folder
        )
        assert process.stdout is not None
        with process.stdout as said:
            line = said.read(1)
            seconds = time.perf_counter() - start
            line += said.readline()
            process.kill()
            process.wait()
    if line.decode() != f"growkit {__version__}: {words[0]}\n":
        sys.exit(f"growkit {shlex.join(words)}: its first line is {line.decode()!r}")
    return seconds


if __name__ == "__main__":
    main()
