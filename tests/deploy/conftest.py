"""A tiny vision transformer with every parameter random, and its export."""

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from deploy_models import make_model
from torch import nn

from growkit.deploy.export import export_onnx


@pytest.fixture(scope="session")
def model() -> nn.Module:
    return make_model()


@pytest.fixture(scope="session")
def exported(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clean export of `model`; not to be changed."""
    path = tmp_path_factory.mktemp("clean") / "model.onnx"
    export_onnx(
        model,
        path,
        labels=list("abcdefg"),
        provenance={"weights_sha256": "ab" * 32},
    )
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
