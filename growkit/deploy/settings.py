"""Settings of `growkit export` and `growkit verify`; nothing heavy is imported here."""

from dataclasses import dataclass

from growkit.deploy.form import LARGEST_BATCH, PRECISIONS, Form
from growkit.ranges import SEEDS, refuse_choice, refuse_outside


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What kind of ONNX file is made, and how it is checked before it appears."""

    target: str = "ort-1.15"
    """Oldest ONNX Runtime that must load it: ort-1.15 (opset 18), ort-1.18 (opset 20) or ort-1.23 (opset 23)."""
    precision: str = "fp32"
    """fp32, fp16, bf16, int8 (dynamic) or int8-static (needs --data to calibrate with)."""
    batch: int | None = None
    """The one batch size it takes; any when left out."""
    image_size: int | None = None
    """Height and width of its images, position embeddings resampled; the model's own when left out."""
    pixels: bool = False
    """Take uint8 images (batch, height, width, channels) of any size: resize, crop and normalise inside the file."""
    output: str = "logits"
    """What it answers with: logits, probabilities, or top-K as in top-5."""
    external_data: bool = False
    """Put the weights into a second file beside it, as anything over 2 GB must."""
    exporter: str = "dynamo"
    """dynamo, or torchscript where dynamo fails."""
    for_: str | None = None
    """cpu, cuda or tensorrt: try other graphs there, keep one that is measurably faster; portable when left out."""
    latency_seconds: float = 12.0
    """Longest time of one comparison of --for, in seconds."""
    max_accuracy_drop: float | None = None
    """Points of top-1 that the file may lose on --data; 0.1 in fp16, 0.5 in bf16 and 1.0 in int8 when left out."""
    max_batch: int = 8
    """Largest batch size the finished file is checked at, besides 1, 2, 3 and 5."""
    seed: int = 0
    """Seed of the images it is checked with and of the reference data."""

    def __post_init__(self) -> None:
        self.form()
        _refuse_numbers(self)

    def form(self) -> Form:
        """Return the form asked for, before a faster graph is searched for.

        Raises:
            GrowkitError: there is no such form.
        """
        return Form(
            target=self.target,
            precision=self.precision,
            exporter=self.exporter,
            batch=self.batch,
            image_size=self.image_size,
            pixels=self.pixels,
            output=self.output,
        )


@dataclass(frozen=True, kw_only=True)
class VerifySettings:
    """What a verification runs on and how long it may take."""

    precision: str | None = None
    """Precision that the file must have; the one it claims when left out."""
    max_accuracy_drop: float | None = None
    """Points of top-1 that the file may lose on --data; 0.1 in fp16, 0.5 in bf16 and 1.0 in int8 when left out."""
    provider: str = "cpu"
    """Where ONNX Runtime runs: cpu, cuda, tensorrt, or auto (CUDA if it really runs)."""
    max_batch: int = 8
    """Largest batch size to check, besides 1, 2, 3 and 5, and to time, besides 1."""
    seed: int = 0
    """Seed of the images, of the order of the timed runs and of the bootstrap."""
    latency: bool = True
    """Time the file against PyTorch and against a stock export of the same architecture."""
    latency_seconds: float = 12.0
    """Longest time of one latency comparison, in seconds; there are six, eight with --compiled."""
    latency_margin: float = 0.10
    """Fraction by which a file may be slower than the stock export and still count as equal."""
    max_latency_ratio: float | None = None
    """Fail when the file takes over this many times PyTorch's time; only reported when left out."""
    compiled: bool = False
    """Time the file against PyTorch compiled, too; compiling takes about half a minute per batch size."""
    throughput_seconds: float = 1.0
    """Seconds spent measuring images per second at each batch size 1, 2, 4, ...; 0 leaves them out."""
    throughput_batch: int | None = None
    """Largest batch size at which images per second are measured; --max-batch when left out."""

    def __post_init__(self) -> None:
        if self.precision is not None:
            refuse_choice("--precision", self.precision, PRECISIONS)
        _refuse_numbers(self)
        refuse_outside(self, "latency_margin", "throughput_seconds", least=0)
        refuse_outside(self, "max_latency_ratio", above=0)
        refuse_outside(self, "throughput_batch", least=1, most=LARGEST_BATCH)


@dataclass(frozen=True, kw_only=True)
class TritonSettings:
    """How an exported file is served by Triton: what goes into config.pbtxt."""

    name: str | None = None
    """Name of the model in the repository; the architecture's when left out."""
    version: int | None = None
    """Version to write; 1 for a new model when left out. A new number is added beside versions with the same inputs,
    outputs, preprocessing and labels; an existing one is replaced with --force."""
    max_batch: int = 32
    """Largest batch the server may form; a file with a fixed batch size is served as it is."""
    queue_delay: int = 0
    """Microseconds a request may wait for others to share its batch; with 0 only those already waiting do."""
    instances: int = 1
    """Copies of the model that run at the same time; with kind gpu, on each GPU."""
    kind: str = "cpu"
    """Where they run: cpu or gpu."""

    def __post_init__(self) -> None:
        refuse_outside(self, "version", "max_batch", "instances", least=1, prefix="triton_")
        refuse_outside(self, "queue_delay", least=0, prefix="triton_")


def _refuse_numbers(settings: ExportSettings | VerifySettings) -> None:
    refuse_outside(settings, "seed", least=0, most=SEEDS)
    refuse_outside(settings, "max_batch", least=1, most=LARGEST_BATCH)
    refuse_outside(settings, "latency_seconds", above=0)
    refuse_outside(settings, "max_accuracy_drop", least=0, most=100)
