"""A ring applied slice by slice, in one process or several: forwards, and backwards."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from growkit.core.contract import Pair, Path, contract, float32_sums, gradients, growth, pairs_of, terms_of
from growkit.core.half import ROOM, halved, power_above, scaled, scales_of
from growkit.core.ring_plan import ContractionPlan


class Sliced(torch.autograd.Function):
    """A ring applied slice by slice, each written to its place in the result.

    For the backward pass the first slices keep their intermediates, as many as `room` bytes hold; the others recompute
    them. torch's checkpointing would do the same, but its overhead for a slice exceeds the GPU's work on it. With
    `halves`, factors and intermediates are float16 (see core/half.py).
    """

    @staticmethod
    def forward(
        ctx: Any, equation: str, plan: ContractionPlan, halves: bool, room: int, x: Tensor, *cores: Tensor
    ) -> Tensor:
        ctx.equation, ctx.plan = equation, plan
        grown = grown_like(x, equation, cores)
        factors, scales = [x, *cores], None
        if halves:
            factors, scales, ctx.headroom = _halved(equation, plan, factors)
            whole = scales.prod()
        keeping, kept = room // (factors[0].element_size() * plan.elements), list[Tensor]()
        with nullcontext() if scales is None else float32_sums():
            for number, (places, slice_) in enumerate(cut_up(equation, plan, grown, factors)):
                keep = kept if number < keeping else None
                if plan.parts > 1:
                    made = product(equation, plan.path, slice_, keep=keep)
                    _all_gather(made if scales is None else made.mul_(whole), places)
                elif scales is None:
                    product(equation, plan.path, slice_, out=places[0], keep=keep)
                else:
                    scaled(product(equation, plan.path, slice_, keep=keep), whole, places[0])
        ctx.save_for_backward(*factors, scales, *kept)
        return grown

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[4:]
        saved, end = ctx.saved_tensors, len(wanted)
        factors, scales, kept = saved[:end], saved[end], saved[end + 1 :]
        each = len(factors) - 2  # intermediates of a slice
        grad_scale = inverse_scale = None
        if scales is not None:
            grad_scale = _scale_of_sums(grad, ctx.plan.parts) * ctx.headroom
            inverse_scale = 1 / grad_scale
        found: list[Tensor | None] = [None] * len(wanted)
        cut = 1 + _position(ctx.equation, ctx.plan)
        pieces: list[Tensor] = []  # of the gradient of the core that is cut
        with without_autocast(grad.device.type), nullcontext() if scales is None else float32_sums():
            for nth, (places, slice_) in enumerate(cut_up(ctx.equation, ctx.plan, grad, factors)):
                upstream = _reduce_scatter(places)
                if inverse_scale is not None:
                    upstream = halved(upstream, inverse_scale)
                here = kept[nth * each : (nth + 1) * each]
                for number, part in enumerate(_gradients(ctx.equation, ctx.plan.path, slice_, upstream, wanted, here)):
                    total = found[number]
                    if part is None:
                        continue
                    if number == cut:
                        pieces.append(part)
                    elif total is None:
                        found[number] = part
                    else:
                        total += part
        if pieces:
            found[cut] = _padded(torch.cat(pieces, dim=2), ctx.plan.parts)
        if grad_scale is not None:
            for part, scale in zip(found, grad_scale * scales.prod() / scales, strict=True):
                if part is not None:
                    part.mul_(scale)
        return None, None, None, None, *found


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Turn mixed precision off: a ring's long sums stay in the weights' precision, forwards and backwards."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def cut_up(
    equation: str, plan: ContractionPlan, grown: Tensor, factors: Sequence[Tensor]
) -> Iterator[tuple[tuple[Tensor, ...], list[Tensor]]]:
    """Yield, slice by slice, views of the result, one in each process's part, with the factors of this process's."""
    position, dim = 1 + _position(equation, plan), _axes(equation).index(plan.axis)
    parts = (part.split(plan.width, dim) for part in grown.chunk(plan.parts, dim))
    own = factors[position].chunk(plan.parts, dim=2)[_number(plan.parts)]
    for places, piece in zip(zip(*parts, strict=True), own.split(plan.width, dim=2), strict=True):
        yield places, [*factors[:position], piece, *factors[position + 1 :]]


def _halved(equation: str, plan: ContractionPlan, factors: Sequence[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return float16 factors, their scales (n,), and an extra scale () for the upstream gradient.

    x and that gradient are made so small that no intermediate leaves float16's range, whatever the cores hold.
    """
    scales = scales_of(factors)
    made = list(map(halved, factors, 1 / scales))
    without_single, operands = _prepared(equation, made)
    forwards, backwards = (power_above(bound / ROOM) for bound in growth(without_single, plan.path, operands))
    scales[0] *= forwards
    made[0] /= forwards
    return _laid_out(equation, pairs_of(without_single, plan.path), made), scales, backwards


def _laid_out(equation: str, pairs: Sequence[Pair], factors: Sequence[Tensor]) -> list[Tensor]:
    """Lay the cores out in memory as `pairs` take them: otherwise each slice would copy those that are not cut."""
    laid = list(factors)
    for pair in pairs:
        if 0 < pair.small < len(factors):
            term = terms_of(equation)[pair.small]
            taken = pair.new + pair.lead + pair.summed
            order = [term.index(index) for index in sorted(term, key=(taken + term).index)]
            back = [order.index(place) for place in range(len(order))]
            laid[pair.small] = laid[pair.small].permute(order).contiguous().permute(back)
    return laid


def _number(parts: int) -> int:
    """Return the index of this process's part."""
    return dist.get_rank() if parts > 1 else 0


def _all_gather(made: Tensor, places: Sequence[Tensor]) -> None:
    """Write what each process made to its place, on every process."""
    if len(places) == 1 or made.is_meta:
        places[_number(len(places))].copy_(made)
        return
    parts = [torch.empty_like(made, memory_format=torch.contiguous_format) for _ in places]
    dist.all_gather(parts, made.contiguous())
    for place, part in zip(places, parts, strict=True):
        place.copy_(part)


def _reduce_scatter(places: Sequence[Tensor]) -> Tensor:
    """Sum what lies in this process's place over all processes."""
    own = places[_number(len(places))]
    if len(places) == 1 or own.is_meta:
        return own
    total = torch.empty_like(own, memory_format=torch.contiguous_format)
    dist.reduce_scatter(total, [place.contiguous() for place in places])
    return total


def _scale_of_sums(grad: Tensor, parts: int) -> Tensor:
    """Return a bound on sums over the processes, for `halved`; it is the same in each process."""
    (scale,) = scales_of([grad])
    if parts > 1 and not scale.is_meta:
        dist.all_reduce(scale, dist.ReduceOp.MAX)
    return scale * 2 ** (parts - 1).bit_length()


def _padded(own: Tensor, parts: int) -> Tensor:
    """Pad this process's part of a core's gradient with zeros where the other processes have theirs."""
    if parts == 1:
        return own
    whole = own.new_zeros((*own.shape[:2], parts * own.shape[2], own.shape[3]))
    whole.chunk(parts, dim=2)[_number(parts)].copy_(own)
    return whole


def _position(equation: str, plan: ContractionPlan) -> int:
    """Return which core is cut."""
    return next(n for n, term in enumerate(terms_of(equation)[1:]) if term[2] == plan.axis)


def _axes(equation: str) -> str:
    """Return the axes of the result, in order."""
    return equation.partition("->")[2]


def grown_like(x: Tensor, equation: str, cores: Sequence[Tensor]) -> Tensor:
    """Allocate the result of growing x, laid out in memory layer by layer, as weights are."""
    sizes = {term[2]: core.shape[2] for term, core in zip(terms_of(equation)[1:], cores, strict=True)}
    return x.new_empty([sizes[axis] for axis in "BLOI"]).permute(["BLOI".index(axis) for axis in _axes(equation)])


def product(
    equation: str,
    path: Path,
    factors: Sequence[Tensor],
    out: Tensor | None = None,
    keep: list[Tensor] | None = None,
) -> Tensor:
    """Compute the einsum `equation` along `path`; factors are x and the cores, `out` and `keep` as in `contract`."""
    without_single, operands = _prepared(equation, factors)
    return contract(without_single, path, operands, out, keep)


def _gradients(
    equation: str,
    path: Path,
    factors: Sequence[Tensor],
    grad: Tensor,
    wanted: Sequence[bool],
    kept: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients of `product` for its factors."""
    without_single, operands = _prepared(equation, factors)
    found = gradients(without_single, path, operands, grad, wanted, kept)
    return [part if part is None else part.reshape(of.shape) for part, of in zip(found, factors, strict=True)]


def _prepared(equation: str, factors: Sequence[Tensor]) -> tuple[str, list[Tensor]]:
    """Remove bonds of one index from equation and factors: torch would sum over them by copying the large tensor."""
    x, *cores = factors
    terms = terms_of(equation)[1:]  # of a core: bond, old axis, grown axis, bond
    single = {term[0] for term, core in zip(terms, cores, strict=True) if len(core) == 1}
    if not single:
        return equation, [x, *cores]
    operands = [
        core.squeeze(tuple(place for place in (0, 3) if term[place] in single))
        for term, core in zip(terms, cores, strict=True)
    ]
    return equation.translate({ord(bond): None for bond in single}), [x, *operands]
