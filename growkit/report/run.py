"""The report of a run, from its folder alone: a model's whole history, for whoever decides on its rollout."""

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from growkit.errors import GrowkitError
from growkit.record import RunFolder
from growkit.report.behaviour import agreement_sections
from growkit.report.commands import ONCE, command_line, in_lines
from growkit.report.facts import Facts, mapping, percent, read_facts
from growkit.report.gates import WHOLE, behaviour_step, gates_of, shipping
from growkit.report.growth import (
    earlier_line,
    grown_sizes,
    growth_section,
    scores_of,
    source_section,
    tuning_section,
)
from growkit.report.page import Gate, Mark, Report, Section, Table
from growkit.report.serving import latency_section, parity_section
from growkit.report.steps import hashes, machines, step_section
from growkit.text import short

DEFAULT = Path("run")  # of --run
# exceptions that damaged records cause
ODD = (ArithmeticError, AttributeError, GrowkitError, LookupError, TypeError, ValueError)


def run_report(run: RunFolder) -> Report:
    """Build the page of a run: the verdict, then sections from source, growth and fine-tuning to provenance.

    A step that is missing or damaged is a line in its section; of a repeated step the last counts.

    Raises:
        GrowkitError: there is no such folder, or it holds nothing that a run writes.
    """
    facts = read_facts(run)
    sections = [
        _guarded(title, make, facts)
        for title, make in (
            ("Source", source_section),
            ("Growth", growth_section),
            ("Fine-tuning", tuning_section),
            ("Behaviour against the source", _behaviour),
            ("Savings", _savings),
            ("ONNX parity", parity_section),
            ("Latency", latency_section),
            ("Provenance", _provenance),
        )
    ]
    try:
        gates = gates_of(facts)
    except ODD as error:
        gates = [Gate(WHOLE, Mark("fail"), f"It is damaged ({type(error).__name__}): run the steps again.")]
    title, summary = _head(facts)
    verdict = shipping(gates)
    if verdict.mark != "yes" and facts.path != DEFAULT:
        summary.append(f"Commands that are named as a remedy take --run {shlex.quote(str(facts.path))} here.")
    return Report(title, summary, sections, verdict, gates, facts.left_out)


def _guarded(title: str, make: Callable[[Facts], Section], facts: Facts) -> Section:
    """Make a section; only a line if its records are damaged."""
    try:
        return make(facts)
    except ODD as error:
        return Section(title, f"What the run folder says of this is damaged ({type(error).__name__}) and was left out.")


def _head(facts: Facts) -> tuple[str, list[str]]:
    """Title and summary: what was grown into what, and how its score changed."""
    origin, name = mapping(facts.grown.get("source")), facts.path.resolve().name
    if not origin:
        ran = ", ".join(step.name for step in facts.steps) or "no steps on record"
        return f"growkit report: {name}", [f"The run {name}: {ran}."]
    source, target = origin.get("architecture", "a source"), facts.grown.get("to", "a bigger model")
    method = mapping(facts.grown.get("settings")).get("method", "unknown")
    sizes = grown_sizes(facts)
    lines = [f"{origin.get('name')}, a {source}, was grown with {method}" + (f": {sizes}." if sizes else ".")]
    scores = scores_of(facts)
    step, stale = behaviour_step(facts)
    if "source" not in scores and step and not stale and not facts.new_head:  # both of the same images
        last = "tuned" if facts.tuned or facts.tuning else "step0"
        scores = {"source": mapping(step.figures.get("source_scores")), last: mapping(step.figures.get("model_scores"))}
    told = (("source", "source"), ("step0", "grown"), ("tuned", "fine-tuned"))
    known = [f"{word} {percent(scores[key].get('top1'))}" for key, word in told if key in scores]
    if known:
        lines.append(f"Top-1 on validation images: {', '.join(known)}.")
    grew = f": {sizes}" if source == target and sizes else f" into {target}"
    return f"{source} grown{grew}", lines


def _behaviour(facts: Facts) -> Section:
    title = "Behaviour against the source"
    step, stale = behaviour_step(facts)
    if step is None:
        return Section(
            title,
            "Not compared: `growkit evaluate --data DATA --against SOURCE` tells which answers turned wrong or right.",
        )
    compared = f"{step.options.get('model')} against {step.options.get('against')}, on {step.options.get('data')}."
    lines = filter(None, (compared, stale, *earlier_line(facts.all("evaluate"), step)))
    scores, predictions, classes = agreement_sections(step.figures)
    parts = [replace(one, title=one.title.capitalize()) for one in (scores, predictions, replace(classes, folded=True))]
    return Section(title, "\n".join(lines), parts=parts)


def _savings(facts: Facts) -> Section:
    if not facts.comparison:
        return Section("Savings", "Not compared here: `growkit compare` measures what each method saves.")
    from growkit.compare.page import savings_section

    other = mapping(facts.comparison.get("source")).get("sha256")
    mine = mapping(facts.grown.get("source")).get("sha256")
    made = savings_section(facts.comparison)
    if other and mine and other != mine:
        line = f"The comparison grew another source ({short(other)}…) than this run ({short(mine)}…)."
        return replace(made, text=f"{line}\n{made.text}")
    return made


def _provenance(facts: Facts) -> Section:
    """How to repeat the run, what it ran on, and the hashes of its files."""
    steps = facts.steps
    licence = mapping(facts.config.get("pretrained_cfg")).get("license")
    lines = []
    typed = [command_line(step.content.get("command_line")) for step in steps]
    # a repeated command is listed once, where it ran last: what ran before it may have made what it read
    commands = list(dict.fromkeys(line for line in reversed(typed) if line))[::-1]
    if steps:
        kept = f"As they were typed, in order, but for {', '.join(ONCE)}."
        lines.append(kept if commands else "How the steps were started is not on record.")
    if licence:
        lines.append(f"License that timm notes for the architecture's weights: {licence}.")
    if compared := command_line(facts.comparison.get("command")):
        commands.append(compared)
    seeds = [(step.name, step.options["seed"]) for step in steps if "seed" in step.options]
    parts = []
    if steps:
        parts = [Section("Machine and versions", table=machines(steps)), Section("Files", table=hashes(steps))]
        if seeds:
            parts.append(Section("Seeds", table=Table(("step", "seed"), [(name, str(seed)) for name, seed in seeds])))
        parts.append(Section("Every step as recorded", parts=[*map(step_section, steps)], folded=True))
    return Section(
        "Provenance", "\n".join(lines) or "No steps on record.", code=[*map(in_lines, commands)], parts=parts
    )
