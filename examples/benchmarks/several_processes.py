"""What training an operator costs on several processes: each growing all of the weights, or a part of them for all.

    torchrun --nproc-per-node 2 examples/benchmarks/several_processes.py --out several_processes.json
    torchrun --nproc-per-node 8 examples/benchmarks/several_processes.py --small deit_small --big deit_base

Three updates take turns in random order, all processes together: of the plain target, of the operator with the ring
computed whole by every process, and of the operator with the ring shared. An update's time is that of the slowest
process. On CPUs give each process one thread: OMP_NUM_THREADS=1. --small and --big take a timm name and, after commas,
arguments of its constructor.
"""

import argparse
import json
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from operator_cost import DEFAULTS, asked, grown_model, named
from torch import Tensor, nn

from growkit.arch import build, find, find_target
from growkit.arch.spec import Architecture
from growkit.errors import GrowkitError
from growkit.pipeline import pick_device
from growkit.record import hardware, versions
from growkit.train import distributed, making
from growkit.train.flops import count_making
from growkit.train.score import autocast, multiplying


def main() -> None:
    """Time, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", help="source; deit_small on GPUs, a tiny one on CPUs")
    parser.add_argument("--big", help="target; deit_base on GPUs, a tiny one on CPUs")
    parser.add_argument("--ranks", default="1,4", help="rank of every bond, several with commas")
    parser.add_argument("--batch-size", type=int, help="images of each process; 256 on GPUs, 16 on CPUs")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--rounds", type=int, help="updates of each kind per rank")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="bf16 on GPUs, fp32 on CPUs")
    parser.add_argument("--tf32", action="store_true", help="the ring's products in TF32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file with hardware and versions")
    options = parser.parse_args()
    if distributed.local_rank() is None:
        raise GrowkitError("start it with torchrun --nproc-per-node N, one process or more for each GPU or core")
    device = pick_device(options.device)
    for name, value in DEFAULTS[device.type].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    source = find(*named(options.small))
    target, _ = find_target(source, *asked(options.big))
    with distributed.joined(device):
        if distributed.leads():
            print(f"{options.small} -> {options.big}, {distributed.size()} processes on {device.type}, each with")
            print(f"{options.batch_size} images, {options.precision}{', TF32' if options.tf32 else ''}")
            print(f"{'rank':>4} {'update':>18} {'ms':>9} {'of plain':>9} {'GFLOP of the ring, each':>24}")
        found = [
            entry for rank in map(int, options.ranks.split(",")) for entry in compare(source, target, rank, options)
        ]
        if options.out and distributed.leads():
            content = {
                "command": shlex.join(sys.argv),
                "processes": distributed.size(),
                "threads": torch.get_num_threads(),
                "options": {**vars(options), "out": None},
                "updates": found,
                "versions": versions(),
                "hardware": hardware(),
            }
            options.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def compare(source: Architecture, target: Architecture, rank: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the three updates in turns; the same in every process."""
    device = pick_device(options.device)
    operator = grown_model(source, target, rank).to(device)
    network = build(target.name, target.arguments).to(device)
    updates = {
        "plain": update_of(network, target, device, options),
        "every process all": update_of(operator, target, device, options),
    }
    updates["shared"] = updates["every process all"]  # the same operator; what differs is set before each update
    sharing = {"plain": 1, "every process all": 1, "shared": distributed.size()}
    flops = {"plain": 0}
    for way in ("every process all", "shared"):
        with making.shared(operator, sharing[way]):
            flops[way] = count_making(operator)
    seconds: dict[str, list[float]] = {way: [] for way in updates}
    order = random.Random(options.seed)
    warm_up = 2
    for _ in range(warm_up + options.rounds):
        for way in order.sample(list(updates), len(updates)):
            dist.barrier()
            start = time.perf_counter()
            with making.shared(operator, sharing[way]):
                updates[way]()
            taken = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            seconds[way].append(float(taken))
    found = []
    for way, taken in seconds.items():
        pairs = zip(taken[warm_up:], seconds["plain"][warm_up:], strict=True)
        entry = {
            "rank": rank,
            "update": way,
            "seconds": taken[warm_up:],
            "ratio": statistics.median(here / plain for here, plain in pairs),
            "ring_flops_of_each_process": flops[way],
        }
        found.append(entry)
        if distributed.leads():
            median = 1e3 * statistics.median(taken[warm_up:])
            print(f"{rank:>4} {way:>18} {median:>9.1f} {entry['ratio']:>9.2f} {flops[way] / 1e9:>24.2f}")
    return found


def update_of(
    model: nn.Module, target: Architecture, device: torch.device, options: argparse.Namespace
) -> Callable[[], None]:
    """One update of `model` by all processes, ready to call; each has images of its own."""
    network = distributed.together(model.train(), device)
    fused = {"fused": True} if device.type == "cuda" else {}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, **fused)
    image = build(target.name, target.arguments, device="meta").patch_embed
    generator = torch.Generator().manual_seed(options.seed + distributed.rank())
    shape = (options.batch_size, image.proj.in_channels, *image.img_size)
    images: Tensor = torch.randn(shape, generator=generator).to(device)
    labels = torch.zeros(options.batch_size, dtype=torch.long, device=device)

    def update() -> None:
        with multiplying(options.tf32):
            with autocast(options.precision, device):
                loss = nn.functional.cross_entropy(network(images), labels)
            loss.backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return update


if __name__ == "__main__":
    try:
        main()
    except GrowkitError as error:
        sys.exit(f"error: {error}")
