"""How many images fit a device's memory, and an error that says so when they do not."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from traceback import clear_frames

import torch
from torch import Tensor, nn

from growkit.errors import GrowkitError, is_memory_full
from growkit.float32 import multiplying
from growkit.train import distributed
from growkit.train.batches import BATCHES_AHEAD, images_per_batch, train_batches
from growkit.train.data import Data, size_of
from growkit.train.free_memory import free_bytes, limited
from growkit.train.made_weights import made_once
from growkit.train.memory import keep_what_fits, step_peak, without_storage
from growkit.train.optimizer import ADAMW_KEEPS, numbers_kept
from growkit.train.precision import autocast, precision_on
from growkit.train.resident import Resident
from growkit.train.score import mode_kept
from growkit.train.settings import AUTO, FitSettings

ROOM = 0.9  # share of the free memory that a step may take: kernels and the allocator need some too
_FEWEST = {1: "one image", 2: "the two images that are mixed"}
STEP = 8  # larger batch sizes are rounded down to a multiple of this before they are tried


def recompute_blocks(model: nn.Module) -> None:
    """Turn on gradient checkpointing: each block is recomputed in the backward pass.

    Raises:
        GrowkitError: the model has no blocks.
    """
    enable: Callable[[bool], None] | None = getattr(model, "set_grad_checkpointing", None)
    if enable is None:
        raise GrowkitError("--grad-checkpointing: this model has no blocks to compute again; leave it out")
    enable(True)


def ready_to_try(model: nn.Module, data: Data, settings: FitSettings, device: torch.device) -> Tensor:
    """Bring the model to the device as training would, and return one training image (1, C, H, W) there.

    Raises:
        GrowkitError: there are fewer images than processes.
    """
    model.to(device)
    if settings.grad_checkpointing:
        recompute_blocks(model)
    few = replace(settings, batch_size=distributed.size(), workers=0)  # one for each process
    distributed.refuse_indivisible(images_per_batch(data, few))
    return next(train_batches(data, few, 0, 1, device=device))[0].to(device)


def largest_batch(
    model: nn.Module,
    data: Data,
    settings: FitSettings,
    device: torch.device,
    batches: int = 1,
    *,
    tried: bool = True,
) -> int:
    """Find the largest batch that fits `device` in an update of `batches` batches; 0 if not one image, or pair, fits.

    With several processes, this is the size of one process's part. The memory per image is estimated from the peaks of
    two small batches, counted without computing anything, and again from one of the resulting size. The final size is
    counted too, with `tried` also run on a GPU or under `ulimit -v`, and halved until it fits.
    """
    image = ready_to_try(model, data, settings, device)
    batches = min(batches, 2)  # from the second batch on, the earlier ones' gradients are held

    ahead = BATCHES_AHEAD * image.numel() * image.element_size() if device.type == "cuda" else 0

    precision = precision_on(device, settings.precision)  # resolved here: the counted model is on no real device

    @cache
    def counted(size: int) -> int:
        return size * ahead + step_peak(without_storage(model), (size, *image.shape[1:]), precision, batches)

    small, large = counted(8), counted(16)
    own = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    if isinstance(data.val, Resident):
        data.val.decoded.on(device)  # as those to train on are by now
    # queried after counting, which loads parts of torch; the weights are already allocated
    room = ROOM * free_bytes(device) + own - _beside(model, own, settings)
    each = max(1, (large - small) // 8)
    pairs, most = _together(settings), size_of(data.train) // distributed.size()

    def whole(size: float) -> int:
        size = max(0, min(int(size), most))
        return size // STEP * STEP if size > STEP else size // pairs * pairs

    fits = whole((room - small) / each + 8)
    if fits > 16:  # an operator's kept intermediates change the memory per image from that of the first few
        fits = whole(16 + (room - large) * (fits - 16) / max(1, counted(fits) - large))

    def suits(size: int) -> bool:
        if counted(size) > room:
            return False
        return not tried or (device.type != "cuda" and not limited()) or _runs(model, image, size, settings, batches)

    while fits and not suits(fits):
        fits = fits // 2 // pairs * pairs
    return fits


def _beside(model: nn.Module, own: int, settings: FitSettings) -> int:
    """Bytes that training holds besides what `step_peak` counts: the moving average, what exceeds AdamW's moments."""
    learned = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    more = max(0.0, numbers_kept(settings) - ADAMW_KEEPS)
    return int(more * learned) + (own if settings.model_ema else 0)


def _runs(model: nn.Module, image: Tensor, count: int, settings: FitSettings, batches: int) -> bool:
    keep_what_fits(model, (count, *image.shape[1:]), precision_on(image.device, settings.precision))
    try:
        try_update(model, model, image.expand(count, -1, -1, -1).contiguous(), settings, batches)
    except RuntimeError as error:  # torch.OutOfMemoryError is one; cuBLAS has another
        if not is_memory_full(error):
            raise
        return False
    finally:
        torch.cuda.empty_cache()
    return True


def try_update(
    model: nn.Module, forward: Callable[[Tensor], Tensor], images: Tensor, settings: FitSettings, batches: int = 1
) -> None:
    """Run `batches` batches of `images` forwards and backwards, `forward` being `model` or what calls it.

    Nothing is learned, and the gradients are dropped.
    """
    try:
        with mode_kept(model), multiplying(settings.tf32), made_once(model, batches):
            model.train()
            for _ in range(batches):
                with autocast(settings.precision, images.device):
                    logits = forward(images)
                logits.float().square().mean().backward()
    finally:
        model.zero_grad(set_to_none=True)


def with_batch_size(model: nn.Module, data: Data, settings: FitSettings, device: torch.device) -> FitSettings:
    """Return the settings with an automatic batch size replaced by a number.

    Of several processes, the one with the least free memory decides for all.

    Raises:
        GrowkitError: not a single image fits, or the model is to be sharded: at this point it is still unsharded.
    """
    if settings.batch_size != AUTO:
        return settings
    if settings.shard:
        raise GrowkitError("--batch-size auto finds what fits beside a whole model; with --shard give the number")
    batches = settings.grad_accum_steps if distributed.size() == 1 else 2  # DDP keeps gradients from update to update
    fits = distributed.least(largest_batch(model, data, settings, device, batches))
    if not fits:
        raise GrowkitError(_nothing_fits(device, settings))
    return replace(settings, batch_size=fits * distributed.size())


@contextmanager
def telling_what_fits(model: nn.Module, data: Data, settings: FitSettings, device: torch.device) -> Iterator[None]:
    """Turn torch's out-of-memory error into one that says which batch size would fit.

    Raises:
        GrowkitError: instead of torch's error.
    """
    try:
        yield
        return
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not is_memory_full(error):
            raise
        clear_frames(error.__traceback__)  # the caller still holds the error, whose frames hold tensors
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    processes = distributed.size()
    wanted = images_per_batch(data, settings) // processes
    told = f"out of memory on {device} with {wanted} images {'of each' if processes > 1 else 'a'} batch"
    if settings.shard:
        raise GrowkitError(f"{told}; give a smaller --batch-size and more --grad-accum-steps, or more processes")
    # tried on a single process only: DDP would send a trial's gradients; the remedy has two batches or more
    there = replace(settings, model_ema=False)  # it takes its room already
    fits = min(largest_batch(model, data, there, device, 2, tried=processes == 1), wanted - 1)
    pairs = _together(settings)
    if fits < pairs:
        none = f"{told}, and what is free now holds not even {_FEWEST[pairs]}; {_more_room(device, settings)}"
        raise GrowkitError(none if wanted > pairs else _nothing_fits(device, settings))
    fits = max(part for part in range(pairs, fits + 1, pairs) if wanted % part == 0)
    raise GrowkitError(
        f"{told}; --batch-size {fits * processes} --grad-accum-steps {settings.grad_accum_steps * wanted // fits}"
        f" {'fits' if processes == 1 else 'should fit'}"
        + (" and takes the same images an update" if _same_images(data, settings) else "")
        + ("" if settings.grad_checkpointing else ", --grad-checkpointing makes room for more")
    )


def _same_images(data: Data, settings: FitSettings) -> bool:
    """Whether updates of several smaller batches are made of the same images, drawn the same, as those of one batch."""
    by_batch = _together(settings) > 1 or settings.cache != "none"  # which are drawn for a batch
    images = images_per_batch(data, settings) * settings.grad_accum_steps
    return not by_batch and size_of(data.train) % images == 0


def _together(settings: FitSettings) -> int:
    """Return what a batch size must be a multiple of: 2 where images are mixed in pairs."""
    return 2 if settings.mixup or settings.cutmix else 1


def _nothing_fits(device: torch.device, settings: FitSettings) -> str:
    return f"the memory of {device} holds not even {_FEWEST[_together(settings)]}; {_more_room(device, settings)}"


def _more_room(device: torch.device, settings: FitSettings) -> str:
    ways = [
        *(() if settings.grad_checkpointing else ("--grad-checkpointing",)),
        *(("--precision bf16",) if precision_on(device, settings.precision) == "fp32" else ()),
        "a smaller model",  # whose weights, gradients and moments may be what takes the room
    ]
    return f"try {' or '.join(ways)}, or free some"
