"""The errors a user can mend: one line that names the thing and the remedy."""


class GrowkitError(Exception):
    """Bad usage or bad input. The message is one line: what, got, expected, what to do."""


class UnwritableError(GrowkitError):
    """A file or folder cannot be written: a full disk, no permission, a folder that is gone."""


class Terminated(KeyboardInterrupt):
    """SIGTERM asked for an end, as Ctrl-C does by KeyboardInterrupt."""


class ParityError(GrowkitError):
    """A check of a grown or exported model said no."""


def first_line(error: BaseException, most: int | None = None) -> str:
    """What an error of somebody else says first, up to `most` characters; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]
