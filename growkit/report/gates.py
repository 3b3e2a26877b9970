"""The gates that decide on rollout, each a question with a verdict, and the overall verdict."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from growkit.report.facts import Facts, Step, mapping, number, percent, sha256_on_disk, texts
from growkit.report.growth import EXACT, gap_of, operator_fit, scores_of, start_line
from growkit.report.page import Gate, Mark, cell
from growkit.report.serving import GROUPS, checked, checks_of, group_name, mark_of
from growkit.text import counted, short

CHANCE = 0.05  # p below which a change of predictions is not chance
ACCURATE = "It is at least as accurate as its source"
ENDED = "It was trained to its end"
TOGETHER = "The files belong together"
WHOLE = "The record is whole"
VERIFIED = "The ONNX file was verified"
BOTH = "`growkit export --onnx`, then `growkit verify --data DATA`."
ANEW = "run `growkit export --force`, then `growkit verify --data DATA`."
LINES = 3  # checks quoted per group


def shipping(gates: Sequence[Gate]) -> Gate:
    """May it ship: no if a gate failed, not yet if one is open."""
    failed = [gate.name for gate in gates if gate.mark == "fail"]
    left = {"inconclusive": "undecided", "not done": "not checked"}
    unsure = [f"{gate.name} ({left[gate.mark]})" for gate in gates if gate.mark in left]
    answer, line = "yes", "Every gate passed."
    if not gates:
        answer, line = "not yet", "Nothing was grown or trained in this run yet: `growkit grow`."
    elif failed:
        answer, line = "no", f"Failed: {'; '.join(failed)}."
    elif unsure:
        answer, line = "not yet", f"Open: {'; '.join(unsure)}."
    return Gate("May it ship?", Mark(answer), line)


def gates_of(facts: Facts) -> list[Gate]:
    """Gates on the start, end of training, accuracy against the source, each group of checks, and matching files."""
    models, files = (facts.shipped, facts.grown, facts.tuned, facts.trained), (facts.export, facts.verify)
    judged = facts.all("evaluate") or facts.all("verify")
    if not any(models) and not any(files) and not judged and not facts.left_out:
        return []
    made = any(map(facts.all, ("grow", "finetune", "evaluate")))
    has_source = facts.grown or facts.tuned or made or not facts.trained
    return [
        *_whole(facts),
        *_start(facts),
        *_ended(facts),
        *([_accuracy(facts)] if has_source else []),
        *_checks(facts),
        *_together(facts),
    ]


def _whole(facts: Facts) -> Iterator[Gate]:
    """A gate if a file was left out that might have told why not to ship; the comparison of methods tells nothing."""
    if left_out := [line for line in facts.left_out if not line.startswith("compare/")]:
        yield Gate(WHOLE, Mark("inconclusive"), " ".join(left_out))


def _start(facts: Facts) -> Iterator[Gate]:
    gap = gap_of(facts)
    if gap is not None:  # a poor start is only a note: the accuracy gate judges the result
        line, mark = start_line(facts), Mark("pass" if gap <= EXACT else "note")
        yield Gate("It starts where the source stands", mark, line[0].upper() + line[1:])


def _ended(facts: Facts) -> Iterator[Gate]:
    """A gate if training of the model that ships was stopped before its end."""
    history = facts.tuned or facts.grown or facts.trained
    fit = mapping(history.get("fit") or history.get("operator"))
    killed = history is not facts.grown and bool(history) and "fit" not in history
    if killed or fit.get("interrupted"):
        done = number(fit.get("steps"))
        after = "" if done is None else f" after {counted(done, 'update')}"
        yield Gate(ENDED, Mark("inconclusive"), f"It was stopped{after}: the same command with --resume.")
    elif facts.tuned and mapping(facts.grown.get("operator")).get("interrupted"):
        line = "Training its growth operator was stopped, and fine-tuning went on from there."
        yield Gate(ENDED, Mark("note"), line)


def behaviour_step(facts: Facts) -> tuple[Step | None, str]:
    """The comparison with the source that counts, and a line if it is not of the shipped model and its source."""
    steps = facts.all("evaluate")
    if not steps:
        return None, ""
    shipped = facts.shipped[1] if facts.shipped else None
    known = [shipped, facts.onnx_sha256]
    source = mapping(facts.grown.get("source")).get("sha256") or facts.hashes("grow").get("source")
    own = [step for step in steps if (model := step.hashes.get("model")) and model in known]
    if facts.new_head:  # judge by another run's model: this run's own heads began untrained
        made = (*facts.all("grow"), *facts.all("finetune"))
        stages = {str(sha256) for step in made for sha256 in step.hashes.values()}
        others = [step for step in own if str(step.hashes.get("source")) not in stages]
        return (others[-1], "") if others else (steps[-1], "No other run's model of these classes was compared.")
    against = [step for step in own if source and step.hashes.get("source") == source]
    if against:
        return against[-1], ""
    if own:
        other = f"It is held against {own[-1].options.get('against')}, which is not what it was grown from."
        return own[-1], other if source else ""
    return steps[-1], f"It is of {steps[-1].options.get('model')}, which is not the model as it stands now."


def _accuracy(facts: Facts) -> Gate:
    """Accuracy against the source, image by image if that was evaluated, else by the two scores."""
    step, stale = behaviour_step(facts)
    if step and not stale and (gate := _by_image(step, new_head=facts.new_head)):
        return gate
    return _by_scores(facts)


def _by_image(step: Step, *, new_head: bool) -> Gate | None:
    """The gate of a comparison of answers; None if its figures are missing."""
    wrong, right = (number(mapping(step.figures.get(key)).get("count")) for key in ("turned_wrong", "turned_right"))
    p = number(step.figures.get("mcnemar_p"))
    if wrong is None or right is None or p is None:
        return None
    scores = (mapping(step.figures.get(key)).get("top1") for key in ("source_scores", "model_scores"))
    beside = f", against {step.options.get('against')}" if new_head else ""
    line = (
        f"Top-1 {' → '.join(map(percent, scores))}{beside}; {wrong:,.0f} answers turned wrong, "
        f"{right:,.0f} turned right (p = {p:.2g})."
    )
    return Gate(ACCURATE, Mark("pass" if wrong <= right else "fail" if p < CHANCE else "inconclusive"), line)


def _by_scores(facts: Facts) -> Gate:
    """The gate of the scores on record."""
    if facts.new_head:
        line = (
            "Its source has other classes, or none, so there is nothing to hold it against: fine-tune the source, too "
            "(`growkit finetune SOURCE --data DATA --run OTHER`), "
            "then `growkit evaluate --data DATA --against OTHER/finetuned`."
        )
        return Gate(ACCURATE, Mark("not done"), line)
    scores, tuned = scores_of(facts), facts.tuned or facts.tuning
    # of a grown model that was removed nobody knows whether its source had these classes
    source = scores.get("source") if facts.grown else None
    model = scores.get("tuned" if tuned else "operator")
    if model is None and not tuned and not operator_fit(facts):
        model = scores.get("step0")  # nothing was trained since
    remedy = "`growkit evaluate --data DATA --against SOURCE` tells image by image."
    if source is None or model is None:
        return Gate(ACCURATE, Mark("not done"), f"Not measured here: {remedy}")
    data = {Path(str(step.options.get("data"))) for step in (facts.latest("grow"), facts.tuning) if step}
    if source.get("count") != model.get("count") or len(data) > 1:
        return Gate(ACCURATE, Mark("inconclusive"), f"Measured on different images: {remedy}")
    line = f"Top-1 {percent(source['top1'])} → {percent(model['top1'])} on validation images; {remedy}"
    return Gate(ACCURATE, Mark("pass" if model["top1"] >= source["top1"] else "inconclusive"), line)


def _checks(facts: Facts) -> Iterator[Gate]:
    """One gate for each group of checks, and one for each group that a rollout needs and that is missing."""
    content = checked(facts)
    groups = checks_of(content)
    told = groups.pop("reference", [])
    reference = _held(facts) or told
    if reference:
        yield Gate(group_name("reference"), mark_of(reference), _line("reference", reference, content))
    if not groups:
        made = facts.here or facts.elsewhere
        yield Gate(VERIFIED, Mark("not done"), f"`{facts.verify_command}` does it." if made else BOTH)
        return
    for group, checks in groups.items():
        yield Gate(group_name(group), mark_of(checks), _line(group, checks, content))
    if content is not facts.verify:
        yield Gate(VERIFIED, Mark("not done"), f"Only the export's own checks: `{facts.verify_command}`.")
        return
    if not facts.here and facts.verify.get("onnx_sha256") != facts.onnx_sha256:
        remedy = f"`{facts.verify_command}`." if facts.elsewhere else BOTH
        yield Gate(VERIFIED, Mark("not done"), f"What was verified is no ONNX file that this run has now: {remedy}")
    for group, how in (("accuracy", ""), ("latency", ", with times")):  # one command answers both
        if group not in groups:
            yield Gate(GROUPS[group], Mark("not done"), f"`{facts.verify_command}`{how}.")


def _held(facts: Facts) -> list[Mapping[str, Any]]:
    """What the model alone and the file, as they are now, last came to against a reference, by the record.

    report.json may be of a later verification without one, and held-*.json of another model or file.
    """
    now = {"weights": facts.shipped[1] if facts.shipped else None, "model.onnx": facts.onnx_sha256}
    last: dict[bool, list[Mapping[str, Any]]] = {}  # by whether a file was held
    for step in facts.all("verify"):
        held = mapping(step.figures.get("reference"))
        if held and step.hashes and step.hashes.items() <= now.items():
            lines = texts(held.get("failed")) or [f"held against {step.options.get('reference')}"]
            last["model.onnx" in step.hashes] = [{"verdict": held.get("verdict"), "line": line} for line in lines]
    return [one for checks in last.values() for one in checks]


def _line(group: str, checks: Sequence[Mapping[str, Any]], content: Mapping[str, Any]) -> str:
    """Say what went wrong, or that nothing did."""
    wrong = [str(one.get("line") or one.get("name")) for one in checks if one.get("verdict") != "pass"]
    if wrong:
        return "; ".join(wrong[:LINES]) + (f"; and {len(wrong) - LINES} more" if len(wrong) > LINES else "") + "."
    found = mapping(mapping(content.get("numerics")).get("accuracy"))
    if group == "accuracy" and found:
        return (
            f"Top-1 {percent(found.get('top1'))}, PyTorch's {percent(found.get('torch_top1'))}, on "
            f"{cell(found.get('samples'))} images."
        )
    if len(checks) == 1 or (group == "latency" and len(checks) <= LINES):
        return "; ".join(str(one.get("line") or one.get("name")) for one in checks) + "."
    return f"{len(checks)} checks passed."


def _together(facts: Facts) -> Iterator[Gate]:
    """Whether the same model was fine-tuned, exported and verified, and its files are still those on record."""
    verified, shipped = facts.verify.get("onnx_sha256"), facts.shipped
    made = facts.exports or facts.all("export")
    weights = mapping(facts.export.get("provenance")).get("weights_sha256") or (made and made[-1].hashes.get("weights"))
    if line := _mixed(facts, weights):
        yield Gate(TOGETHER, Mark("fail"), line)
    elif replaced := _replaced(facts):
        yield replaced
    elif verified and weights and shipped:
        unseen = ", exported elsewhere and not looked at since" if facts.elsewhere else ""
        line = f"One model from {shipped[0]} weights {short(weights)}… to ONNX {short(verified)}…{unseen}."
        yield Gate(TOGETHER, Mark("pass"), line)


def _mixed(facts: Facts, weights: object) -> str:
    """Say which steps worked on different models, as steps may run more than once; `weights` were exported."""
    verified, exported = facts.verify.get("onnx_sha256"), facts.export.get("sha256")
    again = f"run `{facts.verify_command}` again."
    stage, sha256 = facts.shipped or ("", "")
    model = f"{facts.path.resolve().name}/{stage}"
    begun = mapping(facts.tuned.get("source")).get("sha256")
    # what was made first goes first: its remedy makes the later files anew, too
    if _differ(begun, facts.grown.get("weights_sha256") or facts.hashes("grow").get("grown")):
        remedy = "run `growkit finetune --force --data DATA` and what comes after it."
        return f"The fine-tuned model did not start from the latest grown model: {remedy}"
    if _differ(weights, sha256):
        return f"The ONNX file was made of other weights than {model}: {ANEW}"
    if _differ(verified, exported):
        return f"verify checked {short(verified)}…, the ONNX file is {short(exported)}… now: {again}"
    if _differ(facts.verify.get("weights_sha256"), sha256):
        return f"verify held a file against other weights than {model}: {again if weights else BOTH}"
    return ""


def _replaced(facts: Facts) -> Gate | None:
    """A gate if a file in the run folder is missing, or is not the one that the records tell of.

    The records tell of the file that was checked; only its bytes tell whether it still lies there.
    """
    onnx, verified, exported = facts.path / "onnx", facts.verify.get("onnx_sha256"), facts.export.get("sha256")
    made_here = any(facts.holds(step) for step in facts.all("export") if step.hashes.get("model.onnx") == verified)
    known: list[tuple[list[Path], object, str, str]] = []  # files, the SHA-256 on record and what it is of, what to do
    if made_here or facts.export or (onnx / "model.onnx").exists():
        names = dict.fromkeys(("model.onnx", *(Path(name).name for name in texts(facts.export.get("files")))))
        what = f"that was {'verified' if verified else 'exported'}"
        known.append(([onnx / name for name in names], verified or exported, what, ANEW))
    if facts.shipped:
        stage, sha256 = facts.shipped
        remedy = "restore it, or run the steps from there again."
        known.append(([facts.path / stage / "model.safetensors"], sha256, "on record", remedy))
    for files, wanted, what, remedy in known:
        if not wanted:
            continue
        found = sha256_on_disk(files)
        named = f"{files[0].parent.name}/{' with '.join(file.name for file in files)}"
        if found is None:
            return Gate(TOGETHER, Mark("not done"), f"{named} is missing or cannot be read: {remedy}")
        if found != wanted:
            return Gate(TOGETHER, Mark("fail"), f"{named} is not the file {what}: {remedy}")
    return None


def _differ(one: object, other: object) -> bool:
    return bool(one) and bool(other) and one != other
