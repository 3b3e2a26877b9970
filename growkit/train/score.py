"""How well a predictor does on labelled images: top-1, top-5, loss and calibration error."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from growkit.errors import GrowkitError
from growkit.float32 import multiplying
from growkit.ranges import refuse_labels
from growkit.train.batches import read_to_evaluate, val_batches
from growkit.train.data import Data, size_of
from growkit.train.distributed import sharded, size, summed
from growkit.train.precision import autocast
from growkit.train.progress import Progress, followed, no_progress
from growkit.train.resident import Resident
from growkit.train.settings import FitSettings

ECE_BINS = 15  # Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4


@dataclass(frozen=True)
class Scores:
    """Means over `count` images; top1, top5 and ece are fractions in [0, 1], loss is in nats."""

    top1: float
    top5: float
    loss: float
    ece: float
    count: int


def worse(before: Scores, after: Scores) -> bool:
    """Return whether top-1 fell by more than chance: by over two standard errors of the difference."""
    share = (before.top1 + after.top1) / 2
    return before.top1 - after.top1 > 2 * math.sqrt(2 * share * (1 - share) / after.count)


class Tally:
    """Accumulates scores: pass each batch of logits to `add`, then call `scores`. Errors call the model `name`.

    Sums stay on the logits' device until `gather` or `scores`, so that no batch waits for the GPU.
    """

    def __init__(self, name: str = "the model"):
        self.name, self.count = name, 0
        self._sums = torch.zeros(4, dtype=torch.float64)  # right answers, right in five, loss, outputs not finite
        self._bins = torch.zeros(2, ECE_BINS, dtype=torch.float64)  # sums of confidence and of right answers

    def add(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Count logits (N, classes) of images with labels (N,); return the predicted classes (N,).

        Raises:
            GrowkitError: a label has no logit.
        """
        require_labels(labels, logits.shape[1])
        logits = logits.detach().double()
        self._sums, self._bins = self._sums.to(logits.device), self._bins.to(logits.device)
        labels = labels.to(logits.device, non_blocking=True)
        finite = torch.isfinite(logits).all(-1)
        logprobs = logits.log_softmax(-1)
        loss = -logprobs.gather(1, labels[:, None]).sum()
        ranked = logprobs.topk(min(5, logits.shape[1])).indices
        right = ranked == labels[:, None]
        self._sums += torch.stack([right[:, 0].sum(), right.sum(), loss, (~finite).sum()])
        confidence = logprobs.amax(-1).exp()
        # bins are open below and closed above, as in the paper; a confidence is never 0
        place = (confidence.nan_to_num() * ECE_BINS).ceil().long().clamp(1, ECE_BINS) - 1
        self._bins.index_add_(1, place, torch.stack([confidence, right[:, 0].double()]))
        self.count += len(labels)
        return ranked[:, 0]

    def gather(self) -> None:
        """Sum the counts of all processes, each of which scored its part of the images."""
        self._sums, self._bins = summed(self._sums.cpu()), summed(self._bins.cpu())
        self.count = int(summed(torch.tensor(self.count, dtype=torch.float64)))

    def scores(self) -> Scores:
        """Return the means so far.

        Raises:
            GrowkitError: there were no images, or some outputs were not finite.
        """
        count = self.count
        if count == 0:
            raise GrowkitError("there are no images to evaluate on")
        top1, top5, loss, broken = self._sums.tolist()
        if broken:
            raise GrowkitError(
                f"{self.name}'s outputs are not finite for {int(broken)} of {count} images;"
                " try --precision fp32, or train with a lower --lr"
            )
        ece = float((self._bins[0] - self._bins[1]).abs().sum()) / count
        return Scores(top1=top1 / count, top5=top5 / count, loss=loss / count, ece=ece, count=count)


def evaluate(
    predict: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
) -> Scores:
    """Score `predict`, which maps images (N, C, H, W) to logits (N, classes), on labelled batches.

    With fewer than five classes top5 counts all of them. With several processes, each passes its part of the images, as
    from `val_batches`, and gets the scores of all.

    Raises:
        GrowkitError: there are no images, a label has no logit, or the logits are not finite.
    """
    tally = Tally()
    for images, labels in batches:
        tally.add(predict(images), labels)
    tally.gather()
    return tally.scores()


def score_model(
    model: nn.Module,
    data: Data,
    settings: FitSettings,
    device: torch.device,
    *,
    progress: Progress = no_progress,
) -> Scores:
    """Score a torch model on the validation images of `data`; the model is moved to the device."""
    predict = predictor(model.to(device), device, settings.precision)
    batches = val_batches(data, settings, device=device)
    return evaluate(predict, followed(batches, -(-size_of(data.val) // size()), progress))


def read_through(data: Data, settings: FitSettings, device: torch.device, *, progress: Progress = no_progress) -> None:
    """Read the validation images once, only to find unreadable ones now.

    Raises:
        GrowkitError: an image cannot be read; this would otherwise end a run at its first evaluation, hours later.
    """
    if isinstance(data.val, Resident):
        data.val.decoded.on(device)
        return
    for _ in followed(read_to_evaluate(data, settings), -(-size_of(data.val) // size()), progress):
        pass


def require_labels(labels: Tensor, outputs: int) -> None:
    """Raise GrowkitError when a label has no logit among `outputs`."""
    refuse_labels(int(labels.min()), int(labels.max()), outputs)


def predictor(model: nn.Module, device: torch.device | str, precision: str = "auto") -> Callable[[Tensor], Tensor]:
    """Make the predictor that `evaluate` takes from a torch model on `device`.

    Each call runs the model in evaluation mode and then restores every module's own mode.
    """
    device = torch.device(device)

    def predict(images: Tensor) -> Tensor:
        # a sharded model uses again in training what it gathers here
        without_gradients = torch.no_grad() if sharded(model) else torch.inference_mode()
        with mode_kept(model), without_gradients, multiplying(tf32=False), autocast(precision, device):
            logits: Tensor = model.eval()(images.to(device, non_blocking=True))
            return logits

    return predict


@contextmanager
def mode_kept(model: nn.Module) -> Iterator[None]:
    """On exit, restore every module's own mode, training or evaluation."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        model.train(modes[0][1])  # a model may hold modules that modules() does not list
        for module, mode in modes:
            module.training = mode
