"""What float16, bfloat16 and int8 cost a model, and which planted defects the gate's limits see.

    python examples/benchmarks/precision.py --model run/trained --data images/ --out precision.json

Without --data the images are noise, and the weights of a bare timm name are random: good for times, not for limits.
bfloat16 is computed in float32 arithmetic with every result rounded: ONNX Runtime has no bfloat16 kernels on a CPU.
"""

import argparse
import copy
import functools
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import timm
import torch
from onnx import numpy_helper
from torch import nn

from growkit.deploy import int8, sixteen_bits
from growkit.deploy.export import export_onnx
from growkit.deploy.limits import LIMITS, accuracy_drop_interval
from growkit.deploy.runtime import environment, open_session
from growkit.deploy.stored_weights import explain, stored_in
from growkit.deploy.timing import Call, compare
from growkit.deploy.truth import logits_of, noise_images, preprocessing, truth_of
from growkit.deploy.yardstick import in_precision
from growkit.files import as_json
from growkit.source import load_source

PRECISIONS = {"fp16": "fp16", "bf16": "bf16", "int8": "int8", "int8-static": "int8"}
AT_ONCE = 16
OVERFLOWS = 3e4  # the residual stream times this is beyond float16, the logits are the same

Change = Callable[[onnx.ModelProto], None]


@dataclass(frozen=True)
class Subject:
    """A model, its float32 graph and its float64 logits on the images."""

    name: str
    model: nn.Module
    proto: onnx.ModelProto
    images: np.ndarray
    calibration: np.ndarray
    truth: np.ndarray
    own: dict[str, np.ndarray] = field(default_factory=dict)  # errors of PyTorch by precision, each computed once

    def errors_of_pytorch(self, precision: str) -> np.ndarray:
        """What PyTorch's own logits in a precision are off the truth."""
        if precision not in self.own:
            yardstick = in_precision(self.model, precision)
            self.own[precision] = batched(lambda x: logits_of(yardstick, x), self.images) - self.truth
        return self.own[precision]

    def lowered(self, kind: str, proto: onnx.ModelProto | None = None) -> onnx.ModelProto:
        """The graph, or a changed one, in a precision."""
        proto = proto or self.proto
        if kind == "fp16":
            return sixteen_bits.half(proto, images=self.calibration)
        if kind == "bf16":
            return sixteen_bits.brain(proto)
        return int8.int8_dynamic(proto) if kind == "int8" else int8.int8_static(proto, self.calibration)


def main() -> None:
    """Measure, print two tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="trained model (folder or file), or a timm name")
    parser.add_argument("--data", help="ImageFolder: val/ for evaluation, train/ for calibration")
    parser.add_argument("--images", type=int, default=256, help="images that errors are measured on")
    parser.add_argument("--calibration", type=int, default=128, help="images that int8-static is calibrated with")
    parser.add_argument("--samples", type=int, default=4000, help="labelled images that accuracy is measured on")
    parser.add_argument("--seconds", type=float, default=4.0, help="longest time per latency comparison; 0: none")
    parser.add_argument("--no-defects", action="store_true", help="skip the planted defects")
    parser.add_argument("--out", type=Path, help="JSON file with hardware and versions")
    arguments = parser.parse_args()

    model, images, calibration, labelled = opened(arguments)
    trained = subject("trained" if labelled else "random", model, images, calibration)
    rows = [healthy(trained, kind, arguments.seconds, labelled) for kind in PRECISIONS]
    scaled = functools.cache(lambda: subject("overflowing", overflowing(model), images, calibration))
    if labelled:
        for other in (scaled(), subject("random", random_weights(model), images, calibration)):
            rows += [healthy(other, kind, 0, None) for kind in PRECISIONS]
        rows.append(healthy(on_noise(trained), "int8-static", 0, None))
    print(table(rows))
    defects = [] if arguments.no_defects else planted(trained, scaled())
    if defects:
        print("\n" + table(defects))
    if arguments.out:
        content = {"command": shlex.join(sys.argv), "environment": environment(), "files": rows, "defects": defects}
        arguments.out.write_text(as_json(content), encoding="utf-8")


def opened(arguments: argparse.Namespace) -> tuple[nn.Module, np.ndarray, np.ndarray, tuple[np.ndarray, ...] | None]:
    """The model, images for evaluation, images for calibration, and the labelled images if there are any."""
    given = arguments.model
    source = load_source(given) if Path(given).exists() else None
    model = source.model().eval() if source else random_weights(timm.create_model(given))
    if not arguments.data or source is None:
        noise = noise_images(preprocessing(model), arguments.images + arguments.calibration, 0)
        return model, noise[: arguments.images], noise[arguments.images :], None
    from growkit.train.batches import val_batches
    from growkit.train.data import open_data
    from growkit.train.settings import FitSettings

    reading = FitSettings(batch_size=250, workers=0)
    data = open_data(arguments.data, source.preprocessing, reading)
    batches = [(x.numpy(), y.numpy()) for x, y in val_batches(data, reading)]
    images, classes = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    generator = np.random.default_rng(0)
    order = generator.permutation(len(images))
    train: Any = data.train
    train.transform = data.val.transform  # type: ignore[attr-defined]
    picked = generator.permutation(len(train))[: arguments.calibration]
    calibration = data.normalised(torch.stack([train[int(index)][0] for index in picked])).numpy()
    judged = order[: arguments.samples]
    return model, images[order[: arguments.images]], calibration, (images[judged], classes[judged])


def subject(name: str, model: nn.Module, images: np.ndarray, calibration: np.ndarray) -> Subject:
    """Export a model and run it in float64."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        export_onnx(model, file)
        proto = onnx.load(str(file))
    truth = truth_of(model)
    expected = batched(lambda x: logits_of(truth, x), images)
    return Subject(name, model, proto, images, calibration, expected)


def on_noise(given: Subject) -> Subject:
    """The same model, calibrated with data but evaluated on noise."""
    noise = noise_images(preprocessing(given.model), min(64, len(given.images)), 0)
    truth = truth_of(given.model)
    expected = batched(lambda x: logits_of(truth, x), noise)
    return Subject("judged on noise", given.model, given.proto, noise, given.calibration, expected)


def overflowing(model: nn.Module) -> nn.Module:
    """The same function with a residual stream that overflows float16: layer norms remove the factor again."""
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in scaled.named_parameters():
            if any(
                part in f".{name}" for part in (".cls_token", ".pos_embed", ".patch_embed.", ".attn.proj.", ".fc2.")
            ):
                parameter *= OVERFLOWS
    return scaled


def random_weights(model: nn.Module) -> nn.Module:
    """Every parameter random: norms around 1, biases and tokens around 0, matrices that keep the scale."""
    drawn = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in drawn.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            matrix = parameter.ndim > 1 and "token" not in name and "pos_embed" not in name
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(noise * parameter[0].numel() ** -0.5 if matrix else centre + 0.1 * noise)
    return drawn


# errors -----------------------------------------------------------------------------------------


def batched(run: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> np.ndarray:
    """Run in batches of AT_ONCE, the last one smaller."""
    return np.concatenate([run(images[start : start + AT_ONCE]) for start in range(0, len(images), AT_ONCE)])


def opened_file(proto: onnx.ModelProto, emulate: bool) -> Callable[[np.ndarray], np.ndarray]:
    """The run call of a fresh session on ONNX Runtime's CPU provider, in emulated arithmetic or its own."""
    ready = sixteen_bits.emulated(proto) if emulate else proto
    return open_session(ready.SerializeToString(), optimise=not emulate).run


def errors(given: Subject, proto: onnx.ModelProto, kind: str) -> dict[str, float | None]:
    """Every measure of the gate for a file, on the subject's images."""
    emulate = kind in ("fp16", "bf16")
    run = opened_file(proto, emulate)
    got = batched(run, given.images).astype(np.float64)
    truth, off = given.truth, got - given.truth
    own = given.errors_of_pytorch(PRECISIONS[kind])
    cosine = (got * truth).sum(1) / (np.linalg.norm(got, axis=1) * np.linalg.norm(truth, axis=1))
    found = {
        "relative_rms": rms(off) / truth.std(),
        "noise_ratio": rms(off) / rms(own),
        "cosine": float(np.median(cosine)),
        "cosine_min": float(cosine.min()),
        "sqnr_db": 20 * np.log10(rms(truth) / rms(off)),
        "largest": float(np.abs(off).max() / truth.std()),
        "agreement": float((got.argmax(1) == truth.argmax(1)).mean()),
    }
    if kind == "fp16":
        unrounded = batched(opened_file(proto, False), given.images) - truth
        found["relative_rms_cpu"] = rms(unrounded) / truth.std()
    single = np.concatenate([run(image[None]) for image in given.images[:AT_ONCE]])
    found["invariance"] = rms(single - got[: len(single)]) / truth.std()
    measures: dict[str, float | None] = {name: float(value) for name, value in found.items()}
    if not np.isfinite(own).all():
        measures["noise_ratio"] = None  # float16 overflows in PyTorch: there is no yardstick
    return measures


def rms(values: np.ndarray) -> float:
    """Root mean square in float64."""
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def over(found: Mapping[str, float | None], kind: str) -> list[str]:
    """Names of the limits that are exceeded; NaN exceeds every one."""
    broken = []
    for name in ("relative_rms", "noise_ratio", "largest", "invariance", "cosine", "cosine_min"):
        value, limit = found[name], getattr(LIMITS[kind], name)
        if value is None or limit is None:
            continue
        if not (value >= limit if name.startswith("cosine") else value <= limit):
            broken.append(name)
    return broken


def unexplained(model: nn.Module, proto: onnx.ModelProto) -> list[str]:
    """Stored tensors that are not the model's, and model tensors that are not stored; single numbers are ignored."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    told = {s.name: explain(s, state) for s in stored_in(proto) if s.array.size > 1 or s.array.dtype.kind in "iu"}
    missing = set(state) - {name for name in told.values() if name} - {n for n, a in state.items() if not a.any()}
    return [name for name, found in told.items() if found is None] + sorted(missing)


def healthy(given: Subject, kind: str, seconds: float, labelled: tuple[np.ndarray, ...] | None) -> dict[str, Any]:
    """One row: a file without defects."""
    proto = given.lowered(kind)
    found = errors(given, proto, kind)
    row: dict[str, Any] = {"model": given.name, "file": kind, **found}
    row["megabytes"] = proto.ByteSize() / 1e6
    row["of_float32"] = proto.ByteSize() / given.proto.ByteSize()
    row["over_its_limit"] = over(found, kind)
    row["unexplained"] = unexplained(given.model, proto)
    if labelled:
        images, classes = labelled
        right = batched(opened_file(proto, kind in ("fp16", "bf16")), images).argmax(1) == classes
        plain_right = batched(lambda x: logits_of(given.model, x), images).argmax(1) == classes
        lost, won = int((plain_right & ~right).sum()), int((right & ~plain_right).sum())
        drop, low, high = accuracy_drop_interval(lost, won, len(classes))
        row |= {"samples": len(classes), "top1": 100 * float(plain_right.mean()), "drop": drop}
        row |= {"drop_low": low, "drop_high": high, "lost": lost, "won": won}
    if seconds and kind != "bf16":
        for batch in (1, 8):
            images = given.images[:batch]

            def calls(ready: onnx.ModelProto, images: np.ndarray = images) -> Callable[[], Call]:
                data = ready.SerializeToString()

                def fresh() -> Call:
                    session = open_session(data)
                    return lambda: session.run(images)

                return fresh

            timed = compare(calls(proto), calls(given.proto), batch=batch, seconds=seconds)
            row[f"time_b{batch}"] = [timed.ratio, timed.low, timed.high]
    return row


# defects ----------------------------------------------------------------------------------------


def planted(given: Subject, scaled: Subject) -> list[dict[str, Any]]:
    """One row per precision and defect: what the checks of numbers and weights find; the last one is in `scaled`."""
    rows = []
    for kind in PRECISIONS:
        for name, change in DEFECTS.items():
            graph = copied(given.proto)
            change(Planting(given.model, graph))
            rows.append(seen(given, kind, name, given.lowered(kind, graph)))
        for name, damage in AFTERWARDS.get(kind, {}).items():
            proto = given.lowered(kind)
            damage(proto)
            rows.append(seen(given, kind, name, proto))
    rows.append(
        seen(scaled, "fp16", "nothing kept in float32", sixteen_bits.lowered(scaled.proto, sixteen_bits.HALF, ()))
    )
    return rows


def seen(given: Subject, kind: str, name: str, proto: onnx.ModelProto) -> dict[str, Any]:
    """One row of the defects' table."""
    found = errors(given, proto, kind)
    return {
        "file": kind,
        "defect": name,
        **{key: found[key] for key in ("relative_rms", "noise_ratio", "cosine", "cosine_min", "agreement")},
        "over_its_limit": over(found, kind),
        "unexplained": unexplained(given.model, proto),
    }


def copied(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy to change."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    return made


@dataclass(frozen=True)
class Planting:
    """A float32 graph to damage, addressed by the model's tensor names."""

    model: nn.Module
    proto: onnx.ModelProto

    def value(self, name: str) -> np.ndarray:
        """The model's tensor."""
        return self.model.state_dict()[name].numpy()

    def write(self, name: str, value: np.ndarray) -> None:
        """Store `value` where the graph holds the model's tensor `name`."""
        for tensor in self.proto.graph.initializer:
            array, own = numpy_helper.to_array(tensor), self.value(name)
            if array.shape == own.shape and np.array_equal(array, own):
                tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), tensor.name))
                return
            if own.ndim == 2 and array.shape == own.T.shape and np.array_equal(array, own.T):
                tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value.T), tensor.name))
                return
        raise SystemExit(f"no tensor {name} in the graph")

    @property
    def heads(self) -> tuple[int, int]:
        """How many heads, and how wide they are."""
        attention = self.model.blocks[0].attn
        return attention.num_heads, attention.head_dim


def zeroed(name: str) -> Callable[[Planting], None]:
    """Set a whole tensor to 0."""
    return lambda p: p.write(name, np.zeros_like(p.value(name)))


def one(name: str, factor: float) -> Callable[[Planting], None]:
    """Multiply a tensor's largest element by `factor`."""

    def change(p: Planting) -> None:
        value = p.value(name).copy()
        value.flat[np.abs(value).argmax()] *= factor
        p.write(name, value)

    return change


def heads_swapped(p: Planting) -> None:
    """Swap q of two heads, weights and biases."""
    _, width = p.heads
    for name in ("blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias"):
        value = p.value(name).copy()
        value[: 2 * width] = np.roll(value[: 2 * width], width, axis=0)
        p.write(name, value)


def channels_swapped(p: Planting) -> None:
    """Swap two output channels of one weight."""
    value = p.value("blocks.1.mlp.fc1.weight").copy()
    value[[3, 11]] = value[[11, 3]]
    p.write("blocks.1.mlp.fc1.weight", value)


def attention_scale(p: Planting) -> None:
    """Scale attention by 1 / sqrt(width - 1)."""
    _, width = p.heads
    for tensor in p.proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.size == 1 and np.allclose(array, width**-0.5):
            tensor.CopyFrom(numpy_helper.from_array(np.float32((width - 1) ** -0.5), tensor.name))


def epsilon(value: float) -> Callable[[Planting], None]:
    """Set the epsilon of every layer norm."""

    def change(p: Planting) -> None:
        for node in p.proto.graph.node:
            for attribute in node.attribute:
                if attribute.name == "epsilon":
                    attribute.f = value

    return change


DEFECTS: dict[str, Callable[[Planting], None]] = {
    "one proj bias dropped": zeroed("blocks.1.attn.proj.bias"),
    "one qkv bias dropped": zeroed("blocks.0.attn.qkv.bias"),
    "one bias element zeroed": one("blocks.0.attn.proj.bias", 0.0),
    "q of two heads swapped": heads_swapped,
    "two channels of fc1 swapped": channels_swapped,
    "one weight + 1 %": one("blocks.0.mlp.fc2.weight", 1.01),
    "one weight x 2": one("blocks.0.mlp.fc2.weight", 2.0),
    "positions shifted": lambda p: p.write("pos_embed", np.roll(p.value("pos_embed"), 1, axis=1)),
    "attention scale 1/sqrt(d - 1)": attention_scale,
    "layer norm epsilon 1e-5": epsilon(1e-5),
    "layer norm epsilon 1e-3": epsilon(1e-3),
}


def first_weight(proto: onnx.ModelProto) -> onnx.TensorProto:
    """The first int8 matrix."""
    return next(t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2)


def per_tensor(proto: onnx.ModelProto) -> None:
    """Use one scale for all channels of the first int8 matrix."""
    weight = first_weight(proto)
    scale = next(t for t in proto.graph.initializer if t.name == weight.name.replace("_quantized", "_scale"))
    steps, array = numpy_helper.to_array(scale), numpy_helper.to_array(weight)
    shaped = steps if len(steps) == array.shape[1] else steps[:, None]
    common = np.full_like(steps, steps.max())
    weight.CopyFrom(numpy_helper.from_array(np.rint(array * shaped / steps.max()).astype(np.int8), weight.name))
    scale.CopyFrom(numpy_helper.from_array(common, scale.name))


def scales_rolled(proto: onnx.ModelProto) -> None:
    """Shift the first matrix's scales by one channel."""
    name = first_weight(proto).name.replace("_quantized", "_scale")
    scale = next(t for t in proto.graph.initializer if t.name == name)
    scale.CopyFrom(numpy_helper.from_array(np.roll(numpy_helper.to_array(scale), 1), scale.name))


def one_step(proto: onnx.ModelProto) -> None:
    """Move one weight by one quantisation step."""
    weight = first_weight(proto)
    array = numpy_helper.to_array(weight).copy()
    array[0, 0] += 1 if array[0, 0] < 100 else -1
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))


def range_halved(proto: onnx.ModelProto) -> None:
    """Halve the first calibrated scale, so that larger activations are clipped."""
    name = next(n.input[1] for n in proto.graph.node if n.op_type == "QuantizeLinear")
    scale = next(t for t in proto.graph.initializer if t.name == name)
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) / np.float32(2), scale.name))


IN_INT8: dict[str, Change] = {
    "one matrix by one scale": per_tensor,
    "scales one channel off": scales_rolled,
    "one weight one step off": one_step,
}
AFTERWARDS: dict[str, dict[str, Change]] = {
    "int8": IN_INT8,
    "int8-static": {**IN_INT8, "one calibrated range halved": range_halved},
}


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table, with every column that any row has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(shown(row.get(name, "")) for name in columns) + " |")
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A cell."""
    if isinstance(value, list):
        words = [shown(entry) for entry in value]
        if value and isinstance(value[0], float):
            return f"{words[0]} [{', '.join(words[1:])}]"
        return ", ".join(words[:2]) + (f" and {len(words) - 2} more" if len(words) > 2 else "") or "none"
    if value is None:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
