"""What growing would give and cost, without training or writing anything.

Starts are computed from the real weights; FLOPs are counted on meta tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch.nn.functional import cross_entropy

from growkit.adapt import with_classes, with_input
from growkit.arch import build, find, find_target
from growkit.arch.spec import Architecture
from growkit.core.ring import AXES
from growkit.grow import GrownModel, grow, lossless_gap
from growkit.methods import METHODS, able
from growkit.methods.base import refuse_shrinking
from growkit.methods.mango import Mango
from growkit.ranges import refuse_number
from growkit.settings import GrowSettings
from growkit.source import Source
from growkit.train.flops import count_step
from growkit.train.progress import Progress, each, no_progress

RANKS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Size:
    """One space of source and target."""

    name: str
    source: int
    target: int


@dataclass(frozen=True)
class RankCost:
    """Mango at one rank. FLOPs are of a whole training update, the operator's contraction included."""

    rank: int
    operator_parameters: int
    gap: float  # largest logit difference from the source at the start, float32
    flops_per_step: int
    macs_per_step: int
    slice_bytes: int  # float32 bytes of the contraction's largest intermediate


@dataclass(frozen=True)
class MethodCost:
    """A method on this pair: why it cannot grow it, or whether it preserves the function and its trainable size."""

    name: str
    cannot: str | None
    lossless: bool | None
    operator_parameters: int
    flops_per_step: int | None  # of operator training; None for a fixed rule


@dataclass(frozen=True)
class Plan:
    """Pairs hold (source, target)."""

    target: str
    notes: tuple[str, ...]
    sizes: tuple[Size, ...]
    parameters: tuple[int, int]
    flops_per_step: tuple[int, int]
    ranks: tuple[RankCost, ...]  # empty where Mango cannot grow the pair
    methods: tuple[MethodCost, ...]


def plan_growth(
    source: Source, to: str, sets: Sequence[str], *, batch_size: int, progress: Progress = no_progress
) -> Plan:
    """Sizes, parameters, exactness of the start and cost of growing `source` into `to` at several ranks.

    `progress` is told how many methods and ranks are done.

    Raises:
        GrowkitError: the target is unknown or cannot be grown from this source.
    """
    refuse_number("--batch-size", batch_size, least=1)
    find(to)  # another family's arguments would look like typing errors
    source = with_classes(with_input(source, sets), None, sets, seed=0)
    target, notes = find_target(source.architecture, to, sets)
    refuse_shrinking(source.architecture, target)
    tried = RANKS if "mango" in able(source.architecture, target) else ()
    counted = each((*METHODS, *tried), progress)
    methods = tuple(_method_cost(str(name), source, target, batch_size) for name in islice(counted, len(METHODS)))
    small, ranks, gap = source.model(), list[RankCost](), 0.0
    for rank in map(int, counted):
        grown = grow(source.architecture, target, source.state, GrowSettings(rank=rank))
        if rank <= 2:  # higher ranks start as rank 2 does, with two paths
            gap = lossless_gap(small, grown.materialize(), seed=0)
        ranks.append(_rank_cost(rank, grown, target, batch_size, gap))
    both = (source.architecture, target)
    return Plan(
        target=target.name,
        notes=(*source.adapted, *notes),
        sizes=tuple(
            Size(name, space.size, target.spaces[name].size) for name, space in source.architecture.spaces.items()
        ),
        parameters=(source.architecture.parameters, target.parameters),
        flops_per_step=tuple(  # type: ignore[arg-type]
            step_flops(build(a.name, a.arguments, device="meta"), a, batch_size) for a in both
        ),
        ranks=tuple(ranks),
        methods=methods,
    )


def _rank_cost(rank: int, grown: GrownModel, target: Architecture, batch_size: int, gap: float) -> RankCost:
    assert isinstance(grown.method, Mango)
    ring = grown.method.ring
    packed = torch.empty([ring.cores[axis].shape[1] for axis in AXES], device="meta")
    contraction = ring.plan(packed, [ring.cores[axis] for axis in ring.order])
    flops = step_flops(grown.to("meta"), target, batch_size)
    return RankCost(
        rank=rank,
        operator_parameters=sum(p.numel() for p in grown.method.parameters()),
        gap=gap,
        flops_per_step=flops,
        macs_per_step=flops // 2,
        slice_bytes=4 * contraction.largest_elements,
    )


def _method_cost(name: str, source: Source, target: Architecture, batch_size: int) -> MethodCost:
    """Cost of a method with its default settings on a pair."""
    settings = GrowSettings(method=name)
    reason = METHODS[name].cannot(source.architecture, target, settings)
    if reason is not None:
        return MethodCost(name, reason, None, 0, None)
    grown = grow(source.architecture, target, source.state, settings)
    parameters = sum(p.numel() for p in grown.method.parameters())
    flops = step_flops(grown.to("meta"), target, batch_size) if parameters else None
    return MethodCost(name, None, grown.method.lossless, parameters, flops)


def step_flops(model: torch.nn.Module, architecture: Architecture, batch_size: int, batches: int = 1) -> int:
    """FLOPs of one training update, of one or several batches, of a model on the meta device."""
    image = build(architecture.name, architecture.arguments, device="meta").patch_embed
    images = torch.empty(batch_size, image.proj.in_channels, *image.img_size, device="meta")
    labels = torch.zeros(batch_size, dtype=torch.long, device="meta")
    return count_step(model, (images, labels), cross_entropy).of_update(batches)
