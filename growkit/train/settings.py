"""The settings of a training run, from which the command line makes its options."""

from dataclasses import asdict, dataclass
from typing import Any

from growkit.errors import GrowkitError
from growkit.ranges import SEEDS, refuse_choice, refuse_outside

SCHEDULES = ("cosine", "constant")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
CACHES = ("none", "ram", "device")
AUTO = -1  # the batch size that asks for the largest that fits
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
COMPILE_AUTO = "auto"
COMPILE_MODES = ("default", *CUDA_GRAPHS, COMPILE_AUTO)


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """Settings of one run of `fit`, under timm's names where timm has one.

    An update is one step of the optimizer: grad_accum_steps batches of batch_size images.
    """

    epochs: float = 10.0
    """Passes over the training images; a part of one is fine."""

    steps: int | None = None
    """Updates to train for; replaces --epochs when given."""

    batch_size: int = 64
    """Images per batch."""

    grad_accum_steps: int = 1
    """Batches whose gradients make one update."""

    opt: str = "adamw"
    """Optimizer, by timm's name."""

    lr: float = 5e-4
    """Highest learning rate."""

    weight_decay: float = 0.05
    """Weight decay; biases and norms are left out."""

    clip_grad: float = 1.0
    """Clip the gradient to this norm; 0 leaves it alone."""

    sched: str = "cosine"
    """Learning rate after the warm-up: cosine or constant."""

    warmup_epochs: float | None = None
    """Epochs in which the learning rate rises to its highest; a twentieth of the run when left out."""

    min_lr: float = 0.0
    """Learning rate that the cosine falls to."""

    smoothing: float = 0.0
    """Label smoothing."""

    mixup: float = 0.0
    """Mixup alpha; 0 is off."""

    cutmix: float = 0.0
    """CutMix alpha; 0 is off."""

    aa: str | None = None
    """timm's AutoAugment policy, as in rand-m9-mstd0.5; replaces colour jitter."""

    hflip: float = 0.5
    """Probability of a horizontal flip."""

    scale_min: float = 0.08
    """Smallest share of the image's area that a random crop keeps; 1 cuts only the ends of images longer than 4:3."""

    color_jitter: float = 0.4
    """Strength of colour jitter; 0 is off."""

    reprob: float = 0.0
    """Probability of erasing a random rectangle."""

    model_ema: bool = False
    """Keep a moving average of the weights; evaluate and save that."""

    model_ema_decay: float = 0.9998
    """Decay that the moving average rises to."""

    precision: str = "auto"
    """auto, fp32, bf16 or fp16; auto is bf16 on GPUs that have it and fp32 elsewhere."""

    tf32: bool = False
    """Let CUDA multiply with 10-bit mantissas in training: TF32, and scaled float16 in an operator's ring."""

    compile: str | None = None
    """torch.compile's mode: default, reduce-overhead (CUDA graphs) or max-autotune; auto times whether it pays."""

    grad_checkpointing: bool = False
    """Compute each block again in the backward pass: less memory for a third more arithmetic."""

    seed: int = 0
    """Seed of every random choice."""

    cache: str = "none"
    """Keep images decoded: none, ram or device (its memory). Batches are then augmented on the device, without --aa."""

    shard: bool = False
    """Spread weights, gradients and moments over the processes of torchrun (FSDP2), for what one GPU cannot hold."""

    workers: int = 2
    """Processes that read images; they change the speed, never the result."""

    data_dir: str = "data"
    """Folder with the files of a timm dataset such as torch/cifar10."""

    dataset_download: bool = False
    """Fetch a timm dataset that is not in --data-dir."""

    val_split: str = "validation"
    """Split of a timm dataset to evaluate on, or the folder beside train/: val/ when left out."""

    eval_every: float = 1.0
    """Epochs between evaluations; the end is always evaluated, 0 evaluates only there."""

    log_every: int = 10
    """Updates between reported losses."""

    save_seconds: float = 300.0
    """Longest time in seconds between two saved states; each evaluation saves one too."""

    tensorboard: bool = False
    """Write TensorBoard files beside metrics.jsonl."""

    def __post_init__(self) -> None:
        """Raise GrowkitError on a value that no run can use, naming the option."""
        refuse_outside(self, "epochs", "lr", above=0)
        refuse_outside(self, "steps", "grad_accum_steps", "log_every", least=1)
        if self.batch_size != AUTO:
            refuse_outside(self, "batch_size", least=1)
        refuse_outside(self, "weight_decay", "clip_grad", "min_lr", least=0)
        refuse_outside(self, "warmup_epochs", "eval_every", "save_seconds", least=0)
        refuse_outside(self, "seed", least=0, most=SEEDS)
        refuse_outside(self, "workers", least=0, most=1024)
        refuse_outside(self, "color_jitter", least=0, most=10)
        refuse_outside(self, "hflip", "reprob", least=0, most=1)
        refuse_outside(self, "smoothing", "model_ema_decay", least=0, below=1)
        refuse_outside(self, "scale_min", above=0, most=1)
        for name in ("mixup", "cutmix"):
            refuse_outside(self, name, least=0)
            if getattr(self, name):  # a smaller alpha makes the draws NaN
                refuse_outside(self, name, least=0.001)
        if not self.val_split:
            raise GrowkitError("--val-split '': expected the name of a split, or of a folder beside train/")
        for name, choices in (("sched", SCHEDULES), ("precision", PRECISIONS), ("cache", CACHES)):
            refuse_choice(f"--{name}", getattr(self, name), choices)
        if self.compile is not None:
            refuse_choice("--compile", self.compile, COMPILE_MODES)
        if self.shard and self.compile in CUDA_GRAPHS and self.grad_accum_steps > 1:
            # sharding adds gradients up where the loop cannot move them out of the graphs' memory
            raise GrowkitError(
                f"--compile {self.compile} with --shard cannot add up gradients of --grad-accum-steps"
                f" {self.grad_accum_steps}; give --compile default"
            )


def recorded(settings: FitSettings) -> dict[str, Any]:
    """The settings by name, without `epochs` where `steps` replace them."""
    return {name: value for name, value in asdict(settings).items() if name != "epochs" or settings.steps is None}
