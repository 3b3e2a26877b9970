"""What changed in behaviour between two models: which images turned wrong, which turned right, class by class."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from growkit.errors import GrowkitError
from growkit.mcnemar import mcnemar
from growkit.train.score import Scores, Tally

Predict = Callable[[Tensor], Tensor]  # images (N, C, H, W) to logits (N, classes)
Batch = tuple[Tensor, Tensor]  # images and labels (N,)


@dataclass(frozen=True)
class Part:
    """A subset of the images: its size, and its share of all images in [0, 1]."""

    count: int
    share: float


@dataclass(frozen=True)
class ClassChange:
    """One class: how many images, the accuracy of both on them, and `change`, model accuracy minus source accuracy."""

    name: str
    images: int
    source: float
    model: float
    change: float
    turned_wrong: int
    turned_right: int


@dataclass(frozen=True)
class Agreement:
    """A model beside its source on the same images.

    Every image is in one of both_right, both_wrong, turned_wrong (the source right, the model wrong) and turned_right.
    """

    source_scores: Scores
    model_scores: Scores
    agreement: Part  # the same prediction, right or wrong
    both_right: Part
    both_wrong: Part
    turned_wrong: Part
    turned_right: Part
    changed_wrong: Part  # those of both_wrong where the two predict different classes
    mcnemar_p: float  # of a split at least as uneven as turned_wrong : turned_right if both were equally likely
    classes: tuple[ClassChange, ...]  # in label order; a class without images is left out


def compare_answers(
    source: Predict, model: Predict, batches: Iterable[tuple[Tensor, Tensor, Tensor]], names: Sequence[str] = ()
) -> Agreement:
    """Run both predictors over the same labelled images in one pass.

    batches  the source's images, the model's images and the labels (N,); see `in_step`
    names    class names in label order; a class without a name is called by its number

    Raises:
        GrowkitError: there are no images, the two models have different numbers of classes, a label has no logit, or
            logits are not finite.
    """
    tallies = Tally("the source"), Tally("the model")
    rows = []
    for source_images, model_images, labels in batches:
        logits = source(source_images), model(model_images)
        if logits[0].shape[1] != logits[1].shape[1]:
            raise GrowkitError(
                f"the source answers {logits[0].shape[1]} classes and the model {logits[1].shape[1]}; "
                "compare with a source of the model's classes"
            )
        answers = (tally.add(given, labels).cpu() for tally, given in zip(tallies, logits, strict=True))
        rows.append(torch.stack((labels.cpu(), *answers)))
    scores = tallies[0].scores(), tallies[1].scores()
    labels, before, after = torch.cat(rows, dim=1)
    was_right, is_right = before == labels, after == labels
    turned_wrong, turned_right = was_right & ~is_right, ~was_right & is_right

    def part(which: Tensor) -> Part:
        return Part(int(which.sum()), float(which.double().mean()))

    def change(label: int) -> ClassChange:
        own = labels == label
        rights = int((was_right & own).sum()), int((is_right & own).sum())
        images = int(own.sum())
        return ClassChange(
            name=names[label] if label < len(names) else str(label),
            images=images,
            source=rights[0] / images,
            model=rights[1] / images,
            change=(rights[1] - rights[0]) / images,
            turned_wrong=int((turned_wrong & own).sum()),
            turned_right=int((turned_right & own).sum()),
        )

    return Agreement(
        source_scores=scores[0],
        model_scores=scores[1],
        agreement=part(before == after),
        both_right=part(was_right & is_right),
        both_wrong=part(~was_right & ~is_right),
        turned_wrong=part(turned_wrong),
        turned_right=part(turned_right),
        changed_wrong=part(~was_right & ~is_right & (before != after)),
        mcnemar_p=mcnemar(int(turned_wrong.sum()), int(turned_right.sum())),
        classes=tuple(change(label) for label in labels.unique().tolist()),
    )


def in_step(source: Iterable[Batch], model: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pair up the same images prepared in two ways, as `compare_answers` takes them.

    Raises:
        GrowkitError: the labels differ, so the images are not the same.
    """
    for number, ((images, labels), (others, theirs)) in enumerate(zip(source, model, strict=True)):
        if not torch.equal(labels, theirs):
            raise GrowkitError(f"batch {number} has other labels when read again; give data with a fixed order")
        yield images, others, labels
