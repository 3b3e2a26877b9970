"""Make text from files safe to show: on a terminal, on a page, in XML, in a script."""

import re
from collections.abc import Sequence
from itertools import zip_longest

# Cursor control, line ends, bidirectional overrides and non-characters; XML 1.0 cannot hold most of them.
HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)


def visible(text: object) -> str:
    """`text` on one line, whatever it holds: control characters and the like spelled out, as in '\\x1b' and '\\n'.

    So a name cannot hide another, forge a line, or control the terminal.
    """
    return HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def counted(number: float, thing: str) -> str:
    """As in '1 update' and '1,200 updates'."""
    return f"{number:,.0f} {thing}" + ("" if number == 1 else "s")


def speed(images_per_second: float) -> str:
    """As in '1,254', and in '0.27' where a big model is slow."""
    return f"{images_per_second:{',.0f' if images_per_second >= 10 else '.2g'}}"


def some(names: Sequence[str], most: int = 3) -> str:
    """As in 'a, b, c and 2 more'."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest:,} more" if rest > 0 else "")


def first_difference(one: Sequence[str], other: Sequence[str]) -> tuple[int, str, str]:
    """Where two differing lists first differ, and what either holds there, 'missing' beyond its end."""
    pairs = enumerate(zip_longest(one, other, fillvalue="missing"))
    return next((at, *pair) for at, pair in pairs if pair[0] != pair[1])


def short(sha256: object) -> str:
    """The first digits of a hash."""
    return f"{sha256}"[:12] if sha256 else "unknown"


def clipped(text: str, most: int) -> str:
    """At most `most` characters, ending in an ellipsis if some are left out."""
    return text if len(text) <= most else text[: most - 1] + "…"
