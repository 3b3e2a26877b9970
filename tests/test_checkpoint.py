"""Weights in and out: every published form is read, nothing is run, and what is damaged is refused in one line."""

import argparse
import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from pairs import randomised, tiny
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform
from timm.models import save_for_hf
from torch import Tensor, nn

from growkit.checkpoint import CONFIG, HISTORY, OPERATOR, WEIGHTS, read_checkpoint, replace_model, write_model
from growkit.errors import GrowkitError
from growkit.files import read_json, sha256_of
from growkit.growing import grow_model
from growkit.job import Job
from growkit.record import RunFolder
from growkit.settings import GrowSettings, Loading
from growkit.source import load_source

SMALL = tiny(32, 2, 2)
PREPROCESSING = {
    "input_size": (3, 16, 16),
    "mean": (0.1, 0.2, 0.3),
    "std": (0.4, 0.5, 0.6),
    "interpolation": "bilinear",
    "crop_pct": 0.8,
    "crop_mode": "center",
}
LABELS = list("abcdefg")


def network(seed: int = 0) -> nn.Module:
    return randomised(SMALL, seed=seed, dtype=torch.float32)


def weights(seed: int = 0) -> dict[str, Tensor]:
    return dict(network(seed).state_dict())


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in weights().items()}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(got) == set(expected)
    wrong = [name for name in expected if not torch.equal(got[name], expected[name])]
    assert wrong == []
    assert {tensor.dtype for tensor in got.values()} == {torch.float32}


def refusal(path: Path) -> str:
    """The message that refuses `path`: one line that names it."""
    with pytest.raises(GrowkitError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path)), message
    return message


class Touch:
    """A pickle of this touches a file when it is loaded by a reader that runs code."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize(
    "content",
    [
        weights(),
        {"model": weights()},
        {"state_dict": weights()},
        {"state_dict": weights(), "epoch": 3, "optimizer": {"lr": 0.1}, "args": argparse.Namespace(lr=0.1)},
        prefixed("module."),
        prefixed("_orig_mod."),
        prefixed("_orig_mod.module."),
        prefixed("module._orig_mod."),
        {"model": prefixed("_orig_mod.module.")},
        {"state_dict": prefixed("model."), "epoch": 3},
        {"state_dict": prefixed("model._orig_mod.")},
        {"state_dict": prefixed("module.backbone.")},
        {"model_state_dict": weights(), "optimizer_state_dict": {"state": {}}, "loss": 0.1},
        {"net": prefixed("module."), "acc": 93.5},
        {"state_dict": {}, "model": weights(), "model_ema": {}},
        torch.optim.swa_utils.AveragedModel(network()).state_dict(),
    ],
    ids=[
        *("bare", "model", "state_dict", "training", "module", "orig_mod", "both", "both turned", "nested and both"),
        *("lightning", "lightning compiled", "backbone in DDP", "model_state_dict", "net", "beside empty", "averaged"),
    ],
)
@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
def test_published_torch_forms_give_the_tensors_and_nothing_to_say(tmp_path: Path, content: dict, as_zip: bool) -> None:
    path = tmp_path / "source.pth"
    torch.save(content, path, _use_new_zipfile_serialization=as_zip)
    checkpoint = read_checkpoint(path)
    assert_same(checkpoint.state, weights())
    assert checkpoint.notes == ()
    assert (checkpoint.config, checkpoint.history) == (None, None)
    assert checkpoint.sha256 == sha256_of(path)


@pytest.mark.parametrize(("plain", "averaged"), [("model", "model_ema"), ("state_dict", "state_dict_ema")])
def test_averaged_weights_are_taken_and_said_unless_refused(tmp_path: Path, plain: str, averaged: str) -> None:
    path = tmp_path / "source.pth"
    torch.save({plain: weights(0), averaged: weights(1), "args": argparse.Namespace(model="deit")}, path)
    taken = read_checkpoint(path)
    assert_same(taken.state, weights(1))
    assert taken.notes == (f"took the averaged (EMA) weights under {averaged!r}; --no-ema takes {plain!r}",)
    raw = read_checkpoint(path, ema=False)
    assert_same(raw.state, weights(0))
    assert raw.notes == (f"took {plain!r}, not {averaged!r}",)


def test_averaged_weights_alone_are_taken_without_offering_others(tmp_path: Path) -> None:
    path = tmp_path / "source.pth"
    torch.save({"model_ema": prefixed("module.")}, path)
    checkpoint = read_checkpoint(path)
    assert_same(checkpoint.state, weights())
    assert checkpoint.notes == ("took the averaged (EMA) weights under 'model_ema'",)


@pytest.mark.parametrize("name", ["source.safetensors", "SOURCE.SAFETENSORS"])
def test_safetensors_are_read(tmp_path: Path, name: str) -> None:
    save_file(prefixed("module."), tmp_path / name)
    checkpoint = read_checkpoint(tmp_path / name)
    assert_same(checkpoint.state, weights())
    assert checkpoint.notes == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_other_precisions_are_read_as_float32_and_said(tmp_path: Path, dtype: torch.dtype, suffix: str) -> None:
    path = tmp_path / f"source{suffix}"
    stored = {name: tensor.to(dtype) for name, tensor in weights().items()}
    (save_file if suffix == ".safetensors" else torch.save)(stored, path)
    checkpoint = read_checkpoint(path)
    assert_same(checkpoint.state, {name: tensor.float() for name, tensor in stored.items()})
    (note,) = checkpoint.notes
    assert note == f"weights are {str(dtype).removeprefix('torch.')}; read as float32"


def test_folder_that_timm_wrote_is_read_with_its_labels_and_preprocessing(tmp_path: Path) -> None:
    config = {
        "architecture": SMALL.name,
        "model_args": {name: value for name, value in SMALL.arguments.items() if name != "num_classes"},
        "pretrained_cfg": PREPROCESSING,
        "label_names": LABELS,
    }
    save_for_hf(network(), str(tmp_path), model_config=config, safe_serialization=True)
    source = load_source(str(tmp_path))
    assert_same(dict(source.state), weights())
    assert source.architecture.shapes == SMALL.shapes
    assert source.labels == tuple(LABELS)
    assert json.dumps({name: source.preprocessing[name] for name in PREPROCESSING}) == json.dumps(PREPROCESSING)
    assert source.history is None
    with pytest.raises(GrowkitError, match=r"--from and --from-set are for bare checkpoints"):
        load_source(str(tmp_path), Loading(from_="deit_tiny"))


INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")


@pytest.mark.parametrize(
    ("key", "value"), [*(("interpolation", name) for name in INTERPOLATIONS), ("crop_pct", 1.15), ("crop_pct", 87.5)]
)
def test_preprocessing_is_taken_where_timm_prepares_an_image_by_it(key: str, value: Any, tmp_path: Path) -> None:
    config = {"architecture": SMALL.name, "model_args": dict(SMALL.arguments)}
    config["pretrained_cfg"] = {**PREPROCESSING, key: value}
    save_for_hf(network(), str(tmp_path), model_config=config, safe_serialization=True)
    try:
        create_transform(16, **{key: value})(Image.new("RGB", (32, 32)))
    except (KeyError, ValueError):
        with pytest.raises(GrowkitError, match=rf"{key} in its config\.json is {value}; no image .* correct it$"):
            load_source(tmp_path)
    else:
        assert load_source(tmp_path).preprocessing[key] == value


def test_class_names_of_another_head_are_left_out_and_it_is_said(tmp_path: Path) -> None:
    config = {"architecture": SMALL.name, "model_args": dict(SMALL.arguments), "label_names": LABELS[:3]}
    save_for_hf(network(), str(tmp_path), model_config=config, safe_serialization=True)
    source = load_source(str(tmp_path))
    assert source.labels is None
    assert source.notes == ("its 3 class names were left out: its head has 7 classes",)


def test_written_folder_loads_by_timm_bit_for_bit_with_its_preprocessing_and_labels(tmp_path: Path) -> None:
    model = load_source_of(network(), tmp_path).model()
    folder = tmp_path / "written"
    folder.mkdir()
    write_model(folder, model, preprocessing=PREPROCESSING, labels=LABELS, history={"stage": "grown"})
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert_same(dict(loaded.state_dict()), weights())
    assert json.dumps({name: loaded.pretrained_cfg[name] for name in PREPROCESSING}) == json.dumps(PREPROCESSING)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images), model(images))
    config = read_json(folder / CONFIG)
    assert config["label_names"] == LABELS
    assert "tag" not in config["pretrained_cfg"]
    assert read_json(folder / HISTORY) == {"stage": "grown", "weights_sha256": sha256_of(folder / WEIGHTS)}
    again = load_source(str(folder))
    assert_same(dict(again.state), weights())
    assert again.labels == tuple(LABELS)
    assert again.history == read_json(folder / HISTORY)


def load_source_of(model: nn.Module, folder: Path) -> Any:
    """A source read back from a bare checkpoint of `model`."""
    path = folder / "bare.pth"
    torch.save(model.state_dict(), path)
    return load_source(str(path), Loading(from_set=["num_heads=2"]))


def test_grown_folder_loads_by_timm_bit_for_bit_and_is_a_source_again(tmp_path: Path) -> None:
    source = load_source_of(network(), tmp_path)
    run = RunFolder(tmp_path / "run")
    sets = ("embed_dim=64", "depth=3", "num_heads=4")
    grown = grow_model(Job(run), source, "deit_tiny", GrowSettings(seed=3), sets=sets)
    stored = load_file(run.grown / WEIGHTS)
    loaded = timm.create_model(f"local-dir:{run.grown}", pretrained=True)
    assert_same(dict(loaded.state_dict()), stored)
    assert tuple(loaded.pretrained_cfg["mean"]) == tuple(source.preprocessing["mean"])
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert (loaded.eval()(images) - source.model()(images)).abs().max() < 1e-5
    again = load_source(str(run.grown))
    assert again.architecture.shapes == grown.target.shapes
    assert_same(dict(again.state), stored)
    assert set(load_file(run.grown / OPERATOR)) != set()


def test_model_of_a_source_is_trained_without_changing_the_source(tmp_path: Path) -> None:
    source = load_source_of(network(), tmp_path)
    model = source.model()
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        model.head.weight.zero_()
    assert_same(dict(source.state), weights())


def test_model_of_weights_saved_channels_last_is_written(tmp_path: Path) -> None:
    torch.save(network().to(memory_format=torch.channels_last).state_dict(), tmp_path / "source.pth")
    source = load_source(tmp_path / "source.pth", Loading(from_set=["num_heads=2"]))
    assert not source.state["patch_embed.proj.weight"].is_contiguous()
    write_model(tmp_path, source.model(), preprocessing=PREPROCESSING, labels=LABELS, history={})
    assert_same(load_file(tmp_path / WEIGHTS), weights())


def test_folder_in_use_is_replaced_and_keeps_what_else_lies_there(tmp_path: Path) -> None:
    described = {"preprocessing": PREPROCESSING, "labels": None}
    folder = tmp_path / "finetuned"
    built = load_source_of(network(0), tmp_path)
    replace_model(folder, built.model(), **described, history={"stage": "first"})
    (folder / "last").mkdir()
    (folder / "last" / "state.pt").write_text("kept")
    other = load_source_of(network(1), tmp_path)
    replace_model(folder, other.model(), **described, history={"stage": "second"})
    assert_same(dict(load_source(str(folder)).state), weights(1))
    assert read_json(folder / HISTORY)["stage"] == "second"
    assert read_json(folder / HISTORY)["weights_sha256"] == sha256_of(folder / WEIGHTS)
    assert (folder / "last" / "state.pt").read_text() == "kept"
    assert sorted(p.name for p in folder.iterdir()) == sorted([CONFIG, HISTORY, WEIGHTS, "last"])


def test_failed_replacement_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = {"preprocessing": PREPROCESSING, "labels": None, "history": {}}
    folder = tmp_path / "finetuned"
    model = load_source_of(network(), tmp_path).model()
    replace_model(folder, model, **described)

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("growkit.checkpoint.save_for_hf", full)
    with pytest.raises(OSError, match="no space"):
        replace_model(folder, model, **described)
    assert_same(dict(load_source(str(folder)).state), weights())
    assert sorted(p.name for p in folder.iterdir()) == sorted([CONFIG, HISTORY, WEIGHTS])


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "around",
    [
        lambda evil: evil,
        lambda evil: {"model": evil},
        lambda evil: {"model": weights(), "args": evil},
        lambda evil: {"model": weights(), "args": argparse.Namespace(inner={"deep": [evil]})},
        lambda evil: {**weights(), "head.bias": evil},
    ],
    ids=["alone", "as the weights", "beside weights", "inside a Namespace", "among weights"],
)
def test_pickle_that_would_run_code_is_refused_and_nothing_runs(
    tmp_path: Path, around: Callable[[Any], Any], as_zip: bool
) -> None:
    path, touched = tmp_path / "evil.pth", tmp_path / "touched"
    torch.save(around(Touch(touched)), path, _use_new_zipfile_serialization=as_zip)
    assert "runs no code from checkpoints" in refusal(path)
    assert not touched.exists()


def test_plain_pickle_that_would_run_code_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    path, touched = tmp_path / "evil.pth", tmp_path / "touched"
    path.write_bytes(pickle.dumps({"model": Touch(touched)}, protocol=2))
    assert "runs no code from checkpoints" in refusal(path)
    assert not touched.exists()


def test_the_evil_pickle_does_run_where_code_is_allowed(tmp_path: Path) -> None:
    path, touched = tmp_path / "evil.pth", tmp_path / "touched"
    torch.save({"model": weights(), "args": Touch(touched)}, path)
    torch.load(path, weights_only=False)
    assert touched.exists()


def test_whole_pickled_network_is_refused_with_the_remedy(tmp_path: Path) -> None:
    torch.save(network(), tmp_path / "network.pth")
    assert "save its state_dict() alone, or as safetensors" in refusal(tmp_path / "network.pth")


def _bytes_of(kind: str) -> bytes:
    stream = io.BytesIO()
    torch.save(weights(), stream, _use_new_zipfile_serialization=kind == "zip")
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize("share", [0.0, 1e-5, 1e-4, 0.001, 0.01, 0.25, 0.5, 0.75, 0.99, 0.9999, 1.0])
def test_truncated_torch_file_is_refused_wherever_it_ends(tmp_path: Path, kind: str, share: float) -> None:
    whole = _bytes_of(kind)
    path = tmp_path / "source.pth"
    path.write_bytes(whole[: min(int(len(whole) * share), len(whole) - 1)])
    refusal(path)


def test_flipped_bit_of_a_weight_is_found_where_torch_reads_on(tmp_path: Path) -> None:
    path, whole = tmp_path / "source.pth", bytearray(_bytes_of("zip"))
    whole[whole.index(weights()["head.bias"].numpy().tobytes())] ^= 1
    path.write_bytes(whole)
    assert not torch.equal(torch.load(path, weights_only=True)["head.bias"], weights()["head.bias"])
    assert "does not match its checksum, so the file is damaged; fetch it again" in refusal(path)


@pytest.mark.parametrize("share", [0.0, 1e-5, 1e-4, 0.001, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0])
def test_truncated_safetensors_file_is_refused_wherever_it_ends(tmp_path: Path, share: float) -> None:
    path = tmp_path / "source.safetensors"
    save_file(weights(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: min(int(len(whole) * share), len(whole) - 1)])
    assert "not readable as safetensors" in refusal(path)


def test_archive_deflated_to_no_fewer_bytes_is_refused_as_torch_would_map_other_weights(tmp_path: Path) -> None:
    path = tmp_path / "source.pth"
    whole = zipfile.ZipFile(io.BytesIO(_bytes_of("zip")))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=0) as archive:
        for name in whole.namelist():
            archive.writestr(name, whole.read(name))
    mapped = torch.load(path, mmap=True, weights_only=True)
    assert not torch.equal(mapped["head.weight"], weights()["head.weight"])
    assert "a packed archive, which torch.save does not write" in refusal(path)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("text", ["", "hello\nworld\n", "version https://git-lfs.github.com/spec/v1\noid sha256:00\n"])
def test_text_is_no_checkpoint(tmp_path: Path, suffix: str, text: str) -> None:
    path = tmp_path / f"source{suffix}"
    path.write_text(text)
    assert "not readable as" in refusal(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere.pth").endswith("no such file or folder")
    for name in ("vit_giant_patch14_224.pth", "resnet50"):  # without published weights, and of another family
        with pytest.raises(GrowkitError, match=r"no such file or folder$"):
            load_source(tmp_path / name)


@pytest.mark.parametrize("name", [WEIGHTS, "pytorch_model.bin", CONFIG])
def test_file_that_may_not_be_read_is_told_as_such(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"architecture": SMALL.name, "model_args": dict(SMALL.arguments)}
    save_for_hf(network(), str(tmp_path), model_config=config, safe_serialization=name == WEIGHTS)
    is_open = Path.open

    def denied(path: Path, *how: Any, **given: Any) -> Any:  # chmod stops no root
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return is_open(path, *how, **given)

    monkeypatch.setattr(Path, "open", denied)
    assert refusal(tmp_path) == f"{tmp_path / name}: cannot be read (permission denied); allow it or name another file"


@pytest.mark.parametrize("present", [(), (CONFIG,), (WEIGHTS,)])
def test_folder_that_is_no_model_is_refused(tmp_path: Path, present: tuple[str, ...]) -> None:
    for name in present:
        (tmp_path / name).write_text("{}")
    assert f"expected {CONFIG} and {WEIGHTS}" in refusal(tmp_path)


def test_folder_of_an_export_names_its_file_and_who_takes_it(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    assert f"evaluate takes {tmp_path / 'model.onnx'}, other commands the model that it was" in refusal(tmp_path)


def test_folder_with_the_pickle_of_older_models_is_read_as_timm_reads_it(tmp_path: Path) -> None:
    config = {"architecture": SMALL.name, "model_args": dict(SMALL.arguments)}
    save_for_hf(network(), str(tmp_path / "model"), model_config=config, safe_serialization=False)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [CONFIG, "pytorch_model.bin"]
    assert_same(load_source(str(tmp_path / "model")).state, weights())
    save_file(weights(1), tmp_path / "model" / WEIGHTS)  # where both are, safetensors
    assert_same(load_source(str(tmp_path / "model")).state, weights(1))


@pytest.mark.parametrize("as_one", [False, True], ids=["written again", "one object, as older models"])
def test_folder_with_its_names_elsewhere_is_described_as_timm_reads_it(tmp_path: Path, as_one: bool) -> None:
    config = {"architecture": SMALL.name, "model_args": dict(SMALL.arguments), "label_names": LABELS}
    save_for_hf(network(), str(tmp_path), model_config={**config, "pretrained_cfg": PREPROCESSING})
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    save_for_hf(loaded, str(tmp_path))
    if as_one:
        written = read_json(tmp_path / CONFIG)
        described = written.pop("pretrained_cfg")
        described["labels"] = described.pop("label_names")
        (tmp_path / CONFIG).write_text(json.dumps({**written, **described}))
    source = load_source(str(tmp_path))
    assert source.labels == tuple(loaded.pretrained_cfg["label_names"]) == tuple(LABELS)
    assert {name: source.preprocessing[name] for name in PREPROCESSING} == PREPROCESSING


@pytest.mark.parametrize(
    ("prefix", "others", "said"),
    [
        (
            "model.",
            {"criterion.weight": torch.ones(7)},
            "took the network under 'model', and left out criterion.weight",
        ),
        (
            "visual.trunk.",
            {f"text.{number}": torch.ones(1) for number in range(5)},
            "took the network under 'visual.trunk', and left out text.0, text.1, text.2 and 2 more",
        ),
        ("vit.", {}, "took the network under 'vit'"),
    ],
)
def test_network_beside_others_is_taken_and_said(
    tmp_path: Path, prefix: str, others: dict[str, Tensor], said: str
) -> None:
    torch.save({"state_dict": {**others, **prefixed(prefix)}}, tmp_path / "source.ckpt")
    checkpoint = read_checkpoint(tmp_path / "source.ckpt")
    assert_same(checkpoint.state, weights())
    assert checkpoint.notes == (said,)


def test_network_within_another_is_not_taken_in_its_place(tmp_path: Path) -> None:
    torch.save({**weights(), **prefixed("teacher.")}, tmp_path / "source.pth")
    assert_same(read_checkpoint(tmp_path / "source.pth").state, {**weights(), **prefixed("teacher.")})


def test_layer_scale_under_the_names_of_deit_iii_is_read(tmp_path: Path) -> None:
    state = randomised(tiny(32, 2, 2, init_values=0.1), dtype=torch.float32).state_dict()
    published = {re.sub(r"ls(\d).gamma", r"gamma_\1", name): tensor for name, tensor in state.items()}
    assert "blocks.1.gamma_2" in published
    torch.save({"model": published}, tmp_path / "source.pth")
    assert_same(read_checkpoint(tmp_path / "source.pth").state, state)


@pytest.mark.parametrize("config", ["", "{", "[]", "{}", '{"architecture": 3}'])
def test_folder_with_a_broken_config_is_refused(tmp_path: Path, config: str) -> None:
    save_file(weights(), tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(config)
    assert CONFIG in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "vit"])
def test_folder_of_hugging_faces_is_called_one_before_its_weights_are_read(tmp_path: Path, kind: str) -> None:
    (tmp_path / WEIGHTS).write_text("not read")
    (tmp_path / CONFIG).write_text(json.dumps({"model_type": kind, "architectures": ["Some"]}))
    assert f"of a Hugging Face {kind}, not of timm's; growkit grows timm's plain ViT and DeiT" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "holds no weights"),
        ({"model": {}}, "holds no weights"),
        ({"epoch": 3, "name": "deit"}, "holds no weights (epoch, name: no tensors)"),
        ({**weights(), "epoch": 3}, "holds no weights (epoch: no tensors)"),
        ({"student": weights(), "teacher": weights()}, "holds no weights (student, teacher: no tensors)"),
        ({"state": {0: {"step": 1}}, "param_groups": []}, "holds no weights (state, param_groups: no tensors)"),
        (
            {**prefixed("student.backbone."), **prefixed("teacher.backbone.")},
            "holds several networks (student.backbone, teacher.backbone)",
        ),
        ({**prefixed("module."), **weights(1)}, "holds weights of one name twice, with and without a prefix"),
        ([1, 2], "holds a list"),
        (torch.ones(2), "holds a Tensor"),
        ({"counts": torch.ones(2, dtype=torch.int64)}, "counts is torch.int64"),
        ({**weights(), "head.bias": torch.ones(7, dtype=torch.int8)}, "head.bias is torch.int8"),
        ({"waves": torch.ones(2, dtype=torch.complex64)}, "waves is torch.complex64"),
        ({**weights(), "head.bias": torch.ones(7, device="meta")}, "head.bias of shape (7,) is sparse or lacks values"),
    ],
)
def test_file_without_usable_weights_says_what_it_holds(tmp_path: Path, content: Any, said: str) -> None:
    torch.save(content, tmp_path / "source.pth")
    assert said in refusal(tmp_path / "source.pth")
