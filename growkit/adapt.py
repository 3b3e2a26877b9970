"""Adapt a source to other images or other classes, the way timm's own loading adapts published weights.

That way is timm.models.vision_transformer.checkpoint_filter_fn and timm.models._builder.load_pretrained. timm cannot
keep part of a head; here the rows of the classes that are still wanted are kept, matched by label.
"""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.layers.patch_embed import resample_patch_embed
from timm.models import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from growkit.arch import build, find, parse_sets, vit
from growkit.errors import GrowkitError
from growkit.seeds import random_kept
from growkit.source import Source
from growkit.text import counted, first_difference, some

INPUT = ("img_size", "patch_size", "in_chans")
KERNELS, POSITIONS = "patch_embed.proj.weight", "pos_embed"
HEADS = ("head.", "head_dist.")


def with_input(source: Source, sets: Sequence[str]) -> Source:
    """Adapt the source to another image size, patch size or number of channels, where `--set` asks for it.

    Position embeddings are resampled on their grid; class, distillation and register tokens are kept. Patch kernels
    are resampled by the pseudo-inverse of resizing; channels are summed into one, or repeated and scaled down.

    Raises:
        GrowkitError: a size that is not a whole number above 0, or images that the patches do not fit.
    """
    old = build(source.architecture.name, source.architecture.arguments, device="meta")
    own, chosen = vit.input_arguments(old), parse_sets(sets)
    asked = {key: _whole_number(key, chosen[key]) for key in INPUT if key in chosen and chosen[key] != own[key]}
    if not asked:
        return source
    size, patch, channels = (asked.get(key, own[key]) for key in INPUT)
    if size < patch:
        raise GrowkitError(f"images {size} wide hold no patch of {patch}; choose --set img_size={patch} or more")
    if size % patch and old.dynamic_img_size:
        whole = -(-size // patch) * patch
        raise GrowkitError(f"this network takes whole patches of {patch} alone; choose --set img_size={whole}")
    architecture = find(source.architecture.name, {**source.architecture.arguments, **asked})
    new = build(architecture.name, architecture.arguments, device="meta")
    state = dict(source.state)
    kernels = resample_patch_embed(state[KERNELS], list(new.patch_embed.patch_size))
    state[KERNELS] = adapt_input_conv(channels, kernels, base_chans=own["in_chans"])
    grids = old.patch_embed.grid_size, new.patch_embed.grid_size
    if POSITIONS in state:
        prefix = state[POSITIONS].shape[1] - old.patch_embed.num_patches
        state[POSITIONS] = resample_abs_pos_embed(state[POSITIONS], grids[1], grids[0], num_prefix_tokens=prefix)
    architecture.check(state)
    prepared = {**source.preprocessing, "input_size": (channels, size, size)}
    for name in ("mean", "std"):
        prepared[name] = _per_channel(prepared[name], channels)
    lines = [f"source adapted: {key} {own[key]} -> {asked[key]}, {_done(key, old, new, asked)}" for key in asked]
    return replace(
        source,
        architecture=architecture,
        state=state,
        preprocessing=prepared,
        adapted=(*source.adapted, *lines),
    )


def _whole_number(key: str, value: Any, least: int = 1) -> int:
    if isinstance(value, tuple | list):
        raise GrowkitError(f"--set {key}={value}: growkit grows networks for square images; give one number")
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise GrowkitError(f"--set {key}={value}: expected a whole number of at least {least}")
    return value


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return one mean or standard deviation per channel, averaged or repeated as `adapt_input_conv` does channels."""
    if channels == len(values):
        return tuple(values)
    return (sum(values) / len(values),) if channels == 1 else tuple(values[at % len(values)] for at in range(channels))


def _done(key: str, old: VisionTransformer, new: VisionTransformer, asked: dict[str, int]) -> str:
    """Say in words what adapting one argument did."""
    if key == "in_chans":
        return "channels of the patch kernels " + ("summed" if asked[key] == 1 else "repeated and scaled")
    (was, _), (now, _) = old.patch_embed.grid_size, new.patch_embed.grid_size
    told = ["patch kernels resampled"] if key == "patch_size" else []
    if key == "img_size" or "img_size" not in asked:  # where both change, only img_size reports the grid
        if was == now:
            told.append(f"the grid of {now} x {now} patches stays")
        elif old.pos_embed is None:
            told.append(f"{was} x {was} patches become {now} x {now}")
        else:
            told.append(f"position embeddings resampled from {was} x {was} to {now} x {now}")
        if unread := unread_pixels(new):
            told.append(unread)
    return ", ".join(told)


def unread_pixels(model: VisionTransformer) -> str:
    """A line on what lies beyond the last patch of an image; empty where nothing does."""
    patches = model.patch_embed
    unread = 0 if patches.dynamic_img_pad else patches.img_size[0] % patches.patch_size[0]
    told = f"the last {counted(unread, 'pixel')} of each row and column"
    return f"{told} {'is' if unread == 1 else 'are'} in no patch and not read" if unread else ""


def with_classes(source: Source, names: Sequence[str] | None, sets: Sequence[str] = (), *, seed: int) -> Source:
    """Adapt the source to the classes of the data, or to the number that `--set num_classes=N` asks for.

    A head whose labels include all of `names` keeps their rows, in the order of `names`. A head that matches only in
    the number of classes is kept unchanged; any other is reinitialized from `seed`, as timm does. Both heads of a
    distilled model are treated alike.

    Args:
        names: the data's class names; empty if the data does not name them, None if there is no data.

    Raises:
        GrowkitError: `--set num_classes` differs from the data, or nothing says how many classes there are.
    """
    own = source.architecture.classes
    chosen = parse_sets(sets)
    count = _whole_number("num_classes", chosen["num_classes"], least=0) if "num_classes" in chosen else own
    if names:
        if "num_classes" in chosen and count != len(names):
            raise GrowkitError(f"--set num_classes={count}: the data has {len(names)} classes; leave it out")
        count = len(names)
    elif names is not None and not count:
        raise GrowkitError(
            "the model has no head and the data names no classes; grow it with --set num_classes=N first"
        )
    if names and _distinct(source.labels, own) and set(names) <= set(source.labels or ()):
        return _with_rows(source, names)
    if count == own:
        return _as_it_is(source, names or source.labels)
    return _with_new_head(source, count, names, seed)


def _distinct(labels: Sequence[str] | None, count: int) -> bool:
    """Whether there is exactly one label per class, all different."""
    return labels is not None and len(set(labels)) == len(labels) == count


def _with_rows(source: Source, names: Sequence[str]) -> Source:
    """Keep only the head's rows of these classes, in this order."""
    labels = source.labels or ()
    if tuple(names) == labels:
        return source
    rows = [labels.index(name) for name in names]
    state = {key: tensor[rows] if key.startswith(HEADS) else tensor for key, tensor in source.state.items()}
    line = f"source adapted: of the head's {len(labels)} classes the data's {len(names)} are kept, by their names"
    if len(names) == len(labels):
        line = f"source adapted: the head's {len(labels)} classes are put into the data's order, by their names"
    return _other_head(source, state, names, len(names), line)


def _as_it_is(source: Source, names: Sequence[str] | None) -> Source:
    """Keep the source's own head, with `names` as its class names from now on."""
    kept = replace(source, labels=tuple(names) if names else None)
    if not names or not source.labels or tuple(names) == source.labels:
        return kept
    at, _, _ = first_difference(source.labels, names)
    where = f" from {at} on" if at else ""
    was, now = (some(each[at:]) for each in (source.labels, names))
    line = f"the source calls its classes{where} {was}, the data {now}: they are taken in order"
    return replace(kept, adapted=(*source.adapted, line))


def _with_new_head(source: Source, count: int, names: Sequence[str] | None, seed: int) -> Source:
    own = source.architecture.classes
    with random_kept():
        torch.default_generator.manual_seed(seed)
        model = source.model()
        model.reset_classifier(count)
    has = f"{own} classes" if own else "no head"
    asked = f"the data {count}{'' if own else ' classes'}" if names else f"--set num_classes={count}"
    line = f"the source has {has}, {asked}: a new head starts from scratch"
    if not count:
        line = f"the source has {has}, {asked}: its head is left out, and the model gives features"
    return replace(_other_head(source, dict(model.state_dict()), names, count, line), own_head=False)


def _other_head(source: Source, state: dict[str, Tensor], names: Sequence[str] | None, count: int, line: str) -> Source:
    return replace(
        source,
        architecture=find(source.architecture.name, {**source.architecture.arguments, "num_classes": count}),
        state=state,
        labels=tuple(names) if names else None,
        adapted=(*source.adapted, line),
    )


def head_is_new(source: Source, data: str) -> str:
    """Return the warning for growing a source on data whose classes it never learned."""
    tune = shlex.join(["growkit", "finetune", source.path, *source.loading.words, "--data", data, "--run", "OTHER"])
    return (
        "warning: the new head is untrained, so scores say nothing about the source; train it on these classes first: "
        f"{tune}, and take OTHER/finetuned"
    )
