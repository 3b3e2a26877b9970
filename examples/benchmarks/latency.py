"""Latency of growkit's ONNX export against itself, timm's stock export, and PyTorch.

    python examples/benchmarks/latency.py --model deit_small_patch16_224 --out latency.json

Random weights: they decide nothing about speed. Threads are torch's (OMP_NUM_THREADS).
"""

import argparse
import json
import shlex
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import timm
import torch

from growkit.deploy.checks import plain
from growkit.deploy.export import export_onnx
from growkit.deploy.latency import measure_latency
from growkit.deploy.runtime import environment, open_session


def main() -> None:
    """Export, measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_small_patch16_224", help="timm name")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=30.0, help="longest time per comparison")
    parser.add_argument("--provider", default="cpu", help="cpu, cuda or auto")
    parser.add_argument("--out", type=Path, help="JSON file with hardware and versions")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = timm.create_model(arguments.model).eval()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        export_onnx(model, file)
        facts = environment(open_session(file, provider=arguments.provider))
        latency = measure_latency(
            model,
            file,
            stock=(arguments.model, {}),
            provider=arguments.provider,
            batches=tuple(arguments.batches),
            seconds=arguments.seconds,
            progress=lambda done, note: print(f"{done} done, {note}", file=sys.stderr),
        )
    print(f"{arguments.model}, {facts['hardware']}, {latency.threads} threads, {latency.provider}")
    row = "{:14} {:>5} {:>6} {:>16} {:>5} {:>8} {:>8} {:>8}".format
    print(row("file against", "batch", "ratio", "95 % interval", "pairs", "p50 ms", "p99", "its p50"))
    for c in latency.comparisons:
        times = (c.subject_ms.p50, c.subject_ms.p99, c.baseline_ms.p50)
        interval = f"{c.low:.3f} to {c.high:.3f}"
        shown = (f"{time:.2f}" for time in times)
        print(row(c.baseline, c.batch, f"{c.ratio:.3f}", interval, c.pairs, *shown))
    for made in latency.checks:
        print(f"{made.verdict}: {made.line}")
    if arguments.out:
        content = {
            "command": shlex.join(sys.argv),
            "environment": facts,
            "latency": asdict(latency),
        }
        arguments.out.write_text(json.dumps(plain(content), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
