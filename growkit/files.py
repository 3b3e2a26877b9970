"""Files and folders that appear whole or not at all, and the hashes that identify them."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from growkit.errors import GrowkitError


def refuse_foreign(path: Path, known: str, force: bool) -> None:
    """Raise GrowkitError when `path` is to be replaced and is not a folder with a file `known` in it.

    --force replaces what growkit wrote, not whatever lies there.
    """
    if not (force and path.exists()):
        return
    if not path.is_dir() or (any(path.iterdir()) and not (path / known).is_file()):
        raise GrowkitError(f"{path} is not growkit's to replace: it holds no {known}; name another folder")


def refuse_existing(path: Path, force: bool) -> None:
    """Raise GrowkitError when `path` exists and `force` was not given.

    Called before the work starts, so that nobody waits an hour for a refusal.
    """
    if path.exists() and not force:
        raise GrowkitError(f"{path} already exists; --force replaces it, --run or --out writes elsewhere")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it when the block ends without error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; swap it in when the block ends without error.

    A process killed between the two renames of a swap leaves the old folder beside `path`, under
    a hidden name that ends in .partial.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, old = _partial(path), _partial(path)
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            os.rename(path, old)
        try:
            os.rename(partial, path)
        except OSError:
            if old.exists():
                os.rename(old, path)
            raise
        _remove(old)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def without_folders(value: object) -> object:
    """`value` with absolute paths cut to their last part: a served file tells no machine's."""
    if isinstance(value, dict):
        return {key: without_folders(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(entry) for entry in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        GrowkitError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GrowkitError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise GrowkitError(f"{path}: not readable as JSON ({error})") from None


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
