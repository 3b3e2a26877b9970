"""Is the ONNX file as fast as its architecture allows? Timed against a stock export and PyTorch.

Before any verdict the file is timed against itself: where even that differs, the machine is too noisy.
"""

import copy
import functools
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from growkit.deploy.capture import export_stock
from growkit.deploy.checks import Check, Verdict
from growkit.deploy.contention import CONTENDED, Contention
from growkit.deploy.form import PLAIN, Form
from growkit.deploy.parts import core_session, whole_session
from growkit.deploy.settings import VerifySettings
from growkit.deploy.timing import NOISY, Call, Comparison, compare
from growkit.deploy.truth import Preprocessing, noise_images, preprocessing
from growkit.errors import GrowkitError, first_line
from growkit.float32 import multiplying


@dataclass(frozen=True)
class Latency:
    """Every comparison, the checks made of them, and where they ran.

    compile_seconds  what torch.compile took, by batch size; not part of any other time
    notes            what could not be compared, and why
    """

    comparisons: tuple[Comparison, ...]
    checks: tuple[Check, ...]
    provider: str
    threads: int
    compile_seconds: dict[int, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def equivalence(comparison: Comparison, noise: float, limit: float) -> Verdict:
    """Judge by equivalence: pass when the whole interval is within `limit`, fail when it is above by more than `noise`.

    noise  of the same machine in the A/A run, as a fraction; above NOISY nothing passes
    """
    if comparison.low > limit * (1 + noise):
        return "fail"
    return "pass" if comparison.high <= limit and noise <= NOISY else "inconclusive"


@multiplying(tf32=False)  # for PyTorch; runtime.py does so for ONNX Runtime
def measure_latency(
    model: nn.Module,
    file: Path,
    settings: VerifySettings,
    *,
    stock: tuple[str, Mapping[str, Any]],
    form: Form = PLAIN,
    batches: tuple[int, ...] = (1, 8),
    progress: Callable[[int, str], None] = lambda done, note: None,
) -> Latency:
    """Time the ONNX `file` against itself, a stock export of the same architecture, and PyTorch.

    On a GPU every side takes images from host memory and returns logits to it. If PyTorch does not compile, a note
    says why.

    stock     name and arguments for timm.create_model
    form      of the file; if it takes pixels or outputs other than logits, only the network inside is timed
    progress  called with how many comparisons are done and which comes next

    Raises:
        GrowkitError: the provider does not run here, or torch does not run on the GPU that it runs on.
    """
    first = whole_session(file, form, provider=settings.provider)
    device = torch.device("cpu" if first.provider == "cpu" else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise GrowkitError(
            f"ONNX Runtime runs the file on {first.provider}, but torch {torch.__version__} sees no GPU to time PyTorch"
            " on; install torch for CUDA, or give --no-latency"
        )
    model = copy.deepcopy(model).eval().to(device)
    done = 0
    comparisons: list[Comparison] = []
    checks: list[Check] = []
    compile_seconds: dict[int, float] = {}
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        prepared = preprocessing(model)
        stock_file = Path(folder) / "stock.onnx"
        progress(done, "exporting the stock model")
        export_stock(*stock, prepared.input_size, stock_file)
        for batch in batches:
            images = noise_images(prepared, batch, settings.seed)
            tensor = torch.from_numpy(images)
            opening = functools.partial(_opening, images, prepared, first.provider)
            sides: dict[str, Callable[[], Call]] = {
                "itself": opening(file, form),
                "stock export": opening(stock_file, PLAIN),
                "PyTorch": functools.partial(_torch_call, model, tensor, device),
            }
            if settings.compiled and not notes:
                progress(done, f"compiling PyTorch at batch {batch}")
                try:
                    call, compile_seconds[batch] = _compile(model, tensor, device)
                    sides["PyTorch compiled"] = functools.partial(_same, call)
                except Exception as error:  # dynamo, the compiler and the driver each raise their own kinds
                    reason = first_line(error)
                    notes.append(f"PyTorch compiled was not timed, it does not compile here: {reason}")
            found = _compared(opening(file, form), sides, batch, settings, done, progress)
            done += 3 + settings.compiled
            comparisons += found.values()
            checks += _checks(found, settings)
        progress(done, "")
    return Latency(tuple(comparisons), tuple(checks), first.provider, first.threads, compile_seconds, tuple(notes))


def _opening(images: np.ndarray, prepared: Preprocessing, provider: str, file: Path, form: Form) -> Callable[[], Call]:
    """Return what opens a fresh session of the network in `file`, and returns the call that runs it on `images`."""

    def fresh() -> Call:
        session = core_session(file, form, prepared, provider=provider)
        return lambda: session.run(images)

    return fresh


def _compared(
    subject: Callable[[], Call],
    sides: Mapping[str, Callable[[], Call]],
    batch: int,
    settings: VerifySettings,
    done: int,
    progress: Callable[[int, str], None],
) -> dict[str, Comparison]:
    """Compare the file with each side by name; `done` comparisons were made before."""
    found: dict[str, Comparison] = {}
    for name, baseline in sides.items():
        progress(done + len(found), f"batch {batch} against {name}")
        found[name] = compare(
            subject,
            baseline,
            names=("file", name),
            batch=batch,
            seconds=settings.latency_seconds,
            seed=settings.seed + done + len(found),
            foreign=Contention().lap,
        )
    return found


def _checks(found: Mapping[str, Comparison], settings: VerifySettings) -> list[Check]:
    """Judge the comparisons at one batch size: with the stock export, and with PyTorch if its ratio is limited."""
    noise = found["itself"].noise
    checks = [latency_check(found["stock export"], noise, 1 + settings.latency_margin)]
    if settings.max_latency_ratio is not None:
        checks.append(latency_check(found["PyTorch"], noise, settings.max_latency_ratio))
    return checks


def _torch_call(model: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor, device: torch.device) -> Call:
    """Return a call that runs `model` on images from the host and copies its logits back."""

    @torch.inference_mode()
    def call() -> object:
        return model(tensor.to(device)).cpu()

    return call


def _compile(model: nn.Module, tensor: torch.Tensor, device: torch.device) -> tuple[Call, float]:
    """Compile the model for one batch size; return its call and the seconds that compiling took."""
    # fullgraph: past its recompilation limit torch would otherwise silently run uncompiled
    call = _torch_call(torch.compile(model, dynamic=False, fullgraph=True), tensor, device)
    start = time.perf_counter()
    call()
    return call, time.perf_counter() - start


def _same(call: Call) -> Call:
    return call


def latency_check(comparison: Comparison, noise: float, limit: float) -> Check:
    """Make the check of one comparison; its line has the interval and, where it matters, the noise."""
    verdict = equivalence(comparison, noise, limit)
    line = (
        f"batch {comparison.batch}: {comparison.ratio:.3f} x the time of {comparison.baseline} "
        f"[{comparison.low:.3f}, {comparison.high:.3f}], allowed {limit:.2f}"
    )
    itself = f"the file against itself may be off by {noise:.1%}"
    if noise > NOISY:
        noisy = "slower by more than the machine's noise" if verdict == "fail" else "the machine is too noisy"
        line += f"; {noisy}: {itself}"
        if comparison.foreign is not None and comparison.foreign > CONTENDED:
            line += f", and other programs took {comparison.foreign:.0%} of its processors"
    elif verdict == "inconclusive" and comparison.low > limit:
        line += f"; the interval is past the limit by no more than noise: {itself}"
    elif verdict == "inconclusive":
        line += "; the interval contains the limit, give it more time with --latency-seconds"
    name = f"batch {comparison.batch}: against {comparison.baseline}"
    return Check("latency", name, verdict, comparison.ratio, limit, line)
