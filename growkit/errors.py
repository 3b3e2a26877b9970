"""The errors a user can mend: one line that names the thing and the remedy."""


class GrowkitError(Exception):
    """Bad usage or bad input. The message is one line: what, got, expected, what to do."""


class ParityError(GrowkitError):
    """A check of a grown or exported model said no."""
