"""What growing saves on CIFAR-10: every method under one budget, from a ViT of 6 layers, 192 wide, to four bigger ones.

    python examples/benchmarks/savings.py --data CIFAR --out OUT                     quick: 1 seed, 30 epochs
    python examples/benchmarks/savings.py --data CIFAR --out OUT --full --pairs width     3 seeds, 60 epochs

CIFAR holds train/CLASS/*.jpg and val/CLASS/*.jpg, 32 x 32. Images stay in the device's memory and are augmented there;
on a GPU everything runs in bf16. It stops after --minutes with its state saved, and the same command continues; exit
status 3 says that there is more to do. --jobs lets several processes share the device, each with its own methods:
one small network at a time leaves a large GPU idle. Each pair's results are in OUT/quick/PAIR/compare, or under
OUT/full; with --results they are copied to that folder under a name with pair, hardware and date. Sizes are
layers,width,heads.
"""

import argparse
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from growkit.checkpoint import HISTORY
from growkit.compare.bench import bench_of
from growkit.compare.compare import Comparison, compare_methods
from growkit.compare.settings import CompareSettings
from growkit.errors import GrowkitError
from growkit.files import read_json
from growkit.fitting import train_model
from growkit.history import served_settings
from growkit.job import Job
from growkit.record import RunFolder, hardware
from growkit.source import Source, load_source
from growkit.stage import LAST
from growkit.train.progress import Progress, say_nothing
from growkit.train.settings import FitSettings

PAIRS = {"width": "6,384,6", "depth": "12,192,3", "both": "12,384,6", "odd": "6,256,4"}
METHODS = {
    "width": "mango,mango:rank=4,ligo,bert2bert,bert2bert:variant=aki,lemon,net2net,hypercloning",
    "depth": "mango,mango:rank=4,ligo,bert2bert,lemon,llama-pro,stackbert,stackbert:variant=interlace",
    "both": "mango,mango:rank=4,ligo,bert2bert,bert2bert:variant=aki,lemon,net2net",
    "odd": "mango,mango:rank=4,ligo,bert2bert,bert2bert:variant=aki,lemon,net2net",
}
UNFINISHED = 3


class Deadline:
    """Ends the work as Ctrl-C does, training with its state saved, once the time is over."""

    def __init__(self, seconds: float):
        self.ends = time.monotonic() + seconds

    def tell(self) -> Progress:
        """One run's progress callback, which interrupts once: a second signal would end training with nothing saved."""
        asked = False

        def progress(done: float, total: int, note: str = "") -> None:
            nonlocal asked
            if time.monotonic() > self.ends and not asked:
                asked = True
                signal.raise_signal(signal.SIGINT)

        return progress

    def follow(self, title: str, finished: int, total: int) -> Progress:
        """For compare_methods(follow=...)."""
        return self.tell()


def main() -> int:
    """Train the source, then compare on each pair; 0 when all is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="ImageFolder with train/ and val/")
    parser.add_argument("--out", type=Path, required=True, help="where the source and the runs go")
    parser.add_argument("--pairs", default=",".join(PAIRS), help="of width, depth, both, odd")
    parser.add_argument("--full", action="store_true", help="3 seeds, 60 epochs, three rates, three budgets")
    parser.add_argument("--minutes", type=float, default=9, help="stop after this many")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--results", type=Path, help="folder for copies of the finished results")
    parser.add_argument("--source", default="6,192,3")
    parser.add_argument("--target", action="append", default=[], metavar="PAIR=L,W,H", help="another size for a pair")
    parser.add_argument("--methods", help="methods in place of the pair's own")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for the source's input")
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--operator-steps", type=int, default=100)
    parser.add_argument("--operator-lrs", default=CompareSettings.operator_lrs)
    parser.add_argument("--lrs", help="5e-4,2e-3; with --full also 1e-3")
    parser.add_argument("--controls", default="random-pad,untrained-source,untrained-operator,source-longer")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the device")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)  # which of --jobs this process is
    given = parser.parse_args()
    targets = PAIRS | dict(item.split("=", 1) for item in given.target)
    deadline = Deadline(60 * given.minutes)
    recipe = FitSettings(
        epochs=given.epochs or (60 if given.full else 30),
        batch_size=given.batch_size,
        lr=1e-3,
        min_lr=1e-5,
        scale_min=0.6,
        color_jitter=0,
        smoothing=0.1,
        cache="device",
        eval_every=5,
        save_seconds=60,
    )
    root = given.out / ("full" if given.full else "quick")
    typed = shlex.join(["python", *sys.argv])
    run = RunFolder(root / "source", command_line=typed)
    if not whole(run, recipe):
        print(f"training the source, {given.source}", flush=True)
        begun = (run.trained / "last" / "state.pt").exists()
        told = deadline.tell()
        trained = train_model(
            Job(run, given.device, force=not begun, resume=begun, tell=lambda what: told),
            "deit_tiny",
            given.data,
            recipe,
            sets=(*(given.set or ("img_size=32", "patch_size=4")), *sizes(given.source)),
        )
        if trained.fitted.interrupted:
            raise KeyboardInterrupt
    source = load_source(str(run.trained / LAST))  # the best model was chosen on images that will test it
    for pair in given.pairs.split(","):
        settings = CompareSettings(
            methods=given.methods or METHODS.get(pair, METHODS["odd"]),
            controls=given.controls,
            seeds=given.seeds or (3 if given.full else 1),
            budgets="0.25,0.5,1" if given.full else "1",
            lrs=given.lrs or ("5e-4,1e-3,2e-3" if given.full else "5e-4,2e-3"),
            operator_steps=given.operator_steps,
            operator_lrs=given.operator_lrs,
        )
        name = "" if given.part is None else f"({given.part}) "
        job = Job(
            RunFolder(root / pair, command_line=typed),
            given.device,
            resume=True,
            say=lambda line, name=name: print(name + line, flush=True),
            follow=deadline.follow,
        )
        if given.part is None:
            print(f"{pair}: {given.source} to {targets[pair]}", flush=True)
        if given.jobs > 1:
            shared = prepared(job, source, sizes(targets[pair]), settings, recipe, given.data)
            if given.part is not None:
                shared.run_some(shared.arms[given.part :: given.jobs])
                continue
            del shared
            if UNFINISHED in side_by_side(pair, deadline, given.jobs):
                raise KeyboardInterrupt
        compared = compare_methods(job, source, "deit_tiny", given.data, settings, recipe, sets=sizes(targets[pair]))
        print((compared.folder / "results.md").read_text(encoding="utf-8"), flush=True)
        if given.results:
            keep(compared.folder, given.results, pair)
    return 0


def side_by_side(pair: str, deadline: Deadline, jobs: int) -> list[int]:
    """Make the runs of a pair in `jobs` processes and return their exit statuses; this process makes what they omit."""
    minutes = (deadline.ends - time.monotonic()) / 60
    own = ["--pairs", pair, "--minutes", str(max(0.0, minutes))]
    started = [subprocess.Popen([sys.executable, *sys.argv, *own, "--part", str(number)]) for number in range(jobs)]
    return [process.wait() for process in started]


def prepared(
    job: Job,
    source: Source,
    sets: tuple[str, ...],
    settings: CompareSettings,
    recipe: FitSettings,
    data: str,
) -> Comparison:
    """The comparison, started in its folder if it was not yet."""
    quiet = replace(job, say=say_nothing)  # the process that started it printed these lines
    steps = settings.operator_steps
    bench = bench_of(
        quiet, job.run.compare, source, "deit_tiny", data, recipe, split=settings, operator_steps=steps, sets=sets
    )
    comparison = Comparison(job, bench, settings)
    comparison.prepare()
    return comparison


def whole(run: RunFolder, recipe: FitSettings) -> bool:
    """Whether the source is fully trained; exits if it was trained with other settings."""
    path = run.trained / LAST / HISTORY
    if not path.exists():
        return False
    fitted = read_json(path)["fit"]
    if fitted["settings"] != served_settings(recipe):
        sys.exit(f"{run.trained}: trained with other settings; give the same settings, or another --out")
    return not fitted["interrupted"]


def sizes(text: str) -> tuple[str, ...]:
    """'6,192,3' as arguments of the architecture."""
    layers, width, heads = text.split(",")
    return f"depth={layers}", f"embed_dim={width}", f"num_heads={heads}"


def keep(folder: Path, results: Path, pair: str) -> None:
    """Copy results and the curves' plot under a name with pair, hardware and date."""
    found = hardware()
    machine = re.sub(r"[^a-z0-9]+", "-", found.get("gpu", f"{found['cores']} cpu cores").lower()).strip("-")
    results.mkdir(parents=True, exist_ok=True)
    for path in (folder / "results.json", folder / "results.md", folder / "plots" / "curves.svg"):
        name = f"savings-{pair}_{machine}_{datetime.now(UTC):%Y-%m-%d}{path.suffix}"
        shutil.copyfile(path, results / name)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("time is over; the same command continues", flush=True)
        sys.exit(UNFINISHED)
    except GrowkitError as error:
        sys.exit(f"error: {error}")
