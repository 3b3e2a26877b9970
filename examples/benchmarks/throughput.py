"""Images per second of growkit's fit against a loop of timm's own parts, as in its train script.

    python examples/benchmarks/throughput.py --data IMAGENET --model deit_base --batch-size 256 --workers 16

Both use the same model, batch, precision, images, augmentation (crops, flips and what is asked for) and workers;
segments of both, and of growkit with each of --with, alternate in random order in one process. An epoch should be
longer than a segment, two times --steps: where an epoch ends, timm's loader has nothing ready, and a segment is all
waiting. Then come the share of the machine's measured matmul peak, and where a training step's time goes. The promise
is for a GPU, and on a CPU this is a smoke test; but --read-only, which leaves the model out, shows on a CPU too which
of the two reads faster.
"""

import argparse
import json
import math
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from growkit.errors import GrowkitError
from growkit.plan import step_flops
from growkit.record import hardware, versions
from growkit.source import Source, fresh
from growkit.train.batches import train_batches
from growkit.train.data import open_data
from growkit.train.device import pick_device
from growkit.train.loop import fit
from growkit.train.precision import amp_dtype, autocast
from growkit.train.settings import FitSettings
from growkit.train.watch import StepRecord

PROMISED = {"ratio": 1.0}
WITH: dict[str, dict[str, Any]] = {
    "cache-ram": {"cache": "ram"},
    "cache-device": {"cache": "device"},
    "compile": {"compile": "default"},
    "cuda-graphs": {"compile": "reduce-overhead"},
    "grad-checkpointing": {"grad_checkpointing": True},
}
WITH_HELP = f"of {', '.join(WITH)}, several at once with +, as in cache-ram+compile; or none"
ENDLESS = 10**6  # updates of a run that is stopped: near its end growkit's readers would idle, while timm's go on
SIDE = {"cuda": 8192, "cpu": 2048}  # of the square matrices whose product is the peak
OPS_SHOWN = 12


def main() -> None:
    """Measure, print medians, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="ImageFolder with train/ and val/")
    parser.add_argument("--model", default="deit_small", help="timm name or a short one")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for the model")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--steps", type=int, default=20, help="timed updates in a segment, after as many warm-up ones")
    parser.add_argument("--rounds", type=int, default=5, help="segments of each kind")
    parser.add_argument("--aa", help="timm's AutoAugment policy, as in rand-m9-mstd0.5; not for images in a cache")
    parser.add_argument("--reprob", type=float, default=0.0, help="probability of erasing")
    parser.add_argument("--color-jitter", type=float, default=0.0, help="strength of colour jitter")
    parser.add_argument("--read-only", action="store_true", help="time the reading of batches, without a model")
    parser.add_argument("--with", dest="more", help=f"{WITH_HELP}; left out, both caches where they can be compared")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file with hardware and versions")
    options = parser.parse_args()
    for name in ("batch_size", "steps", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: expected 1 or more")
    if options.out and not options.out.absolute().parent.is_dir():
        parser.error(f"--out {options.out}: no such folder; make it first")
    try:
        device = pick_device(options.device)
    except GrowkitError as error:
        parser.error(str(error))
    left_out = "none" if options.aa or options.read_only else "cache-ram,cache-device"
    more = options.more or left_out
    asked = [] if more == "none" else more.split(",")
    if unknown := {part for name in asked for part in name.split("+")} - set(WITH):
        parser.error(f"--with {', '.join(sorted(unknown))}: choose from {WITH_HELP.removeprefix('of ')}")
    if not (Path(options.data) / "train").is_dir():
        parser.error(f"--data {options.data}: no folder train/ in it; give an ImageFolder with train/ and val/")
    try:
        images = len(create_dataset("", root=str(Path(options.data) / "train"), is_training=True))
    except RuntimeError as error:  # timm finds none
        parser.error(f"--data {options.data}: {error}")
    if whole := images // options.batch_size < 2 * options.steps:
        print(f"{images} images are fewer than a segment takes: loaders that restart each epoch look slow")

    ours, theirs = (growkit_reading, timm_reading) if options.read_only else (growkit_segment, timm_segment)
    kinds: dict[str, Callable[[], float]] = {}
    try:
        kinds |= {"growkit": ours(options, device), "timm": theirs(options, device)}
        for name in asked:
            together = {key: value for part in name.split("+") for key, value in WITH[part].items()}
            kinds[f"growkit, {name}"] = ours(options, device, **together)
    except GrowkitError as error:
        parser.error(str(error))
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    order = random.Random(options.seed)
    for number in range(options.rounds):
        for name in order.sample(list(kinds), len(kinds)):
            rates[name].append(kinds[name]())
        done = ", ".join(f"{name} {found[-1]:.1f}" for name, found in rates.items())
        print(f"round {number + 1} of {options.rounds}: {done} images/s", file=sys.stderr)
    ratios = {
        name: [ours / theirs for ours, theirs in zip(found, rates["timm"], strict=True)]
        for name, found in rates.items()
        if name != "timm"
    }
    medians = {name: statistics.median(found) for name, found in rates.items()}
    what = "reading alone" if options.read_only else f"{options.model}, {options.precision}"
    print(
        f"{what}, batch {options.batch_size}, {options.workers} workers, {device}; medians of {options.rounds} segments"
    )
    for name, median in medians.items():
        against = ratios.get(name, [1.0])
        spread = f"{statistics.median(against):.3f} ({min(against):.3f} to {max(against):.3f}) x timm"
        print(f"{name:34} {median:10.1f} images/s, {spread}")
    work = {} if options.read_only else work_of(options, device, medians)
    if options.out:
        given = {name: value for name, value in vars(options).items() if name not in ("out", "data")}
        content = {
            "command": shlex.join(sys.argv),
            "options": given,
            "epochs_end_in_segments": whole,
            "images_per_second": rates,
            "median_images_per_second": medians,
            "ratio": statistics.median(ratios["growkit"]),
            "ratios": ratios,
            **work,
            "versions": versions(),
            "hardware": hardware(),
        }
        options.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def work_of(options: argparse.Namespace, device: torch.device, medians: dict[str, float]) -> dict[str, Any]:
    """Print the promise, the share of the machine's peak, and where the time goes; return the same for the file."""
    print(f"promised on a GPU: {PROMISED['ratio']:.2f} x timm, from disk")
    peak, per_image = matmul_peak(options, device), flops_per_image(options)
    used = {name: median * per_image / peak for name, median in medians.items()}
    print(f"matmul peak {peak / 1e12:.3g} TFLOP/s; {per_image / 1e9:.3g} GFLOP for each image")
    for name, share in used.items():
        print(f"{share:7.1%} of the peak  {name}")
    where = shares(options, device)
    print("where the time of growkit's training steps goes:")
    for name, share in where.items():
        print(f"{share:7.1%}  {name}")
    return {
        "promised": PROMISED,
        "matmul_peak_flops_per_second": peak,
        "flops_per_image": per_image,
        "share_of_peak": used,
        "shares_of_time": where,
    }


def start_of(options: argparse.Namespace) -> Source:
    """The model, with the same random weights every time, and its image preprocessing."""
    classes = [folder.name for folder in sorted((Path(options.data) / "train").iterdir()) if folder.is_dir()]
    return fresh(options.model, options.set, classes, seed=options.seed)


def settings_of(options: argparse.Namespace) -> FitSettings:
    """growkit's settings; the timm loop takes its own from them."""
    return FitSettings(
        steps=ENDLESS,
        log_every=options.steps,
        batch_size=options.batch_size,
        workers=options.workers,
        precision=options.precision,
        seed=options.seed,
        eval_every=0,
        color_jitter=options.color_jitter,
        aa=options.aa,
        reprob=options.reprob,
    )


def growkit_segment(options: argparse.Namespace, device: torch.device, **changes: Any) -> Callable[..., float]:
    """Images per second in the second half of a short run of fit; cached images stay cached between calls.

    The segment takes what is to be called when that half begins.
    """
    source, settings = start_of(options), replace(settings_of(options), **changes)
    data = open_data(options.data, source.preprocessing, settings)

    def segment(warmed: Callable[[], object] = lambda: None) -> float:
        records: list[StepRecord] = []

        def stop_in_time(record: StepRecord) -> None:
            records.append(record)
            if record.step == options.steps:
                warmed()
            if record.step == 2 * options.steps:
                raise KeyboardInterrupt

        fit(source.model(), data, settings, device=device, on_step=stop_in_time)
        return records[-1].images_per_second

    return segment


def flops_per_image(options: argparse.Namespace) -> float:
    """FLOPs of a training step per image."""
    source = start_of(options)
    return step_flops(source.model().to("meta"), source.architecture, options.batch_size) / options.batch_size


def matmul_peak(options: argparse.Namespace, device: torch.device) -> float:
    """FLOPs per second of a large square product in training's precision, the best of many."""
    side = SIDE[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=amp_dtype(options.precision, device)) for _ in "ab")
    best = math.inf
    for _ in range(20):
        wait(device)
        start = time.perf_counter()
        left @ right
        wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def shares(options: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Share of training steps' time that each kind of operation takes itself, the largest first."""
    segment = growkit_segment(options, device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    profiler = profile(activities=activities)
    segment(profiler.start)  # only then: what comes before updates is no part of them
    profiler.stop()
    found = {
        event.key: float(event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total)
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CPU  # kernels come under their operations
    }
    total = sum(found.values())
    largest = sorted(found, key=found.__getitem__, reverse=True)[:OPS_SHOWN]
    return {name: found[name] / total for name in largest}


def growkit_reading(options: argparse.Namespace, device: torch.device, **changes: Any) -> Callable[[], float]:
    """Images per second in the second half of as many batches, which are read and dropped."""
    source, settings = start_of(options), replace(settings_of(options), **changes)
    data = open_data(options.data, source.preprocessing, settings)

    def segment() -> float:
        with closing(train_batches(data, settings, 0, ENDLESS, device=device)) as batches:  # type: ignore[type-var]
            return rate(lambda: next(batches), options, device)

    return segment


def timm_reading(options: argparse.Namespace, device: torch.device) -> Callable[[], float]:
    """As `growkit_reading`, with timm's loader."""
    source, settings = start_of(options), settings_of(options)

    def segment() -> float:
        batches = endless(timm_loader(source.preprocessing, settings, Path(options.data) / "train", device))
        return rate(lambda: next(batches), options, device)

    return segment


def timm_segment(options: argparse.Namespace, device: torch.device) -> Callable[[], float]:
    """Images per second in the second half of as many updates in a loop like that of timm's train script."""
    source, settings = start_of(options), settings_of(options)
    loss_of = nn.CrossEntropyLoss()

    def segment() -> float:
        model = source.model().to(device).train()
        batches = endless(timm_loader(source.preprocessing, settings, Path(options.data) / "train", device))
        optimizer = create_optimizer_v2(model, opt=settings.opt, lr=settings.lr, weight_decay=settings.weight_decay)
        schedule, _ = create_scheduler_v2(
            optimizer, sched=settings.sched, num_epochs=2, updates_per_epoch=options.steps
        )
        losses: list[Tensor] = []

        def update() -> None:
            images, labels = next(batches)
            images, labels = images.to(device), labels.to(device)
            with autocast(settings.precision, device):
                loss = loss_of(model(images), labels)
            loss.backward()
            dispatch_clip_grad(model.parameters(), settings.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            schedule.step_update(len(losses))

        found = rate(update, options, device)
        if not math.isfinite(losses[-1].item()):
            sys.exit("timm's loop: the loss is not finite")
        return found

    return segment


def rate(step: Callable[[], Any], options: argparse.Namespace, device: torch.device) -> float:
    """Images per second in the second half of 2 * options.steps calls."""
    for number in range(2 * options.steps):
        if number == options.steps:
            wait(device)
            start = time.perf_counter()
        step()
    wait(device)
    return options.steps * options.batch_size / (time.perf_counter() - start)


def timm_loader(config: dict[str, Any], settings: FitSettings, folder: Path, device: torch.device) -> Any:
    """timm's loader of training images, as in its train script: with the prefetcher, which normalises batches."""
    dataset = create_dataset("", root=str(folder), is_training=True, batch_size=settings.batch_size)
    if len(dataset) < settings.batch_size:
        sys.exit(f"{folder}: {len(dataset)} images fill no batch of {settings.batch_size}; lower --batch-size")
    return create_loader(
        dataset,
        input_size=config["input_size"],
        batch_size=settings.batch_size,
        is_training=True,
        scale=(settings.scale_min, 1.0),
        hflip=settings.hflip,
        color_jitter=settings.color_jitter,
        auto_augment=settings.aa,
        re_prob=settings.reprob,
        re_mode="pixel",
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        num_workers=settings.workers,
        pin_memory=device.type == "cuda",
        persistent_workers=settings.workers > 0,
        device=device,
    )


def endless(loader: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one epoch after another."""
    while True:
        yield from loader


def wait(device: torch.device) -> None:
    """Wait until the GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
