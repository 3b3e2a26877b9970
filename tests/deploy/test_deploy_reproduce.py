"""A failing `growkit verify` leaves a script that shows the same number again; it goes when the file is right."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import typer
from deploy_models import ARGUMENTS, NAME, make_model, replace, tensors
from faults import behind, folded_batch
from timm.models import save_for_hf
from typer.testing import CliRunner

from growkit.deploy.form import Form
from growkit.deploy.parity import Parity
from growkit_cli.export import export
from growkit_cli.verify import verify

ROOT = Path(__file__).parents[2]
app = typer.Typer()
app.command()(export)
app.command()(verify)


def exported(run: Path, *options: str) -> Path:
    config = {"architecture": NAME, "model_args": {k: v for k, v in ARGUMENTS.items() if k != "num_classes"}}
    save_for_hf(make_model(), str(run / "grown"), model_config=config, safe_serialization=True)
    given = ["export", "--run", str(run), "--exporter", "torchscript", *options]
    result = CliRunner().invoke(app, given, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return run


def edited(run: Path, change: Callable[[onnx.ModelProto], None]) -> bytes:
    """Change the export; returns what it was."""
    path = run / "onnx" / "model.onnx"
    before, proto = path.read_bytes(), onnx.load(str(path))
    change(proto)
    path.write_bytes(proto.SerializeToString())
    return before


def verified(run: Path, *options: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["verify", "--run", str(run), "--no-latency", *options])
    return result.exit_code, result.output


def doubled(proto: onnx.ModelProto) -> None:
    replace(proto, "blocks.0.mlp.fc1.bias", 2 * tensors(proto)["blocks.0.mlp.fc1.bias"])


def reproduced(run: Path, cwd: Path) -> tuple[int, str]:
    """The script in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(run / "verify" / "reproduce.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "cli")))},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_script_shows_the_same_number_again_in_a_moved_folder_and_goes_when_the_file_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = exported(tmp_path / "run", "--external-data")
    clean = edited(run, doubled)
    status, output = verified(run)
    assert status == 1
    assert "reproduce.py shows it again" in output
    assert "blocks.0.mlp.fc1 is the first layer whose output differs" in output
    seen = json.loads((run / "verify" / "report.json").read_text())["numerics"]["batches"]["1"]["relative_rms"]
    moved = run.rename(tmp_path / "moved")
    status, output = reproduced(moved, cwd=tmp_path)
    assert status == 1, output
    assert f"batch 1: relative RMS error {seen:.3g}\n" in output
    assert f"FAILED numbers: batch 1: relative RMS error: {seen:.3g}, allowed 1e-05" in output
    assert str(tmp_path) not in (moved / "verify" / "reproduce.py").read_text()

    (moved / "onnx" / "model.onnx").write_bytes(clean)
    monkeypatch.chdir(moved)
    assert run_here(moved, monkeypatch, capsys)[0] == 0
    assert verified(moved)[0] == 0
    assert not (moved / "verify" / "reproduce.py").exists()


def run_here(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *more: str
) -> tuple[int, str]:
    """The script in this process, which is quicker."""
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *more])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(run / "verify" / "reproduce.py"), run_name="__main__")
    return int(end.value.code or 0), capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "change", "name", "place"),
    [
        ((), behind("input", ("Min", [np.float32(2)], {})), "ten times too large", "extremes"),
        ((), folded_batch, "batch 2", "batches"),
        (("--batch", "3", "--pixels", "--output", "top-3"), doubled, "batch 3", "batches"),
    ],
    ids=["an extreme image", "a batch", "pixels in and classes out"],
)
def test_script_runs_the_input_that_failed(
    options: tuple[str, ...],
    change: Callable[[onnx.ModelProto], None],
    name: str,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = exported(tmp_path / "run", *options)
    clean = edited(run, change)
    assert verified(run)[0] == 1
    figures = json.loads((run / "verify" / "report.json").read_text())["numerics"][place]
    seen = figures[name if place == "extremes" else name.split()[1]]["relative_rms"]
    status, output = run_here(run, monkeypatch, capsys)
    assert status == 1
    assert f"{name}: relative RMS error {seen:.3g}\n" in output
    assert f"FAILED numbers: {name}: relative RMS error: {seen:.3g}, allowed " in output
    other = tmp_path / "clean.onnx"
    other.write_bytes(clean)
    assert run_here(run, monkeypatch, capsys, "--onnx", str(other))[0] == 0


def test_script_goes_by_the_checks_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own figures know less of what is allowed: how noisy the precision is for this very model."""
    run = exported(tmp_path / "run")
    edited(run, doubled)
    assert verified(run)[0] == 1
    monkeypatch.setattr("growkit.deploy.parity.check_parity", lambda *_, **__: Parity((), {}, "cpu", Form()))
    status, output = run_here(run, monkeypatch, capsys)
    assert "batch 1: relative RMS error 0." in output
    assert "no check fails" in output
    assert status == 0


def test_script_shows_again_what_is_no_matter_of_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = exported(tmp_path / "run")
    edited(run, lambda proto: setattr(proto, "ir_version", 10))
    assert verified(run)[0] == 1
    status, output = run_here(run, monkeypatch, capsys)
    assert status == 1
    assert "FAILED structure: IR version: 10, expected 8" in output


def test_script_asks_what_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = exported(tmp_path / "run")
    assert verified(run, "--precision", "int8", "--no-ema")[0] == 1
    assert (
        "load_source(model, Loading(from_=None, from_set=None, ema=False))"
        in (run / "verify" / "reproduce.py").read_text()
    )
    status, output = run_here(run, monkeypatch, capsys)
    assert status == 1
    assert "FAILED structure: precision: fp32, allowed int8" in output
