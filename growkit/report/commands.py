"""The commands of a run, made again from its record: what was given beyond the defaults."""

import dataclasses
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from growkit.deploy.settings import ExportSettings, VerifySettings
from growkit.report.facts import Facts, Step, mapping
from growkit.settings import FINETUNE_DEFAULTS, OPERATOR_DEFAULTS, GrowSettings
from growkit.train.settings import AUTO, FitSettings

GIVEN = {  # the argument of each command, by its name in the record
    "train": "model",
    "grow": "source",
    "finetune": "model",
    "evaluate": "model",
    "export": "model",
    "verify": "model",
}
WIDTH = 86  # characters of a command in one line
RENAMED = {"onnx": "onnx-file"}  # options that the record calls otherwise


def command_line(step: Step, facts: Facts) -> str:
    """The command of a step as one would type it. Which device it ran on is not on record, nor is --from.

    A step of a command that is not known here is its name alone.
    """
    argument = GIVEN.get(step.command)
    if argument is None:
        return f"growkit {step.command}"
    parts = ["growkit", step.command]
    options = dict(step.options)
    given = options.pop(argument, None)
    if given:
        parts.append(str(given))
    if step.command == "train":  # the record leaves them out, the model folder has them
        arguments = mapping(mapping(facts.trained.get("source")).get("arguments"))
        options["set"] = [f"{key}={value}" for key, value in arguments.items() if key != "num_classes"]
    if step.command == "export" and Path(str(options.get("out"))).resolve() == (facts.path / "onnx").resolve():
        del options["out"]  # where it goes anyway
    defaults = _defaults(step.command)
    for key, value in options.items():
        parts += _option(str(key), value, defaults)
    if step.command == "grow" and step is facts.latest("grow"):
        operator = mapping(mapping(facts.grown.get("operator")).get("settings"))
        own = {**_fields(FitSettings), **OPERATOR_DEFAULTS}
        for key, value in operator.items():
            if key not in options and key not in ("epochs", "model_ema", "model_ema_decay"):
                parts += _option(str(key), value, own)
    if str(facts.path) != "run":
        parts += ["--run", str(facts.path)]
    return shlex.join(parts)


def in_lines(command: str) -> str:
    """A long command over several lines, broken before options, so that it can still be copied."""
    lines = [""]
    # never inside quotes, where the backslash of a broken line would be a part of the word
    for part in re.findall(r"""(?:[^\s'"]|'[^']*'|"[^"]*"|['"]|\s(?!--))+""", command):
        if lines[-1] and len(lines[-1]) + len(part) > WIDTH:
            lines.append(f"    {part}")
        else:
            lines[-1] += f" {part}" if lines[-1] else part
    return " \\\n".join(lines)


def _defaults(command: str) -> Mapping[str, Any]:
    """What each option of a command is when left out."""
    fit = _fields(FitSettings)
    return {
        "train": fit,
        "grow": _fields(GrowSettings),
        "finetune": {**fit, **FINETUNE_DEFAULTS},
        "evaluate": fit,
        "export": _fields(ExportSettings),
        "verify": _fields(VerifySettings),
    }[command]


def _fields(settings: type) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(settings)}


def _option(key: str, value: object, defaults: Mapping[str, Any]) -> list[str]:
    """An option with its value; nothing where it is the default."""
    flag = "--" + RENAMED.get(key, key).rstrip("_").replace("_", "-")
    if value is None or (key in defaults and defaults[key] == value):
        return []
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, list):
        return [part for one in value for part in (flag, str(one))]
    if key == "batch_size" and value == AUTO:
        return [flag, "auto"]
    return [flag, f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)]
