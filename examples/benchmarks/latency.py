"""Speed of growkit's ONNX export: latency against itself, timm's stock export and PyTorch, and throughput.

    python examples/benchmarks/latency.py --model deit_small_patch16_224 --compiled --out latency.json

Weights are random: they do not affect speed. Threads are torch's (OMP_NUM_THREADS). The throughput is
one-sided, with spinning threads, and given as a share of the float32 matmul peak measured beside it.
"""

import argparse
import shlex
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import timm
import torch

from growkit.deploy.export import export_onnx
from growkit.deploy.latency import measure_latency
from growkit.deploy.runtime import assignment, environment, open_session
from growkit.deploy.settings import VerifySettings
from growkit.deploy.throughput import batches_up_to, measure_throughput
from growkit.files import as_json


def main() -> None:
    """Export, measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_small_patch16_224", help="timm name")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=30.0, help="longest time per comparison")
    parser.add_argument("--compiled", action="store_true", help="also compare with compiled PyTorch")
    parser.add_argument("--throughput-seconds", type=float, default=3.0, help="time per batch size")
    parser.add_argument("--provider", default="cpu", help="cpu, cuda, tensorrt or auto")
    parser.add_argument("--out", type=Path, help="JSON file with hardware and versions")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = timm.create_model(arguments.model).eval()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        export_onnx(model, file)
        session = open_session(file, provider=arguments.provider)
        facts, placed = environment(session), assignment(session)
        print(session.note or f"provider {session.provider}", placed.line, sep="; ")
        del session

        def progress(done: int, note: str) -> None:
            print(f"{done} done, {note}", file=sys.stderr)

        settings = VerifySettings(
            provider=arguments.provider,
            latency_seconds=arguments.seconds,
            compiled=arguments.compiled,
            throughput_seconds=arguments.throughput_seconds,
        )
        batches = tuple(arguments.batches)
        latency = measure_latency(
            model, file, settings, stock=(arguments.model, {}), batches=batches, progress=progress
        )
        throughput = measure_throughput(model, file, settings, batches=batches_up_to(max(batches)), progress=progress)
    print(f"{arguments.model}, {facts['hardware']}, {latency.threads} threads, {latency.provider}")
    row = "{:16} {:>5} {:>6} {:>16} {:>5} {:>7} {:>8} {:>8} {:>8}".format
    print(row("file against", "batch", "ratio", "95 % interval", "pairs", "dropped", "p50 ms", "p99", "its p50"))
    for c in latency.comparisons:
        times = (c.subject_ms.p50, c.subject_ms.p99, c.baseline_ms.p50)
        interval = f"{c.low:.3f} to {c.high:.3f}"
        shown = (f"{time:.2f}" for time in times)
        print(row(c.baseline, c.batch, f"{c.ratio:.3f}", interval, c.pairs, c.dropped, *shown))
    for made in latency.checks:
        print(f"{made.verdict}: {made.line}")
    for batch, seconds in latency.compile_seconds.items():
        print(f"compiling PyTorch at batch {batch} took {seconds:.1f} s")
    print(*latency.notes, sep="\n", end="\n" * bool(latency.notes))
    row = "{:>5} {:>9} {:>8} {:>8} {:>8} {:>8} {:>8}".format
    print(row("batch", "images/s", "p50 ms", "p90", "p99", "GFLOP/s", "of peak"))
    for rate in throughput.rates:
        shown = (f"{time:.2f}" for time in (rate.ms.p50, rate.ms.p90, rate.ms.p99))
        print(row(rate.batch, f"{rate.images_per_second:.1f}", *shown, f"{rate.gflops:.1f}", f"{rate.share:.0%}"))
    print(throughput.line)
    if arguments.out:
        content = {
            "command": shlex.join(sys.argv),
            "environment": facts,
            "nodes": placed.nodes,
            "latency": asdict(latency),
            "throughput": asdict(throughput),
        }
        arguments.out.write_text(as_json(content), encoding="utf-8")


if __name__ == "__main__":
    main()
