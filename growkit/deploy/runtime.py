"""ONNX Runtime sessions that say where they really run: threads, spinning, provider."""

import contextlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from growkit.errors import GrowkitError
from growkit.record import hardware, versions

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@dataclass(frozen=True)
class Session:
    """An open ONNX file. `provider` is the one that runs, 'cpu' or 'cuda'."""

    inner: Any
    input: str
    provider: str
    threads: int

    def run(self, images: np.ndarray) -> np.ndarray:
        """(B, C, H, W) float32 -> logits (B, classes).

        Raises whatever ONNX Runtime raises when it refuses the input.
        """
        return np.asarray(self.inner.run(None, {self.input: images})[0])

    def outputs(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Every output by name; raises as `run`."""
        names = [output.name for output in self.inner.get_outputs()]
        return dict(zip(names, map(np.asarray, self.inner.run(names, {self.input: images})), strict=True))


def open_session(
    file: Path | bytes,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    optimise: bool = True,
    spinning: bool = False,
    folder: Path | None = None,
) -> Session:
    """Open an ONNX file, or its bytes; weights beside it are read from `folder`.

    threads   intra-op threads; as many as torch uses when left out
    optimise  ONNX Runtime's default graph optimisation, which is what users deploy; False: none
    spinning  let idle threads spin; it makes whatever runs next in this process look slower

    CUDA runs without TF32, so that float32 means float32.

    Raises:
        GrowkitError: the provider asked for is unknown or does not really run here.
    """
    if provider == "auto":
        try:
            return open_session(
                file, provider="cuda", threads=threads, optimise=optimise, spinning=spinning, folder=folder
            )
        except GrowkitError:
            provider = "cpu"
    if provider not in PROVIDERS:
        raise GrowkitError(f"provider {provider}: unknown; choose cpu, cuda or auto")
    # get_available_providers() says what the wheel was compiled for, not what runs (ort#17801)
    if PROVIDERS[provider] not in ort.get_available_providers():
        raise _not_running(provider, "this ONNX Runtime was built without it")
    threads = threads or torch.get_num_threads()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings = [{"use_tf32": "0"}] if provider == "cuda" else [{}]
    source = file if isinstance(file, bytes) else str(file)
    with _quiet():
        if provider == "cuda":
            ort.preload_dlls()
        inner = ort.InferenceSession(source, options, providers=[PROVIDERS[provider]], provider_options=settings)
    if inner.get_providers()[0] != PROVIDERS[provider]:
        raise _not_running(provider, "ONNX Runtime fell back to the CPU")
    return Session(inner, inner.get_inputs()[0].name, provider, threads)


def environment(session: Session | None = None) -> dict[str, Any]:
    """Versions, hardware, load average, and the threads and provider of `session`."""
    facts: dict[str, Any] = {"versions": versions(), "hardware": hardware()}
    if hasattr(os, "getloadavg"):
        facts["load_average"] = [round(load, 2) for load in os.getloadavg()]
    if session:
        facts["provider"] = session.provider
        facts["threads"] = session.threads
    return facts


def _not_running(provider: str, why: str) -> GrowkitError:
    return GrowkitError(
        f"provider {provider} does not run here: {why}; "
        "install an NVIDIA driver and onnxruntime-gpu[cuda,cudnn], or use --provider cpu"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # a missing CUDA library is reported by our own error; ONNX Runtime's lines would come twice
    ort.set_default_logger_severity(4)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        ort.set_default_logger_severity(2)  # ONNX Runtime's own default; it cannot be read back
