"""Where an error comes from: ONNX Runtime's graph optimiser, ONNX Runtime or the export; and which layer starts it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from growkit.deploy.checks import Check
from growkit.deploy.form import Form
from growkit.deploy.layers import first_wrong, nearest, traced
from growkit.deploy.limits import Limits
from growkit.deploy.numbers import Truth, in_batches, relative, rms
from growkit.deploy.parts import core_session, inner_graph, tapped_session
from growkit.deploy.runtime import Session
from growkit.deploy.store import weight_bytes
from growkit.deploy.truth import Preprocessing
from growkit.errors import first_line

EVALUATED = 200 * 2**20  # bytes of weights: ONNX's own evaluator is slow
CLEARLY = 3  # an error this many times smaller is a different result, not different noise
NOISE = 10  # a layer is wrong if its error is this many times PyTorch's own in float32
AT_ONCE = 64  # values of a graph that are fetched together, to limit memory


@dataclass(frozen=True)
class Failing:
    """The first run whose numbers are wrong.

    name    of the run: 'batch 3', 'black'
    images  (N, C, H, W), run `batch` at a time
    wanted  logits in float64 (N, classes)
    """

    name: str
    images: np.ndarray
    wanted: np.ndarray
    batch: int


@dataclass(frozen=True)
class Diagnosis:
    """`layer` is where the first wrong value appears, empty if none stands out; `line` is the whole finding."""

    layer: str
    line: str


def failing_run(checks: Sequence[Check], known: Truth) -> Failing | None:
    """Return the first run that failed a check of the group 'numbers'."""
    failed = {c.name.partition(": ")[0] for c in checks if c.verdict == "fail" and c.group == "numbers"}
    if not failed:
        return None
    first = known.batches[0]
    batch = next((b for b in known.batches if f"batch {b}" in failed), None)
    if batch is None and (name := next((name for name in known.extremes if name in failed), None)):
        return Failing(name, *known.extremes[name], first)
    batch = batch or first
    count = len(known.images) if batch == first else batch
    return Failing(f"batch {batch}", known.images[:count], known.expected[:count], batch)


def told(failing: Failing, known: Truth, seed: int) -> dict[str, int | str]:
    """Return what is needed to make the images of `failing` again (see reproduce.py)."""
    return {
        "run": failing.name,
        "batch": failing.batch,
        "seed": seed,
        "made": len(known.images),
        "used": len(failing.images),
    }


def diagnose(
    file: Path,
    form: Form,
    prepared: Preprocessing,
    truth: nn.Module,
    failing: Failing,
    spread: float,
    limits: Limits,
    core: Session,
) -> Diagnosis:
    """Say where the wrong numbers of `failing` come from.

    truth   the model in float64
    spread  standard deviation of its logits, the unit of errors
    core    the network of `file` that gave the wrong numbers
    """
    few, wanted = failing.images[: failing.batch], failing.wanted[: failing.batch]
    if len(few) < failing.batch:  # one image for a file with a fixed batch size
        few, wanted = (np.repeat(a[:1], failing.batch, axis=0) for a in (few, wanted))

    def off(got: np.ndarray) -> float:
        error = relative(rms(got.astype(np.float64) - wanted), spread) if got.shape == wanted.shape else math.inf
        return error if math.isfinite(error) else math.inf

    try:
        plain = core_session(file, form, prepared, provider=core.provider, optimise=False)
        with_it, without = (off(in_batches(session, few, failing.batch)) for session in (core, plain))

        def right(error: float) -> bool:
            return error <= limits.relative_rms and error < with_it / CLEARLY

        optimiser = right(without)
        if optimiser:
            origin = "an optimiser bug: with ONNX Runtime's graph optimisation off the numbers are right"
        else:
            origin = _second_opinion(file, form, prepared, few, lambda got: right(off(got)))
        if form.precision == "bf16":  # emulated, it has no inner values to inspect
            return Diagnosis("", f"{origin}; the layer is not searched for in bfloat16")
        values = _values(file, form, prepared, few, provider=core.provider, optimise=optimiser)
        trace = traced(truth, few)
        allowed = [limits.relative_rms] * len(trace.values)
        if form.precision == "fp32":  # small errors grow from layer to layer: noise shows where they begin
            own = traced(truth, few, torch.float32)
            allowed = [
                min(limits.relative_rms, NOISE * relative(rms(a.astype(np.float64) - b), float(b.std())))
                for a, b in zip(own.values, trace.values, strict=True)
            ]
        errors = nearest(trace.values, values)
        found = first_wrong(trace, errors, allowed)
    except Exception as error:  # a damaged file fails in a dozen ways; its own checks report it
        line = first_line(error)
        return Diagnosis("", f"not found: the file does not run ({line[:160]})")
    if found is None:
        last = errors[trace.seen[-1].value]
        after = last is not None and last <= limits.relative_rms
        where = "every layer is right: the error comes after the last" if after else "no single layer stands out"
        return Diagnosis("", f"{origin}; {where}, on {failing.name}")
    return Diagnosis(found.where.layer, f"{origin}; {found.line}")


def _second_opinion(
    file: Path,
    form: Form,
    prepared: Preprocessing,
    images: np.ndarray,
    right: Callable[[np.ndarray], bool],
) -> str:
    """Run the same file in ONNX's own evaluator, which shares no code with ONNX Runtime, and say whose bug it is."""
    from onnx.reference import ReferenceEvaluator

    export = "an error in the file, by its export or an edit: it stays with ONNX Runtime's graph optimisation off"
    proto = inner_graph(file, form, prepared, weights=True)
    if weight_bytes(proto) > EVALUATED:
        return f"{export} (too large for ONNX's reference evaluator)"
    try:
        with np.errstate(all="ignore"):  # an overflow is what is looked for
            got = np.asarray(ReferenceEvaluator(proto).run(["logits"], {"input": images})[0])
    except Exception as error:  # operators it does not know, above all ONNX Runtime's own
        return f"{export} (ONNX's reference evaluator does not run it: {type(error).__name__})"
    if right(got):
        return "a runtime bug: ONNX's reference evaluator computes the right numbers from the same file"
    return f"{export} and in ONNX's reference evaluator"


def _values(
    file: Path, form: Form, prepared: Preprocessing, images: np.ndarray, *, provider: str, optimise: bool
) -> Iterator[Mapping[str, np.ndarray]]:
    """Yield all values inside the network, a part at a time."""
    proto = inner_graph(file, form, prepared)
    yield {"input": images}
    names = [name for node in proto.graph.node for name in node.output if name and node.op_type != "Constant"]
    for start in range(0, len(names), AT_ONCE):
        part = names[start : start + AT_ONCE]
        yield tapped_session(proto, file.parent, part, provider=provider, optimise=optimise).outputs(images)
