"""Digits as an image folder, and a small source trained on them for a moment."""

from dataclasses import replace

import pytest
from compare_samples import RECIPE, SMALL

from growkit.demo import write_digits
from growkit.fitting import train_model
from growkit.job import Job
from growkit.record import RunFolder
from growkit.source import Source, load_source


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("digits") / "digits"
    write_digits(folder)
    return str(folder)


@pytest.fixture(scope="session")
def source(digits, tmp_path_factory) -> Source:
    job = Job(RunFolder(tmp_path_factory.mktemp("source")), "cpu")
    trained = train_model(job, "deit_tiny", digits, replace(RECIPE, epochs=4, lr=5e-3), sets=SMALL)
    return load_source(str(trained.folder))


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Charts are drawn of comparisons and sweeps that tests share, and not again of those that a test makes."""
    monkeypatch.setattr("growkit.compare.page.save", lambda *_: ())
    monkeypatch.setattr("growkit.report.page.draw", lambda _: "")
