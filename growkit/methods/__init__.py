"""The growth methods, by the name that --method takes."""

import difflib

from growkit.errors import GrowkitError
from growkit.methods.base import GrowthMethod
from growkit.methods.mango import Mango

METHODS: dict[str, type[GrowthMethod]] = {"mango": Mango}


def find(name: str) -> type[GrowthMethod]:
    """The method of a name.

    Raises:
        GrowkitError: no such method; the nearest names are offered.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=3, cutoff=0.0)
        raise GrowkitError(f"unknown method {name!r}; nearest: {', '.join(near)}")
    return METHODS[name]
