"""One picture file: read as timm reads it, or refused with its name and the reason."""

import os
import warnings
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from growkit.errors import GrowkitError, first_line
from growkit.text import visible

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # PIL knows more, and starts Ghostscript for one of them
NOT_READABLE = ": not a readable picture "  # between a file's name and the reason
LONGEST = 1000  # times the short side; resizing the short side to 224 pixels then takes 150 MB


class UnreadablePictureError(GrowkitError):
    """A file that cannot be read as a picture; the message is one line with its name and the reason."""


def unreadable(name: str, reason: str, mend: str = "replace it") -> str:
    """The message about an unreadable picture."""
    return f"{visible(name)}{NOT_READABLE}({visible(reason)}); {mend} or take it away"


def read_picture(file: BinaryIO, mode: str, name: str) -> Image.Image:
    """Read the picture in an open file, in PIL's colour `mode` (L, RGB or RGBA); the caller closes the file.

    The result is that of PIL's own `convert`, and so what timm and torchvision see: the first frame of an animation,
    transparency dropped, palettes and CMYK converted, EXIF orientation not applied. The content decides the format, not
    the file name. A picture that `convert` would ruin is refused: grey levels of more than 8 bits are clipped at 255,
    which leaves it white (or black, for floats).

    Memory is bounded: PIL refuses more than 179 million pixels (1.4 GB while they are converted) from the header, and
    a shape that resizing would blow up is refused as well.

    Args:
        name: what the error calls the file.

    Raises:
        UnreadablePictureError: truncated, damaged, too large, too thin, too deep, or no picture at all.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's remarks on odd files name none
            picture = Image.open(file, formats=FORMATS)
            reason = _unfit(picture)
            if reason is None:
                picture.load()  # decodes: later errors are not the file's fault
                return picture if picture.mode == mode else picture.convert(mode)
    except UnidentifiedImageError:
        empty = file.seek(0, os.SEEK_END) == 0
        reason = "the file is empty" if empty else f"what is inside is none of {', '.join(FORMATS)}"
    except Exception as error:  # PIL has a dozen kinds for damaged files, MemoryError among them
        reason = first_line(error, 160)
    raise UnreadablePictureError(unreadable(name, reason))


def open_picture(path: str, mode: str) -> Image.Image:
    """`read_picture` of a file by its path; a folder or a pipe is refused, too.

    Raises:
        UnreadablePictureError: what `read_picture` refuses, and what cannot be opened.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for ever
            raise OSError("not a file")
        with open(path, "rb") as file:
            return read_picture(file, mode, path)
    except OSError as error:
        mend = "allow reading it" if isinstance(error, PermissionError) else "replace it"
        raise UnreadablePictureError(unreadable(path, error.strerror or str(error), mend)) from None


def _unfit(picture: Image.Image) -> str | None:
    short, long = sorted(picture.size)
    if long > LONGEST * short:
        wide, high = picture.size
        return f"of {wide} x {high} pixels, one side is more than {LONGEST} times the other; crop it"
    if picture.mode[0] in "IF":
        return f"its levels of grey have more than 8 bits, PIL's mode {picture.mode}; save it with 8"
    return None
