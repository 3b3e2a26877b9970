"""How the grown residual gets its mean where a norm writes it, as CLIP's norm before the blocks does.

Average expansion (LEMON) needs every new channel to hold the mean of the others. Linear operations keep that mean; a
LayerNorm with unequal gains g does not: it maps x to g (x - mean) / deviation + b, whose mean over the channels is
sum((g - mean(g)) x) / (old deviation) + mean(b), a different number for each token. So the stem writes that sum into
the new channels, small and with alternating signs, on top of their mean: it hardly changes the norm's statistics, and
the gain of a new channel scales it back up. No published method does this.
"""

import torch
from torch import Tensor

from growkit.arch.spec import Architecture, Weights
from growkit.core import maps

NORM = "norm_pre"
EMBEDDING = ("cls_token", "dist_token", "reg_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")
DISTURBANCE = 1e-6  # relative growth of the variance that the norm sees, if x is independent of g


def carry_mean(source: Architecture, target: Architecture, weights: Weights, grown: Weights) -> Weights:
    """Add to `grown` what the stem and the norm behind it need; unchanged if there is no such norm or no tail.

    Exact to `DISTURBANCE`. Gradients pass.
    """
    old, new = source.spaces["embed"].size, target.spaces["embed"].size
    tail = new % old
    if tail < 2 or not (source.centred and source.has(NORM)):
        return grown
    gain = weights[f"{NORM}.weight"]
    spread = gain - gain.mean()
    variance = spread.square().mean()
    even = variance == 0  # nothing to carry; not a branch, which would wait for a GPU and is impossible on meta tensors
    signs = alternating(tail, gain)
    share = DISTURBANCE * (new - tail) / signs.square().sum()
    size = (share * old / variance.where(~even, 1)).sqrt()
    push = torch.cat([gain.new_zeros(new - tail, old), torch.outer(signs * size, spread / old)])
    carried = dict(grown)
    for row in source.tensors:
        (slot, *_) = row.slots
        if slot in EMBEDDING:
            axis = row.dims.index("embed")
            pushed = torch.tensordot(push, weights[slot], dims=([1], [axis])).movedim(0, axis)
            carried[slot] = grown[slot] + pushed
    start = grown[f"{NORM}.weight"]
    wanted = maps.norm_gain(old, new) / (signs * size)
    # Added, so that a method's trained parameters still move it.
    change = torch.cat([torch.zeros_like(start[:-tail]), (wanted - start[-tail:].detach()).where(~even, 0)])
    carried[f"{NORM}.weight"] = start + change
    return carried


def alternating(count: int, like: Tensor) -> Tensor:
    """Return `count` >= 2 numbers of magnitude 1 or 2 that sum to zero, with the dtype and device of `like`."""
    signs = like.new_ones(count)
    signs[1::2] = -1
    if count % 2:
        signs[0], signs[2] = 2, -1
        signs[3::2], signs[4::2] = 1, -1
    return signs
