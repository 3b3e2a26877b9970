"""What a user's own test suite holds a model against, in two lines."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from pairs import published_scale, tiny
from timm.models import save_for_hf
from torch import nn

from growkit.deploy.export import export_onnx
from growkit.deploy.form import Form
from growkit.deploy.golden import make_golden, write_golden
from growkit.deploy.subject import model_subject, onnx_subject
from growkit.errors import GrowkitError
from growkit.testing import assert_matches_reference


def build(seed: int = 0) -> nn.Module:
    return published_scale(tiny(32, 2, 2), seed=seed).eval()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, a bare checkpoint and an ONNX file, with references of model and file."""
    root = tmp_path_factory.mktemp("place")
    model = build()
    config = {"architecture": "vit_tiny_patch16_224", "model_args": dict(tiny(32, 2, 2).arguments)}
    del config["model_args"]["num_classes"]
    save_for_hf(model, str(root / "model"), model_config=config, safe_serialization=True)
    export_onnx(model, root / "model.onnx", Form(exporter="torchscript"))  # the faster one
    write_golden(root / "of-model", make_golden(model_subject(model), seed=0))
    write_golden(root / "of-file", make_golden(onnx_subject(root / "model.onnx"), seed=0))
    return root


def test_folder_module_and_file_match(place: Path) -> None:
    assert_matches_reference(place / "model", place / "of-model")
    assert_matches_reference(str(place / "model"), str(place / "of-file"))
    assert_matches_reference(place / "model.onnx", place / "of-file")
    assert_matches_reference(place / "model.onnx", place / "of-model")
    assert_matches_reference(build(), place / "of-model")


def test_other_weights_are_an_assertion_error_with_a_line_for_each_check(place: Path) -> None:
    moved = build()
    with torch.no_grad():
        moved.blocks[0].mlp.fc1.weight[3, 5] *= 1.01
    with pytest.raises(AssertionError) as caught:
        assert_matches_reference(moved, place / "of-model")
    first, *lines = str(caught.value).splitlines()
    assert first == f"VisionTransformer does not match {place / 'of-model'}:"
    assert lines[0].startswith("the reference was written for weights")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: nn.Sequential(OrderedDict(module=model)),
        partial(torch.compile, backend="eager"),
        lambda model: nn.Sequential(OrderedDict(module=torch.compile(model, backend="eager"))),
    ],
)
def test_wrapped_module_is_held_by_the_weights_inside(place: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    assert_matches_reference(wrap(build()), place / "of-model")
    with pytest.raises(AssertionError, match="was written for weights by tensor"):
        assert_matches_reference(wrap(build(seed=1)), place / "of-model")


def test_module_without_weights_is_refused(place: Path) -> None:
    with pytest.raises(GrowkitError, match="Identity has no weights to hold against anything"):
        assert_matches_reference(nn.Identity(), place / "of-model")


def test_tolerance_widens_the_answers_and_not_the_weights(place: Path) -> None:
    half = build().half().float()
    with pytest.raises(AssertionError, match="answers differ"):
        assert_matches_reference(half, place / "of-model")
    with pytest.raises(AssertionError) as caught:
        assert_matches_reference(half, place / "of-model", tolerance=0.5)
    assert len(str(caught.value).splitlines()) == 2
    assert_matches_reference(build().bfloat16(), place / "of-model")  # its weights have no float32 bits to compare


def test_missing_model_or_reference_is_no_assertion(place: Path) -> None:
    for model, reference in (("absent", "of-model"), ("absent.onnx", "of-model"), ("model", "absent")):
        with pytest.raises(GrowkitError, match=r"absent(\.onnx)?: no such"):
            assert_matches_reference(place / model, place / reference)


def test_two_lines_of_a_users_suite_fail_with_the_lines_of_the_checks(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_served.py").write_text(
        "from growkit.testing import assert_matches_reference\n"
        f"def test_good(): assert_matches_reference({str(place / 'model')!r}, {str(place / 'of-model')!r})\n"
        f"def test_bad(): assert_matches_reference({str(place / 'model.onnx')!r}, 'bad')\n"
    )
    write_golden(tmp_path / "bad", make_golden(model_subject(build(1)), seed=0))
    monkeypatch.chdir(tmp_path)
    assert pytest.main(["-q", "-p", "no:cacheprovider", "--import-mode", "importlib", "test_served.py"]) == 1
    out = capsys.readouterr().out
    assert "1 failed, 1 passed" in out
    assert "answers differ by relative RMS" in out
    assert "raise AssertionError" not in out  # the traceback ends at the user's line
