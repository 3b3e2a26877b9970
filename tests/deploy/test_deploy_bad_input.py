"""Bad files given to `growkit verify`: one line, exit 2 for what cannot be used, 1 for a no, and nothing is lost."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import typer
from deploy_models import ARGUMENTS, NAME, make_model
from onnx import TensorProto, helper, numpy_helper
from timm.models import save_for_hf
from typer.testing import CliRunner

from growkit.deploy.data_sets import write_data_sets
from growkit.deploy.export import export_onnx
from growkit.deploy.form import KEY, Form
from growkit.deploy.parity import check_parity
from growkit.errors import GrowkitError
from growkit_cli.export import export
from growkit_cli.verify import verify

app = typer.Typer()
app.command()(export)
app.command()(verify)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a model, and its export with the weights beside it."""
    run = tmp_path_factory.mktemp("job") / "run"
    config = {"architecture": NAME, "model_args": {k: v for k, v in ARGUMENTS.items() if k != "num_classes"}}
    save_for_hf(make_model(), str(run / "grown"), model_config=config, safe_serialization=True)
    result = CliRunner().invoke(
        app, ["export", "--run", str(run), "--external-data", "--exporter", "torchscript"], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return run


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(written, tmp_path / "run"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def verified(run: Path, *more: str | Path) -> tuple[int, str]:
    """Exit status as growkit_cli.main gives it, and what a user reads; nothing but the report is written."""
    before = content(run)
    result = CliRunner().invoke(app, ["verify", "--run", str(run), "--no-latency", *map(str, more)])
    after = content(run)
    if isinstance(result.exception, GrowkitError | OSError):
        assert "\n" not in str(result.exception)
        assert after == before
        return 2, str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    unchanged = {name: data for name, data in before.items() if not name.startswith(("record.json", "verify/"))}
    assert {name: after.get(name) for name in unchanged} == unchanged
    assert set(after) - set(before) <= {"verify/report.json", "verify/reproduce.py"}
    return result.exit_code, result.output


def edited(run: Path, change: Callable[[onnx.ModelProto], None], *, weights: bool = True) -> Path:
    """The export with a change, its weights inside it unless the change is of where they lie."""
    path = run / "onnx" / "model.onnx"
    proto = onnx.load(str(path), load_external_data=weights)
    change(proto)
    path.write_bytes(proto.SerializeToString())
    return path


def test_the_clean_export_passes(run: Path) -> None:
    status, output = verified(run)
    assert status == 0, output
    assert not (run / "verify" / "reproduce.py").exists()


# files that are none ----------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_truncated_file_is_a_no_in_one_line(share: float, run: Path) -> None:
    path = run / "onnx" / "model.onnx"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    status, output = verified(run)
    assert status == 1
    assert len(re.findall("FAILED", output)) == 1, output
    assert "FAILED structure" in output


@pytest.mark.parametrize("change", ["opset", "ir"])
def test_file_of_the_future_is_a_no_in_one_line(change: str, run: Path) -> None:
    def newer(proto: onnx.ModelProto) -> None:
        if change == "opset":
            proto.opset_import[0].version = 99
        else:
            proto.ir_version = 99

    edited(run, newer)
    status, output = verified(run)
    assert status == 1
    assert len(re.findall("FAILED", output)) == 1, output


def test_folder_or_nothing_in_its_place_is_refused(run: Path) -> None:
    status, line = verified(run, "--onnx-file", run / "onnx")
    assert status == 2
    assert line.endswith(f": a folder; give the file in it, as in {run / 'onnx' / 'model.onnx'}")
    status, line = verified(run, "--onnx-file", run / "none.onnx")
    assert status == 2
    assert "growkit export" in line


# weights that lie elsewhere ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    ["../secret.data", "/etc/hostname", "sub/w.data", "..\\secret.data", "C:\\secret.data", "..", ".", "", "a\0b"],
)
def test_weights_outside_the_folder_are_not_read(place: str, run: Path) -> None:
    (run / "secret.data").write_bytes(b"\0" * 2**20)

    def moved(proto: onnx.ModelProto) -> None:
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                entry.value = place if entry.key == "location" else entry.value

    edited(run, moved, weights=False)
    status, line = verified(run)
    assert status == 2
    assert "outside the file's folder; not read" in line


def test_link_to_weights_outside_the_folder_is_not_followed(run: Path) -> None:
    data = run / "onnx" / "model.onnx.data"
    data.rename(run / "elsewhere.data")
    data.symlink_to(run / "elsewhere.data")
    status, line = verified(run)
    assert status == 2
    assert "outside the file's folder" in line


def test_weights_of_a_constant_node_are_held_to_the_folder_too(run: Path) -> None:
    def hidden(proto: onnx.ModelProto) -> None:
        tensor = TensorProto(name="t", dims=[4], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="/etc/hostname")
        proto.graph.node.append(helper.make_node("Constant", [], ["stolen"], value=tensor))

    edited(run, hidden)
    assert verified(run)[0] == 2


@pytest.mark.parametrize("left", [0, 100])
def test_weights_beside_it_missing_or_short_are_refused(left: int, run: Path) -> None:
    data = run / "onnx" / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:left])
    for _ in range(2):
        status, line = verified(run)
        assert status == 2
        assert re.search("its weights beside it are unreadable.*export again", line)
        data.unlink(missing_ok=True)


@pytest.mark.parametrize(("key", "value"), [("offset", "-8"), ("offset", "x"), ("length", "x"), ("length", "-1")])
def test_places_that_are_no_numbers_are_refused(key: str, value: str, run: Path) -> None:
    def nonsense(proto: onnx.ModelProto) -> None:
        tensor = next(t for t in proto.graph.initializer if t.external_data)
        for entry in tensor.external_data:
            entry.value = value if entry.key == key else entry.value

    edited(run, nonsense, weights=False)
    assert verified(run)[0] == 2


# other graphs -----------------------------------------------------------------------------------


def graph(inputs: list[onnx.ValueInfoProto], nodes: list[onnx.NodeProto], outputs: list[onnx.ValueInfoProto]) -> bytes:
    made = helper.make_graph(nodes, "other", inputs, outputs)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8).SerializeToString()


def floats(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


IMAGE = ("batch", 3, 16, 16)
MEAN = [
    helper.make_node("Flatten", ["input"], ["flat"]),
    helper.make_node("ReduceMean", ["flat", "axes"], ["logits"], keepdims=1),
]
OTHERS = {
    "tokens for images": graph(
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])],
        [helper.make_node("Cast", ["input_ids"], ["logits"], to=TensorProto.FLOAT)],
        [floats("logits", "batch", "length")],
    ),
    "two inputs": graph(
        [floats("input", *IMAGE), floats("mask", *IMAGE)],
        [helper.make_node("Mul", ["input", "mask"], ["logits"])],
        [floats("logits", *IMAGE)],
    ),
    "images out": graph(
        [floats("input", *IMAGE)], [helper.make_node("Neg", ["input"], ["logits"])], [floats("logits", *IMAGE)]
    ),
    "other size": graph(
        [floats("input", "batch", 1, 8, 8)],
        [helper.make_node("Flatten", ["input"], ["logits"])],
        [floats("logits", "batch", 64)],
    ),
    "no input": graph(
        [], [helper.make_node("Constant", [], ["logits"], value_floats=[1.0, 2.0])], [floats("logits", 2)]
    ),
    "a sequence in": graph(
        [helper.make_tensor_sequence_value_info("input", TensorProto.FLOAT, None)],
        [helper.make_node("ConcatFromSequence", ["input"], ["logits"], axis=0)],
        [floats("logits", "batch", 7)],
    ),
    "a sequence out": graph(
        [floats("input", *IMAGE)],
        [helper.make_node("SequenceConstruct", ["input"], ["logits"])],
        [helper.make_tensor_sequence_value_info("logits", TensorProto.FLOAT, None)],
    ),
    "words out": graph(
        [floats("input", *IMAGE)],
        [helper.make_node("Cast", ["input"], ["logits"], to=TensorProto.STRING)],
        [helper.make_tensor_value_info("logits", TensorProto.STRING, IMAGE)],
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_graph_of_something_else_is_a_no_without_a_traceback(name: str, run: Path) -> None:
    (run / "onnx" / "model.onnx").write_bytes(OTHERS[name])
    status, output = verified(run)
    assert status == 1, output
    assert "FAILED structure" in output


# metadata ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "claim",
    [
        "no JSON",
        "null",
        "7",
        '"fp32"',
        "[]",
        '{"target": "ort-99"}',
        '{"precision": "fp4"}',
        '{"attention": ["unfused"]}',
        '{"output": 5}',
        '{"output": "top-0"}',
        '{"output": "top-many"}',
        '{"batch": "two"}',
        '{"batch": 1.5}',
        '{"batch": -1}',
        '{"batch": 1000000000000}',
        '{"pixels": "yes"}',
        '{"image_size": 0}',
        '{"image_size": [16, 16]}',
        '{"shape": 3}',
        "[" * 100_000,
    ],
)
def test_form_that_growkit_does_not_write_is_refused_in_one_line(claim: str, run: Path) -> None:
    def claimed(proto: onnx.ModelProto) -> None:
        for entry in proto.metadata_props:
            if entry.key == KEY:
                entry.value = claim

    edited(run, claimed)
    status, line = verified(run)
    assert status == 2, line
    assert "export it again" in line
    assert len(line) < 400


@pytest.mark.parametrize("claim", [{"batch": 4096}, {"image_size": 1024}, {"output": "top-1000000000000"}])
def test_claim_of_a_size_that_the_graph_does_not_have_is_a_no_and_costs_nothing(claim: object, run: Path) -> None:
    def claimed(proto: onnx.ModelProto) -> None:
        for entry in proto.metadata_props:
            if entry.key == KEY:
                entry.value = json.dumps({**json.loads(entry.value), **claim})  # type: ignore[dict-item]

    edited(run, claimed)
    status, output = verified(run)
    assert status == 1
    assert "FAILED structure" in output


@pytest.mark.parametrize("text", ["no JSON", "[" * 100_000, "7", "null"])
def test_metadata_that_cannot_be_read_is_a_no(text: str, run: Path) -> None:
    def unreadable(proto: onnx.ModelProto) -> None:
        for entry in proto.metadata_props:
            if entry.key in ("preprocessing", "growkit.provenance", "labels"):
                entry.value = text

    edited(run, unreadable)
    status, output = verified(run)
    assert status == 1
    assert "FAILED structure: preprocessing" in output


# reference data ---------------------------------------------------------------------------------


def test_another_models_reference_is_a_no(run: Path, tmp_path: Path) -> None:
    write_data_sets(make_model(5), tmp_path / "other", seed=0)
    write_data_sets(make_model(5, num_classes=3), tmp_path / "classes", seed=0)
    write_data_sets(make_model(5, img_size=24), tmp_path / "size", seed=0)
    for name in ("other", "classes", "size"):
        for data_set in ("test_data_set_0", "test_data_set_1"):
            shutil.rmtree(run / "onnx" / data_set)
            shutil.copytree(tmp_path / name / data_set, run / "onnx" / data_set)
        status, output = verified(run)
        assert status == 1, output
        assert "FAILED data sets" in output


def test_unreadable_reference_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert verified(run, "--reference", tmp_path / "empty")[0] == 2
    damaged = run / "onnx" / "test_data_set_0" / "output_0.pb"
    whole = damaged.read_bytes()
    for bad in (whole[: len(whole) // 2], b"", b"no tensor"):
        damaged.write_bytes(bad)
        status, line = verified(run)
        assert status in (1, 2), line
    damaged.unlink()
    assert verified(run)[0] == 2


def test_reference_of_words_or_of_nothing_is_no_traceback(run: Path) -> None:
    place = run / "onnx" / "test_data_set_0"
    words = numpy_helper.from_array(np.array(["a"], dtype=object), "logits")
    (place / "output_0.pb").write_bytes(words.SerializeToString())
    assert verified(run)[0] in (1, 2)
    (place / "input_0.pb").write_bytes(words.SerializeToString())
    assert verified(run)[0] in (1, 2)


def test_exporter_without_words_for_a_part_says_which_one_has_them(tmp_path: Path) -> None:
    with pytest.raises(GrowkitError, match=r"--exporter torchscript: .*rms_norm.*; --exporter dynamo has it"):
        export_onnx(make_model(name="test_vit4"), tmp_path / "m.onnx", Form(exporter="torchscript"))
    assert not list(tmp_path.iterdir())


# pixels that have no place in a graph ------------------------------------------------------------


def test_pixels_of_four_channels_are_refused_for_pillow_blends_them(tmp_path: Path) -> None:
    with pytest.raises(GrowkitError, match="--pixels: the model takes 4 channels"):
        export_onnx(make_model(in_chans=4), tmp_path / "m.onnx", Form(pixels=True, exporter="torchscript"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_pixels_of_every_interpolation_in_a_graph_load_and_pass(mode: str, tmp_path: Path) -> None:
    model = make_model()
    model.pretrained_cfg = {**model.pretrained_cfg, "interpolation": mode}
    export_onnx(model, tmp_path / "m.onnx", Form(pixels=True, exporter="torchscript"))
    parity = check_parity(model, tmp_path / "m.onnx")
    assert parity.passed, [c.line for c in parity.failed]
