"""Every seeded defect turns the check red, and a clean export is green."""

import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from deploy_models import ARGUMENTS, NAME, make_model, replace, tensors
from faults import folded_batch, prepares, trigger, version, zeroed
from PIL import Image
from torch import nn

from growkit.deploy import parity as parity_module
from growkit.deploy.accuracy import accuracy_checks
from growkit.deploy.data_sets import write_data_sets
from growkit.deploy.export import export_onnx
from growkit.deploy.form import Form
from growkit.deploy.limits import LIMITS
from growkit.deploy.numbers import Truth, by_chance, cosines, in_batches, number_checks, predictions
from growkit.deploy.parity import Material, check_parity
from growkit.deploy.settings import VerifySettings
from growkit.deploy.truth import noise_images, preprocessing
from growkit.errors import GrowkitError

Change = Callable[[onnx.ModelProto], None]
Edit = Callable[[Change], Path]


def failed_groups(parity: parity_module.Parity) -> set[str]:
    return {c.group for c in parity.failed}


def lines(parity: parity_module.Parity) -> str:
    return "\n".join(c.line for c in parity.failed)


# clean ------------------------------------------------------------------------------------------


def test_clean_export_passes_every_check(model: nn.Module, exported: Path) -> None:
    material = Material(weights_sha256="ab" * 32, labels=list("abcdefg"))
    parity = check_parity(model, exported, material=material)
    assert parity.passed, lines(parity)
    assert {c.group for c in parity.checks} == {"structure", "weights", "numbers", "predictions"}
    assert set(parity.figures["batches"]) == {"1", "2", "3", "5", "8"}
    assert set(parity.figures["extremes"]) == {"black", "white", "pure noise", "checkerboard", "ten times too large"}
    assert parity.figures["noise_ratio"] < 3
    assert parity.figures["predictions"]["certified"] > 0


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_fresh_timm_model_passes_though_its_zero_biases_are_left_out(precision: str, tmp_path: Path) -> None:
    model = timm.create_model(NAME, **ARGUMENTS).eval()
    export_onnx(model, tmp_path / "m.onnx", Form(precision=precision))
    parity = check_parity(model, tmp_path / "m.onnx")
    assert parity.passed, lines(parity)


@pytest.mark.slow
def test_swin_with_its_looked_up_position_tables_passes(tmp_path: Path) -> None:
    arguments = {
        "img_size": 32,
        "patch_size": 2,
        "window_size": 4,
        "embed_dim": 32,
        "depths": (2,),
        "num_heads": (2,),
        "num_classes": 7,
    }
    model = timm.create_model("swin_tiny_patch4_window7_224", **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    export_onnx(model, tmp_path / "m.onnx")
    parity = check_parity(model, tmp_path / "m.onnx")
    assert parity.passed, lines(parity)
    with torch.no_grad():
        model.layers[0].blocks[0].attn.relative_position_bias_table[3, 0] *= 1.01
    damaged = check_parity(model, tmp_path / "m.onnx")
    assert "relative_position_bias_table" in lines(damaged)


# what the gate says of a fault (all of them: test_deploy_gate.py) --------------------------------


@pytest.mark.parametrize("index", range(4))
def test_a_single_bit_in_any_kind_of_tensor_is_found(index: int, model: nn.Module, edit: Edit) -> None:
    shape = [(64, 192), (1, 1, 64), (64, 3, 8, 8), (7, 64)][index]

    def flip(proto: onnx.ModelProto) -> None:
        name = next(n for n, v in tensors(proto).items() if v.shape == shape)
        value = tensors(proto)[name].copy()
        value.view(np.int32).reshape(-1)[11] ^= 1
        replace(proto, name, value)

    parity = check_parity(model, edit(flip))
    assert failed_groups(parity) == {"weights"}
    # both ways: the model's tensor is not in the file, the file's is not the model's
    found = {c.name for c in parity.failed}
    assert "not the model's" in found
    assert len(found) == 2


def test_branch_has_no_place_and_what_it_reads_is_read(model: nn.Module, edit: Edit) -> None:
    (said,) = check_parity(model, edit(trigger)).failed
    assert said.line == "operators that have no place: If, expected none"


@pytest.mark.parametrize("folder", [Path.home, Path.cwd, tempfile.gettempdir, lambda: sys.prefix])
def test_folder_of_the_exporting_machine_is_named(
    folder: Callable[[], object], model: nn.Module, edit: Edit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "there"))
    inside = f"{folder()}/"

    def leaked(proto: onnx.ModelProto) -> None:
        proto.graph.node[0].doc_string = f"{inside}weights"

    (said,) = check_parity(model, edit(leaked)).failed
    assert said.line == f"paths of the exporting machine: {inside}, expected none"


def test_current_folder_may_have_a_name_that_is_no_text(
    model: nn.Module, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert check_parity(model, exported).passed


def test_batch_folded_wrongly_is_right_at_batch_one(model: nn.Module, edit: Edit) -> None:
    parity = check_parity(model, edit(folded_batch))
    assert parity.figures["batches"]["1"]["relative_rms"] < 1e-5 < parity.figures["batches"]["2"]["relative_rms"]
    assert {"batch 2: same as one by one", "batch 5: relative RMS error"} <= {c.name for c in parity.failed}


@pytest.mark.parametrize("content", [b"", b"no ONNX at all", b"\x08\x08"])
def test_file_that_is_no_onnx_is_one_failed_check(content: bytes, model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    parity = check_parity(model, path)
    assert [c.name for c in parity.failed] == ["valid ONNX"]


def test_missing_file_names_the_remedy(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(GrowkitError, match="growkit export"):
        check_parity(model, tmp_path / "none.onnx")


def test_max_batch_zero_is_refused(model: nn.Module, exported: Path) -> None:
    with pytest.raises(GrowkitError, match="--max-batch 0"):
        check_parity(model, exported, VerifySettings(max_batch=0))


def test_file_of_other_weights_or_labels_is_said_so(model: nn.Module, exported: Path) -> None:
    material = Material(weights_sha256="cd" * 32, labels=["a", "b"])
    parity = check_parity(model, exported, material=material)
    assert {c.name for c in parity.failed} == {"exported from this model", "labels"}
    assert "abababababab" in lines(parity)
    assert "export it again" in lines(parity)


def test_no_fault_is_looked_for_in_the_file_of_another_model(exported: Path) -> None:
    own, foreign = (
        check_parity(make_model(1), exported, material=Material(weights_sha256=sha * 32)) for sha in ("ab", "cd")
    )
    assert "numbers" in failed_groups(own) & failed_groups(foreign)
    assert "diagnosis" in own.figures
    assert "diagnosis" not in foreign.figures
    assert "an error in the file" not in lines(foreign)


def test_every_mismatch_is_collected_before_the_verdict(model: nn.Module, edit: Edit) -> None:
    def several(proto: onnx.ModelProto) -> None:
        version(ir=10)(proto)
        prepares(mean=[0.4, 0.4, 0.4])(proto)
        zeroed("blocks.0.attn.qkv.bias")(proto)

    parity = check_parity(model, edit(several))
    assert {"structure", "weights", "numbers"} <= failed_groups(parity)
    said = "; ".join(c.line for c in parity.failed)
    assert re.search(r"IR version.*preprocessing.*blocks\.0\.attn\.qkv\.bias", said)


# reference data and accuracy --------------------------------------------------------------------


def test_reference_data_of_the_model_passes_and_of_another_fails(
    model: nn.Module, exported: Path, tmp_path: Path
) -> None:
    write_data_sets(model, tmp_path / "own", seed=0)
    write_data_sets(make_model(5), tmp_path / "other", seed=0)
    assert check_parity(model, exported, material=Material(data_sets=tmp_path / "own")).passed
    parity = check_parity(model, exported, material=Material(data_sets=tmp_path / "other"))
    assert failed_groups(parity) == {"data sets"}
    assert len(parity.failed) == 4  # two data sets, file and model


def labelled(model: nn.Module, count: int = 60) -> list[tuple[torch.Tensor, torch.Tensor]]:
    images = torch.from_numpy(noise_images(preprocessing(model), count, 9))
    with torch.inference_mode():
        classes = model(images).argmax(1).numpy()
    classes[::4] = (classes[::4] + 1) % 7  # the model is right on three quarters
    given = torch.from_numpy(classes)
    return [(images[i : i + 16], given[i : i + 16]) for i in range(0, count, 16)]


def test_accuracy_of_a_clean_export_equals_the_models(model: nn.Module, exported: Path) -> None:
    parity = check_parity(model, exported, material=Material(data=labelled(model)))
    assert parity.passed, lines(parity)
    accuracy = parity.figures["accuracy"]
    assert accuracy["samples"] == 60
    assert accuracy["top1"] == accuracy["torch_top1"] == 0.75
    assert accuracy["top5"] == accuracy["torch_top5"]
    assert accuracy["n01"] == accuracy["n10"] == 0
    assert accuracy["mcnemar_p"] == 1.0


class Given(nn.Module):
    """A model whose logits are its images."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.one * images.flatten(1)


def with_class_0_at(places: list[int]) -> np.ndarray:
    """Logits of seven classes; class 0 comes at that place, 0 is first."""
    orders = [[*range(1, place + 1), 0, *range(place + 1, 7)] for place in places]
    return -np.argsort(orders, axis=1).astype(np.float32)


def test_accuracy_is_counted_image_by_image() -> None:
    plain = with_class_0_at([0, 0, 0, 0, 0, 0, 1, 4, 5, 6])
    file = with_class_0_at([0, 0, 1, 4, 5, 0, 0, 1, 6, 6])
    images, truth = torch.from_numpy(plain)[:, :, None, None], torch.zeros(10, dtype=torch.int64)
    answers = {plain[place : place + 5].tobytes(): file[place : place + 5] for place in (0, 5)}
    data = [(images[place : place + 5], truth[place : place + 5]) for place in (0, 5)]
    checks, figures = accuracy_checks(lambda batch: answers[batch.tobytes()], Given().eval(), data, LIMITS["fp16"])
    wanted = {"top1": 0.4, "torch_top1": 0.6, "top5": 0.7, "torch_top5": 0.8, "n10": 3, "n01": 1, "mcnemar_p": 10 / 16}
    wanted |= {"drop": 20, "relative_rms": np.sqrt(((file - plain) ** 2).mean()) / 2, "largest_over_std": 5 / 2}
    assert {name: figures[name] for name in wanted} == pytest.approx(wanted)
    assert figures["drop_low"] < 20 < figures["drop_high"]
    assert [c.name for c in checks if c.verdict == "fail"] == ["points of top-1 lost", "relative RMS difference"]
    checks, _ = accuracy_checks(lambda batch: answers[batch.tobytes()], Given().eval(), data, LIMITS["fp32"])
    assert {"relative RMS difference", "largest difference / std"} < {c.name for c in checks if c.verdict == "fail"}


@pytest.mark.parametrize("label", [-1, 7])
def test_labels_that_the_model_has_no_answer_for_are_refused(label: int, model: nn.Module, exported: Path) -> None:
    """Wrong for file and model alike, they would make any loss look small."""
    batches = labelled(model)
    batches[1][1][3] = label
    with pytest.raises(GrowkitError, match=r"labels run from .* but the model has 7 outputs; give the model as"):
        check_parity(model, exported, material=Material(data=batches))


def test_lost_accuracy_is_counted_and_certified_changes_fail(model: nn.Module, edit: Edit) -> None:
    def negated(proto: onnx.ModelProto) -> None:
        replace(proto, "head.weight", -tensors(proto)["head.weight"])
        replace(proto, "head.bias", -tensors(proto)["head.bias"])

    parity = check_parity(model, edit(negated), material=Material(data=labelled(model)))
    accuracy = parity.figures["accuracy"]
    assert "accuracy" in failed_groups(parity)
    assert accuracy["top1"] < accuracy["torch_top1"] == 0.75
    assert accuracy["n10"] > accuracy["n01"]
    assert accuracy["predictions"]["certified_changed"] > 0
    assert "certified predictions changed" in {c.name for c in parity.failed}


@pytest.mark.parametrize("options", [{}, {"precision": "fp16"}, {"output": "top-2"}], ids=["plain", "fp16", "top-2"])
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_classes": 3}, r"shape of logits: \(16, 3\), allowed \(16, 7\)"),
        ({"img_size": 24}, "labelled images: .*(invalid dimensions|broadcast)"),
    ],
    ids=["classes", "size"],
)
def test_file_of_another_size_is_a_no_whatever_it_is_checked_with(
    options: dict[str, str], changed: dict[str, int], said: str, model: nn.Module, tmp_path: Path
) -> None:
    form = Form(exporter="torchscript", **options)
    export_onnx(make_model(5, **changed), tmp_path / "model.onnx", form)
    picture = Image.fromarray(np.zeros((10, 10, 3), np.uint8))
    parity = check_parity(
        model, tmp_path / "model.onnx", material=Material(data=labelled(model), pictures={"picture": picture})
    )
    around = {"answers"} if form.output != "logits" and "img_size" in changed else set()
    assert {"weights", "numbers", "accuracy", "pictures"} | around <= failed_groups(parity)
    (accuracy,) = [c.line for c in parity.failed if c.group == "accuracy"]
    assert re.search(said, accuracy)
    assert "accuracy" not in parity.figures


def test_empty_data_is_refused(model: nn.Module, exported: Path) -> None:
    with pytest.raises(GrowkitError, match="no labelled sample"):
        check_parity(model, exported, material=Material(data=[]))


@pytest.mark.parametrize("values", [1, 2, 7, 30])
def test_noise_of_few_values_is_over_its_limit_once_in_ten_thousand(values: int) -> None:
    drawn = np.random.default_rng(0).normal(size=(500_000, values))
    over = float((np.sqrt((drawn**2).mean(axis=1)) > by_chance(values)).mean())
    assert 2e-5 < over < 2e-4


def test_noise_of_a_precision_is_granted_to_few_values_alone_and_not_where_pytorch_overflows() -> None:
    expected = np.random.default_rng(0).normal(size=(8, 2))
    images, noise = np.arange(8, dtype=np.float32).reshape(8, 1, 1, 1), 4e-3 * expected.std()
    plain = {1: expected + noise, 2: expected[:2] + noise}
    session: Any = SimpleNamespace(run=lambda fed: (expected + 1.5 * noise)[fed.ravel().astype(int)])
    truth = Truth(images, expected, plain, {}, (1, 2))
    verdicts = {c.name: c.verdict for c in number_checks(session, truth, LIMITS["fp16"])[0]}
    assert [verdicts[f"batch {batch}: relative RMS error"] for batch in (1, 2)] == ["fail", "pass"]
    assert "batch 1: smallest cosine" in verdicts  # of two classes; of one it would be a sign
    assert (truth.own(), truth.own(2)) == pytest.approx((4e-3, 4e-3))
    assert Truth(images, expected, {1: np.full((8, 2), np.inf)}, {}, (1,)).own() == 0


@pytest.mark.parametrize(("off", "ratio", "verdict"), [(0.0, 1.0, "pass"), (1e-9, np.inf, "fail")])
def test_where_pytorch_makes_no_error_the_file_may_make_none(off: float, ratio: float, verdict: str) -> None:
    expected, images = np.eye(4), np.arange(4, dtype=np.float32).reshape(4, 1, 1, 1)
    session: Any = SimpleNamespace(run=lambda fed: (expected + off)[fed.ravel().astype(int)])
    checks, figures = number_checks(session, Truth(images, expected, {1: expected}, {}, (1,)), LIMITS["fp32"])
    assert figures["noise_ratio"] == ratio
    assert {c.verdict for c in checks if c.name == "error / PyTorch's own"} == {verdict}


def test_images_are_run_in_whole_batches_and_answered_one_by_one() -> None:
    sizes: list[int] = []
    session: Any = SimpleNamespace(run=lambda fed: sizes.append(len(fed)) or fed)
    images = np.arange(7.0)
    assert np.array_equal(in_batches(session, images, 3), images)
    assert sizes == [3, 3, 3]


def test_prediction_is_certified_by_a_lead_of_more_than_twice_the_largest_difference() -> None:
    expected, got = np.array([[0.0, 1.5], [0.0, 2.5]]), np.array([[1.0, 0.5], [0.0, 2.5]])
    (made,), figures = predictions(got, expected, "predictions", LIMITS["fp16"])
    assert (made.verdict, figures["changed"], figures["certified"]) == ("pass", 1, 1)


def test_angle_counts_less_only_for_logits_shorter_than_usual() -> None:
    long, short = np.array([[3.0, 0.0]]), np.array([[0.01, 0.0]])
    turned = [cosines(logits @ [[0.8, 0.6], [-0.6, 0.8]], logits, 1.0)[0] for logits in (long, short)]
    assert turned[0] == pytest.approx(0.8)
    assert turned[1] == pytest.approx(1 - 0.2 * 0.01**2 / 2)  # two logits of spread 1 have length sqrt(2)
    wrong = cosines(np.array([[0.0, 3.0]]), short, 1.0)[0]  # short in the model alone
    assert wrong == pytest.approx(0.0)
