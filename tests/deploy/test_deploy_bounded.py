"""The memory that a graph may take."""

import resource
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from growkit.deploy import bounded
from growkit.deploy.bounded import COPIES, bound_of, memory_bounded

GIB = 2**30


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
    monkeypatch.setattr(bounded, "FLOOR", GIB // 4)
    session = asking(tmp_path / "a.onnx")
    bound = bound_of([tmp_path / "a.onnx"])
    with memory_bounded(bound):
        assert session.run(None, {"count": np.array([2**20])})[0].size == 2**20
    with memory_bounded(bound), pytest.raises(Exception, match="alloc"):
        session.run(None, {"count": np.array([GIB])})
    with memory_bounded(bound, input_bytes=2**23):  # images that size may take
        assert session.run(None, {"count": np.array([GIB])})[0].size == GIB


@pytest.mark.parametrize("raises", [False, True])
def test_limit_is_put_back(raises: bool) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    bound = bound_of([])
    try:
        with memory_bounded(bound):
            with memory_bounded(bound, input_bytes=10**9):  # never looser than around it
                assert resource.getrlimit(resource.RLIMIT_AS)[0] == bound
            if raises:
                raise KeyError
    except KeyError:
        pass
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_bound_grows_with_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "_own", lambda: 0)
    for name, size in (("graph", 10), ("weights", 1000)):
        (tmp_path / name).write_bytes(bytes(size))
    assert bound_of([tmp_path / "graph", tmp_path / "weights"]) == bounded.FLOOR + COPIES * 1010
