"""The state from which a stopped run resumes: written atomically, read without unpickling code."""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from growkit.errors import DamagedStateError, GrowkitError, is_memory_full
from growkit.files import plain, refuse_no_file, whole_file, writing
from growkit.ranges import option_of
from growkit.text import first_difference
from growkit.train.distributed import sharded_like
from growkit.train.settings import FitSettings

STATE = "state.pt"
METRICS = "metrics.jsonl"
BOARD = "tensorboard"  # a folder beside it
COMPUTED = ("foreach", "fused", "capturable")  # torch's names for ways to compute the same updates
OPTIONS = {f.name for f in fields(FitSettings)}
ANEW = "start anew with --force in place of --resume"


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters and persistent buffers by name; frozen parameters are left out."""
    frozen = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def load_trainable(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load into `model` what `trainable_state` returned.

    Raises:
        GrowkitError: names or shapes are not the model's.
    """
    own = trainable_state(model)
    differing = sorted(
        name
        for name in own.keys() | state.keys()
        if name not in own or name not in state or own[name].shape != state[name].shape
    )
    if differing:
        raise GrowkitError(
            f"the saved state is of another model ({differing[0]} differs); give the same model, or {ANEW}"
        )
    model.load_state_dict({name: sharded_like(value, own[name]) for name, value in state.items()}, strict=False)


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load what `optimizer.state_dict()` returned, sharded where the optimizer's parameters are.

    How the updates are computed stays as it is: torch's DTensor has no fused SGD, for example.
    """
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        number: {name: sharded_like(value, own[number]) for name, value in of_one.items()}
        for number, of_one in state["state"].items()
    }
    groups = [
        {**before, **{name: now[name] for name in COMPUTED if name in now}}
        for before, now in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups, "state": moments})


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, and lists and dicts of them) to `folder`."""
    # through a Python stream: torch's own does not say why it failed
    with whole_file(folder / STATE) as partial, partial.open("wb") as stream:
        torch.save(_without_numpy(state), stream)


def _without_numpy(value: Any) -> Any:
    """`value` with Python's numbers in place of NumPy's, which could not be read back without unpickling code."""
    if isinstance(value, Mapping):
        return {key: _without_numpy(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_without_numpy, value))
    return value.item() if isinstance(value, np.generic) else value


def load_state(folder: Path, identity: Mapping[str, Any], *, checked: bool = True) -> dict[str, Any]:
    """Read the state in `folder`, on the CPU; unless `checked`, without reading all of it.

    Raises:
        GrowkitError: there is none, it is damaged, or its run had other settings or data
            than `identity`; the message names the differences.
    """
    state = _read_state(folder / STATE, checked=checked)
    before = state["identity"]
    differing = differences(before, identity)
    if differing:
        longer = any(_is_more(identity.get(name), before.get(name)) for name in ("epochs", "steps"))
        more = "; to train what it gave for longer, fine-tune that into another --run" if longer else ""
        raise GrowkitError(f"{folder}: the run was started with {'; '.join(differing)}: give the same, or {ANEW}{more}")
    return state


def _is_more(now: object, was: object) -> bool:
    return isinstance(now, int | float) and isinstance(was, int | float) and now > was


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say in words where two identities differ."""
    return [
        difference(option_of(name) if name in OPTIONS else name, was.get(name), now.get(name))
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name)
    ]


def difference(name: str, was: object, now: object) -> str:
    """Say in words how an entry of an identity differs: hashes tell the user nothing, and class lists may be long.

    The name of an option is given as it is typed.
    """
    if name in ("files", "validation files"):
        which = "training" if name == "files" else "validation"
        return f"other {which} images (some were added, removed or renamed)"
    if name == "source":
        return "another model (its weights differ)"
    if name == "classes" and isinstance(was, list) and isinstance(now, list):
        if len(was) != len(now):
            return f"{len(was)} {name}, not {len(now)}"
        at, one, other = first_difference(was, now)
        return f"{name} whose number {at} is {one}, not {other}"
    if was is None or was is False:
        return f"no {name}" if now is True else f"no {name}, not {now}"
    given = name if was is True else f"{name} {was}"
    return f"{given}, not without it" if now is None or now is False else f"{given}, not {now}"


def begun_with(folder: Path, name: str, *kinds: type) -> Any:
    """Return the setting `name`, of one of the `kinds`, that the run whose state is in `folder` was started with.

    Raises:
        GrowkitError: there is no state, or it is damaged.
    """
    found = _read_state(folder / STATE, checked=False)["identity"].get(name)
    if not isinstance(found, kinds):
        raise _damaged(folder / STATE)
    return found


def _read_state(path: Path, *, checked: bool) -> dict[str, Any]:
    if not path.exists():
        raise GrowkitError(f"{path}: no state to resume from; start without --resume")
    refuse_no_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            whole = not checked or archive.testzip() is None  # torch does not notice a flipped bit
        state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True) if whole else None
    except Exception as error:  # torch raises whatever its reader stumbles over
        if is_memory_full(error):
            raise
        state = None
    kinds = {"identity": dict, "step": int, "training": dict}
    if not isinstance(state, dict) or not all(isinstance(state.get(name), kind) for name, kind in kinds.items()):
        raise _damaged(path)
    return state


def _damaged(path: Path) -> DamagedStateError:
    return DamagedStateError(f"{path}: damaged; {ANEW}")


def clear(folder: Path) -> None:
    """Make `folder` ready for a new run: no state, no metrics and nothing of TensorBoard in it."""
    for path in (folder / STATE, folder / METRICS, *(folder / BOARD).glob("events.out.tfevents.*")):
        with writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)


def append_metrics(folder: Path, line: Mapping[str, Any]) -> None:
    """Append one JSON line to the folder's metrics."""
    with writing(folder / METRICS), (folder / METRICS).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(plain(line), allow_nan=False) + "\n")


def cut_metrics(folder: Path, step: int) -> None:
    """Drop metrics after `step`, which a resumed run writes again, and an incomplete last line."""
    path = folder / METRICS
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):  # a line that is not ours
            break
        kept.append(line)
    with whole_file(path) as partial:
        partial.write_bytes(b"".join(kept))
