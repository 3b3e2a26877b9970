"""Source, growth and fine-tuning as sections of a page."""

from collections.abc import Mapping, Sequence
from typing import Any

from growkit.report.facts import Facts, Step, formatted, mapping, number, percent, rows, texts, words
from growkit.report.page import Section, Table, cell
from growkit.report.plot import Plot, Point, Series, scientific
from growkit.report.steps import points
from growkit.text import counted, short, speed

SIZES = {"embed_dim": "width", "depth": "layers", "num_heads": "heads"}  # sizes that can grow, listed first
SMOOTH = 50  # points of a curve of training losses
NEAR = 1e-2  # gap that norms' eps and rounding explain, if a method preserves the function
EXACT = 1e-5  # step-0 difference of logits up to which the start equals the source in float32


def source_section(facts: Facts) -> Section:
    """What was grown: its architecture, size, training and file."""
    origin = mapping(facts.grown.get("source"))
    if not origin:
        return _trained(facts) if facts.trained else Section("Source", "Nothing was grown in this run.")
    kind = origin.get("architecture", "unknown")
    lines = [f"{origin.get('name')}, a {kind}; SHA-256 of its weights {short(origin.get('sha256'))}…"]
    history = mapping(origin.get("history"))
    fit = mapping(history.get("fit") or history.get("operator"))
    lines.append(_spent("growkit trained it", fit) if fit else "How it was trained is not on record.")
    lines += [f"{line}." for line in texts(origin.get("adapted"))]
    table = _sizes(facts)
    plots = _curves(fit, "Training the source") if fit else []
    parts = [Section("Its training", plots=plots, folded=True)] if plots else []
    line = rows(facts.grown.get("ancestors"))
    if len(line) > 1:
        parts.insert(0, Section("What it comes from, oldest first", table=_ancestors(line)))
    return Section("Source", "\n".join(lines), table, parts=parts)


def _ancestors(line: Sequence[Mapping[str, Any]]) -> Table:
    """The models a grown one comes from, with how each was made and what its training took."""
    body = []
    for entry in line:
        how = [str(entry.get("stage", "given"))]
        how += [f"by {entry['method']}"] if entry.get("method") else []
        how += [f"rank {entry['rank']}"] if entry.get("rank") else []
        how += [f"seed {entry['seed']}"] if "seed" in entry else []
        how += [str(entry["adapted"])] if entry.get("adapted") else []
        size = f"{entry.get('architecture')}, {cell(entry.get('width'))} wide, {cell(entry.get('layers'))} layers"
        flops = number(entry.get("flops"))
        spent = None if flops is None else flops / 1e12
        cost = (entry.get("steps"), entry.get("images"), spent)
        body.append((entry.get("name"), short(entry.get("sha256")), size, ", ".join(how), *map(cell, cost)))
    return Table(("model", "SHA-256", "architecture", "made", "updates", "images", "TFLOP"), body)


def _trained(facts: Facts) -> Section:
    """The section for a run that trained a model from scratch and grew none."""
    fit = mapping(facts.trained.get("fit"))
    name = mapping(facts.trained.get("source")).get("architecture", "a model")
    return Section(
        "Source", _spent(f"{name} was trained from scratch in this run", fit), plots=_curves(fit, "Training")
    )


def sizes_in(facts: Facts) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Recorded arguments of source and target; with sizes even if only the architecture's name sets them."""
    sizes = mapping(facts.grown.get("sizes"))
    old, new = ({k: v for k, v in mapping(sizes.get(side)).items() if k in SIZES} for side in ("source", "target"))
    origin = {**old, **mapping(mapping(facts.grown.get("source")).get("arguments"))}
    target = mapping(facts.config.get("model_args")) or mapping(
        mapping(facts.export.get("provenance")).get("arguments")
    )
    return origin, {**new, **target}


def grown_sizes(facts: Facts) -> str:
    """What grew, in words: 'width 32 to 64, layers 2 to 4'."""
    old, new = sizes_in(facts)
    return ", ".join(
        f"{name} {old[key]} to {new[key]}"
        for key, name in SIZES.items()
        if key in old and key in new and old[key] != new[key]
    )


def _sizes(facts: Facts) -> Table:
    old, new = sizes_in(facts)
    origin = mapping(facts.grown.get("source"))
    body: list[Sequence[object]] = [("architecture", origin.get("architecture"), facts.grown.get("to"))]
    for key in dict.fromkeys((*SIZES, *old, *new)):
        if key in old and (key in SIZES or _plain(old[key]) != _plain(new.get(key, old[key]))):
            body.append((SIZES.get(key, words(key)), _plain(old[key]), _plain(new.get(key))))
    if after := number(facts.figures("grow").get("parameters")):
        before = number(mapping(mapping(facts.grown.get("sizes")).get("source")).get("parameters"))
        body.append(("parameters", None if before is None else _many(before), _many(after)))
    return Table(("", "source", "grown"), [[cell(value) for value in row] for row in body])


def _many(count: float) -> str:
    """A count in words, such as 22.1 million."""
    return f"{count / 1e6:.3g} million" if count >= 1e6 else f"{count:,.0f}"


def _plain(value: object) -> object:
    """A square size as one number: records have either [16, 16] or 16."""
    return value[0] if isinstance(value, list) and len(set(value)) == 1 else value


def growth_section(facts: Facts) -> Section:
    """Method, start, operator training, and what they did to the scores."""
    settings, step = mapping(facts.grown.get("settings")), facts.latest("grow")
    if not facts.grown and step is None:
        return Section("Growth", "Nothing was grown in this run: `growkit grow` does.")
    settings = settings or (step.options if step else {})
    ring = f", rank {settings.get('ranks') or settings.get('rank')}" if settings.get("method") == "mango" else ""
    variant = f" ({settings['variant']})" if settings.get("variant") else ""
    stages = {"both": "width and depth at once", "width-first": "width first", "depth-first": "depth first"}
    lines = [
        f"Method {settings.get('method', 'unknown')}{variant}{ring}; "
        f"{stages.get(str(settings.get('stages')), words(settings.get('stages')))}; seed {settings.get('seed')}.",
        f"Before any training: {start_line(facts)}",
    ]
    fit = operator_fit(facts)
    if fit:
        size = number(facts.figures("grow").get("operator_parameters"))
        of = f" of {_many(size)} parameters" if size else ""
        lines.append(_spent(f"The growth operator{of} was trained", fit))
    else:
        lines.append("The growth operator was not trained.")
    lines += earlier_line(facts.all("grow"))
    after = "operator trained" if fit else "grown"
    table = _scores(facts, ("source", "source"), ("step0", "grown, before training"), ("operator", after))
    return Section("Growth", "\n".join(lines), table, _curves(fit, "Training the growth operator"))


def operator_fit(facts: Facts) -> Mapping[str, Any]:
    """Figures of the training of the growth operator; empty if it was not trained."""
    return mapping(facts.grown.get("operator")) or mapping(facts.figures("grow").get("operator"))


def start_line(facts: Facts) -> str:
    """Say how far the grown model starts from the source."""
    gap, claimed = gap_of(facts), facts.grown.get("lossless")
    if gap is None:
        return "how far the grown model starts from the source is not on record."
    return f"it {start_in_words(gap, claimed if isinstance(claimed, bool) else None, scientific(gap, 1))}."


def start_in_words(gap: float, claimed: bool | None, shown: str) -> str:
    """Say how far a start is from the source; `claimed`: whether the method preserves the function, None if unknown."""
    if gap <= EXACT:
        return f"starts where the source stands: logits differ by at most {shown}"
    if gap <= (NEAR if claimed else 100 * EXACT) and claimed is not False:
        return f"starts near the source: logits differ by at most {shown} (LayerNorm's eps and float32 rounding)"
    if claimed:
        return f"should start where the source stands, but logits differ by up to {shown}"
    nor = "" if claimed is None else ", nor claims to"
    return f"does not start where the source stands{nor}: logits differ by up to {shown}"


def gap_of(facts: Facts) -> float | None:
    """Largest difference of logits between source and grown model at step 0."""
    return number(facts.grown.get("step0_gap", facts.figures("grow").get("step0_gap")))


def tuning_section(facts: Facts) -> Section:
    """Fine-tuning: its cost, its best evaluation, and its score compared with the source."""
    step = facts.tuning
    fit = mapping(facts.tuned.get("fit")) or (step.figures if step else {})
    if not fit and facts.tuned:
        return Section("Fine-tuning", "It was killed before its end: the same command with --resume goes on with it.")
    if not fit:
        return Section("Fine-tuning", "Not done in this run: `growkit finetune` trains the grown model on.")
    settings = mapping(fit.get("settings")) or (step.options if step else {})
    begun = "grown" if facts.grown or facts.all("grow") else "given"
    lines = [_spent(f"The {begun} model was trained on", fit)]
    rate = number(settings.get("lr"))
    told = f"Learning rate {rate:g}, batches of" if rate is not None else "Batches of"
    lines.append(f"{told} {settings.get('batch_size')}, seed {settings.get('seed')}.")
    history, best = rows(fit.get("history")), mapping(fit.get("best"))
    places = [one.get("step") for one in history]
    if best and fit.get("best_step") in places:
        at = places.index(fit["best_step"]) + 1
        each = " (epochs)" if number(settings.get("eval_every")) == 1 else ""
        lines.append(f"Evaluation {at} of {len(places)}{each} was the best, and its weights are kept.")
    lines += earlier_line(facts.all("finetune"))
    table = _scores(facts, ("source", "source"), ("operator", begun), ("tuned", "fine-tuned"))
    return Section("Fine-tuning", "\n".join(lines), table, _curves(fit, "Fine-tuning", scores_of(facts).get("source")))


def scores_of(facts: Facts) -> dict[str, Mapping[str, Any]]:
    """Recorded scores on the validation images by stage: source, step0, operator, tuned."""
    tune = facts.tuning
    found = {name: mapping(one) for name, one in mapping(facts.figures("grow").get("scores")).items()}
    if tune is not None:
        found["tuned"] = mapping(tune.figures.get("best"))
        found.setdefault("operator", mapping(tune.figures.get("start")))
    elif facts.tuned:
        found["tuned"] = mapping(facts.tuned.get("scores"))
    if facts.new_head:  # the source was scored with the new one, untrained
        found.pop("source", None)
    return {name: one for name, one in found.items() if number(one.get("top1")) is not None}


def _scores(facts: Facts, *stages: tuple[str, str]) -> Table | None:
    found = scores_of(facts)
    source = number(found["source"]["top1"]) if "source" in found else None
    body = []
    for key, name in stages:
        if key not in found:
            continue
        top1 = number(found[key]["top1"]) or 0.0
        change = "" if source is None or key == "source" else f"{100 * (top1 - source):+.1f} points"
        body.append((name, percent(top1), change, formatted(found[key].get("loss"), ".3f")))
    images = {cell(one["count"]) for one in found.values() if number(one.get("count"))}
    of = f"top-1 on {images.pop()} images" if len(images) == 1 else "top-1"
    return Table(("model", of, "against the source", "loss"), body) if body else None


def _spent(what: str, fit: Mapping[str, Any]) -> str:
    """Say what a training run cost: updates, compute, time."""
    steps, flops, seconds, rate = (number(fit.get(key)) for key in ("steps", "flops", "seconds", "images_per_second"))
    told = [
        *([f"{cell(flops / 1e12)} TFLOP"] if flops else []),
        *([duration(seconds)] if seconds else []),
        *([f"{speed(rate)} images per second"] if rate else []),
    ]
    many = f" for {counted(steps, 'update')}" if steps is not None else ""
    stopped = " It was stopped before its end." if fit.get("interrupted") else ""
    settings = mapping(fit.get("settings"))
    decay = formatted(settings.get("model_ema_decay"), "g")
    kept = f" Kept is the moving average of its weights (decay {decay})." if settings.get("model_ema") else ""
    return f"{what}{many}" + (f": {', '.join(told)}." if told else ".") + kept + stopped


def duration(seconds: float) -> str:
    """A duration in seconds, minutes or hours, whichever reads best."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _curves(fit: Mapping[str, Any], what: str, source: Mapping[str, Any] | None = None) -> list[Plot]:
    """Plots of loss, in training and on validation images, and of top-1 over updates; the source's top-1 as a level."""
    losses = fit.get("losses")
    each = [{"step": at, "loss": loss} for at, loss in enumerate(losses, 1)] if isinstance(losses, list) else []
    training = _smoothed(points(each or rows(fit.get("training")), "step", "loss"))
    history = rows(fit.get("history"))
    start = mapping(fit.get("start"))
    begun = [{"step": 0, **start}] if start else []
    lines = [training, Series("validation", points([*begun, *history], "step", "loss"))]
    lines = [line for line in lines if line.points]
    top1 = points([*begun, *history], "step", "top1", 100)
    level = number(mapping(source).get("top1"))
    found = []
    if lines:
        found.append(Plot(f"{what}: loss", lines, "update", "loss"))
    if top1:
        reference = ("source", 100 * level) if level is not None else None
        title = f"{what}: top-1 on validation images, %"
        found.append(Plot(title, [Series("this model", top1)], "update", "top-1, %", reference=reference))
    return found


def _smoothed(found: Sequence[Point]) -> Series:
    """Training losses averaged over blocks, about 50 points in all; single losses are mostly noise."""
    many = max(1, len(found) // SMOOTH)
    blocks = [found[at : at + many] for at in range(0, len(found) - many + 1, many)]
    means = [(block[-1][0], sum(loss for _, loss in block) / many) for block in blocks]
    return Series(f"training, mean of {many}" if many > 1 else "training", means)


def earlier_line(steps: Sequence[Step], shown: Step | None = None) -> list[str]:
    """A line naming the steps other than `shown`, by default the last; no line for a single step."""
    if len(steps) < 2:
        return []
    shown = shown or steps[-1]
    others = [step for step in steps if step is not shown]
    named = ", ".join(f"{step.name} ({step.finished})" if step.finished else step.name for step in others)
    which = f"{shown.name}, the last. Earlier" if shown is steps[-1] else f"{shown.name}. Others"
    return [f"Done {len(steps)} times; this is {which}: {named}."]
