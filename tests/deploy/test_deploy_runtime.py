"""A session says where it runs, and refuses to run elsewhere in silence."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from growkit.deploy import libraries, runtime
from growkit.deploy.export import export_onnx
from growkit.deploy.form import Form
from growkit.deploy.parity import check_parity
from growkit.deploy.parts import core_session
from growkit.deploy.runtime import assignment, environment, open_session
from growkit.deploy.settings import VerifySettings
from growkit.deploy.truth import noise_images, preprocessing
from growkit.errors import GrowkitError

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")


def test_cpu_session_runs_with_torchs_threads(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    session = open_session(exported)
    assert (session.provider, session.threads) == ("cpu", 3)
    assert session.inner.get_session_options().intra_op_num_threads == 3
    assert session.run(np.zeros((2, 3, 16, 16), np.float32)).shape == (2, 7)


def test_spinning_threads_and_optimisation_are_what_was_asked_for(exported: Path) -> None:
    options = open_session(exported).inner.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options = open_session(exported, optimise=False, spinning=True).inner.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "1"
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL


@no_cuda
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_provider_that_does_not_run_is_one_line_with_a_remedy(
    provider: str, exported: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(GrowkitError, match=f"provider {provider} does not run here") as caught:
        open_session(exported, provider=provider)
    assert "or use cpu" in str(caught.value)
    assert "\n" not in str(caught.value)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


@no_cuda
def test_auto_falls_back_and_says_so(exported: Path) -> None:
    session = open_session(exported, provider="auto")
    assert session.provider == "cpu"
    assert session.note.startswith("provider auto: the CPU; provider cuda does not run here: ")
    assert "--provider" not in session.note
    assert open_session(exported).note == ""  # nothing was left to choose


@no_cuda
@pytest.mark.parametrize("form", [Form(precision="bf16"), Form(precision="bf16", pixels=True)], ids=["plain", "pixels"])
def test_auto_emulates_bfloat16_where_cuda_does_not_run_which_is_not_the_files_fault(
    form: Form, model: nn.Module, tmp_path: Path
) -> None:
    file, prepared = tmp_path / "model.onnx", preprocessing(model)
    export_onnx(model, file, form)
    images = noise_images(prepared, 2, 0)
    emulated, found = (core_session(file, form, prepared, provider=provider) for provider in ("cpu", "auto"))
    assert np.array_equal(found.run(images), emulated.run(images))
    assert found.note.startswith("provider auto: the CPU; provider cuda does not run here: ")
    assert check_parity(model, file, VerifySettings(provider="auto")).passed
    with pytest.raises(GrowkitError, match="provider cuda does not run here"):
        open_session(file, provider="cuda")


@pytest.mark.skipif(not sys.platform.startswith("linux") or torch.cuda.is_available(), reason="names Linux's libraries")
@pytest.mark.skipif(Path("/usr/lib/x86_64-linux-gnu/libcuda.so.1").exists(), reason="an NVIDIA driver is here")
@pytest.mark.skipif("CUDAExecutionProvider" not in ort.get_available_providers(), reason="ONNX Runtime without CUDA")
def test_missing_driver_is_named(exported: Path) -> None:
    with pytest.raises(GrowkitError, match=r"libcuda\.so\.1 is missing: install an NVIDIA driver; or use"):
        open_session(exported, provider="cuda")


class FakeRuntime:
    """ONNX Runtime's session where a GPU provider is asked for: it raises `error`, or falls back in silence."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: str = "", printed: str = ""):
        self.real, self.error, self.printed = ort.InferenceSession, error, printed
        monkeypatch.setattr(runtime.ort, "get_available_providers", lambda: list(runtime.PROVIDERS.values()))
        monkeypatch.setattr(runtime.ort, "InferenceSession", self.open)
        monkeypatch.setattr(libraries, "load", lambda provider: None)
        monkeypatch.setattr(libraries, "missing", lambda provider: ())

    def open(self, source: Any, options: Any, *, providers: list[str], **more: Any) -> Any:
        if providers != ["CPUExecutionProvider"]:
            print(self.printed)
            if self.error:
                raise RuntimeError(self.error)
        return self.real(source, options, providers=["CPUExecutionProvider"])


FAILURE = (
    "cuda_call.cc:146 CudaCall(...) CUDA failure 100: no CUDA-capable device is detected ; GPU=-1 ; hostname=secret"
)


@pytest.mark.parametrize("way", ["error", "printed"])
def test_device_that_cuda_does_not_find_is_told_in_its_words(
    way: str, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeRuntime(monkeypatch, **{way: FAILURE})
    with pytest.raises(GrowkitError) as caught:
        open_session(exported, provider="cuda")
    assert "here: CUDA failure 100: no CUDA-capable device is detected: check that nvidia-smi" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_damaged_file_is_not_blamed_on_the_provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeRuntime(monkeypatch, error=FAILURE)
    with pytest.raises(Exception, match="INVALID_PROTOBUF"):
        open_session(b"junk", provider="cuda")


def test_provider_that_the_wheel_lacks_is_said(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(GrowkitError, match="built without it"):
        open_session(exported, provider="cuda")


def test_every_node_has_a_provider(exported: Path) -> None:
    placed = assignment(open_session(exported, optimise=False))
    nodes = [node for node in onnx.load(str(exported)).graph.node if node.op_type != "Constant"]
    assert placed.nodes == {"cpu": len(nodes)}
    assert placed.fallen_back == ()  # the CPU was asked for
    assert placed.line == f"{len(nodes)} of {len(nodes)} nodes run on cpu"


class Part:
    def __init__(self, ep_name: str, *ops: str):
        self.ep_name = ep_name
        self.ops = ops

    def get_nodes(self) -> list[Any]:
        return [SimpleNamespace(op_type=op, name=f"node_{op}") for op in self.ops]


def test_nodes_that_fell_back_are_named_with_their_operators() -> None:
    parts = [
        Part("TensorrtExecutionProvider", "MatMul", "Add", "MatMul"),
        Part("CUDAExecutionProvider", "Gelu"),
        Part("CPUExecutionProvider", "Shape"),
        Part("CPUExecutionProvider", "Shape", "Gather"),
    ]
    inner = SimpleNamespace(get_provider_graph_assignment_info=lambda: parts)
    placed = assignment(runtime.Session(inner, "input", "tensorrt", 1))
    assert placed.nodes == {"tensorrt": 3, "cuda": 1, "cpu": 3}
    assert [node.name for node in placed.fallen_back] == ["node_Shape", "node_Shape", "node_Gather"]
    assert placed.line == "3 of 7 nodes run on tensorrt; on the CPU: 2 Shape, 1 Gather"


def test_run_that_fails_is_not_repeated_on_the_cpu_in_silence(exported: Path) -> None:
    assert open_session(exported).inner._enable_fallback is False


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "auto"])
def test_cuda_is_used_where_it_runs(provider: str, exported: Path) -> None:
    assert open_session(exported, provider=provider).provider == "cuda"


def test_unknown_provider_names_the_choices(exported: Path) -> None:
    with pytest.raises(GrowkitError, match="choose cpu, cuda, tensorrt or auto"):
        open_session(exported, provider="tpu")


def test_environment_names_versions_hardware_and_session(exported: Path) -> None:
    facts = environment(open_session(exported))
    assert {"torch", "onnx", "numpy"} <= set(facts["versions"])
    assert facts["provider"] == "cpu"
    assert facts["threads"] == torch.get_num_threads()
    assert "cpu" in facts["hardware"]
