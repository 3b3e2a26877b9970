"""A failing check names the layer, and whose fault it is: ONNX Runtime's optimiser, ONNX Runtime, or the export's.

Which layer each seeded fault is seen in is in faults.LAYERS.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from deploy_models import replace, tensors
from torch import nn

from growkit.deploy import diagnose, parts
from growkit.deploy.layers import Seen, Traced, first_wrong, nearest, traced
from growkit.deploy.parity import check_parity
from growkit.deploy.runtime import Session, open_session
from growkit.deploy.truth import noise_images, preprocessing, truth_of

Edit = Callable[[Callable[[onnx.ModelProto], None]], Path]


def no_bias(proto: onnx.ModelProto) -> None:
    name = "blocks.1.mlp.fc1.bias"
    replace(proto, name, np.zeros_like(tensors(proto)[name]))


def wrong_if(monkeypatch: pytest.MonkeyPatch, wrong: Callable[[bool], bool]) -> None:
    """ONNX Runtime multiplies every answer by 1.001 where `wrong(optimise)`."""

    class Broken(Session):
        def run(self, images: np.ndarray) -> np.ndarray:
            return super().run(images) * np.float32(1.001)

    def opened(file: Any, *, optimise: bool = True, **more: Any) -> Session:
        session = open_session(file, optimise=optimise, **more)
        if not wrong(optimise):
            return session
        return Broken(session.inner, session.input, session.provider, session.threads)

    monkeypatch.setattr(parts, "open_session", opened)


def test_export_bug_names_the_layer_and_what_was_right_before_it(model: nn.Module, edit: Edit) -> None:
    figures = check_parity(model, edit(no_bias)).figures
    assert figures["layer"] == "blocks.1.mlp.fc1"
    assert "an error in the file" in figures["diagnosis"]
    assert "and in ONNX's reference evaluator" in figures["diagnosis"]
    assert "blocks.1.mlp.fc1 is the first layer whose output differs: relative RMS error" in figures["diagnosis"]
    assert "(the input of blocks.1.mlp.fc1 was right to" in figures["diagnosis"]


def test_optimiser_bug_is_told(model: nn.Module, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_if(monkeypatch, lambda optimise: optimise)
    assert "an optimiser bug" in check_parity(model, exported).figures["diagnosis"]


def test_runtime_bug_is_told_by_the_reference_evaluator(
    model: nn.Module, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong_if(monkeypatch, lambda optimise: True)
    assert "a runtime bug" in check_parity(model, exported).figures["diagnosis"]


def test_reference_evaluator_is_left_out_of_large_files_and_that_is_said(
    model: nn.Module, edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnose, "EVALUATED", 1000)
    figures = check_parity(model, edit(no_bias)).figures
    assert "too large for ONNX's reference evaluator" in figures["diagnosis"]
    assert figures["layer"] == "blocks.1.mlp.fc1"


def test_values_are_fetched_in_parts(model: nn.Module, edit: Edit, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def counted(graph: onnx.ModelProto, folder: Path, values: list[str], **options: Any) -> Session:
        asked.append(len(values))
        return parts.tapped_session(graph, folder, values, **options)

    monkeypatch.setattr(diagnose, "AT_ONCE", 10)
    monkeypatch.setattr(diagnose, "tapped_session", counted)
    assert check_parity(model, edit(no_bias)).figures["layer"] == "blocks.1.mlp.fc1"
    assert max(asked) == 10
    assert len(asked) > 5


def test_clean_export_has_no_diagnosis(model: nn.Module, exported: Path) -> None:
    assert not {"diagnosis", "layer", "failing"} & set(check_parity(model, exported).figures)


def test_traced_values_are_the_models_own_and_it_is_left_as_it_was(model: nn.Module) -> None:
    truth = truth_of(model)
    before = {k: v.clone() for k, v in truth.state_dict().items()}
    trace = traced(truth, noise_images(preprocessing(model), 2, 0))
    assert trace.seen[0] == Seen("", "input", 0)
    assert (trace.seen[-1].layer, trace.seen[-1].side) == ("", "output")
    block = next(s for s in trace.seen if s.layer == "blocks.0.attn" and s.side == "output")
    assert trace.values[block.value].shape == (2, 5, 64)
    assert any(s.layer == "blocks.0.attn.attn_drop" and trace.values[s.value].shape == (2, 2, 5, 5) for s in trace.seen)
    assert all((v == before[k]).all() for k, v in truth.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in truth.modules())


def test_nearest_value_of_the_same_shape_is_taken_across_parts() -> None:
    value = np.arange(12, dtype=np.float32).reshape(3, 4)
    near, far = value + np.float32(0.01), value[::-1].copy()
    parts_of_a_graph = [{"far": far, "flat": value.reshape(4, 3)}, {"near": near, "counts": value.astype(np.int64)}]
    (error,) = nearest([value], parts_of_a_graph)
    assert error == pytest.approx(0.01 / value.std(), rel=1e-3)
    assert nearest([value], parts_of_a_graph[::-1]) == [error]
    assert nearest([value], [{"flat": value.reshape(4, 3)}]) == [None]
    assert nearest([np.zeros((3, 4), np.float32)], parts_of_a_graph) == [None]
    assert nearest([value], [{"broken": np.full((3, 4), np.nan, np.float32)}]) == [float("inf")]


def trace_of(*seen: tuple[str, str]) -> Traced:
    return Traced(tuple(Seen(layer, side, place) for place, (layer, side) in enumerate(seen)), ())


def test_value_without_a_counterpart_is_not_blamed_when_what_is_around_it_is_right() -> None:
    trace = trace_of(
        ("a.q", "output"), ("a", "output"), ("b.fc", "input"), ("b.fc", "output"), ("b", "output"), ("", "output")
    )
    found = first_wrong(trace, [1.4, 1e-7, 1e-7, 0.2, 0.1, 0.1], [1e-5] * 6)
    assert found is not None
    assert found.where == Seen("b.fc", "output", 3)
    assert found.before == Seen("b.fc", "input", 2)
    assert first_wrong(trace, [1.4, 1e-7, 1e-7, 0.2, 1e-7, 1e-7], [1e-5] * 6) is None
    at_the_end = first_wrong(trace, [None, 1e-7, None, None, None, 0.1], [1e-5] * 6)
    assert at_the_end is not None
    assert at_the_end.where == Seen("", "output", 5)
