"""Golden data, read back with ONNX's own tools."""

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from deploy_models import make_model
from onnx import numpy_helper
from torch import nn

from growkit.deploy.data_sets import off_from_stored, read_data_sets, write_data_sets
from growkit.deploy.truth import Preprocessing, noise_images, preprocessing
from growkit.errors import GrowkitError


def test_data_sets_hold_the_float64_truth(model: nn.Module, tmp_path: Path) -> None:
    write_data_sets(model, tmp_path, seed=4)
    truth = copy.deepcopy(model).double()
    for index, batch in enumerate((1, 5)):
        folder = tmp_path / f"test_data_set_{index}"
        tensors = []
        for name in ("input_0", "output_0"):
            tensor = onnx.TensorProto()
            tensor.ParseFromString((folder / f"{name}.pb").read_bytes())
            tensors.append(tensor)
        assert [t.name for t in tensors] == ["input", "logits"]
        images, logits = map(numpy_helper.to_array, tensors)
        assert images.shape == (batch, 3, 16, 16)
        assert images.dtype == logits.dtype == np.float32
        with torch.inference_mode():
            expected = truth(torch.from_numpy(images.copy()).double()).numpy()
        assert np.array_equal(logits, expected.astype(np.float32))


def test_same_seed_same_bytes(model: nn.Module, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_data_sets(model, tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / n / "test_data_set_1" / "input_0.pb").read_bytes() for n in "abc")
    assert a == b != c


def test_images_are_pixels_normalised_by_mean_and_std() -> None:
    prepared = Preprocessing((3, 20, 12), (0.1, 0.5, 0.9), (0.2, 0.5, 0.1), "bicubic", 1.0, "center")
    images = noise_images(prepared, 50, 0)
    assert images.shape == (50, 3, 20, 12)
    mean, std = (np.reshape(v, (3, 1, 1)) for v in (prepared.mean, prepared.std))
    pixels = images * std + mean
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    assert np.allclose(pixels.mean(axis=(0, 2, 3)), 0.5, atol=0.05)


def test_size_and_channels_are_the_networks_own() -> None:
    prepared = preprocessing(make_model(0, in_chans=1))
    assert prepared.input_size == (1, 16, 16)
    assert prepared.mean == prepared.std == (0.5,)


def test_unreadable_reference_is_named(tmp_path: Path) -> None:
    with pytest.raises(GrowkitError, match="test_data_set_"):
        list(read_data_sets(tmp_path))
    (tmp_path / "test_data_set_0").mkdir()
    with pytest.raises(GrowkitError, match=r"input_0\.pb"):
        list(read_data_sets(tmp_path))
    (tmp_path / "test_data_set_0" / "input_0.pb").write_bytes(b"\xff\xff\xff")
    with pytest.raises(GrowkitError, match=r"input_0\.pb: not a readable ONNX tensor"):
        list(read_data_sets(tmp_path))


@pytest.mark.parametrize(
    ("scores", "classes", "off"),
    [
        ([0.5, 0.3, 0.1], [4, 2, 0], 0),
        ([0.5, 0.3, 0.1], [4, 2, 6], 0),  # a fourth may be as likely as the third
        ([0.5, 0.3, 0.1], [6, 2, 0], np.inf),
        ([0.5, 0.3, 0.1], [4, 6, 0], np.inf),
        ([0.4, 0.3995, 0.1], [2, 4, 0], 0),  # a near tie
    ],
)
def test_class_differs_only_where_another_is_as_likely(scores: list[float], classes: list[int], off: float) -> None:
    wanted = {"scores": np.array([scores], np.float32), "classes": np.array([[4, 2, 0]])}
    assert off_from_stored({"scores": wanted["scores"], "classes": np.array([classes])}, wanted) == off


def test_probabilities_are_off_by_so_much_of_one_and_logits_of_their_size() -> None:
    for name, unit in (("probabilities", 1), ("logits", 0.2)):
        wanted = {name: np.full((2, 5), 0.2)}
        assert off_from_stored({name: wanted[name] + 0.01}, wanted) == pytest.approx(0.01 / unit)


def test_answer_that_is_no_number_is_no_match() -> None:
    """Python's max passes over NaN, which let such a file by."""
    wanted = {"logits": np.ones((2, 3), np.float32)}
    assert off_from_stored({"logits": np.full((2, 3), np.nan, np.float32)}, wanted) == float("inf")
    assert off_from_stored({"logits": np.ones((2, 3), np.float32)}, wanted) == 0
