"""What training an operator costs on several processes: each growing all of the weights, or sharing the work.

    torchrun --nproc-per-node 2 examples/benchmarks/several_processes.py --out several_processes.json
    torchrun --nproc-per-node 8 examples/benchmarks/several_processes.py --small deit_small --big deit_base

Three updates take turns in random order, on all processes together: of the plain target, of the operator with every
process computing the whole ring, and of the operator with the ring shared. An update's time is that of the slowest
process. On CPUs give each process one thread: OMP_NUM_THREADS=1. --small and --big take a timm name and, after commas,
arguments of its constructor.
"""

import argparse
import json
import random
import shlex
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from operator_cost import grown_model, parsed, parser_of, seconds_of, update_of
from torch import nn

from growkit.arch import build
from growkit.arch.spec import Architecture
from growkit.record import hardware, versions
from growkit.train import distributed, made_weights
from growkit.train.flops import count_making


def main() -> None:
    """Time, print a table, write JSON."""
    parser = parser_of(__doc__, "1,4")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="each process has one of its own"
    )
    parser.add_argument("--tf32", action="store_true", help="as training's --tf32: the ring's factors in float16")
    parser.set_defaults(grad_accum_steps=1)
    options, device, source, target = parsed(parser)
    if distributed.local_rank() is None:
        parser.error("start it with torchrun --nproc-per-node N, one process for each GPU or core")
    with distributed.joined(device):
        if distributed.leads():
            print(f"{options.small} -> {options.big}, {distributed.size()} processes on {device.type}, each with")
            print(f"{options.batch_size} images, {options.precision}{', TF32' if options.tf32 else ''}")
            print(f"{'rank':>4} {'update':>18} {'ms':>9} {'of plain':>9} {'GFLOP of the ring, each':>24}")
        found = [entry for rank in options.ranks for entry in compare(source, target, rank, device, options)]
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


def compare(
    source: Architecture, target: Architecture, rank: int, device: torch.device, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Time the three updates in turns; every process makes the same calls."""
    torch.manual_seed(options.seed)
    operator = grown_model(source, target, rank).to(device).train()
    network = build(target.name, target.arguments).to(device).train()

    def updating(model: nn.Module) -> Callable[[], None]:
        return update_of(model, distributed.together(model, device), target, options, tf32=options.tf32)

    updates = {"plain": updating(network), "every process all": updating(operator)}
    updates["shared"] = updates["every process all"]  # the same operator; sharing is set around each update
    sharing = {"plain": 1, "every process all": 1, "shared": distributed.size()}
    flops = {"plain": 0}
    for way in ("every process all", "shared"):
        with made_weights.shared(operator, sharing[way]):
            flops[way] = count_making(operator)
    seconds: dict[str, list[float]] = {way: [] for way in updates}
    order = random.Random(options.seed)
    warm_up = 2
    for _ in range(warm_up + options.rounds):
        for way in order.sample(list(updates), len(updates)):
            dist.barrier()
            with made_weights.shared(operator, sharing[way]):
                taken = torch.tensor(seconds_of(updates[way], device, options.updates))
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


if __name__ == "__main__":
    main()
