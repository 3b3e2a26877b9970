"""What `growkit export` and `growkit verify` can be told; nothing heavy is imported here."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """How an ONNX file is checked before it appears."""

    max_batch: int = 8
    """Largest batch size the finished file is checked at, beside 1, 2 and 5."""
    seed: int = 0
    """Seed of the images it is checked with and of the reference data."""


@dataclass(frozen=True, kw_only=True)
class VerifySettings:
    """What a verification runs on and how long it may take."""

    provider: str = "cpu"
    """Where ONNX Runtime runs: cpu, cuda, tensorrt, or auto (CUDA if it really runs)."""
    max_batch: int = 8
    """Largest batch size, checked beside 1, 2 and 5, and timed beside 1."""
    seed: int = 0
    """Seed of the images, of the order of the timed runs and of the bootstrap."""
    latency: bool = True
    """Time the file against PyTorch and against a stock export of the same architecture."""
    latency_seconds: float = 12.0
    """Longest time one latency comparison may take; there are six, eight with --compiled."""
    latency_margin: float = 0.10
    """How much slower than the stock export still counts as equal."""
    max_latency_ratio: float | None = None
    """Fail when the file takes over this many times PyTorch's time; only reported when left out."""
    compiled: bool = False
    """Time the file against PyTorch compiled, too; compiling takes about half a minute per batch size."""
    throughput_seconds: float = 1.0
    """Time for the images per second of each batch size 1, 2, 4, ...; 0 leaves them out."""
    throughput_batch: int | None = None
    """Largest batch size of the images per second; --max-batch when left out."""
