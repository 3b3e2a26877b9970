"""The form of an ONNX file: which runtime it loads on, its precision, its inputs and outputs.

The file carries its form in its metadata, so that a check knows what to expect of it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from growkit.errors import GrowkitError
from growkit.ranges import refuse_choice

KEY = "growkit.form"  # in the file's metadata
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int8-static")
ATTENTIONS = ("unfused", "standard", "contrib")
EXPORTERS = ("dynamo", "torchscript")
LARGEST_BATCH = 4096
LARGEST_IMAGE = 2048  # a file may claim any size, and checks make images of that size
CONTRIB = "com.microsoft"  # the domain of ONNX Runtime's own operators


@dataclass(frozen=True)
class Target:
    """The opset and IR version that a file needs to load on the ONNX Runtime release it targets."""

    opset: int
    ir: int


# measured: deployment figures in docs/serving.md say which release loads which file
TARGETS = {"ort-1.15": Target(18, 8), "ort-1.18": Target(20, 9), "ort-1.23": Target(23, 11)}


@dataclass(frozen=True, kw_only=True)
class Form:
    """The form of one file.

    target      a key of TARGETS
    precision   of PRECISIONS; inputs and outputs are float32 in all of them
    attention   unfused: explicit softmax; standard: ai.onnx Attention (opset 23); contrib: ONNX Runtime's own
    exporter    of EXPORTERS
    batch       the one batch size the file takes; None: any
    image_size  height and width where they are not the model's own
    pixels      takes uint8 images (batch, height, width, channels) of any size instead of normalised float32
    output      logits, probabilities, or top-K: the K largest probabilities and their classes
    """

    target: str = "ort-1.15"
    precision: str = "fp32"
    attention: str = "unfused"
    exporter: str = "dynamo"
    batch: int | None = None
    image_size: int | None = None
    pixels: bool = False
    output: str = "logits"

    def __post_init__(self) -> None:
        for option, value, known in (
            ("--target", self.target, tuple(TARGETS)),
            ("--precision", self.precision, PRECISIONS),
            ("--exporter", self.exporter, EXPORTERS),
            ("attention", self.attention, ATTENTIONS),
        ):
            refuse_choice(option, value, known)
        if self.batch is not None and not 1 <= self.batch <= LARGEST_BATCH:
            raise GrowkitError(f"--batch {self.batch}: expected 1 to {LARGEST_BATCH}; leave it out for any batch size")
        if self.image_size is not None and not 1 <= self.image_size <= LARGEST_IMAGE:
            raise GrowkitError(f"--image-size {self.image_size}: expected 1 to {LARGEST_IMAGE}")
        if self.output not in ("logits", "probabilities") and self.top is None:
            raise GrowkitError(f"--output {self.output}: unknown; choose logits, probabilities or top-K as in top-5")
        if self.attention == "standard" and self.opset < 23:
            raise GrowkitError(f"the standard Attention operator needs --target ort-1.23, not {self.target}")
        if self.exporter == "torchscript" and (self.opset > 20 or self.attention != "unfused"):
            raise GrowkitError("--exporter torchscript writes up to opset 20: choose --target ort-1.15 or ort-1.18")

        if self.precision == "int8-static" and self.opset >= 23:
            # measured: 1.23 has no QuantizeLinear of opset 23
            raise GrowkitError(f"--precision int8-static: not for --target {self.target}; ort-1.18 loads there, too")

    @property
    def opset(self) -> int:
        """Version of the ai.onnx operators."""
        return TARGETS[self.target].opset

    @property
    def ir(self) -> int:
        """IR version of the file."""
        return TARGETS[self.target].ir

    @property
    def top(self) -> int | None:
        """K of output top-K."""
        found = re.fullmatch(r"top-0*([1-9][0-9]{0,17})", self.output)
        return int(found[1]) if found else None

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the file's outputs."""
        return ("scores", "classes") if self.top else (self.output,)

    def batches_timed(self, largest: int) -> tuple[int, ...]:
        """The batch sizes that a file of this form is timed at: its own, or else 1 and `largest`."""
        return (self.batch,) if self.batch else tuple(sorted({1, largest}))

    def text(self) -> str:
        """Return the form as the file stores it."""
        return json.dumps(asdict(self), sort_keys=True)


PLAIN = Form()


def form_of(props: Mapping[str, str]) -> Form:
    """Return the form that a file's metadata claims; the default one if it claims none.

    Raises:
        GrowkitError: the claim is not one that growkit writes.
    """
    if KEY not in props:
        return PLAIN
    try:
        stored: Any = json.loads(props[KEY])
        unknown = sorted(set(stored) - {f.name for f in fields(Form)})
        if unknown:
            raise ValueError(f"{unknown[0]} is unknown")
        for f in fields(Form):
            value = stored.get(f.name, f.default)
            if type(value) not in ((int, type(None)) if f.default is None else (type(f.default),)):
                raise ValueError(f"{f.name} is {value!r}")
        return Form(**stored)
    except (TypeError, ValueError, AttributeError, RecursionError, GrowkitError) as error:
        line = f"the file's metadata {KEY} is not readable ({str(error)[:160]}); export it again"
        raise GrowkitError(line) from None
