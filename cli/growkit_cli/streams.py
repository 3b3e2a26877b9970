"""Standard streams that no work fails on: a reader that is gone, a closed stream, characters it cannot express."""

import contextlib
import io
import os
import select
import sys
from pathlib import Path
from typing import Any

from growkit.errors import UnwritableError
from growkit.files import writing


class Stream(io.FileIO):
    """Output that goes nowhere once its reader or terminal is gone: the work and its exit status are not lost."""

    failed = False

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        """Write; where stdout is on a full disk, raise UnwritableError once. Of a full stderr nothing can be told."""
        try:
            with writing(Path("stdout")):
                while (written := super().write(data)) is None:  # programs that share it may have made it non-blocking
                    select.select((), (self,), ())
                return written
        except OSError:
            return len(data)
        except UnwritableError:
            if self.failed or self.fileno() != 1:
                return len(data)
            self.failed = True
            raise


def ready() -> None:
    """Open the standard streams that are closed, and guard the others."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # the next file opened would take its number, and what libraries and children print there
            opened = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(opened, True)
            setattr(sys, name, os.fdopen(opened, "w" if number else "r", errors="backslashreplace"))
        elif number and stream is getattr(sys, f"__{name}__") and _is_file(stream):
            with contextlib.suppress(OSError):
                stream.flush()  # what was printed before
            guarded = io.BufferedWriter(Stream(number, "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(guarded, stream.encoding, "backslashreplace", line_buffering=True))


def _is_file(stream: Any) -> bool:
    return type(getattr(stream.buffer, "raw", stream.buffer)) is io.FileIO  # a console of Windows is none
