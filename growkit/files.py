"""Atomic writes of files and folders, and the hashes that identify them."""

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from growkit.errors import GrowkitError, UnwritableError

LEFT = re.compile(r"\.(?P<name>.+)\.(?P<host>[0-9a-f]{6})-(?P<pid>\d+)-[0-9a-f]{8}\.(?P<kind>partial|old)")
ELSEWHERE = "name another place"
KEPT = "what was complete before is as it was"
REMEDIES = {
    errno.ENOSPC: ("the disk is full", f"free some space there and try again; {KEPT}"),
    errno.EDQUOT: ("your quota is used up", f"free some space there and try again; {KEPT}"),
    errno.EFBIG: ("the file would be larger than allowed", "raise the limit (ulimit -f) or name another place"),
    errno.EIO: ("the disk reports an error", f"check the disk; {KEPT}"),
    errno.EROFS: ("read-only file system", ELSEWHERE),
    errno.EACCES: ("permission denied", "allow it or name another place"),
    errno.EPERM: ("not permitted", "allow it or name another place"),
    errno.ENOENT: ("its folder is gone", "was it removed meanwhile? Start anew"),
    errno.ENOTDIR: ("not a directory", "what should hold it is a file: name another place"),
    errno.EEXIST: ("a file lies where a folder is needed", ELSEWHERE),
    errno.EISDIR: ("it is a folder", "name a file"),
    errno.ENAMETOOLONG: ("the name is too long", "name it shorter"),
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_open: set[str] = set()  # hidden names this process is writing under


def refuse_existing(
    path: Path, force: bool, *known: str, resumable: bool = False, elsewhere: str = "--run writes elsewhere"
) -> None:
    """Raise GrowkitError if `path` exists without `force`, or is a folder that holds none of the `known` names.

    `resumable` means that --resume could continue what is there. --force replaces only what growkit wrote. Called
    before the work starts, so that nobody waits an hour for a refusal.
    """
    clear_left(path.parent, path.name)  # it may lie under a hidden name
    if not path.exists():
        return
    if not force:
        resume = "--resume goes on with it, " if resumable else ""
        raise GrowkitError(f"{path} already exists; {resume}--force replaces it, {elsewhere}")
    held = [entry.name for entry in path.iterdir()] if path.is_dir() else ["a file"]
    if known and held and not set(known) & set(held):
        raise GrowkitError(f"{path} is not growkit's to replace: it holds no {known[0]}; name another folder")


def refuse_both(force: bool, resume: bool) -> None:
    """Raise GrowkitError if a run is to be both resumed and started anew."""
    if force and resume:
        raise GrowkitError("--resume goes on with a run and --force begins it anew: give one of them")


def refuse_unwritable(path: Path, *, suffix: str | None = None) -> None:
    """Raise UnwritableError if `path` could not be written; leaves nothing behind.

    With a `suffix`, `path` is a file, else a folder. An existing file may only be replaced if it has that suffix, since
    a typo may name a model.
    """
    if suffix is not None and path.is_dir():
        raise _unwritable(path, *REMEDIES[errno.EISDIR])
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if suffix is not None and there == path.absolute():
        if path.suffix.lower() != suffix:
            raise _unwritable(path, f"it is there, and no {suffix} file", "name another file, or remove it")
        there = there.parent
    probe = _beside(there / path.name)
    try:
        probe.mkdir()
    except OSError as error:
        other = (error.strerror or "unknown error").lower(), ELSEWHERE
        raise _unwritable(path, *REMEDIES.get(error.errno or 0, other)) from error
    finally:
        _remove(probe)


def _unwritable(path: Path, reason: str, remedy: str) -> UnwritableError:
    # by its final name, not the hidden one
    path = Path(*(found["name"] if (found := LEFT.fullmatch(part)) else part for part in path.parts))
    return UnwritableError(f"{path}: cannot be written ({reason}); {remedy}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a system error of a failed write into UnwritableError: one line with `path` and the remedy.

    Errors about other files pass as they are.
    """
    try:
        yield
    except GrowkitError:
        raise
    except Exception as error:  # torch and safetensors wrap the system's errors in their own
        reason = _refusal(error, path)
        if reason is None:
            raise
        raise _unwritable(path, *reason) from error


def _refusal(error: BaseException, path: Path) -> tuple[str, str] | None:
    """Return why `path` was not written, and the remedy; None if `error` is about something else."""
    if isinstance(error, OSError):
        name = error.filename2 or error.filename
        inside = name is None or Path(os.fsdecode(name)).absolute().is_relative_to(path.parent.absolute())
        # errors of mkdir and rename name folders above
        inside = inside or path.absolute().is_relative_to(Path(os.fsdecode(name)).absolute())
        return REMEDIES.get(error.errno or 0) if inside else None
    told = re.search(r"os error (\d+)", str(error))  # Rust's wording
    if told is not None:
        return REMEDIES.get(int(told[1]))
    under = error.__context__
    return REMEDIES.get(under.errno or 0) if isinstance(under, OSError) and under.errno in FULL else None


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it to `path` when the block ends without error.

    The file is synced to disk before it is renamed: after a power cut `path` is the old file or the new one.

    Raises:
        UnwritableError: the disk is full, or `path` cannot be written there.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_left(path.parent, path.name)
        partial = _beside(path)
        try:
            yield partial
            _sync(partial)
            os.replace(partial, path)
            _sync(path.parent)
        finally:
            _remove(partial)


@contextmanager
def whole_files(folder: Path, *names: str) -> Iterator[Path]:
    """Yield a temporary folder in `folder`; when the block ends, move its files `names` in, whole and in this order.

    Raises:
        UnwritableError: the disk is full, or `folder` cannot be written.
    """
    with writing(folder / names[0]):
        folder.mkdir(parents=True, exist_ok=True)
        clear_left(folder, names[0])
        partial = _beside(folder / names[0])
        partial.mkdir()
        try:
            yield partial
            for name in names:
                _sync(partial / name)
            for name in names:
                os.replace(partial / name, folder / name)
            _sync(folder)
        finally:
            _remove(partial)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; swap it in when the block ends without error.

    If `path` is a link it stays one. A process killed between the two renames of a swap leaves the old folder beside
    `path`, under a hidden name that ends in .old; `clear_left` restores its name.

    Raises:
        UnwritableError: the disk is full, or `path` cannot be written there.
    """
    with writing(path):
        path = path.resolve() if path.is_symlink() else path
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_left(path.parent, path.name)
        partial, old = _beside(path), _beside(path, "old")
        partial.mkdir()
        try:
            yield partial
            for part in (*partial.rglob("*"), partial):
                _sync(part)
            if path.exists():
                os.rename(path, old)
            os.rename(partial, path)
            _sync(path.parent)
        finally:
            if old.exists() and not path.exists():
                os.rename(old, path)
            _remove(old)
            _remove(partial)


def clear_left(folder: Path, name: str | None = None, *, alone: bool = False) -> None:
    """Clean up in `folder` what killed writers of `name`, or of anything, left there.

    Unfinished files and folders are removed; an old folder that was being replaced is restored if the new one is
    missing. What a live process on this machine is writing stays, and so do files of other machines, unless no other
    process can be writing there (`alone`).
    """
    try:
        entries = [(entry, found) for entry in folder.iterdir() if (found := LEFT.fullmatch(entry.name))]
        for entry, found in entries:
            ours = found["host"] == _host()
            if name not in (None, found["name"]) or (ours and _lives(entry, int(found["pid"]))):
                continue
            if not (ours or alone):
                continue
            target = folder / found["name"]
            if found["kind"] == "old" and not target.exists():
                os.rename(entry, target)
            else:
                _remove(entry)
    except OSError:  # unreadable or read-only: whoever writes there gets the error
        return


def _lives(entry: Path, pid: int) -> bool:
    if pid == os.getpid():  # in a container the next process often gets the same process ID
        return entry.name in _open
    if os.name == "nt":  # where os.kill would kill it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync(path: Path) -> None:
    """Wait until `path` is on disk, where the file system supports that."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
    _open.discard(path.name)


def _beside(path: Path, kind: str = "partial") -> Path:
    """Return a hidden name beside `path` that tells who is writing."""
    beside = path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.{kind}")
    _open.add(beside.name)
    return beside


def _host() -> str:
    """This machine as six hex digits: process IDs mean nothing on another machine."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:6]


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def without_folders(value: object) -> object:
    """`value` with absolute paths cut to their last part: a served file must not reveal this machine's folders."""
    if isinstance(value, dict):
        return {key: without_folders(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(entry) for entry in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        GrowkitError: the file is missing, is not a regular file, or is not JSON.
    """
    refuse_no_file(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise GrowkitError(f"{path}: not readable as JSON (nested too deep)") from None
    except (OSError, ValueError) as error:
        raise GrowkitError(f"{path}: not readable as JSON ({error})") from None


def refuse_no_file(path: Path) -> None:
    """Raise GrowkitError if `path` is missing or not a regular file: reading a pipe or a device might never end."""
    try:
        if path.is_file():
            return
        there = path.exists()
    except (OSError, ValueError) as error:
        raise GrowkitError(f"{path}: cannot be looked at ({error})") from None
    raise GrowkitError(f"{path}: {'not a file' if there else 'no such file'}")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
