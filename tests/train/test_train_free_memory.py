"""Free memory is no more than what a process may take, whoever limits it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from growkit.train import free_memory
from growkit.train.free_memory import free_bytes

CPU = torch.device("cpu")
VERSIONS = {
    1: ("4:cpu,cpuacct:/job\n3:memory:{}\n", "memory", ("limit_in_bytes", "usage_in_bytes"), "total_inactive_file"),
    2: ("0::{}\n", ".", ("max", "current"), "inactive_file"),
}


def test_free_memory_is_some_and_no_more_than_any_machine_has() -> None:
    assert 2**20 < free_bytes(CPU) < 2**50


def test_free_memory_is_shared_by_the_processes_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_bytes(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert free_bytes(CPU) == pytest.approx(free / 8, rel=0.2)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("own", "limited"),
    [
        ("/", ""),  # in a container that has groups of its own
        ("/slurm/job_7", "slurm/job_7"),
        ("/slurm/job_7/step_0", "slurm/job_7"),  # around the process's own, which has no limit
        ("/docker/0123", ""),  # in a container, as the host names it
    ],
)
def test_free_memory_is_what_a_control_group_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, own: str, limited: str
) -> None:
    listed, root, (most, taken), cached = VERSIONS[version]
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 90 kB\nMemAvailable: 80 kB\n")
    (proc / "self" / "cgroup").write_text(listed.format(own))
    monkeypatch.setattr(free_memory, "PROC", proc)
    monkeypatch.setattr(free_memory, "GROUPS", groups)
    assert free_bytes(CPU) == 80 * 1024

    def limit(folder: Path, content: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"memory.{most}").write_text(content)
        (folder / f"memory.{taken}").write_text("5000\n")
        (folder / "memory.stat").write_text(f"anon 4000\n{cached} 800\n")

    without = "max\n" if version == 2 else f"{2**63 - 4096}\n"
    if own.startswith("/slurm"):
        limit(groups / root / own.lstrip("/"), without)
    limit(groups / root / limited, "9000\n")
    assert free_bytes(CPU) == 9000 - 5000 + 800
    limit(groups / root / limited, without)
    assert free_bytes(CPU) == 80 * 1024
    limit(groups / root / limited, "100\n")
    assert free_bytes(CPU) == 0


def test_free_memory_is_what_a_limit_of_the_process_leaves() -> None:
    code = """
import resource, torch
from growkit.train.free_memory import free_bytes
before = free_bytes(torch.device("cpu"))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, resource.RLIM_INFINITY))
left = free_bytes(torch.device("cpu"))
assert before > 2**29
taken = torch.empty(int(0.95 * left), dtype=torch.uint8)
try:
    torch.empty(int(0.9 * left), dtype=torch.uint8)
except RuntimeError:
    print(left)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 2**28 < int(done.stdout) < 2**29
