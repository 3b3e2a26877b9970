"""How much memory is free: on a GPU, or on the host within this process's limits."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

PROC = Path("/proc")
GROUPS = Path("/sys/fs/cgroup")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = ("memory.max", "memory.current", "inactive_file")
MANY = 2**63 - 1  # bytes
USED = 0.6  # usable share of the remaining address space: allocators and threads reserve more than they use


def free_bytes(device: torch.device) -> int:
    """Return the bytes free on `device`; on the CPU, those that this process may take.

    That is its equal share among torchrun's processes on the host, at most its own limit (`ulimit -v`). If the system
    does not say what is free, all of the machine's memory counts.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        available = 1024 * _entry(PROC / "meminfo", "MemAvailable:")
    except (OSError, StopIteration):  # not Linux
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else MANY
    share = min(available, *_left_to_groups(), MANY) // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return max(0, min(share, _left_to_process()))


def _left_to_groups() -> Iterator[int]:
    """Yield the bytes that each cgroup around this process may still take, as in Docker, Kubernetes and Slurm."""
    try:
        lines = (PROC / "self" / "cgroup").read_text("utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        most, taken, cached = VERSION_1 if controllers else VERSION_2
        root = GROUPS / "memory" if controllers else GROUPS
        own = root / place.lstrip("/")  # the host's path: in a container only the root may exist
        for group in (own, *own.parents):
            try:
                limit, used = (int((group / name).read_text("ascii")) for name in (most, taken))
                yield limit - used + _entry(group / "memory.stat", cached)  # cached files can be dropped and read again
            except (OSError, ValueError, StopIteration):  # no such group, or no limit: "max"
                continue


def limited() -> bool:
    """Return whether this process's address space is limited: what fits it is less certain than what fits memory."""
    return resource is not None and resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def _left_to_process() -> int:
    """Return the bytes that fit the address space this process may still take."""
    if not limited():
        return MANY
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    try:
        pages = int((PROC / "self" / "statm").read_text("ascii").split()[0])
    except OSError:
        return most
    return int(USED * (most - pages * os.sysconf("SC_PAGE_SIZE")))


def _entry(file: Path, name: str) -> int:
    """Return the number that a system file gives for `name`."""
    return next(int(words[1]) for words in map(str.split, file.read_text("ascii").splitlines()) if words[0] == name)
