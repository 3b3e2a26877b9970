"""Throughput of an ONNX file: images per second by batch size, and its share of the matmul peak.

The file runs by itself with ONNX Runtime's defaults, whose idle threads spin: as when it is served, and
not comparable with times of latency.py. The peak is what one matrix product reaches on the same processors.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from growkit.deploy.contention import CONTENDED, Contention
from growkit.deploy.form import PLAIN, Form
from growkit.deploy.parts import core_session
from growkit.deploy.runtime import Session, open_session
from growkit.deploy.settings import VerifySettings
from growkit.deploy.timing import Percentiles, percentiles
from growkit.deploy.truth import noise_images, preprocessing

CALLS = 20  # at least, at batch 1: percentiles are reported
CALLS_OF_LARGER = 3
SIZES = (512, 1024, 2048, 4096)  # of the square matrices that are tried for the peak
QUICK_SECONDS = 0.03  # a product that takes longer is the last one tried: the next takes eight times as long
SAMPLE_SECONDS = 0.02  # a shorter product is repeated: a burst is not a sustained rate


@dataclass(frozen=True)
class Rate:
    """At one batch size: images per second over all calls, and milliseconds of single calls.

    gflops  thousand million floating point operations per second, two per multiply-accumulate
    share   of the peak, 1 is all of it
    """

    batch: int
    images_per_second: float
    ms: Percentiles
    calls: int
    gflops: float
    share: float


@dataclass(frozen=True)
class Throughput:
    """The rates, and the float32 matmul peak that they are shares of, whatever the file's precision.

    peak_gflops  the best of several measurements, taken between those of the rates, with matrices peak_size square
    foreign      share of the processors that other programs took meanwhile; None: unknown
    """

    rates: tuple[Rate, ...]
    macs_per_image: int
    peak_gflops: float
    peak_size: int
    provider: str
    threads: int
    foreign: float | None = None

    @property
    def contended(self) -> bool:
        """Whether other programs took so much of the processors that the rates are not to be trusted."""
        return self.foreign is not None and self.foreign > CONTENDED

    @property
    def line(self) -> str:
        """The peak, and a warning where other programs took much of the processors."""
        line = (
            f"peak: {self.peak_gflops:.3g} GFLOP/s in a float32 product of {self.peak_size} x {self.peak_size} matrices"
        )
        if self.contended:
            line += f"; other programs took {self.foreign:.0%} of the processors meanwhile"
        return line


def measure_throughput(
    model: nn.Module,
    file: Path,
    settings: VerifySettings,
    *,
    form: Form = PLAIN,
    batches: tuple[int, ...] = (1, 2, 4, 8),
    progress: Callable[[int, str], None] = lambda done, note: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Throughput:
    """Run the ONNX `file` by itself at each of `batches`; for longer where the minimum number of calls takes longer.

    model     what the file was exported from; its multiply-accumulates are counted
    form      of the file; as in measure_latency, the network inside is run
    progress  called with how many batch sizes are done and which comes next

    Raises:
        GrowkitError: the provider does not run here.
    """
    prepared, seed = preprocessing(model), settings.seed
    macs = count_macs(model, torch.from_numpy(noise_images(prepared, 1, seed)))

    def opening(spinning: bool) -> Session:
        return core_session(file, form, prepared, provider=settings.provider, spinning=spinning)

    opened = opening(spinning=False)
    provider, threads = opened.provider, opened.threads
    others = Contention()
    size, peak = _find_peak(provider, clock)
    timed: list[tuple[int, list[float]]] = []
    for done, batch in enumerate(batches):
        progress(done, f"images per second at batch {batch}")
        images = noise_images(prepared, batch, seed)
        timed.append((batch, _times(opening(spinning=True), images, settings.throughput_seconds, clock)))
        peak = max(peak, _matmul_gflops(size, provider, clock)[0])
    progress(len(batches), "")
    rates = []
    for batch, times in timed:
        images_per_second = batch * len(times) / sum(times)
        gflops = 2 * macs * images_per_second / 1e9
        rates.append(Rate(batch, images_per_second, percentiles(times), len(times), gflops, gflops / peak))
    return Throughput(tuple(rates), macs, peak, size, provider, threads, others.lap())


def batches_up_to(largest: int) -> tuple[int, ...]:
    """Return 1, 2, 4, 8 and so on, and `largest` itself."""
    return tuple(sorted({2**power for power in range(largest.bit_length())} | {largest}))


def count_macs(model: nn.Module, images: torch.Tensor) -> int:
    """Count the multiply-accumulates of matrix products and convolutions in a forward pass over (B, C, H, W) images."""
    model = copy.deepcopy(model).cpu().float().eval()
    # the math kernel of attention consists of products that are counted; some fused ones are not
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops() // 2


def _times(session: Session, images: np.ndarray, seconds: float, clock: Callable[[], float]) -> list[float]:
    """Time single calls, in seconds, after two that are not timed.

    The session is opened for this alone: its spinning threads would take time from whatever comes next.
    """
    session.run(images)
    session.run(images)
    least = CALLS if len(images) == 1 else CALLS_OF_LARGER
    times: list[float] = []
    until = clock() + seconds
    while len(times) < least or clock() < until:
        start = clock()
        session.run(images)
        times.append(clock() - start)
    return times


def _find_peak(provider: str, clock: Callable[[], float]) -> tuple[int, float]:
    """Return the matrix size that gives the best rate, and the rate."""
    found = {}
    for size in SIZES:
        found[size], took = _matmul_gflops(size, provider, clock)
        if took > QUICK_SECONDS:
            break
    best = max(found, key=lambda size: found[size])
    return best, found[best]


def _matmul_gflops(size: int, provider: str, clock: Callable[[], float]) -> tuple[float, float]:
    """Measure a product of square float32 matrices in ONNX Runtime: GFLOP/s, the best of five, and its seconds."""
    # a TensorRT engine for one product says no more than CUDA does, and takes longer to build
    session = open_session(_matmul(size), provider="cuda" if provider == "tensorrt" else provider)
    device = "cpu" if session.provider == "cpu" else "cuda"
    values = np.random.default_rng(0).standard_normal((size, size), np.float32)
    binding = session.inner.io_binding()  # leaves the matrices where they are multiplied
    binding.bind_ortvalue_input(session.input, ort.OrtValue.ortvalue_from_numpy(values, device, 0))
    binding.bind_output("product", device)

    def run() -> float:
        start = clock()
        session.inner.run_with_iobinding(binding)
        return clock() - start

    run()
    repeats = max(1, math.ceil(SAMPLE_SECONDS / max(run(), 1e-6)))
    took = min(sum(run() for _ in range(repeats)) / repeats for _ in range(5))
    return 2 * size**3 / took / 1e9, took


def _matmul(size: int) -> bytes:
    """Make an ONNX file that multiplies its input, (size, size), by a constant, as a layer does."""
    values = np.random.default_rng(1).standard_normal((size, size), np.float32)
    shape = (TensorProto.FLOAT, [size, size])
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["input", "weight"], ["product"])],
        "matmul",
        [helper.make_tensor_value_info("input", *shape)],
        [helper.make_tensor_value_info("product", *shape)],
        [numpy_helper.from_array(values, "weight")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return made.SerializeToString()
