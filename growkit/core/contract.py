"""Products of several tensors, pair by pair in the cheapest order, and their gradients.

opt_einsum finds the order. Its own calls plan anew each time, and torch.einsum copies both factors of a pair into an
order of axes that suits it; either may take longer than the product. So the larger factor stays as it lies in memory
wherever the indices summed over are neighbours: (before, summed, after) becomes (before, new, after).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import opt_einsum
import torch
from torch import Tensor

Shapes = tuple[tuple[int, ...], ...]
Path = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Pair:
    """One product, of the factors at two places among what was given and made before.

    large, small        places of the factors
    of_large, of_small  their indices, axis by axis
    before, after, new  the product's indices are before + new + after; the new ones come from the small factor
    summed              the indices of both
    """

    large: int
    small: int
    of_large: str
    of_small: str
    before: str
    summed: str
    after: str
    new: str

    @property
    def indices(self) -> str:
        """Of the product, axis by axis."""
        return self.before + self.new + self.after


@lru_cache(maxsize=1024)
def cheapest_path(equation: str, x: tuple[int, ...], cores: Shapes) -> tuple[Path, int, int]:
    """Pairwise order of least arithmetic, its FLOPs (2 per multiply-add), its largest intermediate."""
    path, info = opt_einsum.contract_path(equation, x, *cores, shapes=True, optimize="optimal")
    return tuple(tuple(step) for step in path), int(info.opt_cost), int(info.largest_intermediate)


@lru_cache(maxsize=1024)
def pairs_of(equation: str, path: Path) -> tuple[Pair, ...]:
    """The products of `path`, an order as opt_einsum gives it; the first operand is taken for the large one."""
    given, result = equation.split("->")
    waiting = list(enumerate(given.split(",")))  # places and their indices
    made = len(waiting)
    heirs, pairs = {0}, []  # places of the first operand and of what came of it
    for step in path:
        one, two = (waiting.pop(place) for place in sorted(step, reverse=True))
        (large, of_large), (small, of_small) = (one, two) if one[0] in heirs else (two, one)
        summed = "".join(index for index in of_large if index in of_small)
        new = "".join(index for index in of_small if index not in summed)
        if summed and summed in of_large:
            before, after = of_large.split(summed)
        else:  # not neighbours: the large factor is copied into another order, of a result that of the result
            before, after = "".join(index for index in of_large if index not in summed), ""
            before = before if waiting else "".join(sorted(before, key=result.index))
        pairs.append(Pair(large, small, of_large, of_small, before, summed, after, new))
        heirs |= {made} if large in heirs else set()
        waiting.append((made, pairs[-1].indices))
        made += 1
    return tuple(pairs)


def contract(equation: str, path: Path, operands: Sequence[Tensor]) -> Tensor:
    """torch.einsum(equation, *operands) along `path`; each index is in two of operands and result."""
    pairs = pairs_of(equation, path)
    values = dict(enumerate(operands))
    for made, pair in enumerate(pairs, start=len(operands)):
        values[made] = _product(pair, values.pop(pair.large), values.pop(pair.small))
    (result,) = values.values()
    return _ordered(result, pairs[-1].indices, equation.split("->")[1])


def gradients(
    equation: str, path: Path, operands: Sequence[Tensor], grad: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of `contract` for the `wanted` operands, given the result's; intermediates are made again."""
    pairs, given = pairs_of(equation, path), len(operands)
    values, asked = list(operands), list(wanted)
    for pair in pairs:
        asked.append(asked[pair.large] or asked[pair.small])
    for pair in pairs[:-1]:
        values.append(_product(pair, values[pair.large], values[pair.small]))
    last = _ordered(grad, equation.split("->")[1], pairs[-1].indices)
    found: list[Tensor | None] = [*[None] * (len(asked) - 1), last]
    for place in reversed(range(given, len(asked))):
        pair, above = pairs[place - given], found.pop()
        del values[place:]
        if above is None:
            continue
        large, small = values[pair.large], values[pair.small]
        if asked[pair.small]:
            found[pair.small] = _gradient_of_small(pair, above, large, small)
        if asked[pair.large]:
            found[pair.large] = _gradient_of_large(pair, above, large, small)
    return found


def _product(pair: Pair, large: Tensor, small: Tensor) -> Tensor:
    """(before, summed, after) times (new, summed): (before, new, after)."""
    here, there = _folded_large(pair, large), _folded(small, pair.of_small, pair.new, pair.summed)
    if not pair.after:
        made = here.squeeze(2) @ there.T
    else:
        made = torch.bmm(there.expand(len(here), -1, -1), here) if pair.before else there @ here[0]
    return made.reshape(
        [
            *_sizes(large, pair.of_large, pair.before),
            *_sizes(small, pair.of_small, pair.new),
            *_sizes(large, pair.of_large, pair.after),
        ]
    )


def _gradient_of_large(pair: Pair, grad: Tensor, large: Tensor, small: Tensor) -> Tensor:
    above = _folded(grad, pair.indices, pair.before, pair.new, pair.after)
    there = _folded(small, pair.of_small, pair.summed, pair.new)
    if not pair.after:
        made = above.squeeze(2) @ there.T
    else:
        made = torch.bmm(there.expand(len(above), -1, -1), above) if pair.before else there @ above[0]
    order = pair.before + pair.summed + pair.after
    return _ordered(made.reshape(_sizes(large, pair.of_large, order)), order, pair.of_large)


def _gradient_of_small(pair: Pair, grad: Tensor, large: Tensor, small: Tensor) -> Tensor:
    above = _folded(grad, pair.indices, pair.before, pair.new, pair.after)
    here = _folded_large(pair, large)
    if not pair.after:
        made = above.squeeze(2).T @ here.squeeze(2)
    elif not pair.before:
        made = above[0] @ here[0].T
    elif above.shape[1] <= above.shape[2]:
        made = torch.bmm(above, here.mT).sum(0)
    else:  # sums of many small products would be larger than the factors
        made = above.transpose(0, 1).flatten(1) @ here.transpose(0, 1).flatten(1).T
    order = pair.new + pair.summed
    return _ordered(made.reshape(_sizes(small, pair.of_small, order)), order, pair.of_small)


def _folded_large(pair: Pair, large: Tensor) -> Tensor:
    return _folded(large, pair.of_large, pair.before, pair.summed, pair.after)


def _folded(tensor: Tensor, indices: str, *groups: str) -> Tensor:
    """One axis for each group of indices; a view where they are neighbours in memory."""
    ordered = _ordered(tensor, indices, "".join(groups))
    return ordered.reshape([prod(_sizes(tensor, indices, group)) for group in groups])


def _ordered(tensor: Tensor, indices: str, wanted: str) -> Tensor:
    return tensor if indices == wanted else tensor.permute([indices.index(index) for index in wanted])


def _sizes(tensor: Tensor, indices: str, wanted: str) -> list[int]:
    return [tensor.shape[indices.index(index)] for index in wanted]
