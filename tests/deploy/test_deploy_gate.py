"""The gate tested by mutation: no to every seeded fault, in the groups that must see it; yes to clean files."""

import shutil
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from clean import ARCHITECTURES, CLEAN, KIN
from deploy_models import make_model
from faults import BASES, FAULTS, LABELS, LAYERS, SHA256
from torch import nn

from growkit.deploy.data_sets import write_data_sets
from growkit.deploy.export import export_onnx
from growkit.deploy.form import PRECISIONS
from growkit.deploy.parity import Material, Parity, check_parity
from growkit.deploy.settings import VerifySettings
from growkit.deploy.truth import noise_images, preprocessing
from growkit.errors import GrowkitError


@cache
def model_of(base: str) -> nn.Module:
    return make_model(**dict(BASES[base].model))


def calibration(model: nn.Module) -> np.ndarray:
    """Images that the gate does not try."""
    return noise_images(preprocessing(model), 32, 99)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory):
    """The clean file of a base."""
    folder = tmp_path_factory.mktemp("clean")

    @cache
    def made(base: str) -> Path:
        path = folder / base / "model.onnx"
        export_onnx(
            model_of(base),
            path,
            BASES[base].form,
            external=BASES[base].external,
            calibration=calibration(model_of(base)) if BASES[base].form.precision == "int8-static" else None,
            labels=LABELS,
            provenance={"weights_sha256": SHA256},
        )
        return path

    return made


def verdict(base: str, path: Path) -> tuple[set[str], Parity | str]:
    """The groups that say no, predictions aside."""
    try:
        parity = check_parity(model_of(base), path, material=Material(weights_sha256=SHA256, labels=LABELS))
    except GrowkitError as error:
        return {"refused"}, str(error)
    return {c.group for c in parity.failed} - {"predictions"}, parity


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize("base", BASES)
def test_clean_base_passes(base: str, clean) -> None:
    says_no, parity = verdict(base, clean(base))
    assert not says_no, parity


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found_by_the_groups_that_must_see_it(name: str, clean, tmp_path: Path) -> None:
    fault = FAULTS[name]
    folder = tmp_path / "export"
    shutil.copytree(clean(fault.base).parent, folder)
    path, before = folder / "model.onnx", content(folder)
    if fault.proto is not None:
        proto = onnx.load(str(path), load_external_data=True)
        fault.proto(proto)
        path.write_bytes(proto.SerializeToString())
    if fault.files is not None:
        fault.files(path)
    assert content(folder) != before, "the fault changes nothing"
    says_no, parity = verdict(fault.base, path)
    lines = parity if isinstance(parity, str) else "\n".join(c.line for c in parity.failed)
    assert says_no == fault.says_no, lines
    if name in LAYERS:
        assert isinstance(parity, Parity)
        assert parity.figures["layer"] == LAYERS[name], parity.figures["diagnosis"]


@pytest.mark.parametrize(("base", "wanted"), [("int8", "fp32"), ("int8", "fp16"), ("bf16", "fp16"), ("plain", "int8")])
def test_file_of_another_precision_than_was_asked_for_is_said_so(base: str, wanted: str, clean) -> None:
    failed = check_parity(model_of(base), clean(base), VerifySettings(precision=wanted)).failed
    assert [(c.group, c.name, c.measured, c.limit) for c in failed] == [
        ("structure", "precision", BASES[base].form.precision, wanted)
    ]


def test_every_group_alone_catches_some_fault() -> None:
    alone = Counter(next(iter(f.says_no)) for f in FAULTS.values() if len(f.says_no) == 1)
    assert {"structure", "weights", "numbers", "pixels", "answers"} <= set(alone), alone
    assert set(LAYERS) <= set(FAULTS)
    assert len(FAULTS) >= 40
    assert {BASES[fault.base].form.precision for fault in FAULTS.values()} == set(PRECISIONS)


# clean exports ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [name if one.fast else pytest.param(name, marks=pytest.mark.exhaustive) for name, one in CLEAN.items()]
)
def test_clean_export_passes_every_check(name: str, tmp_path: Path) -> None:
    one = CLEAN[name]
    model = make_model(one.seed, **(ARCHITECTURES | KIN)[one.architecture])
    images = calibration(model) if one.form.precision == "int8-static" else None
    export_onnx(model, tmp_path / "model.onnx", one.form, external=one.external, calibration=images)
    write_data_sets(model, tmp_path, seed=one.seed, form=one.form)
    settings, material = VerifySettings(seed=one.seed), Material(data_sets=tmp_path)
    parity = check_parity(model, tmp_path / "model.onnx", settings, material)
    assert parity.passed, "\n".join(c.line for c in parity.failed)


def test_clean_exports_are_many_and_different() -> None:
    assert len(CLEAN) >= 50
    assert len({(one.architecture, one.form, one.external) for one in CLEAN.values()}) == len(CLEAN)
    assert {one.architecture for one in CLEAN.values()} == {*ARCHITECTURES, *KIN}
    assert {one.form.precision for one in CLEAN.values()} == set(PRECISIONS)


@pytest.mark.parametrize(
    "seed",
    [pytest.param(seed, marks=pytest.mark.slow if seed < 4 else pytest.mark.exhaustive) for seed in range(1, 21)],
)
@pytest.mark.parametrize("base", ["plain", "standard", "contrib", "pixels", "fp16", "int8"])
def test_other_images_raise_no_false_alarm(base: str, seed: int, clean) -> None:
    parity = check_parity(model_of(base), clean(base), VerifySettings(seed=seed))
    assert parity.passed, "\n".join(c.line for c in parity.failed)
