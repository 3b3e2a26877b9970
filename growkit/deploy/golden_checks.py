"""Compare a model or a file with a golden reference; say what a new reference would change."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from growkit.deploy.checks import Check, check
from growkit.deploy.golden import FILE, TOLERANCE, DataSet, Golden, read_golden, write_golden
from growkit.deploy.numbers import relative, rms
from growkit.deploy.subject import Identity, Subject
from growkit.errors import GrowkitError, first_line
from growkit.text import first_difference, short, visible

# by what a reference is of
ACCEPTED = {"model": "MODEL --model-only --reference DIR", "onnx": "MODEL --onnx-file FILE --reference DIR"}
CERTAIN = 2 * 10  # a top-1 that leads by this many tolerances must stay: no logit may move by over ten


def check_golden(golden: Golden, subject: Subject, *, tolerance: float | None = None) -> tuple[Check, ...]:
    """Compare `subject` with the reference: weights, preprocessing, and the answers to every stored image.

    tolerance  relative RMS difference of the logits; when left out, the reference's own, or that of
               the subject's precision where the two precisions differ
    """
    was, now = golden.identity, subject.identity
    word = now.word
    checks: list[Check] = []
    if hashes := _told_apart(was, now):
        what, before, after = hashes
        same = before == after
        line = (
            f"{word}: {what} {short(after)}, as the reference"
            if same
            else (
                f"the reference was written for {what} {short(before)}, this {word} has {short(after)}: "
                f"if the change was meant, `growkit verify {ACCEPTED[was.of]} --update-reference` accepts it"
            )
        )
        checks.append(check("reference", f"{word}: {what}", same, short(after), short(before), line))
    if was.architecture and now.architecture:
        same = was.architecture == now.architecture
        line = f"{word}: {now.architecture}" + ("" if same else f", the reference is of {was.architecture}")
        checks.append(check("reference", f"{word}: architecture", same, now.architecture, was.architecture, line))
    if now.preprocessing:
        differing = [key for key in was.preprocessing if now.preprocessing.get(key) != was.preprocessing[key]]
        said, meant = (
            ", ".join(f"{key} {given.get(key)}" for key in differing) or "equal"
            for given in (now.preprocessing, was.preprocessing)
        )
        line = f"{word}: preprocessing is " + ("the reference's" if not differing else f"{said}; was {meant}")
        checks.append(check("reference", f"{word}: preprocessing", not differing, said, meant, line))
    if was.labels is not None and now.labels is not None:
        same = was.labels == now.labels
        said = "the reference's" if same else _other_names(was.labels, now.labels)
        line = f"{word}: class names are {said}"
        checks.append(check("reference", f"{word}: class names", same, said, "the reference's", line))
    limit, other = golden.tolerance, ""
    if now.precision != was.precision:
        limit, other = TOLERANCE[now.precision], f"; the reference is of {was.precision}, this of {now.precision}"
    limit = limit if tolerance is None else tolerance
    for data_set in golden.data_sets:
        checks += _answers(data_set, subject, limit, golden.spread, label=f"{data_set.name}: {word}", note=other)
    return tuple(checks)


def _answers(data_set: DataSet, subject: Subject, limit: float, spread: float, *, label: str, note: str) -> list[Check]:
    try:
        got = subject.run(data_set.images)
    except Exception as error:  # timm, torch and ONNX Runtime each have their own kinds
        shape = _shape(data_set.images.shape[1:])
        reason = first_line(error)
        line = f"{label} refuses the stored images of {shape}: the reference is another model's ({reason})"
        return [check("reference", label, False, "refused", "ok", line)]
    wanted = data_set.logits
    if got.shape != wanted.shape:
        line = (
            f"{label} answers {_shape(got.shape)}, stored is {_shape(wanted.shape)}: the reference is another model's"
        )
        return [check("reference", label, False, _shape(got.shape), _shape(wanted.shape), line)]
    off = relative(rms(got.astype(np.float64) - wanted), spread)
    line = f"{label}: answers differ by relative RMS {off:.3g}, allowed {limit:.3g}{note}"
    top = np.sort(wanted.astype(np.float64), axis=1)
    lead = top[:, -1] - top[:, -2] if wanted.shape[1] > 1 else np.zeros(len(wanted))
    certain = lead > CERTAIN * limit * spread
    changed = int((certain & (got.argmax(axis=1) != wanted.argmax(axis=1))).sum())
    told = f"{label}: {changed} of {int(certain.sum())} certain predictions changed"
    return [
        check("reference", label, off <= limit, off, limit, line),  # not `off > limit`, which NaN is not
        check("reference", f"{label}, certain predictions changed", changed == 0, changed, 0, told),
    ]


def _other_names(was: Sequence[str], now: Sequence[str]) -> str:
    if len(was) != len(now):
        return f"{len(now)}, were {len(was)}"
    at, before, after = first_difference(was, now)
    return f"others: number {at} is {visible(after)}, was {visible(before)}"


def _told_apart(was: Identity, now: Identity) -> tuple[str, str, str] | None:
    """Return what identifies both, the whole file or else the weights, and its hash before and now; None if unknown."""
    kinds = {"onnx_sha256": "SHA-256", "tensors_sha256": "weights by tensor", "weights_sha256": "weights"}
    for kind, what in kinds.items():
        before, after = getattr(was, kind), getattr(now, kind)
        if before and after:
            return what, before, after
    return None


def update_golden(folder: Path, golden: Golden, subject: Subject) -> str:
    """Write a reference as write_golden does; return a sentence on what happened to the previous one.

    Raises:
        GrowkitError: as write_golden.
    """
    try:
        change = f"replaced {folder}: {change_since(read_golden(folder), subject)}"
    except GrowkitError:
        there = (folder / FILE).exists()
        change = f"replaced {folder}, which could not be read" if there else f"wrote {folder}"
    write_golden(folder, golden)
    return change


def change_since(old: Golden, subject: Subject) -> str:
    """Say in a sentence what replaces `old`: weights before and now, and how far the answers to its images move."""
    was, now = old.identity, subject.identity
    what, before, after = _told_apart(was, now) or ("weights", None, None)
    weights = f"{what} {short(before)} -> {short(after)}" if before != after else f"{what} {short(after)} as before"
    if was.of != now.of:
        weights = f"it was of a {was.word}, is of a {now.word}; {weights}"
    if was.labels is not None and now.labels is not None and was.labels != now.labels:
        weights = f"{weights}; class names are {_other_names(was.labels, now.labels)}"
    if was.size != now.size:
        return f"{weights}; images were {_shape(was.size)}, are {_shape(now.size)}"
    largest, moved = 0.0, 0.0
    for data_set in old.data_sets:
        got = subject.answers(data_set.images).astype(np.float32)
        if got.shape != data_set.logits.shape:
            return f"{weights}; {data_set.logits.shape[1]} classes before, {got.shape[1]} now"
        largest = max(largest, float(np.abs(got - data_set.logits.astype(np.float64)).max()))
        moved = max(moved, relative(rms(got.astype(np.float64) - data_set.logits), old.spread))
    return f"{weights}; logits move by up to {largest:.3g} (relative RMS {moved:.3g})"


def _shape(shape: tuple[int, ...] | list[int]) -> str:
    return " x ".join(map(str, shape))
