"""The memory that a graph may take."""

import resource
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from growkit.deploy.bounded import FLOOR, bytes_of, memory_bounded


def asking_for(count: int, path: Path) -> Path:
    """A file whose graph makes so many numbers of one byte."""
    node = helper.make_node("Tile", ["one", "count"], ["answer"])
    stored = [numpy_helper.from_array(np.ones(1, np.uint8), "one")]
    given = helper.make_tensor_value_info("count", TensorProto.INT64, [1])
    answer = helper.make_tensor_value_info("answer", TensorProto.UINT8, [None])
    graph = helper.make_graph([node], "g", [given], [answer], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(path))
    return path


def test_graph_that_asks_for_more_fails_and_one_that_does_not_runs(tmp_path: Path) -> None:
    file = asking_for(1, tmp_path / "a.onnx")
    session = onnxruntime.InferenceSession(str(file))
    count = np.array([FLOOR - 2**20])  # Tile itself refuses 4 GiB
    with memory_bounded(file.stat().st_size), pytest.raises(Exception, match="alloc"):
        session.run(None, {"count": count})
    with memory_bounded(file.stat().st_size):
        assert session.run(None, {"count": np.array([2**20])})[0].size == 2**20


@pytest.mark.parametrize("raises", [False, True])
def test_limit_is_put_back(raises: bool) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    try:
        with memory_bounded(0):
            inside, _ = resource.getrlimit(resource.RLIMIT_AS)
            with memory_bounded(0, input_bytes=10**9):  # never looser than around it
                assert resource.getrlimit(resource.RLIMIT_AS)[0] == inside
            if raises:
                raise KeyError
    except KeyError:
        pass
    assert inside != before[0]
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_bytes_of_a_file_are_those_of_its_weights_too(tmp_path: Path) -> None:
    tensor = numpy_helper.from_array(np.ones(1000, np.float32), "weights")
    answer = helper.make_tensor_value_info("weights", TensorProto.FLOAT, [1000])
    proto = helper.make_model(helper.make_graph([], "g", [], [answer], [tensor]))
    file, beside = tmp_path / "a.onnx", tmp_path / "a.onnx.data"
    onnx.save(proto, str(file), save_as_external_data=True, location=beside.name, size_threshold=0)
    assert bytes_of(file) == file.stat().st_size + beside.stat().st_size > 4000
    file.write_bytes(b"no graph")
    assert bytes_of(file) == bytes_of(tmp_path / "absent.onnx") == 0
