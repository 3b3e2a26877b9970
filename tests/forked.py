"""The other end of dying.py: growkit commands in processes of their own, from a server that has loaded torch once."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SIGNALS = {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130}


@dataclass
class Ended:
    """How a command ended."""

    process: int
    status: int
    points: int
    memory: int  # most bytes that it had
    out: str
    err: str


class Server:
    """Runs growkit commands in processes of their own; see dying.py."""

    def __init__(self) -> None:
        here = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "COLUMNS": "200"}
        here["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "cli")))
        self.program = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "dying.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=here,
        )
        self.kills = 0
        self.groups: list[int] = []

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        assert self.program.stdin is not None
        self.program.stdin.close()
        self.program.wait(30)

    def run(self, cwd: Path, arguments: tuple[Any, ...], **job: Any) -> Ended:
        assert self.program.stdin is not None
        assert self.program.stdout is not None
        line = json.dumps({"cwd": str(cwd), "arguments": [str(a) for a in arguments], **job})
        self.program.stdin.write(line + "\n")
        self.program.stdin.flush()
        ended = Ended(**json.loads(self.program.stdout.readline()))
        self.kills += ended.status in SIGNALS.values()
        self.groups.append(ended.process)
        return ended

    def alive(self) -> list[int]:
        """Processes of commands that ended, which should have ended with them."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, group = stat.read_text().rpartition(") ")[2].split()[:3]
            except OSError:
                continue
            if int(group) in self.groups and state != "Z":
                found.append(int(stat.parent.name))
        return found
