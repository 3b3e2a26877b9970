"""Outputs have the permissions that the umask gives to new files and folders, whoever writes them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_cli import growkit
from test_network import TO, write_small


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def odd_modes(folder: Path, umask: int) -> dict[str, str]:
    """Files and folders below `folder` with other permissions than new ones get."""
    found = {}
    for path in sorted(folder.rglob("*")):
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        mode = path.lstat().st_mode & 0o7777
        if mode != wanted:
            found[str(path.relative_to(folder))] = oct(mode)
    return found


def test_every_output_has_the_umasks_permissions(
    umask: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_small(tmp_path / "small")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    for words in (
        ["grow", "../small", *TO],
        ["export", "--onnx", "--exporter", "torchscript", "--external-data", "--triton", "models"],
        ["verify", "--no-latency", "--junit", "junit.xml"],
        ["verify", "--update-reference", "--model-only"],
        ["report"],
    ):
        status, _, said = growkit(capsys, *words)
        assert status == 0, said
    assert odd_modes(tmp_path / "out", umask) == {}
    names = {path.name for path in (tmp_path / "out").rglob("*")}
    expected = {"model.safetensors", "operator.safetensors", "config.json", "growkit.json", "record.json", "model.onnx"}
    expected |= {"model.onnx.data", "export.json", "report.json", "junit.xml", "report.html", "config.pbtxt"}
    assert expected <= names


def test_file_of_other_permissions_is_found(umask: int, tmp_path: Path) -> None:
    (tmp_path / "private").touch(mode=0o400)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert set(odd_modes(tmp_path, umask)) == {"private", "open"}
