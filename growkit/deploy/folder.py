"""The folder that `growkit export` writes: the file, its reference data, and what was checked.

model.onnx  test_data_set_0/  test_data_set_1/  export.json
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from growkit.deploy.checks import plain
from growkit.deploy.export import Export, export_onnx
from growkit.deploy.parity import Parity, check_parity
from growkit.deploy.reference import preprocessing, write_reference
from growkit.deploy.settings import ExportSettings
from growkit.files import write_json

MODEL = "model.onnx"


@dataclass(frozen=True)
class Exported:
    """A written folder; `content` is what export.json holds."""

    export: Export
    parity: Parity
    content: dict[str, Any]


def write_export(
    model: nn.Module,
    folder: Path,
    settings: ExportSettings,
    *,
    labels: Sequence[str] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Exported:
    """Export `model` into `folder`, which exists (see files.whole_folder), and check the result.

    The checks are made of the finished bytes; whether the folder may stay is the caller's to say,
    by `Exported.parity`.

    Raises:
        GrowkitError: as export_onnx.
    """
    prepared, provenance = preprocessing(model), dict(provenance or {})
    export = export_onnx(
        model,
        torch.zeros(2, *prepared.input_size),
        folder / MODEL,
        labels=labels,
        provenance=provenance,
    )
    write_reference(model, folder, seed=settings.seed)
    parity = check_parity(
        model,
        folder / MODEL,
        max_batch=settings.max_batch,
        seed=settings.seed,
        weights_sha256=provenance.get("weights_sha256"),
        labels=list(labels) if labels is not None else None,
        reference=folder,
    )
    content: dict[str, Any] = {
        "schema": 1,
        "file": MODEL,
        **{name: value for name, value in asdict(export).items() if name != "path"},
        "preprocessing": asdict(prepared),
        "labels": list(labels) if labels is not None else None,
        "provenance": provenance,
        "settings": asdict(settings),
        "parity": {
            "provider": parity.provider,
            "figures": parity.figures,
            "checks": [asdict(c) for c in parity.checks],
        },
    }
    content = plain(content)
    write_json(folder / "export.json", content)
    return Exported(export, parity, content)
