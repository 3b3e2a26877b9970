"""What `examples/serve` answers is what PyTorch answers, on images that somebody could have taken."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import nn

from growkit.deploy.export import export_onnx
from growkit.deploy.form import Form

ROOT = Path(__file__).parents[2]
SERVE = ROOT / "examples" / "serve"


def drawing(width: int, height: int, seed: int = 0) -> Image.Image:
    """A lit room with things in it: gradients, edges, blur and fine lines, as photographs have."""
    generator = np.random.default_rng(seed)
    across, down = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    light = np.stack([120 + 90 * across, 90 + 120 * down, 200 - 80 * across * down], axis=-1)
    image = Image.fromarray(light.astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for index in range(12):
        x, y = generator.integers(0, width), generator.integers(0, height)
        radius = int(generator.integers(4, max(5, min(width, height) // 3)))
        colour = tuple(map(int, generator.integers(0, 256, 3)))
        (pen.ellipse if index % 2 else pen.rectangle)((x - radius, y - radius, x + radius, y + radius), fill=colour)
        pen.line((0, int(y), width, int(x) % height), fill=colour, width=1)
    return image.filter(ImageFilter.GaussianBlur(0.7))


@pytest.fixture(scope="module")
def classify() -> Iterator[Any]:
    """The example's module."""
    sys.path.insert(0, str(SERVE))
    import classify

    yield classify
    sys.path.remove(str(SERVE))
    for name in ("classify", "app"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def classifier(classify: Any, exported: Path) -> Any:
    return classify.Classifier(exported, threads=1)


def with_preprocessing(exported: Path, target: Path, **changed: object) -> Path:
    """A copy of the file that wants other preprocessing."""
    proto = onnx.load(str(exported))
    (entry,) = (e for e in proto.metadata_props if e.key == "preprocessing")
    entry.value = json.dumps({**json.loads(entry.value), **changed})
    target.write_bytes(proto.SerializeToString())
    return target


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (37, 101), (16, 16), (9, 300), (500, 375)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest", "lanczos"])
@pytest.mark.parametrize(("crop_mode", "crop_pct"), [("center", 0.9), ("center", 1.0), ("squash", 0.875)])
def test_image_is_prepared_bit_for_bit_as_timm_does(
    size: tuple[int, int],
    interpolation: str,
    crop_mode: str,
    crop_pct: float,
    classify: Any,
    exported: Path,
    tmp_path: Path,
) -> None:
    changed = {"interpolation": interpolation, "crop_mode": crop_mode, "crop_pct": crop_pct}
    prepared = classify.Classifier(with_preprocessing(exported, tmp_path / "m.onnx", **changed), 1)
    wanted = {name: prepared.wanted[name] for name in ("input_size", "mean", "std")}
    transform = timm.data.create_transform(**wanted, **changed, is_training=False)
    image = drawing(*size)
    np.testing.assert_array_equal(prepared.prepare(image)[0], transform(image).numpy())


def test_what_the_example_cannot_prepare_is_refused(classify: Any, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not prepare images as"):
        classify.Classifier(with_preprocessing(exported, tmp_path / "m.onnx", crop_mode="border"))


def test_file_for_several_images_at_a_time_is_refused(classify: Any, edit: Callable[[Any], Path]) -> None:
    four = edit(lambda proto: setattr(proto.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 4))
    with pytest.raises(ValueError, match="takes 4 images at a time"):
        classify.Classifier(four)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_logits_are_pytorchs(mode: str, classifier: Any, model: nn.Module) -> None:
    image = drawing(64, 48).convert(mode)
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**{**config, "input_size": (3, 16, 16)}, is_training=False)
    with torch.inference_mode():
        truth = model(transform(image.convert("RGB"))[None]).numpy()
    answer = classifier.answer(classifier.prepare(image))["logits"]
    assert np.sqrt(((answer - truth) ** 2).mean()) <= 1e-5 * truth.std()
    other = classifier.answer(classifier.prepare(drawing(64, 48, seed=1)))["logits"]
    assert np.sqrt(((other - truth) ** 2).mean()) > 1e-2 * truth.std()  # the images do differ


def test_best_are_softmax_and_labels(classifier: Any, model: nn.Module) -> None:
    image = drawing(64, 48)
    with torch.inference_mode():
        odds = model(torch.from_numpy(classifier.prepare(image))).softmax(1)[0]
    best = classifier.best(image, 3)
    top = odds.topk(3)
    assert [b["class"] for b in best] == top.indices.tolist()
    assert [b["label"] for b in best] == ["abcdefg"[i] for i in top.indices]
    np.testing.assert_allclose([b["probability"] for b in best], top.values, rtol=1e-4)


@pytest.mark.parametrize("form", [{"output": "probabilities"}, {"output": "top-3", "pixels": True}], ids=str)
def test_other_forms_of_the_file_are_answered_alike(
    form: dict[str, Any], classify: Any, classifier: Any, model: nn.Module, tmp_path: Path
) -> None:
    export_onnx(model, tmp_path / "model.onnx", Form(**form), labels=list("abcdefg"))
    image = drawing(64, 48)
    best = classify.Classifier(tmp_path / "model.onnx", 1).best(image, 3)
    plain = classifier.best(image, 3)
    assert [(b["class"], b["label"]) for b in best] == [(b["class"], b["label"]) for b in plain]
    # inside the file the resize is not Pillow's
    np.testing.assert_allclose(
        [b["probability"] for b in best],
        [b["probability"] for b in plain],
        rtol=0.05 if "pixels" in form else 1e-5,
    )


def test_example_needs_neither_torch_nor_growkit() -> None:
    program = "import sys, classify; print(sorted({'torch', 'timm', 'onnx', 'growkit'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=SERVE, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_python_of_the_page_runs(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classify: Any
) -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    block = next(b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "from classify import" in b)
    (tmp_path / "run" / "onnx").mkdir(parents=True)
    (tmp_path / "run" / "onnx" / "model.onnx").write_bytes(exported.read_bytes())
    drawing(64, 48).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(block, "serving.md", "exec"), names)
    assert len(names["best"]) == 5


@pytest.fixture
def client(classify: Any, exported: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    pytest.importorskip("fastapi", reason="needs the test extra's fastapi")
    pytest.importorskip("httpx", reason="needs the test extra's httpx")
    from fastapi.testclient import TestClient

    monkeypatch.setenv("MODEL", str(exported))
    monkeypatch.setenv("THREADS", "1")
    import app

    monkeypatch.setattr(app, "MAX_BYTES", 30_000)
    monkeypatch.setattr(app, "MAX_PIXELS", 64 * 64)
    with TestClient(app.app) as running:
        yield running


def bytes_of(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def test_service_answers_as_the_model(client: Any, classifier: Any) -> None:
    image = drawing(64, 48)
    response = client.post("/classify?count=3", content=bytes_of(image))
    assert response.status_code == 200
    assert response.json() == {"best": classifier.best(image, 3)}
    assert client.get("/ready").status_code == 200


def test_service_says_503_before_the_model_is_loaded(client: Any) -> None:
    client.app.state.classifier = None
    assert client.get("/ready").status_code == 503


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"", 400, "not a readable image"),
        (b"no image", 400, "not a readable image"),
        (bytes_of(drawing(40, 40))[:-40], 400, "not a readable image"),
        (b"x" * 30_001, 413, "at most 30000 bytes"),
        (bytes_of(Image.new("RGB", (65, 64))), 413, "at most 4096 pixels"),
    ],
    ids=["nothing", "no image", "cut short", "too many bytes", "too many pixels"],
)
def test_bad_upload_gets_a_plain_answer(body: bytes, status: int, said: str, client: Any) -> None:
    response = client.post("/classify", content=body)
    assert response.status_code == status
    assert said in response.json()["detail"]


@pytest.mark.parametrize("parallel", ["0", "-1"])
def test_service_that_could_never_answer_does_not_start(
    parallel: str, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARALLEL", parallel)
    with pytest.raises(ValueError, match=f"PARALLEL={parallel}: expected 1 or more"), type(client)(client.app):
        pass


def test_upload_without_a_length_is_bounded_too(client: Any) -> None:
    response = client.post("/classify", content=iter([b"x" * 10_000] * 10))
    assert response.status_code == 413


def test_example_says_in_a_line_what_it_cannot_open(exported: Path, tmp_path: Path) -> None:
    drawing(16, 16, seed=0).save(tmp_path / "photo.png")
    for model, photo, said in (
        (exported.parent, "photo.png", f"{exported.parent}: ONNX Runtime does not open it ("),
        (exported, "none.png", "none.png: no readable picture ("),
    ):
        command = [sys.executable, SERVE / "classify.py", model, photo]
        done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(said)
        assert done.stderr.count("\n") == 1
