"""Which layer of a file is the first to go wrong? Its values are compared with the model's, whatever their names.

Exporters name values as they like, so each layer's input and output is matched to the nearest of the graph's values
of the same shape.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from growkit.deploy.attention import prepared
from growkit.deploy.numbers import relative, rms

SAMPLE = 512  # elements that decide which value is nearest, before all are compared


@dataclass(frozen=True)
class Seen:
    """An input or output of a layer; `value` is an index into Traced.values."""

    layer: str
    side: str
    value: int

    @property
    def told(self) -> str:
        """Its name in a sentence."""
        name = self.layer or "the network"
        return f"the output of {name}" if self.side == "output" else f"the input of {name}"


@dataclass(frozen=True)
class Traced:
    """Inputs and outputs of every layer, in the order in which they were made."""

    seen: tuple[Seen, ...]
    values: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class FirstWrong:
    """The first value that differs from the model's and its error; the last right value before it."""

    where: Seen
    error: float
    before: Seen | None
    before_error: float

    @property
    def line(self) -> str:
        """The finding as a sentence."""
        what = (
            f"{self.where.layer or 'the network'} is the first layer whose output differs"
            if self.where.side == "output"
            else f"{self.where.told} is the first value that differs"
        )
        before = f" ({self.before.told} was right to {self.before_error:.1e})" if self.before else ""
        return f"{what}: relative RMS error {self.error:.1e}{before}"


def traced(model: nn.Module, images: np.ndarray, dtype: torch.dtype = torch.float64) -> Traced:
    """Run `model` in `dtype` on (B, C, H, W) images and keep the inputs and outputs of each layer.

    Attention is run with explicit softmax, so that the values inside it are seen.
    """
    model = prepared(model, "unfused").to(dtype)
    seen: list[Seen] = []
    values: list[np.ndarray] = []
    met: dict[tuple[int, int], int] = {}
    alive: list[Tensor] = []  # or ids would be reused

    def keep(layer: str, side: str, value: object) -> None:
        value = value[0] if isinstance(value, tuple) and value else value
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return
        key = (id(value), value._version)
        if key not in met:
            met[key] = len(values)
            alive.append(value)
            values.append(value.detach().numpy().astype(np.float32))
        seen.append(Seen(layer, side, met[key]))

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda _, given, name=name: keep(name, "input", given)))
        handles.append(module.register_forward_hook(lambda _, given, made, name=name: keep(name, "output", made)))
    with torch.no_grad():
        model(torch.from_numpy(images).to(dtype))
    for handle in handles:
        handle.remove()
    return Traced(tuple(seen), tuple(values))


def nearest(values: Sequence[np.ndarray], found: Iterable[Mapping[str, np.ndarray]]) -> list[float | None]:
    """Return, for each of `values`, the relative RMS error of the nearest value of the same shape in `found`.

    None where `found` has none of its shape, or where the value is constant and so says nothing.
    """
    errors: list[float | None] = [None] * len(values)
    places: dict[tuple[int, ...], list[int]] = {}
    for place, value in enumerate(values):
        if value.std() > 0:
            places.setdefault(value.shape, []).append(place)
    for part in found:
        for shape, wanted in places.items():
            candidates = [v.astype(np.float32) for v in part.values() if v.shape == shape and v.dtype.kind == "f"]
            if not candidates:
                continue
            sample = np.random.default_rng(0).permutation(candidates[0].size)[:SAMPLE]
            sampled = np.nan_to_num(np.stack([c.reshape(-1)[sample] for c in candidates]), posinf=1e30, neginf=-1e30)
            for place in wanted:
                value = values[place]
                distances = np.abs(sampled.astype(np.float64) - value.reshape(-1)[sample]).sum(axis=1)
                difference = candidates[int(distances.argmin())].astype(np.float64) - value
                error = relative(rms(difference), float(value.std()))
                error = error if np.isfinite(error) else float("inf")
                known = errors[place]
                errors[place] = error if known is None else min(known, error)
    return errors


def first_wrong(traced: Traced, errors: Sequence[float | None], limits: Sequence[float]) -> FirstWrong | None:
    """Find the first value over its limit in a layer whose output and those of all enclosing layers are wrong, too.

    errors, limits  of each of traced.values

    A value with no counterpart in the graph, as inside fused attention, looks wrong, but the values after it are right.
    """
    wrong = [error is None or not error <= limit for error, limit in zip(errors, limits, strict=True)]
    output_wrong = {s.layer: wrong[s.value] for s in traced.seen if s.side == "output"}
    before: Seen | None = None
    before_error = 0.0
    for seen in traced.seen:
        error = errors[seen.value]
        if error is None:
            continue
        if not wrong[seen.value]:
            before, before_error = seen, error
            continue
        parts = seen.layer.split(".") if seen.layer else []
        around = [".".join(parts[:count]) for count in range(len(parts) + 1)]
        if all(output_wrong.get(layer, True) for layer in around):
            return FirstWrong(seen, error, before, before_error)
    return None
