"""Standard streams that no work fails on: a reader that is gone, a closed stream, characters it cannot express."""

import io
import os
import sys
from pathlib import Path
from typing import Any

from growkit.errors import UnwritableError
from growkit.files import writing


class Stream(io.FileIO):
    """Output that goes nowhere once its reader or terminal is gone: the work and its exit status are not lost."""

    failed = False

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        """Write, or raise UnwritableError once, as on a full disk."""
        try:
            with writing(Path("stdout" if self.fileno() == 1 else "stderr")):
                return super().write(data)
        except OSError:
            return len(data)
        except UnwritableError:
            if self.failed:
                return len(data)
            self.failed = True
            raise


def ready() -> None:
    """Open the standard streams that are closed, and guard the others."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # the next file opened would take its number, and what libraries print there
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "w" if number else "r"))
        elif number and stream is getattr(sys, f"__{name}__") and _is_file(stream):
            guarded = io.BufferedWriter(Stream(number, "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(guarded, stream.encoding, "backslashreplace", line_buffering=True))


def _is_file(stream: Any) -> bool:
    return type(getattr(stream.buffer, "raw", stream.buffer)) is io.FileIO  # a console of Windows is none
