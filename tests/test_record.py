"""A run's record keeps every step, and a run knows its furthest model."""

import json
import re
from pathlib import Path

import pytest

from growkit import __version__
from growkit.errors import GrowkitError
from growkit.record import RunFolder


def test_new_run_has_no_steps_and_makes_no_folder(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    assert run.steps() == []
    assert not run.path.exists()


def test_steps_are_appended_in_order(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.add("train", options={"seed": 1}, figures={"loss": 0.5})
    first = run.steps()[0]
    run.add("grow", options={"to": Path("x")}, figures={}, hashes={"model.safetensors": "ab"})
    assert run.steps()[0] == first
    assert [step["command"] for step in run.steps()] == ["train", "grow"]
    assert run.steps()[1]["hashes"] == {"model.safetensors": "ab"}
    assert json.loads(run.record.read_text())["schema"] == 1


def test_step_says_when_and_on_what(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.add("train", options={}, figures={})
    (step,) = run.steps()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", step["finished"])
    assert {"python", "torch", "timm", "onnx", "numpy"} <= set(step["versions"])
    assert step["versions"].get("growkit", __version__) == __version__
    assert step["hardware"]["cpu"]
    assert step["hardware"]["cores"] >= 1


@pytest.mark.parametrize("content", ["{", "[]", '{"steps": 3}', '{"steps": [1]}', "{}"])
def test_damaged_record_is_refused_and_kept(tmp_path: Path, content: str) -> None:
    run = RunFolder(tmp_path)
    run.record.write_text(content)
    with pytest.raises(GrowkitError, match=r"record\.json"):
        run.add("grow", options={}, figures={})
    assert run.record.read_text() == content


def test_furthest_stage_is_the_latest_with_weights(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for stage in (run.trained, run.grown, run.finetuned):
        stage.mkdir()
        (stage / "model.safetensors").touch()
        assert run.furthest() == stage


def test_stage_without_weights_does_not_count(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.finetuned.mkdir()
    with pytest.raises(GrowkitError, match="holds no model yet; run `growkit grow`"):
        run.furthest()


def test_fine_tuning_starts_from_the_grown_model_and_never_from_its_own(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for stage in (run.finetuned, run.trained, run.grown):
        if stage == run.trained:
            with pytest.raises(GrowkitError, match="holds no grown model"):
                run.startable()
        stage.mkdir()
        (stage / "model.safetensors").touch()
        if stage != run.finetuned:
            assert run.startable() == stage


def test_run_in_the_current_folder_holds_its_models_and_no_name_to_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunFolder(Path())
    run.grown.mkdir()
    assert run.holds("grown")
    assert not run.holds("timm:deit_tiny")


@pytest.mark.parametrize("place", ["a file/run", "a file/deeper/run"])
def test_run_that_cannot_be_made_is_refused_by_its_option(place: str, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    with pytest.raises(GrowkitError, match=rf"--run .*{place}: cannot be written \(not a directory\)"):
        RunFolder(tmp_path / place).refuse_unusable()


def test_run_that_is_a_link_to_nowhere_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to("disk")
    run = RunFolder(tmp_path / "run")
    with pytest.raises(GrowkitError, match="run is a link to disk, which is not there"):
        run.refuse_unusable()
    (tmp_path / "disk").mkdir()
    run.refuse_unusable()


def test_looking_whether_a_run_can_be_made_leaves_nothing(tmp_path: Path) -> None:
    RunFolder(tmp_path / "new" / "run").refuse_unusable()
    assert list(tmp_path.iterdir()) == []


def test_what_a_dead_machine_left_anywhere_in_a_run_goes_and_its_old_folders_come_back(tmp_path: Path) -> None:
    for name in (".record.json", "finetuned/last/.state.pt", "compare/runs/a/.last"):
        (tmp_path / f"{name}.000000-1-00000001.partial").mkdir(parents=True)
    for name in (".grown", "compare/runs/.b"):
        (tmp_path / f"{name}.000000-1-00000001.old").mkdir(parents=True)
    RunFolder(tmp_path).clear_left()
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    runs = {"compare", "compare/runs", "compare/runs/a", "compare/runs/b"}
    assert left == {"finetuned", "finetuned/last", "grown", *runs}


def test_who_resumes_without_the_model_is_told_which_one_is_missing(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    (run.finetuned / "last").mkdir(parents=True)
    with pytest.raises(GrowkitError, match=r"holds no grown model; name the one that .*finetuned was started from"):
        run.startable()
