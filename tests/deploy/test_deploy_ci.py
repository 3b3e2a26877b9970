"""The gate as a user meets it: references from the command line, exit statuses, and the CI files under examples/ci."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import yaml
from deploy_models import make_model, replace, tensors
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from test_deploy_commands import write_source

from growkit.record import RunFolder
from growkit_cli import main as program
from growkit_cli.verify import reference_of

ROOT = Path(__file__).parents[2]
CI = ROOT / "examples" / "ci"
GROWKIT = [sys.executable, "-m", "growkit_cli"]
EXPORT = ("export", "model", "--onnx", "--exporter", "torchscript", "--out", "onnx")  # the faster exporter


@pytest.fixture(scope="module")
def accepted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository that holds a model, its ONNX file, and a reference of each."""
    root = tmp_path_factory.mktemp("accepted")
    write_source(root / "model", 0, label_names=list("abcdefg"))
    for arguments in (
        EXPORT,
        ("verify", "model", "--model-only", "--update-reference", "--reference", "reference/model"),
        ("verify", "model", "--onnx-file", "onnx/model.onnx", "--update-reference", "--reference", "reference/onnx"),
    ):
        assert growkit(root, *arguments) == 0
    return root


@pytest.fixture
def place(accepted: Path, tmp_path: Path) -> Path:
    """A copy of the repository that may be damaged."""
    return Path(shutil.copytree(accepted, tmp_path / "place"))


def growkit(folder: Path, *arguments: str) -> int:
    """Exit status of the program, run in this process inside `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["growkit", *arguments])
        patch.setenv("GROWKIT_DEBUG", "")
        try:
            program.main()
        except SystemExit as left:
            return int(left.code or 0)
    return 0


def damage_model(place: Path) -> None:
    weights = load_file(place / "model" / "model.safetensors")
    weights["blocks.0.mlp.fc1.weight"][3, 5] *= 1.01
    save_file(weights, place / "model" / "model.safetensors", metadata={"format": "pt"})


def damage_file(place: Path) -> None:
    proto = onnx.load(place / "onnx" / "model.onnx")
    replace(proto, "head.bias", tensors(proto)["head.bias"] * 1.01)
    (place / "onnx" / "model.onnx").write_bytes(proto.SerializeToString())


def swapped(labels: list[str]) -> list[str]:
    return [labels[1], labels[0], *labels[2:]]


def test_swapped_class_names_are_found_in_the_model_and_in_the_file(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((place / "model" / "config.json").read_text())
    config["label_names"] = swapped(config["label_names"])
    (place / "model" / "config.json").write_text(json.dumps(config))
    proto = onnx.load(place / "onnx" / "model.onnx")
    (stored,) = (entry for entry in proto.metadata_props if entry.key == "labels")
    stored.value = json.dumps(swapped(json.loads(stored.value)))
    (place / "onnx" / "model.onnx").write_bytes(proto.SerializeToString())
    both = ("verify", "model", "--onnx-file", "onnx/model.onnx", "--no-latency", "--reference", "reference/model")
    for words, whose in ((MODEL, {"model"}), ((*FILE, "reference/model"), {"file"}), (both, {"model", "file"})):
        capsys.readouterr()
        assert growkit(place, *words) == 1
        out = capsys.readouterr().out
        found = {one for one in ("model", "file") if f"{one}: class names are others: number 0 is b, was a" in out}
        assert found == whose
    assert growkit(place, *MODEL, "--update-reference") == 0
    assert "as before; class names are others: number 0 is b, was a; logits" in capsys.readouterr().out


def damage_reference(place: Path) -> None:
    os.truncate(place / "reference" / "model" / "test_data_set_0" / "output_0.pb", 20)


def other_reference(place: Path) -> None:
    """A reference of a model for other images."""
    save = place / "other"
    write_source(save, 3)
    config = json.loads((save / "config.json").read_text())
    config["model_args"]["img_size"] = 32
    config.pop("pretrained_cfg", None)
    weights = load_file(save / "model.safetensors")
    bigger = make_model(3, img_size=32).state_dict()
    save_file({**weights, "pos_embed": bigger["pos_embed"]}, save / "model.safetensors", metadata={"format": "pt"})
    (save / "config.json").write_text(json.dumps(config))
    target = ("--reference", "reference/model", "--update-reference")
    shutil.rmtree(place / "reference" / "model")
    assert growkit(place, "verify", "other", "--model-only", *target) == 0


# the command ---------------------------------------------------------------------------------

MODEL = ("verify", "model", "--model-only", "--reference", "reference/model")
FILE = ("verify", "onnx/model.onnx", "--reference")


def test_model_alone_and_file_alone_pass_their_references(accepted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert growkit(accepted, *MODEL) == 0
    for reference in ("reference/onnx", "reference/model"):
        assert growkit(accepted, *FILE, reference) == 0
    out = capsys.readouterr().out
    assert "verifying onnx/model.onnx against reference/onnx" in out
    assert out.rstrip().endswith("verdict: pass")


@pytest.mark.parametrize("alone", [(*FILE, "reference/onnx"), MODEL])
def test_what_one_alone_cannot_be_held_to_is_refused(
    alone: tuple[str, ...], accepted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in (("--max-latency-ratio", "0.1"), ("--compiled",)):
        assert growkit(accepted, *alone, *option) == 2
        assert "name both" in capsys.readouterr().err
    assert growkit(accepted, *alone, "--precision", "fp32") == 0
    assert growkit(accepted, *alone, "--precision", "int8") == 1
    assert "FAILED structure: precision: fp32, allowed int8" in capsys.readouterr().out


def test_what_needs_no_model_is_refused_before_one_is_loaded(
    accepted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("growkit.verifying.load_source", lambda *_, **__: pytest.fail("loaded"))
    for words, says in {
        ("verify", "model", "--model-only"): "nothing to hold model against",
        ("verify", "model", "--model-only", "--reference", "nowhere"): "nowhere",
        ("verify", "model", "--onnx-file", "nowhere.onnx"): "nowhere.onnx: no such file",
        ("verify", "nowhere.onnx"): "nothing to hold nowhere.onnx against",
        ("verify", "model", "--onnx-file", "onnx/model.onnx", "--max-accuracy-drop", "1"): "give --data",
        ("export", "model", "--out", "onnx"): "already exists",
        ("export", "model", "--out", "other", "--max-accuracy-drop", "1"): "give --data",
    }.items():
        assert growkit(accepted, *words) == 2, words
        assert says in capsys.readouterr().err


def test_both_are_held_where_both_are_named(accepted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = ("verify", "model", "--onnx-file", "onnx/model.onnx", "--no-latency", "--json", "--reference")
    for reference, words in (("reference/model", {"model", "file"}), ("reference/onnx", {"file"})):
        capsys.readouterr()
        assert growkit(accepted, *both, reference) == 0
        report = json.loads(capsys.readouterr().out)
        names = {c["name"] for c in report["checks"] if c["group"] == "reference"}
        assert {re.findall("model|file", name)[0] for name in names} == words
        assert {"weights", "numbers", "data sets"} <= {c["group"] for c in report["checks"]}
        assert report["reference"] == reference


@pytest.mark.parametrize(
    ("damage", "command", "told"),
    [
        (damage_model, MODEL, "FAILED reference: the reference was written for weights"),
        (damage_file, (*FILE, "reference/onnx"), "FAILED reference: the reference was written for SHA-256"),
        (damage_file, (*FILE, "reference/model"), "FAILED reference: test_data_set_0: file: answers differ"),
        (other_reference, MODEL, "the reference is another model's"),
        (
            lambda place: (place / "onnx" / "model.onnx").write_text("no model"),
            (*FILE, "reference/onnx"),
            "FAILED structure: onnx/model.onnx: not valid ONNX",
        ),
    ],
)
def test_what_does_not_hold_exits_1_and_says_why(
    place: Path,
    damage: Callable[[Path], object],
    command: tuple[str, ...],
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(place)
    assert growkit(place, *command) == 1
    out = capsys.readouterr().out
    assert told in out
    assert out.rstrip().endswith("verdict: fail")
    assert "latency" not in out


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (("verify", "model", "--model-only"), "name --reference DIR"),
        (("verify", "onnx/model.onnx"), "name --reference DIR"),
        (("verify", "my model.onnx"), "growkit verify MODEL --onnx-file 'my model.onnx'"),
        (("verify", "absent", "--model-only", "--reference", "reference/model"), "absent: no such file"),
        (("verify", "absent.onnx", "--reference", "reference/onnx"), "absent.onnx: no such file"),
        (("verify", "model", "--model-only", "--reference", "absent"), "absent: no such folder"),
        (("verify", "model", "--model-only", "--reference", "onnx"), "onnx holds no reference.json"),
        ((*MODEL, "--onnx-file", "onnx/model.onnx"), "--model-only leaves the ONNX file"),
        ((*FILE, "reference/onnx", "--update-reference"), "name its model: growkit verify MODEL --onnx-file"),
        (("verify", "model", "--model-only", "--update-reference", "--reference", "onnx"), "would be lost"),
        (("verify", "model", "--model-only", "--update-reference", "--reference", "model"), "would be lost"),
    ],
)
def test_bad_input_exits_2_with_one_line_and_nothing_is_lost(
    accepted: Path, command: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.read_bytes() for p in accepted.rglob("*") if p.is_file()}
    assert growkit(accepted, *command) == 2
    out, error = capsys.readouterr()
    assert "verdict" not in out  # refused before the work
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert told in error
    assert {p: p.read_bytes() for p in accepted.rglob("*") if p.is_file()} == before


def test_damaged_reference_exits_2(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage_reference(place)
    assert growkit(place, *MODEL) == 2
    assert "output_0.pb: damaged" in capsys.readouterr().err
    assert growkit(place, *MODEL, "--update-reference") == 0
    assert "replaced reference/model, which could not be read" in capsys.readouterr().out
    assert growkit(place, *MODEL) == 0


def test_references_go_by_stage_where_none_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = place / "run"
    for stage in ("grown", "finetuned"):
        shutil.copytree(place / "model", run / stage)
    shutil.copytree(place / "onnx", run / "onnx")
    damage_model(place)
    shutil.copytree(place / "model", run / "finetuned", dirs_exist_ok=True)
    update = ("--update-reference", "--model-only")
    assert growkit(place, "verify", *update) == 0
    assert growkit(place, "verify", "run/grown", *update) == 0
    assert growkit(place, "verify", "run/grown", "--update-reference") == 0
    assert "wrote run/reference/onnx; hold it with --reference run/reference/onnx" in capsys.readouterr().out
    assert sorted(p.name for p in (run / "reference").iterdir()) == ["finetuned", "grown", "onnx"]
    for stage, other in (("grown", "finetuned"), ("finetuned", "grown")):
        hold = ("verify", f"run/{stage}", "--model-only", "--reference")
        assert growkit(place, *hold, f"run/reference/{stage}") == 0
        assert growkit(place, *hold, f"run/reference/{other}") == 1


def test_references_of_models_by_name_are_told_apart_by_their_tags(tmp_path: Path) -> None:
    names = ("timm:vit_tiny_patch16_224.augreg_in21k", "timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    found = [reference_of(Path(name), RunFolder(tmp_path), model_only=True) for name in names]
    assert found == [tmp_path / "reference" / name.replace(":", "-") for name in names]


def references_on_record(place: Path) -> list[str | None]:
    """What each verification came to against its reference."""
    steps = json.loads((place / "run" / "record.json").read_text())["steps"]
    found = [step["figures"]["reference"] for step in steps if step["command"] == "verify"]
    return [one and one["verdict"] for one in found]


def test_model_or_file_held_alone_leaves_the_verification_of_both_as_it_is(place: Path) -> None:
    whole = ("verify", "model", "--onnx-file", "onnx/model.onnx", "--no-latency")
    assert growkit(place, *whole) == 0
    before = (place / "run" / "verify" / "report.json").read_bytes()
    assert growkit(place, *MODEL) == growkit(place, *FILE, "reference/onnx") == 0
    model, file = (json.loads((place / "run" / "verify" / f"held-{of}.json").read_text()) for of in ("model", "file"))
    assert {one["group"] for one in model["checks"]} == {"reference"}
    assert (model["model"], model["onnx"], file["model"], file["onnx"]) == ("model", None, None, "onnx/model.onnx")
    assert (place / "run" / "verify" / "report.json").read_bytes() == before
    assert growkit(place, *whole, "--reference", "reference/model") == 0
    assert growkit(place, *FILE, "reference/onnx", "--precision", "fp16") == 1  # though it answers as the reference
    assert growkit(place, *whole, "--reference", "reference/model", "--precision", "fp16") == 1
    (place / "onnx" / "model.onnx").write_bytes(b"no ONNX")
    assert growkit(place, *whole, "--reference", "reference/model") == 1
    assert references_on_record(place)[-7:] == [None, "pass", "pass", "pass", "fail", "pass", "fail"]


def test_change_that_was_meant_is_accepted_by_the_command_that_is_told(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage_model(place)
    assert growkit(place, *EXPORT, "--force") == 0
    for reference in ("reference/model", "reference/onnx"):
        capsys.readouterr()
        assert growkit(place, *FILE, reference) == 1
        (command,) = re.findall("if the change was meant, `growkit (.*)` accepts it", capsys.readouterr().out)
        named = {"MODEL": "model", "FILE": "onnx/model.onnx", "DIR": reference}
        assert growkit(place, *(named.get(word, word) for word in command.split())) == 0
        assert growkit(place, *FILE, reference) == 0
    assert growkit(place, *MODEL) == 0
    assert references_on_record(place)[-7:] == [*["fail", "pass", "pass"] * 2, "pass"]


def test_update_says_what_it_replaced(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage_model(place)
    assert growkit(place, *MODEL, "--update-reference") == 0
    out = capsys.readouterr().out
    assert re.search(r"replaced reference/model: weights by tensor \w{12} -> \w{12}; logits move by up to (?!0 )", out)
    assert growkit(place, *MODEL) == 0
    capsys.readouterr()
    assert growkit(place, *MODEL, "--update-reference", "--json") == 0
    told = json.loads(capsys.readouterr().out)["reference_update"]
    assert "as before; logits move by up to 0 " in told


def test_file_that_fails_against_its_model_becomes_no_reference(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage_file(place)
    before = {p: p.read_bytes() for p in (place / "reference").rglob("*") if p.is_file()}
    update = ("--update-reference", "--reference", "reference/onnx")
    assert growkit(place, "verify", "model", "--onnx-file", "onnx/model.onnx", *update) == 1
    out = capsys.readouterr().out
    assert "reference/onnx was not written: only what passes becomes a reference" in out
    told = [line.removeprefix("FAILED numbers: ") for line in out.splitlines() if line.startswith("FAILED numbers: ")]
    report = json.loads((place / "run" / "verify" / "report.json").read_text())
    assert told[0] == report["numerics"]["diagnosis"]  # where it comes from before what follows
    assert {p: p.read_bytes() for p in (place / "reference").rglob("*") if p.is_file()} == before


def test_reference_holds_no_times(place: Path) -> None:
    both = ("verify", "model", "--onnx-file", "onnx/model.onnx")
    assert growkit(place, *both, "--update-reference", "--reference", "reference/new") == 0
    report = json.loads((place / "run" / "verify" / "report.json").read_text())
    assert (report["latency"], report["settings"]["latency"]) == (None, False)


def test_reference_of_a_file_is_what_the_file_says(accepted: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(accepted / "onnx" / "model.onnx")
    for data_set in sorted((accepted / "reference" / "onnx").glob("test_data_set_*")):
        images, logits = (
            numpy_helper.to_array(onnx.load_tensor(str(data_set / name))) for name in ("input_0.pb", "output_0.pb")
        )
        (got,) = session.run(None, {"input": images})
        assert abs(got - logits).max() < 1e-5 * logits.std()


@pytest.mark.slow
def test_exit_statuses_reach_the_shell(place: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "cli")])}

    def status(*arguments: str) -> int:
        done = subprocess.run([*GROWKIT, *arguments], cwd=place, env=environment, capture_output=True, check=False)
        assert b"Traceback" not in done.stderr
        return done.returncode

    assert status("verify", "model", "--onnx-file", "onnx/model.onnx", "--no-latency") == 0
    damage_model(place)
    assert status(*MODEL) == 1
    assert status(*MODEL[:-1], "absent") == 2


# the CI files --------------------------------------------------------------------------------


def steps(path: Path) -> list[str]:
    """The shell commands of a CI file, in the order in which it runs them."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.name.startswith("github"):
        return [step["run"] for job in content["jobs"].values() for step in job["steps"] if "run" in step]
    jobs = [job for job in content.values() if isinstance(job, dict) and "script" in job]
    return [line for job in jobs for line in (*job.get("before_script", ()), *job["script"])]


def words(step: str) -> list[list[str]]:
    """The commands of a step, split as a shell would."""
    lines = step.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def run_gate(path: Path, place: Path) -> int:
    """Run a CI file's steps as its runner does, up to the first that fails; the install is this environment."""
    commands = [command for step in steps(path) for command in words(step)]
    assert commands[0] == ["pip", "install", "growkit"]
    assert [command[0] for command in commands[1:]] == ["growkit", "growkit"]
    for command in commands[1:]:
        if status := growkit(place, *command[1:]):
            return status
    return 0


FILES = pytest.mark.parametrize("path", sorted(CI.glob("*.yml")), ids=lambda path: path.name)


@FILES
def test_gate_passes_what_was_accepted_and_reports_it(path: Path, place: Path) -> None:
    assert run_gate(path, place) == 0
    for name in ("model", "onnx"):
        suite = ET.parse(place / "gate" / f"{name}.xml").getroot()[0]
        assert (suite.get("failures"), suite.get("errors")) == ("0", "0")
        assert int(suite.get("tests") or 0) == len(suite.findall("testcase")) > 5
        (written,) = (place / "gate" / name / "verify").iterdir()
        assert written.name == ("held-model.json" if name == "model" else "report.json")
        assert json.loads(written.read_text())["verdict"] == "pass"


@FILES
@pytest.mark.parametrize(
    ("damage", "status"),
    [
        (damage_model, 1),
        (damage_file, 1),
        (other_reference, 1),
        (damage_reference, 2),
        (lambda place: shutil.rmtree(place / "model"), 2),
        (lambda place: shutil.rmtree(place / "reference"), 2),
    ],
    ids=["model", "file", "other reference", "cut reference", "no model", "no reference"],
)
def test_gate_stops_what_was_not(path: Path, place: Path, damage: Callable[[Path], object], status: int) -> None:
    damage(place)
    assert run_gate(path, place) == status
    written = sorted((place / "gate").glob("*.xml"), key=os.path.getmtime)
    failures = [ET.parse(f).getroot()[0].get("failures") for f in written]
    assert [f for f in failures if f != "0"] == failures[-1:] if status == 1 else "1" not in failures


def test_ci_files_are_there_and_keep_what_was_found() -> None:
    github, gitlab = (yaml.safe_load((CI / f"{name}.yml").read_text()) for name in ("github-actions", "gitlab-ci"))
    (upload,) = (s for s in github["jobs"]["verify"]["steps"] if "upload-artifact" in s.get("uses", ""))
    assert upload["if"] == "always()"
    assert upload["with"]["path"] == "gate/"
    assert gitlab["verify"]["artifacts"]["when"] == "always"
    assert gitlab["verify"]["artifacts"]["reports"]["junit"] == "gate/*.xml"


@FILES
def test_shell_makes_of_the_steps_the_words_that_are_run_above(path: Path, tmp_path: Path) -> None:
    for name in ("growkit", "pip"):
        stand_in = tmp_path / name
        stand_in.write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@" "" >> said\n')
        stand_in.chmod(0o755)
    here = {**os.environ, "PATH": os.pathsep.join([str(tmp_path), os.environ["PATH"]])}
    for step in steps(path):
        assert subprocess.run(["bash", "-e", "-c", step], cwd=tmp_path, env=here).returncode == 0
    said = [command.splitlines() for command in (tmp_path / "said").read_text().split("\n\n") if command]
    assert said == [command for step in steps(path) for command in words(step)]
