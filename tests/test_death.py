"""Death at any moment: kills at seeded places, locks, full disks, folders that go, losses that are not finite."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from pairs import published_scale, tiny
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
SIGNALS = {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130}
SIZES = ("--set", "embed_dim=16", "--set", "depth=2", "--set", "num_heads=2", "--set", "img_size=16")
TO = ("--to", "vit_tiny", "--set", "embed_dim=32", "--set", "depth=3", "--set", "num_heads=4")
# everything that a resumed run could lose
ALL_ON = (
    *("--data", "images", "--batch-size", 4, "--grad-accum-steps", 2, "--warmup-epochs", 1, "--lr", 3e-3),
    *("--mixup", 0.4, "--cutmix", 0.5, "--smoothing", 0.1, "--aa", "rand-m9-mstd0.5", "--reprob", 0.2),
    *("--save-seconds", 0, "--log-every", 1, "--device", "cpu"),
)
AVERAGED = ("--model-ema", "--model-ema-decay", 0.8, "--eval-every", 2)
COMMANDS: dict[str, tuple[Any, ...]] = {
    "train": (
        *("train", "vit_tiny", *SIZES, "--set", "patch_size=8", "--set", "drop_path_rate=0.2", *ALL_ON, *AVERAGED),
        *("--steps", 5, "--workers", 2, "--run", "run"),
    ),
    "grow": ("grow", "small", *TO, "--rank", 1, *ALL_ON, "--steps", 4, "--workers", 0, "--run", "run"),
    "finetune": ("finetune", "small", *ALL_ON, *AVERAGED, "--steps", 5, "--workers", 0, "--run", "run"),
    "export": ("export", "small", "--run", "run"),
    "compare": (
        *("compare", "small", *TO, "--data", "images", "--batch-size", 4, "--steps", 6, "--workers", 0, "--run", "run"),
        *("--methods", "mango:rank=1", "--controls", "", "--seeds", 1, "--budgets", "1", "--lrs", "1e-3"),
        *("--operator-steps", 2, "--operator-lrs", "1e-3", "--evals", 2, "--model-ema", "--device", "cpu"),
        *("--save-seconds", 0),
    ),
}
RESUMED = ("train", "grow", "finetune", "compare")
TIMES = ("seconds", "operator_seconds", "images_per_second", "finished", "since")


@dataclass
class Ended:
    """How a command ended."""

    process: int
    status: int
    points: int
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


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    served = Server()
    yield served
    assert served.program.stdin is not None
    served.program.stdin.close()
    served.program.wait(30)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model and a few images."""
    root = tmp_path_factory.mktemp("place")
    model = published_scale(tiny(16, 2, 2))
    config = {"architecture": "vit_tiny_patch16_224", "model_args": dict(tiny(16, 2, 2).arguments)}
    del config["model_args"]["num_classes"]
    timm.models.save_for_hf(model, str(root / "small"), model_config=config, safe_serialization=True)
    generator = np.random.default_rng(0)
    for split, each in (("train", 7), ("val", 4)):
        for index, label in enumerate(("cat", "dog", "elk")):
            (root / "images" / split / label).mkdir(parents=True)
            for number in range(each):
                pixels = generator.integers(0, 60, (16, 16, 3)) + 60 * index
                Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / split / label / f"{number}.png")
    return root


@pytest.fixture
def new(place: Path, tmp_path: Path) -> Callable[[], Path]:
    """Makes folders that hold the model and the images, and no run yet."""
    count = iter(range(10**6))

    def make() -> Path:
        folder = tmp_path / str(next(count))
        folder.mkdir()
        for name in ("small", "images"):
            (folder / name).symlink_to(place / name)
        return folder

    return make


@pytest.fixture(scope="module")
def unbroken(server: Server, place: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """What a command leaves that nobody killed, and how many points it has."""
    known: dict[str, Any] = {}

    def make(command: str) -> Any:
        if command not in known:
            folder = tmp_path_factory.mktemp(f"unbroken-{command}")
            for name in ("small", "images"):
                (folder / name).symlink_to(place / name)
            ended = server.run(folder, COMMANDS[command])
            assert ended.status == 0, ended.err
            known[command] = contents(folder / "run"), ended.points
        return known[command]

    return make


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(entry) for key, entry in value.items() if key not in TIMES}
    return [timeless(entry) for entry in value] if isinstance(value, list) else value


def contents(run: Path) -> dict[str, Any]:
    """Everything in a run folder that a kill may not change, in a form that == compares bit for bit."""

    def frozen(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
        if isinstance(value, dict):
            return {key: frozen(entry) for key, entry in value.items()}
        return [frozen(entry) for entry in value] if isinstance(value, (list, tuple)) else value

    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.suffix == ".safetensors":
            found[name] = frozen(load_file(path))
        elif path.name == "state.pt":
            found[name] = frozen(timeless(torch.load(path, weights_only=True)))
        elif path.name == "metrics.jsonl":
            found[name] = [timeless(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.name in ("result.json", "start.json"):
            found[name] = timeless(json.loads(path.read_text()))
        elif path.suffix in (".onnx", ".pb"):
            found[name] = path.read_bytes()
        elif path.is_file():
            found[name] = "a file"
    return found


def readable(run: Path) -> None:
    """What is there under its own name is whole, whatever killed the command."""
    for path in run.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(run).parts):
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            load_file(path)
            if path.parent.name not in ("compare", "starts") and "compare" not in path.parts:
                assert (path.parent / "config.json").exists(), path
        elif path.name == "state.pt":
            torch.load(path, weights_only=True)


def hidden(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob(".*")]


def again(command: str, folder: Path) -> tuple[Any, ...]:
    """The command that goes on, as its user would type it."""
    begun = (folder / "run").exists() and command in RESUMED
    if not begun:
        return (*COMMANDS[command], *(("--force",) if command == "export" else ()))
    return (*COMMANDS[command], "--resume")


def finish(server: Server, command: str, folder: Path, expected: dict[str, Any], **job: Any) -> dict[str, Any]:
    """Go on until done; what lies there then."""
    ended = server.run(folder, again(command, folder), **job)
    assert ended.status == 0, ended.err
    assert hidden(folder) == []
    steps = json.loads((folder / "run" / "record.json").read_text())["steps"] if command != "compare" else []
    assert {step["command"] for step in steps} <= {command}
    return contents(folder / "run")


def die_and_finish(
    server: Server, command: str, folder: Path, unbroken: Callable[[str], Any], deaths: list[dict[str, Any]]
) -> None:
    """A command that dies once for each of `deaths`, and then ends as the one that never died."""
    expected, _ = unbroken(command)
    for death in deaths:
        ended = server.run(folder, again(command, folder), **death)
        assert ended.status in (SIGNALS[death["signal"]], 0), (command, death, ended.err)
        assert "Traceback" not in ended.err, (command, death, ended.err)
        if ended.status == 0:
            shutil.rmtree(folder / "run")  # it was quicker than the clock; the next one begins anew
            continue
        if death["signal"] != "SIGKILL":
            assert ended.err.count("interrupted; ") == 1, ended.err
        readable(folder / "run")
    left = finish(server, command, folder, expected)
    differing = [name for name in left.keys() | expected.keys() if left.get(name) != expected.get(name)]
    assert differing == [], (command, deaths)


@pytest.mark.parametrize("command", ["train", "export"])
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_command_that_died_ends_as_if_it_had_not(
    server: Server, new: Callable[[], Path], unbroken: Callable[[str], Any], command: str, name: str
) -> None:
    _, points = unbroken(command)
    draw = random.Random(f"{command} {name}")
    deaths = [{"point": draw.randrange(points // 3, points), "signal": name}]
    die_and_finish(server, command, new(), unbroken, deaths)


def test_readers_of_images_end_with_the_command(server: Server, new: Callable[[], Path]) -> None:
    """Kills while two readers work: none outlives it for longer than torch's watchdog takes."""
    ended = server.run(new(), COMMANDS["train"], point=40, signal="SIGKILL")
    assert ended.status == -9
    until = time.monotonic() + 15
    while server.alive() and time.monotonic() < until:
        time.sleep(0.2)
    assert server.alive() == []


@pytest.mark.parametrize("lost", ["ema", "optimizer", "random"])
def test_resume_that_forgets_is_found_out(
    server: Server, new: Callable[[], Path], unbroken: Callable[[str], Any], lost: str
) -> None:
    expected, points = unbroken("finetune")
    folder = new()
    assert server.run(folder, COMMANDS["finetune"], point=points // 2, signal="SIGKILL").status == -9
    saved = torch.load(folder / "run" / "finetuned" / "last" / "state.pt", weights_only=True)
    assert 0 < saved["step"] < 5
    left = finish(server, "finetune", folder, expected, forget=lost)
    assert left["finetuned/last/state.pt"] != expected["finetuned/last/state.pt"]


# ---- the long run


@pytest.mark.slow
@pytest.mark.parametrize(("command", "runs"), [("train", 30), ("grow", 25), ("finetune", 30), ("export", 12), ("compare", 20)])
def test_many_deaths_change_nothing(
    server: Server, new: Callable[[], Path], unbroken: Callable[[str], Any], command: str, runs: int
) -> None:
    """Seeded: spread over all points of a command, every kind of death, some of them twice in a row, some by the clock."""
    _, points = unbroken(command)
    draw, before = random.Random(command), server.kills
    began = time.monotonic()
    for number in range(runs):
        name = ("SIGKILL", "SIGKILL", "SIGTERM", "SIGINT")[number % 4]
        at = (number * points + draw.randrange(points)) // runs  # one in each stretch
        deaths: list[dict[str, Any]] = [{"point": min(at, points - 1), "signal": name}]
        if number % 5 == 4:
            deaths = [{"after": draw.uniform(0.05, 1.5), "signal": name}]
        if number % 3 == 2:
            deaths.append({"point": draw.randrange(points // 4), "signal": "SIGKILL"})
        folder = new()
        die_and_finish(server, command, folder, unbroken, deaths)
        shutil.rmtree(folder)
    print(f"{command}: {server.kills - before} deaths in {time.monotonic() - began:.0f} s, {points} points")
    assert server.kills - before >= runs
