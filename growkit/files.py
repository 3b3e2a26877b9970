"""Atomic writes of files and folders, and the hashes that identify them."""

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from growkit.errors import GrowkitError, UnwritableError

LEFT = re.compile(r"(?s)\.(?P<name>.+)\.(?P<host>[0-9a-f]{6})-(?P<pid>\d+)-[0-9a-f]{8}\.(?P<kind>partial|old)")
LOCK = ".growkit.lock"  # lock.py's, which is no part of what is written
SYSTEMS = (".DS_Store", "Thumbs.db", "desktop.ini")  # what systems leave where a folder was looked at
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
WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # what only a write fails with
_open: set[str] = set()  # hidden names this process is writing under


def refuse_existing(
    path: Path,
    force: bool,
    *marks: str,
    writes: Collection[str] = (),
    resumable: bool = False,
    elsewhere: str = "--run writes elsewhere",
) -> None:
    """Raise GrowkitError if `path` exists without `force`, or is not growkit's to replace: see refuse_foreign.

    `resumable` means that --resume could continue what is there. Called before the work starts, so that nobody waits
    an hour for a refusal.
    """
    clear_left(path.parent, path.name)  # it may lie under a hidden name
    if not path.exists():
        return
    if not force:
        resume = "--resume goes on with it, " if resumable else ""
        raise GrowkitError(f"{path} already exists; {resume}--force replaces it, {elsewhere}")
    refuse_foreign(path, *marks, writes=writes)


def refuse_foreign(
    path: Path, *marks: str, writes: Collection[str] = (), elsewhere: str = "name another folder"
) -> None:
    """Raise GrowkitError if `path` is there and replacing it would lose what growkit did not write.

    marks   names of which growkit's folder holds one at least, if anything
    writes  where the folder goes as a whole: all that growkit writes there, as `_is_of` matches it
    """
    if not path.exists():
        return
    held = {entry.name for entry in path.iterdir() if not LEFT.fullmatch(entry.name)} if path.is_dir() else {"a file"}
    unmarked = marks and held and not held & set(marks)
    foreign = _foreign(path, writes) if writes else None
    told = [f"it holds no {marks[0]}"] if unmarked else []
    told += [f"{foreign} in it, which growkit did not write, would be lost"] if foreign else []
    if told:
        move = "" if unmarked else ", or move that away"
        raise GrowkitError(f"{path} is not growkit's to replace: {', and '.join(told)}; {elsewhere}{move}")


def _foreign(folder: Path, writes: Collection[str]) -> str | None:
    """The first entry below `folder` that growkit does not write there, or a system, a lock or a killed writer."""
    for entry in sorted(folder.rglob("*")):
        parts = entry.relative_to(folder).parts
        if parts[-1] in (LOCK, *SYSTEMS) or any(map(LEFT.fullmatch, parts)):
            continue
        if not any(_is_of(parts, Path(name).parts, entry.is_dir()) for name in writes):
            return "/".join(parts)
    return None


def _is_of(parts: tuple[str, ...], wanted: tuple[str, ...], is_dir: bool) -> bool:
    """Whether this is the entry `wanted`, as runs/*/state.pt, a folder above it, or below it where that ends in **."""
    if not all(map(fnmatchcase, parts, wanted)):
        return False
    return len(parts) == len(wanted) or (is_dir if len(parts) < len(wanted) else wanted[-1] == "**")


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
    probe = _beside(there / (path.name or "probe"))  # inside: "." has no name
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
        # a copy has two names, the source's first; a file that was opened by its number has that for a name
        names = [name for name in (error.filename, error.filename2) if not isinstance(name, int | None)]
        ours = any(_concerns(Path(os.fsdecode(name)), path) for name in names) if names else error.errno in WRITING
        return REMEDIES.get(error.errno or 0) if ours else None
    told = re.search(r"os error (\d+)", str(error))  # Rust's wording
    if told is not None:
        return REMEDIES.get(int(told[1]))
    under = error.__context__
    return _refusal(under, path) if isinstance(under, OSError) and under.errno in WRITING else None


def _concerns(name: Path, path: Path) -> bool:
    """Whether `name` is `path`, its hidden name, something below either, or a folder above, as mkdir's errors name."""
    name, path = name.absolute(), path.absolute()
    if path.is_relative_to(name):
        return True
    if not name.is_relative_to(path.parent):
        return False
    first = name.relative_to(path.parent).parts[0]
    hidden = LEFT.fullmatch(first)
    return path.name == (hidden["name"] if hidden else first)


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
def whole_folder(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; swap it in when the block ends without error.

    If `path` is a link it stays one. A process killed between the two renames of a swap leaves the old folder beside
    `path`, under a hidden name that ends in .old; `clear_left` restores its name.

    replace  whether what is at `path` by then may go; outside a run folder, whose lock is held, another command may
             have written it meanwhile

    Raises:
        UnwritableError: the disk is full, or `path` cannot be written there.
        GrowkitError: another command wrote `path` meanwhile.
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
            if replace and path.exists():
                os.rename(path, old)
            try:
                os.rename(partial, path)  # the system replaces no folder that holds anything, and no file
            except OSError as error:
                if not path.exists():
                    raise
                raise GrowkitError(
                    f"{path} was written by another command meanwhile; --force replaces it, or name another folder"
                ) from error
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
            error.filename = str(path)  # of a broken disk, the error might be one of reading
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
    """Write `content` as indented JSON, whole or not at all; see `as_json`."""
    with whole_file(path) as partial:
        partial.write_text(as_json(content), encoding="utf-8")


def as_json(content: Any) -> str:
    """`content` as indented JSON; see `plain`."""
    return json.dumps(plain(content), indent=2, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """Return `value` as JSON can express it: NaN, the infinities, paths and other types as strings."""
    return json.loads(json.dumps(value, default=_plain), parse_constant=lambda name: str(float(name)))


def _plain(value: object) -> int | float | str:
    if isinstance(value, Integral):  # as NumPy's
        return int(value)
    return float(value) if isinstance(value, Real) else str(value)


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
        GrowkitError: the file is missing, may not be read, is not a regular file, or is not JSON.
    """
    refuse_no_file(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise GrowkitError(f"{path}: not readable as JSON (nested too deep)") from None
    except (OSError, ValueError) as error:
        raise GrowkitError(f"{path}: not readable as JSON ({error})") from None


def refuse_no_file(path: Path) -> None:
    """Raise GrowkitError if `path` is missing, may not be read, or is no regular file: a pipe might never end."""
    try:
        if path.is_file():
            path.open("rb").close()
            return
        there = path.exists()
    except PermissionError:
        raise GrowkitError(f"{path}: cannot be read (permission denied); allow it or name another file") from None
    except (OSError, ValueError) as error:
        raise GrowkitError(f"{path}: cannot be looked at ({error})") from None
    raise GrowkitError(f"{path}: {'not a file' if there else 'no such file'}")


def sha256_of(*paths: Path) -> str:
    """SHA-256 over the bytes of all files, as hex."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()
