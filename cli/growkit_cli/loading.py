"""The model that an argument of a command names."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from growkit_cli.console import Console

if TYPE_CHECKING:
    from growkit.source import Source


def load(
    console: Console, path: str, from_: str | None = None, from_sets: Sequence[str] | None = None, *, ema: bool = True
) -> "Source":
    """Load it, and say what there is to say of it; arguments and errors are those of `growkit.source.load_source`."""
    from growkit.source import load_source

    source = load_source(path, from_, from_sets or (), ema=ema)
    for note in source.notes:
        console.say(note)
    return source
