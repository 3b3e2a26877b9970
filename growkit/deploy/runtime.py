"""ONNX Runtime sessions that say where they really run: threads, spinning, provider, nodes."""

import atexit
import contextlib
import functools
import io
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernelError

from growkit.deploy import libraries
from growkit.errors import GrowkitError
from growkit.ranges import refuse_choice
from growkit.record import hardware, versions

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
ELSE_CPU = "; or use cpu"
ort.disable_telemetry_events()  # the builds for Windows would report to their maker
_DEVICE_ERROR = re.compile(r"CUDA failure \d+: [^;\n]*[^;\s]")


@dataclass(frozen=True)
class Session:
    """An open ONNX file.

    provider  the one that runs: 'cpu', 'cuda' or 'tensorrt'
    note      with --provider auto, what was chosen and why; empty otherwise
    """

    inner: Any
    input: str
    provider: str
    threads: int
    note: str = ""

    def run(self, images: np.ndarray) -> np.ndarray:
        """(B, C, H, W) float32 -> logits (B, classes).

        Raises whatever ONNX Runtime raises when it refuses the input.
        """
        return np.asarray(self.inner.run(None, {self.input: images})[0])

    def outputs(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Every output by name; raises as `run`."""
        names = [output.name for output in self.inner.get_outputs()]
        return dict(zip(names, map(np.asarray, self.inner.run(names, {self.input: images})), strict=True))


@dataclass(frozen=True)
class Node:
    """A node of the optimised graph."""

    op: str
    name: str


@dataclass(frozen=True)
class Assignment:
    """Which provider each node of a file runs on.

    provider     the one that was asked for
    nodes        how many nodes run on each provider
    fallen_back  the nodes that run on the CPU although another provider was asked for
    """

    provider: str
    nodes: dict[str, int]
    fallen_back: tuple[Node, ...]

    @property
    def line(self) -> str:
        """How many nodes run on the provider asked for, and the operators that do not."""
        line = f"{self.nodes.get(self.provider, 0)} of {sum(self.nodes.values())} nodes run on {self.provider}"
        if self.fallen_back:
            counts = Counter(node.op for node in self.fallen_back).most_common()
            line += "; on the CPU: " + ", ".join(f"{count} {op}" for op, count in counts)
        return line


def assignment(session: Session) -> Assignment:
    """Ask ONNX Runtime where each node of an open file was placed."""
    short = {long: provider for provider, long in PROVIDERS.items()}
    nodes: Counter[str] = Counter()
    fallen_back = []
    for part in session.inner.get_provider_graph_assignment_info():
        provider, inside = short.get(part.ep_name, part.ep_name), part.get_nodes()
        nodes[provider] += len(inside)
        if provider == "cpu" != session.provider:
            fallen_back += [Node(node.op_type, node.name) for node in inside]
    return Assignment(session.provider, dict(nodes), tuple(fallen_back))


def open_session(
    file: Path | bytes,
    *,
    provider: str = "cpu",
    optimise: bool = True,
    spinning: bool = False,
    folder: Path | None = None,
) -> Session:
    """Open an ONNX file, or its bytes, with as many threads as torch uses; weights beside it are read from `folder`.

    optimise  ONNX Runtime's default graph optimisation, which is what users deploy; False: none
    spinning  let idle threads spin; it makes whatever runs next in this process look slower

    CUDA and TensorRT run without TF32, so that float32 means float32; nodes that TensorRT cannot run go to
    CUDA, and those that CUDA cannot run to the CPU (see `assignment`). 'auto' is CUDA where it runs, else the CPU.

    Raises:
        GrowkitError: the provider asked for is unknown or does not really run here.
    """
    if provider == "auto":
        return on_cuda_or_cpu(
            lambda place: open_session(file, provider=place, optimise=optimise, spinning=spinning, folder=folder)
        )
    refuse_choice("provider", provider, (*PROVIDERS, "auto"))
    # get_available_providers() says what the wheel was compiled for, not what runs (ort#17801)
    if PROVIDERS[provider] not in ort.get_available_providers():
        raise _not_running(
            provider, "this ONNX Runtime was built without it: pip install onnxruntime-gpu in place of onnxruntime"
        )
    options = _options(optimise, spinning, folder)
    source = file if isinstance(file, bytes) else str(file)
    wanted = _wanted(provider)
    with _quiet() as said:
        if provider != "cpu":
            libraries.load(provider)
        try:
            inner = ort.InferenceSession(
                source,
                options,
                providers=[PROVIDERS[name] for name in wanted],
                provider_options=list(wanted.values()),
            )
        except Exception as error:
            if provider == "cpu":
                raise
            with contextlib.suppress(NoKernelError):  # the CPU has none for bfloat16
                ort.InferenceSession(source, options, providers=[PROVIDERS["cpu"]])  # raises if the file is at fault
            raise _not_running(provider, *_reasons(provider, str(error))) from None
    if inner.get_providers()[0] != PROVIDERS[provider]:
        raise _not_running(provider, *_reasons(provider, said.getvalue()))
    inner.disable_fallback()  # else a run that fails there is silently repeated on the CPU
    return Session(inner, inner.get_inputs()[0].name, provider, options.intra_op_num_threads)


def _options(optimise: bool, spinning: bool, folder: Path | None) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def on_cuda_or_cpu(opened: Callable[[str], Session]) -> Session:
    """Return what `opened` opens on CUDA where that runs, else on the CPU, with a note of which and why."""
    try:
        return replace(opened("cuda"), note="provider auto: CUDA runs here")
    except GrowkitError as error:
        why = str(error).partition(ELSE_CPU)[0]
        return replace(opened("cpu"), note=f"provider auto: the CPU; {why}")


def _wanted(provider: str) -> dict[str, dict[str, str]]:
    """The providers of a session, best first, and their settings."""
    if provider == "cpu":
        return {"cpu": {}}
    cuda = {"cuda": {"use_tf32": "0"}}
    if provider == "cuda":
        return cuda
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # TensorRT's own; the provider has no setting for it
    # sessions are opened often here, and TensorRT takes minutes to build an engine
    cache = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": _engine_folder()}
    return {"tensorrt": cache, **cuda}


@functools.cache
def _engine_folder() -> str:
    """A folder that lives as long as this process."""
    folder = tempfile.TemporaryDirectory(prefix="growkit-tensorrt-")
    atexit.register(folder.cleanup)
    return folder.name


def environment(session: Session | None = None) -> dict[str, Any]:
    """Versions, hardware, load average, and the threads and provider of `session`."""
    facts: dict[str, Any] = {"versions": versions(), "hardware": hardware()}
    if hasattr(os, "getloadavg"):
        facts["load_average"] = [round(load, 2) for load in os.getloadavg()]
    if session:
        facts["provider"] = session.provider
        facts["threads"] = session.threads
    return facts


def _reasons(provider: str, said: str) -> tuple[str, ...]:
    """Why `provider` does not run, with the remedy: libraries first, then what CUDA said about the device."""
    absent = libraries.missing(provider)
    if absent:
        return absent
    told = _DEVICE_ERROR.search(said)
    why = told[0] if told else "ONNX Runtime fell back to the CPU"
    built = f" for CUDA {libraries.cuda_version()}" if libraries.cuda_version() else ""
    return (f"{why}: check that nvidia-smi lists a GPU and a driver new enough{built}",)


def _not_running(provider: str, *reasons: str) -> GrowkitError:
    return GrowkitError(f"provider {provider} does not run here: {'; '.join(reasons)}{ELSE_CPU}")


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    """Capture what is printed: our own error reports a missing library, which would otherwise be reported twice."""
    said = io.StringIO()
    ort.set_default_logger_severity(4)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield said
    finally:
        ort.set_default_logger_severity(2)  # ONNX Runtime's own default; it cannot be read back
