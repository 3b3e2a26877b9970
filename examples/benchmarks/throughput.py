"""Images per second of growkit's fit against a loop made of timm's own parts, as its train script has them.

    python examples/benchmarks/throughput.py --data IMAGENET --model deit_base --batch-size 256 --workers 16

Same model, batch, precision, images, augmentation and workers; segments of both alternate in random
order in one process. The promise is for a GPU; on a CPU this is a smoke test.
"""

import argparse
import json
import math
import random
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn

from growkit.pipeline import pick_device
from growkit.record import hardware, versions
from growkit.source import Source, fresh
from growkit.train.data import open_data
from growkit.train.loop import StepRecord, fit
from growkit.train.score import autocast
from growkit.train.settings import FitSettings

PROMISED = {"ratio": 1.0}


def main() -> None:
    """Measure, print medians, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="ImageFolder with train/ and val/")
    parser.add_argument("--model", default="deit_small", help="timm name or a short one")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the model")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--steps", type=int, default=20, help="updates timed in a segment; as many warm it up")
    parser.add_argument("--rounds", type=int, default=5, help="segments of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file with hardware and versions")
    options = parser.parse_args()
    device = pick_device(options.device)

    kinds = {"growkit": growkit_segment, "timm": timm_segment}
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    order = random.Random(options.seed)
    for number in range(options.rounds):
        for name in order.sample(list(kinds), len(kinds)):
            rates[name].append(kinds[name](options, device))
        done = ", ".join(f"{name} {found[-1]:.1f}" for name, found in rates.items())
        print(f"round {number + 1} of {options.rounds}: {done} images/s", file=sys.stderr)
    ratios = [ours / theirs for ours, theirs in zip(rates["growkit"], rates["timm"], strict=True)]
    medians = {name: statistics.median(found) for name, found in rates.items()}
    print(f"{options.model}, batch {options.batch_size}, {options.precision}, {options.workers} workers, {device}")
    for name, median in medians.items():
        print(f"{name:8} {median:10.1f} images/s, median of {options.rounds} segments")
    shown = f"{min(ratios):.3f} to {max(ratios):.3f}"
    print(f"growkit / timm: {statistics.median(ratios):.3f}, {shown} (promised on a GPU: {PROMISED['ratio']:.2f})")
    if options.out:
        given = {name: value for name, value in vars(options).items() if name not in ("out", "data")}
        content = {
            "command": shlex.join(sys.argv),
            "options": given,
            "promised": PROMISED,
            "images_per_second": rates,
            "median_images_per_second": medians,
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "versions": versions(),
            "hardware": hardware(),
        }
        options.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def start_of(options: argparse.Namespace) -> Source:
    """The model with the same random weights every time, and how its images are prepared."""
    classes = [folder.name for folder in sorted((Path(options.data) / "train").iterdir()) if folder.is_dir()]
    return fresh(options.model, options.set, classes, seed=options.seed)


def settings_of(options: argparse.Namespace) -> FitSettings:
    """growkit's settings; the timm loop takes its own from them."""
    return FitSettings(
        steps=2 * options.steps,
        log_every=options.steps,
        batch_size=options.batch_size,
        workers=options.workers,
        precision=options.precision,
        seed=options.seed,
        eval_every=0,
    )


def growkit_segment(options: argparse.Namespace, device: torch.device) -> float:
    """Images per second of the second half of a short run of fit."""
    source, settings = start_of(options), settings_of(options)
    data = open_data(options.data, source.preprocessing, settings)
    records: list[StepRecord] = []
    fit(source.model(), data, settings, device=device, on_step=records.append)
    return records[-1].images_per_second


def timm_segment(options: argparse.Namespace, device: torch.device) -> float:
    """Images per second of the second half of as many updates in a loop as timm's train script has it."""
    source, settings = start_of(options), settings_of(options)
    model = source.model().to(device).train()
    batches = endless(timm_loader(source.preprocessing, settings, Path(options.data) / "train", device))
    optimizer = create_optimizer_v2(model, opt=settings.opt, lr=settings.lr, weight_decay=settings.weight_decay)
    schedule, _ = create_scheduler_v2(optimizer, sched=settings.sched, num_epochs=2, updates_per_epoch=options.steps)
    loss_of = nn.CrossEntropyLoss()
    start = 0.0
    for step in range(2 * options.steps):
        if step == options.steps:
            wait(device)
            start = time.perf_counter()
        images, labels = next(batches)
        images, labels = images.to(device), labels.to(device)
        with autocast(settings.precision, device):
            loss = loss_of(model(images), labels)
        loss.backward()
        dispatch_clip_grad(model.parameters(), settings.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step_update(step + 1)
    wait(device)
    rate = options.steps * settings.batch_size / (time.perf_counter() - start)
    if not math.isfinite(loss.item()):
        sys.exit("timm's loop: the loss is not finite")
    return rate


def timm_loader(config: dict[str, Any], settings: FitSettings, folder: Path, device: torch.device) -> Any:
    """timm's loader of training images, with the prefetcher where there is a GPU."""
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
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        num_workers=settings.workers,
        pin_memory=device.type == "cuda",
        persistent_workers=settings.workers > 0,
        use_prefetcher=device.type == "cuda",
        device=device,
    )


def endless(loader: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one epoch after the other."""
    while True:
        yield from loader


def wait(device: torch.device) -> None:
    """Let the GPU finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
