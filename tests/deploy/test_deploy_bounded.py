"""The memory that a graph may take."""

import resource
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from growkit.deploy import bounded, parity, subject, verify
from growkit.deploy.bounded import COPIES, bound_of, memory_bounded
from growkit.deploy.settings import VerifySettings

LARGE = 2**28


def asking(path: Path) -> onnxruntime.InferenceSession:
    """An open file whose graph makes as many bytes as it is told to."""
    node = helper.make_node("Tile", ["one", "count"], ["answer"])
    stored = [numpy_helper.from_array(np.ones(1, np.uint8), "one")]
    given = helper.make_tensor_value_info("count", TensorProto.INT64, [1])
    answer = helper.make_tensor_value_info("answer", TensorProto.UINT8, [None])
    graph = helper.make_graph([node], "g", [given], [answer], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(path))
    return onnxruntime.InferenceSession(str(path))


def test_graph_that_asks_for_more_fails_and_one_that_does_not_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded, "FLOOR", LARGE // 4)
    session = asking(tmp_path / "a.onnx")
    bound = bound_of([tmp_path / "a.onnx"])
    with memory_bounded(bound, provider="cpu"):
        assert session.run(None, {"count": np.array([2**20])})[0].size == 2**20
    with memory_bounded(bound, provider="cpu"), pytest.raises(Exception, match="alloc"):
        session.run(None, {"count": np.array([LARGE])})
    with memory_bounded(bound, 2**21, provider="cpu"):  # images that size may take
        assert session.run(None, {"count": np.array([LARGE])})[0].size == LARGE


@pytest.mark.parametrize("raises", [False, True])
def test_limit_is_put_back(raises: bool) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    bound = bound_of([])
    try:
        with memory_bounded(bound, provider="cpu"):
            with memory_bounded(bound, 10**9, provider="cpu"):  # never looser than around it
                assert resource.getrlimit(resource.RLIMIT_AS)[0] == bound
            if raises:
                raise KeyError
    except KeyError:
        pass
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.parametrize(
    ("provider", "gpu", "holds"),
    [
        ("cpu", True, True),
        ("cuda", True, False),
        ("auto", True, False),
        ("auto", False, True),
        ("tensorrt", True, False),
    ],
)
def test_there_is_none_where_cuda_may_start(
    provider: str, gpu: bool, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes address space by the terabyte, and fails where that is not to be had."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    before, bound = resource.getrlimit(resource.RLIMIT_AS), bound_of([])
    with memory_bounded(bound, provider=provider):
        assert resource.getrlimit(resource.RLIMIT_AS) == ((bound, before[1]) if holds else before)


@pytest.mark.parametrize("provider", ["cpu", "auto"])
def test_whoever_opens_a_file_says_where_it_runs(
    provider: str, model: nn.Module, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told: list[tuple[str, str]] = []
    for module in (subject, parity, verify):
        name = module.__name__.rpartition(".")[2]

        def noting(*given: int, provider: str, name: str = name) -> AbstractContextManager[None]:
            told.append((name, provider))
            return memory_bounded(*given, provider=provider)

        monkeypatch.setattr(module, "memory_bounded", noting)
    subject.onnx_subject(exported, provider=provider).run(np.zeros((1, 3, 16, 16), np.float32))
    assert told == [("subject", provider), ("subject", "cpu")]  # where it runs by then
    told.clear()
    settings, stock = VerifySettings(provider=provider, latency=False, max_batch=1), ("vit_tiny_patch16_224", {})
    assert verify.verify_onnx(model, exported, settings, parity.Material(), stock=stock).parity is not None
    assert told == [("verify", provider), ("parity", provider)]


def test_bound_grows_with_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "_own", lambda: 0)
    for name, size in (("graph", 10), ("weights", 1000)):
        (tmp_path / name).write_bytes(bytes(size))
    assert bound_of([tmp_path / "graph", tmp_path / "weights"]) == bounded.FLOOR + COPIES * 1010
