"""A lock on a run folder: the first command holds it, a second one fails and says who does."""

import errno
import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from growkit.errors import GrowkitError
from growkit.files import LOCK

BUSY = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)  # what systems call a lock that another process holds
UNABLE = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
TRIES = 100  # to make a folder that others may be removing


@contextmanager
def held(folder: Path, command: str, say: Callable[[str], None] = lambda line: None) -> Iterator[bool]:
    """Lock `folder` for this process, creating it if missing; yield whether it could be locked.

    The system releases the lock when the process ends, however it ends. Child processes, such as data-loader workers,
    never hold it. A process must not take it twice: it would get it, and lose both with the first that ends. If the
    file system has no locks, `say` gets a line and work goes on. It also goes on if nothing can be written, since the
    command itself then reports that.

    Raises:
        GrowkitError: another process holds it; the message says which.
    """
    path = folder.absolute() / LOCK
    made = [place for place in (path.parent, *path.parent.parents) if not place.exists()]
    descriptor = _take(path, say)
    if descriptor is None:
        yield False
        return
    try:
        holder = {
            "process": os.getpid(),
            "host": platform.node(),
            "command": command,
            "since": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        }
        with suppress(OSError):  # even on a full disk the lock holds
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(holder).encode())
        yield True
    finally:
        with suppress(OSError):
            path.unlink()  # before it is released: whoever gets it then sees that it no longer has a name
        os.close(descriptor)
        for place in made:
            with suppress(OSError):  # something was written there
                place.rmdir()


def _take(path: Path, say: Callable[[str], None]) -> int | None:
    """Return the open, locked file descriptor; None if locking is impossible."""
    tries = 0
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the previous holder removed the folder, or none can be made there
            if (tries := tries + 1) > TRIES:
                return None
            continue
        except OSError:
            return None
        try:
            _lock(descriptor)
        except OSError as error:
            holder = _holder(path)
            os.close(descriptor)
            if error.errno in BUSY:
                raise GrowkitError(
                    f"{path.parent} is in use by {holder}; wait until it has ended, or give another --run"
                ) from None
            if error.errno in UNABLE:
                say(f"note: {path.parent} is on a file system without locks; nothing stops a second command there")
                return None
            raise
        with suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)  # it was removed between opening and locking


def _lock(descriptor: int) -> None:
    if os.name == "nt":
        import msvcrt

        os.lseek(descriptor, 2**20, os.SEEK_SET)  # past its content, which others may read
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which children would share


def _holder(path: Path) -> str:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return f"`{told['command']}` (process {told['process']} on {told['host']}, since {told['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another growkit"
