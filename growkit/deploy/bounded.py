"""A bound on the memory that a stranger's graph may take: a file of a few bytes can ask for any amount.

The bound is Linux's own, on address space. On other systems there is none, nor where CUDA is started or has been: that
takes address space without memory, hundreds of gigabytes of it.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

FLOOR = 4 * 2**30  # bytes
COPIES = 20  # of the weights: read, unpacked, optimised, laid out for the kernels
ACTIVATIONS = 256  # bytes for each byte of images: a ViT of 4-pixel patches, 768 wide, takes about as many


def bound_of(files: Iterable[Path]) -> int:
    """Bytes that this process may have once a graph in `files` is open: what it has, 4 GiB, and by the files' sizes."""
    return _own() + FLOOR + COPIES * sum(path.stat().st_size for path in files)


@contextmanager
def memory_bounded(bound: int, input_bytes: int = 0, *, provider: str) -> Iterator[None]:
    """Inside, this process gets no more than `bound`, and what images of so many bytes take besides.

    What asks for more fails as where memory is used up. Of bounds within each other the lowest holds. `provider` is
    ONNX Runtime's, which starts CUDA without torch's knowing.
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
