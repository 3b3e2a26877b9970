"""A Triton model repository says what the file in it is, and a wrong one is found without a server."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import typer
from deploy_models import ARGUMENTS, NAME, make_model
from onnx import TensorProto, helper, numpy_helper
from timm.models import save_for_hf
from typer.testing import CliRunner, Result

from growkit.deploy.form import KEY, Form
from growkit.deploy.settings import TritonSettings
from growkit.errors import GrowkitError
from growkit_cli.export import export

pytest.importorskip("tritonclient.grpc", reason="needs the triton extra: pip install 'growkit[triton]'")

from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2, service_pb2

from growkit.deploy.triton import check_model_repository, kserve_metadata, refuse_taken, write_model_repository

CLASSES = 5
PLAIN = TritonSettings(name="m")


def write_exported(
    folder: Path,
    *,
    dtype: int = TensorProto.FLOAT,
    dims: tuple[str | int, ...] = ("batch", 3, 4, 4),
    outputs: tuple[str, ...] = ("logits",),
    data: tuple[int, ...] = (1, 3, 4, 4),
    external: bool = False,
    labels: list[str] | None = ["a", "b", "c", "d", "e"],  # noqa: B006  (never changed)
    architecture: str = "vit",
    mean: float = 0.5,
    seed: int = 0,
) -> Path:
    """What `growkit export` leaves: a linear classifier over pooled pixels, with reference data from NumPy."""
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((3, CLASSES)).astype(np.float32)
    batch = dims[0]
    shapes: dict[str, tuple[int, tuple[str | int, ...]]] = {
        "logits": (TensorProto.FLOAT, (batch, CLASSES)),
        "probabilities": (TensorProto.FLOAT, (batch, CLASSES)),
        "values": (TensorProto.FLOAT, (batch, 2)),
        "indices": (TensorProto.INT64, (batch, 2)),
        "best": (TensorProto.INT64, (batch,)),
    }
    nodes = [
        helper.make_node("Cast", ["pixels"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["x", "axes"], ["pooled"], keepdims=0),
        helper.make_node("MatMul", ["pooled", "weight"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
        helper.make_node("TopK", ["logits", "two"], ["values", "indices"]),
        helper.make_node("ArgMax", ["logits"], ["best"], axis=1, keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("pixels", dtype, dims)],
        [helper.make_tensor_value_info(name, *shapes[name]) for name in outputs],
        [
            numpy_helper.from_array(weight, "weight"),
            numpy_helper.from_array(np.array([2, 3]), "axes"),
            numpy_helper.from_array(np.array([2]), "two"),
        ],
    )
    proto = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 18)])
    props = {
        "growkit.provenance": json.dumps({"architecture": architecture}),
        "preprocessing": json.dumps({"input_size": [3, 4, 4], "mean": [mean] * 3, "std": [0.5] * 3}),
    }
    helper.set_model_props(proto, props | ({"labels": json.dumps(labels)} if labels is not None else {}))
    (folder / "test_data_set_0").mkdir(parents=True)
    beside = {"save_as_external_data": True, "location": "model.onnx.data", "size_threshold": 70} if external else {}
    onnx.save_model(proto, folder / "model.onnx", **beside)
    pixels = generator.integers(0, 255, data).astype(helper.tensor_dtype_to_np_dtype(dtype))
    logits = pixels.astype(np.float32).mean((2, 3)) @ weight
    for stem, value in (("input_0", pixels), ("output_0", logits.astype(np.float32))):
        (folder / "test_data_set_0" / f"{stem}.pb").write_bytes(numpy_helper.from_array(value).SerializeToString())
    return folder


def config_of(folder: Path) -> Any:
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A model's folder, as it was written."""
    exported = write_exported(tmp_path / "onnx")
    return write_model_repository(exported, tmp_path / "models", PLAIN).folder


def test_repository_holds_what_triton_reads_and_nothing_else(written: Path) -> None:
    names = sorted(p.relative_to(written).as_posix() for p in written.rglob("*") if p.is_file())
    assert names == ["1/model.onnx", "config.pbtxt", "labels.txt", "metadata.json", "warmup/input_0.bin"]
    assert (written / "labels.txt").read_text() == "a\nb\nc\nd\ne\n"
    config = config_of(written)
    assert (config.name, config.backend, config.max_batch_size) == ("m", "onnxruntime", 32)
    assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [
        ("pixels", model_config_pb2.TYPE_FP32, [3, 4, 4])
    ]
    assert [(o.name, list(o.dims), o.label_filename) for o in config.output] == [("logits", [CLASSES], "labels.txt")]
    assert [(g.count, g.kind) for g in config.instance_group] == [(1, model_config_pb2.ModelInstanceGroup.KIND_CPU)]
    assert config.HasField("dynamic_batching")
    assert config.version_policy.latest.num_versions == 2
    assert [(w.batch_size, list(w.inputs)) for w in config.model_warmup] == [(1, ["pixels"]), (32, ["pixels"])]


def test_settings_reach_the_config(tmp_path: Path) -> None:
    settings = TritonSettings(name="x.1-b_c", version=3, max_batch=6, queue_delay=250, instances=2, kind="gpu")
    model = write_model_repository(write_exported(tmp_path / "onnx"), tmp_path / "models", settings)
    config = config_of(model.folder)
    assert model.folder == tmp_path / "models" / "x.1-b_c"
    assert (model.folder / "3" / "model.onnx").is_file()
    assert config.max_batch_size == config.model_warmup[1].batch_size == 6
    assert config.dynamic_batching.max_queue_delay_microseconds == 250
    (group,) = config.instance_group
    assert (group.count, group.kind) == (2, model_config_pb2.ModelInstanceGroup.KIND_GPU)


def test_batch_of_one_needs_no_batcher(tmp_path: Path) -> None:
    settings = TritonSettings(name="m", max_batch=1)
    config = config_of(write_model_repository(write_exported(tmp_path / "onnx"), tmp_path, settings).folder)
    assert (config.max_batch_size, config.HasField("dynamic_batching"), len(config.model_warmup)) == (1, False, 1)


KINDS_OF_FILE = {
    "float16": {"dtype": TensorProto.FLOAT16},
    "bytes": {"dtype": TensorProto.UINT8},
    "double": {"dtype": TensorProto.DOUBLE},
    "batch of 5 in the reference": {"data": (5, 3, 4, 4)},
    "free height and width": {"dims": ("n", 3, "h", "w"), "data": (1, 3, 8, 6)},
    "fixed batch": {"dims": (4, 3, 4, 4), "data": (4, 3, 4, 4)},
    "several outputs": {"outputs": ("logits", "probabilities", "values", "indices")},
    "one number each": {"outputs": ("best",)},
    "fixed batch, one number each": {"dims": (2, 3, 4, 4), "data": (2, 3, 4, 4), "outputs": ("best",)},
    "weights beside": {"external": True},
    "no labels": {"labels": None},
}


@pytest.mark.parametrize("kind", KINDS_OF_FILE)
def test_any_file_is_described_as_onnxruntime_sees_it(kind: str, tmp_path: Path) -> None:
    exported = write_exported(tmp_path / "onnx", **KINDS_OF_FILE[kind])  # type: ignore[arg-type]
    folder = write_model_repository(exported, tmp_path / "models", PLAIN).folder
    assert check_model_repository(folder) == []
    file = folder / "1" / "model.onnx"
    file = file / "model.onnx" if file.is_dir() else file
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    metadata = json.loads((folder / "metadata.json").read_text())
    words = {"float": "FP32", "float16": "FP16", "double": "FP64", "uint8": "UINT8", "int64": "INT64"}
    for told, values in ((metadata["inputs"], session.get_inputs()), (metadata["outputs"], session.get_outputs())):
        seen = [
            (v.name, words[v.type[7:-1]], [d if isinstance(d, int) else -1 for d in v.shape]) for v in values
        ]  # Triton gives one number a dim of its own where the batch is free
        seen = [(name, word, [-1, 1] if shape == [-1] else shape) for name, word, shape in seen]
        assert [(t["name"], t["datatype"], t["shape"]) for t in told] == seen
    # the warm-up's bytes, read as the config says, are a request that the file answers as the reference does
    (warm, *_) = config_of(folder).model_warmup
    given = warm.inputs["pixels"]
    raw = np.frombuffer(
        (folder / "warmup" / given.input_data_file).read_bytes(),
        {"FP32": np.float32, "FP16": np.float16, "FP64": np.float64, "UINT8": np.uint8}[
            metadata["inputs"][0]["datatype"]
        ],
    )
    batched = config_of(folder).max_batch_size > 0
    answers = session.run(None, {"pixels": raw.reshape([1, *given.dims] if batched else list(given.dims))})
    reference = numpy_helper.to_array(onnx.load_tensor(str(exported / "test_data_set_0" / "output_0.pb")))
    first = {value.name: answer for value, answer in zip(session.get_outputs(), answers, strict=True)}
    if "logits" in first:
        np.testing.assert_allclose(first["logits"], reference[: len(first["logits"])], rtol=1e-5)
    else:
        np.testing.assert_array_equal(first["best"], reference[: len(first["best"])].argmax(1))


def test_fixed_batch_is_served_without_batching(tmp_path: Path) -> None:
    exported = write_exported(tmp_path / "onnx", dims=(4, 3, 4, 4), data=(4, 3, 4, 4))
    config = config_of(write_model_repository(exported, tmp_path, PLAIN).folder)
    assert (config.max_batch_size, config.HasField("dynamic_batching")) == (0, False)
    assert list(config.input[0].dims) == [4, 3, 4, 4]
    assert [w.batch_size for w in config.model_warmup] == [1]


@pytest.mark.parametrize(("batch", "labels"), [(1, "labels.txt"), (4, "")])
def test_labels_of_a_fixed_batch_fit_one_image_alone(batch: int, labels: str, tmp_path: Path) -> None:
    # Triton ranks the 4 x 5 numbers of such an output together: class 11 would be the second image's 1
    exported = write_exported(tmp_path / "onnx", dims=(batch, 3, 4, 4), data=(batch, 3, 4, 4))
    folder = write_model_repository(exported, tmp_path, PLAIN).folder
    assert config_of(folder).output[0].label_filename == labels
    assert (folder / "labels.txt").exists() == bool(labels)


def test_labels_go_to_scores_of_all_classes_alone(tmp_path: Path) -> None:
    outputs = ("logits", "probabilities", "values", "indices")
    config = config_of(write_model_repository(write_exported(tmp_path / "a", outputs=outputs), tmp_path, PLAIN).folder)
    assert [o.label_filename for o in config.output] == ["labels.txt", "labels.txt", "", ""]
    named = write_exported(tmp_path / "b", labels=["two\nlines", " b", "", "d", "é"])
    folder = write_model_repository(named, tmp_path / "other", PLAIN).folder
    assert (folder / "labels.txt").read_text(encoding="utf-8") == "two lines\nb\n\nd\né\n"
    ranked = write_exported(tmp_path / "c", outputs=("values", "indices"), labels=["a", "b"])
    proto = onnx.load(ranked / "model.onnx")
    proto.metadata_props.add(key=KEY, value=Form(output="top-2").text())
    onnx.save(proto, ranked / "model.onnx")
    folder = write_model_repository(ranked, tmp_path / "ranked", PLAIN).folder
    assert [o.label_filename for o in config_of(folder).output] == ["", ""]  # the first value is not class a's


def test_weights_beside_the_file_make_a_folder_named_as_the_file(tmp_path: Path) -> None:
    folder = write_model_repository(write_exported(tmp_path / "onnx", external=True), tmp_path, PLAIN).folder
    assert sorted(p.name for p in (folder / "1" / "model.onnx").iterdir()) == ["model.onnx", "model.onnx.data"]


def test_weights_cut_short_are_found(tmp_path: Path) -> None:
    folder = write_model_repository(write_exported(tmp_path / "onnx", external=True), tmp_path, PLAIN).folder
    data = folder / "1" / "model.onnx" / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    (problem,) = check_model_repository(folder)
    assert "model.onnx.data is missing or too short for weight" in problem


def test_metadata_follows_the_published_protocol(written: Path) -> None:
    metadata = json.loads((written / "metadata.json").read_text())
    message = json_format.ParseDict(metadata, service_pb2.ModelMetadataResponse())
    assert (message.name, list(message.versions), message.platform) == ("m", ["1"], "onnxruntime_onnx")
    assert list(message.inputs[0].shape) == [-1, 3, 4, 4]
    with pytest.raises(json_format.ParseError):
        json_format.ParseDict({**metadata, "dims": []}, service_pb2.ModelMetadataResponse())
    told = kserve_metadata(config_of(written), [1, 2, 3], platform="onnx_onnxv1")
    assert (told["platform"], told["versions"]) == ("onnx_onnxv1", ["2", "3"])


@pytest.mark.parametrize(
    ("policy", "loaded"),
    [
        ("specific: { versions: [ 1, 7 ] }", ["1"]),
        ("specific: { versions: [ 1, 3 ] }", ["1", "3"]),
        ("all: { }", ["1", "2", "3"]),
        ("latest: { num_versions: 1 }", ["3"]),
        (None, ["3"]),
    ],
)
def test_versions_served_are_those_of_the_policy(
    policy: str | None, loaded: list[str], written: Path, tmp_path: Path
) -> None:
    """By Triton's documentation: what is pinned and there, all, or the newest; the newest alone by default."""
    text = (written / "config.pbtxt").read_text()
    own = "version_policy {\n  latest {\n    num_versions: 2\n  }\n}\n"
    assert own in text
    (written / "config.pbtxt").write_text(text.replace(own, f"version_policy: {{ {policy} }}\n" if policy else ""))
    told = []
    for version in (3, 2):
        model = write_model_repository(
            write_exported(tmp_path / str(version)), written.parent, TritonSettings(name="m", version=version)
        )
        told.append(any(f"no server loads version {version}:" in remark for remark in model.remarks))
    assert json.loads((written / "metadata.json").read_text())["versions"] == loaded
    assert told == ["3" not in loaded, "2" not in loaded]
    assert check_model_repository(written) == []


def change(edit: Callable[[Any], Any]) -> Callable[[Path], None]:
    """An edit of config.pbtxt."""

    def changed(folder: Path) -> None:
        config = config_of(folder)
        edit(config)
        (folder / "config.pbtxt").write_text(text_format.MessageToString(config))

    return changed


def replaced(name: str, **options: Any) -> Callable[[Path], None]:
    """Another model in the place of version 1."""

    def changed(folder: Path) -> None:
        other = write_exported(folder.parent / "another", **options)
        (folder / "1" / name).write_bytes((other / "model.onnx").read_bytes())

    return changed


def displaced(folder: Path) -> None:
    """Weights beside the file, at an offset that is no number."""
    replaced("model.onnx", external=True)(folder)
    file = folder / "1" / "model.onnx"
    proto = onnx.load_model(str(file), load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "x" if entry.key == "offset" else entry.value
    file.write_bytes(proto.SerializeToString())


WARMUP = "warmup/input_0.bin"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.pbtxt").unlink(), "config.pbtxt"),
    "unknown field": (lambda f: (f / "config.pbtxt").write_text("colour: 1"), 'no field named "colour"'),
    "other name": (change(lambda c: setattr(c, "name", "n")), "name 'n' in a folder called 'm'"),
    "other backend": (change(lambda c: setattr(c, "backend", "tensorrt")), "backend 'tensorrt'"),
    "no version": (lambda f: (f / "1").rename(f / "01"), "no version"),
    "no file": (lambda f: (f / "1/model.onnx").unlink(), "no such file"),
    "no ONNX": (lambda f: (f / "1/model.onnx").write_bytes(b"weights"), "not a readable ONNX file"),
    "batch among the dims": (change(lambda c: c.input[0].dims.insert(0, -1)), "of shape [-1, -1, 3, 4, 4]"),
    "wrong size": (change(lambda c: c.input[0].dims.__setitem__(1, 8)), "of shape [-1, 3, 8, 4]"),
    "zero": (change(lambda c: c.input[0].dims.__setitem__(1, 0)), "-1 or at least 1"),
    "wrong type": (change(lambda c: setattr(c.input[0], "data_type", 2)), "of type UINT8, the file has FP32"),
    "wrong output": (change(lambda c: setattr(c.output[0], "name", "scores")), "['scores'], the file has ['logits']"),
    "more classes": (change(lambda c: c.output[0].dims.__setitem__(0, 6)), "output 'logits' of shape [-1, 6]"),
    "fixed batch": (replaced("model.onnx", dims=(1, 3, 4, 4)), "not every tensor of the file has a free batch"),
    "lost weights": (replaced("model.onnx", external=True), "model.onnx.data is missing or too short"),
    "displaced weights": (displaced, "weight lies nowhere in the file beside it"),
    "large preference": (
        change(lambda c: c.dynamic_batching.preferred_batch_size.append(64)),
        "preferred_batch_size 64 is not in 1..32",
    ),
    "no group": (change(lambda c: c.ClearField("instance_group")), "no instance_group"),
    "no instance": (change(lambda c: setattr(c.instance_group[0], "count", 0)), "instance_group of 0"),
    "negative batch": (change(lambda c: setattr(c, "max_batch_size", -1)), "is negative"),
    "batcher without batch": (change(lambda c: setattr(c, "max_batch_size", 0)), "dynamic_batching without"),
    "short warm-up": (lambda f: (f / WARMUP).write_bytes((f / WARMUP).read_bytes()[:-1]), "191 bytes, not 192"),
    "long warm-up": (lambda f: (f / WARMUP).write_bytes((f / WARMUP).read_bytes() * 2), "384 bytes, not 192"),
    "no warm-up": (lambda f: (f / WARMUP).unlink(), "input_0.bin is missing"),
    "large warm-up": (change(lambda c: setattr(c.model_warmup[1], "batch_size", 33)), "33 requests, at most 32"),
    "warm-up of other shape": (
        change(lambda c: c.model_warmup[0].inputs["pixels"].dims.append(1)),
        "'pixels' is FP32 [3, 4, 4, 1]",
    ),
    "warm-up of nothing": (change(lambda c: c.model_warmup[0].ClearField("inputs")), "gives [], the model takes"),
    "lost label": (lambda f: (f / "labels.txt").write_text("a\nb\nc\nd\n"), "4 lines for 'logits'"),
    "one label more": (lambda f: (f / "labels.txt").write_text("a\nb\nc\nd\ne\nf\n"), "6 lines for 'logits'"),
    "no labels": (lambda f: (f / "labels.txt").unlink(), "labels.txt of 'logits' is not in the model's folder"),
    "labels in Latin-1": (lambda f: (f / "labels.txt").write_bytes(b"a\nb\nc\nd\n\xe9\n"), "labels.txt: not in UTF-8"),
    "labels outside": (
        change(lambda c: setattr(c.output[0], "label_filename", "../../onnx/model.onnx")),
        "is not in the model's folder",
    ),
    "old metadata": (lambda f: (f / "1").rename(f / "2"), "metadata.json: not what"),
    "no metadata": (lambda f: (f / "metadata.json").unlink(), "metadata.json"),
}


def test_clean_repository_passes(written: Path) -> None:
    assert check_model_repository(written) == []


@pytest.mark.parametrize("defect", BROKEN)
def test_defect_is_found_and_named(defect: str, written: Path) -> None:
    damage, phrase = BROKEN[defect]
    damage(written)
    problems = check_model_repository(written)
    assert [line for line in problems if phrase in line], problems


def test_second_version_goes_beside_the_first(written: Path, tmp_path: Path) -> None:
    (written / "config.pbtxt").write_text((written / "config.pbtxt").read_text() + "# tuned by hand\n")
    other = write_exported(tmp_path / "new")
    model = write_model_repository(other, written.parent, TritonSettings(name="m", version=2))
    assert not model.configured
    assert (written / "1" / "model.onnx").is_file()
    assert (written / "2" / "model.onnx").read_bytes() == (other / "model.onnx").read_bytes()
    assert "tuned by hand" in (written / "config.pbtxt").read_text()
    assert json.loads((written / "metadata.json").read_text())["versions"] == ["1", "2"]
    assert check_model_repository(written) == list(model.remarks) == []
    copied = Path(shutil.copytree(written, tmp_path / "copied"))  # which Triton refuses under the name in its config
    model = write_model_repository(other, copied.parent, TritonSettings(name="copied", version=3))
    assert model.remarks == ("config.pbtxt: name 'm' in a folder called 'copied'",)


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"labels": list("abcde")[::-1]}, "class names"),
        ({"dtype": TensorProto.UINT8}, "of type FP32, the file has UINT8"),
        ({"dims": ("batch", 3, 8, 8)}, "of shape"),
        ({"outputs": ("logits", "best")}, "outputs"),
    ],
)
def test_version_of_another_kind_is_refused(
    options: dict[str, Any], phrase: str, written: Path, tmp_path: Path
) -> None:
    other = write_exported(tmp_path / "new", **options)
    with pytest.raises(GrowkitError, match=r"another kind of model.*--triton-name") as raised:
        write_model_repository(other, written.parent, TritonSettings(name="m", version=2))
    assert phrase in str(raised.value)
    assert not (written / "2").exists()


def test_existing_version_is_replaced_only_with_force(written: Path, tmp_path: Path) -> None:
    other = write_exported(tmp_path / "new", dtype=TensorProto.UINT8)
    for force in (False, True):  # --force is given for the exported folder, too
        with pytest.raises(GrowkitError, match=r"holds version 1 already; --triton-version 2 adds .* with --force"):
            write_model_repository(other, written.parent, PLAIN, force=force)
    first = TritonSettings(name="m", version=1)
    with pytest.raises(GrowkitError, match=r"already exists; --triton-version 2 adds .* --force"):
        write_model_repository(other, written.parent, first)
    before = {p: p.read_bytes() for p in written.rglob("*") if p.is_file()}
    with pytest.raises(GrowkitError, match=r"another kind of model: input 'pixels' of type FP32, .*, or move it away"):
        write_model_repository(other, written.parent, first, force=True)
    assert {p: p.read_bytes() for p in written.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("versions", [(), (1,), (1, 2)], ids=["no version", "its only version", "one of two"])
def test_what_is_tuned_by_hand_is_kept_however_many_versions_there_are(
    versions: tuple[int, ...], written: Path, tmp_path: Path
) -> None:
    shutil.rmtree(written / "1")
    for version in versions:
        write_model_repository(tmp_path / "onnx", written.parent, TritonSettings(name="m", version=version))
    change(lambda config: setattr(config.instance_group[0], "count", 4))(written)
    (written / "README").write_text("mine")
    tuned = (written / "config.pbtxt").read_bytes()
    other = write_exported(tmp_path / "new", mean=0.1 if len(versions) < 2 else 0.5, seed=1)
    settings = TritonSettings(name="m", version=1, max_batch=4)
    model = write_model_repository(other, written.parent, settings, force=bool(versions))
    assert not model.configured
    assert (written / "1" / "model.onnx").read_bytes() == (other / "model.onnx").read_bytes()
    assert (written / "2").exists() == (2 in versions)
    assert (written / "config.pbtxt").read_bytes() == tuned
    assert (written / "README").read_text() == "mine"
    assert check_model_repository(written) == []


def test_version_whose_images_are_prepared_otherwise_is_refused(written: Path, tmp_path: Path) -> None:
    """Clients would go on preparing them as before, and nothing would tell them."""
    other = write_exported(tmp_path / "new", mean=0.1)
    with pytest.raises(GrowkitError, match=r"m/1 wants images prepared otherwise: mean \[0\.5.*not \[0\.1.*-name"):
        write_model_repository(other, written.parent, TritonSettings(name="m", version=2))
    assert not (written / "2").exists()
    settings, same = (
        TritonSettings(name="m", version=2),
        {"mean": (0.5, 0.5, 0.5), "crop_pct": 0.9, "input_size": (3, 9, 9)},
    )
    refuse_taken(written.parent, "m", settings, force=False, prepared=same)  # what one does not say is no difference
    with pytest.raises(GrowkitError, match="wants images prepared otherwise: mean"):
        refuse_taken(written.parent, "m", settings, force=False, prepared={"mean": (0.5, 0.5, 0.6)})
    (written / "3").mkdir()  # somebody's own
    with pytest.raises(GrowkitError, match="m/1 wants images prepared otherwise: mean"):
        refuse_taken(written.parent, "m", settings, force=False, prepared={"mean": (0.5, 0.5, 0.6)})


def test_file_whose_answers_take_no_class_names_says_nothing_of_them(tmp_path: Path) -> None:
    shape = {"dims": (4, 3, 4, 4), "data": (4, 3, 4, 4)}  # which Triton ranks as a whole
    for version in (1, 2):
        exported = write_exported(tmp_path / str(version), **shape)
        model = write_model_repository(exported, tmp_path / "models", TritonSettings(name="m", version=version))
        assert not (model.folder / "labels.txt").exists()
        assert model.remarks == ()


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [(None, list("abcde"), "its class names are not served"), (list("abcde"), None, "its answers go by the names in")],
)
def test_class_names_that_are_not_the_versions_own_are_told(
    before: list[str] | None, after: list[str] | None, told: str, tmp_path: Path
) -> None:
    first, second = (write_exported(tmp_path / str(n), labels=labels) for n, labels in enumerate((before, after)))
    assert write_model_repository(first, tmp_path / "models", PLAIN).remarks == ()
    model = write_model_repository(second, tmp_path / "models", TritonSettings(name="m", version=2))
    assert [told in remark for remark in model.remarks] == [True]


def test_config_that_cannot_be_read_is_refused_before_the_work(written: Path) -> None:
    text = (written / "config.pbtxt").read_text()
    (written / "config.pbtxt").write_text(text.replace("version_policy {", "version_policy: { }"))
    with pytest.raises(GrowkitError, match=r"config\.pbtxt: not a model configuration .*; mend it, or move"):
        refuse_taken(written.parent, "m", TritonSettings(name="m", version=2), force=True)


def test_folder_that_is_no_model_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "models" / "m").mkdir(parents=True)
    (tmp_path / "models" / "m" / "notes.txt").write_text("mine")
    exported = write_exported(tmp_path / "onnx")
    for force, says in ((False, "already exists"), (True, r"not growkit's to replace: it holds no config\.pbtxt")):
        with pytest.raises(GrowkitError, match=says):
            write_model_repository(exported, tmp_path / "models", PLAIN, force=force)
    assert (tmp_path / "models" / "m" / "notes.txt").read_text() == "mine"


def test_name_is_the_architectures_when_left_out(tmp_path: Path) -> None:
    exported = write_exported(tmp_path / "onnx", architecture="deit_base_patch16_224")
    assert write_model_repository(exported, tmp_path, TritonSettings()).folder.name == "deit_base_patch16_224"


@pytest.mark.parametrize(
    ("settings", "phrase"),
    [
        ({"name": "a/b"}, "'a/b' is no Triton model name"),
        ({"name": ".hidden"}, "no Triton model name"),
        ({"name": "m", "kind": "tpu"}, "--triton-kind tpu: unknown; choose cpu or gpu"),
        ({"name": "m", "max_batch": 0}, "--triton-max-batch 0: expected 1 or more"),
        ({"name": "m", "instances": 0}, "--triton-instances 0"),
        ({"name": "m", "version": 0}, "--triton-version 0"),
        ({"name": "m", "queue_delay": -1}, "--triton-queue-delay -1"),
    ],
)
def test_setting_out_of_range_is_refused_in_its_options_words(
    settings: dict[str, Any], phrase: str, tmp_path: Path
) -> None:
    with pytest.raises(GrowkitError) as raised:
        write_model_repository(write_exported(tmp_path / "onnx"), tmp_path / "models", TritonSettings(**settings))
    assert phrase in str(raised.value)
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("spoil", "phrase"),
    [
        (lambda e: (e / "test_data_set_0" / "input_0.pb").unlink(), "input_0.pb: not a readable ONNX tensor"),
        (lambda e: (e / "test_data_set_0").rename(e / "elsewhere"), "no test_data_set_* fits"),
        (lambda e: (e / "model.onnx").unlink(), "no such file; `growkit export --onnx` writes it"),
        (lambda e: (e / "model.onnx.data").unlink(), "weights beside it are unreadable (model.onnx.data is missing)"),
    ],
)
def test_incomplete_export_leaves_nothing_in_the_repository(
    spoil: Callable[[Path], Any], phrase: str, tmp_path: Path
) -> None:
    exported = write_exported(tmp_path / "onnx", external=True)
    spoil(exported)
    with pytest.raises(GrowkitError) as raised:
        write_model_repository(exported, tmp_path / "models", PLAIN)
    assert phrase in str(raised.value)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.glob("models/*")) + list(tmp_path.glob("models/.*")) == []


def test_reference_data_of_another_shape_or_type_is_refused(tmp_path: Path) -> None:
    for index, options in enumerate(({"data": (1, 3, 5, 5)}, {"dims": (2, 3, 4, 4)})):
        with pytest.raises(GrowkitError, match="fits the file's input"):
            write_model_repository(write_exported(tmp_path / str(index), **options), tmp_path, PLAIN)  # type: ignore[arg-type]


def test_type_that_triton_does_not_serve_is_named(tmp_path: Path) -> None:
    with pytest.raises(GrowkitError, match="'pixels' is of type FLOAT8E4M3FN"):
        write_model_repository(write_exported(tmp_path / "onnx", dtype=TensorProto.FLOAT8E4M3FN), tmp_path, PLAIN)


app = typer.Typer()
app.command()(export)


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["--exporter", "torchscript", *map(str, arguments)])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "grown"
    kept = {k: v for k, v in ARGUMENTS.items() if k != "num_classes"}
    config = {"architecture": NAME, "model_args": kept, "label_names": list("abcdefg")}
    save_for_hf(make_model(0), str(folder), model_config=config, safe_serialization=True)
    return folder


def test_export_writes_the_repository_after_the_folder(source: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    result = call("--run", tmp_path / "run", source, "--triton", models, "--triton-max-batch", "4")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "onnx" / "export.json").is_file()
    assert check_model_repository(models / NAME) == []
    assert config_of(models / NAME).max_batch_size == 4
    assert f"wrote {models / NAME / '1'}" in result.output
    before = sorted(p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*"))
    refused = call("--run", tmp_path / "run", source, "-o", tmp_path / "again", "--triton", models)
    assert "--triton-version 2" in str(refused.exception)
    assert not (tmp_path / "again").exists()  # said before the work, not after it
    assert before == sorted(p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*"))


def test_options_of_a_config_that_is_kept_are_told(source: Path, tmp_path: Path) -> None:
    words = ("--run", tmp_path / "run", source, "--force", "--triton", tmp_path / "models", "--triton-version", "1")
    for more in ((), ("--triton-max-batch", "4", "--triton-kind", "gpu")):
        result = call(*words, *more)
        assert result.exit_code == 0, result.output
        told = "warning: --triton-max-batch, --triton-kind mean nothing to a config.pbtxt that is kept"
        assert (told in result.output.replace("\n", " ")) == bool(more)
        assert ("config.pbtxt was kept" in result.output.replace("\n", " ")) == bool(more)
    assert config_of(tmp_path / "models" / NAME).max_batch_size == 32


def test_repository_that_cannot_be_is_refused_before_the_export(source: Path, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file, where a folder should be")
    result = call("--run", tmp_path / "run", source, "--triton", tmp_path / "models")
    assert isinstance(result.exception, GrowkitError)
    assert "cannot be written (not a directory)" in str(result.exception)
    assert not (tmp_path / "run" / "onnx").exists()


@pytest.mark.parametrize(
    ("out", "models", "said"),
    [
        ("onnx", "onnx/models", "is replaced whole by the next export; name one outside it"),
        ("onnx", "onnx", "is replaced whole by the next export; name one outside it"),
        ("models/vit", "models", "Triton takes every folder in it for a model, also"),
        ("models/other/1", "models", "name another with --out"),
    ],
)
def test_export_and_repository_inside_each_other_are_refused_before_the_work(
    out: str, models: str, said: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("growkit.exporting.load_source", lambda *_, **__: pytest.fail("loaded"))
    words = ("--out", tmp_path / out, "--triton", tmp_path / models, "--triton-name", "vit")
    result = call("--run", tmp_path / "run", source, *words)
    assert isinstance(result.exception, GrowkitError)
    assert said in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_failed_repository_leaves_the_export_and_says_so(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("growkit.deploy.triton.check_model_repository", lambda folder, name: ["no good"])
    result = call("--run", tmp_path / "run", source, "--triton", tmp_path / "models", "--json")
    assert json.loads(result.stdout)["sha256"]
    assert isinstance(result.exception, GrowkitError)
    assert f"{tmp_path / 'run' / 'onnx'} was written, the model repository was not: " in str(result.exception)
    assert (tmp_path / "run" / "onnx" / "export.json").is_file()


def test_without_tritonclient_the_remedy_is_one_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "tritonclient"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tritonclient", None)
    result = call("--run", tmp_path / "run", source, "--triton", tmp_path / "models")
    assert isinstance(result.exception, GrowkitError)
    assert str(result.exception).endswith("pip install 'growkit[triton]'")
    assert not (tmp_path / "run").exists()
