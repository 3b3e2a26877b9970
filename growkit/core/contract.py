"""Products of several tensors, pair by pair in the cheapest order, and their gradients.

All orders are compared; a ring has 180. torch.einsum copies both factors of a pair into an axis order that suits it,
which may take longer than the product. So the larger factor keeps its memory layout wherever the summed indices are
adjacent, (before, summed, after) becoming (before, new, after), or lie at both ends, (lead, before, summed) becoming
(before, new). float16 factors make float16 intermediates, summed as in `float32_sums`; the result of the last product
and the gradients of the operands are then float32.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, combinations, pairwise
from math import prod
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from growkit.core.half import kernels_for

Shapes = tuple[tuple[int, ...], ...]
Path = tuple[tuple[int, ...], ...]
SPARE = 1.05  # times the cheapest order's arithmetic that another may take, for what it saves elsewhere


@dataclass(frozen=True)
class Pair:
    """One product, of the factors at two places among the operands and the products made before.

    large, small        places of the factors
    of_large, of_small  their indices, axis by axis
    before, after, new  the product's indices are before + new + after; the new ones come from the small factor
    lead, summed        the indices that both factors have: those in front of `before`, and the others
    """

    large: int
    small: int
    of_large: str
    of_small: str
    lead: str
    before: str
    summed: str
    after: str
    new: str

    @property
    def indices(self) -> str:
        """The product's indices, axis by axis."""
        return self.before + self.new + self.after


class Order(NamedTuple):
    """A pairwise order of an equation's products.

    flops           of the products, 2 per multiply-add
    training_flops  those, plus a backward pass: gradients of all but the first operand, and recomputed intermediates
    largest         elements of the largest intermediate, or of the result
    intermediates   elements of all intermediates together
    """

    path: Path
    flops: int
    training_flops: int
    largest: int
    intermediates: int


@lru_cache(maxsize=1024)
def cheapest_orders(equation: str, x: tuple[int, ...], cores: Shapes) -> tuple[Order, ...]:
    """Return the order with the fewest FLOPs and, if different, the one of those near it with the fewest in training.

    The first may multiply two operands that both want a gradient, to save next to nothing.
    """
    paths, over, left, factors = _orders(equation)
    size_of = dict(zip("".join(terms_of(equation)), chain(x, *cores), strict=True))
    sizes = np.array([float(size_of[index]) for index in _letters(equation)])
    forwards = np.where(over, sizes, 1).prod(-1) * (1 + (over != left).any(-1))  # (orders, products)
    flops = forwards.sum(-1)
    gradients = (forwards * factors).sum(-1)
    training = flops + gradients + forwards[:, :-1].sum(-1)
    elements = np.where(left, sizes, 1).prod(-1)  # of each product's result
    largest, intermediates = elements.max(-1), elements[:, :-1].sum(-1)
    number = int(np.lexsort((gradients, flops))[0])
    other = int(np.where(flops <= SPARE * flops[number], training, np.inf).argmin())
    chosen = (number, other) if training[other] < training[number] else (number,)
    found = flops, training, largest, intermediates
    return tuple(Order(paths[n], *(int(of_each[n]) for of_each in found)) for n in chosen)


def _letters(equation: str) -> str:
    return "".join(dict.fromkeys(equation.split("->")[0].replace(",", "")))


@lru_cache(maxsize=64)
def _orders(equation: str) -> tuple[tuple[Path, ...], np.ndarray, np.ndarray, np.ndarray]:
    """Return all orders and, for each product of each: which indices it runs over and which are left (orders, products,
    indices), and how many of its factors want gradients (orders, products).
    """
    terms, result, letters = terms_of(equation), set(equation.split("->")[1]), _letters(equation)
    paths = _paths(len(terms))
    over = np.zeros((len(paths), len(terms) - 1, len(letters)), bool)
    left, factors = over.copy(), np.zeros(over.shape[:2], int)
    for number, path in enumerate(paths):
        waiting = [(set(term), place > 0) for place, term in enumerate(terms)]
        for place, step in enumerate(path):
            (one, wants_one), (two, wants_two) = (waiting.pop(taken) for taken in sorted(step, reverse=True))
            made = (one | two) & result.union(*(term for term, _ in waiting))
            over[number, place] = [index in one | two for index in letters]
            left[number, place] = [index in made for index in letters]
            factors[number, place] = wants_one + wants_two
            waiting.append((made, wants_one or wants_two))
    return paths, over, left, factors


@lru_cache(maxsize=8)
def _paths(operands: int) -> tuple[Path, ...]:
    """List all pairwise orders: places among what is left, where each product comes last."""
    if operands == 1:
        return ((),)
    return tuple((pair, *rest) for pair in combinations(range(operands), 2) for rest in _paths(operands - 1))


def terms_of(equation: str) -> list[str]:
    """The indices of each operand."""
    return equation.split("->")[0].split(",")


@lru_cache(maxsize=1024)
def pairs_of(equation: str, path: Path) -> tuple[Pair, ...]:
    """Return the products of `path`, one of `_paths`; the first operand, and what comes of it, is the large one."""
    result = equation.split("->")[1]
    waiting = list(enumerate(terms_of(equation)))  # places and their indices
    made = len(waiting)
    heirs, pairs = {0}, []  # places of the first operand and of all products made from it
    for step in path:
        one, two = (waiting.pop(place) for place in sorted(step, reverse=True))
        (large, of_large), (small, of_small) = (one, two) if one[0] in heirs else (two, one)
        summed = "".join(index for index in of_large if index in of_small)
        new = "".join(index for index in of_small if index not in summed)
        lead, kept = "", "".join(index for index in of_large if index not in summed)
        if summed and summed in of_large:
            before, after = of_large.split(summed)
        elif kept and kept in of_large:
            before, after = kept, ""
            lead, summed = of_large.split(kept)
        else:  # the large factor is copied into another axis order; in the last product, the result's
            before, after = kept if waiting else "".join(sorted(kept, key=result.index)), ""
        pairs.append(Pair(large, small, of_large, of_small, lead, before, summed, after, new))
        heirs |= {made} if large in heirs else set()
        waiting.append((made, pairs[-1].indices))
        made += 1
    return tuple(pairs)


def contract(
    equation: str,
    path: Path,
    operands: Sequence[Tensor],
    out: Tensor | None = None,
    keep: list[Tensor] | None = None,
) -> Tensor:
    """Compute torch.einsum(equation, *operands) along `path`; each index is in exactly two of operands and result.

    The result is written to `out` if given, whatever its strides. Intermediates are appended to `keep` if given.
    """
    pairs = pairs_of(equation, path)
    values = dict(enumerate(operands))
    for made, (pair, then) in enumerate(pairwise(pairs), start=len(operands)):
        values[made] = _product(pair, values.pop(pair.large), values.pop(pair.small), then)
        if keep is not None:
            keep.append(values[made])
    pair, result = pairs[-1], equation.split("->")[1]
    parts = _parts(pair, values.pop(pair.large), values.pop(pair.small), wide=True)
    if out is None:
        return _ordered(_together(parts), pair.indices, result)
    torch.sum(parts, 0, out=_ordered(out, result, pair.indices))
    return out


def gradients(
    equation: str,
    path: Path,
    operands: Sequence[Tensor],
    grad: Tensor,
    wanted: Sequence[bool],
    kept: Sequence[Tensor] = (),
) -> list[Tensor | None]:
    """Return the gradients of `contract` for the `wanted` operands, given the result's.

    Intermediates that it `kept` are used; the others are recomputed.
    """
    pairs, given = pairs_of(equation, path), len(operands)
    values, asked = [*operands, *kept], list(wanted)
    for pair in pairs:
        asked.append(asked[pair.large] or asked[pair.small])
    for pair in pairs[len(kept) : -1]:
        values.append(_product(pair, values[pair.large], values[pair.small]))
    last = _ordered(grad, equation.split("->")[1], pairs[-1].indices)
    found: list[Tensor | None] = [*[None] * (len(asked) - 1), last]
    for place in reversed(range(given, len(asked))):
        pair, above = pairs[place - given], found.pop()
        del values[place:]
        if above is None:
            continue
        large, small = values[pair.large], values[pair.small]
        above = _folded(above, pair.indices, pair.before, pair.new, pair.after)
        if asked[pair.small] and asked[pair.large] and pair.large >= given > pair.small:
            together = _gradients_together(pair, above, large, small)
            if together is not None:
                found[pair.small], found[pair.large] = together
                continue
        if asked[pair.small]:
            found[pair.small] = _gradient_of_small(pair, above, large, small, wide=pair.small < given)
        if asked[pair.large]:
            found[pair.large] = _gradient_of_large(pair, above, large, small, wide=pair.large < given)
    return found


def growth(equation: str, path: Path, operands: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Bound the intermediates of `contract`, and of `gradients`, if no element of an operand is above 1.

    Both bounds have shape () and are at least 1; the second assumes that the result's gradient is not above 1 either.
    """
    pairs, given = pairs_of(equation, path), len(operands)
    one = torch.ones((), device=operands[0].device)
    terms = zip(terms_of(equation), operands, strict=True)
    sizes = {index: size for term, operand in terms for index, size in zip(term, operand.shape, strict=True)}

    def sums(pair: Pair, over: str) -> Tensor:
        """Return the largest sum of the small factor's magnitudes over these of its indices."""
        if pair.small >= given:
            return largest[pair.small] * prod(sizes[index] for index in over)
        places = tuple(pair.of_small.index(index) for index in over)
        small = operands[pair.small]
        return (torch.linalg.vector_norm(small, 1, places, dtype=torch.float32) if over else small.abs()).amax()

    largest = [one] * given
    for pair in pairs:
        largest.append(largest[pair.large] * sums(pair, pair.lead + pair.summed))
    above = {len(largest) - 1: one}
    for place in reversed(range(given, len(largest))):
        pair = pairs[place - given]
        above[pair.large] = above[place] * sums(pair, pair.new)
        above[pair.small] = above[place] * largest[pair.large] * prod(sizes[i] for i in pair.before + pair.after)
    backwards = [above[place] for place in range(given, len(largest))]
    return torch.stack([one, *largest[given:-1]]).amax(), torch.stack([one, *backwards]).amax()


@contextmanager
def float32_sums() -> Iterator[None]:
    """Have CUDA sum float16 products in float32 throughout; on exit torch's own setting is restored."""
    place = torch.backends.cuda.matmul
    name = "allow_fp16_reduced_precision_reduction"
    before = getattr(place, name), getattr(place, f"{name}_split_k")
    try:
        setattr(place, name, False)
        yield
    finally:
        setattr(place, name, before)


def _product(pair: Pair, large: Tensor, small: Tensor, then: Pair | None = None) -> Tensor:
    """Return (before, new, after); if a kernel makes it, the indices that `then` sums over are adjacent in memory."""
    kernels = _kernels(pair, large, small)
    if kernels:
        here, there = _folded_large(pair, large), _folded(small, pair.of_small, pair.lead, pair.new, pair.summed)
        sizes = dict(zip(pair.of_large + pair.of_small, (*large.shape, *small.shape), strict=True))
        orders = [pair.indices]
        if then and then.lead and then.of_large == pair.indices:
            orders.insert(0, then.before + then.lead + then.summed)
        for order in orders:
            made = _ordered(large.new_empty([sizes[index] for index in order]), order, pair.indices)
            if kernels.product(there[0], here[0], made, len(pair.before), len(pair.new)):
                return made
    return _together(_parts(pair, large, small, wide=False))


def _parts(pair: Pair, large: Tensor, small: Tensor, *, wide: bool) -> Tensor:
    """Multiply (before, summed, after) by (new, summed) per index of `lead`: (before, new, after), not yet added up."""
    if pair.lead and _ordered(large, pair.of_large, pair.before + pair.lead + pair.summed).is_contiguous():
        pair = replace(pair, lead="", summed=pair.lead + pair.summed)
    here = _folded_large(pair, large)
    there = _folded(small, pair.of_small, pair.lead, pair.new, pair.summed)
    if not pair.after:
        made = _matmul(here.squeeze(3), there.mT, wide)
    else:
        made = _matmul(there.expand(here.shape[1], -1, -1), here.squeeze(0), wide)
    sizes = (
        *_sizes(large, pair.of_large, pair.before),
        *_sizes(small, pair.of_small, pair.new),
        *_sizes(large, pair.of_large, pair.after),
    )
    return made.reshape(-1, *sizes)


def _gradients_together(pair: Pair, above: Tensor, large: Tensor, small: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the gradients of small and large, read and written once, if a kernel can do that; else None."""
    kernels = _kernels(pair, large, small)
    if not kernels:
        return None
    here, there = _folded_large(pair, large), _folded(small, pair.of_small, pair.lead, pair.new, pair.summed)
    of_small, of_large = kernels.gradients(there[0], here[0], above)
    order = pair.new + pair.summed
    of_small = of_small.reshape(_sizes(small, pair.of_small, order))
    return _ordered(of_small, order, pair.of_small), of_large.reshape(large.shape)


def _kernels(pair: Pair, large: Tensor, small: Tensor) -> ModuleType | None:
    """growkit.core.kernels, where they apply to these factors."""
    if not pair.after or large.dtype != torch.float16 or not (kernels := kernels_for(large)):
        return None
    sides = (prod(_sizes(small, pair.of_small, side)) for side in (pair.new, pair.summed))
    return kernels if max(sides) <= kernels.LARGEST else None


def _together(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0)


def _gradient_of_large(pair: Pair, above: Tensor, large: Tensor, small: Tensor, *, wide: bool) -> Tensor:
    """Return the large factor's gradient, given the product's (before, new, after)."""
    there = _folded(small, pair.of_small, pair.lead, pair.summed, pair.new)
    if not pair.after:
        made = _matmul(above.squeeze(2).expand(len(there), -1, -1), there.mT, wide)
    else:
        made = _matmul(there.expand(len(above), -1, -1), above, wide)
    order = pair.lead + pair.before + pair.summed + pair.after
    return _ordered(made.reshape(_sizes(large, pair.of_large, order)), order, pair.of_large)


def _gradient_of_small(pair: Pair, above: Tensor, large: Tensor, small: Tensor, *, wide: bool) -> Tensor:
    """Return the small factor's gradient, given the product's (before, new, after)."""
    here = _folded_large(pair, large)
    if not pair.after:
        made = _matmul(above.squeeze(2).T.expand(len(here), -1, -1), here.squeeze(3), wide)
    elif above.shape[1] <= above.shape[2]:
        made = _together(_matmul(above, here.squeeze(0).mT, wide))
    else:  # sums of many small products would be larger than the factors
        made = _matmul(above.transpose(0, 1).flatten(1), here.squeeze(0).transpose(0, 1).flatten(1).T, wide)
    order = pair.lead + pair.new + pair.summed
    return _ordered(made.reshape(_sizes(small, pair.of_small, order)), order, pair.of_small)


def _matmul(one: Tensor, other: Tensor, wide: bool) -> Tensor:
    """Multiply matrices, or equally large batches of them; the product of float16 ones is float32 if `wide`."""
    if len(one) == 1 and one.dim() == 3:
        return _matmul(one[0], other[0], wide)[None]
    product = torch.bmm if one.dim() == 3 else torch.mm
    if not wide or one.dtype != torch.float16:
        return product(one, other)
    if one.is_cuda:
        return product(one, other, out_dtype=torch.float32)
    return product(one.float(), other.float())


def _folded_large(pair: Pair, large: Tensor) -> Tensor:
    """Fold to (lead, before, summed, after); one of lead and after is empty."""
    return _folded(large, pair.of_large, pair.lead, pair.before, pair.summed, pair.after)


def _folded(tensor: Tensor, indices: str, *groups: str) -> Tensor:
    """Fold each group of indices into one axis; a view where they are adjacent in memory."""
    ordered = _ordered(tensor, indices, "".join(groups))
    return ordered.reshape([prod(_sizes(tensor, indices, group)) for group in groups])


def _ordered(tensor: Tensor, indices: str, wanted: str) -> Tensor:
    return tensor if indices == wanted else tensor.permute([indices.index(index) for index in wanted])


def _sizes(tensor: Tensor, indices: str, wanted: str) -> list[int]:
    return [tensor.shape[indices.index(index)] for index in wanted]
