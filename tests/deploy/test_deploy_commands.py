"""`growkit export` and `growkit verify` on a run folder, as a user meets them."""

import json
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import typer
from deploy_models import ARGUMENTS, NAME, make_model, replace, tensors
from PIL import Image
from timm.models import save_for_hf
from torch import nn
from typer.testing import CliRunner, Result

from growkit.deploy import folder
from growkit.deploy import verify as verify_module
from growkit.deploy.export import export_onnx
from growkit.deploy.fastest import Choice
from growkit.deploy.form import Form
from growkit.deploy.latency import Latency, latency_check
from growkit.deploy.parity import Parity
from growkit.deploy.runtime import Assignment, Node
from growkit.deploy.settings import ExportSettings, VerifySettings
from growkit.deploy.subject import onnx_subject
from growkit.deploy.throughput import Rate, Throughput
from growkit.deploy.timing import Comparison, Percentiles
from growkit.deploy.truth import Preprocessing, noise_images
from growkit.errors import GrowkitError
from growkit.evaluation import _answering_onnx
from growkit.exporting import export_model
from growkit.files import without_folders
from growkit.record import RunFolder
from growkit.train.settings import FitSettings
from growkit.verifying import Evidence, verify_run
from growkit_cli.export import export
from growkit_cli.verify import verify

SHORT = ("--latency-seconds", "0.05", "--throughput-seconds", "0.01")
app = typer.Typer()
app.command()(export)
app.command()(verify)


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def write_source(path: Path, seed: int, **extra: object) -> None:
    kept = {k: v for k, v in ARGUMENTS.items() if k != "num_classes"}
    config = {"architecture": NAME, "model_args": kept, **extra}
    save_for_hf(make_model(seed), str(path), model_config=config, safe_serialization=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a grown model and its export."""
    run = tmp_path_factory.mktemp("job") / "run"
    write_source(run / "grown", 0, label_names=list("abcdefg"))
    result = call("export", "--onnx", "--run", run)
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"exporting {run / 'grown'}\n")
    return run


def test_export_writes_a_whole_folder_and_the_record(run: Path) -> None:
    names = sorted(p.name for p in (run / "onnx").iterdir())
    assert names == ["export.json", "model.onnx", "test_data_set_0", "test_data_set_1"]
    content = json.loads((run / "onnx" / "export.json").read_text())
    assert content["parity"]["checks"]
    assert {c["verdict"] for c in content["parity"]["checks"]} == {"pass"}
    (step, *_) = json.loads((run / "record.json").read_text())["steps"]
    assert step["command"] == "export"
    assert step["hashes"]["model.onnx"] == content["sha256"]
    assert sorted(p.name for p in run.iterdir() if p.name.startswith(".")) == []


def test_export_refuses_to_replace_without_force(run: Path) -> None:
    result = call("export", "--onnx", "--run", run)
    assert isinstance(result.exception, GrowkitError)
    assert "--force" in str(result.exception)


def test_export_that_answers_differently_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(model, path, form, **more):  # type: ignore[no-untyped-def]
        made = export_onnx(model, path, form, **more)
        proto = onnx.load(str(path))
        replace(proto, "head.bias", tensors(proto)["head.bias"] * 2)
        path.write_bytes(proto.SerializeToString())
        return made

    export_onnx = folder.export_onnx
    monkeypatch.setattr(folder, "export_onnx", damaged)
    result = call("export", run / "grown", "--run", tmp_path, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 1
    assert "FAILED weights" in result.stderr
    assert "head.bias" in result.stderr
    assert json.loads(result.stdout)["parity"]["checks"]
    assert list(tmp_path.iterdir()) == []


def write_images(root: Path, labels: str) -> None:
    for split in ("train", "val"):
        for label in labels:
            (root / split / label).mkdir(parents=True)
            for index in range(2):
                image = Image.new("RGB", (20, 20), (30 * index, 5 * ord(label) % 255, 90))
                image.save(root / split / label / f"{index}.png")


@pytest.mark.parametrize(
    ("classes", "why"), [(0, "has no classifier to judge"), (7, "its 2 classes are not the model's 7")]
)
def test_ranges_of_int8_need_images_and_no_labels(classes: int, why: str, tmp_path: Path) -> None:
    write_images(tmp_path / "data", "ab")
    kept = {k: v for k, v in ARGUMENTS.items() if k != "num_classes"}
    config = {"architecture": NAME, "model_args": kept}
    save_for_hf(make_model(num_classes=classes), str(tmp_path / "model"), model_config=config, safe_serialization=True)
    words = ("export", tmp_path / "model", "--run", tmp_path / "run", "--data", tmp_path / "data", "--precision")
    result = call(*words, "int8-static", "--exporter", "torchscript")
    assert result.exit_code == 0, result.output
    assert re.search(rf"accuracy is not judged: .*{why}", result.output)
    assert "accuracy" not in json.loads((tmp_path / "run" / "onnx" / "export.json").read_text())["parity"]["figures"]
    for more in (("int8-static", "--max-accuracy-drop", "1"), ("int8",)):  # what asks for a judgement gets none
        refused = call(*words, *more, "--out", tmp_path / "other")
        assert why in str(refused.exception)
        assert not (tmp_path / "other").exists()


def test_file_that_the_cpu_does_not_run_is_not_said_to_run_there(run: Path, tmp_path: Path) -> None:
    own = tmp_path / "run"
    exported = call("export", run / "grown", "--precision", "bf16", "--run", own)
    assert exported.exit_code == 0
    assert "ONNX Runtime has no bfloat16 on the CPU, where this was emulated" in exported.output.replace("\n", " ")
    verified = call("verify", run / "grown", "--onnx-file", own / "onnx" / "model.onnx", "--run", own, "--no-latency")
    assert verified.exit_code == 0
    report = json.loads((own / "verify" / "report.json").read_text())
    assert [c["line"] for c in report["checks"] if c["verdict"] != "pass"] == [
        "bfloat16 was emulated: ONNX Runtime does not run it on cpu; verify with --provider cuda"
    ]
    assert report["verdict"] == "inconclusive"


@pytest.mark.parametrize("strict", [(), ("--strict",)], ids=["lenient", "strict"])
def test_file_of_which_nothing_can_be_said_becomes_no_reference(
    strict: tuple[str, ...], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = verify_module.provider_check
    monkeypatch.setattr(verify_module, "provider_check", lambda placed, emulated: real(placed, emulated=True))
    reference = tmp_path / "reference"
    words = ("verify", "--run", run, "--update-reference", "--reference", reference, *strict)
    result = call(*words)
    assert result.exit_code == 1  # whoever goes on would commit nothing
    assert not reference.exists()
    said = result.output.replace("\n", " ")
    assert f"{reference} was not written: only what passes becomes a reference, and this is inconclusive" in said
    assert "(provider: bfloat16 was emulated" in said
    monkeypatch.undo()
    assert call(*words).exit_code == 0
    assert (reference / "reference.json").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_export_tells_an_error_with_the_limit_it_was_held_to(precision: str, run: Path, tmp_path: Path) -> None:
    result = call("export", run / "grown", "--precision", precision, "--run", tmp_path)
    told = re.search(r"relative error (\S+) \(allowed (\S+)\)", result.output.replace("\n", " "))
    assert told is not None
    checks = json.loads((tmp_path / "onnx" / "export.json").read_text())["parity"]["checks"]
    held = [(c["measured"], c["limit"]) for c in checks if re.search(r"^batch \d+: relative RMS error$", c["name"])]
    assert len(held) > 1
    measured, limit = max(held, key=lambda one: one[0] / one[1])
    assert told.groups() == (f"{measured:.1e}", f"{limit:.2g}")


def test_how_many_images_are_compared_is_told(run: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "data", "abcdefg")
    model, data, reading = str(run / "grown"), str(tmp_path / "data"), FitSettings(batch_size=4, workers=0)
    told: list[tuple[str, float, int]] = []

    def tell(what: str) -> Callable[..., None]:
        return lambda done, total, note="": told.append((what, done, total))

    own = RunFolder(tmp_path / "run")
    exported = export_model(own, model, ExportSettings(precision="int8"), data=data, reading=reading, tell=tell)
    assert exported.parity.figures["accuracy"]["samples"] == 14
    verify_run(
        own,
        VerifySettings(latency=False),
        model,
        own.onnx_file,
        evidence=Evidence(data=data, reading=reading),
        tell=tell,
    )
    assert told == 2 * [("comparing on the validation images", done, 14) for done in (0, 4, 8, 12, 14)]


def test_verify_passes_a_clean_file_with_data_and_junit(run: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "data", "abcdefg")
    data = ("--data", tmp_path / "data", "--workers", "0")
    junit = tmp_path / "junit.xml"
    result = call("verify", "--run", run, "--json", *SHORT, "--junit", junit, *data)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report == json.loads((run / "verify" / "report.json").read_text())
    assert report["verdict"] in ("pass", "inconclusive")  # the timing may be noisy here
    assert report["numerics"]["accuracy"]["samples"] == 14
    provider = report["provider"]
    assert (provider["requested"], provider["used"], provider["note"]) == ("cpu", "cpu", "")
    assert list(provider["nodes"]) == ["cpu"]
    assert provider["fallen_back"] == []
    assert [rate["batch"] for rate in report["throughput"]["rates"]] == [1, 2, 4, 8]
    assert report["throughput"]["peak_gflops"] > 0
    assert len(report["latency"]["comparisons"]) == 6
    groups = {c["group"] for c in report["checks"]}
    assert {"provider", "structure", "weights", "numbers", "accuracy", "data sets", "latency"} <= groups
    rows = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in result.output.splitlines()]
    for group in groups:  # a line each, however many checks there are
        ((_, passed, *nearest),) = (row for row in rows if row[0] == group and row[1:])
        checks = [c for c in report["checks"] if c["group"] == group]
        assert passed == f"{sum(c['verdict'] == 'pass' for c in checks)} of {len(checks)}"
        if group == "numbers":
            errors = {c["name"]: c["measured"] / c["limit"] for c in checks if re.search("err|same as", c["name"])}
            assert re.fullmatch(rf"{re.escape(max(errors, key=errors.__getitem__))}: \S+ of \S+", nearest[0])
    suite = ET.parse(junit).getroot()[0]
    assert (suite.get("tests"), suite.get("failures")) == (str(len(report["checks"])), "0")
    step = json.loads((run / "record.json").read_text())["steps"][-1]
    assert step["command"] == "verify"
    assert step["figures"]["verdict"] == report["verdict"]


def test_verify_of_another_models_file_says_so_and_exits_1(run: Path, tmp_path: Path) -> None:
    write_source(tmp_path / "other", 8)
    result = call("verify", tmp_path / "other", "--run", run)
    assert result.exit_code == 1
    assert "FAILED structure: exported from weights" in result.output
    assert "export it again" in result.output
    assert len(re.findall("^FAILED numbers: ", result.output, re.MULTILINE)) == 5
    report = json.loads((run / "verify" / "other" / "report.json").read_text())
    noes = sum(one["group"] == "numbers" and one["verdict"] != "pass" for one in report["checks"])
    assert f"numbers: {noes - 5} more like these are in the report" in result.output
    assert "latency was not measured" in result.output
    assert result.output.rstrip().endswith("verdict: fail")


@pytest.mark.parametrize("what", ["file", "model", "model of the run", "both"])
def test_verification_of_what_is_not_the_runs_own_leaves_what_the_report_judges(
    what: str, run: Path, tmp_path: Path
) -> None:
    own = tmp_path / "run"
    shutil.copytree(run, own, ignore=shutil.ignore_patterns("other"))
    shutil.copy(run / "onnx" / "model.onnx", tmp_path / "copy.onnx")
    write_source(tmp_path / "other", 8)
    write_source(own / "trained", 9)
    model = {"file": own / "grown", "model of the run": own / "trained"}.get(what, tmp_path / "other")
    file = own / "onnx" / "model.onnx" if what.startswith("model") else tmp_path / "copy.onnx"
    assert call("verify", "--no-latency", "--run", own).exit_code == 0
    before = {path.name: path.read_bytes() for path in (own / "verify").iterdir()}
    result = call("verify", model, "--onnx-file", file, "--no-latency", "--run", own)
    assert result.exit_code == (what != "file")
    said = result.output.replace("\n", "")
    assert f"verify/other/report.json is of {file} and {model}; `growkit report` goes by" in said
    assert json.loads((own / "verify" / "other" / "report.json").read_text())["onnx"] == str(file)
    assert (own / "verify" / "other" / "reproduce.py").exists() == (what != "file")
    assert {path.name: path.read_bytes() for path in (own / "verify").iterdir() if path.is_file()} == before


def test_verification_of_the_runs_file_and_what_it_was_made_of_is_what_the_report_judges(
    run: Path, tmp_path: Path
) -> None:
    own = RunFolder(tmp_path / "run")
    shutil.copytree(run / "grown", tmp_path / "copy")
    export_model(own, str(tmp_path / "copy"), ExportSettings())
    verify_run(own, VerifySettings(latency=False), str(tmp_path / "copy"), own.onnx_file)
    assert (own.verify / "report.json").exists()
    assert not (own.verify / "other").exists()


def test_script_of_another_file_works_in_a_run_that_was_moved(run: Path, tmp_path: Path) -> None:
    own = tmp_path / "my run"
    shutil.copytree(run, own, ignore=shutil.ignore_patterns("verify"))
    write_source(own / "other", 8)
    shutil.copy(run / "onnx" / "model.onnx", own / "copy.onnx")
    result = call("verify", own / "other", "--onnx-file", own / "copy.onnx", "--no-latency", "--run", own)
    assert result.exit_code == 1
    assert f"python '{own / 'verify' / 'other' / 'reproduce.py'}' shows it again" in result.output
    text = (own / "verify" / "other" / "reproduce.py").read_text()
    assert "MODEL = '../../other'" in text
    assert "'../../copy.onnx'" in text


def test_verification_that_tells_less_than_the_one_it_replaces_says_so(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("verify"))
    words = ("verify", "--no-latency", "--run", tmp_path / "run")
    report = tmp_path / "run" / "verify" / "report.json"
    assert "leaves out" not in call(*words).output
    content = json.loads(report.read_text())
    kept = [{**content["checks"][0], "group": group} for group in ("accuracy", "latency")]
    report.write_text(json.dumps({**content, "checks": [*content["checks"], *kept]}))
    assert "report.json told accuracy and times, too, which this verification leaves out" in call(
        *words
    ).output.replace("\n", "")
    assert "leaves out" not in call(*words).output


def test_strict_turns_inconclusive_into_exit_1(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = Percentiles(1.0, 1.0, 1.0)
    close = Comparison("file", "stock export", 1, 1.1, 1.0, 1.2, 3, 60, times, times)
    noisy = Latency((close,), (latency_check(close, noise=0.2, limit=1.1),), "cpu", 1)
    monkeypatch.setattr(verify_module, "measure_latency", lambda *_, **__: noisy)
    lenient = call("verify", "--run", run, "--throughput-seconds", "0")
    assert lenient.exit_code == 0, lenient.output
    assert "warning: latency" in lenient.output
    assert "too noisy" in lenient.output
    assert lenient.output.rstrip().endswith("verdict: inconclusive")
    assert call("verify", "--run", run, "--strict", "--throughput-seconds", "0").exit_code == 1


def test_provider_auto_and_what_fell_back_are_said(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Node("Shape", "node_Shape_0")
    placed = Assignment("cuda", {"cuda": 76, "cpu": 1}, (shape,))
    monkeypatch.setattr(verify_module, "assignment", lambda session: placed)
    result = call("verify", "--run", run, "--provider", "auto", "--no-latency")
    assert result.exit_code == 0, result.output
    assert "\nprovider auto: " in result.output
    assert "\nwarning: 76 of 77 nodes run on cuda; on the CPU: 1 Shape\n" in result.output
    report = json.loads((run / "verify" / "report.json").read_text())
    assert report["provider"]["nodes"] == {"cuda": 76, "cpu": 1}
    assert report["provider"]["fallen_back"] == [{"op": "Shape", "name": "node_Shape_0"}]
    assert report["throughput"] is None


def test_provider_that_runs_no_node_fails(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    placed = Assignment("cuda", {"cpu": 1}, (Node("Shape", "node_Shape_0"),))
    monkeypatch.setattr(verify_module, "assignment", lambda session: placed)
    result = call("verify", "--run", run, "--no-latency")
    assert result.exit_code == 1
    assert "FAILED provider: 0 of 1 nodes run on cuda; on the CPU: 1 Shape" in result.output


def test_throughput_and_compiled_are_shown(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = Percentiles(1.0, 2.0, 3.0)
    compared = Comparison("file", "PyTorch compiled", 1, 1.1, 1.0, 1.2, 3, 60, times, times)
    timed = Latency((compared,), (), "cpu", 1, {1: 12.3}, ("PyTorch compiled was not timed at batch 8",))
    served = Throughput((Rate(1, 250.0, times, 40, 300.0, 0.75),), 600_000_000, 400.0, 1024, "cpu", 1, 0.4)
    told: dict[str, object] = {}

    def measure_latency(model: object, file: object, settings: VerifySettings, **_: object) -> Latency:
        told["compiled"] = settings.compiled
        return timed

    monkeypatch.setattr(verify_module, "measure_latency", measure_latency)
    monkeypatch.setattr(verify_module, "measure_throughput", lambda *_, **__: served)
    result = call("verify", "--run", run, "--compiled")
    assert result.exit_code == 0, result.output
    assert told["compiled"] is True
    assert json.loads((run / "verify" / "report.json").read_text())["throughput"]["contended"] is True
    assert "compiling PyTorch at batch 1 took 12.3 s" in result.output
    assert "\nwarning: PyTorch compiled was not timed at batch 8" in result.output
    (row,) = (line for line in result.output.splitlines() if "250" in line)
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == ["1", "250", "1", "2", "3", "300", "75%"]
    assert "\npeak: 400 GFLOP/s in a float32 product of 1024 x 1024 matrices; other programs took 40%" in result.output


def test_batch_below_one_is_refused(run: Path) -> None:
    result = call("verify", "--run", run, "--throughput-batch", "0")
    assert isinstance(result.exception, GrowkitError)
    assert str(result.exception) == "--throughput-batch 0: expected 1 or more, and at most 4096"


@pytest.mark.parametrize(
    ("settings", "form", "steps"),
    [
        (VerifySettings(), Form(), 6 + 4),
        (VerifySettings(compiled=True, throughput_batch=20), Form(), 8 + 6),
        (VerifySettings(max_batch=1, throughput_seconds=0), Form(), 3),
        (VerifySettings(), Form(batch=3), 3 + 1),
    ],
)
def test_progress_of_timing_counts_every_comparison_and_batch_size(
    settings: VerifySettings, form: Form, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: object, batches: tuple[int, ...], progress: Callable[[int, str], None], **more: Any) -> None:
        progress(len(batches) * (3 + settings.compiled if "stock" in more else 1), "")

    for name in ("measure_latency", "measure_throughput"):
        monkeypatch.setattr(verify_module, name, measured)
    told: list[tuple[int, int, str]] = []
    parity = Parity((), {}, "cpu", form)
    verify_module._timed(nn.Module(), Path(), settings, ("", {}), parity, lambda *now: told.append(now))
    assert told[-1][:2] == (steps, steps)
    assert {total for _, total, _ in told} == {steps}


def test_verify_without_a_file_names_the_remedy(run: Path, tmp_path: Path) -> None:
    result = call("verify", run / "grown", "--run", tmp_path)
    assert isinstance(result.exception, GrowkitError)
    assert "growkit export" in str(result.exception)


def test_served_file_names_no_folder_of_the_machine() -> None:
    assert without_folders({"a": ["/home/me/source.pth", "x/y"], "b": 3}) == {
        "a": ["source.pth", "x/y"],
        "b": 3,
    }


def test_int8_file_is_a_no_where_float32_is_asked_for(run: Path, tmp_path: Path) -> None:
    made = call("export", run / "grown", "--precision", "int8", "--run", tmp_path)
    assert made.exit_code == 0, made.output
    file = tmp_path / "onnx" / "model.onnx"
    asked = ("verify", run / "grown", "--onnx-file", file, "--no-latency", "--run", tmp_path)
    assert call(*asked).exit_code == 0
    result = call(*asked, "--precision", "fp32")
    assert result.exit_code == 1
    failed = [line for line in result.output.splitlines() if line.startswith("FAILED")]
    assert failed == ["FAILED structure: precision: int8, allowed fp32"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("export", "--seed", "-1"), "--seed -1: expected 0 or more"),
        (("export", "--max-batch", "0"), "--max-batch 0: expected 1 or more"),
        (("export", "--latency-seconds", "-1"), "--latency-seconds -1: expected more than 0"),
        (("export", "--precision", "fp61"), "--precision fp61: unknown"),
        (("export", "--max-accuracy-drop", "1"), "--max-accuracy-drop is judged on labelled images: give --data"),
        (("export", "--triton-version", "2"), "give --triton DIR"),
        (("verify", "--precision", "fp61"), "--precision fp61: unknown; choose fp32"),
        (("verify", "--seed", "-1"), "--seed -1: expected 0 or more"),
        (("verify", "--max-accuracy-drop", "-3"), "--max-accuracy-drop -3: expected 0 or more, and at most 100"),
        (("verify", "--max-accuracy-drop", "nan"), "--max-accuracy-drop nan: expected 0 or more, and at most 100"),
        (("verify", "--max-accuracy-drop", "1"), "give --data"),
        (("verify", "--compiled", "--no-latency"), "leave out --no-latency"),
        (
            ("verify", "--update-reference", "--max-latency-ratio", "1"),
            "time a file, which --update-reference does not",
        ),
        (("verify", "--update-reference", "--compiled"), "time a file, which --update-reference does not"),
    ],
)
def test_nonsense_is_refused_before_the_work(
    given: tuple[str, ...], said: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("exporting", "verifying"):
        monkeypatch.setattr(f"growkit.{module}.load_source", lambda *_, **__: pytest.fail("loaded"))
    command, *options = given
    result = call(command, run / "grown", *options, "--run", tmp_path / "new")
    assert isinstance(result.exception, GrowkitError)
    assert said in str(result.exception)


UNTIMED = "--latency-seconds, --latency-margin, --throughput-seconds, --throughput-batch mean nothing with --no-latency"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "verify --no-latency --throughput-seconds 5 --throughput-batch 4 --latency-margin 0.5 --latency-seconds 99",
            UNTIMED,
        ),
        ("verify --update-reference --latency-seconds 99", "--latency-seconds means nothing with --update-reference"),
        ("verify --batch-size 3", "--batch-size means nothing without --data"),
        (
            "verify --model-only --reference R --update-reference --max-batch 3",
            "--max-batch means nothing where a model",
        ),
        (
            "verify --model-only --reference R --update-reference --provider cuda",
            "--provider means nothing to a model alone",
        ),
        ("export --val-split nosuch --data-dir /nowhere", "--data-dir, --val-split mean nothing without --data"),
        ("export --latency-seconds 3", "--latency-seconds means nothing without --for"),
        ("verify --latency-seconds 99 --throughput-batch 4", ""),
        ("verify --data D --batch-size 3 --no-latency --max-batch 3 --provider auto", ""),
        ("export --for cpu --latency-seconds 3 --data D --val-split nosuch", ""),
        ("export --onnx", ""),
    ],
)
def test_option_that_means_nothing_is_said_before_the_work(
    words: str, said: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise GrowkitError("loading")

    for module in ("exporting", "verifying"):
        monkeypatch.setattr(f"growkit.{module}.load_source", load)
    monkeypatch.chdir(tmp_path)
    command, *options = words.split()
    file = ("--onnx-file", run / "onnx" / "model.onnx") if command == "verify" and "--model-only" not in options else ()
    result = call(command, run / "grown", *file, *options, "--run", "new")
    assert str(result.exception) == "loading"
    told = [line for line in result.output.splitlines() if line.startswith("warning: ")]
    assert (len(told), said in result.output.replace("\n", " ")) == (bool(said), True)


def test_file_alone_is_not_loaded_as_a_checkpoint_is(run: Path, tmp_path: Path) -> None:
    for option in (("--no-ema",), ("--from", NAME), ("--from-set", "depth=2")):
        result = call(
            "verify", run / "onnx" / "model.onnx", "--reference", tmp_path, *option, "--run", tmp_path / "new"
        )
        assert "model.onnx is an ONNX file: leave out --from, --from-set and --no-ema" in str(result.exception)


def test_force_replaces_only_what_growkit_wrote(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("mine")
    for target in ("own", "file"):
        result = call("export", run / "grown", "-o", tmp_path / target, "--force", "--run", tmp_path / "run")
        assert "is not growkit's to replace" in str(result.exception)
    assert (tmp_path / "own" / "thesis.txt").read_text() == "years"
    assert (tmp_path / "file").read_text() == "mine"
    monkeypatch.chdir(tmp_path / "own")
    result = call("export", run / "grown", "-o", ".", "--force", "--run", tmp_path / "run")
    assert "the current folder" in str(result.exception)


def test_version_served_is_recorded_and_one_prepared_otherwise_is_refused_before_the_work(
    run: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tritonclient")
    served = ("--triton", tmp_path / "models", "--triton-name", "m")
    assert call("export", run / "grown", *served, "--run", tmp_path / "one").exit_code == 0
    *_, step = json.loads((tmp_path / "one" / "record.json").read_text())["steps"]
    assert step["options"]["triton"]["version"] == 1
    write_source(tmp_path / "other", 0, label_names=list("abcdefg"), pretrained_cfg={"mean": [0.1, 0.2, 0.3]})
    result = call("export", tmp_path / "other", *served, "--triton-version", "2", "--run", tmp_path / "two")
    assert "m/1 wants images prepared otherwise: mean" in str(result.exception)
    assert not (tmp_path / "two" / "onnx").exists()


def test_place_with_no_other_graph_is_said(run: Path, tmp_path: Path) -> None:
    result = call("export", run / "grown", "--for", "tensorrt", "--run", tmp_path)
    assert result.exit_code == 0, result.output
    assert "--for tensorrt: there is no other graph to try" in result.output


def test_graphs_that_were_tried_are_said_and_stored(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = Choice("contrib", "slower", "batch 1: 1.200 x [1.100, 1.300]")

    def fastest(model, path, form, place, *, labels, provenance, **_):  # type: ignore[no-untyped-def]
        return export_onnx(model, path, form, labels=labels, provenance=provenance), (tried,)

    monkeypatch.setattr(folder, "fastest", fastest)
    result = call("export", run / "grown", "--for", "cpu", "--run", tmp_path)
    assert "\ncontrib attention: slower; batch 1: 1.200 x [1.100, 1.300]\n" in result.output
    (stored,) = json.loads((tmp_path / "onnx" / "export.json").read_text())["choices"]
    assert stored == {**asdict(tried), "comparisons": []}


@pytest.mark.parametrize(
    "options",
    [
        ("--pixels", "--output", "top-2"),
        ("--output", "probabilities"),
        ("--batch", "3", "--exporter", "torchscript"),
        ("--precision", "bf16"),
        ("--external-data",),
    ],
)
def test_every_form_is_evaluated_as_the_plain_file_is(options: tuple[str, ...], run: Path, tmp_path: Path) -> None:
    made = call("export", run / "grown", *options, "--run", tmp_path)
    assert made.exit_code == 0, made.output
    plain = onnx_subject(run / "onnx" / "model.onnx")
    answering = _answering_onnx(tmp_path / "onnx" / "model.onnx", "cpu")
    assert (answering.outputs, answering.labels) == (7, tuple("abcdefg"))
    assert answering.sha256 == json.loads((tmp_path / "onnx" / "export.json").read_text())["sha256"]
    images = noise_images(Preprocessing(**plain.identity.preprocessing), 4, 2)
    got, wanted = answering.predict(torch.from_numpy(images)).numpy(), plain.run(images)
    assert np.abs(got - wanted).max() < (0.1 if "bf16" in options else 1e-5)


def test_form_that_the_device_has_no_kernels_for_is_sent_to_verify(tmp_path: Path) -> None:
    """ONNX Runtime has no Expand of bfloat16 on a CPU."""
    types = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.BFLOAT16, [2, 2]) for name in "xy"]
    shape = onnx.helper.make_tensor("s", onnx.TensorProto.INT64, [2], [2, 2])
    node = onnx.helper.make_node("Expand", ["x", "s"], ["y"])
    graph = onnx.helper.make_graph([node], "g", types[:1], types[1:], [shape])
    path = tmp_path / "my model.onnx"
    onnx.save(onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 18)]), path)
    told = rf"no kernels for it on this device .*growkit verify --onnx-file '{path}' --data"
    with pytest.raises(GrowkitError, match=told) as caught:
        _answering_onnx(path, "cpu")
    assert "not readable" not in str(caught.value)
