"""A faster graph is kept when it is faithful and its whole interval is better; nothing is kept on a noisy machine."""

import dataclasses
from pathlib import Path

import onnx
import pytest
from deploy_models import make_model
from torch import nn

from growkit.deploy import export
from growkit.deploy import fastest as module
from growkit.deploy.capture import captured
from growkit.deploy.contention import Contention
from growkit.deploy.fastest import candidates, fastest, judged
from growkit.deploy.folder import write_export
from growkit.deploy.form import Form
from growkit.deploy.settings import ExportSettings
from growkit.deploy.timing import Comparison, Percentiles
from growkit.errors import GrowkitError


def measured(ratio: float, low: float, high: float, batch: int = 1) -> Comparison:
    times = Percentiles(1.0, 1.0, 1.0)
    return Comparison("contrib", "plain", batch, ratio, low, high, 3, 60, times, times)


@pytest.mark.parametrize(
    ("found", "noise", "verdict"),
    [
        ([measured(0.9, 0.88, 0.92)], 0.01, "kept"),
        ([measured(0.9, 0.88, 0.92), measured(1.0, 0.99, 1.01, 8)], 0.01, "kept"),
        ([measured(0.9, 0.88, 0.92), measured(1.05, 1.02, 1.08, 8)], 0.01, "slower"),
        ([measured(0.95, 0.88, 1.01)], 0.01, "no faster"),
        ([measured(0.9, 0.88, 0.92), measured(1.02, 0.995, 1.05, 8)], 0.01, "kept"),
        # sessions of one file differ by that much
        ([measured(0.985, 0.98, 0.99)], 0.02, "no faster"),
        ([measured(0.9, 0.88, 0.92)], 0.06, "not decided"),
    ],
)
def test_verdict_follows_the_whole_interval(found: list[Comparison], noise: float, verdict: str) -> None:
    assert judged("contrib", tuple(found), noise).verdict == verdict


@pytest.mark.parametrize(
    ("form", "place", "kinds"),
    [
        (Form(), "cpu", ["contrib"]),
        (Form(target="ort-1.23"), "cpu", ["standard", "contrib"]),
        (Form(target="ort-1.23"), "tensorrt", ["standard"]),
        (Form(), "tensorrt", []),
        (Form(precision="fp16", target="ort-1.23"), "cuda", ["standard"]),
        (Form(precision="fp16"), "cpu", []),
        (Form(precision="int8"), "cpu", []),
        (Form(exporter="torchscript"), "cpu", []),
    ],
)
def test_candidates_are_what_the_target_and_the_place_know(form: Form, place: str, kinds: list[str]) -> None:
    assert [c.attention for c in candidates(form, place)] == kinds


def test_unknown_place_is_refused() -> None:
    with pytest.raises(GrowkitError, match="--for gpu: unknown; choose cpu, cuda or tensorrt"):
        candidates(Form(), "gpu")


def faked(monkeypatch: pytest.MonkeyPatch, ratio: float) -> list[tuple[str, str]]:
    """Comparisons that find `ratio`, without a clock; the calls made."""
    calls = []

    def compare(subject, baseline, *, names=("subject", "baseline"), batch=1, **more):  # type: ignore[no-untyped-def]
        subject()()
        baseline()()
        calls.append(names)
        same = names == ("subject", "baseline")
        return measured(1.0, 0.995, 1.005, batch) if same else measured(ratio, ratio - 0.01, ratio + 0.01, batch)

    monkeypatch.setattr(module, "compare", compare)
    return calls


@pytest.mark.parametrize(("max_batch", "sizes"), [(2, 2), (1, 1)])
def test_faster_graph_is_the_one_written(
    max_batch: int, sizes: int, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = faked(monkeypatch, 0.9)
    captures: list[Form] = []

    def counted(network: nn.Module, size: tuple[int, int, int], form: Form) -> onnx.ModelProto:
        captures.append(form)
        return captured(network, size, form)

    monkeypatch.setattr(export, "captured", counted)
    (folder := tmp_path / "onnx").mkdir()
    settings = ExportSettings(for_="cpu", max_batch=max_batch, external_data=True)
    exported = write_export(model, folder, settings, labels=list("abcdefg"))
    assert exported.export.form.attention == "contrib"
    assert exported.content["choices"][0]["verdict"] == "kept"
    assert exported.parity.passed
    assert len(calls) == 2 * sizes  # each batch size once against itself and once against the candidate
    assert captures == [Form(), Form(attention="contrib")]
    direct = export.export_onnx(
        model, tmp_path / "model.onnx", Form(attention="contrib"), external=True, labels=list("abcdefg")
    )
    assert exported.export == dataclasses.replace(direct, path=folder / "model.onnx")
    assert {p.name: p.read_bytes() for p in folder.glob("model*")} == {
        p.name: p.read_bytes() for p in tmp_path.glob("model*")
    }
    assert len(list(folder.iterdir())) == 5  # two files, two data sets, export.json


def test_graph_whose_slowest_batch_size_is_fastest_is_kept_and_the_other_is_not_called_slow(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[tuple[str, str]] = []

    def compare(subject, baseline, *, names=("", ""), batch=1, seconds, seed, foreign):  # type: ignore[no-untyped-def]
        assert (seconds, seed, foreign.__func__) == (3.0, 4, Contention.lap)
        files.append((subject.args[0].parent.name, baseline.args[0].parent.name))
        ratio = {"": 1.0, "standard": 0.9, "contrib": 0.8 if batch == 1 else 0.95}[names[0]]
        return measured(ratio, ratio - 0.001, ratio + 0.001, batch)

    monkeypatch.setattr(module, "compare", compare)
    exported, choices = fastest(
        model, tmp_path / "m.onnx", Form(target="ort-1.23"), "cpu", max_batch=2, seconds=3.0, seed=4
    )
    assert {choice.attention: choice.verdict for choice in choices} == {"standard": "kept", "contrib": "faster"}
    assert choices[1].why.endswith("another is faster still")
    assert exported.form.attention == "standard"
    assert files == [(name, "unfused") for name in ("unfused", "standard", "contrib") for _ in (1, 2)]


def test_graph_that_is_faster_at_one_batch_size_and_no_slower_at_the_other_is_kept(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(subject, baseline, *, names=("subject", "baseline"), batch=1, **more):  # type: ignore[no-untyped-def]
        if names == ("subject", "baseline"):
            return measured(1.0, 0.999, 1.001, batch)
        return measured(0.9, 0.89, 0.91, batch) if batch == 1 else measured(1.001, 0.991, 1.011, batch)

    monkeypatch.setattr(module, "compare", compare)
    exported, (choice,) = fastest(model, tmp_path / "m.onnx", Form(), "cpu", max_batch=2)
    assert (exported.form.attention, choice.verdict) == ("contrib", "kept")
    assert "another is faster" not in choice.why


def test_graph_that_is_no_faster_is_left(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, 1.0)
    exported = write_export(model, tmp_path, ExportSettings(for_="cpu", max_batch=2))
    assert exported.export.form == Form()
    assert exported.content["choices"][0]["verdict"] == "no faster"


def test_faster_but_unfaithful_graph_is_left(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, 0.5)
    check = module.check_parity

    def strict(network, path, settings):  # type: ignore[no-untyped-def]
        return check(make_model(3), path, settings)

    monkeypatch.setattr(module, "check_parity", strict)
    exported, (choice,) = fastest(model, tmp_path / "m.onnx", Form(), "cpu", max_batch=1)
    assert exported.form == Form()
    assert choice.verdict == "not faithful"


def test_place_that_does_not_run_here_is_said_and_the_plain_graph_stays(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(file: Path, *, provider: str) -> None:
        raise GrowkitError(f"provider {provider} does not run here: libcuda.so.1 is missing")

    calls = faked(monkeypatch, 0.5)
    monkeypatch.setattr(module, "open_session", missing)
    exported, (choice,) = fastest(model, tmp_path / "m.onnx", Form(), "cuda")
    assert exported.form == Form()
    assert (choice.verdict, choice.why) == (
        "not measured",
        "provider cuda does not run here: libcuda.so.1 is missing",
    )
    assert calls == []


def test_graph_that_turned_out_to_be_the_plain_one_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = faked(monkeypatch, 0.5)
    model = make_model(4, depth=1, qk_norm=True)  # com.microsoft Attention has no norms of heads
    exported, (choice,) = fastest(model, tmp_path / "m.onnx", Form(), "cpu", max_batch=1)
    assert (exported.form, choice.verdict) == (Form(), "not measured")
    assert ("contrib", "plain") not in calls


def test_noise_at_one_batch_size_leaves_everything_open(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(subject, baseline, *, names=("subject", "baseline"), batch=1, **more):  # type: ignore[no-untyped-def]
        if names == ("subject", "baseline"):
            return measured(1.0, 0.9, 1.1, batch) if batch == 1 else measured(1.0, 0.999, 1.001, batch)
        return measured(0.9, 0.89, 0.91, batch)

    monkeypatch.setattr(module, "compare", compare)
    exported, (choice,) = fastest(model, tmp_path / "m.onnx", Form(), "cpu", max_batch=2)
    assert (exported.form, choice.verdict) == (Form(), "not decided")
