"""What growing, training and fine-tuning share: whether they go on, and what is settled before they begin."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from types import NoneType

import torch
from torch import nn

from growkit.checkpoint import HISTORY, WEIGHTS
from growkit.errors import GrowkitError
from growkit.files import read_json, refuse_existing, refuse_foreign, sha256_of
from growkit.job import Job
from growkit.text import counted
from growkit.train.batch_size import STEP, with_batch_size
from growkit.train.compiling import with_compile
from growkit.train.data import Data, size_of
from growkit.train.distributed import by_leader, leads, restarted, size
from growkit.train.length import length_of
from growkit.train.loop import refuse_settings, refuse_unlike, updates_made
from growkit.train.precision import refuse_tf32
from growkit.train.progress import Say
from growkit.train.resume import BOARD, METRICS, STATE, begun_with
from growkit.train.score import Scores, worse
from growkit.train.settings import AUTO, COMPILE_AUTO, FitSettings
from growkit.unmeant import unmeant_in_training

LAST = "last"  # inside a trained folder: the state to resume, and the last weights, beside the best
ROUNDING = 0.2  # of a run's length, to whole updates, that goes without saying
START = "start.json"  # in there: the scores before fine-tuning


def goes_on(job: Job, output: Path, state: Path | None, *, writes: Collection[str] = ()) -> bool:
    """Whether to resume from `state`: on request, or because torchrun restarted this job after a failure.

    A run that ended before it saved anything starts anew. `writes` is what `output` may hold where it is replaced
    whole, on resuming too.

    Raises:
        GrowkitError: the run cannot be written, or `output` or `state` exists and is neither replaced nor resumed.
    """
    anew = restarted()

    def look() -> bool:
        job.run.refuse_unusable()
        if not (job.resume or anew):
            resumable = state is not None and state.exists()
            if not _only_begun(output):
                refuse_existing(output, job.force, WEIGHTS, LAST, writes=writes, resumable=resumable)
            if state is not None and resumable:
                refuse_existing(state.parent, job.force, STATE, resumable=True)
        else:
            refuse_foreign(output, writes=writes)
        if state is None:
            return False
        if job.resume and not state.exists() and not (output / WEIGHTS).exists():
            begun = state.parent.is_dir() or output.is_dir()
            job.say(
                "nothing was saved before it ended: it begins anew" if begun else "nothing to resume: it begins now"
            )
            return False
        return job.resume or (anew and state.exists())

    return by_leader(look)


def _only_begun(output: Path) -> bool:
    """Whether this folder is from a run killed before it saved anything, so that nothing in it can be lost."""
    names = {path.name for path in output.rglob("*") if path.parent.name != BOARD}
    return output.is_dir() and names <= {LAST, METRICS, START, BOARD}


def settled(
    job: Job, model: nn.Module, opened: Data, settings: FitSettings, device: torch.device, resumed: Path | None
) -> FitSettings:
    """Settle what is auto: tried once per run, and then read from the state in `resumed`. Say what means nothing.

    Raises:
        GrowkitError: not even one image fits in memory, `fit` would refuse the settings, or processes have others.
    """
    refuse_unlike(opened, settings, device)
    refuse_tf32(settings, device)
    for line in unmeant_in_training(settings):
        job.say(line)
    if resumed is not None and settings.compile == COMPILE_AUTO:
        settings = replace(settings, compile=begun_with(resumed, "compile", str, NoneType))
        job.say(f"--compile auto: {'compiled' if settings.compile else 'not compiled'}, as the run was started")
    if resumed is not None and settings.batch_size == AUTO:
        settings = replace(settings, batch_size=begun_with(resumed, "batch_size", int))
        job.say(f"--batch-size {settings.batch_size} is what the run was started with")
    settings = _sized(model, opened, settings, device, job.say)
    refuse_settings(opened, replace(settings, compile=None))  # before what takes a minute
    if told := _other_length(opened, settings):
        job.say(told)
    settings = with_compile(model, opened, settings, device, job.say, job.tell)
    if resumed is not None:
        job.say(f"goes on after update {updates_made(resumed, opened, settings, device)}")
    return settings


def _sized(model: nn.Module, opened: Data, settings: FitSettings, device: torch.device, say: Say) -> FitSettings:
    """Settle the batch size.

    Raises:
        GrowkitError: not even one image fits in memory.
    """
    sized = with_batch_size(model, opened, settings, device)
    images = size_of(opened.train)
    if settings.batch_size > images:
        say(f"--batch-size {settings.batch_size}: there are {images} training images, and a batch takes them all")
    if sized is not settings:
        where = str(device) if size() == 1 else f"{size()} processes"
        takes_all = sized.batch_size > images - STEP * size()  # the size found is rounded down
        found = f"is the largest that fits {where}"
        if takes_all:
            updates = counted(length_of(opened, sized).total, "update")
            found = f"is the largest for {images:,} training images, so that the run is of {updates}"
        say(f"--batch-size {sized.batch_size} {found}; --lr {settings.lr:g} is not scaled")
    return sized


def _other_length(opened: Data, settings: FitSettings) -> str | None:
    """The line about a run that whole updates make much longer or shorter than the epochs that were asked for."""
    if settings.steps is not None:
        return None
    length = length_of(opened, settings)
    epochs = length.total / length.updates_per_epoch
    if abs(epochs / settings.epochs - 1) <= ROUNDING:
        return None
    made = f"{counted(length.total, 'update')} of {counted(length.images_per_update, 'image')}, {epochs:.3g} epochs"
    lower = "--grad-accum-steps" if settings.grad_accum_steps > 1 else "--batch-size"
    return f"--epochs {settings.epochs:g}: the run is of {made}; a lower {lower} comes closer"


def below(harm: str, before: Scores, after: Scores, remedy: str) -> str:
    """The line about a drop in top-1: `harm` and the remedy if chance does not explain it."""
    if worse(before, after):
        return f"warning: {harm}: {remedy}"
    fell = f"top-1 fell from {before.top1:.2%} to {after.top1:.2%} on {counted(after.count, 'image')}"
    return f"note: {fell}, which may be chance; `growkit evaluate --against` tells image by image"


def tell_stale_model(job: Job) -> None:
    """Warn if run/finetuned was made of other weights than run/grown has now."""
    run = job.run
    if not leads() or not (run.finetuned / WEIGHTS).exists():
        return
    try:
        made_of = read_json(run.finetuned / HISTORY)["source"]["sha256"]
    except (GrowkitError, KeyError, TypeError):
        made_of = None  # it does not say
    if made_of != sha256_of(run.grown / WEIGHTS):
        job.say(f"warning: {run.finetuned} was not made of this grown model; `growkit finetune --force` replaces it")


def tell_stale_export(job: Job, folder: Path) -> None:
    """Warn if `folder` is the model that would be exported now and the run's ONNX file has other weights."""
    run = job.run
    if not leads() or not run.onnx_file.exists() or run.furthest() != folder:
        return
    if run.exported_weights() != sha256_of(folder / WEIGHTS):
        job.say(f"warning: {run.onnx} was made of an earlier model; `growkit export --force` makes it anew")
