"""How a model's predictions differ from its source's, as sections of a page."""

from collections.abc import Mapping
from typing import Any

from growkit.report.page import Section, Table

CLASSES, WORST, BEST = 20, 10, 5  # classes shown in full; of more, only those that changed most


def agreement_sections(figures: Mapping[str, Any]) -> list[Section]:
    """Sections on what changed from a source to its model: scores, predictions, classes.

    `figures` is an Agreement as a dict. Of more than 20 classes only the 10 with the worst change and the 5 with the
    best are shown, and the text says so.
    """
    source, model, classes = figures["source_scores"], figures["model_scores"], figures["classes"]
    scores = [
        *(
            (name, f"{source[key]:.2%}", f"{model[key]:.2%}", _points(model[key] - source[key]))
            for name, key in (("top-1", "top1"), ("top-5", "top5"))
        ),
        *(
            (name, f"{source[key]:.4f}", f"{model[key]:.4f}", f"{model[key] - source[key]:+.4f}")
            for name, key in (("loss", "loss"), ("calibration error (ECE)", "ece"))
        ),
    ]
    predictions = [
        (name, f"{figures[key]['count']:,}", f"{figures[key]['share']:.2%}")
        for name, key in (
            ("the same class", "agreement"),
            ("both right", "both_right"),
            ("turned right", "turned_right"),
            ("turned wrong", "turned_wrong"),
            ("both wrong", "both_wrong"),
            ("both wrong, from one class to another", "changed_wrong"),
        )
    ]
    ranked = sorted(classes, key=lambda one: (one["change"], -one["turned_wrong"]))
    some = len(ranked) > CLASSES
    rows = [
        (
            one["name"],
            f"{one['images']:,}",
            f"{one['source']:.2%}",
            f"{one['model']:.2%}",
            f"{100 * one['change']:+.2f}",
            f"{one['turned_wrong']:,}",
            f"{one['turned_right']:,}",
        )
        for one in ([*ranked[:WORST], *ranked[-BEST:]] if some else ranked)
    ]
    wrong, right = figures["turned_wrong"]["count"], figures["turned_right"]["count"]
    verdict = f"{wrong:,} turned wrong and {right:,} turned right: exact McNemar p = {figures['mcnemar_p']:.2g}."
    meaning = "p is the probability of a split at least this uneven if both directions were equally likely."
    shown = f"The {WORST} classes with the worst change and the {BEST} with the best, of {len(ranked):,}."
    return [
        Section(f"{source['count']:,} validation images", table=Table(("score", "source", "model", "change"), scores)),
        Section("predictions", f"{verdict}\n{meaning}", Table(("prediction", "images", "share"), predictions)),
        Section(
            "classes, worst change first",
            shown if some else "",
            Table(("class", "images", "source", "model", "change, points", "turned wrong", "turned right"), rows),
        ),
    ]


def _points(change: float) -> str:
    """A difference of two shares in percentage points."""
    return f"{100 * change:+.2f} points"
