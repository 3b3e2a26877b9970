"""Every seeded defect turns the check red, and a clean export is green."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from deploy_models import ARGUMENTS, NAME, make_model, replace, scalar, tensors
from onnx import numpy_helper
from torch import nn

from growkit.deploy import parity as parity_module
from growkit.deploy import parts
from growkit.deploy.accuracy import mcnemar_p
from growkit.deploy.data_sets import write_reference
from growkit.deploy.export import export_onnx
from growkit.deploy.parity import check_parity
from growkit.deploy.reference import noise_images, preprocessing
from growkit.deploy.runtime import Session, open_session
from growkit.errors import GrowkitError, ParityError

Change = Callable[[onnx.ModelProto], None]
Edit = Callable[[Change], Path]


def failed_groups(parity: parity_module.Parity) -> set[str]:
    return {c.group for c in parity.failed}


def lines(parity: parity_module.Parity) -> str:
    return "\n".join(c.line for c in parity.failed)


# clean ------------------------------------------------------------------------------------------


def test_clean_export_passes_every_check(model: nn.Module, exported: Path) -> None:
    parity = check_parity(model, exported, weights_sha256="ab" * 32, labels=list("abcdefg"))
    assert parity.passed, lines(parity)
    parity.require()
    assert {c.group for c in parity.checks} == {"structure", "weights", "numbers", "predictions"}
    assert set(parity.figures["batches"]) == {"1", "2", "3", "5", "8"}
    assert set(parity.figures["extremes"]) == {"black", "white", "pure noise", "checkerboard", "ten times too large"}
    assert parity.figures["noise_ratio"] < 3
    assert parity.figures["predictions"]["certified"] > 0


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("deit_tiny_distilled_patch16_224", {}),
        ("deit3_small_patch16_224", {}),  # layer scale
        ("vit_tiny_patch16_224", {"num_heads": 1, "in_chans": 1}),
    ],
)
def test_clean_exports_of_other_vision_transformers_pass(name: str, arguments: dict[str, int], tmp_path: Path) -> None:
    model = make_model(1, name, **arguments)
    export_onnx(model, tmp_path / "m.onnx")
    parity = check_parity(model, tmp_path / "m.onnx")
    assert parity.passed, lines(parity)


def test_fresh_timm_model_passes_though_its_zero_biases_are_left_out(tmp_path: Path) -> None:
    model = timm.create_model(NAME, **ARGUMENTS).eval()
    export_onnx(model, tmp_path / "m.onnx")
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


# seeded defects ---------------------------------------------------------------------------------


def head_swap(proto: onnx.ModelProto) -> None:
    """Rows of q of the two heads (32 wide) swapped in block 0; k and v stay."""
    order = np.r_[32:64, 0:32, 64:192]
    for name, value in tensors(proto).items():
        if value.shape == (64, 192):
            replace(proto, name, value[:, order])
            break
    replace(proto, "blocks.0.attn.qkv.bias", tensors(proto)["blocks.0.attn.qkv.bias"][order])


def rounded(dtype: torch.dtype, only: str | None = None) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        for name, value in tensors(proto).items():
            if value.dtype == np.float32 and (only is None or name.startswith(only)):
                replace(proto, name, torch.from_numpy(value.copy()).to(dtype).float().numpy())

    return change


def element(name: str, index: tuple[int, ...], factor: float) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        value = tensors(proto)[name].copy()
        value[index] *= factor
        replace(proto, name, value)

    return change


def zeroed(name: str) -> Change:
    return lambda proto: replace(proto, name, np.zeros_like(tensors(proto)[name]))


def epsilon(value: float) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        for node in proto.graph.node:
            for attribute in node.attribute:
                if node.op_type == "LayerNormalization" and attribute.name == "epsilon":
                    attribute.f = value

    return change


def attention_scale(proto: onnx.ModelProto) -> None:
    replace(proto, scalar(proto, 32**-0.5), np.float32(31**-0.5))


def shifted_positions(proto: onnx.ModelProto) -> None:
    replace(proto, "pos_embed", np.roll(tensors(proto)["pos_embed"], 1, axis=1))


DEFECTS: dict[str, tuple[Change, set[str]]] = {
    "layer norm epsilon 1e-5": (epsilon(1e-5), {"weights", "numbers"}),
    # below 1e-6 of a variance near 1 it drowns in float32 noise, but the constant is seen
    "layer norm epsilon 1e-12": (epsilon(1e-12), {"weights"}),
    "attention scale 1/sqrt(31)": (attention_scale, {"weights", "numbers"}),
    "one bias element zeroed": (
        element("blocks.0.attn.proj.bias", (3,), 0.0),
        {"weights", "numbers"},
    ),
    "one layer rounded to fp16": (
        rounded(torch.float16, "blocks.0.attn.qkv.bias"),
        {"weights", "numbers"},
    ),
    "two heads of q swapped": (head_swap, {"weights", "numbers"}),
    "all weights fp16": (rounded(torch.float16), {"weights", "numbers"}),
    "all weights bf16": (rounded(torch.bfloat16), {"weights", "numbers"}),
    "proj bias dropped": (zeroed("blocks.1.attn.proj.bias"), {"weights", "numbers"}),
    "qkv bias dropped": (zeroed("blocks.0.attn.qkv.bias"), {"weights", "numbers"}),
    "position embedding shifted": (shifted_positions, {"weights", "numbers"}),
    # 4.5e-7 in DeiT-S: below float32 noise, seen only bit for bit
    "one weight +1 %": (element("head.weight", (2, 5), 1.01), {"weights"}),
    "one bias NaN": (element("head.bias", (0,), float("nan")), {"weights", "numbers"}),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_seeded_defect_is_found(defect: str, model: nn.Module, edit: Edit) -> None:
    change, groups = DEFECTS[defect]
    parity = check_parity(model, edit(change))
    assert groups <= failed_groups(parity), lines(parity)
    with pytest.raises(ParityError):
        parity.require()


def test_tanh_gelu_is_found_by_the_numbers(model: nn.Module, tmp_path: Path) -> None:
    other = make_model()
    for block in other.blocks:
        block.mlp.act = nn.GELU(approximate="tanh")
    export_onnx(other, tmp_path / "m.onnx")
    assert "numbers" in failed_groups(check_parity(model, tmp_path / "m.onnx"))


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


# structure --------------------------------------------------------------------------------------


def fixed_batch(proto: onnx.ModelProto) -> None:
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2


def folded_batch(proto: onnx.ModelProto) -> None:
    """At batch 1 all is well; above it, channels of different images change places."""
    target = numpy_helper.from_array(np.array([-1, 3, 16, 16]), "folded_shape")
    proto.graph.initializer.append(target)
    first = next(n for n in proto.graph.node if n.op_type == "Conv")
    first.input[0] = "folded"
    proto.graph.node.insert(0, onnx.helper.make_node("Transpose", ["input"], ["turned"], perm=[1, 0, 2, 3]))
    proto.graph.node.insert(1, onnx.helper.make_node("Reshape", ["turned", "folded_shape"], ["folded"]))


def set_ir(version: int) -> Change:
    return lambda proto: setattr(proto, "ir_version", version)


def set_opset(version: int) -> Change:
    return lambda proto: setattr(proto.opset_import[0], "version", version)


def rename_output(proto: onnx.ModelProto) -> None:
    last = next(n for n in proto.graph.node if "logits" in n.output)
    last.output[0] = proto.graph.output[0].name = "scores"


def leak_path(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].doc_string = f"{Path.home()}/venv/lib/site-packages/timm/layers/mlp.py"


def wrong_mean(proto: onnx.ModelProto) -> None:
    for prop in proto.metadata_props:
        if prop.key == "preprocessing":
            prop.value = prop.value.replace('"mean": [0.5', '"mean": [0.485')


STRUCTURE: dict[str, tuple[Change, str]] = {
    "fixed batch": (fixed_batch, "structure: input"),
    "fixed batch is refused by the runtime": (fixed_batch, "numbers: batch 5: runs"),
    "batch folded wrongly": (folded_batch, "numbers: batch 5: relative RMS error"),
    "batch folded wrongly, invariance": (folded_batch, "numbers: batch 2: same as one by one"),
    "IR 10": (set_ir(10), "structure: IR version"),
    "opset 17": (set_opset(17), "structure: opset"),
    "opset 20": (set_opset(20), "structure: opset"),
    "output renamed": (rename_output, "structure: output"),
    "path inside": (leak_path, "structure: paths of the exporting machine"),
    "wrong mean": (wrong_mean, "structure: preprocessing"),
}


@pytest.mark.parametrize("defect", STRUCTURE)
def test_structural_defect_is_found_by_name(defect: str, model: nn.Module, edit: Edit) -> None:
    change, name = STRUCTURE[defect]
    parity = check_parity(model, edit(change))
    assert name in {f"{c.group}: {c.name}" for c in parity.failed}, lines(parity)


def test_batch_folded_wrongly_is_right_at_batch_one(model: nn.Module, edit: Edit) -> None:
    batches = check_parity(model, edit(folded_batch)).figures["batches"]
    assert batches["1"]["relative_rms"] < 1e-5 < batches["2"]["relative_rms"]


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
        check_parity(model, exported, max_batch=0)


def test_file_of_other_weights_or_labels_is_said_so(model: nn.Module, exported: Path) -> None:
    parity = check_parity(model, exported, weights_sha256="cd" * 32, labels=["a", "b"])
    assert {c.name for c in parity.failed} == {"exported from this model", "labels"}
    assert "abababababab" in lines(parity)
    assert "export it again" in lines(parity)


def test_every_mismatch_is_collected_before_the_verdict(model: nn.Module, edit: Edit) -> None:
    def several(proto: onnx.ModelProto) -> None:
        set_ir(10)(proto)
        wrong_mean(proto)
        zeroed("blocks.0.attn.qkv.bias")(proto)

    parity = check_parity(model, edit(several))
    assert {"structure", "weights", "numbers"} <= failed_groups(parity)
    with pytest.raises(ParityError, match=r"IR version.*preprocessing.*blocks\.0\.attn\.qkv\.bias"):
        parity.require()


# where an error comes from ----------------------------------------------------------------------


def test_export_bug_is_told_from_an_optimiser_bug(
    model: nn.Module, exported: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = check_parity(model, edit(zeroed("blocks.0.attn.qkv.bias")))
    assert "export bug" in damaged.figures["diagnosis"]

    class Broken(Session):
        def run(self, images: np.ndarray) -> np.ndarray:
            return super().run(images) * np.float32(1.001)

    def wrong_when_optimised(file: Path, *, optimise: bool = True, **more: Any) -> Session:
        session = open_session(file, optimise=optimise, **more)
        if not optimise:
            return session
        return Broken(session.inner, session.input, session.provider, session.threads)

    monkeypatch.setattr(parts, "open_session", wrong_when_optimised)
    assert "optimiser bug" in check_parity(model, exported).figures["diagnosis"]


# reference data and accuracy --------------------------------------------------------------------


def test_reference_data_of_the_model_passes_and_of_another_fails(
    model: nn.Module, exported: Path, tmp_path: Path
) -> None:
    write_reference(model, tmp_path / "own", seed=0)
    write_reference(make_model(5), tmp_path / "other", seed=0)
    assert check_parity(model, exported, reference=tmp_path / "own").passed
    parity = check_parity(model, exported, reference=tmp_path / "other")
    assert failed_groups(parity) == {"reference"}
    assert len(parity.failed) == 4  # two data sets, file and model


def labelled(model: nn.Module, count: int = 60) -> list[tuple[torch.Tensor, torch.Tensor]]:
    images = torch.from_numpy(noise_images(preprocessing(model), count, 9))
    with torch.inference_mode():
        classes = model(images).argmax(1).numpy()
    classes[::4] = (classes[::4] + 1) % 7  # the model is right on three quarters
    given = torch.from_numpy(classes)
    return [(images[i : i + 16], given[i : i + 16]) for i in range(0, count, 16)]


def test_accuracy_of_a_clean_export_equals_the_models(model: nn.Module, exported: Path) -> None:
    parity = check_parity(model, exported, data=labelled(model))
    assert parity.passed, lines(parity)
    accuracy = parity.figures["accuracy"]
    assert accuracy["samples"] == 60
    assert accuracy["top1"] == accuracy["torch_top1"] == 0.75
    assert accuracy["top5"] == accuracy["torch_top5"]
    assert accuracy["n01"] == accuracy["n10"] == 0
    assert accuracy["mcnemar_p"] == 1.0


def test_lost_accuracy_is_counted_and_certified_changes_fail(model: nn.Module, edit: Edit) -> None:
    def negated(proto: onnx.ModelProto) -> None:
        replace(proto, "head.weight", -tensors(proto)["head.weight"])
        replace(proto, "head.bias", -tensors(proto)["head.bias"])

    parity = check_parity(model, edit(negated), data=labelled(model))
    accuracy = parity.figures["accuracy"]
    assert "accuracy" in failed_groups(parity)
    assert accuracy["top1"] < accuracy["torch_top1"] == 0.75
    assert accuracy["n10"] > accuracy["n01"]
    assert accuracy["predictions"]["certified_changed"] > 0
    assert "certified predictions changed" in {c.name for c in parity.failed}


def test_empty_data_is_refused(model: nn.Module, exported: Path) -> None:
    with pytest.raises(GrowkitError, match="no labelled sample"):
        check_parity(model, exported, data=[])


@pytest.mark.parametrize(
    ("n01", "n10", "p"),
    [(0, 0, 1.0), (0, 5, 2 / 32), (1, 4, 12 / 32), (3, 3, 1.0), (0, 10, 2 / 1024)],
)
def test_mcnemar_p_is_the_exact_binomial(n01: int, n10: int, p: float) -> None:
    assert mcnemar_p(n01, n10) == pytest.approx(p)
    assert mcnemar_p(n10, n01) == pytest.approx(p)
