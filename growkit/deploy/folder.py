"""The folder that `growkit export` writes: the file, its data sets, and what was checked.

model.onnx  test_data_set_0/  test_data_set_1/  export.json
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from growkit.deploy.data_sets import write_data_sets
from growkit.deploy.export import Export, export_onnx
from growkit.deploy.fastest import Choice, fastest
from growkit.deploy.parity import Material, Parity, check_parity
from growkit.deploy.settings import ExportSettings, VerifySettings
from growkit.deploy.truth import at_image_size, preprocessing
from growkit.files import plain, write_json

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
    calibration: np.ndarray | None = None,
    data: Iterable[tuple[Tensor, Tensor]] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Export `model` into `folder`, which exists (see files.whole_folder), and check the result.

    The finished file is what is checked; the caller decides by `Exported.parity` whether the folder may stay.

    calibration  normalised images (N, C, H, W) for int8-static, and to find what overflows in fp16
    data         labelled batches for the accuracy of files that are not float32

    Raises:
        GrowkitError: as export_onnx.
    """
    form = settings.form()
    model, provenance = at_image_size(model, form.image_size), dict(provenance or {})
    options: dict[str, Any] = {
        "external": settings.external_data,
        "calibration": calibration,
        "labels": labels,
        "provenance": provenance,
    }
    choices: tuple[Choice, ...] = ()
    say("exporting")
    if settings.for_ is None:
        export = export_onnx(model, folder / MODEL, form, **options)
    else:
        export, choices = fastest(
            model,
            folder / MODEL,
            form,
            settings.for_,
            max_batch=settings.max_batch,
            seconds=settings.latency_seconds,
            seed=settings.seed,
            say=say,
            **options,
        )
    say("comparing the file with PyTorch")
    lower = form.precision != "fp32"
    write_data_sets(model, folder, seed=settings.seed, form=form, file=folder / MODEL if lower else None)
    parity = check_parity(
        model,
        folder / MODEL,
        VerifySettings(max_batch=settings.max_batch, seed=settings.seed, max_accuracy_drop=settings.max_accuracy_drop),
        Material(weights_sha256=provenance.get("weights_sha256"), labels=labels, data_sets=folder, data=data),
    )
    content = {
        "schema": 1,
        "file": MODEL,
        **{name: value for name, value in asdict(export).items() if name != "path"},
        "preprocessing": asdict(preprocessing(model)),
        "labels": list(labels) if labels is not None else None,
        "provenance": provenance,
        "settings": asdict(settings),
        "choices": [asdict(choice) for choice in choices],
        "parity": {
            "provider": parity.provider,
            "figures": parity.figures,
            "checks": [asdict(c) for c in parity.checks],
        },
    }
    write_json(folder / "export.json", content)
    return Exported(export, parity, plain(content))
