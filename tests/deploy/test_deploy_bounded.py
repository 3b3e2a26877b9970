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
    bound = bound_of(tmp_path / "a.onnx")
    with memory_bounded(bound):
        assert session.run(None, {"count": np.array([2**20])})[0].size == 2**20
    with memory_bounded(bound), pytest.raises(Exception, match="alloc"):
        session.run(None, {"count": np.array([GIB])})
    with memory_bounded(bound, input_bytes=2**23):  # images that size may take
        assert session.run(None, {"count": np.array([GIB])})[0].size == GIB


@pytest.mark.parametrize("raises", [False, True])
def test_limit_is_put_back(raises: bool, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    bound = bound_of(tmp_path / "absent.onnx")
    try:
        with memory_bounded(bound):
            with memory_bounded(bound, input_bytes=10**9):  # never looser than around it
                assert resource.getrlimit(resource.RLIMIT_AS)[0] == bound
            if raises:
                raise KeyError
    except KeyError:
        pass
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_bound_counts_the_weights_beside_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "_own", lambda: 0)
    tensor = numpy_helper.from_array(np.ones(1000, np.float32), "weights")
    answer = helper.make_tensor_value_info("weights", TensorProto.FLOAT, [1000])
    proto = helper.make_model(helper.make_graph([], "g", [], [answer], [tensor]))
    file, beside = tmp_path / "a.onnx", tmp_path / "a.onnx.data"
    onnx.save(proto, str(file), save_as_external_data=True, location=beside.name, size_threshold=0)
    assert bound_of(file) == bounded.FLOOR + COPIES * (file.stat().st_size + 4000)
    file.write_bytes(b"no graph")
    assert bound_of(file) == bound_of(tmp_path / "absent.onnx") == bounded.FLOOR
