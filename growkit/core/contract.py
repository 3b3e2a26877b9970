"""Products of several tensors, pair by pair in the cheapest order, and their gradients.

opt_einsum finds the order. Its own calls plan anew each time, which takes longer than a GPU takes for a small product.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import opt_einsum
import torch
from torch import Tensor

Shapes = tuple[tuple[int, ...], ...]
Path = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Pair:
    """One product: the places of its factors among what was given and made before, and its einsum.

    to_left and to_right are the einsums of the gradients: the product's gradient and the other factor.
    """

    left: int
    right: int
    equation: str
    to_left: str
    to_right: str


@lru_cache(maxsize=1024)
def cheapest_path(equation: str, x: tuple[int, ...], cores: Shapes) -> tuple[Path, int, int]:
    """Pairwise order of least arithmetic, its FLOPs (2 per multiply-add), its largest intermediate."""
    path, info = opt_einsum.contract_path(equation, x, *cores, shapes=True, optimize="optimal")
    return tuple(tuple(step) for step in path), int(info.opt_cost), int(info.largest_intermediate)


@lru_cache(maxsize=1024)
def pairs_of(equation: str, path: Path) -> tuple[Pair, ...]:
    """The products of `path`, an order as opt_einsum gives it, through `equation`."""
    given, result = equation.split("->")
    waiting = list(enumerate(given.split(",")))  # places and their indices
    pairs = []
    for made, step in enumerate(path, start=len(waiting)):
        (right, b), (left, a) = (waiting.pop(place) for place in sorted(step, reverse=True))
        needed = set(result).union(*(indices for _, indices in waiting))
        own = "".join(index for index in dict.fromkeys(a + b) if index in needed) if waiting else result
        pairs.append(Pair(left, right, f"{a},{b}->{own}", f"{own},{b}->{a}", f"{own},{a}->{b}"))
        waiting.append((made, own))
    return tuple(pairs)


def contract(equation: str, path: Path, operands: Sequence[Tensor]) -> Tensor:
    """torch.einsum(equation, *operands) along `path`; each index is in two of operands and result."""
    values: list[Tensor | None] = list(operands)
    for pair in pairs_of(equation, path):
        values.append(torch.einsum(pair.equation, values[pair.left], values[pair.right]))
        values[pair.left] = values[pair.right] = None
    result = values[-1]
    assert result is not None
    return result


def gradients(
    equation: str, path: Path, operands: Sequence[Tensor], grad: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of `contract` for the `wanted` operands, given the result's; intermediates are made again."""
    pairs, given = pairs_of(equation, path), len(operands)
    values, asked = list(operands), list(wanted)
    for pair in pairs:
        asked.append(asked[pair.left] or asked[pair.right])
    for pair in pairs[:-1]:
        values.append(torch.einsum(pair.equation, values[pair.left], values[pair.right]))
    found: list[Tensor | None] = [*[None] * (len(asked) - 1), grad]
    for place in reversed(range(given, len(found))):
        pair, above = pairs[place - given], found.pop()
        del values[place:]
        for factor, other, how in ((pair.left, pair.right, pair.to_left), (pair.right, pair.left, pair.to_right)):
            if asked[factor]:
                found[factor] = torch.einsum(how, above, values[other])
    return found
