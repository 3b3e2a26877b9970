"""A session says where it runs, and refuses to run elsewhere in silence."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

from growkit.deploy.runtime import environment, open_session
from growkit.errors import GrowkitError

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")


def test_cpu_session_runs_with_torchs_threads(exported: Path) -> None:
    session = open_session(exported)
    assert (session.provider, session.threads) == ("cpu", torch.get_num_threads())
    assert session.run(np.zeros((2, 3, 16, 16), np.float32)).shape == (2, 7)


def test_spinning_threads_and_optimisation_are_what_was_asked_for(exported: Path) -> None:
    options = open_session(exported, threads=2).inner.get_session_options()
    assert options.intra_op_num_threads == 2
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options = open_session(exported, optimise=False, spinning=True).inner.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "1"
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL


@no_cuda
def test_cuda_that_does_not_run_is_one_line_with_a_remedy(exported: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(GrowkitError, match="provider cuda does not run here") as caught:
        open_session(exported, provider="cuda")
    assert "--provider cpu" in str(caught.value)
    assert "\n" not in str(caught.value)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


@no_cuda
def test_auto_falls_back_and_says_so(exported: Path) -> None:
    assert open_session(exported, provider="auto").provider == "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "auto"])
def test_cuda_is_used_where_it_runs(provider: str, exported: Path) -> None:
    assert open_session(exported, provider=provider).provider == "cuda"


def test_unknown_provider_names_the_choices(exported: Path) -> None:
    with pytest.raises(GrowkitError, match="choose cpu, cuda or auto"):
        open_session(exported, provider="tpu")


def test_environment_names_versions_hardware_and_session(exported: Path) -> None:
    facts = environment(open_session(exported, threads=1))
    assert {"torch", "onnx", "numpy"} <= set(facts["versions"])
    assert facts["provider"] == "cpu"
    assert facts["threads"] == 1
    assert "cpu" in facts["hardware"]
