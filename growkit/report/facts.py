"""Read a run folder for its report: what is missing or cannot be read is left out, the latter with a line."""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from growkit.errors import GrowkitError
from growkit.files import read_json, refuse_no_file, sha256_of
from growkit.record import MEND_RECORD, RunFolder

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
    comparison: Content
    left_out: tuple[str, ...]  # a line for each file that could not be read: why, and what to do

    def all(self, command: str) -> tuple[Step, ...]:
        """Every step of a command, oldest first."""
        return tuple(step for step in self.steps if step.command == command)

    def latest(self, command: str) -> Step | None:
        """The last step of a command, the one that counts."""
        return next(reversed(self.all(command)), None)

    def figures(self, command: str) -> Content:
        """The figures of the last step of a command; empty without one."""
        step = self.latest(command)
        return step.figures if step else {}

    def hashes(self, command: str) -> Content:
        """The hashes of the last step of a command; empty without one."""
        step = self.latest(command)
        return step.hashes if step else {}

    @property
    def tuning(self) -> Step | None:
        """The last fine-tuning on record; None if a later one was killed, after it had kept other weights."""
        made, now = self.hashes("finetune").get("finetuned"), self.tuned.get("weights_sha256")
        return None if made and now and made != now else self.latest("finetune")

    @property
    def new_head(self) -> bool:
        """Whether the classifier was replaced on the way: the source has other classes, so no comparable accuracy."""
        return any(mapping(model.get("source")).get("own_head") is False for model in (self.grown, self.tuned))

    @property
    def shipped(self) -> tuple[str, str] | None:
        """The folder of the furthest model, as `growkit export` takes it, and the SHA-256 of its weights."""
        made = (
            ("finetune", "finetuned", self.tuned),
            ("grow", "grown", self.grown),
            ("train", "trained", self.trained),
        )
        for command, folder, history in made:
            if sha256 := history.get("weights_sha256") or self.hashes(command).get(folder):
                return folder, str(sha256)
        return None

    @property
    def exports(self) -> tuple[Step, ...]:
        """Every export of the furthest model as it stands now, oldest first; any export where no model is known."""
        shipped = self.shipped
        return tuple(step for step in self.all("export") if shipped is None or step.hashes.get("weights") == shipped[1])

    def holds(self, export: Step) -> bool:
        """Whether an export went into the run folder: a run that was moved since is known by the model beside."""
        out, model = (Path(str(export.options.get(key))) for key in ("out", "model"))
        stage = self.shipped[0] if self.shipped else None
        return (model.name, out) == (stage, model.parent / "onnx") or out.resolve() == (self.path / "onnx").resolve()

    @property
    def here(self) -> bool:
        """Whether the run folder holds an ONNX file."""
        return bool(self.export) or (self.path / "onnx" / "model.onnx").exists()

    @property
    def exported(self) -> Step | None:
        """The export whose file counts: the run folder's, or if it holds none, the one verified, else the last."""
        latest = {str(step.options.get("out")): step for step in self.all("export")}.values()  # in each folder
        made = [step for step in reversed(self.exports) if self.here or (step in latest and not self.holds(step))]
        wanted = self.export.get("sha256") or self.verify.get("onnx_sha256")
        return next((step for step in made if step.hashes.get("model.onnx") == wanted), made[0] if made else None)

    @property
    def onnx_sha256(self) -> object:
        """SHA-256 on record of the ONNX file that counts."""
        return self.export.get("sha256") or (self.exported.hashes.get("model.onnx") if self.exported else None)

    @property
    def elsewhere(self) -> str | None:
        """The ONNX file that counts, if the run folder holds none."""
        step = None if self.here else self.exported
        return str(Path(str(step.options.get("out")), "model.onnx")) if step else None

    @property
    def verify_command(self) -> str:
        """The command that verifies the ONNX file that counts; it names the model where the run folder holds none."""
        model = [str(self.exported.options.get("model"))] if self.exported and self.shipped is None else []
        file = ["--onnx-file", self.elsewhere] if self.elsewhere else []
        return shlex.join(["growkit", "verify", *model, *file, "--data", "DATA"])


def read_facts(run: RunFolder) -> Facts:
    """Read a run folder.

    Raises:
        GrowkitError: there is no such folder, or it holds nothing that a run writes.
    """
    if not run.path.is_dir():
        raise GrowkitError(f"{run.path}: no such run folder; `growkit grow` makes one, --run names another")
    left_out: list[str] = []

    def leave_out(what: str, why: str) -> None:
        remedy = MEND_RECORD if what.endswith(run.record.name) else "restore it, or run its step again"
        left_out.append(f"{what} was left out: {why}; {remedy}.")

    def read(path: Path) -> Content:
        name = str(path.relative_to(run.path))
        try:
            content = read_json(path) if path.exists() else {}
        except GrowkitError as error:
            leave_out(name, str(error).removeprefix(f"{path}: "))
            return {}
        if isinstance(content, Mapping):
            return content
        leave_out(name, "it holds something else than growkit writes there")
        return {}

    def history(folder: Path) -> Content:
        path, told = folder / "growkit.json", len(left_out)
        content = read(path)
        unknown = "weights_sha256" not in content and len(left_out) == told
        if unknown and (folder / "model.safetensors").exists():
            why = "it says nothing of the weights beside it" if path.exists() else "it is missing"
            leave_out(str(path.relative_to(run.path)), why)
        return content

    steps = tuple(_steps(read(run.record), run.record.name, leave_out))
    trained, grown, tuned = (history(folder) for folder in (run.trained, run.grown, run.finetuned))
    furthest = run.finetuned if tuned else run.grown if grown else run.trained
    facts = Facts(
        path=run.path,
        steps=steps,
        trained=trained,
        grown=grown,
        tuned=tuned,
        config=read(furthest / "config.json"),
        export=read(run.onnx / "export.json"),
        verify=read(run.verify / "report.json"),
        comparison=read(run.compare / "results.json"),
        left_out=tuple(left_out),
    )
    if not any((steps, trained, grown, tuned, facts.export, facts.verify, facts.comparison, left_out)):
        raise GrowkitError(f"{run.path} holds nothing of a run; `growkit grow` begins one, --run names another")
    return facts


def _steps(record: Content, name: str, leave_out: Callable[[str, str], None]) -> Iterator[Step]:
    """The steps of a record; `leave_out` is told of what is not one, and why."""
    listed = record.get("steps", [])
    if not isinstance(listed, list) or (record and "steps" not in record):
        leave_out(name, "it holds no list of steps")
        return
    for place, content in enumerate(listed, 1):
        if isinstance(content, Mapping):
            yield Step(place, content)
        else:
            leave_out(f"step {place} of {name}", "it is damaged")


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


def formatted(value: object, form: str) -> str:
    """A number in this format, as in '.3g'; a dash if it is none."""
    found = number(value)
    return "–" if found is None else f"{found:{form}}"


def percent(share: object) -> str:
    """A fraction in per cent; a dash if there is none."""
    return formatted(share, ".1%")
