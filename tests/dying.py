"""A server that runs growkit commands in forked processes and ends them where it is told: torch is loaded once.

It reads one JSON job per line and answers with one: {"status", "points", "memory", "out", "err"}. A job's keys:

    arguments  of growkit
    cwd        to run it in
    point      ends the process just before the so-manieth change of the disk or update of a model, from 0; none, never
    after      ends the process after so many seconds
    signal     what ends it, by name
    remove     a folder that goes at the point, instead of the process
    limit      bytes that a file may have, as on a disk that is full
    forget     what a resumed run is made to lose: "ema", "optimizer", "scaler" or "random"; a twin to be found out
    deadline   seconds after which the system ends it, also where Python has no say, as in a graph that never ends
    memory     bytes that it may take beyond what the server has
    spoil      a program to run before the command: the twin of a growkit that trusts what it is given

The points are counted in the process itself: what Python's audit events tell of renaming, removing, making folders and
opening files for writing, what is put on the disk by fsync, and updates of optimizers. So a seeded point is the same
place in every run, and all kinds of place are reached, however short they last.
"""

import contextlib
import gc
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import growkit_cli.main
from growkit.errors import GrowkitError

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.truncate")
NEW = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Points:
    """Counts the points of this process and ends it at one of them."""

    def __init__(self, job: dict[str, Any], number: int):
        self.job, self.number, self.seen, self.process = job, number, 0, os.getpid()

    def __call__(self, *_: Any, **__: Any) -> None:
        if os.getpid() != self.process:  # a reader of images
            return
        self.seen += 1
        if self.seen - 1 != self.job.get("point"):
            return
        if "remove" in self.job:
            shutil.rmtree(self.job["remove"])
        else:
            os.kill(self.process, self.number)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & NEW):
            self()


def forget(what: str) -> None:
    from growkit.train import training

    if what == "random":
        real = training.seeded
        training.seeded = lambda *parts, device=None: real("another", *parts, device=device)
        return
    load = training.Training.load

    def forgetful(self: Any, state: dict[str, Any]) -> None:
        fresh = self.state()
        load(self, {**state, what: fresh[what]})

    training.Training.load = forgetful


def child(job: dict[str, Any], out: str, err: str, said: int) -> None:
    os.setsid()
    os.chdir(job["cwd"])
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = ["growkit", *map(str, job["arguments"])]
    if job.get("limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
    if job.get("forget"):
        forget(job["forget"])
    number = getattr(signal, job.get("signal", "SIGKILL"))
    points = Points(job, number)
    if job.get("after"):
        signal.setitimer(signal.ITIMER_REAL, job["after"])
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), number))
    if job.get("deadline"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, job["deadline"])
    if job.get("memory"):
        own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (own + job["memory"], own + job["memory"]))
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    register_optimizer_step_pre_hook(points)
    fsync = os.fsync
    os.fsync = lambda descriptor: (points(), fsync(descriptor))[1]
    sys.addaudithook(points.audit)
    status = 1
    try:
        if job.get("spoil"):
            exec(job["spoil"], {})
        growkit_cli.main.main()
        status = 0
    except SystemExit as left:
        status = int(left.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(said, str(points.seen).encode())
        os._exit(status)


# what commands import on their way: once here instead of in each process
LOADED = (
    *("growkit.compare.compare", "growkit.compare.sweep", "growkit.deploy.verify", "growkit.deploy.triton_check"),
    *("growkit.evaluation", "growkit.fitting", "growkit.growing", "growkit.report.run"),
    *("matplotlib.pyplot", "networkx", "onnx.reference", "onnxscript"),
    *("optuna", "timm.optim", "torch._dynamo", "torch.export", "torch.onnx"),
)


def serve() -> None:
    for name in LOADED:
        importlib.import_module(name)
    with contextlib.suppress(GrowkitError):  # what is imported while options are read
        growkit_cli.main.app(["report", "--run", "no/such/run"], standalone_mode=False)
    gc.collect()
    gc.freeze()  # a collector would touch all that is shared with the server, and so copy it
    with tempfile.TemporaryDirectory() as folder:
        out, err = f"{folder}/out", f"{folder}/err"
        for line in sys.stdin:
            for path in (out, err):
                Path(path).unlink(missing_ok=True)
            hear, said = os.pipe()
            process = os.fork()
            if not process:
                child(json.loads(line), out, err, said)
            os.close(said)
            _, status, usage = os.wait4(process, 0)
            told = os.read(hear, 20) if os.set_blocking(hear, False) is None and os.WIFEXITED(status) else b""
            os.close(hear)
            answer = {
                "process": process,
                "status": os.waitstatus_to_exitcode(status),
                "points": int(told or 0),
                "memory": usage.ru_maxrss * 1024,
                "out": Path(out).read_text(errors="replace") if Path(out).exists() else "",
                "err": Path(err).read_text(errors="replace") if Path(err).exists() else "",
            }
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    serve()
