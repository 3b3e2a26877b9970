"""A memory limit for running an untrusted graph: a file of a few bytes can ask for any amount.

It is Linux's limit on address space. There is none on other systems, nor once this process uses CUDA or is about to:
CUDA reserves hundreds of gigabytes of address space without using the memory.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

FLOOR = 4 * 2**30  # bytes
COPIES = 20  # of the weights: read, unpacked, optimised, laid out for the kernels
ACTIVATIONS = 256  # bytes per byte of images: a ViT with 4-pixel patches and width 768 takes about this many


def bound_of(files: Iterable[Path]) -> int:
    """Return the bytes this process may use to run a graph: what it uses now, 4 GiB, and COPIES times `files`."""
    return _own() + FLOOR + COPIES * sum(path.stat().st_size for path in files)


@contextmanager
def memory_bounded(bound: int, input_bytes: int = 0, *, provider: str) -> Iterator[None]:
    """Limit this process to `bound` bytes plus what `input_bytes` of images take.

    Asking for more fails as if memory had run out. Of nested limits the lowest holds. `provider` is ONNX Runtime's,
    which starts CUDA without torch knowing.
    """
    cuda = provider != "cpu" and torch.cuda.is_available()
    if sys.platform != "linux" or cuda or torch.cuda.is_initialized():
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = (bound + ACTIVATIONS * input_bytes, soft, hard)
    resource.setrlimit(resource.RLIMIT_AS, (min(n for n in limits if n != resource.RLIM_INFINITY), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _own() -> int:
    if sys.platform != "linux":
        return 0
    import resource

    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
