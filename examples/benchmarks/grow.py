"""How much time and memory `growkit grow` takes, on a checkpoint as DeiT publishes it.

    python examples/benchmarks/grow.py --out grow.json
    python examples/benchmarks/grow.py --small vit_base_patch16_224 --big vit_large_patch16_224

Every parameter is random: biases, norms, tokens and head too. Code that imports torch runs in another
process, so that the peak memory that the system reports for growkit's process is not this one's.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from growkit.record import hardware, versions

BASE = {"seconds": 15.0, "peak_bytes": 2.5 * 2**30, "logits_gap": 1e-5}  # deit_small -> deit_base
LARGE = BASE | {"seconds": 90.0, "peak_bytes": 6.0 * 2**30}  # vit_base -> vit_large


def main() -> None:
    """Grow, measure, check what was written, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", default="deit_small_patch16_224", help="source, a timm name")
    parser.add_argument("--big", default="deit_base_patch16_224", help="target, a timm name")
    parser.add_argument("--small-set", action="append", default=[], metavar="KEY=VALUE", help="of the source")
    parser.add_argument("--big-set", action="append", default=[], metavar="KEY=VALUE", help="of the target")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file with hardware and versions")
    options = parser.parse_args()
    bounds = LARGE if "large" in options.big else BASE
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
        checkpoint = Path(folder) / "source.pth"
        apart.submit(write_checkpoint, checkpoint, options.small, options.small_set, options.seed).result()
        runs = [measure(checkpoint, Path(folder) / f"run{n}", options) for n in range(options.runs)]
        gap = apart.submit(gap_of_timm, checkpoint, options.small, options.small_set, runs[0]["folder"])
        loaded_gap = gap.result()
    seconds, peak = max(r["seconds"] for r in runs), max(r["peak_bytes"] for r in runs)
    cpu = max(r["cpu_seconds"] for r in runs)
    print(f"worst of {len(runs)} runs; load before {load:.1f}; promised on two idle cores")
    pair = f"{options.small} -> {options.big}"
    row = f"{{:{len(pair)}}} {{:>4}} {{:>8}} {{:>8}} {{:>8}} {{:>8}} {{:>8}}".format
    print(row("", "rank", "seconds", "promised", "of CPU", "peak GiB", "promised"))
    sizes = (peak / 2**30, bounds["peak_bytes"] / 2**30)
    times = (f"{seconds:.1f}", f"{bounds['seconds']:.0f}", f"{cpu:.1f}")
    print(row(pair, options.rank, *times, *(f"{size:.2f}" for size in sizes)))
    print(f"step-0 gap, as grow says: {runs[0]['step0_gap']:.1e}")
    verdict = "within" if loaded_gap <= bounds["logits_gap"] else "NOT within"
    print(f"timm alone loads it: logits {loaded_gap:.1e} from the source's, {verdict} {bounds['logits_gap']}")
    if options.out:
        content = {
            "command": shlex.join(sys.argv),
            "small": [options.small, *options.small_set],
            "big": [options.big, *options.big_set],
            "rank": options.rank,
            "seed": options.seed,
            "load_before": load,
            "promised": bounds,
            "runs": [{key: value for key, value in run.items() if key != "folder"} for run in runs],
            "timm_logits_gap": loaded_gap,
            "versions": versions(),
            "hardware": hardware(),
        }
        options.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def measure(checkpoint: Path, run: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Wall seconds and peak resident bytes of one `growkit grow`, and the results it prints."""
    words = ["grow", str(checkpoint), "--from", options.small, "--to", options.big]
    words += ["--rank", str(options.rank), "--seed", str(options.seed), "--run", str(run), "--json"]
    for setting in options.big_set:
        words += ["--set", setting]
    for setting in options.small_set:
        words += ["--from-set", setting]
    start = time.perf_counter()
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as complained:
        command = [sys.executable, "-m", "growkit_cli", *words]
        process = subprocess.Popen(command, stdout=said, stderr=complained)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        complained.seek(0)
        if process.returncode:
            sys.exit(complained.read().decode())
        result = json.loads(said.read())
    return {
        "seconds": seconds,
        "user_seconds": usage.ru_utime,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "step0_gap": result["step0_gap"],
        "folder": result["folder"],
    }


def write_checkpoint(path: Path, name: str, sets: list[str], seed: int) -> None:
    """Write {"model": state dict} of a network with random weights at the scale of trained ones."""
    import torch

    from growkit.arch import build, full_name, parse_sets

    model = build(full_name(name), parse_sets(sets))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            matrix = parameter.ndim > 1 and "embed" not in key and "token" not in key
            gain = "norm" in key and key.endswith("weight")
            parameter.copy_((1 if gain else 0) + (0.02 if matrix else 0.3) * noise)
    torch.save({"model": model.state_dict()}, path)


def gap_of_timm(checkpoint: Path, name: str, sets: list[str], folder: str) -> float:
    """Largest logit difference between the source and what timm, without growkit, loads from the folder."""
    import timm
    import torch

    from growkit.arch import build, full_name, parse_sets

    source = build(full_name(name), parse_sets(sets))
    source.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    grown = timm.create_model(f"local-dir:{folder}", pretrained=True)
    images = torch.randn(4, source.in_chans, *source.patch_embed.img_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float((source.eval()(images) - grown.eval()(images)).abs().max())


if __name__ == "__main__":
    main()
