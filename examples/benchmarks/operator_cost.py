"""What Mango's operator costs, compared with a plain training step of the target and with other ways to apply it.

    python examples/benchmarks/operator_cost.py --ranks 1,2,4,8 --out operator_cost.json
    python examples/benchmarks/operator_cost.py --small deit_small --big deit_base --batch-size 256 --count-only

Counted: the arithmetic of the contraction and peak memory, which need no device (growkit.train.memory). Measured:
the ring forward and backward against one torch.einsum over the five tensors, tensorly's factorised product and LiGO's
operator, then steps of operator and plain target; contestants take turns in random order in one process. tensorly
has no ring, so it is compared with a ring with one open bond, if it is installed: pip install tensorly tensorly-torch.
--small and --big take a timm name and, after commas, arguments of its constructor:
deit_tiny,embed_dim=64,depth=6,num_heads=1. (A script named operator.py would hide the standard library's module from
its neighbours.)
"""

import argparse
import copy
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
from types import SimpleNamespace
from typing import Any

import opt_einsum
import torch
from torch import Tensor, nn

from growkit.arch import build, find, find_target, parse_sets
from growkit.arch.spec import LAYERS, Architecture
from growkit.core.contract import cheapest_orders
from growkit.core.ring import AXES, RingOperator
from growkit.core.ring_plan import contraction_plan
from growkit.errors import GrowkitError
from growkit.float32 import multiplying
from growkit.grow import GrownModel, grow, make_method
from growkit.methods.mango import Mango, mlp_blocks, pack
from growkit.record import hardware, versions
from growkit.settings import GrowSettings
from growkit.train.device import pick_device
from growkit.train.made_weights import made_once
from growkit.train.memory import Alive, keep_what_fits, step_peak
from growkit.train.precision import autocast

try:
    import tensorly
    from tltorch.functional.factorized_linear import linear_blocktt
except ImportError:
    tensorly = None

PROMISED = {
    "rank": 4,
    "batch_size": 256,
    "time_ratio": 1.15,
    "memory_ratio": 1.25,
    "memory_ratio_rank_10": 1.5,
    "flops_ratio": 1.05,
}
OWN = ("growkit", "growkit, kept")  # the ring, and with room for all intermediates, as einsum keeps them
TF32 = ", TF32"  # the same with TF32 allowed: float16 factors, with as many mantissa bits
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {
        "small": "deit_small",
        "big": "deit_base",
        "batch_size": 256,
        "rounds": 8,
        "updates": 5,
        "precision": "bf16",
    },
    "cpu": {
        "small": "deit_tiny,embed_dim=64,depth=6,num_heads=1",
        "big": "deit_tiny,embed_dim=128,depth=6,num_heads=2",
        "batch_size": 16,
        "rounds": 5,
        "updates": 1,
        "precision": "fp32",
    },
}


def main() -> None:
    """Count, measure, print a table, write JSON."""
    parser = parser_of(__doc__, "1,2,4,8")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--grad-accum-steps", type=whole, default=1, help="batches per step; the ring runs once for all"
    )
    parser.add_argument("--count-only", action="store_true", help="arithmetic and counted memory; nothing is timed")
    parser.add_argument("--peak-of-rank", type=int, help=argparse.SUPPRESS)  # 0 is the plain step
    options, device, source, target = parsed(parser)
    if options.peak_of_rank is not None:
        print(peak_here(source, target, options.peak_of_rank, device, options))
        return

    ranks = options.ranks
    several = f" x {options.grad_accum_steps}" if options.grad_accum_steps > 1 else ""
    print(f"{options.small} -> {options.big}, batch {options.batch_size}{several}, {options.precision}, {device}")
    arithmetic = [count(source, target, rank) for rank in ranks]
    row = "{:>4} {:>14} {:>14} {:>14} {:>8} {:>8}".format
    print(row("rank", "growkit GFLOP", "best order", "layer by layer", "ratio", "promised"))
    for found in arithmetic:
        shown = (found["flops"], found["best_flops"], found["layer_by_layer_flops"])
        ratio = f"{found['ratio']:.3f}"
        print(row(found["rank"], *(f"{f / 1e9:.2f}" for f in shown), ratio, PROMISED["flops_ratio"]))
    if not tensorly:
        print("tensorly is left out: pip install tensorly tensorly-torch")
    counted = count_steps(source, target, ranks, options)
    contests = [found for rank in ranks for found in contest(source, target, rank, device, options)]
    steps = [] if options.count_only else compare_steps(source, target, ranks, device, options)
    if options.out:
        content = {
            "command": shlex.join(sys.argv),
            "small": options.small,
            "big": options.big,
            "batch_size": options.batch_size,
            "grad_accum_steps": options.grad_accum_steps,
            "precision": options.precision,
            "device": str(device),
            "rounds": options.rounds,
            "updates": options.updates,
            "seed": options.seed,
            "promised": PROMISED,
            "arithmetic": arithmetic,
            "counted_memory": counted,
            "contests": contests,
            "steps": steps,
            "versions": versions()
            | {"opt_einsum": opt_einsum.__version__, "tensorly": tensorly and tensorly.__version__},
            "hardware": hardware(),
        }
        options.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def whole(text: str) -> int:
    """A whole number of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return int(text)


def ranks_of(text: str) -> list[int]:
    """Whole numbers of at least 1, separated by commas."""
    return [whole(part) for part in text.split(",")]


def parser_of(description: str | None, ranks: str) -> argparse.ArgumentParser:
    """A parser with the options that this script and several_processes.py share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", help="source; deit_small on a GPU, a tiny one on a CPU")
    parser.add_argument("--big", help="target; deit_base on a GPU, a tiny one on a CPU")
    parser.add_argument("--ranks", type=ranks_of, default=ranks, help="rank of every bond, several with commas")
    parser.add_argument("--batch-size", type=whole, help="images of each process; 256 on a GPU, 16 on a CPU")
    parser.add_argument("--rounds", type=whole, help="turns of each kind per rank")
    parser.add_argument("--updates", type=whole, help="per turn, between waits for the device; 5 on a GPU, 1 on a CPU")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file with hardware and versions")
    return parser


def parsed(
    parser: argparse.ArgumentParser,
) -> tuple[argparse.Namespace, torch.device, Architecture, Architecture]:
    """The options, completed by the device's defaults, the device, source and target; exits with a line on an error."""
    options = parser.parse_args()
    if options.out and not options.out.absolute().parent.is_dir():
        parser.error(f"--out {options.out}: no such folder; make it first")
    try:
        device = pick_device(options.device)
        for name, value in DEFAULTS[device.type].items():
            if getattr(options, name) is None:
                setattr(options, name, value)
        source = find(*named(options.small))
        target, _ = find_target(source, *asked(options.big))
        for rank in options.ranks:
            make_method(source, target, GrowSettings(rank=rank))
    except GrowkitError as error:
        parser.error(str(error))
    return options, device, source, target


def compare_steps(
    source: Architecture, target: Architecture, ranks: list[int], device: torch.device, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Measure and print time and memory of operator steps beside plain ones."""
    # Memory first: on a GPU while nothing else is allocated there, on a CPU while this process is small.
    peaks = {rank: peak(source, target, rank, device, options) for rank in (0, *ranks)}
    tf32_peaks = {}
    if device.type == "cuda":
        tf32_peaks = {rank: peak_here(source, target, rank, device, options, tf32=True) for rank in ranks}
    steps = []
    row = "{:>4} {:>12} {:>12} {:>6} {:>10} {:>8} {:>12} {:>12} {:>6} {:>8} {:>10}".format
    sides = ("operator MB", "plain MB", "ratio", "promised")
    print(row("rank", "operator ms", "plain ms", "ratio", "with TF32", "promised", *sides, "with TF32"))
    for rank in ranks:
        found = {
            "rank": rank,
            **time_steps(source, target, rank, device, options),
            "operator_peak_bytes": peaks[rank],
            "plain_peak_bytes": peaks[0],
            "memory_ratio": peaks[rank] / peaks[0],
        }
        if rank in tf32_peaks:
            found["tf32_memory_ratio"] = tf32_peaks[rank] / peaks[0]
        steps.append(found)
        bound = device.type == "cuda" and rank == PROMISED["rank"] and options.grad_accum_steps == 1
        times = (1e3 * found["operator_seconds"], 1e3 * found["plain_seconds"])
        sizes = (peaks[rank] / 1e6, peaks[0] / 1e6)
        print(
            row(
                rank,
                *(f"{ms:.1f}" for ms in times),
                f"{found['time_ratio']:.2f}",
                f"{found['tf32_time_ratio']:.2f}" if "tf32_time_ratio" in found else "-",
                PROMISED["time_ratio"] if bound else "-",
                *(f"{size:.0f}" for size in sizes),
                f"{found['memory_ratio']:.2f}",
                PROMISED["memory_ratio"] if bound else "-",
                f"{found['tf32_memory_ratio']:.2f}" if "tf32_memory_ratio" in found else "-",
            )
        )
    if device.type == "cpu":
        print("time and memory are promised on a GPU only; memory here is that of a whole process, torch included")
    return steps


def count_steps(
    source: Architecture, target: Architecture, ranks: list[int], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Count and print peak bytes of an operator's step and of a plain one."""
    image = build(target.name, target.arguments, device="meta")
    batch = (options.batch_size, image.patch_embed.proj.in_channels, *image.patch_embed.img_size)
    plain = step_peak(image.train(), batch, options.precision, options.grad_accum_steps)
    found = []
    row = "{:>4} {:>12} {:>12} {:>6} {:>8}".format
    print(row("rank", "operator MB", "plain MB", "ratio", "promised"), "(counted, a whole step)")
    for rank in ranks:
        operator = grown_model(source, target, rank).train()
        peak = step_peak(operator, batch, options.precision, options.grad_accum_steps)
        found.append({"rank": rank, "operator_peak_bytes": peak, "plain_peak_bytes": plain, "ratio": peak / plain})
        promised = PROMISED["memory_ratio"] if rank <= PROMISED["rank"] else PROMISED["memory_ratio_rank_10"]
        print(row(rank, f"{peak / 1e6:.0f}", f"{plain / 1e6:.0f}", f"{peak / plain:.2f}", promised))
    return found


def contestants(
    source: Architecture, target: Architecture, rank: int, device: torch.device, seed: int
) -> dict[str, tuple[str, nn.Module, Callable[[], list[Tensor]]]]:
    """By name: the baseline, the module that holds the parameters, and the product with the source's weights."""
    generator = torch.Generator().manual_seed(seed)
    state = build(source.name, source.arguments).state_dict()
    weights = {slot: tensor.to(device) for slot, tensor in source.split(state).items()}
    x = pack(weights)
    old, new = mango_sizes(source), mango_sizes(target)

    def random_ring(ranks: tuple[int, ...]) -> tuple[RingOperator, list[Tensor]]:
        ring = RingOperator(old, new, ranks)
        with torch.no_grad():
            for core in ring.cores.values():
                core.normal_(0, (core.shape[0] * core.shape[1]) ** -0.5, generator=generator)
        ring = ring.to(device)
        return ring, [ring.cores[axis] for axis in ring.order]

    ring, cores = random_ring((rank,) * 4)
    keeping = copy.deepcopy(ring)
    keeping.room = sys.maxsize
    ligo = grow(source, target, state, GrowSettings(method="ligo")).method.to(device)
    found: dict[str, tuple[str, nn.Module, Callable[[], list[Tensor]]]] = {
        "growkit": ("growkit", ring, lambda: [ring(x)]),
        "growkit, kept": ("growkit", keeping, lambda: [keeping(x)]),
        "one torch.einsum": ("growkit", ring, lambda: [torch.einsum(ring.equation, x, *cores)]),
        "LiGO's operator": ("growkit", ligo, lambda: list(ligo(weights).values())),
    }
    if tensorly:
        train, links = random_ring((1, rank, rank, rank))
        shape = tuple(new[axis] for axis in AXES)

        def blocktt() -> list[Tensor]:
            factors = [core.transpose(1, 2) for core in links]
            matrix = SimpleNamespace(factors=factors, tensorized_shape=(shape, tuple(x.shape)))
            return [linear_blocktt(x.reshape(1, -1), matrix).reshape(shape)]

        found["growkit, open"] = ("growkit, open", train, lambda: [train(x)])
        found["tensorly"] = ("growkit, open", train, blocktt)
    return found


def mango_sizes(architecture: Architecture) -> dict[str, int]:
    """Sizes of the ring's axes."""
    width = architecture.spaces["embed"].size
    return {"B": 4 + 2 * mlp_blocks(architecture), "O": width, "L": architecture.spaces[LAYERS].size, "I": width}


def contest(
    source: Architecture, target: Architecture, rank: int, device: torch.device, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Each contestant's counted peak memory, and seconds forward and with backward, as ratios to its baseline's."""

    def backward(made: list[Tensor]) -> None:
        learning = [tensor for tensor in made if tensor.requires_grad]  # the head's bias does not grow
        torch.autograd.backward(learning, [torch.ones_like(tensor) for tensor in learning])

    def ready_on(place: torch.device) -> dict[str, tuple[str, nn.Module, Callable[[], list[Tensor]]]]:
        made = contestants(source, target, rank, place, options.seed)
        return made | {f"{name}{TF32}": made[name] for name in OWN} if device.type == "cuda" else made

    found: dict[str, dict[str, Any]] = {}
    for name, (rival, _, apply) in ready_on(torch.device("meta")).items():
        found[name] = {"rank": rank, "name": name, "against": rival}
        if not name.endswith(TF32):  # there are no float16 factors without a GPU to be counted
            with Alive() as alive:
                backward(apply())
            found[name]["peak_bytes"] = alive.peak
    if not options.count_only:
        ready = ready_on(device)
        for name, (rival, _, apply) in ready.items():
            if not name.startswith("LiGO"):  # LiGO computes another function
                (there,) = ready[rival][2]()
                with multiplying(name.endswith(TF32)):
                    (here,) = apply()
                with torch.no_grad():
                    found[name]["relative_gap"] = gap = float((here - there).norm() / there.norm())
                del here, there
                assert gap < (1e-2 if name.endswith(TF32) else 1e-5), f"{name} is {gap:.1e} away from growkit"
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ready}
        order = random.Random(options.seed)
        for _ in range(1 + options.rounds):  # the first is a warm-up
            for name in order.sample(list(ready), len(ready)):
                _, module, apply = ready[name]
                module.zero_grad()
                with multiplying(name.endswith(TF32)):
                    start = now(device)
                    made = apply()
                    between = now(device)
                    backward(made)
                    seconds[name].append((between - start, now(device) - start))
                del made
        for name, taken in seconds.items():
            found[name]["seconds"] = [list(pair) for pair in taken[1:]]
    row = "{:>4} {:>18} {:>10} {:>7} {:>12} {:>7} {:>12} {:>7}".format
    print(row("rank", "product by", "forward ms", "ratio", "+backward ms", "ratio", "peak MB", "ratio"))
    for name, entry in found.items():
        base = found[entry["against"]]
        shown = []
        for n, kind in enumerate(("forward", "both") if "seconds" in entry else ()):
            pairs = zip(entry["seconds"], base["seconds"], strict=True)
            entry[f"{kind}_ratio"] = statistics.median(here[n] / there[n] for here, there in pairs)
            median = statistics.median(pair[n] for pair in entry["seconds"])
            shown += [f"{1e3 * median:.1f}", f"{entry[f'{kind}_ratio']:.2f}"]
        shown = shown or ["-"] * 4
        if "peak_bytes" in entry:
            entry["peak_ratio"] = entry["peak_bytes"] / base["peak_bytes"]
            shown += [f"{entry['peak_bytes'] / 1e6:.0f}", f"{entry['peak_ratio']:.2f}"]
        else:
            shown += ["-"] * 2
        print(row(rank, name, *shown))
    return list(found.values())


def now(device: torch.device) -> float:
    """The time in seconds, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def asked(text: str) -> tuple[str, list[str]]:
    """'deit_tiny,depth=6' -> the name and its KEY=VALUE arguments."""
    name, *sets = text.split(",")
    return name, sets


def named(text: str) -> tuple[str, dict[str, Any]]:
    """As `asked`, with the arguments parsed."""
    name, sets = asked(text)
    return name, parse_sets(sets)


def count(source: Architecture, target: Architecture, rank: int) -> dict[str, Any]:
    """FLOPs of one contraction in the forward pass: growkit's, the best order's, and layer by layer."""
    operator = grown_model(source, target, rank)
    assert isinstance(operator.method, Mango)
    ring = operator.method.ring
    cores = tuple(tuple(ring.cores[axis].shape) for axis in ring.order)
    state = build(source.name, source.arguments, device="meta").state_dict()
    shape = tuple(pack(source.split(state)).shape)
    plan = contraction_plan(ring.equation, shape, cores, ring.order)
    best = cheapest_orders(ring.equation, shape, cores)[0].flops
    position = ring.order.index("L")
    layers = cores[position][2]
    one_layer = list(cores)
    one_layer[position] = (*cores[position][:2], 1, cores[position][3])
    per_layer = cheapest_orders(ring.equation, shape, tuple(one_layer))[0].flops
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
    """The operator around timm's random weights, which do not affect its cost."""
    state = build(source.name, source.arguments).state_dict()
    return grow(source, target, state, GrowSettings(rank=rank))


def step_of(
    source: Architecture,
    target: Architecture,
    rank: int,
    device: torch.device,
    options: argparse.Namespace,
    *,
    tf32: bool = False,
) -> Callable[[], None]:
    """One training step, ready to call: of the operator at `rank`, or of the plain target at rank 0."""
    torch.manual_seed(options.seed)
    model: nn.Module = grown_model(source, target, rank) if rank else build(target.name, target.arguments)
    model = model.to(device).train()
    return update_of(model, model, target, options, tf32=tf32)


def update_of(
    model: nn.Module, network: nn.Module, target: Architecture, options: argparse.Namespace, *, tf32: bool
) -> Callable[[], None]:
    """One update of `model` on random images, ready to call; `network` is run in its place."""
    device = next(model.parameters()).device
    fused = {"fused": True} if device.type == "cuda" else {}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, **fused)
    image = build(target.name, target.arguments, device="meta").patch_embed
    images = torch.randn((options.batch_size, image.proj.in_channels, *image.img_size), device=device)
    keep_what_fits(model, images.shape, options.precision)
    labels = torch.zeros(options.batch_size, dtype=torch.long, device=device)

    def update() -> None:
        with multiplying(tf32):
            with made_once(model, options.grad_accum_steps):
                for _ in range(options.grad_accum_steps):
                    with autocast(options.precision, device):
                        loss = nn.functional.cross_entropy(network(images), labels)
                    loss.backward()
                    del loss  # frees the graph, and with it the weights
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def seconds_of(update: Callable[[], None], device: torch.device, times: int) -> float:
    """Seconds of an update, over `times` in a row without waiting for any, as in training.

    On a GPU one more update runs first and keeps it busy while the first timed one is launched.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(times):
            update()
        return (time.perf_counter() - start) / times
    begun, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):  # an event belongs to its stream's device
        update()
        begun.record()
        for _ in range(times):
            update()
        done.record()
    done.synchronize()
    return begun.elapsed_time(done) / 1e3 / times


def time_steps(
    source: Architecture,
    target: Architecture,
    rank: int,
    device: torch.device,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Seconds of operator and plain steps, in turns in random order, and the median of their per-round ratios."""
    kinds = {"operator": (rank, False), "plain": (0, False)}
    if device.type == "cuda":
        kinds["operator, TF32"] = (rank, True)
    steps = {name: step_of(source, target, r, device, options, tf32=tf32) for name, (r, tf32) in kinds.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(options.seed)
    warm_up = 2
    for _ in range(warm_up + options.rounds):
        for name in order.sample(list(steps), len(steps)):
            seconds[name].append(seconds_of(steps[name], device, options.updates))
    seconds = {name: taken[warm_up:] for name, taken in seconds.items()}

    def ratio(name: str) -> float:
        return statistics.median(here / plain for here, plain in zip(seconds[name], seconds["plain"], strict=True))

    found: dict[str, Any] = {
        "operator_seconds": statistics.median(seconds["operator"]),
        "plain_seconds": statistics.median(seconds["plain"]),
        "time_ratio": ratio("operator"),
        "seconds": seconds,
    }
    if "operator, TF32" in seconds:
        found["tf32_time_ratio"] = ratio("operator, TF32")
    return found


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
        "--grad-accum-steps": options.grad_accum_steps,
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
    *,
    tf32: bool = False,
) -> int:
    """Peak bytes of two steps in this process."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    step = step_of(source, target, rank, device, options, tf32=tf32)
    for _ in range(2):  # the second has the optimizer's state
        step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage starts from the peak of the process that started this one
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else 1024 * resident


if __name__ == "__main__":
    main()
