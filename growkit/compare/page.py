"""A comparison as tables, plots and one page; the same rows for the terminal, the README and the report."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from growkit.compare.arms import in_words
from growkit.compare.figures import ArmFigures, BudgetFigures, figures_of, warnings
from growkit.compare.savings import Estimate, Saving, estimate, name_of, shown
from growkit.compare.settings import SCHEMA, numbers, percent
from growkit.compare.trials import Tried
from growkit.files import whole_file
from growkit.report.page import Report, Section, Table, cell, write_report
from growkit.report.plot import Bar, Bars, Plot, Series, save
from growkit.text import counted, visible

Rows = tuple[Sequence[str], Sequence[Sequence[str]]]  # columns, rows


def main_table(arms: Sequence[ArmFigures], metric: str = "top1") -> Rows:
    """Scores of each arm on the test images at each budget, and its saving."""
    budgets = [found.budget for found in arms[0].budgets]
    columns = (
        "method",
        "step 0 (held-out)",
        *(f"test {name_of(metric)} at {percent(budget)}" for budget in budgets),
        "top-1 ahead at 100%",
        "saving",
        "saving, source counted",
    )

    def score(found: BudgetFigures) -> str:
        scored = found.top1 if metric == "top1" else found.loss
        return _of_seeds(points(scored) if metric == "top1" else with_half(scored, ".4f"), scored, found.seeds)

    def ahead(found: BudgetFigures) -> str:
        return _of_seeds(points(found.ahead, sign="+"), found.ahead, found.seeds)

    rows = [
        (
            arm.name,
            points(arm.step0),
            *(score(found) for found in arm.budgets),
            ahead(arm.budgets[-1]) if index else "",
            share(arm.saving) if index else "",
            share(arm.saving_including_source) if index else "",
        )
        for index, arm in enumerate(arms)
    ]
    return columns, rows


def _of_seeds(text: str, found: Estimate | None, seeds: int) -> str:
    """The text of an estimate, with the number of its seeds if some failed."""
    return f"{text} ({found.count} of {seeds})" if found is not None and found.count < seeds else text


def cost_table(arms: Sequence[ArmFigures]) -> Rows:
    """What each arm cost, and its learning rates."""
    columns: tuple[str, ...] = (
        "method",
        "operator TFLOP",
        "operator lr",
        "after operator (held-out)",
        "TFLOP to target",
        "TFLOP in all",
        "lr at each budget",
        "wall s",
    )
    rows = [
        (
            arm.name,
            cell(arm.operator_flops / 1e12) if arm.operator_flops else "–",
            f"{arm.operator_lr:g}" if arm.operator_lr else "–",
            points(arm.after_operator),
            _costs(arm.flops_to_target, arm.budgets[-1].seeds),
            cell(arm.budgets[-1].flops / 1e12) if arm.budgets[-1].flops else "–",
            ", ".join("–" if found.lr is None else f"{found.lr:g}" for found in arm.budgets),
            with_half(arm.seconds, ".0f"),
        )
        for arm in arms
    ]
    return columns, rows


def _costs(flops: Sequence[float | None], seeds: int) -> str:
    """TFLOP to the target: the mean with its interval, or each seed's if some never reached it."""
    reached = [cost / 1e12 for cost in flops if cost is not None]
    if len(reached) == len(flops):
        return with_half(estimate(reached, seeds), ".3g")
    return ", ".join("never" if cost is None else cell(cost / 1e12) for cost in flops)


def with_half(found: Estimate | None, form: str, *, scale: float = 1, sign: str = "") -> str:
    """A number with half its 95 % interval, if it has one; `sign` is + to show that of the number."""
    if found is None:
        return "–"
    text = f"{scale * found.mean:{sign}{form}}"
    return text if found.high is None else f"{text} ± {scale * (found.high - found.mean):{form}}"


def points(found: Estimate | None, *, sign: str = "") -> str:
    """A share as percentage points: 59.3 ± 0.8."""
    return with_half(found, ".1f", scale=100, sign=sign)


def share(found: Saving | None) -> str:
    """A saving in per cent; an upper bound if some seed never reached the target."""
    if found is None:
        return "–"
    saved = f"{round(100 * found.mean)}%"
    if found.bound:
        return f"≤ {saved} ({found.reached} of {found.seeds} there)"
    if found.mean == 1:
        return f"{saved}, there at step 0"
    return saved if found.high is None else f"{saved} ± {100 * (found.high - found.mean):.0f}"


def plots(arms: Sequence[ArmFigures], metric: str) -> dict[str, Plot | Bars]:
    """Curves over compute, final scores and savings, by file name."""
    scale, unit, most = 1, "loss on held-out images", math.inf
    if metric == "top1":
        scale, unit, most = 100, "top-1 on held-out images, %", 1.0
    curves = [
        Series(
            arm.name,
            [(flops / 1e12, scale * found.mean) for flops, found in arm.curve],
            low=[scale * (found.mean if found.low is None else max(0.0, found.low)) for _, found in arm.curve],
            high=[scale * (found.mean if found.high is None else min(most, found.high)) for _, found in arm.curve],
        )
        for arm in arms
        if arm.curve
    ]
    alone = arms[0].curve
    final = [
        Bar(arm.name, *_percent(arm.budgets[-1].top1), note=arm.failures[0] if arm.failures else "") for arm in arms
    ]
    saved = [Bar(arm.name, *_percent(arm.saving, least=-math.inf), note=_censored(arm.saving)) for arm in arms[1:]]
    return {
        "curves": Plot(
            title="Score over compute, full budget",
            series=curves,
            x_label="TFLOP of training, operator included",
            y_label=unit,
            reference=("from scratch, at its end", scale * alone[-1][1].mean) if alone else None,
        ),
        "final": Bars(title="Test top-1 at the full budget, %", bars=final, label="top-1, %"),
        "saving": Bars(title="Compute saved to reach what training from scratch ends with, %", bars=saved, label="%"),
    }


def _percent(found: Estimate | Saving | None, *, least: float = 0.0) -> tuple[float | None, float | None, float | None]:
    """Mean, low and high in per cent, the interval clipped to what a share can be."""
    if found is None:
        return None, None, None
    low, high = found.low, found.high
    return 100 * found.mean, low if low is None else 100 * max(least, low), high if high is None else 100 * min(1, high)


def _censored(found: Saving | None) -> str:
    if found is None:
        return "no run"
    return f"at most; {found.reached} of {found.seeds} seeds got there" if found.bound else ""


def comparison_report(content: Mapping[str, Any], arms: Sequence[ArmFigures]) -> Report:
    """The page of a comparison; `content` is its results.json."""
    metric = content["settings"]["metric"]
    failures = [(arm.name, line) for arm in arms for line in arm.failures]
    grown = [(name, in_words(arm["grow"])) for name, arm in content["arm_settings"].items() if arm["grow"] is not None]
    drawn = list(plots(arms, metric).values())
    sections = [
        Section("What each method gave", _reading(content["settings"], arms), Table(*main_table(arms, metric)), drawn),
        Section("What it cost", table=Table(*cost_table(arms))),
        *([Section("Failed runs", table=Table(("method", "run"), failures))] if failures else []),
        Section("Methods", table=Table(("method", "settings"), grown)),
        *_settings(content, "settings", "recipe", "operator", "data", "versions", "hardware"),
    ]
    return Report("growkit compare", _summary(content, arms), sections)


def _summary(content: Mapping[str, Any], arms: Sequence[ArmFigures]) -> list[str]:
    """What was grown into what, how training from scratch ends, what training took, and what to beware of."""
    full, known, images = content["full_flops"], content["source_flops"], content["images"]["test images"]
    own = ""
    if not content.get("own_head", True):
        own = "The source has a new head, untrained: its own score says nothing."
    elif "source_score" in content:
        own = f"The source itself has top-1 {content['source_score']['top1']:.1%} on the held-out images."
    lines = [
        f"{content['source']['name']} ({_size(content['source'])}) grown into {_size(content['target'])}, "
        f"{counted(content['settings']['seeds'], 'paired seed')}, "
        f"{counted(images, 'test image')}, one of which is {100 / images:.2g} points of top-1.",
        *([own] if own else []),
        f"From scratch the target ends at {points(arms[0].budgets[-1].top1)} % on the test images, after "
        f"{cell(full / 1e12)} TFLOP ({cell(full / 2e12)} T multiply-adds).",
        "Training the source took "
        + (f"{cell(known / 1e12)} TFLOP." if known is not None else "an unknown amount; --source-flops says it."),
    ]
    return lines + [f"Beware: {told}." for told in warnings(content, arms)]


def _reading(settings: Mapping[str, Any], arms: Sequence[ArmFigures]) -> str:
    """How to read the tables."""
    text = (
        "Every arm sees the same images in the same order with the same augmentation and schedule, and is trained for "
        "the same FLOPs short of one update, operator training included; its learning rate is the best of the same "
        "grid on held-out images, found on the first seed. Held-out and test images are two parts of the validation "
        "images, which neither the source nor any arm was trained on; test images are scored once, by the runs so "
        "chosen.\n"
        "Saving is 1 - C / C(from scratch), with C the FLOPs to reach the held-out score that training from scratch "
        "ends with, along the full budget; 'source counted' adds the source's own training to C. ≤ marks an upper "
        "bound: some seed never got there, or failed.\n"
        "± is half a 95 % interval over paired seeds (Student's t), all scored on the same test images: it says "
        "nothing of the luck in these, which weighs the more the fewer they are."
    )
    if settings["seeds"] == 1:
        text += " One seed has none: a hint, not a result."
    text += (
        " A source that is as good as the end of training from scratch saves everything by construction: then only "
        "scores at equal budget tell methods apart."
    )
    rates = numbers("--lrs", settings["lrs"])
    edge = [arm.name for arm in arms if len(rates) > 2 and arm.budgets[-1].lr in (rates[0], rates[-1])]
    if edge:
        text += f"\nBest at the edge of the grid of rates, so that a wider one may serve better: {', '.join(edge)}."
    return text


def savings_section(content: Mapping[str, Any]) -> Section:
    """A comparison as one section of another page; `content` is its results.json."""
    if content.get("schema") != SCHEMA:
        return Section("Savings", "Another version of growkit made the comparison: run `growkit compare` again.")
    report = comparison_report(content, figures_of(content))
    gave, cost, *_ = report.sections
    failed = [section for section in report.sections if section.title == "Failed runs"]
    parts = [Section("How to read this", gave.text, folded=True), replace(cost, folded=True), *failed]
    return Section("Savings", "\n".join(report.summary), gave.table, gave.plots, parts=parts)


def _settings(content: Mapping[str, Any], *titles: str) -> list[Section]:
    """One table for each of these parts of a results.json, and the command."""
    tables = [
        Section(title.capitalize(), table=Table(("name", "value"), [(n, cell(v)) for n, v in content[title].items()]))
        for title in titles
    ]
    return [*tables, Section("Command", content["command"])]


def _markdown(report: Report, content: Mapping[str, Any], arms: Sequence[ArmFigures]) -> str:
    """The comparison's summary and tables as Markdown, for a README or a pull request."""
    machine, seen = content["hardware"], content["versions"]
    on = ", ".join(f"{name} {seen[name]}" for name in ("python", "torch", "timm", "growkit") if name in seen)
    where = machine.get("gpu") or f"{machine['cores']} cores of {machine['cpu']}, {machine['torch_threads']} threads"
    parts = [
        *map(_in_markdown, report.summary),
        *map(_in_markdown, report.sections[0].text.splitlines()),
        _markdown_table(main_table(arms, content["settings"]["metric"])),
        _markdown_table(cost_table(arms)),
        *(_in_markdown(f"Failed: {arm.name}, {line}") for arm in arms for line in arm.failures),
        _in_markdown(f"{where}; {on}."),
        f"    {visible(content['command'])}",
    ]
    return "\n\n".join(parts) + "\n"


def _markdown_table(rows: Rows) -> str:
    columns, body = rows
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *body]
    return "\n".join("| " + " | ".join(map(_in_markdown, line)) + " |" for line in lines)


def _in_markdown(text: str) -> str:
    """Escape text so that Markdown shows it literally: no columns, links, emphasis, code or HTML."""
    return re.sub(r"[\\|`\[\]*~]|\b_|_\b|(?<=_)_", r"\\\g<0>", visible(text)).replace("&", "&amp;").replace("<", "&lt;")


def write_pages(folder: Path, content: Mapping[str, Any], arms: Sequence[ArmFigures]) -> None:
    """Write report.html, results.md, and each plot as PNG and SVG."""
    report = comparison_report(content, arms)
    with whole_file(folder / "results.md") as partial:
        partial.write_text(_markdown(report, content, arms), encoding="utf-8")
    for name, plot in plots(arms, content["settings"]["metric"]).items():
        save(plot, folder / "plots", name)
    write_report(folder / "report.html", report)


def _size(architecture: Mapping[str, Any]) -> str:
    sizes = architecture["spaces"]
    return f"{sizes['blocks']} layers, {sizes['embed']} wide"


def trials_table(tried: Sequence[Tried], metric: str) -> Rows:
    """Trials of a sweep that were judged by `metric`, one row each."""
    never = {"finished": "never", "stopped early": "–", "failed": "–"}  # one that was stopped might have reached it
    columns = ("trial", "options", "score", "step 0", "operator TFLOP", "TFLOP spent", "TFLOP to scratch", "state")
    rows = [
        (
            str(one.number),
            in_words(one.options),
            shown(one.score, metric),
            shown(one.step0, metric),
            cell(one.operator_flops / 1e12),
            cell(one.flops / 1e12),
            cell(one.flops_to_scratch / 1e12) if one.flops_to_scratch is not None else never[one.state],
            f"{one.state}: {one.reason}" if one.reason else one.state,
        )
        for one in tried
    ]
    return columns, rows


def write_sweep_page(folder: Path, content: Mapping[str, Any], tried: Sequence[Tried]) -> None:
    """Write report.html of a sweep."""
    order = (
        "Scores are on held-out images. Finished trials come first; then the others, whose score is the last one they "
        "had, when they were stopped early or failed."
    )
    sections = [
        Section("Recommended", "\n".join((*content["reasons"], "The full run:", *content["commands"]))),
        Section(
            "Trials, best first",
            "\n".join((order, *content["left_out"])),
            Table(*trials_table(tried, content["settings"]["metric"])),
        ),
    ]
    sections += _settings(content, "settings", "recipe", "data", "versions", "hardware")
    first, *others = content["reasons"]
    summary = [first, *(line for line in others if line.startswith("warning: "))]
    write_report(folder / "report.html", Report("growkit sweep", summary, sections))
