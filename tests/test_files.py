"""Outputs appear whole or not at all, whatever ends the work."""

import errno
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from growkit.errors import GrowkitError, UnwritableError
from growkit.files import (
    read_json,
    refuse_existing,
    refuse_unwritable,
    sha256_of,
    whole_file,
    whole_folder,
    write_json,
)
from growkit_cli.console import Console


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_is_replaced_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    for content in ("old", "new"):
        with whole_file(path) as partial:
            partial.write_text(content)
    assert path.read_text() == "new"
    assert names_in(path.parent) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_file_stays_as_it_was_on_error(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def work() -> None:
        with whole_file(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        work()
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["file"]


def test_folder_is_swapped_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "model"
    for name in ("old", "new"):
        with whole_folder(path) as partial:
            (partial / name).write_text(name)
    assert names_in(path) == ["new"]
    assert names_in(tmp_path) == ["model"]


def test_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    """As where a stage of a run lies on a larger disk."""
    (tmp_path / "large").mkdir()
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "model"
    path.symlink_to(tmp_path / "large" / "model")
    for name in ("old", "new"):
        with whole_folder(path) as partial:
            (partial / name).write_text(name)
    with pytest.raises(UnwritableError, match=r"cannot be written \(the disk is full\)"), whole_folder(path) as partial:
        raise OSError(errno.ENOSPC, "No space left on device", str(partial / "new"))
    assert path.is_symlink()
    assert names_in(tmp_path / "large" / "model") == ["new"]
    assert names_in(tmp_path / "large") == names_in(tmp_path / "run") == ["model"]


@pytest.mark.parametrize("existed", [True, False])
def test_folder_stays_as_it_was_on_error(tmp_path: Path, existed: bool) -> None:
    path = tmp_path / "model"
    if existed:
        path.mkdir()
        (path / "old").write_text("old")

    def work() -> None:
        with whole_folder(path) as partial:
            (partial / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert names_in(tmp_path) == (["model"] if existed else [])
    assert not existed or names_in(path) == ["old"]


def test_folder_comes_back_when_the_swap_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "old").write_text("old")
    rename = os.rename

    def refuse_new(source: Path, target: Path) -> None:
        if target == path and (source / "new").exists():
            raise PermissionError("disk says no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse_new)

    def work() -> None:
        with whole_folder(path) as partial:
            (partial / "new").write_text("new")

    with pytest.raises(PermissionError):
        work()
    assert names_in(path) == ["old"]
    assert names_in(tmp_path) == ["model"]


@pytest.mark.parametrize("there", ["folder", "file"])
def test_what_another_command_wrote_meanwhile_is_not_replaced_unasked(tmp_path: Path, there: str) -> None:
    path = tmp_path / "model"
    theirs = path / "theirs" if there == "folder" else path

    def work(replace: bool) -> None:
        with whole_folder(path, replace=replace) as partial:
            (partial / "ours").write_text("ours")
            theirs.parent.mkdir(exist_ok=True)
            theirs.write_text("theirs")

    with pytest.raises(GrowkitError, match=r"model was written by another command meanwhile; --force replaces it"):
        work(replace=False)
    assert theirs.read_text() == "theirs"
    assert names_in(tmp_path) == ["model"]
    work(replace=True)
    assert names_in(path) == ["ours"]


def test_folder_replaces_a_file_of_its_name(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_text("a file")
    with whole_folder(path) as partial:
        (partial / "new").write_text("new")
    assert names_in(path) == ["new"]
    assert names_in(tmp_path) == ["model"]


@pytest.mark.parametrize("writer", ["whole_file", "whole_folder"])
def test_kill_in_the_middle_leaves_the_old_content(tmp_path: Path, writer: str) -> None:
    path = tmp_path / "output"
    old = path / "weights" if writer == "whole_folder" else path
    old.parent.mkdir(exist_ok=True)
    old.write_text("old")
    program = f"""
import os, signal, sys
from pathlib import Path
from growkit.files import {writer}
with {writer}(Path(sys.argv[1])) as partial:
    (partial / "weights" if partial.is_dir() else partial).write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program, path], check=False)
    assert done.returncode == -signal.SIGKILL
    assert old.read_text() == "old"
    assert all(name.endswith(".partial") for name in names_in(tmp_path) if name != "output")


def test_existing_output_is_refused_without_force(tmp_path: Path) -> None:
    refuse_existing(tmp_path / "absent", force=False)
    refuse_existing(tmp_path, force=True)
    with pytest.raises(GrowkitError, match="already exists; --force"):
        refuse_existing(tmp_path, force=False)


def test_json_survives_a_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"path": Path("x"), "numbers": [1, 2.5, np.int64(2**53 + 1), np.float32(0.5), np.float32("nan")]})
    assert read_json(path) == {"path": "x", "numbers": [1, 2.5, 2**53 + 1, 0.5, "nan"]}


def test_what_is_written_is_json_also_of_numbers_that_are_not_finite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in deploy.checks.plain, they become words."""
    numbers = {"loss": math.nan, "gaps": [math.inf, (-math.inf, 0.1, 1e-300, 10**20)], "nan": "NaN", "none": None}
    expected = {"loss": "nan", "gaps": ["inf", ["-inf", 0.1, 1e-300, 10**20]], "nan": "NaN", "none": None}
    write_json(tmp_path / "a.json", numbers)
    Console(as_json=True).result(numbers)
    for text in ((tmp_path / "a.json").read_text(), capsys.readouterr().out):
        assert json.loads(text, parse_constant=pytest.fail) == expected
        assert text.endswith("\n}\n")


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, 1)
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(ValueError, match="Circular"):
        write_json(path, loop)
    assert json.loads(path.read_text()) == 1
    assert names_in(tmp_path) == ["a.json"]


@pytest.mark.parametrize("content", [None, b"{half", b"\xff\xfe\x00", pytest.param(b"[" * 10**5, id="deep")])
def test_unreadable_json_is_one_line_with_its_name(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GrowkitError, match=r"a\.json: (no such file|not readable)") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


def test_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"growkit")
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"growkit").hexdigest()


def test_force_replaces_what_growkit_wrote_and_nothing_else(tmp_path: Path) -> None:
    ours, theirs, empty, file = (tmp_path / name for name in ("ours", "theirs", "empty", "file"))
    for folder in (ours, theirs, empty):
        folder.mkdir()
    (ours / "last").mkdir()
    (theirs / "holiday.jpg").touch()
    file.touch()
    marks = ("model.safetensors", "last")
    (empty / ".model.safetensors.abcdef-1-01234567.partial").touch()  # of a killed writer
    for path in (ours, empty, tmp_path / "absent"):
        refuse_existing(path, True, *marks)
    for path in (theirs, file):
        with pytest.raises(GrowkitError, match=f"{path.name} is not growkit's to replace: it holds no model"):
            refuse_existing(path, True, *marks)


WRITES = ("begun.json", "runs/*/state.pt", "run/**")


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("begun.json", None),
        ("runs/a/state.pt", None),
        ("runs/a/.state.pt.abcdef-1-01234567.partial/data.pkl", None),  # of a killed writer
        ("runs/.growkit.lock", None),
        ("runs/.DS_Store", None),
        ("run/any/thing", None),
        ("NOTES.md", "NOTES.md"),
        ("notes/a/b", "notes"),
        ("runs/state.pt", "runs/state.pt"),
        ("runs/a/state.pt/mine", "runs/a/state.pt/mine"),
        ("runs/a/b/state.pt", "runs/a/b"),
        (".hidden", ".hidden"),
    ],
)
def test_force_replaces_no_folder_that_holds_more_than_growkit_writes(
    entry: str, told: str | None, tmp_path: Path
) -> None:
    for name in ("begun.json", entry):
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / name).touch()
    if told is None:
        refuse_existing(tmp_path / "own", True, "begun.json", writes=WRITES)
        return
    with pytest.raises(GrowkitError) as caught:
        refuse_existing(tmp_path / "own", True, "begun.json", writes=WRITES)
    assert str(caught.value).endswith(
        f"own is not growkit's to replace: {told} in it, which growkit did not write, would be lost; "
        "name another folder, or move that away"
    )


def test_file_to_replace_is_of_the_same_kind(tmp_path: Path) -> None:
    model, page = tmp_path / "model.safetensors", tmp_path / "page.HTML"
    model.touch()
    page.touch()
    refuse_unwritable(page, suffix=".html")
    refuse_unwritable(tmp_path / "new.txt", suffix=".html")  # a new one has any name
    with pytest.raises(UnwritableError, match=r"it is there, and no \.html file"):
        refuse_unwritable(model, suffix=".html")


def test_what_cannot_be_written_has_the_name_it_was_to_have(tmp_path: Path) -> None:
    def fill() -> None:
        with whole_folder(tmp_path / "onnx") as partial, whole_file(partial / "model.onnx"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UnwritableError) as caught:
        fill()
    assert str(caught.value).startswith(f"{tmp_path / 'onnx' / 'model.onnx'}: cannot be written (the disk is full); ")


@pytest.mark.parametrize("name", [".", "new", "new/er", "page.html"])
def test_only_the_folder_that_is_written_need_be_writable(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root may write anywhere, the folder above is one where no folder can be made."""
    here, made = tmp_path / "here", []
    here.mkdir()
    monkeypatch.chdir(here)
    make = os.mkdir

    def mkdir(path: Path, *rest: int) -> None:
        made.append(Path(path).absolute().parent)
        if made[-1] != here:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        make(path, *rest)

    monkeypatch.setattr(os, "mkdir", mkdir)
    refuse_unwritable(Path(name), suffix=".html" if name.endswith("html") else None)
    assert made == [here]
    assert names_in(here) == []
    with pytest.raises(UnwritableError, match="permission denied"):
        refuse_unwritable(Path(".."))
