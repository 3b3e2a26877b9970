"""LiGO (Wang et al., ICLR 2023): width and depth maps as parameters, trained on the task for a few steps.

W_new,l = sum_j w_lj B_j W_j A_j^T (Eq. 3 and 4). The tensors that write a space and those that read it share one
matrix, tied as in the paper: A of q, k, v and of the first MLP matrix, B of o and of the second, embeddings, norms and
head all take B_emb, one for all layers; A of o is B of v, A of the second MLP matrix is B of the first, one for each
source layer. The depth rows w are one set for each module (q, k, v, o, both norms, both MLP matrices), for its weight
and its bias.

The start is duplication and stacking (l mod L1). A tied matrix cannot copy on one side and divide on the other, so
each side takes the square root: duplicates over sqrt(copies), or plain ones for q and k, which no tied matrix reads.
This keeps the residual at whole multiples, but not the MLP, whose GELU is not homogeneous: LiGO is not lossless. Noise
on a matrix that both writes and reads does not cancel, so only a tenth of --noise breaks the copies' symmetry.

The released code differs from the paper: it learns only the new rows, starts them at random and the depth rows as a
noisy stack, with matrices for each target layer; and its warm-up of 10,000 steps hardly moves them in its 100 steps.
"""

import torch
from torch import Tensor, nn

from growkit.arch.spec import LAYERS, Architecture, Weights
from growkit.core import maps
from growkit.methods.base import GrowthMethod
from growkit.methods.expand import SpaceMap, expand
from growkit.settings import GrowSettings

TIES = {"q": "attn", "k": "attn", "v": "attn", "in": "mlp"}  # the slots that own a hidden matrix, and its space
TIED_NOISE = 0.1
# Whose matrix the other slots of a hidden space take: its readers, a norm over it, SwiGLU's gate.
FOLLOWERS = {"o": "v", "out": "in", "norm_attn": "v", "norm_mlp": "in", "gate": "in"}


class LiGO(GrowthMethod):
    """Trainable width and depth maps, tied as in the paper."""

    def __init__(self, source: Architecture, target: Architecture, settings: GrowSettings):
        super().__init__(source, target, settings)
        generator = torch.Generator().manual_seed(settings.seed)
        layers = source.spaces[LAYERS].size

        def start(space: str, *, shared: bool) -> Tensor:
            old, new = source.spaces[space], target.spaces[space]
            copies = maps.duplicate(old.size, new.size, old.group)
            scale = copies.sum(0).sqrt() if shared else torch.ones(())
            return (copies + TIED_NOISE * settings.noise * maps.parting_noise(copies, generator)) / scale

        self.embed = nn.Parameter(start("embed", shared=True))
        self.hidden = nn.ParameterDict(
            {
                slot: torch.stack([start(space, shared=slot not in ("q", "k")) for _ in range(layers)])
                for slot, space in TIES.items()
            }
        )
        self.pool = nn.ParameterDict(
            {space: start(space, shared=True) for space in source.widths if space not in ("embed", "attn", "mlp")}
        )
        modules = sorted({slot.split(".")[0] for row in source.tensors if row.layered for slot in row.slots})
        stack = maps.duplicate(layers, target.spaces[LAYERS].size)
        self.depth = nn.ParameterDict({module: stack.clone() for module in modules})

    def forward(self, weights: Weights) -> Weights:
        """Slots of the source -> slots of the target."""
        embed = SpaceMap.tied(self.embed)
        by_slot: dict[str | tuple[str, str], SpaceMap] = {"embed": embed}
        for slot, space in TIES.items():
            for kind in ("weight", "bias"):
                by_slot[f"{slot}.{kind}", space] = SpaceMap.tied(self.hidden[slot])
        for follower, owner in FOLLOWERS.items():
            for kind in ("weight", "bias"):
                by_slot[f"{follower}.{kind}", TIES[owner]] = SpaceMap.tied(self.hidden[owner])
        for space, matrix in self.pool.items():
            by_slot[space] = SpaceMap.tied(matrix)
        for module, rows in self.depth.items():
            for kind in ("weight", "bias", "gamma"):
                by_slot[f"{module}.{kind}", LAYERS] = SpaceMap.tied(rows)
        return expand(self.source.tensors, weights, by_slot)
