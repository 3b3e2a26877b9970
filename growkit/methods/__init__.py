"""The growth methods, by the name that --method takes."""

import difflib
from dataclasses import replace

from growkit.arch.spec import Architecture
from growkit.errors import GrowkitError
from growkit.methods.base import GrowthMethod, refuse_shrinking
from growkit.methods.bert2bert import Bert2BERT
from growkit.methods.hypercloning import HyperCloning
from growkit.methods.lemon import Lemon
from growkit.methods.ligo import LiGO
from growkit.methods.llama_pro import LlamaPro
from growkit.methods.mango import Mango
from growkit.methods.net2net import Net2Net
from growkit.methods.random_pad import RandomPad
from growkit.methods.stackbert import StackBERT
from growkit.ranges import option_of
from growkit.settings import GrowSettings

METHODS: dict[str, type[GrowthMethod]] = {
    "mango": Mango,
    "ligo": LiGO,
    "bert2bert": Bert2BERT,
    "net2net": Net2Net,
    "lemon": Lemon,
    "hypercloning": HyperCloning,
    "stackbert": StackBERT,
    "llama-pro": LlamaPro,
    "random-pad": RandomPad,
}


OPTIONAL = ("rank", "ranks", "ring_order", "vectors", "noise")  # settings that not every method takes


def find(name: str) -> type[GrowthMethod]:
    """Return the method of a name.

    Raises:
        GrowkitError: no such method; the nearest names are offered.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=3, cutoff=0.0)
        raise GrowkitError(f"unknown method {name!r}; nearest: {', '.join(near)} (of {', '.join(METHODS)})")
    return METHODS[name]


def check(source: Architecture, target: Architecture, settings: GrowSettings) -> type[GrowthMethod]:
    """Return the settings' method after checking that it can grow this pair; nothing is computed.

    Raises:
        GrowkitError: unknown method or variant, sizes that no method grows, or sizes that this one does not; the
            message then names the methods that do.
    """
    method = find(settings.method)
    if settings.variant is not None and settings.variant not in method.VARIANTS:
        offered = f"choose {' or '.join(method.VARIANTS)}" if method.VARIANTS else "it has none"
        raise GrowkitError(f"--variant {settings.variant}: not a variant of {settings.method}; {offered}")
    refuse_shrinking(source, target)
    reason = method.cannot(source, target, settings)
    if reason is not None:
        raise GrowkitError(f"{settings.method}: {reason}; methods that can: {', '.join(able(source, target))}")
    return method


def ignored(settings: GrowSettings) -> list[str]:
    """List options that were given but that the method ignores, as they are typed."""
    method, plain = find(settings.method), GrowSettings()
    given = [name for name in OPTIONAL if getattr(settings, name) != getattr(plain, name)]
    told = {"vectors": "--no-vectors"}
    return [told.get(name, option_of(name)) for name in given if name not in method.TAKES]


def able(source: Architecture, target: Architecture) -> list[str]:
    """Names of the methods that can grow this pair with their defaults; random-pad, the control, last."""
    plain = GrowSettings()
    return [name for name, m in METHODS.items() if m.cannot(source, target, replace(plain, method=name)) is None]
