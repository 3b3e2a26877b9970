"""How long a run is, in updates."""

from dataclasses import dataclass

from growkit.errors import GrowkitError
from growkit.train import distributed
from growkit.train.batches import batches_per_epoch, images_per_batch
from growkit.train.data import Data
from growkit.train.settings import FitSettings


@dataclass(frozen=True)
class Length:
    """A run's length in updates: in total, of the warm-up, per epoch, between evaluations (0: only after the last)."""

    total: int
    warmup: int
    updates_per_epoch: float
    eval_every: int
    images_per_update: int

    def evaluates_at(self, step: int) -> bool:
        """Return whether the model is scored after update `step`, counted from 1."""
        return step == self.total or (self.eval_every > 0 and step > 0 and step % self.eval_every == 0)


def length_of(data: Data, settings: FitSettings) -> Length:
    """Return the length of a run on `data` with these settings.

    Raises:
        GrowkitError: there are no images, the warm-up is not shorter than the run, or a batch does not divide among
            the processes or into the pairs that are mixed.
    """
    images = images_per_batch(data, settings)
    if not images:
        raise GrowkitError("there are no images to train on")
    distributed.refuse_indivisible(images)
    each = images // distributed.size()
    if each % 2 and (settings.mixup or settings.cutmix):
        raise GrowkitError(
            f"--mixup and --cutmix pair the images of a batch, and {each} is odd;"
            f" set --batch-size {max(2, each - 1) * distributed.size()}"
        )
    updates_per_epoch = batches_per_epoch(data, settings) / settings.grad_accum_steps
    total = settings.steps or max(1, round(settings.epochs * updates_per_epoch))
    warmup = round((settings.warmup_epochs or 0) * updates_per_epoch)
    if settings.warmup_epochs is None:
        warmup = total // 20
    if warmup >= total:
        raise GrowkitError(
            f"--warmup-epochs {settings.warmup_epochs} ({warmup} updates) must be shorter than"
            f" the run ({total} updates)"
        )
    eval_every = round(settings.eval_every * updates_per_epoch)
    return Length(
        total=total,
        warmup=warmup,
        updates_per_epoch=updates_per_epoch,
        eval_every=max(1, eval_every) if settings.eval_every else 0,
        images_per_update=images * settings.grad_accum_steps,
    )
