"""Read a run folder for its report: whatever is missing or damaged is left out, and what is damaged is named."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from growkit.errors import GrowkitError
from growkit.files import read_json, refuse_no_file, sha256_of
from growkit.record import RunFolder

Content = Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """A step of the record; `number` counts from 1."""

    number: int
    content: Content

    @property
    def command(self) -> str:
        return str(self.content.get("command", "unnamed step"))

    @property
    def name(self) -> str:
        """As in '2. grow'."""
        return f"{self.number}. {self.command}"

    @property
    def finished(self) -> str:
        """Time it finished, in UTC; empty if the record does not say."""
        return str(self.content.get("finished") or "").replace("T", " ").replace("+00:00", " UTC")

    @property
    def options(self) -> Content:
        return mapping(self.content.get("options"))

    @property
    def figures(self) -> Content:
        return mapping(self.content.get("figures"))

    @property
    def hashes(self) -> Content:
        return mapping(self.content.get("hashes"))


@dataclass(frozen=True)
class Facts:
    """Everything a report is made of. A file that is missing or damaged is an empty mapping."""

    path: Path
    steps: tuple[Step, ...]
    trained: Content  # growkit.json of run/trained, and so on
    grown: Content
    tuned: Content
    config: Content  # config.json of the furthest model
    export: Content
    verify: Content
    held: tuple[Content, ...]  # checks of the model alone and of an ONNX file alone, against a reference
    comparison: Content
    damaged: tuple[str, ...]  # one line for each file that could not be read

    def all(self, command: str) -> tuple[Step, ...]:
        """Every step of a command, oldest first."""
        return tuple(step for step in self.steps if step.command == command)

    def latest(self, command: str) -> Step | None:
        """The last step of a command, the one that counts."""
        return next(reversed(self.all(command)), None)

    @property
    def shipped(self) -> tuple[str, str] | None:
        """The folder of the furthest model, as `growkit export` takes it, and the SHA-256 of its weights."""
        made = (
            ("finetune", "finetuned", self.tuned),
            ("grow", "grown", self.grown),
            ("train", "trained", self.trained),
        )
        for command, folder, history in made:
            step = self.latest(command)  # of training that was killed there is none
            sha256 = history.get("weights_sha256") or (step.hashes.get(folder) if step else None)
            if sha256:
                return folder, str(sha256)
        return None


def read_facts(run: RunFolder) -> Facts:
    """Read a run folder.

    Raises:
        GrowkitError: there is no such folder, or it holds nothing that a run writes.
    """
    if not run.path.is_dir():
        raise GrowkitError(f"{run.path}: no such run folder; `growkit grow` makes one, --run names another")
    damaged: list[str] = []

    def read(path: Path) -> Content:
        try:
            content = read_json(path) if path.exists() else {}
        except GrowkitError:
            content = None
        if isinstance(content, Mapping):
            return content
        damaged.append(f"{path.relative_to(run.path)} is damaged and was left out.")
        return {}

    steps: list[Step] = []
    listed = read(run.record)
    found = listed.get("steps", [])
    if not isinstance(found, list) or (listed and "steps" not in listed):
        damaged.append(f"{run.record.name} holds no list of steps and was left out.")
        found = []
    for place, content in enumerate(found, 1):
        if isinstance(content, Mapping):
            steps.append(Step(place, content))
        else:
            damaged.append(f"Step {place} of {run.record.name} is damaged and was left out.")
    trained, grown, tuned = (read(folder / "growkit.json") for folder in (run.trained, run.grown, run.finetuned))
    furthest = run.finetuned if tuned else run.grown if grown else run.trained
    facts = Facts(
        path=run.path,
        steps=tuple(steps),
        trained=trained,
        grown=grown,
        tuned=tuned,
        config=read(furthest / "config.json"),
        export=read(run.onnx / "export.json"),
        verify=read(run.verify / "report.json"),
        held=tuple(read(run.verify / f"held-{what}.json") for what in ("model", "file")),
        comparison=read(run.compare / "results.json"),
        damaged=tuple(damaged),
    )
    if not any((steps, trained, grown, tuned, facts.export, facts.verify, facts.comparison, damaged)):
        raise GrowkitError(f"{run.path} holds nothing of a run; `growkit grow` begins one, --run names another")
    return facts


def sha256_on_disk(paths: Sequence[Path]) -> str | None:
    """SHA-256 over the bytes of all files, as export.json and verify's report tell it; None if one is unreadable."""
    try:
        for path in paths:
            refuse_no_file(path)
        return sha256_of(*paths)
    except (GrowkitError, OSError):
        return None


def mapping(value: object) -> Content:
    """`value` if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def rows(value: object) -> list[Content]:
    """The mappings in the list `value`; none if it is not a list."""
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list | tuple) else []


def texts(value: object) -> list[str]:
    """The strings in the list `value`; none if it is not a list."""
    return [word for word in value if isinstance(word, str)] if isinstance(value, list | tuple) else []


def number(value: object) -> float | None:
    """`value` as a float if it is a number, also one spelled 'nan' or 'inf'; else None."""
    if isinstance(value, bool) or not (isinstance(value, int | float) or value in ("nan", "inf", "-inf")):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer too large for a float
        return None


def words(key: object) -> str:
    """A key with spaces for underscores."""
    return str(key).replace("_", " ")


def percent(share: object) -> str:
    """A fraction in per cent; a dash if there is none."""
    value = number(share)
    return "–" if value is None else f"{100 * value:.1f}%"
