"""Mango (Pan et al., NeurIPS 2023): every weight of the target from all weights of the source, by a tensor ring.

The six matrices of all layers are stacked into one tensor and grown by `RingOperator`; vectors, embeddings
and the head are grown by `expand` with maps of their own. Cores and maps are the trainable parameters.

--variant says how the ring is initialised: `lossless`, to the source's function; `noisy`, to that plus noise on every
entry of the cores, at whatever cost; `random`, to normal numbers that keep the weights' scale.
"""

from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from growkit.arch.spec import LAYERS, Architecture, TensorSpec, Weights
from growkit.core import maps
from growkit.core.ring import RingOperator
from growkit.errors import GrowkitError
from growkit.methods.base import GrowthMethod, averages, growing, normed_inside, whole
from growkit.methods.carried_mean import carry_mean
from growkit.methods.expand import BRANCHES, SpaceMap, expand, parted_copies, read_maps, residual_vectors, vector_maps
from growkit.settings import MOST_RANK, GrowSettings

ATTENTION = ("q", "k", "v", "o")
HIDDEN = ("in", "gate")  # the slots that write the MLP's hidden units; the gate only in a SwiGLU
MATRICES = tuple(f"{slot}.weight" for slot in (*ATTENTION, *HIDDEN, "out"))
CORE_NOISE = 0.1  # share of --noise, because nothing cancels it here
READ = "_read"  # suffix of the map that readers of a space take, where it differs from the writers'
MLP_BLOCKS = "mlp_blocks"  # the space of the k blocks, each as wide as attention, that `pack` cuts the MLP into


def pack(weights: Weights) -> Tensor:
    """Slots -> (B, O, L, I), B = 4 + 2k: q k v o, then the k blocks of in (rows), then those of out (columns).

    With a gate, whose k blocks of rows come after those of in, B = 4 + 3k.
    """
    attention = [weights[f"{slot}.weight"] for slot in ATTENTION]
    width = attention[0].shape[1]
    hidden = [weights[f"{slot}.weight"] for slot in HIDDEN if f"{slot}.weight" in weights]
    blocks = [block for matrix in hidden for block in matrix.split(width, dim=1)]
    matrices = (*attention, *blocks, *weights["out.weight"].split(width, dim=2))
    return torch.stack([matrix.transpose(0, 1) for matrix in matrices])  # laid out in memory as a ring takes it


def unpack(stacked: Tensor, *, gated: bool = False) -> Weights:
    """Inverse of pack: (B, O, L, I) -> the six slots, or seven with a gate, layered."""
    blocks = stacked.permute(0, 2, 1, 3).unbind(0)
    hidden = HIDDEN[: 1 + gated]
    k = (len(blocks) - 4) // (len(hidden) + 1)
    weights = dict(zip(MATRICES[:4], blocks[:4], strict=True))
    # A copy, as the others will be when they are joined: a view would keep the whole stack alive.
    weights["o.weight"] = weights["o.weight"].clone(memory_format=torch.contiguous_format)
    for number, slot in enumerate(hidden):
        weights[f"{slot}.weight"] = torch.cat(blocks[4 + number * k : 4 + (number + 1) * k], dim=1)
    weights["out.weight"] = torch.cat(blocks[4 + len(hidden) * k :], dim=2)
    return weights


class Mango(GrowthMethod):
    """Grows by a tensor ring that starts from the source's function, at any rank, width and depth.

    Built in float64 so that the start is exact; `.to(dtype)` afterwards, as GrownModel does.

    Raises:
        GrowkitError: the ranks or the order make no ring.
    """

    VARIANTS: ClassVar[tuple[str, ...]] = ("lossless", "noisy", "random")
    TAKES: ClassVar[frozenset[str]] = frozenset({"noise", "rank", "ranks", "ring_order", "vectors"})

    @classmethod
    def cannot(cls, source: Architecture, target: Architecture, settings: GrowSettings) -> str | None:
        """Say why the six matrices of these sizes do not cut into square slots."""
        try:
            old = mlp_blocks(source)
        except GrowkitError as error:
            return f"the source's {error}"  # which no --set changes
        try:
            new = mlp_blocks(target)
        except GrowkitError as error:
            sizes = target.spaces
            return f"{error}; choose --set mlp_ratio={max(old, -(-sizes['mlp'].size // sizes['embed'].size))}"
        if new < old:
            return f"mlp: ratio {old} -> {new} would drop blocks; choose --set mlp_ratio={old} or more"
        return None

    @property
    def lossless(self) -> bool:
        """The `lossless` variant is, and `noisy` without noise, wherever the residual's mean can be kept.

        A norm inside a layer must also see whole copies.
        """
        pair = self.source, self.target
        kept = averages(*pair) and (not normed_inside(self.source) or whole(*pair, "embed"))
        if self.source.has("norm_mlp"):
            kept &= mlp_blocks(self.target) % mlp_blocks(self.source) == 0
        return kept and (self.variant == "lossless" or (self.variant == "noisy" and not self.settings.noise))

    def __init__(self, source: Architecture, target: Architecture, settings: GrowSettings):
        super().__init__(source, target, settings)
        generator = torch.Generator().manual_seed(settings.seed)
        ranks = bond_ranks(settings)
        paths, matrices = lossless_start(
            source, target, two_paths=takes_two_paths(source, target, ranks), noise=settings.noise, generator=generator
        )
        self.ring = RingOperator.lossless(paths, ranks, settings.ring_order, noise=settings.noise, generator=generator)
        self.vectors = tuple(_mlp_in_blocks(row) for row in source.tensors if row.slots[-1] not in MATRICES)
        self._residual_vectors = residual_vectors(source)
        spaces = {space for row in self.vectors for space in row.dims if space is not None}
        reads = {row.dims[row.reads] for row in self.vectors if row.reads is not None}
        used = {*spaces, "layers", *self._residual_vectors.values()}
        used |= {"head" if space == "embed" else f"{space}{READ}" for space in reads}
        if any(f"{branch}.bias" in row.slots for branch in BRANCHES for row in self.vectors):
            used.add("branches")
        self.maps = nn.ParameterDict({name: matrices[name] for name in sorted(used)})
        self.maps.requires_grad_(settings.vectors)
        if self.variant == "noisy":
            _disturb(self.ring, settings.noise, generator)
        elif self.variant == "random":
            _randomise(self.ring, generator)

    def forward(self, weights: Weights) -> Weights:
        """Slots of the source -> slots of the target."""
        k = mlp_blocks(self.source)
        in_blocks = {slot for row in self.vectors if MLP_BLOCKS in row.dims for slot in row.slots}
        vectors = {slot: w.unflatten(1, (k, -1)) if slot in in_blocks else w for slot, w in weights.items()}
        grown = expand(self.vectors, vectors, self._maps_by_slot())
        grown |= {slot: grown[slot].flatten(1) for slot in in_blocks}
        grown = carry_mean(self.source, self.target, weights, grown)
        return grown | unpack(self.ring(pack(weights)), gated="gate.weight" in weights)

    def _maps_by_slot(self) -> dict[str | tuple[str, str], SpaceMap]:
        """Return which matrix each axis of each vector takes."""
        write = {name: SpaceMap.tied(matrix) for name, matrix in self.maps.items()}
        by_slot: dict[str | tuple[str, str], SpaceMap] = {
            **{name: SpaceMap(matrix, self.maps.get(f"{name}{READ}", matrix)) for name, matrix in self.maps.items()},
            "embed": SpaceMap(self.maps["embed"], self.maps["head" if "head" in self.maps else "embed"]),
            LAYERS: write["layers"],
        }
        by_slot |= {place: write[name] for place, name in self._residual_vectors.items()}
        if "branches" in write:
            by_slot |= {(f"{branch}.bias", LAYERS): write["branches"] for branch in BRANCHES}
        return by_slot


def takes_two_paths(source: Architecture, target: Architecture, ranks: tuple[int, ...]) -> bool:
    """Whether a lossless ring starts with two paths: every bond has room for them, and one would copy less."""
    return min(ranks) > 1 and (LAYERS in growing(source, target) or not whole(source, target, "embed"))


def lossless_start(
    source: Architecture,
    target: Architecture,
    *,
    two_paths: bool,
    noise: float,
    generator: torch.Generator,
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Return ring paths, (new, old) matrices by axis, and the maps of vectors, that together keep the function.

    Residual channels are copied whole and the rest gets their mean, so that a LayerNorm sees the source's
    statistics (LEMON, Wang et al., ICLR 2024). Readers take each copy with its share, plus noise that cancels
    over the copies and so breaks their symmetry without changing any sum. One path is enough for every size:
    new parts of a head or an MLP block are then not read yet, and a new layer is zero. Two paths let every new
    head, unit and layer start as a copy: path 0 carries q, k, v and in, path 1 o and out, which new layers keep
    at zero.
    """
    old, new = source.spaces["embed"].size, target.spaces["embed"].size
    old_k, new_k = mlp_blocks(source), mlp_blocks(target)
    slots = partial(_slots, old_k, new_k, source.has("gate"), noise=noise, generator=generator)
    copies = new // old
    vectors = vector_maps(source, old, new)
    residual, normed = vectors["embed"], vectors["shift"]
    layers = maps.spread_layers(source.spaces[LAYERS].size, target.spaces[LAYERS].size)
    branches = maps.first_copies(layers)

    def parted(written: list[Tensor]) -> Tensor:
        return noise / copies * maps.null_noise((new, old), written, generator)

    if two_paths:
        hidden = maps.duplicate(old, new, source.spaces["attn"].group)
        paths = [
            {
                "B": slots("qkv", reads=False),
                "O": hidden,
                "L": layers,
                "I": normed / copies + parted([normed]),
            },
            {
                "B": slots("o", reads=True),
                "O": residual,
                "L": branches,
                "I": maps.shared_read(hidden) + parted([hidden]),
            },
        ]
    else:
        hidden = residual
        inner = slots("qkv", reads=False)
        outer = slots("o", reads=True)
        reads = normed / copies + parted([normed, residual])
        paths = [{"B": inner + outer, "O": residual, "L": branches, "I": reads}]
    matrices = {
        **vectors,
        "head": normed / copies + parted(read_maps(source, normed, residual)),
        "attn": hidden,
        MLP_BLOCKS: maps.duplicate(old_k, new_k),
        "layers": layers,
        "branches": branches,
    }
    for space in source.widths:
        if space not in ("embed", "attn", "mlp"):
            here = source.spaces[space]
            copies_here = maps.duplicate(here.size, target.spaces[space].size, here.group)
            matrices[space], matrices[f"{space}{READ}"] = parted_copies(copies_here, noise, generator)
    return paths, matrices


def _slots(
    old_k: int, new_k: int, gated: bool, attention: str, *, reads: bool, noise: float, generator: torch.Generator
) -> Tensor:
    """Make core_B of one path, (new B, old B): the named attention matrices, and the MLP's writers or, if `reads`, out.

    The writers are `in` and, with `gated`, the gate.
    """
    writers = 1 + gated
    slots = torch.zeros(4 + (writers + 1) * new_k, 4 + (writers + 1) * old_k, dtype=maps.DTYPE)
    for slot in attention:
        index = ATTENTION.index(slot)
        slots[index, index] = 1
    blocks = maps.duplicate(old_k, new_k)
    if reads:
        share = maps.shared_read(blocks)
        slots[-new_k:, -old_k:] = share + noise * maps.null_noise((new_k, old_k), [blocks], generator)
    else:
        for first in range(writers):
            new, old = 4 + first * new_k, 4 + first * old_k
            slots[new : new + new_k, old : old + old_k] = blocks
    return slots


@torch.no_grad()
def _disturb(ring: RingOperator, noise: float, generator: torch.Generator) -> None:
    """Add noise to every entry of the cores, relative to what a row of such a core needs to keep the scale."""
    for core in ring.cores.values():
        deviation = CORE_NOISE * noise / (core.shape[0] * core.shape[1]) ** 0.5
        core += deviation * torch.randn(core.shape, generator=generator, dtype=core.dtype)


@torch.no_grad()
def _randomise(ring: RingOperator, generator: torch.Generator) -> None:
    """Fill the cores with normal numbers whose product keeps the scale of the weights, in expectation."""
    for core in ring.cores.values():
        core.copy_(torch.randn(core.shape, generator=generator, dtype=core.dtype))
        core /= (core.shape[0] * core.shape[1]) ** 0.5


def mlp_blocks(architecture: Architecture) -> int:
    """Return the ring's k: the MLP's width divided by the attention's.

    Raises:
        GrowkitError: the six matrices do not cut into square slots of one size.
    """
    embed, attn, mlp = (architecture.spaces[space].size for space in ("embed", "attn", "mlp"))
    if attn != embed:
        raise GrowkitError(f"attn: {attn} wide at embed {embed}; Mango needs square attention matrices")
    if mlp % embed:
        raise GrowkitError(f"mlp: {mlp} is no multiple of embed {embed}; Mango cuts the MLP into whole blocks")
    return mlp // embed


def bond_ranks(settings: GrowSettings) -> tuple[int, ...]:
    """The four ranks of the ring, in ring order.

    Raises:
        GrowkitError: not four whole numbers of at least 1.
    """
    if not settings.ranks:
        return (settings.rank,) * 4
    try:
        ranks = tuple(int(part) for part in settings.ranks.split(","))
    except ValueError:
        ranks = ()
    if len(ranks) != 4 or min(ranks) < 1 or max(ranks) > MOST_RANK:
        raise GrowkitError(
            f"--ranks {settings.ranks}: expected four whole numbers from 1 to {MOST_RANK}, one for each bond"
        )
    return ranks


def _mlp_in_blocks(row: TensorSpec) -> TensorSpec:
    return replace(row, dims=(MLP_BLOCKS, "attn")) if row.dims == ("mlp",) else row
