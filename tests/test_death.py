"""Death at any moment: kills at seeded places, locks, full disks, folders that go, losses that are not finite."""

import errno
import fcntl
import hashlib
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import SIGNALS, Ended, Server
from places import SIZES, TO, furnish
from safetensors.torch import load_file

from growkit.compare.folder import WRITES as COMPARED
from growkit.errors import GrowkitError, UnwritableError
from growkit.exporting import WRITES as EXPORTED
from growkit.files import LOCK, clear_left, refuse_existing, refuse_foreign, whole_file, whole_folder
from growkit.growing import WRITES as GROWN
from growkit.lock import held
from growkit_cli.demo import demo as growkit_demo
from growkit_cli.guard import left, written

ROOT = Path(__file__).parents[1]
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
        *("--methods", "mango:rank=1", "--controls", "none", "--seeds", 1, "--budgets", "1", "--lrs", "1e-3"),
        *("--operator-steps", 2, "--operator-lrs", "1e-3", "--evals", 2, "--model-ema", "--device", "cpu"),
        *("--save-seconds", 0),
    ),
    "sweep": (
        *("sweep", "small", *TO, "--data", "images", "--share", 1, "--steps", 10, "--batch-size", 4, "--workers", 0),
        *("--trials", 2, "--rank-choices", "1,2", "--ring-orders", "BOLI", "--noises", 1, "--stage-choices", "both"),
        *("--operator-steps", 1, "--operator-lrs", "1e-3", "--lrs", "1e-3", "--evals", 2, "--device", "cpu"),
        *("--save-seconds", 0, "--run", "run"),
    ),
    "verify": ("verify", "--run", "run", "--no-latency", "--junit", "run/junit.xml"),
    "evaluate": (
        *("evaluate", "--against", "fitting", "--data", "images", "--workers", 0),
        *("--device", "cpu", "--run", "run"),
    ),
    "report": ("report", "--run", "run"),
}
COMMANDS["finetune-fp16"] = (*COMMANDS["finetune"], "--precision", "fp16")  # whose losses are scaled
AFTER_EXPORT = ("verify", "evaluate", "report")  # in a run folder where a model was exported
READ_HERE = {command: ("--workers", 0) if command == "train" else () for command in COMMANDS}
RESUMED = ("train", "grow", "finetune", "finetune-fp16", "compare", "sweep")
TIMES = ("seconds", "operator_seconds", "images_per_second", "finished", "since")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as served:
        yield served


@pytest.fixture(scope="module")
def place(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model, a few images, and a run in which the model was exported."""
    root = tmp_path_factory.mktemp("place")
    furnish(root)
    shutil.copytree(root / "fitting", root / "exported" / "grown")
    assert server.run(root, ("export", "--run", "exported")).status == 0
    return root


def start_of(place: Path, folder: Path, command: str) -> Path:
    """Furnish a new folder with the model, the images and what the command wants in its run folder."""
    folder.mkdir()
    for name in ("small", "fitting", "images"):
        (folder / name).symlink_to(place / name)
    if command in AFTER_EXPORT:
        shutil.copytree(place / "exported", folder / "run")
    return folder


@pytest.fixture
def new(place: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes folders for commands; without a name there is no run yet."""
    count = iter(range(10**6))
    return lambda command="": start_of(place, tmp_path / str(next(count)), command)


@pytest.fixture(scope="module")
def unbroken(server: Server, place: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """What a command leaves that nobody killed, and how many points it has."""
    known: dict[str, Any] = {}

    def make(command: str) -> Any:
        if command not in known:
            folder = start_of(place, tmp_path_factory.mktemp("unbroken") / command, command)
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
            if not {"compare", "sweep"} & set(path.parts):
                assert (path.parent / "config.json").exists(), path
        elif path.name == "state.pt":
            torch.load(path, weights_only=True)


def hidden(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob(".*")]


def again(server: Server, command: str, folder: Path, **job: Any) -> Ended:
    """Go on as a user would, who does what the program says; a job that dies is not told from one that needs none."""
    if command in RESUMED:
        ended = server.run(folder, (*COMMANDS[command], "--resume"), **job)
        if "start without --resume" not in ended.err:
            return ended
    return server.run(folder, (*COMMANDS[command], *(("--force",) if command == "export" else ())), **job)


def finish(server: Server, command: str, folder: Path, **job: Any) -> dict[str, Any]:
    """Go on until done; what lies there then."""
    ended = again(server, command, folder, **job)
    assert ended.status == 0, ended.err
    assert hidden(folder) == []
    record = folder / "run" / "record.json"
    steps = (
        json.loads(record.read_text())["steps"] if record.exists() else []
    )  # compare and sweep write pages of theirs
    assert {step["command"] for step in steps} <= {command.partition("-")[0], "export"}
    return contents(folder / "run")


def die_and_finish(
    server: Server,
    command: str,
    place: Path,
    folder: Path,
    unbroken: Callable[[str], Any],
    deaths: list[dict[str, Any]],
) -> None:
    """A command that dies once for each of `deaths`, and then ends as the one that never died."""
    expected, _ = unbroken(command)
    for number, death in enumerate(deaths):
        ended = again(server, command, folder, **death) if number else server.run(folder, COMMANDS[command], **death)
        # the clock may be slower than the command, and what is left of one that died may have fewer points; a signal
        # that asks to stop after the last update comes while that is saved
        asked = death["signal"] != "SIGKILL" and death.get("point", 0) < ended.points
        spared = number > 0 or "after" in death or asked
        assert ended.status in (SIGNALS[death["signal"]], *([0] if spared else [])), (command, death, ended.err)
        assert "Traceback" not in ended.err, (command, death, ended.err)
        if ended.status == 0:
            shutil.rmtree(folder)  # the next one begins anew
            start_of(place, folder, command)
            continue
        if death["signal"] != "SIGKILL":
            assert ended.err.count("interrupted; ") == 1, ended.err
        readable(folder / "run")
    left = finish(server, command, folder)
    differing = [name for name in left.keys() | expected.keys() if left.get(name) != expected.get(name)]
    assert differing == [], (command, deaths)


@pytest.mark.parametrize(("command", "name"), [("train", "SIGKILL"), ("train", "SIGTERM"), ("export", "SIGKILL")])
def test_command_that_died_ends_as_if_it_had_not(
    server: Server, place: Path, new: Callable[..., Path], unbroken: Callable[[str], Any], command: str, name: str
) -> None:
    _, points = unbroken(command)
    draw = random.Random(f"{command} {name}")
    deaths = [{"point": draw.randrange(points // 3, points), "signal": name}]
    die_and_finish(server, command, place, new(command), unbroken, deaths)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_death_that_does_not_come_is_found_out(
    server: Server, place: Path, new: Callable[..., Path], unbroken: Callable[[str], Any], name: str
) -> None:
    with pytest.raises(AssertionError, match=name):
        die_and_finish(server, "report", place, new("report"), unbroken, [{"point": 10**9, "signal": name}])


def test_readers_of_images_end_with_the_command(server: Server, new: Callable[..., Path]) -> None:
    """Kills while two readers work: none outlives it for longer than torch's watchdog takes."""
    ended = server.run(new(), COMMANDS["train"], point=40, signal="SIGKILL")
    assert ended.status == -9
    until = time.monotonic() + 15
    while server.alive() and time.monotonic() < until:
        time.sleep(0.2)
    assert server.alive() == []


@pytest.mark.parametrize(
    ("command", "lost"), [*(("finetune", lost) for lost in ("ema", "optimizer", "random")), ("finetune-fp16", "scaler")]
)
def test_resume_that_forgets_is_found_out(
    server: Server, new: Callable[..., Path], unbroken: Callable[[str], Any], command: str, lost: str
) -> None:
    expected, points = unbroken(command)
    folder = new()
    assert server.run(folder, COMMANDS[command], point=points // 3, signal="SIGKILL").status == -9
    saved = torch.load(folder / "run" / "finetuned" / "last" / "state.pt", weights_only=True)
    assert 0 < saved["step"] < 5
    left = finish(server, command, folder, forget=lost)
    assert left["finetuned/last/state.pt"] != expected["finetuned/last/state.pt"]


@pytest.mark.parametrize(
    ("command", "writes"),
    [("grow", GROWN), ("export", EXPORTED), ("compare", COMPARED), ("sweep", COMPARED)],
)
def test_all_that_a_command_writes_may_be_replaced(
    unbroken: Callable[[str], Any], command: str, writes: tuple[str, ...], tmp_path: Path
) -> None:
    stage = {"grow": "grown", "export": "onnx"}.get(command, command)
    files = [name for name, content in unbroken(command)[0].items() if name.startswith(f"{stage}/")]
    assert len(files) > 3
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    refuse_foreign(tmp_path / stage, writes=writes)
    with pytest.raises(GrowkitError, match="which growkit did not write, would be lost"):
        refuse_foreign(tmp_path / stage, writes=writes[1:])


# ---- two commands on one run folder


@pytest.fixture
def holder(place: Path, new: Callable[..., Path]) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A folder whose run another process holds."""
    folder = new()
    program = """
import sys
from pathlib import Path
from growkit.lock import held
with held(Path("run"), "growkit train much"):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield folder, process
        process.kill()


WRITING = [
    *(words for words in COMMANDS.values() if words[0] != "report"),
    ("sweep", "small", *TO, "--data", "images"),
    ("verify",),
    ("evaluate", "run/grown", "--data", "images", "--against", "small"),
]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_folder_that_nobody_can_make_is_not_asked_for_for_ever() -> None:
    with held(Path("/proc/growkit/run"), "growkit train") as had:
        assert not had


def test_second_command_says_who_holds_the_run_and_how_it_ends(
    server: Server, holder: tuple[Path, subprocess.Popen[str]]
) -> None:
    folder, process = holder
    (folder / "run" / "grown").mkdir()
    for arguments in WRITING:
        ended = server.run(folder, arguments)
        assert ended.status == 2, arguments
        (line,) = ended.err.splitlines()
        assert f"run is in use by `growkit train much` (process {process.pid} on " in line
        assert line.endswith("; wait until it has ended, or give another --run")
    for arguments in (
        ("evaluate", "small", "--data", "images", "--workers", 0, "--device", "cpu"),
        ("evaluate", "small", "--data", "images", "--workers", 0, "--device", "cpu", "--against", "small"),
        ("plan", "small", *TO),
        ("report",),
        ("report", "--out", "elsewhere.html"),
    ):
        assert "in use" not in server.run(folder, arguments).err
    assert sorted(path.name for path in (folder / "run").rglob("*")) == [".growkit.lock", "grown"]


def test_lock_goes_with_its_process_and_leaves_nothing(
    server: Server, holder: tuple[Path, subprocess.Popen[str]]
) -> None:
    folder, process = holder
    process.kill()
    process.wait()
    assert (folder / "run" / ".growkit.lock").exists()
    assert "holds nothing of a run" in server.run(folder, ("report",)).err
    assert list((folder / "run").iterdir()) == []


def test_lock_tells_of_its_holder_also_over_what_one_that_was_killed_left(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("longer than what is written now" * 100)
    with held(tmp_path, "growkit finetune"):
        assert json.loads((tmp_path / LOCK).read_text())["command"] == "growkit finetune"
    assert not (tmp_path / LOCK).exists()


def test_refused_command_leaves_no_run_folder(server: Server, new: Callable[..., Path]) -> None:
    folder = new()
    ended = server.run(folder, ("export", "absent", "--run", "deep/er/run"))
    assert ended.status == 2
    assert not (folder / "deep").exists()


def test_only_the_first_process_of_torchrun_holds_the_run(
    holder: tuple[Path, subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = holder
    given = {"run": folder / "run"}
    monkeypatch.setenv("RANK", "1")  # of somebody else's processes, as mpirun's
    assert written("train", given) == folder / "run"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert written("train", given) is None
    monkeypatch.setenv("RANK", "0")
    assert written("train", given) == folder / "run"


def test_demo_replaces_no_run_that_is_in_use(holder: tuple[Path, subprocess.Popen[str]]) -> None:
    folder, _ = holder
    demo = folder.resolve() / "demo"
    (demo / "digits").mkdir(parents=True)
    (demo / "run").symlink_to(folder.resolve() / "run")
    with pytest.raises(GrowkitError, match="is in use by `growkit train much`"):
        growkit_demo(demo, force=True)
    assert (demo / "digits").is_dir()


def test_file_system_without_locks_is_told_of_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    told: list[str] = []
    with held(tmp_path / "run", "growkit train", told.append) as alone:
        assert not alone
    assert len(told) == 1
    assert "file system without locks" in told[0]


# ---- what is left by kills


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "5"]) as living:
        mine = hashlib.sha256(platform.node().encode()).hexdigest()[:6]
        dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=-1, check=True, text=True)
        names = {
            "alive": f".a.{mine}-{living.pid}-00000001.partial",
            "dead": f".a.{mine}-{int(dead.stdout)}-00000001.partial",
            "before": f".a.{mine}-{os.getpid()}-00000001.partial",  # of a process with our number, in a container
            "far": ".a.000000-1-00000001.partial",
            "other": f".b.{mine}-{int(dead.stdout)}-00000001.partial",
            "foreign": ".a.partial",
        }

        def left(**how: Any) -> set[str]:
            for name in names.values():
                (tmp_path / name).mkdir(exist_ok=True)
                (tmp_path / name / "half").touch()
            clear_left(tmp_path, **how)
            return {key for key, name in names.items() if (tmp_path / name).exists()}

        assert left(name="a") == {"alive", "far", "other", "foreign"}
        assert left(alone=True) == {"alive", "foreign"}
        with whole_file(tmp_path / "c") as partial:
            partial.touch()
            clear_left(tmp_path, alone=True)
            assert partial.exists()
        living.kill()


@pytest.mark.parametrize("new_is_there", [False, True])
@pytest.mark.parametrize("name", ["model", "my\nmodel"])
def test_folder_killed_in_its_swap_comes_back(tmp_path: Path, name: str, new_is_there: bool) -> None:
    program = f"""
import os, signal, sys
from pathlib import Path
from growkit import files
rename = os.rename
def until(source, target):
    if {not new_is_there} and str(target).endswith("model"):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
    if str(target).endswith("model"):
        os.kill(os.getpid(), signal.SIGKILL)
os.rename = until
with files.whole_folder(Path({name!r})) as partial:
    (partial / "weights").write_text("new")
"""
    (tmp_path / name).mkdir()
    (tmp_path / name / "weights").write_text("old")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=False)
    assert done.returncode == -9
    assert (tmp_path / name).exists() == new_is_there
    with pytest.raises(GrowkitError, match="already exists"):
        refuse_existing(tmp_path / name, force=False)
    clear_left(tmp_path)
    assert (tmp_path / name / "weights").read_text() == ("new" if new_is_there else "old")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut cannot be made here; the order of the calls that guard against it can be seen."""
    seen: list[str] = []

    def fsync(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        seen.append("folder" if Path(name) == tmp_path else "content")

    def rename(*_: Any) -> None:
        seen.append("rename")
        real(*_)

    for writer, replaces in ((whole_file, "replace"), (whole_folder, "rename")):
        real = getattr(os, replaces)
        seen.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            patch.setattr(os, replaces, rename)
            with writer(tmp_path / writer.__name__) as partial:
                (partial / "inside" if partial.is_dir() else partial).touch()
        assert seen == [*["content"] * (1 if writer is whole_file else 2), "rename", "folder"]


def test_sweep_does_not_wait_for_the_lock_of_one_that_was_killed(server: Server, new: Callable[..., Path]) -> None:
    folder = new()
    sweep = (
        *("sweep", "small", *TO, "--data", "images", "--share", 1, "--steps", 2, "--batch-size", 4, "--workers", 0),
        *("--trials", 1, "--methods", "net2net", "--lrs", "1e-3", "--evals", 1, "--device", "cpu"),
    )
    ended = server.run(folder, sweep)
    assert ended.status == 0, ended.err
    (folder / "run" / "sweep" / "study.log.lock").symlink_to("study.log")
    began = time.monotonic()
    ended = server.run(folder, (*sweep, "--resume"))
    assert ended.status == 0, ended.err
    assert time.monotonic() - began < 25  # Optuna would wait for 30 seconds
    assert not (folder / "run" / "sweep" / "study.log.lock").is_symlink()


# ---- what cannot be written


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "your quota is used up"),
        (errno.EROFS, "read-only file system"),
        (errno.EACCES, "permission denied"),
        (errno.ENOENT, "its folder is gone"),
    ],
)
@pytest.mark.parametrize("named", [False, True])
def test_write_that_fails_is_one_line_with_the_file_and_a_remedy(
    number: int, says: str, named: bool, tmp_path: Path
) -> None:
    path = tmp_path / "model.bin"
    path.write_text("old")

    def write(into: Path) -> None:
        with whole_file(into) as partial:
            partial.write_text("half")
            raise OSError(number, os.strerror(number), *([str(partial)] if named else []))

    if not named and number in (errno.EACCES, errno.ENOENT):  # it may be of anything
        with pytest.raises(OSError, match=os.strerror(number)):
            write(path)
    else:
        with pytest.raises(UnwritableError) as caught:
            write(path)
        assert str(caught.value).startswith(f"{path}: cannot be written ({says}); ")
    assert path.read_text() == "old"
    assert hidden(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "no", "/elsewhere/image.png"),
        FileNotFoundError(errno.ENOENT, "no", "run/image.png"),  # beside what is written
        PermissionError(errno.EACCES, "no", "run/.image.png.abcdef-1-01234567.partial"),
        OSError(errno.ENOSPC, "no", "/elsewhere/cache"),
        OSError(errno.EIO, "no"),  # as when an image is read from a broken disk
        PermissionError(errno.EACCES, "no", 3),
        OSError("no number"),
        ValueError("no"),
        TimeoutError("slow"),
    ],
    ids=repr,
)
def test_error_about_another_file_is_not_put_on_the_one_that_is_written(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def write() -> None:
        with whole_folder(Path("run/model")):
            raise error

    with pytest.raises(type(error)) as caught:
        write()
    assert caught.value is error
    assert hidden(tmp_path) == []


@pytest.mark.parametrize(
    "names",
    [
        *(("run/model",), ("run/model/a",), ("run/.model.abcdef-1-01234567.partial/a",), ("run",), (".",)),
        ("/elsewhere/a", None, "run/model/a"),  # as shutil tells of a copy
    ],
)
def test_error_about_what_is_written_or_a_folder_above_is_of_the_write(
    names: tuple[str | None, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def write() -> None:
        with whole_folder(Path("run/model")):
            raise OSError(errno.EACCES, "no", *names)

    with pytest.raises(UnwritableError, match=r"^run/model: cannot be written \(permission denied\)"):
        write()


def test_disk_that_fails_when_it_is_flushed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UnwritableError, match="the disk reports an error"), whole_file(tmp_path / "a") as partial:
        partial.touch()


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("verify", "finetune-fp16")])
def test_full_disk_is_one_line_and_leaves_nothing_half_written(
    server: Server, new: Callable[..., Path], command: str
) -> None:
    """No file may have more than 9,000 bytes: weights, states and graphs fail, by three libraries' own ways."""
    folder = new(command)
    ended = server.run(folder, (*COMMANDS[command], *READ_HERE[command]), limit=9_000)
    assert ended.status == 2, ended.err
    (line,) = [line for line in ended.err.splitlines() if "error: " in line]
    assert "cannot be written (the file would be larger than allowed); raise the limit" in line
    assert "Traceback" not in ended.err
    assert hidden(folder) == []
    readable(folder / "run")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.72, 0.88, 0.9])
def test_run_folder_that_goes_is_one_line_or_made_again(
    server: Server, new: Callable[..., Path], unbroken: Callable[[str], Any], share: float
) -> None:
    _, points = unbroken("finetune")
    folder = new()
    ended = server.run(folder, COMMANDS["finetune"], point=int(points * share), remove="run")
    assert ended.status in (0, 2)
    assert "Traceback" not in ended.err
    assert ended.status == 0 or "cannot be written (its folder is gone); " in ended.err
    assert hidden(folder) == []


def test_output_that_cannot_be_is_refused_before_the_work(server: Server, new: Callable[..., Path]) -> None:
    folder = new()
    (folder / "file").write_text("x")
    (folder / "there").mkdir()
    for arguments, says in (
        (("export", "small", "-o", "file/x"), "file: cannot be written (not a directory)"),
        (("verify", "small", "--junit", "there"), "there: cannot be written (it is a folder); name a file"),
        (("verify", "small", "--junit", "file/x.xml"), "file/x.xml: cannot be written (not a directory)"),
        (("report", "-o", "file/x.html"), "file/x.html: cannot be written (not a directory)"),
    ):
        ended = server.run(folder, arguments)
        assert ended.status == 2, arguments
        assert says in ended.err
        assert len(ended.err.splitlines()) == 1
        assert not (folder / "run").exists()


# ---- signals


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_signal_while_python_can_raise_nothing_is_not_lost(name: str, status: int) -> None:
    """As in a callback after a fork, which readers of images are: what is raised there is printed and forgotten."""
    program = f"""
import os, signal, sys, time
from growkit_cli import guard
os.register_at_fork(after_in_parent=lambda: armed and signal.raise_signal(signal.{name}))
guard._at_work.append("train")
armed = True
with guard.stoppable():
    try:
        if not os.fork():
            os._exit(0)
        armed = False
        print("went on", flush=True)
        time.sleep(20)
        print("not reached", flush=True)
    except KeyboardInterrupt as error:
        sys.exit(143 if isinstance(error, guard.Terminated) else 130)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (status, "went on\n", "")


@pytest.mark.parametrize(("raised", "lines"), [("signal.raise_signal(signal.SIGINT)", 0), ("sys.exit(130)", 1)])
def test_what_is_half_made_complains_of_no_interrupt_but_of_anything_else(raised: str, lines: int) -> None:
    program = f"""
import signal, sys
from growkit_cli import guard
class Half:
    def __del__(self):
        raise AttributeError("not made yet")
guard._at_work.append("train")
def work():
    half = Half()
    {raised}
try:
    with guard.stoppable():
        work()
except KeyboardInterrupt:
    sys.exit(130)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("AttributeError: not made yet")) == (130, lines)


def test_no_state_is_promised_where_none_was_saved(tmp_path: Path) -> None:
    for command, place in (("train", "trained/last"), ("finetune", "finetuned/last"), ("grow", "operator")):
        given = {"run": tmp_path, "data": "images"}
        assert left(command, given) == "what was complete before is as it was; give the same command again"
        (tmp_path / place).mkdir(parents=True)
        assert left(command, given) == "nothing that it learned was saved yet, --resume begins it anew"
        (tmp_path / place / "state.pt").touch()
        assert left(command, {"run": tmp_path, "data": "images"}).endswith("--resume goes on")
    assert left("grow", {"run": tmp_path, "data": None}).endswith("give the same command again")  # of an older operator


def test_signal_while_a_library_is_imported_waits_for_that(tmp_path: Path) -> None:
    """torch and numpy catch what their own imports raise, and would go on without what failed."""
    (tmp_path / "optional.py").write_text("import signal; signal.raise_signal(signal.SIGTERM); whole = True\n")
    (tmp_path / "library.py").write_text("try:\n    import optional\nexcept BaseException:\n    optional = None\n")
    program = """
import time
from growkit.errors import Terminated
from growkit_cli import guard
guard._at_work.append("train")
with guard.stoppable():
    try:
        import library
        print(library.optional.whole, flush=True)
        time.sleep(10)
    except Terminated:
        print("ended", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "True\nended\n"


def test_second_signal_ends_at_once() -> None:
    program = """
import signal
from growkit_cli.guard import stoppable
with stoppable():
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.raise_signal(signal.SIGINT)
        print("not reached", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (
        130,
        "",
        "interrupted; nothing was at work\nstopped at once\n",
    )


# ---- the long run


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("command", "runs"),
    [
        *(("train", 30), ("grow", 25), ("finetune", 30), ("export", 12), ("compare", 20)),
        *(("finetune-fp16", 12), ("sweep", 16), ("verify", 10), ("evaluate", 10), ("report", 8)),
    ],
)
def test_many_deaths_change_nothing(
    server: Server, place: Path, new: Callable[..., Path], unbroken: Callable[[str], Any], command: str, runs: int
) -> None:
    """Seeded: over all points of a command, every kind of death, some of them twice in a row, some by the clock."""
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
        folder = new(command)
        die_and_finish(server, command, place, folder, unbroken, deaths)
        shutil.rmtree(folder)
    print(f"{command}: {server.kills - before} deaths in {time.monotonic() - began:.0f} s, {points} points")
    assert server.kills - before >= runs
