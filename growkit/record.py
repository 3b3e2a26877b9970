"""A run folder: the place of each stage, and record.json, which says how each file was made."""

import os
import platform
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from growkit.errors import GrowkitError, UnwritableError
from growkit.files import clear_left, read_json, refuse_unwritable, write_json

PACKAGES = (
    "growkit",
    "torch",
    "timm",
    "onnx",
    "onnxruntime-gpu",
    "onnxruntime",
    "onnxscript",
    "numpy",
    "safetensors",
    "optuna",
    "scipy",
    "matplotlib",
)

STAGES = ("trained", "operator", "grown", "finetuned", "onnx", "verify", "reference", "compare", "sweep")
MEND_RECORD = (
    "make it readable again, or move it away: that loses the settings and scores of the steps so far, "
    "but none of their files"
)


class RunFolder:
    """The folder that every command reads and writes; `run/` unless --run says otherwise."""

    def __init__(self, path: Path, *, command_line: str = ""):
        """The run at `path`; `command_line` is the command that writes to it, as typed, for the record."""
        self.path = path
        self.command_line = command_line
        self.trained = path / "trained"
        self.operator = path / "operator"  # the state from which operator training resumes
        self.grown = path / "grown"
        self.finetuned = path / "finetuned"
        self.onnx = path / "onnx"
        self.onnx_file = self.onnx / "model.onnx"
        self.verify = path / "verify"
        self.compare = path / "compare"
        self.sweep = path / "sweep"
        self.report = path / "report.html"
        self.record = path / "record.json"

    def furthest(self) -> Path:
        """The model folder of the furthest stage: fine-tuned, else grown, else trained.

        Raises:
            GrowkitError: the run holds no model yet.
        """
        return self._first("model yet", self.finetuned, self.grown, self.trained)

    def startable(self) -> Path:
        """The model folder that fine-tuning starts from: grown, else trained.

        Raises:
            GrowkitError: the run holds neither.
        """
        if self.finetuned.is_dir() and not self.grown.is_dir() and not self.trained.is_dir():
            raise GrowkitError(f"{self.path} holds no grown model; name the one that {self.finetuned} was started from")
        return self._first("grown model", self.grown, self.trained)

    def holds(self, model: str) -> bool:
        """Whether what a model argument names is a file or folder inside the run."""
        return Path(model).exists() and Path(model).resolve().is_relative_to(self.path.resolve())

    def exported_weights(self) -> object:
        """SHA-256 of the weights that the run's ONNX file says it was made of; None where it says nothing."""
        try:
            return read_json(self.onnx / "export.json")["provenance"]["weights_sha256"]
        except (GrowkitError, KeyError, TypeError):
            return None

    def _first(self, what: str, *stages: Path) -> Path:
        for stage in stages:
            if (stage / "model.safetensors").exists():
                return stage
        raise GrowkitError(f"{self.path} holds no {what}; run `growkit grow` first, or name a model or --run")

    def refuse_unusable(self) -> None:
        """Raise GrowkitError if the run folder cannot be written, before the work starts."""
        if self.path.exists() and not self.path.is_dir():
            raise GrowkitError(f"{self.path} is a file; --run names a folder")
        if self.path.is_symlink() and not self.path.exists():  # as to a disk that is not mounted
            raise GrowkitError(f"{self.path} is a link to {self.path.readlink()}, which is not there; make that")
        for stage in STAGES:
            if (self.path / stage).exists() and not (self.path / stage).is_dir():
                raise GrowkitError(f"{self.path / stage} is a file where a run has a folder; move it away")
        try:
            refuse_unwritable(self.path)
        except UnwritableError as error:
            raise UnwritableError(f"--run {error}") from None
        self.steps()

    def clear_left(self) -> None:
        """Clean up what killed commands left; no other process may be writing here (`lock.held`)."""
        clear_left(self.path, alone=True)
        for stage in STAGES:
            for folder, _, _ in os.walk(self.path / stage):
                clear_left(Path(folder), alone=True)

    def steps(self) -> list[dict[str, Any]]:
        """Every step so far, oldest first; none when the run is new.

        Raises:
            GrowkitError: record.json cannot be read, or is not a record.
        """
        if not self.record.exists():
            return []
        try:
            content = read_json(self.record)
        except GrowkitError as error:
            raise GrowkitError(f"{error}; {MEND_RECORD}") from None
        steps = content.get("steps") if isinstance(content, dict) else None
        if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
            raise GrowkitError(f"{self.record} holds no list of steps; {MEND_RECORD}")
        return steps

    def add(
        self,
        command: str,
        *,
        options: dict[str, Any],
        figures: dict[str, Any],
        hashes: dict[str, str] | None = None,
    ) -> None:
        """Append a step: the command as typed, settings and seeds, figures, and SHA-256 of files by name."""
        step = {
            "command": command,
            "command_line": self.command_line or None,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "options": options,
            "figures": figures,
            "hashes": hashes or {},
            "versions": versions(),
            "hardware": hardware(),
        }
        write_json(self.record, {"schema": 1, "steps": [*self.steps(), step]})


@cache
def versions() -> dict[str, str]:
    """Versions of Python, growkit and the packages that affect results, by distribution name."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """The hardware that figures were measured on: processor, cores, and the GPU if torch sees one."""
    import torch

    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(cpus),
        "torch_threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
