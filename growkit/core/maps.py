"""Width and depth matrices, all (new, old): which unit of the source each unit of the target comes from."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Maps are made in float64 and rounded once, so that a lossless start is lossless to the last bit that fits.
DTYPE = torch.float64


def duplicate(old: int, new: int, group: int = 1) -> Tensor:
    """Unit j of the target copies unit j mod old, in whole groups (a head's channels stay together)."""
    return _grouped(torch.arange(new // group) % (old // group), old, group)


def even_duplicate(old: int, new: int, group: int, generator: torch.Generator) -> Tensor:
    """As `duplicate` for whole rounds; the remaining groups (a partial round) are drawn at random, no two alike."""
    groups = old // group
    left = new // group % groups
    rounds = torch.arange(new // group - left) % groups
    return _grouped(torch.cat([rounds, torch.randperm(groups, generator=generator)[:left]]), old, group)


def random_duplicate(old: int, new: int, group: int, generator: torch.Generator) -> Tensor:
    """Each source unit once, then units drawn at random with replacement, in whole groups. Net2Net's g."""
    groups = old // group
    drawn = torch.randint(groups, (new // group - groups,), generator=generator)
    return _grouped(torch.cat([torch.arange(groups), drawn]), old, group)


def _grouped(groups: Tensor, old: int, group: int) -> Tensor:
    """The (new, old) matrix that copies these source groups, in this order."""
    units = groups.repeat_interleave(group) * group + torch.arange(len(groups) * group) % group
    return copies_of(units, old)


def copies_of(units: Tensor, old: int) -> Tensor:
    """The (new, old) matrix whose row j copies source unit units[j]."""
    return torch.nn.functional.one_hot(units, old).to(DTYPE)


def whole_copies(old: int, new: int) -> Tensor:
    """As many whole copies as fit, then zeros: [I; I; 0]."""
    copies = duplicate(old, new)
    copies[new // old * old :] = 0
    return copies


def average_tail(old: int, new: int) -> Tensor:
    """As many whole copies as fit, then the mean of all units: [I; I; 1/old]. LEMON's average expansion.

    The mean over the grown axis stays the source's, and the tail does not deviate from it, so that a
    LayerNorm sees the source's statistics up to the factor `norm_gain`.
    """
    copies = whole_copies(old, new)
    copies[new // old * old :] = 1 / old
    return copies


def residual(old: int, new: int, *, centred: bool) -> Tensor:
    """Return the map that writes the residual so that a norm over it sees the source's statistics.

    A LayerNorm (`centred`) sees them with `average_tail`, an RMSNorm with zeros in the tail.
    """
    return average_tail(old, new) if centred else whole_copies(old, new)


def norm_gain(old: int, new: int) -> float:
    """LEMON's eta: a norm over the channels of `residual` divides by eta times the source's deviation."""
    return float((new // old * old / new) ** 0.5)


def shared_read(write: Tensor) -> Tensor:
    """The reading side of a 0/1 copy map: each copy is weighted by one over the number of copies."""
    return write / write.sum(dim=0)


def null_noise(shape: tuple[int, int], written: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """A random (new, old) matrix N with W^T N = 0 for every W in `written`, rows of about unit length.

    Symmetry-breaking noise: added to a reading map it changes how copies share the work, never their sum.
    Duplicated units get gradients that differ in direction too, so that even Adam, blind to scale, parts them.
    """
    noise = torch.randn(shape, generator=generator, dtype=DTYPE) / shape[1] ** 0.5
    basis, scales, _ = torch.linalg.svd(torch.cat(list(written), dim=1), full_matrices=False)
    basis = basis[:, scales > 1e-9 * scales[0]]
    return noise - basis @ (basis.T @ noise)


def parting_noise(copies: Tensor, generator: torch.Generator) -> Tensor:
    """`null_noise` for one 0/1 copy matrix, without the SVD: it sums to zero over the copies of each unit."""
    noise = torch.randn(copies.shape, generator=generator, dtype=DTYPE) / copies.shape[1] ** 0.5
    units, counts = copies.argmax(dim=1), copies.sum(dim=0)
    means = torch.zeros_like(noise[: len(counts)]).index_add(0, units, noise) / counts[:, None]
    return noise - means[units]


def spread_layers(old: int, new: int) -> Tensor:
    """Target layer l copies source layer floor(l * old / new): every source layer, in order, evenly repeated."""
    return copies_of(torch.arange(new) * old // new, old)


def stacked_layers(old: int, new: int) -> Tensor:
    """Whole stacks, then the top layers: bert2BERT's depth (Chen et al., ACL 2022, section 3.4)."""
    left = new % old
    return copies_of(torch.cat([torch.arange(new - left) % old, torch.arange(old - left, old)]), old)


def round_layers(old: int, new: int) -> Tensor:
    """Target layer l copies source layer round(l * old / new), halves rounded up, at most the last one."""
    return copies_of(((2 * torch.arange(new) * old + new) // (2 * new)).clamp(max=old - 1), old)


def solar_layers(old: int, new: int) -> Tensor:
    """The first ceil(new / 2) layers, then the last floor(new / 2); needs new <= 2 * old."""
    return copies_of(torch.cat([torch.arange(new - new // 2), torch.arange(old - new // 2, old)]), old)


def inserted_layers(old: int, new: int) -> Tensor:
    """Every layer in order, and `new - old` extra copies spread evenly, each right after the layer it copies."""
    after = torch.arange(1, old + 1) * (new - old) // old  # copies inserted up to and including each layer
    return copies_of(torch.arange(old).repeat_interleave(1 + after.diff(prepend=torch.zeros(1, dtype=torch.long))), old)


def first_copies(write: Tensor) -> Tensor:
    """A 0/1 copy map whose later copies of a source unit are zero: only the first one stays."""
    return write * (write.cumsum(dim=0) == 1)
