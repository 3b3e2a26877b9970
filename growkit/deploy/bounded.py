"""A bound on the memory that a stranger's graph may take: one of a few bytes can ask for any amount."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from growkit.deploy.store import files_of

FLOOR = 4 * 2**30  # bytes
COPIES = 20  # of the weights: read, unpacked, optimised, laid out for the kernels
ACTIVATIONS = 256  # bytes for each byte of images: a ViT of 4-pixel patches, 768 wide, takes about as many


@contextmanager
def memory_bounded(file_bytes: int, input_bytes: int = 0) -> Iterator[None]:
    """Inside, this process gets no more memory than a file may need: 4 GiB, and by the sizes of weights and images.

    What asks for more fails as where memory is used up. The bound is Linux's, on address space; on other systems, and
    where CUDA has been started, which takes address space without memory, there is none.
    """
    if sys.platform != "linux" or torch.cuda.is_initialized():
        yield
        return
    import resource

    own = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    bound = own + FLOOR + COPIES * file_bytes + ACTIVATIONS * input_bytes
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    lower = min([bound, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_AS, (lower, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def bytes_of(file: Path) -> int:
    """Bytes of an ONNX file and of those beside it that hold its weights; 0 where it is not to be read."""
    try:
        return sum(path.stat().st_size for path in files_of(file))
    except Exception:  # what is wrong with the file is for its reader to say
        return 0
