"""A tiny vision transformer with every parameter random, and its export."""

import contextlib
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from deploy_models import make_model
from torch import nn

from growkit.deploy.export import export_onnx


class _Content(pickle.Pickler):
    """Of tensors the values, of all else what pickle writes."""

    fast = True  # equal parts give equal bytes, the same one or not

    def persistent_id(self, part: Any) -> Any:
        return (part.dtype, part.shape, part.numpy(force=True).tobytes()) if isinstance(part, torch.Tensor) else None


@contextlib.contextmanager
def _once(programs: dict[bytes, Any]) -> Iterator[None]:
    export = torch.onnx.export

    def once(*given: Any, **options: Any) -> Any:
        if not options["dynamo"]:  # fast, and writes a file
            return export(*given, **options)
        _Content(content := io.BytesIO()).dump((given, options))
        if (key := content.getvalue()) not in programs:
            programs[key] = export(*given, **options)
        return programs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", once)
        yield


@pytest.fixture(scope="session")
def programs() -> dict[bytes, Any]:
    """What torch.onnx.export made, by the content of what it was given."""
    return {}


@pytest.fixture(scope="module", autouse=True)
def exporting_once(programs: dict[bytes, Any]) -> Iterator[None]:
    """Let torch.onnx.export, which takes a second or two, run once for the same network and options."""
    with _once(programs):
        yield


@pytest.fixture(scope="session")
def model() -> nn.Module:
    return make_model()


@pytest.fixture(scope="session")
def exported(model: nn.Module, programs: dict[bytes, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clean export of `model`; not to be changed."""
    path = tmp_path_factory.mktemp("clean") / "model.onnx"
    with _once(programs):
        export_onnx(model, path, labels=list("abcdefg"), provenance={"weights_sha256": "ab" * 32})
    return path


@pytest.fixture
def edit(exported: Path, tmp_path: Path) -> Callable[[Callable[[onnx.ModelProto], None]], Path]:
    """Write a copy of the clean export that a function has changed."""

    def edited(change: Callable[[onnx.ModelProto], None]) -> Path:
        proto = onnx.load(str(exported))
        change(proto)
        path = tmp_path / "edited.onnx"
        path.write_bytes(proto.SerializeToString())
        return path

    return edited
