"""Whether batches take less time with the network compiled: they are timed both ways."""

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import nn

from growkit.errors import GrowkitError, first_line
from growkit.seeds import seeded
from growkit.train import distributed, made_weights
from growkit.train.batch_size import ready_to_try, telling_what_fits, try_update
from growkit.train.batches import images_per_batch
from growkit.train.data import Data
from growkit.train.length import length_of
from growkit.train.memory import keep_what_fits
from growkit.train.precision import precision_on
from growkit.train.progress import Say, StartProgress, each
from growkit.train.settings import COMPILE_AUTO, FitSettings

MODE = "default"  # the mode that is tried: those with CUDA graphs hold more memory
ROUNDS = 3  # batches timed each way, in turns
# What a run must be like for the trial not to outweigh what it may save: the compiler takes about a minute for a small
# transformer on two cores, and the batches that are timed should be few beside the run's.
SECONDS, BATCHES = 180.0, 30 * ROUNDS

Forward = Callable[..., Any]


def with_compile(
    model: nn.Module, data: Data, settings: FitSettings, device: torch.device, say: Say, tell: StartProgress
) -> FitSettings:
    """Return the settings with `--compile auto` replaced: by a mode if batches take less time compiled, or by None.

    Forward and backward passes of the run's batch are timed; the weights stay as they are. The run uses what the trial
    compiled. Short runs are not compiled. Of several processes, the slowest counts.

    Raises:
        GrowkitError: memory is full without compiling, or the model is to be sharded: at this point it is still whole.
    """
    if settings.compile != COMPILE_AUTO:
        return settings
    if settings.shard:
        raise GrowkitError("--compile auto times a whole model; with --shard name the mode, or leave it out")
    batches = length_of(data, settings).total * settings.grad_accum_steps
    with seeded("compile", device=device), telling_what_fits(model, data, settings, device):
        seconds = _stopwatch(model, data, settings, device)
        seconds(model)  # warms up
        total = batches * _slowest(seconds(model))
    if total < SECONDS or batches < BATCHES:
        short = f"takes about {max(total, 1):.0f} s" if total < SECONDS else f"has fewer than {BATCHES} batches"
        say(f"--compile auto: not compiled; the run {short}, and trying a minute or more")
        return replace(settings, compile=None)
    made_weights.leave_uncompiled(model)
    with seeded("compile", device=device):
        times, failure = _times(model, seconds, tell)
    if failures := distributed.gathered(failure):
        say(f"--compile auto: not compiled; it cannot be here: {failures[0]}")
        return replace(settings, compile=None)
    plain, compiled = map(_slowest, times)
    mode = MODE if compiled < plain else None
    told = f"a batch takes {compiled / plain:.2f} x the time compiled"
    say(f"--compile auto: {'compiled' if mode else 'not compiled'}; {told}")
    return replace(settings, compile=mode)


def _stopwatch(model: nn.Module, data: Data, settings: FitSettings, device: torch.device) -> Callable[[Forward], float]:
    """Return what times a batch of `model`, forwards and backwards, given the model or what calls it."""
    size = images_per_batch(data, settings) // distributed.size()
    images = ready_to_try(model, data, settings, device).expand(size, -1, -1, -1).contiguous()
    keep_what_fits(model, images.shape, precision_on(device, settings.precision))

    def seconds(forward: Forward) -> float:
        began = time.perf_counter()
        try_update(model, forward, images, settings)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    return seconds


def _times(
    model: nn.Module, seconds: Callable[[Forward], float], tell: StartProgress
) -> tuple[tuple[float, float], list[str]]:
    """Return the seconds of a batch uncompiled and compiled, and why it failed, if it did."""
    try:
        progress = tell("compiling")
        progress(0, 1)
        compiled = torch.compile(model, mode=MODE)
        seconds(compiled)
        progress(1, 1)
        rounds = [(seconds(model), seconds(compiled)) for _ in each(range(ROUNDS), tell("timing uncompiled, compiled"))]
    except Exception as error:  # dynamo, the compiler, the driver and a full memory each raise their own kinds
        return (0.0, 0.0), [first_line(error, 160)]
    plain, fast = map(median, zip(*rounds, strict=True))
    return (plain, fast), []


def _slowest(seconds: float) -> float:
    return distributed.largest(round(1e6 * seconds)) / 1e6
