"""What the tests of training share."""

from collections.abc import Callable
from pathlib import Path

import pytest
from train_samples import CONFIG, write_images

from growkit.train.data import Data, open_data
from growkit.train.settings import FitSettings


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder: 26 for training, 12 for evaluation, of two classes."""
    root = tmp_path_factory.mktemp("images")
    write_images(root, "train", ["cat", "dog"], 13)
    write_images(root, "val", ["cat", "dog"], 6)
    return root


@pytest.fixture(scope="session")
def opened(images: Path) -> Callable[[FitSettings], Data]:
    """Opens the image folder with the augmentation of given settings."""
    return lambda settings: open_data(str(images), CONFIG, settings)
