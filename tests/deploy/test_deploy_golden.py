"""Golden references: written whole, read with suspicion, and what is held against one answers like it."""

import copy
import functools
import hashlib
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from deploy_models import make_model, replace, tensors
from onnx import numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import nn

from growkit.deploy.checks import Check
from growkit.deploy.export import export_onnx
from growkit.deploy.form import Form
from growkit.deploy.golden import TOLERANCE, Golden, make_golden, read_golden, reference_images, write_golden
from growkit.deploy.golden_checks import change_since, check_golden
from growkit.deploy.subject import model_subject, onnx_subject, precision_of, tensors_sha256
from growkit.deploy.truth import Preprocessing
from growkit.errors import GrowkitError


def failed(golden: Golden, model: nn.Module) -> list[str]:
    return [c.line for c in check_golden(golden, model_subject(model)) if c.verdict == "fail"]


def verdicts(checks: tuple[Check, ...]) -> dict[str, str]:
    assert len({c.name for c in checks}) == len(checks)
    return {c.name: c.verdict for c in checks}


@pytest.fixture(scope="module")
def golden(model: nn.Module) -> Golden:
    return make_golden(model_subject(model), seed=3)


@pytest.fixture
def folder(golden: Golden, tmp_path: Path) -> Path:
    """A reference of `model` on disk."""
    write_golden(tmp_path / "reference", golden)
    return tmp_path / "reference"


# written -------------------------------------------------------------------------------------


def test_reference_of_a_model_is_its_float64_truth_as_onnx_reads_it(model: nn.Module, folder: Path) -> None:
    truth = copy.deepcopy(model).double()
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert names == [
        "reference.json",
        *(f"test_data_set_{i}/{name}" for i in (0, 1) for name in ("input_0.pb", "output_0.pb")),
    ]
    for index, count in enumerate((1, 5)):
        images, logits = (
            numpy_helper.to_array(onnx.load_tensor(str(folder / f"test_data_set_{index}" / name)))
            for name in ("input_0.pb", "output_0.pb")
        )
        assert images.shape == (count, 3, 16, 16)
        with torch.inference_mode():
            expected = truth(torch.from_numpy(images.copy()).double()).numpy().astype(np.float32)
        assert np.array_equal(logits, expected)


def test_images_are_8_bit_pixels_black_and_white_among_them() -> None:
    prepared = Preprocessing((3, 20, 12), (0.1, 0.5, 0.9), (0.2, 0.5, 0.1), "bicubic", 1.0, "center")
    one, five = reference_images(prepared, 0)
    assert (one.shape, five.shape) == ((1, 3, 20, 12), (5, 3, 20, 12))
    mean, std = (np.reshape(v, (3, 1, 1)) for v in (prepared.mean, prepared.std))
    pixels = (np.concatenate([one, five]) * std + mean) * 255
    assert np.abs(pixels - np.rint(pixels)).max() < 1e-3
    assert pixels.min() > -1e-3
    assert pixels.max() < 255.001
    assert np.abs(pixels[4]).max() < 1e-3
    assert np.abs(pixels[5] - 255).max() < 1e-3
    assert pixels[:4].std(axis=(1, 2, 3)).min() > 30
    assert not np.array_equal(reference_images(prepared, 1)[0], one)


def test_reference_comes_back_as_it_was_written(golden: Golden, folder: Path) -> None:
    back = read_golden(folder)
    assert (back.identity, back.tolerance, back.seed) == (golden.identity, 1e-5, 3)
    for was, now in zip(golden.data_sets, back.data_sets, strict=True):
        assert was.name == now.name
        assert np.array_equal(was.images, now.images)
        assert np.array_equal(was.logits, now.logits)
    content = json.loads((folder / "reference.json").read_text())
    assert content["of"] == "model"
    assert content["onnx_sha256"] is None
    assert {"growkit", "torch", "python"} <= set(content["versions"])
    assert str(folder.parent) not in json.dumps(content)


def test_new_reference_replaces_the_old_one_through_a_link(golden: Golden, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    other = make_golden(model_subject(make_model(8)), seed=3)
    write_golden(tmp_path / "link", other)
    assert (tmp_path / "link").is_symlink()
    assert read_golden(folder).identity.tensors_sha256 == other.identity.tensors_sha256
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "reference"]


@pytest.mark.parametrize("stranger", ["notes.md", "test_data_set_0/input_1.pb", "test_data_set_x/input_0.pb"])
def test_folder_with_other_things_is_never_replaced(golden: Golden, folder: Path, stranger: str) -> None:
    (folder / stranger).parent.mkdir(exist_ok=True)
    (folder / stranger).write_text("mine")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(GrowkitError, match=r"would be lost; name another --reference"):
        write_golden(folder, golden)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_data_sets_that_are_no_reference_are_not_replaced(golden: Golden, folder: Path) -> None:
    (folder / "reference.json").unlink()
    with pytest.raises(GrowkitError, match="not growkit's to replace"):
        write_golden(folder, golden)
    with pytest.raises(GrowkitError, match="is a file"):
        write_golden(folder / "test_data_set_0" / "input_0.pb", golden)


def test_failure_while_writing_leaves_the_old_reference(
    golden: Golden, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("growkit.deploy.golden.write_json", full)
    with pytest.raises(OSError, match="no space"):
        write_golden(folder, golden)
    assert {p: p.read_bytes() for p in folder.parent.rglob("*") if p.is_file()} == before


def test_model_that_answers_nan_becomes_no_reference() -> None:
    broken = make_model()
    with torch.no_grad():
        broken.head.bias[0] = torch.nan
    with pytest.raises(GrowkitError, match="NaN"):
        make_golden(model_subject(broken), seed=0)


# held ----------------------------------------------------------------------------------------


def test_model_matches_its_own_reference(model: nn.Module, folder: Path) -> None:
    checks = check_golden(read_golden(folder), model_subject(model))
    assert set(verdicts(checks).values()) == {"pass"}
    assert set(verdicts(checks)) == {
        "model: weights by tensor",
        "model: preprocessing",
        *(f"test_data_set_{i}: model{rest}" for i in (0, 1) for rest in ("", ", certain predictions changed")),
    }
    numbers = [c.measured for c in checks if c.name.endswith(": model")]
    assert all(0 < value < 1e-5 for value in numbers)  # float32 against float64: not the same computation


def test_training_mode_does_not_matter(golden: Golden) -> None:
    training = make_model(drop_rate=0.5).train()
    assert failed(golden, training) == []
    assert training.training
    partly = make_model(drop_rate=0.5)
    partly.head_drop.train()
    assert failed(golden, partly) == []


@pytest.mark.parametrize(("off", "lines"), [(1e-2, 3), (1e-6, 1)])
def test_one_weight_off_is_found_even_where_it_drowns_in_noise(golden: Golden, off: float, lines: int) -> None:
    moved = make_model()
    with torch.no_grad():
        moved.blocks[0].mlp.fc1.weight[3, 5] *= 1 + off
    said = failed(golden, moved)
    assert len(said) == lines
    before, after = (h[:12] for h in (golden.identity.tensors_sha256 or "", tensors_sha256(moved)))
    assert said[0] == (
        f"the reference was written for weights by tensor {before}, this model has {after}: "
        "if the change was meant, `growkit verify MODEL --model-only --reference DIR --update-reference` accepts it"
    )


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ("abcde", None),
        ("abdce", "model: class names are others: number 2 is d, was c"),
        ("abcd", "model: class names are 4, were 5"),
        (None, None),
    ],
)
def test_class_names_are_those_of_the_reference(
    model: nn.Module, tmp_path: Path, names: str | None, told: str | None
) -> None:
    """Where two are swapped every logit stays, and two answers are called the other's name."""
    write_golden(tmp_path / "reference", make_golden(model_subject(model, labels=list("abcde")), seed=3))
    checks = check_golden(read_golden(tmp_path / "reference"), model_subject(model, labels=names and list(names)))
    assert [c.line for c in checks if c.verdict != "pass"] == [told] * (told is not None)
    assert ("model: class names" in verdicts(checks)) == (names is not None)


def test_reference_without_class_names_is_held_as_far_as_it_goes(model: nn.Module, folder: Path) -> None:
    content = json.loads((folder / "reference.json").read_text())
    del content["labels"]
    (folder / "reference.json").write_text(json.dumps(content))
    checks = check_golden(read_golden(folder), model_subject(model, labels=list("abcde")))
    assert set(verdicts(checks).values()) == {"pass"}


def test_answers_are_held_where_no_hash_is_known(golden: Golden) -> None:
    moved = make_model()
    with torch.no_grad():
        moved.head.weight *= 1 + 1e-4
    unknown = model_subject(moved)
    unknown = type(unknown)(
        identity=type(unknown.identity)(of="model", precision="fp32"), run=unknown.run, answers=unknown.answers
    )
    checks = check_golden(golden, unknown)
    assert [c.verdict for c in checks if c.name.endswith(": model")] == ["fail", "fail"]
    assert {c.verdict for c in check_golden(golden, unknown, tolerance=1e-3)} == {"pass"}


def test_changed_prediction_is_named_beside_the_numbers(golden: Golden) -> None:
    swapped = make_model()
    with torch.no_grad():
        for parameter in (swapped.head.weight, swapped.head.bias):
            parameter.copy_(parameter.flip(0))
    assert any("certain predictions changed" in line for line in failed(golden, swapped))


def test_nan_is_no_match(golden: Golden) -> None:
    broken = make_model()
    with torch.no_grad():
        broken.head.bias[0] = torch.nan
    assert any("relative RMS nan" in line for line in failed(golden, broken))


def test_model_of_one_class_matches_itself() -> None:
    one = make_model(num_classes=1)
    assert failed(make_golden(model_subject(one), seed=0), one) == []


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"img_size": 32}, "refuses the stored images of 3 x 16 x 16: the reference is another model's"),
        ({"num_classes": 5}, "answers 5 x 5, stored is 5 x 7: the reference is another model's"),
        ({"in_chans": 1}, "preprocessing is input_size [1, 16, 16]"),
        ({"embed_dim": 32}, "the reference was written for weights by tensor"),
    ],
)
def test_reference_of_another_model_is_said_to_be_one(golden: Golden, changed: dict[str, int], told: str) -> None:
    assert any(told in line for line in failed(golden, make_model(**changed)))


def test_reference_of_another_architecture_says_which(model: nn.Module) -> None:
    golden = make_golden(model_subject(model, architecture="vit_tiny"), seed=3)
    checks = check_golden(golden, model_subject(model, architecture="deit_tiny"))
    assert [c.line for c in checks if c.verdict == "fail"] == ["model: deit_tiny, the reference is of vit_tiny"]


def test_changed_preprocessing_is_found_though_the_logits_are_the_same(golden: Golden) -> None:
    other = make_model()
    other.pretrained_cfg = {**other.pretrained_cfg, "mean": (0.4, 0.4, 0.4)}
    (line,) = failed(golden, other)
    assert line == "model: preprocessing is mean [0.4, 0.4, 0.4]; was mean [0.5, 0.5, 0.5]"


def test_half_precision_has_its_own_tolerance(golden: Golden) -> None:
    half = model_subject(make_model().bfloat16())
    checks = check_golden(golden, half)
    assert {c.verdict for c in checks} == {"pass"}
    assert {c.limit for c in checks if c.name.endswith(": model")} == {TOLERANCE["bf16"]}
    assert model_subject(make_model().double()).identity.precision == "fp32"
    strict = [c.line for c in check_golden(golden, half, tolerance=1e-5) if c.verdict == "fail"]
    assert any(line.endswith("; the reference is of fp32, this of bf16") for line in strict)


def test_same_weights_have_the_same_hash_in_every_file_and_no_other() -> None:
    model = make_model()
    assert tensors_sha256(model) == tensors_sha256(make_model())
    assert len({tensors_sha256(m) for m in (model, make_model(1), make_model(num_classes=5))}) == 3


def test_same_weights_in_another_file_are_the_same(model: nn.Module) -> None:
    golden = make_golden(model_subject(model, weights_sha256="a" * 64), seed=3)
    checks = check_golden(golden, model_subject(model, weights_sha256="b" * 64))
    assert set(verdicts(checks).values()) == {"pass"}


def test_weight_that_would_have_anothers_name_without_its_wrapper_counts_in_the_hash() -> None:
    inner = nn.Linear(2, 2)
    model = nn.ModuleDict({"module": nn.ModuleDict({"head": inner}), "head": nn.Linear(2, 2)})
    before = tensors_sha256(model)
    nn.init.zeros_(inner.weight)
    assert tensors_sha256(model) != before


# ONNX files ----------------------------------------------------------------------------------


def test_file_matches_its_own_reference_and_its_models(golden: Golden, exported: Path) -> None:
    file = onnx_subject(exported)
    own = make_golden(file, seed=0)
    assert own.identity.of == "onnx"
    assert own.identity.onnx_sha256 == hashlib.sha256(exported.read_bytes()).hexdigest()
    assert np.array_equal(own.data_sets[0].logits, file.run(own.data_sets[0].images))
    for reference in (own, golden):
        assert {c.verdict for c in check_golden(reference, file)} == {"pass"}


def test_edited_file_does_not_match(golden: Golden, exported: Path, edit: Callable[..., Path]) -> None:
    def change(proto: onnx.ModelProto) -> None:
        value = tensors(proto)["head.bias"].copy()
        value[0] *= 1.01
        replace(proto, "head.bias", value)

    file = onnx_subject(edit(change))
    lines = [c.line for c in check_golden(make_golden(onnx_subject(exported), seed=0), file) if c.verdict == "fail"]
    assert lines[0].startswith("the reference was written for SHA-256")
    assert {c.verdict for c in check_golden(golden, file) if c.name.endswith(": file")} == {"fail"}


def test_network_inside_a_file_of_another_form_is_held(golden: Golden, model: nn.Module, tmp_path: Path) -> None:
    form = Form(pixels=True, output="top-3", batch=2)
    export_onnx(model, tmp_path / "model.onnx", form, external=True)
    file = onnx_subject(tmp_path / "model.onnx")
    for reference in (golden, make_golden(file, seed=0)):
        assert {c.verdict for c in check_golden(reference, file)} == {"pass"}
    (tmp_path / "model.onnx.data").write_bytes(bytes((tmp_path / "model.onnx.data").stat().st_size))
    stale = onnx_subject(tmp_path / "model.onnx")
    assert {c.verdict for c in check_golden(golden, stale)} >= {"fail"}
    assert stale.identity.onnx_sha256 != file.identity.onnx_sha256


def test_int8_file_holds_its_own_answers_and_not_those_of_float32(
    golden: Golden, exported: Path, tmp_path: Path
) -> None:
    small = tmp_path / "int8.onnx"
    quantize_dynamic(exported, small, weight_type=QuantType.QInt8, per_channel=True)
    assert precision_of(onnx.load(small)) == "int8"
    file = onnx_subject(small)
    own = make_golden(file, seed=0)
    assert own.tolerance == TOLERANCE["int8"]
    assert {c.verdict for c in check_golden(own, file)} == {"pass"}
    assert "fail" in {c.verdict for c in check_golden(golden, file, tolerance=1e-5)}


# read ----------------------------------------------------------------------------------------


def rewrite(folder: Path, **changed: object) -> None:
    """Change reference.json."""
    path = folder / "reference.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def plant(folder: Path, data: bytes, *, file: str = "input_0.pb", name: str = "input") -> None:
    """Put other bytes into a file of test_data_set_0, and their hash into reference.json: someone meant it."""
    (folder / "test_data_set_0" / file).write_bytes(data)
    sets = json.loads((folder / "reference.json").read_text())["data_sets"]
    sets[0][f"{name}_sha256"] = hashlib.sha256(data).hexdigest()
    rewrite(folder, data_sets=sets)


plant_logits = functools.partial(plant, file="output_0.pb", name="logits")

DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "no such folder"),
    "no reference.json": (lambda f: (f / "reference.json").unlink(), r"holds no reference\.json"),
    "no JSON": (lambda f: (f / "reference.json").write_text("{"), "not readable as JSON"),
    "JSON of great depth": (lambda f: (f / "reference.json").write_text("[" * 10**5), "nested too deep"),
    "a list": (lambda f: (f / "reference.json").write_text("[]"), "no reference of this growkit"),
    "another schema": (lambda f: rewrite(f, schema=2), "no reference of this growkit"),
    "no data sets": (lambda f: rewrite(f, data_sets=[]), "damaged"),
    "data sets of another kind": (lambda f: rewrite(f, data_sets=3), "damaged"),
    "a path for a name": (
        lambda f: rewrite(f, data_sets=[{"name": "../x", "input_sha256": "", "logits_sha256": ""}]),
        r"reference\.json: damaged",
    ),
    "of something else": (lambda f: rewrite(f, of="picture"), "damaged"),
    "a seed of words": (lambda f: rewrite(f, seed="three"), "damaged"),
    "a hash of numbers": (lambda f: rewrite(f, tensors_sha256=7), "damaged"),
    "class names of numbers": (lambda f: rewrite(f, labels=[0, 1]), "damaged"),
    "an unknown precision": (lambda f: rewrite(f, precision="fp4"), "damaged"),
    "an infinite tolerance": (lambda f: rewrite(f, tolerance=float("inf")), "damaged"),
    "a tolerance of NaN": (lambda f: rewrite(f, tolerance=float("nan")), "damaged"),
    "a hash of markup": (lambda f: rewrite(f, tensors_sha256="[red]\n"), "damaged"),
    "no preprocessing": (lambda f: rewrite(f, preprocessing=None), "damaged"),
    "another size": (lambda f: rewrite(f, preprocessing={"input_size": [3, 9, 9]}), "damaged"),
    "a lost tensor": (lambda f: (f / "test_data_set_1" / "output_0.pb").unlink(), r"output_0\.pb: missing"),
    "a lost data set": (lambda f: shutil.rmtree(f / "test_data_set_1"), r"test_data_set_1.*missing"),
    "a cut tensor": (lambda f: os.truncate(f / "test_data_set_0" / "input_0.pb", 100), r"input_0\.pb: damaged"),
    "another tensor": (
        lambda f: shutil.copy(f / "test_data_set_1" / "input_0.pb", f / "test_data_set_0" / "input_0.pb"),
        r"input_0\.pb: damaged",
    ),
    "a Git LFS pointer": (
        lambda f: (f / "test_data_set_0" / "input_0.pb").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
    "no protobuf": (lambda f: plant(f, b"\xff\xff\xff"), "not an ONNX tensor"),
    "integers": (
        lambda f: plant(f, numpy_helper.from_array(np.ones((1, 3, 16, 16), np.int32)).SerializeToString()),
        "f",
    ),
    "no image": (lambda f: plant(f, onnx.TensorProto(data_type=1, dims=[0, 3, 16, 16]).SerializeToString()), "claims"),
    "logits of three axes": (
        lambda f: plant_logits(f, numpy_helper.from_array(np.ones((1, 7, 1), np.float32)).SerializeToString()),
        "claims",
    ),
    "logits of other images": (
        lambda f: plant_logits(f, (f / "test_data_set_1" / "output_0.pb").read_bytes()),
        r"\(1, 3, 16, 16\) images for \(5, 7\) logits",
    ),
    "NaN": (
        lambda f: plant(f, numpy_helper.from_array(np.full((1, 3, 16, 16), np.nan, np.float32)).SerializeToString()),
        "NaN",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_reference_is_one_line(folder: Path, damage: str) -> None:
    change, told = DAMAGES[damage]
    change(folder)
    with pytest.raises(GrowkitError, match=told) as caught:
        read_golden(folder)
    assert "\n" not in str(caught.value)


def test_claimed_size_takes_no_memory(folder: Path) -> None:
    plant(folder, onnx.TensorProto(data_type=1, dims=[1, 3, 2**31, 2**31], raw_data=b"1234").SerializeToString())
    tracemalloc.start()
    with pytest.raises(GrowkitError, match="size it claims"):
        read_golden(folder)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_tensor_kept_in_another_file_is_not_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(4 * 3 * 16 * 16))
    tensor = onnx.TensorProto(data_type=1, dims=[1, 3, 16, 16], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../secret")
    plant(folder, tensor.SerializeToString())
    with pytest.raises(GrowkitError, match="damaged"):
        read_golden(folder)


def test_device_in_place_of_a_tensor_is_not_read(folder: Path) -> None:
    path = folder / "test_data_set_0" / "input_0.pb"
    path.unlink()
    path.symlink_to(os.devnull)  # /dev/zero would do, but takes all memory where it is read
    with pytest.raises(GrowkitError, match="missing"):
        read_golden(folder)


def test_links_to_plain_files_are_followed(folder: Path, tmp_path: Path) -> None:
    path = folder / "test_data_set_0" / "input_0.pb"
    shutil.move(path, tmp_path / "kept")
    path.symlink_to(tmp_path / "kept")
    assert len(read_golden(folder).data_sets) == 2


# told ----------------------------------------------------------------------------------------


def test_change_says_how_far_the_answers_move(golden: Golden) -> None:
    moved = make_model()
    with torch.no_grad():
        moved.head.bias[2] += 0.25
    told = change_since(golden, model_subject(moved))
    before, after = (h[:12] for h in (golden.identity.tensors_sha256 or "", tensors_sha256(moved)))
    assert told.startswith(f"weights by tensor {before} -> {after}; logits move by up to 0.25 ")
    assert "as before; logits move by up to" in change_since(golden, model_subject(make_model()))
    assert "7 classes before, 5 now" in change_since(golden, model_subject(make_model(num_classes=5)))
    assert "images were 3 x 16 x 16, are 3 x 32 x 32" in change_since(golden, model_subject(make_model(img_size=32)))
    assert "is of a model" not in told
    named, other = (model_subject(make_model(), labels=list(names)) for names in ("abcde", "abdce"))
    assert "class names are others: number 2 is d, was c" in change_since(make_golden(named, seed=3), other)


def test_change_says_that_a_model_takes_a_files_place(golden: Golden, exported: Path) -> None:
    assert change_since(golden, onnx_subject(exported)).startswith("it was of a model, is of a file; ")
