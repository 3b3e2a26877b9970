"""The page of a run: it tells every part, decides as the checks did, and no damage or markup gets the better of it."""

import hashlib
import json
import math
import shlex
import shutil
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from report_samples import (
    GROWN,
    ONNX,
    SECTIONS,
    SOURCE,
    TUNED,
    agreement,
    as_step,
    comparison,
    scores,
    verification,
    write_run,
)
from test_cli import growkit
from test_report import EVIL, Page

from growkit.errors import GrowkitError
from growkit.files import read_json, sha256_of, write_json
from growkit.record import RunFolder
from growkit.report.commands import command_line
from growkit.report.facts import read_facts
from growkit.report.gates import shipping
from growkit.report.growth import _smoothed, duration
from growkit.report.page import Gate, Mark, render
from growkit.report.plot import Bars, Chart, draw
from growkit.report.run import run_report

Change = Callable[[RunFolder], None]


def gates(run: RunFolder) -> dict[str, str]:
    return {gate.name: str(gate.mark) for gate in run_report(run).gates}


def text(run: RunFolder) -> str:
    page = Page(render(run_report(run)))
    assert page.open == []
    return page.text


def record(run: RunFolder) -> dict[str, Any]:
    return json.loads(run.record.read_text())


def verdict(run: RunFolder) -> Gate:
    found = run_report(run).verdict
    assert found is not None
    return found


def test_page_tells_throughput_and_what_the_files_precision_allows(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    checks = [{**one, "limit": 0.056} if "relative RMS" in one["name"] else one for one in verification()["checks"]]
    content = verification(checks=checks)
    content["throughput"] |= {"foreign": 0.4, "contended": True}
    content["numerics"]["batches"]["2"]["relative_rms"] = 3e-7
    content["numerics"]["accuracy"] |= {"n01": 3, "n10": 4}
    write_json(run.verify / "report.json", content)
    told = text(run)
    assert "Further figures" not in told
    content["throughput"]["rates"][0]["images_per_second"] = 3851.2
    write_json(run.verify / "report.json", content | {"latency": content["latency"] | {"notes": ["a busy machine"]}})
    assert all(words in text(run) for words in ("3,851", "Further figures", "a busy machine"))
    assert "differ from the float64 model by 3.0e-07 of their spread" in told
    assert "it turned 3 answers right and 4 wrong against PyTorch" in told
    assert "Other programs took 40% of the processors meanwhile." in told
    for words in ("Throughput, as a server runs it", "47%", "296", "The peak is 331 GFLOP/s", "spread, allowed 0.056"):
        assert words in told, words


def test_page_tells_the_whole_way(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", compared=True)
    report, told = run_report(run), text(run)
    assert tuple(section.title for section in report.sections) == SECTIONS
    for words in (
        "deit_small_patch16_224 grown into deit_base_patch16_224",
        "width 384 to 768, heads 6 to 12",
        "Every gate passed",
        "mango, rank 4",
        "1.0×10⁻⁶",
        "86 million",
        "Evaluation 2 of 2 (epochs) was the best",
        "+5.0 points",
        "10 turned wrong and 60 turned right",
        "343.0 MB, opset 18, IR 8",
        "2.0e-07",
        "0.99 [0.97, 1.01]",
        "growkit finetune",
        ONNX,
        "apache-2.0",
        "a processor",
        "1. grow",
    ):
        assert words in told, words
    plots = [plot.title for section in report.sections for plot in section.plots]
    assert len(plots) == len(set(plots)) >= 8
    assert "damaged" not in told
    assert "left out" not in told


def test_curve_of_training_losses_has_means_at_the_end_of_what_they_are_of() -> None:
    losses = [(step, float(step % 2)) for step in range(1, 104)]
    drawn = _smoothed(losses)
    assert (drawn.name, drawn.points) == ("training, mean of 2", [(step, 0.5) for step in range(2, 103, 2)])
    assert _smoothed(losses[:99]).points == losses[:99]


def test_every_gate_passes_and_it_may_ship(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert set(gates(run).values()) == {"pass"}
    assert len(gates(run)) == 9
    assert verdict(run).mark == "yes"


def spoiled(**changes: Any) -> Change:
    return lambda run: write_json(run.verify / "report.json", verification(**changes))


def one_check(group: str, outcome: str) -> Change:
    """The first check of a group with this verdict; a group that is not there is added."""
    content = verification()
    own = next((one for one in content["checks"] if one["group"] == group), None)
    if own is None:
        own = {**content["checks"][0], "group": group}
        content["checks"].append(own)
    own.update(verdict=outcome, line="the reason why")
    return lambda run: write_json(run.verify / "report.json", content)


def without(*commands: str, **scores: float) -> Change:
    """No step of these commands; other scores of the fine-tuned model where given."""

    def change(run: RunFolder) -> None:
        content = record(run)
        content["steps"] = [step for step in content["steps"] if step["command"] not in commands]
        for step in content["steps"]:
            if step["command"] == "finetune":
                step["figures"]["best"] |= scores
        write_json(run.record, content)

    return change


def unscored(made: str) -> Change:
    """Without the scores in this file, or in the figures of the step of this command."""

    def change(run: RunFolder) -> None:
        path = run.path / made
        if path.is_file():
            write_json(path, {key: value for key, value in read_json(path).items() if key != "scores"})
        content = record(run)
        for step in content["steps"]:
            if step["command"] == made:
                step["figures"] = {**step["figures"], "best": None}
        write_json(run.record, content)

    return change


def operator_only(*, trained: bool) -> Change:
    """Grown, with or without training of the operator, and neither scored after it nor fine-tuned."""

    def change(run: RunFolder) -> None:
        in_turn(without("evaluate", "finetune", "export", "verify"), removed("finetuned", "onnx", "verify"))(run)
        content, path = record(run), run.grown / "growkit.json"
        del content["steps"][0]["figures"]["scores"]["operator"]
        if not trained:
            content["steps"][0]["figures"]["operator"] = None
            write_json(path, read_json(path) | {"operator": None})
        write_json(run.record, content)

    return change


def removed(*names: str) -> Change:
    def change(run: RunFolder) -> None:
        for name in names:
            shutil.rmtree(run.path / name)

    return change


def recorded(command: str, *, more: bool = False, **entries: dict[str, Any]) -> Change:
    """Other options, figures or hashes of the command's step, or with `more` of the same command run once more."""

    def change(run: RunFolder) -> None:
        content = record(run)
        step = next(step for step in content["steps"] if step["command"] == command)
        changed = {part: step[part] | new for part, new in entries.items()}
        if more:
            content["steps"].append(step | {"finished": "2026-02-02T00:00:00+00:00"} | changed)
        else:
            step |= changed
        write_json(run.record, content)

    return change


def again(command: str, **hashes: str) -> Change:
    """The command once more, with other files."""

    def change(run: RunFolder) -> None:
        recorded(command, more=True, hashes=hashes)(run)
        for stage, sha256 in hashes.items():
            if (path := run.path / stage / "growkit.json").exists():
                write_json(path, read_json(path) | {"weights_sha256": sha256})

    return change


def evaluated(wrong: int, right: int, p: float, *, more: bool = False, **hashes: str) -> Change:
    return recorded("evaluate", more=more, figures=agreement(wrong, right, p), hashes=hashes)


def only(*groups: str) -> Change:
    checks = [one for one in verification()["checks"] if one["group"] in groups]
    return spoiled(checks=checks)


ACCURATE, VERIFIED, NUMBERS, FAST, TOGETHER = (
    "It is at least as accurate as its source",
    "The ONNX file was verified",
    "It gives the model's numbers",
    "It is as fast as its architecture allows",
    "The files belong together",
)


def held(what: str, verdict: str | None, *sha256: str) -> Change:
    """A model or a file alone, or both, held against a reference; `verdict` is None where that was not come to."""
    names = {"model": ["weights"], "file": ["model.onnx"], "nothing": []}.get(what, ["weights", "model.onnx"])
    hashes = dict(zip(names, sha256, strict=True))
    options = {"model": "weights" in hashes or None, "onnx": "model.onnx" in hashes or None, "reference": "accepted"}
    failed = [f"why the {what}"] if verdict == "fail" else []
    figures = {"verdict": "fail", "reference": {"verdict": verdict, "failed": failed} if verdict else None}

    def change(run: RunFolder) -> None:
        content = record(run)
        content["steps"].append(as_step("verify", options, figures, hashes))
        write_json(run.record, content)

    return change


def in_turn(*changes: Change) -> Change:
    def change(run: RunFolder) -> None:
        for one in changes:
            one(run)

    return change


def stopped(run: RunFolder) -> dict[str, Any]:
    content = read_json(run.finetuned / "growkit.json")
    return content | {"fit": content["fit"] | {"interrupted": True}}


def replaced(place: str, content: bytes | None = b"garbage") -> Change:
    """Another file at this place of the run, or none."""

    def change(run: RunFolder) -> None:
        (run.path / place).unlink()
        if content is not None:
            (run.path / place).write_bytes(content)

    return change


def killed(run: RunFolder) -> None:
    """Fine-tuning died after it had kept a model: neither its end nor a step is on record."""
    without("finetune")(run)
    content = read_json(run.finetuned / "growkit.json")
    del content["fit"]
    write_json(run.finetuned / "growkit.json", content | {"scores": scores(0.85)})


def grown_again_and_killed(run: RunFolder) -> None:
    """Grown anew, and killed between the two writes."""
    content = read_json(run.grown / "growkit.json")
    write_json(run.grown / "growkit.json", content | {"weights_sha256": "ee" * 32})


def half_an_operator(run: RunFolder) -> None:
    content = read_json(run.grown / "growkit.json")
    write_json(run.grown / "growkit.json", content | {"operator": content["operator"] | {"interrupted": True}})


def test_operator_training_that_was_stopped_is_told_as_such(tmp_path: Path) -> None:
    run, told = write_run(tmp_path / "run"), "It was stopped before its end."
    assert told not in text(run)
    half_an_operator(run)
    assert told in text(run)


def test_grown_model_that_nobody_fine_tuned_was_not_stopped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    operator_only(trained=True)(run)
    assert "It was trained to its end" not in gates(run)


@pytest.mark.parametrize(("seconds", "told"), [(119, "119 s"), (120, "2 min"), (7199, "120 min"), (9000, "2.5 h")])
def test_durations_are_told_in_the_unit_that_reads_best(seconds: float, told: str) -> None:
    assert duration(seconds) == told


def test_comparison_of_another_version_is_not_read_as_an_empty_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", compared=True)
    results = run.compare / "results.json"
    assert "Another version of growkit made the comparison" not in text(run)
    write_json(results, read_json(results) | {"schema": 2})
    assert "Another version of growkit made the comparison: run `growkit compare` again." in text(run)


def test_comparison_that_grew_another_source_is_told_as_such(tmp_path: Path) -> None:
    run, told = write_run(tmp_path / "run", compared=True), "The comparison grew another source (eeeeeeeeeeee…)"
    assert "another source" not in text(run)
    content = comparison()
    write_json(run.compare / "results.json", content | {"source": content["source"] | {"sha256": "ee" * 32}})
    assert told in text(run)


def tuned_again_and_killed(run: RunFolder) -> None:
    """Fine-tuned, then once more from another start: killed with a worse model kept. Nothing else was done of it."""
    in_turn(without("evaluate", "export", "verify"), removed("onnx", "verify"))(run)
    (run.finetuned / "model.safetensors").write_bytes(b"worse")
    content = read_json(run.finetuned / "growkit.json")
    del content["fit"]
    sha256 = sha256_of(run.finetuned / "model.safetensors")
    write_json(run.finetuned / "growkit.json", content | {"scores": scores(0.7), "weights_sha256": sha256})


def damaged(place: str) -> Change:
    def change(run: RunFolder) -> None:
        (run.path / place).write_text("{")

    return change


def trained_here(run: RunFolder) -> None:
    write_json(run.trained / "growkit.json", {"fit": {"steps": 3}, "weights_sha256": SOURCE})


def another_model_exported(run: RunFolder) -> None:
    """Another model was exported since, and the file held against the source."""
    again("export", **{"weights": "ee" * 32, "model.onnx": "ff" * 32})(run)
    evaluated(60, 10, 1e-9, more=True, model="ff" * 32)(run)


def file_evaluated(sha256: str) -> Change:
    """The model was exported again, elsewhere; of the file with this SHA-256 more answers turned wrong."""
    out, other = {"out": "elsewhere"}, {"model.onnx": "ff" * 32}
    return in_turn(evaluated(60, 10, 1e-9, model=sha256), recorded("export", more=True, options=out, hashes=other))


def exported_elsewhere(run: RunFolder) -> None:
    recorded("export", options={"out": str(run.path.parent / "elsewhere")})(run)


def exported_beside(model: str) -> Change:
    """The record tells of a file beside a model that lay elsewhere: in the run before it was moved, or of a copy."""
    return recorded("export", options={"model": f"before/{model}", "out": "before/onnx"})


GOLDEN = "It answers as when it was accepted"
WHOLE = "The record is whole"
DECISIONS: dict[str, tuple[Change, str, str, str]] = {  # what happened, which gate, its mark, may it ship
    "a number is off": (one_check("numbers", "fail"), NUMBERS, "fail", "no"),
    "too noisy": (
        one_check("latency", "inconclusive"),
        "It is as fast as its architecture allows",
        "inconclusive",
        "not yet",
    ),
    "the model alone is not what was accepted": (held("model", "fail", TUNED), GOLDEN, "fail", "no"),
    "the file alone is what was accepted": (held("file", "pass", ONNX), GOLDEN, "pass", "yes"),
    "of model and file one is not what was accepted": (
        in_turn(held("file", "fail", ONNX), held("model", "pass", TUNED)),
        GOLDEN,
        "fail",
        "no",
    ),
    "the file is not what was accepted, and no record tells": (one_check("reference", "fail"), GOLDEN, "fail", "no"),
    "the model alone is not what the verified file is": (
        in_turn(one_check("reference", "pass"), held("model", "fail", TUNED)),
        GOLDEN,
        "fail",
        "no",
    ),
    "the model alone is not what was accepted, but the one grown is": (
        in_turn(held("model", "fail", TUNED), held("model", "pass", GROWN)),
        GOLDEN,
        "fail",
        "no",
    ),
    "the model alone is not what was accepted, but what the record does not name is": (
        in_turn(held("model", "fail", TUNED), held("nothing", "pass")),
        GOLDEN,
        "fail",
        "no",
    ),
    "the file alone is not what was accepted, but another is": (
        in_turn(held("file", "fail", ONNX), held("file", "pass", "ff" * 32)),
        GOLDEN,
        "fail",
        "no",
    ),
    "the file alone is not what was accepted, and was accepted then": (
        in_turn(held("file", "fail", ONNX), held("both", "pass", TUNED, ONNX)),
        GOLDEN,
        "pass",
        "yes",
    ),
    "the file is not what was accepted, and was verified without that since": (
        held("both", "fail", TUNED, ONNX),
        GOLDEN,
        "fail",
        "no",
    ),
    "the file is what was accepted, and too slow, and was verified without that since": (
        held("both", "pass", TUNED, ONNX),
        GOLDEN,
        "pass",
        "yes",
    ),
    "the file alone is not what was accepted, and no verification could tell": (
        in_turn(held("file", "fail", ONNX), held("both", None, TUNED, ONNX)),
        GOLDEN,
        "fail",
        "no",
    ),
    "the file failed once, and is what was accepted now": (
        in_turn(held("both", "fail", TUNED, ONNX), held("both", "pass", TUNED, ONNX)),
        GOLDEN,
        "pass",
        "yes",
    ),
    "the model is not what was accepted and there is no file": (
        in_turn(removed("onnx"), lambda run: (run.verify / "report.json").unlink(), held("model", "fail", TUNED)),
        GOLDEN,
        "fail",
        "no",
    ),
    "the file exported elsewhere is not what was accepted": (
        in_turn(removed("onnx"), exported_elsewhere, held("file", "fail", ONNX)),
        GOLDEN,
        "fail",
        "no",
    ),
    "the file is not what was accepted, and its export is not on record": (
        in_turn(without("export"), held("file", "fail", ONNX)),
        GOLDEN,
        "fail",
        "no",
    ),
    "a group nobody knows yet": (one_check("energy_use", "fail"), "Energy use", "fail", "no"),
    "a verdict nobody knows yet": (
        one_check("numbers", "skipped"),
        "It gives the model's numbers",
        "inconclusive",
        "not yet",
    ),
    "no data": (only("structure", "numbers", "latency"), "It scores like the model", "not done", "not yet"),
    "no times": (only("structure", "accuracy"), FAST, "not done", "not yet"),
    "not verified": (removed("verify"), VERIFIED, "not done", "not yet"),
    "not exported": (removed("verify", "onnx"), VERIFIED, "not done", "not yet"),
    "another run's file verified": (
        in_turn(removed("onnx"), without("export"), spoiled(weights_sha256="ee" * 32)),
        TOGETHER,
        "fail",
        "no",
    ),
    "a file of this model verified, and none in the run": (
        in_turn(removed("onnx"), without("export"), spoiled(weights_sha256=TUNED)),
        VERIFIED,
        "not done",
        "not yet",
    ),
    "the file in the run was verified, and nothing tells of its export": (
        in_turn(without("export"), replaced("onnx/export.json", None)),
        NUMBERS,
        "pass",
        "yes",
    ),
    "fine-tuning was killed": (killed, "It was trained to its end", "inconclusive", "not yet"),
    "fine-tuning was killed and the rest was done of what it left": (killed, TOGETHER, "pass", "not yet"),
    "operator training was stopped, and fine-tuning was not": (
        half_an_operator,
        "It was trained to its end",
        "note",
        "yes",
    ),
    "fine-tuning was stopped": (
        lambda run: write_json(run.finetuned / "growkit.json", stopped(run)),
        "It was trained to its end",
        "inconclusive",
        "not yet",
    ),
    "fine-tuning was killed after another had ended": (tuned_again_and_killed, ACCURATE, "inconclusive", "not yet"),
    "fine-tuning was stopped, and its record is damaged": (
        damaged("finetuned/growkit.json"),
        WHOLE,
        "inconclusive",
        "not yet",
    ),
    "what was grown of a model trained here is damaged": (
        in_turn(trained_here, without("evaluate"), damaged("grown/growkit.json")),
        WHOLE,
        "inconclusive",
        "not yet",
    ),
    "fine-tuning was stopped, and its record is gone": (
        in_turn(
            lambda run: write_json(run.finetuned / "growkit.json", stopped(run)),
            replaced("finetuned/growkit.json", None),
        ),
        WHOLE,
        "inconclusive",
        "not yet",
    ),
    "fine-tuning was stopped, and its record tells nothing": (
        replaced("finetuned/growkit.json", b"{}"),
        WHOLE,
        "inconclusive",
        "not yet",
    ),
    "what was grown of a model trained here is gone": (
        in_turn(trained_here, without("evaluate"), removed("grown")),
        ACCURATE,
        "not done",
        "not yet",
    ),
    "what was grown is gone, and the model was held against another": (
        in_turn(removed("grown"), recorded("evaluate", hashes={"source": "ee" * 32})),
        ACCURATE,
        "not done",
        "not yet",
    ),
    "what was grown is gone, and the model was held against its source": (removed("grown"), ACCURATE, "pass", "yes"),
    "a given model was fine-tuned, and held against it": (
        in_turn(removed("grown"), without("grow")),
        ACCURATE,
        "pass",
        "yes",
    ),
    "nothing tells which model ships, nor which was compared": (
        in_turn(
            removed("finetuned", "grown"), without("grow", "finetune"), recorded("evaluate", hashes={"model": None})
        ),
        ACCURATE,
        "not done",
        "not yet",
    ),
    "the comparison of methods is damaged": (
        in_turn(lambda run: run.compare.mkdir(), damaged("compare/results.json")),
        TOGETHER,
        "pass",
        "yes",
    ),
    "more answers turned wrong": (evaluated(60, 10, 1e-9), ACCURATE, "fail", "no"),
    "more answers turned wrong when it was evaluated again": (
        evaluated(60, 10, 1e-9, more=True),
        ACCURATE,
        "fail",
        "no",
    ),
    "a few more turned wrong": (evaluated(12, 10, 0.83), ACCURATE, "inconclusive", "not yet"),
    "as many turned wrong": (evaluated(10, 10, 1.0), ACCURATE, "pass", "yes"),
    "more answers of another model turned wrong": (another_model_exported, ACCURATE, "pass", "yes"),
    "more answers of the file in the run turned wrong": (file_evaluated(ONNX), ACCURATE, "fail", "no"),
    "more answers of the file in the run turned wrong, whose own record is lost": (
        in_turn(file_evaluated(ONNX), replaced("onnx/export.json", None)),
        ACCURATE,
        "fail",
        "no",
    ),
    "more answers of the file exported elsewhere turned wrong": (file_evaluated("ff" * 32), ACCURATE, "pass", "yes"),
    "scores alone, better": (without("evaluate"), ACCURATE, "pass", "yes"),
    "scores alone, worse": (without("evaluate", top1=0.7), ACCURATE, "inconclusive", "not yet"),
    "scores alone, of other images": (without("evaluate", count=7), ACCURATE, "inconclusive", "not yet"),
    "scores alone, of as many images of other data": (
        in_turn(without("evaluate"), recorded("finetune", options={"data": "others"})),
        ACCURATE,
        "inconclusive",
        "not yet",
    ),
    "scores alone, of the same data spelled otherwise": (
        in_turn(without("evaluate"), recorded("finetune", options={"data": "./images/"})),
        ACCURATE,
        "pass",
        "yes",
    ),
    "fine-tuned and not scored": (in_turn(without("evaluate"), unscored("finetune")), ACCURATE, "not done", "not yet"),
    "fine-tuning was killed before a score was kept": (
        in_turn(killed, without("evaluate"), unscored("finetuned/growkit.json")),
        ACCURATE,
        "not done",
        "not yet",
    ),
    "operator trained and not scored": (operator_only(trained=True), ACCURATE, "not done", "not yet"),
    "grown by a fixed rule and not trained": (operator_only(trained=False), ACCURATE, "pass", "not yet"),
    "no scores at all": (without("evaluate", "grow"), ACCURATE, "not done", "not yet"),
    "another file verified": (spoiled(onnx_sha256="ee" * 32), TOGETHER, "fail", "no"),
    "fine-tuned again": (again("finetune", finetuned="ee" * 32), TOGETHER, "fail", "no"),
    "grown again": (again("grow", grown="ee" * 32), TOGETHER, "fail", "no"),
    "grown again, and killed before that was on record": (grown_again_and_killed, TOGETHER, "fail", "no"),
    "grown again after fine-tuning that was killed": (
        in_turn(killed, again("grow", grown="ee" * 32)),
        TOGETHER,
        "fail",
        "no",
    ),
    "another model was exported elsewhere, too": (
        in_turn(removed("onnx"), another_model_exported, exported_elsewhere),
        TOGETHER,
        "pass",
        "yes",
    ),
    "another file was exported elsewhere in its place": (
        in_turn(removed("onnx"), exported_elsewhere, again("export", **{"model.onnx": "ff" * 32})),
        VERIFIED,
        "not done",
        "not yet",
    ),
    "another model was exported elsewhere in its place": (
        in_turn(removed("onnx"), exported_elsewhere, again("export", weights="ee" * 32)),
        VERIFIED,
        "not done",
        "not yet",
    ),
    "exported elsewhere again, the same": (
        in_turn(removed("onnx"), exported_elsewhere, again("export")),
        TOGETHER,
        "pass",
        "yes",
    ),
    "exported again, the same": (again("export"), TOGETHER, "pass", "yes"),
    "the ONNX file was replaced": (replaced("onnx/model.onnx"), TOGETHER, "fail", "no"),
    "the ONNX file was replaced before it was verified": (
        in_turn(removed("verify"), replaced("onnx/model.onnx")),
        TOGETHER,
        "fail",
        "no",
    ),
    "the ONNX file was replaced and its record is lost": (
        in_turn(replaced("onnx/model.onnx"), replaced("onnx/export.json", None)),
        TOGETHER,
        "fail",
        "no",
    ),
    "the ONNX file is gone": (replaced("onnx/model.onnx", None), TOGETHER, "not done", "not yet"),
    "the folder of the ONNX file is gone": (removed("onnx"), TOGETHER, "not done", "not yet"),
    "the folder of the ONNX file is gone, which was made of a copy": (
        in_turn(removed("onnx"), recorded("export", options={"model": "copy"})),
        TOGETHER,
        "not done",
        "not yet",
    ),
    "the run was moved": (exported_beside("finetuned"), TOGETHER, "pass", "yes"),
    "the run was moved without its ONNX file": (
        in_turn(removed("onnx"), exported_beside("finetuned")),
        TOGETHER,
        "not done",
        "not yet",
    ),
    "the model was copied, and exported beside the copy": (
        in_turn(removed("onnx"), exported_beside("copy")),
        TOGETHER,
        "pass",
        "yes",
    ),
    "the weights were replaced": (replaced("finetuned/model.safetensors"), TOGETHER, "fail", "no"),
    "the weights are gone": (replaced("finetuned/model.safetensors", None), TOGETHER, "not done", "not yet"),
    "weights that do not ship were replaced": (replaced("grown/model.safetensors"), TOGETHER, "pass", "yes"),
}


@pytest.mark.parametrize("happened", DECISIONS)
def test_gate_and_verdict_follow_from_what_happened(happened: str, tmp_path: Path) -> None:
    change, gate, mark, ships = DECISIONS[happened]
    run = write_run(tmp_path / "run")
    change(run)
    assert gates(run)[gate] == mark
    assert verdict(run).mark == ships
    assert (gate in verdict(run).line) is (mark not in ("pass", "note"))


def split_export(run: RunFolder, *listed: str) -> None:
    """The weights of the ONNX file in a second one; what export.json lists."""
    content = read_json(run.onnx / "export.json")
    (run.onnx / "model.onnx.data").write_bytes(b"weights")
    sha256 = sha256_of(run.onnx_file, run.onnx / "model.onnx.data")
    write_json(run.onnx / "export.json", content | {"files": listed, "sha256": sha256})
    write_json(run.verify / "report.json", verification(onnx_sha256=sha256))


def test_weights_beside_the_onnx_file_belong_to_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    split_export(run, "model.onnx", "model.onnx.data")
    assert (gates(run)[TOGETHER], verdict(run).mark) == ("pass", "yes")
    replaced("onnx/model.onnx.data")(run)
    assert verdict(run).mark == "no"
    assert (
        "onnx/model.onnx with model.onnx.data is not the file that was verified: run `growkit export --force`"
        in text(run)
    )
    replaced("onnx/model.onnx.data", None)(run)
    assert (gates(run)[TOGETHER], verdict(run).mark) == ("not done", "not yet")


@pytest.mark.parametrize("listed", [["other.onnx"], ["../copy.onnx"], ["\0"], [3], "model.onnx"], ids=repr)
def test_list_of_files_cannot_hide_the_one_that_is_served(listed: object, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for place in ("onnx/other.onnx", "copy.onnx"):
        shutil.copy(run.onnx_file, run.path / place)
    replaced("onnx/model.onnx")(run)
    write_json(run.onnx / "export.json", read_json(run.onnx / "export.json") | {"files": listed})
    assert verdict(run).mark != "yes"


def test_every_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may be of gigabytes."""
    run = write_run(tmp_path / "run")
    hashed = list[str]()
    real = hashlib.file_digest

    def noted(stream: Any, digest: Any) -> Any:
        hashed.append(str(Path(stream.name).relative_to(run.path)))
        return real(stream, digest)

    monkeypatch.setattr(hashlib, "file_digest", noted)
    render(run_report(run))
    assert sorted(hashed) == ["finetuned/model.safetensors", "onnx/model.onnx"]


def test_model_that_was_held_alone_and_is_no_more_decides_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    held("model", "fail", GROWN)(run)
    assert GOLDEN not in gates(run)
    assert verdict(run).mark == "yes"


def test_start_that_is_not_the_sources_is_noted_and_decides_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    path = run.grown / "growkit.json"
    write_json(path, json.loads(path.read_text()) | {"step0_gap": 0.5})
    assert gates(run)["It starts where the source stands"] == "note"
    assert verdict(run).mark == "yes"
    assert "does not start where the source stands" in text(run)


def test_a_source_of_other_classes_is_no_measure_but_one_tuned_to_them_is(tmp_path: Path) -> None:
    """A head that was made anew guesses, and anything is as accurate as that."""
    for folder in ("grown", "finetuned"):
        run = write_run(tmp_path / folder)
        path = run.path / folder / "growkit.json"
        content = json.loads(path.read_text())
        content["source"]["own_head"] = False
        write_json(path, content)
        evaluate = next(step for step in record(run)["steps"] if step["command"] == "evaluate")
        assert "source 80.0%" not in text(run)  # of a head that guesses
        without("evaluate")(run)
        assert gates(run)[ACCURATE] == "not done"
        assert "fine-tune the source, too" in text(run)
        for against, sha256, mark in (("run/grown", GROWN, "not done"), ("small/finetuned", "ee" * 32, "pass")):
            content = record(run)
            evaluate["options"]["against"] = against
            evaluate["hashes"]["source"] = sha256
            content["steps"].append(evaluate)
            write_json(run.record, content)
            assert gates(run)[ACCURATE] == mark
        assert "against small/finetuned" in text(run)
        assert verdict(run).mark == "yes"


def test_file_that_was_exported_elsewhere_and_verified_is_the_runs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    in_turn(removed("onnx"), exported_elsewhere)(run)
    assert VERIFIED not in gates(run)
    assert verdict(run).mark == "yes"


def line_of(run: RunFolder, name: str) -> str:
    return next(gate.line for gate in run_report(run).gates if gate.name == name)


def test_remedies_name_the_file_that_was_exported_elsewhere(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert "not looked at since" not in line_of(run, TOGETHER)
    in_turn(removed("onnx"), exported_elsewhere, only("structure", "numbers"))(run)
    command = f"`growkit verify --onnx-file {tmp_path / 'elsewhere' / 'model.onnx'} --data DATA`"
    assert line_of(run, "It scores like the model") == f"{command}."
    assert line_of(run, FAST) == f"{command}, with times."
    assert line_of(run, TOGETHER).endswith(", exported elsewhere and not looked at since.")
    content = record(run)
    later = content["steps"][3]
    options = later["options"] | {"out": str(tmp_path / "third")}
    content["steps"].append(later | {"options": options, "hashes": later["hashes"] | {"model.onnx": "ff" * 32}})
    write_json(run.record, content)
    assert line_of(run, "It scores like the model") == f"{command}."  # of the two, the one verified
    write_json(run.record, content | {"steps": content["steps"][:-1]})
    report = run.verify / "report.json"
    write_json(report, read_json(report) | {"onnx": "moved/model.onnx"})
    assert "Verified was moved/model.onnx." in text(run)
    spoiled(weights_sha256="ee" * 32)(run)
    assert line_of(run, TOGETHER).endswith(f": run {command} again.")
    removed("verify")(run)
    assert line_of(run, VERIFIED) == f"{command} does it."
    assert "elsewhere/model.onnx was not verified" in text(run)
    write_json(run.record, content)
    assert str(tmp_path / "third") in line_of(run, VERIFIED)  # of the two, the last
    gone = later | {"options": later["options"] | {"out": str(run.onnx)}}  # into the run, which holds it no more
    write_json(run.record, content | {"steps": [*content["steps"][:-1], gone]})
    assert line_of(run, VERIFIED) == f"{command} does it."
    again("finetune", finetuned="ee" * 32)(run)
    assert line_of(run, VERIFIED) == "`growkit export --onnx`, then `growkit verify --data DATA`."


def test_fine_tuning_that_was_killed_is_told_as_such(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert "killed before its end" not in text(run)
    tuned_again_and_killed(run)
    assert "It was killed before its end: the same command with --resume goes on with it." in text(run)


def test_weights_that_are_a_moving_average_are_told_as_such(tmp_path: Path) -> None:
    run, told = write_run(tmp_path / "run"), "Kept is the moving average of its weights (decay 0.99998)."
    assert "moving average" not in text(run)
    content = read_json(run.finetuned / "growkit.json")
    settings = content["fit"]["settings"] | {"model_ema": True, "model_ema_decay": 0.99998}
    write_json(run.finetuned / "growkit.json", content | {"fit": content["fit"] | {"settings": settings}})
    assert text(run).count(told) == 1


def test_model_that_was_fine_tuned_is_called_grown_only_where_the_run_grew_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for change, begun in ((removed(), "grown"), (removed("grown"), "grown"), (without("grow"), "given")):
        change(run)
        (tuning,) = (section for section in run_report(run).sections if section.title == "Fine-tuning")
        assert tuning.text.startswith(f"The {begun} model was trained on for ")
        assert tuning.table is not None
        assert [row[0] for row in tuning.table.rows][-2:] == [begun, "fine-tuned"]


def test_remedies_name_the_model_where_the_run_holds_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    in_turn(removed("grown", "finetuned"), without("grow", "finetune", "evaluate"), only("structure"))(run)
    line = f"`growkit verify {run.finetuned} --data DATA`, with times."
    assert line_of(run, FAST) == line
    content = record(run)
    (export,) = (step for step in content["steps"] if step["command"] == "export")
    other = {"options": {"model": "other", "out": "elsewhere"}, "hashes": {"model.onnx": "ff" * 32}}
    write_json(run.record, content | {"steps": [*content["steps"], export | other]})
    assert line_of(run, FAST) == line  # not the model of a file that was exported elsewhere since
    write_json(run.onnx / "export.json", read_json(run.onnx / "export.json") | {"sha256": "ff" * 32})
    assert "`growkit verify other --data DATA`" in line_of(run, TOGETHER)  # of the file in its place, not the verified


def test_remedies_name_no_file_elsewhere_where_the_runs_own_is_missing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    in_turn(replaced("onnx/model.onnx", None), file_evaluated("ff" * 32), removed("verify"))(run)
    assert line_of(run, VERIFIED) == "Only the export's own checks: `growkit verify --data DATA`."


def test_file_in_the_run_whose_own_record_is_lost_is_to_be_verified_and_not_exported(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    in_turn(removed("verify"), replaced("onnx/export.json", None))(run)
    assert line_of(run, VERIFIED) == "`growkit verify --data DATA` does it."
    assert "model.onnx was not verified: `growkit verify --data DATA` does it." in text(run)


def test_weights_made_since_the_file_are_to_be_exported_and_not_only_verified(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    again("finetune", finetuned="ee" * 32)(run)
    exported, verified = read_json(run.onnx / "export.json"), verification(onnx_sha256="ee" * 32)
    write_json(run.verify / "report.json", verified)  # of yet another file, which is beside the point
    assert line_of(run, TOGETHER).endswith(": run `growkit export --force`, then `growkit verify --data DATA`.")
    write_json(run.onnx / "export.json", exported | {"provenance": {"weights_sha256": "ee" * 32}})
    assert line_of(run, TOGETHER).endswith(" now: run `growkit verify --data DATA` again.")


def test_remedies_begin_with_what_was_made_first(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    in_turn(again("finetune", finetuned="ee" * 32), again("grow", grown="ee" * 32))(run)
    assert "run `growkit finetune --force --data DATA` and what comes after it." in line_of(run, TOGETHER)


def test_remedies_of_another_run_than_the_default_are_told_to_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, told in (("run", False), ("my run", True)):
        run = write_run(Path(folder))
        assert not any("remedy" in line for line in run_report(run).summary)
        removed("verify")(run)
        line = "Commands that are named as a remedy take --run 'my run' here."
        assert (line in run_report(run).summary) is told


def test_headline_tells_the_sources_score_where_only_a_comparison_does(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    content = record(run)
    del content["steps"][0]["figures"]["scores"]
    write_json(run.record, content)
    headline = "Top-1 on validation images: source 80.0%, fine-tuned 85.0%."
    assert headline in run_report(run).summary
    grown = run.grown / "growkit.json"
    kept = grown.read_bytes()
    content = json.loads(kept)
    content["source"]["own_head"] = False
    write_json(grown, content)
    assert headline not in run_report(run).summary
    content = record(run)
    (step,) = (step for step in content["steps"] if step["command"] == "evaluate")
    own, step["hashes"]["source"] = step["hashes"]["source"], "dd" * 32  # a model of another run
    write_json(run.record, content)
    assert headline not in run_report(run).summary
    grown.write_bytes(kept)
    step["hashes"] |= {"source": own, "model": "ee" * 32}
    write_json(run.record, content)
    assert headline not in run_report(run).summary
    without("evaluate")(run)
    assert headline not in run_report(run).summary


def test_damaged_run_is_not_told_that_nothing_was_made(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.record.write_text("{broken")
    assert verdict(run).mark == "not yet"
    assert "Nothing was grown" not in verdict(run).line


@pytest.mark.parametrize("reason", ["Permission denied", "Expecting value"])
def test_record_that_cannot_be_read_is_told_with_what_to_do_where_the_command_ran(
    reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run")
    if reason == "Expecting value":
        run.record.write_text('{"schema": ')
    else:
        real = Path.read_text

        def refused(path: Path, *args: Any, **options: Any) -> str:
            if path == run.record:
                raise PermissionError(13, reason, str(path))
            return real(path, *args, **options)

        monkeypatch.setattr(Path, "read_text", refused)
    status, out, _ = growkit(capsys, "report", "--run", run.path)
    warning, wrote = out.splitlines()
    assert (status, wrote.startswith("wrote ")) == (0, True)
    assert warning.startswith(f"warning: {run.path}: record.json was left out: not readable as JSON (")
    assert reason in warning
    assert warning.removeprefix(f"warning: {run.path}: ") in text(run)
    remedy = "make it readable again, or move it away: that loses the settings and scores of the steps so far"
    assert remedy in warning
    with pytest.raises(GrowkitError, match=f"record.json: not readable as JSON .*{reason}.*; {remedy}"):
        run.refuse_unusable()
    run.record.rename(tmp_path / "moved.json")
    run.refuse_unusable()
    assert WHOLE not in gates(run)


def test_each_file_that_is_left_out_has_a_line_where_the_command_ran(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", compared=True)
    for place in ("grown/growkit.json", "compare/results.json"):
        damaged(place)(run)
    *warnings, _ = growkit(capsys, "report", "--run", run.path)[1].splitlines()
    starts = [
        f"warning: {run.path}: {place} was left out: not" for place in ("grown/growkit.json", "compare/results.json")
    ]
    assert [line[: len(start)] for line, start in zip(warnings, starts, strict=True)] == starts
    assert all(line.endswith("; restore it, or run its step again.") for line in warnings)


def test_run_that_only_compared_has_nothing_to_ship(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    write_json(run.compare / "results.json", comparison())
    assert gates(run) == {}
    assert (verdict(run).mark, "Nothing was grown or trained in this run yet" in verdict(run).line) == ("not yet", True)
    run.add("verify", options={}, figures={}, hashes={"model.onnx": ONNX})
    assert gates(run)[VERIFIED] == "not done"


@pytest.mark.parametrize(
    ("gap", "claimed", "words"),
    [
        (9e-6, True, "it starts where the source stands: logits differ by at most 9.0×10⁻⁶"),
        (2e-3, True, "it starts near the source: logits differ by at most 2.0×10⁻³ (LayerNorm's eps"),
        (2e-4, None, "it starts near the source"),
        (2e-4, False, "it does not start where the source stands, nor claims to: logits differ by up to"),
        (3.0, True, "it should start where the source stands, but logits differ by up to"),
        (2e-3, None, "it does not start where the source stands: logits differ by up to"),
    ],
)
def test_start_is_told_by_what_the_method_claims(gap: float, claimed: bool | None, words: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    path = run.grown / "growkit.json"
    write_json(path, json.loads(path.read_text()) | {"step0_gap": gap, "lossless": claimed})
    assert words in text(run)


def test_scores_of_a_grown_model_whose_operator_was_not_trained_do_not_say_that_it_was(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert "operator trained" in text(run)
    path = run.grown / "growkit.json"
    write_json(path, json.loads(path.read_text()) | {"operator": None})
    content = record(run)
    content["steps"][0]["figures"]["operator"] = None
    write_json(run.record, content)
    told = text(run)
    assert "The growth operator was not trained." in told
    assert "operator trained" not in told


def test_failed_check_is_open_with_its_reason_and_passed_ones_are_folded(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    one_check("numbers", "fail")(run)
    (parity,) = [section for section in run_report(run).sections if section.title == "ONNX parity"]
    folded = {part.title: part.folded for part in parity.parts}
    assert folded == {title: "fail" not in title for title in folded}
    assert len([title for title in folded if "fail" in title]) == 1
    assert "the reason why" in text(run)


def test_of_a_step_made_twice_the_last_counts_and_the_earlier_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    again("export")(run)
    content = record(run)
    content["steps"].insert(0, content["steps"][1] | {"figures": {"best": {"top1": 0.123}}})
    write_json(run.record, content)
    told = text(run)
    assert "this is 3. finetune, the last. Earlier: 1. finetune (2026-01-02 03:04:05 UTC)" in told
    assert "12.3%" not in told


def test_comparison_with_another_model_is_shown_but_decides_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    evaluated(60, 10, 1e-9, source="ee" * 32, model="ff" * 32)(run)
    assert gates(run)[ACCURATE] == "pass"  # by the scores
    assert "which is not the model as it stands now" in text(run)


def test_comparison_that_counts_is_named_where_others_were_made_since(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    again("evaluate", source="ee" * 32, model="ff" * 32)(run)
    assert "Done 2 times; this is 3. evaluate. Others: 6. evaluate" in text(run)


@pytest.mark.parametrize("command", ["export", "verify"])
def test_step_that_made_the_file_on_the_page_is_named_where_others_were_made_since(
    command: str, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run")
    if command == "export":
        removed("verify")(run)  # else its checks are shown
    again(command, **{"model.onnx": "ee" * 32})(run)
    steps = record(run)["steps"]
    number = next(n for n, step in enumerate(steps, 1) if step["command"] == command)
    assert f"Done 2 times; this is {number}. {command}. Others: {len(steps)}. {command}" in text(run)
    content = record(run)
    content["steps"][number - 1]["hashes"] = {}
    write_json(run.record, content)
    assert "Done 2 times" not in text(run)  # no step is known to have made what is shown


def test_times_are_sorted_by_batch_size_and_not_as_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    content = verification()
    one = content["latency"]["comparisons"][0]
    content["latency"]["comparisons"] = [{**one, "batch": batch} for batch in (1024, 16, "some", 8, 1)]
    write_json(run.verify / "report.json", content)
    (latency,) = [section for section in run_report(run).sections if section.title == "Latency"]
    (bars,) = [plot for plot in latency.plots if isinstance(plot, Bars)]
    batches = [bar.name.rpartition(", ")[0] for bar in bars.bars]
    assert list(dict.fromkeys(batches)) == [f"batch {size}" for size in ("1", "8", "16", "1,024", "some")]


def test_further_figures_of_latency_are_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    content = verification()
    content["latency"] |= {"compile_seconds": {"1": 33.25}, "notes": ["PyTorch compiled was not timed"]}
    for one in content["latency"]["comparisons"]:
        one |= {"dropped": 17, "foreign": 0.415}
    # of another growkit: not all that this one measures
    content["latency"]["comparisons"].append(
        {"subject": "file", "baseline": "PyTorch compiled", "batch": 8, "ratio": 0.7}
    )
    write_json(run.verify / "report.json", content)
    (latency,) = [section for section in run_report(run).sections if section.title == "Latency"]
    (times,) = [part.table for part in latency.parts if part.title == "Times in ms"]
    assert times is not None
    assert times.columns[-2:] == ("dropped", "foreign")
    assert [tuple(row[-2:]) for row in times.rows] == [("17", "0.415")] * 4 + [("–", "–")]
    told = text(run)
    for words in ("compile seconds: 1", "33.25", "PyTorch compiled was not timed", "batch 8, PyTorch compiled"):
        assert words in told, words


DRAWN: dict[str, str] = {}


def draw_once(chart: Chart) -> str:
    """Draw for real, but equal charts only once for all tests: most pages differ in one or none."""
    if repr(chart) not in DRAWN:
        DRAWN[repr(chart)] = draw(chart)
    return DRAWN[repr(chart)]


@pytest.fixture(autouse=True)
def drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("growkit.report.page.draw", draw_once)


LEFT_OUT = {  # why, where a file is not JSON, or no table
    "{": "not readable as JSON (Expecting property name",
    "[1, 2]": "it holds something else than growkit writes there",
    "\\xff": "not readable as JSON ('utf-8' codec can't decode",
}
MISSING = {  # what the page says where a file is JSON, but of something else
    "grown/growkit.json": "Nothing was grown in this run.",
    "onnx/export.json": "opset None",
    "verify/report.json": "These are the export's own checks",
    "compare/results.json": "Another version of growkit made the comparison",
}


@pytest.mark.parametrize(
    "broken", ["record.json", "grown/growkit.json", "onnx/export.json", "verify/report.json", "compare/results.json"]
)
@pytest.mark.parametrize("content", [*LEFT_OUT, '{"steps": 3}', '{"schema": 1}'])
def test_damaged_file_is_a_line_and_the_rest_is_told(broken: str, content: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", compared=True)
    whole = text(run)
    (run.path / broken).write_bytes(content.encode("latin-1").decode("unicode_escape").encode("latin-1"))
    told = text(run)
    assert tuple(section.title for section in run_report(run).sections) == SECTIONS
    if content in LEFT_OUT:
        line = f"{broken} was left out: {LEFT_OUT[content]}"
    elif broken == "record.json":
        line = "record.json was left out: it holds no list of steps; make it readable again, or move it away"
    else:  # whole, but of something else
        line = MISSING[broken]
    assert line in told
    assert line not in whole


@pytest.mark.parametrize("odd", [None, 3, "text", [], [1], {}, {"a": 1}, "nan", True], ids=repr)
def test_odd_values_anywhere_still_make_a_page(odd: object, tmp_path: Path) -> None:
    whole = write_run(tmp_path / "run", compared=True)
    files = [p for p in whole.path.rglob("*.json") if "runs" not in p.parts]
    for path in files:
        content = json.loads(path.read_text())
        for key in content:
            path.write_text(json.dumps({**content, key: odd}))
            render(run_report(whole))
        path.write_text(json.dumps(content))
    kept = whole.record.read_text()
    for number, step in enumerate(json.loads(kept)["steps"]):
        for part, inner in step.items():
            for key in (None, *(inner if isinstance(inner, dict) else ())):
                content = json.loads(kept)
                spoil = content["steps"][number] if key is None else content["steps"][number][part]
                spoil[part if key is None else key] = odd
                write_json(whole.record, content)
                render(run_report(whole))


def paths(node: object, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where values lie in JSON, those of a list in its first entry."""
    entries = node.items() if isinstance(node, dict) else enumerate(node[:1]) if isinstance(node, list) else ()
    for key, entry in entries:
        yield (*above, key)
        yield from paths(entry, (*above, key))


@pytest.mark.parametrize(
    "odd",
    [10**400, math.inf, 1e308, -1e308, "--nan"],
    ids=["400 digits", "infinity", "nearly infinity", "less than nothing", "no number"],
)
def test_numbers_beyond_reason_anywhere_still_make_a_page(odd: object, tmp_path: Path) -> None:
    whole = write_run(tmp_path / "run", compared=True)
    kept = {path: path.read_text() for path in whole.path.rglob("*.json") if "runs" not in path.parts}
    spots = [(path, place) for path in kept for place in paths(json.loads(kept[path]))]
    compared = [spot for spot in spots if spot[0].parent == whole.compare]  # of a section that reads nothing else
    for both in zip_longest(compared, [spot for spot in spots if spot not in compared]):
        for path, place in filter(None, both):
            content = json.loads(kept[path])
            inner = content
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = odd
            path.write_text(json.dumps(content))
        render(run_report(whole))
        for path, _ in filter(None, both):
            path.write_text(kept[path])


@pytest.mark.parametrize("end", [1e308, math.inf])
def test_interval_beyond_reason_does_not_end_the_report(end: float, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    content = verification()
    content["latency"]["comparisons"][0] |= {"low": -end, "high": end}
    write_json(run.verify / "report.json", content)
    assert "Time of the file against others" in text(run)


@pytest.mark.parametrize("kept", [("grow",), ("grow", "finetune"), ("train",), ("deploy to the moon",)])
def test_run_that_is_under_way_says_what_is_missing(kept: tuple[str, ...], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    steps = [step for step in record(run)["steps"] if step["command"] in kept]
    unknown = [as_step(name, {"seed": 1}, {"height": 3}, {}) for name in kept if name not in ("grow", "finetune")]
    for name in ("onnx", "verify", *(() if "grow" in kept else ("grown", "finetuned"))):
        shutil.rmtree(run.path / name)
    write_json(run.record, {"schema": 1, "steps": [*steps, *unknown]})
    told = text(run)
    assert verdict(run).mark == "not yet"
    assert "`growkit export --onnx`" in told
    assert all(title in told for title in SECTIONS)
    if unknown:
        assert f"1. {kept[0]}" in told


def test_markup_in_names_and_classes_is_shown_and_never_becomes_elements(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", name=EVIL, label=EVIL, compared=True)
    content = verification()
    content["checks"] += [
        {**one, "group": EVIL, "name": EVIL, "line": EVIL, "verdict": EVIL} for one in content["checks"]
    ]
    content["latency"] |= {"provider": EVIL, EVIL: [{EVIL: EVIL}]}
    content["latency"]["comparisons"] += [{"baseline": EVIL, "ratio": 1.0, "batch": EVIL, EVIL: EVIL}]
    write_json(run.verify / "report.json", content)
    write_json(run.compare / "results.json", comparison(EVIL) | {"command": EVIL})
    steps = record(run)
    steps["steps"].append(as_step(EVIL, {EVIL: EVIL}, {EVIL: {EVIL: EVIL}}, {EVIL: EVIL}))
    write_json(run.record, steps)
    page = Page(render(run_report(run)))
    assert page.open == []
    assert page.text.count(EVIL) > 20
    assert not page.names() & {"script", "img", "link", "iframe"}
    assert not [attrs for _, attrs in page.elements if "onerror" in attrs or "src" in attrs]


def test_commands_are_told_as_they_were_typed_without_what_is_said_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run with 'quotes'")
    typed = (
        ["grow", "small.pth", "--to", "deit_base", "--from", "deit_small", "--rank", "4", "--data", "my images"],
        ["finetune", "--data", "my images", "--epochs", "2"],
        ["evaluate", "--data", "my images", "--against", "small.pth", "--device", "cuda"],
        ["export", "--onnx", "--for", "cpu", "--triton", "models", "--triton-version", "2"],
        ["verify", "--data", "my images", "--val-split", "test", "--images", "photos"],
    )
    for step, words in zip(read_facts(run).steps, typed, strict=True):
        assert shlex.split(command_line(step.content["command_line"])) == ["growkit", *words, "--run", str(run.path)]
    write_json(run.compare / "results.json", comparison() | {"command": "growkit compare small.pth --resume --json"})
    told = text(run)
    assert "As they were typed, in order, but for --force, --resume, --json." in told
    assert "growkit compare small.pth\n" in told


def test_command_that_was_resumed_is_told_once_and_options_of_nothing_are_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    content = record(run)
    tuned = next(step for step in content["steps"] if step["command"] == "finetune")
    tuned["options"] |= {"hflip": 0.0, "channels_last": False, "aa": None}
    content["steps"].append({**tuned, "command_line": f"{tuned['command_line']} --resume"})
    write_json(run.record, content)
    told = text(run)
    assert told.count("growkit finetune --data") == 1
    assert "hflip 0" in told
    assert "channels last no" in told
    assert "aa –" not in told


def test_repeated_command_is_told_where_it_ran_last(tmp_path: Path) -> None:
    """Exported, fine-tuned again, exported anew: the other way round would export the model before."""
    run = write_run(tmp_path / "run")
    content = record(run)
    typed = ["export --onnx", "finetune", "export --onnx --force"]
    content["steps"] = [
        {**as_step(words.split()[0], {}, {}, {}), "command_line": f"growkit {words}"} for words in typed
    ]
    write_json(run.record, content)
    (told,) = [section for section in run_report(run).sections if section.title == "Provenance"]
    assert list(told.code) == ["growkit finetune", "growkit export --onnx"]


def test_run_that_only_trained_is_not_asked_for_a_source(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run.trained).mkdir()
    write_json(run.trained / "growkit.json", {"stage": "trained"})
    for name in ("grown", "finetuned"):
        shutil.rmtree(run.path / name)
    tuned = record(run)["steps"][1]
    without("grow", "finetune", "evaluate")(run)
    assert ACCURATE not in gates(run)
    content = record(run)
    write_json(run.record, content | {"steps": [*content["steps"], tuned]})  # trained, and fine-tuned then
    assert gates(run)[ACCURATE] == "not done"


@pytest.mark.parametrize("typed", [None, 3, "growkit grow 'small", ["growkit"]])
def test_step_without_a_command_has_none_on_the_page(typed: object, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    content = record(run)
    content["steps"] = [{**step, "command_line": typed} for step in content["steps"]]
    write_json(run.record, content)
    config = json.loads((run.finetuned / "config.json").read_text())
    write_json(run.finetuned / "config.json", {**config, "pretrained_cfg": {}})  # no licence to tell of
    assert not any(command_line(step.content["command_line"]) for step in read_facts(run).steps)
    told = text(run)
    assert "How the steps were started is not on record." in told
    assert "No steps on record" not in told


def test_command_takes_only_the_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run")
    moved = Path(shutil.move(tmp_path / "run", tmp_path / "elsewhere"))
    status, out, err = growkit(capsys, "report", "--run", moved)
    page = moved / "report.html"
    assert (status, err) == (0, "")
    assert out == f"wrote {page}: may it ship? yes. Every gate passed.\n"
    before = page.read_bytes()
    status, out, _ = growkit(capsys, "report", "--run", moved, "--out", tmp_path / "a" / "b.html", "--json")
    content = json.loads(out)
    assert content["verdict"]["mark"] == "yes"
    assert {gate["name"]: gate["mark"] for gate in content["gates"]} == gates(RunFolder(moved))
    assert Path(content["report"]).read_bytes() == before


def test_strict_report_says_no_by_its_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    assert growkit(capsys, "report", "--run", run.path, "--strict")[0] == 0
    run.onnx_file.write_bytes(b"garbage")
    status, out, _ = growkit(capsys, "report", "--run", run.path, "--strict")
    assert (status, "may it ship? no" in out) == (1, True)
    removed("verify")(run)
    assert growkit(capsys, "report", "--run", run.path)[0] == 0
    assert growkit(capsys, "report", "--run", run.path, "--strict")[0] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--run", "nowhere"), "nowhere: no such run folder; `growkit grow` makes one"),
        (("--run", "empty"), "empty holds nothing of a run; `growkit grow` begins one"),
        (("--run", "run", "--out", "empty"), "empty: cannot be written (it is a folder); name a file"),
    ],
)
def test_mistake_is_one_line_and_exit_2(
    arguments: tuple[str, ...],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("run"))
    Path("empty").mkdir()
    status, out, err = growkit(capsys, "report", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {said}")
    assert err.count("\n") == 1
    assert not list(Path("empty").iterdir())
    assert not Path("nowhere").exists()


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text(TUNED)
    with pytest.raises(GrowkitError, match="holds nothing of a run"):
        run_report(RunFolder(tmp_path))


def test_depth_that_only_the_architectures_name_says_is_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    content = json.loads((run.grown / "growkit.json").read_text())
    del content["source"]["arguments"]["depth"]
    config = json.loads((run.finetuned / "config.json").read_text())
    del config["model_args"]["depth"]
    for side, depth, parameters in (("source", 4, 58_000), ("target", 12, 614_090)):
        content.setdefault("sizes", {})[side] = {"depth": depth, "parameters": parameters}
    write_json(run.grown / "growkit.json", content)
    write_json(run.finetuned / "config.json", config)
    told = text(run)
    assert "layers 4 to 12" in told
    assert "58,000" in told


def test_open_gates_are_told_with_what_is_open_about_them() -> None:
    gates = [Gate("It is fast", Mark("inconclusive"), ""), Gate("It answers", Mark("not done"), "")]
    assert shipping([*gates, Gate("It is there", Mark("pass"), "")]).line == (
        "Open: It is fast (undecided); It answers (not checked)."
    )
