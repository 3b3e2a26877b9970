"""What training Mango's operator costs beside a plain training step of the target.

    python examples/benchmarks/operator_cost.py --ranks 1,2,4,8 --out operator_cost.json

Prints the arithmetic of the contraction, counted, and then time and peak memory, measured: steps of
both kinds alternate in random order in one process. --small and --big take a timm name and, after
commas, arguments of its constructor: deit_tiny,embed_dim=64,depth=6,num_heads=1. (A script named
operator.py would hide the standard library's module from its neighbours.)
"""

import argparse
import json
import random
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import opt_einsum
import torch
from torch import nn

from growkit.arch import build, find, find_target, parse_sets
from growkit.arch.spec import Architecture
from growkit.core.ring import cheapest_path, contraction_plan
from growkit.grow import GrownModel, grow
from growkit.methods.mango import Mango, pack
from growkit.pipeline import pick_device
from growkit.record import hardware, versions
from growkit.settings import GrowSettings
from growkit.train.score import autocast

PROMISED = {"rank": 4, "batch_size": 256, "time_ratio": 1.15, "memory_ratio": 1.25, "flops_ratio": 1.05}
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {
        "small": "deit_small",
        "big": "deit_base",
        "batch_size": 256,
        "rounds": 20,
        "precision": "bf16",
    },
    "cpu": {
        "small": "deit_tiny,embed_dim=64,depth=6,num_heads=1",
        "big": "deit_tiny,embed_dim=128,depth=6,num_heads=2",
        "batch_size": 16,
        "rounds": 5,
        "precision": "fp32",
    },
}


def main() -> None:
    """Count, measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", help="source; deit_small on a GPU, a tiny one on a CPU")
    parser.add_argument("--big", help="target; deit_base on a GPU, a tiny one on a CPU")
    parser.add_argument("--ranks", default="1,2,4,8", help="rank of every bond, several with commas")
    parser.add_argument("--batch-size", type=int, help="256 on a GPU, 16 on a CPU")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--rounds", type=int, help="pairs of steps per rank")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file with hardware and versions")
    parser.add_argument("--peak-of-rank", type=int, help=argparse.SUPPRESS)  # 0 is the plain step
    options = parser.parse_args()
    device = pick_device(options.device)
    for name, value in DEFAULTS[device.type].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    source = find(*named(options.small))
    target, _ = find_target(source, *asked(options.big))
    if options.peak_of_rank is not None:
        print(peak_here(source, target, options.peak_of_rank, device, options))
        return

    ranks = [int(rank) for rank in options.ranks.split(",")]
    print(f"{options.small} -> {options.big}, batch {options.batch_size}, {options.precision}, {device}")
    arithmetic = [count(source, target, rank) for rank in ranks]
    row = "{:>4} {:>14} {:>14} {:>14} {:>8} {:>8}".format
    print(row("rank", "growkit GFLOP", "best order", "layer by layer", "ratio", "promised"))
    for found in arithmetic:
        shown = (found["flops"], found["best_flops"], found["layer_by_layer_flops"])
        ratio = f"{found['ratio']:.3f}"
        print(row(found["rank"], *(f"{f / 1e9:.2f}" for f in shown), ratio, PROMISED["flops_ratio"]))
    # Memory first: on a GPU while nothing else lies there, on a CPU while this process is small.
    peaks = {rank: peak(source, target, rank, device, options) for rank in (0, *ranks)}
    steps = []
    row = "{:>4} {:>12} {:>12} {:>6} {:>8} {:>12} {:>12} {:>6} {:>8}".format
    print(row("rank", "operator ms", "plain ms", "ratio", "promised", "operator MB", "plain MB", "ratio", "promised"))
    for rank in ranks:
        found = {
            "rank": rank,
            **time_pairs(source, target, rank, device, options),
            "operator_peak_bytes": peaks[rank],
            "plain_peak_bytes": peaks[0],
            "memory_ratio": peaks[rank] / peaks[0],
        }
        steps.append(found)
        bound = device.type == "cuda" and rank == PROMISED["rank"]
        times = (1e3 * found["operator_seconds"], 1e3 * found["plain_seconds"])
        sizes = (peaks[rank] / 1e6, peaks[0] / 1e6)
        print(
            row(
                rank,
                *(f"{ms:.1f}" for ms in times),
                f"{found['time_ratio']:.2f}",
                PROMISED["time_ratio"] if bound else "-",
                *(f"{size:.0f}" for size in sizes),
                f"{found['memory_ratio']:.2f}",
                PROMISED["memory_ratio"] if bound else "-",
            )
        )
    if device.type == "cpu":
        print("time and memory are promised on a GPU only; memory here is that of a whole process, torch included")
    if options.out:
        content = {
            "command": shlex.join(sys.argv),
            "small": options.small,
            "big": options.big,
            "batch_size": options.batch_size,
            "precision": options.precision,
            "device": str(device),
            "rounds": options.rounds,
            "seed": options.seed,
            "promised": PROMISED,
            "arithmetic": arithmetic,
            "steps": steps,
            "versions": versions() | {"opt_einsum": opt_einsum.__version__},
            "hardware": hardware(),
        }
        options.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def asked(text: str) -> tuple[str, list[str]]:
    """'deit_tiny,depth=6' -> the name and its KEY=VALUE arguments."""
    name, *sets = text.split(",")
    return name, sets


def named(text: str) -> tuple[str, dict[str, Any]]:
    """As `asked`, with the arguments parsed."""
    name, sets = asked(text)
    return name, parse_sets(sets)


def count(source: Architecture, target: Architecture, rank: int) -> dict[str, Any]:
    """FLOPs of one contraction in the forward pass: as growkit does it, at best, and layer by layer."""
    operator = grown_model(source, target, rank)
    assert isinstance(operator.method, Mango)
    ring = operator.method.ring
    cores = tuple(tuple(ring.cores[axis].shape) for axis in ring.order)
    state = build(source.name, source.arguments, device="meta").state_dict()
    shape = tuple(pack(source.split(state)).shape)
    plan = contraction_plan(ring.equation, shape, cores, ring.order)
    _, best, _ = cheapest_path(ring.equation, shape, cores)
    position = ring.order.index("L")
    layers = cores[position][2]
    one_layer = list(cores)
    one_layer[position] = (*cores[position][:2], 1, cores[position][3])
    _, per_layer, _ = cheapest_path(ring.equation, shape, tuple(one_layer))
    return {
        "rank": rank,
        "flops": plan.flops,
        "best_flops": best,
        "layer_by_layer_flops": layers * per_layer,
        "ratio": plan.flops / best,
        "sliced_axis": plan.axis,
        "slice_width": plan.width,
        "slice_bytes": 4 * plan.largest_elements,
    }


def grown_model(source: Architecture, target: Architecture, rank: int) -> GrownModel:
    """The operator around timm's random weights, which decide nothing about cost."""
    state = build(source.name, source.arguments).state_dict()
    return grow(source, target, state, GrowSettings(rank=rank))


def step_of(
    source: Architecture,
    target: Architecture,
    rank: int,
    device: torch.device,
    options: argparse.Namespace,
) -> Callable[[], None]:
    """One training step, ready to call: of the operator at `rank`, or of the plain target at rank 0."""
    torch.manual_seed(options.seed)
    model: nn.Module = grown_model(source, target, rank) if rank else build(target.name, target.arguments)
    model = model.to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    image = build(target.name, target.arguments, device="meta").patch_embed
    shape = (options.batch_size, image.proj.in_channels, *image.img_size)
    images = torch.randn(shape, device=device)
    labels = torch.zeros(options.batch_size, dtype=torch.long, device=device)

    def step() -> None:
        with autocast(options.precision, device):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


def time_pairs(
    source: Architecture,
    target: Architecture,
    rank: int,
    device: torch.device,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Seconds of operator and plain steps in random order, and the median of their ratios by pair."""
    steps = {name: step_of(source, target, r, device, options) for name, r in (("operator", rank), ("plain", 0))}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(options.seed)
    warm_up = 2
    for _ in range(warm_up + options.rounds):
        for name in order.sample(list(steps), len(steps)):
            start = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - start)
    operator, plain = seconds["operator"][warm_up:], seconds["plain"][warm_up:]
    return {
        "operator_seconds": statistics.median(operator),
        "plain_seconds": statistics.median(plain),
        "time_ratio": statistics.median(o / p for o, p in zip(operator, plain, strict=True)),
        "seconds": {"operator": operator, "plain": plain},
    }


def peak(
    source: Architecture,
    target: Architecture,
    rank: int,
    device: torch.device,
    options: argparse.Namespace,
) -> int:
    """Peak bytes of two steps: allocated on the GPU, or resident in a process of its own on a CPU."""
    if device.type == "cuda":
        return peak_here(source, target, rank, device, options)
    given = {
        "--small": options.small,
        "--big": options.big,
        "--batch-size": options.batch_size,
        "--precision": options.precision,
        "--seed": options.seed,
        "--device": options.device,
        "--peak-of-rank": rank,
    }
    words = [str(word) for pair in given.items() for word in pair]
    done = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True)
    return int(done.stdout)


def peak_here(
    source: Architecture,
    target: Architecture,
    rank: int,
    device: torch.device,
    options: argparse.Namespace,
) -> int:
    """Peak bytes of two steps in this process."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    step = step_of(source, target, rank, device, options)
    for _ in range(2):  # the second has the optimizer's state
        step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else 1024 * resident


if __name__ == "__main__":
    main()
