"""Random draws that depend only on what they are for."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(*parts: int | str, device: torch.device | None = None) -> Iterator[None]:
    """Inside, every random draw is a function of `parts` alone; on exit all generators are restored.

    Covers the generators of Python, NumPy, torch on the CPU and, if given, torch on a CUDA `device`.
    """
    with random_kept(device):
        seed_all(*parts, device=device)
        yield


@contextmanager
def random_kept(device: torch.device | None = None) -> Iterator[None]:
    """On exit, restore the generators that `seeded` covers."""
    on_gpu = device is not None and device.type == "cuda"
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def number_of(*parts: int | str) -> int:
    """Derive a seed from `parts`."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch wants it below 2**63


def seed_all(*parts: int | str, device: torch.device | None = None) -> None:
    """Make every draw from here on a function of `parts`."""
    seed = number_of(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
