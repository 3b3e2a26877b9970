"""Width and depth matrices, all (new, old): which unit of the source each unit of the target comes from."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Maps are made in float64 and rounded once, so that a lossless start is lossless to the last bit that fits.
DTYPE = torch.float64


def duplicate(old: int, new: int, group: int = 1) -> Tensor:
    """Unit j of the target copies unit j mod old, in whole groups (a head's channels stay together)."""
    source = torch.arange(new) // group % (old // group) * group + torch.arange(new) % group
    return torch.nn.functional.one_hot(source, old).to(DTYPE)


def whole_copies(old: int, new: int) -> Tensor:
    """As many whole copies as fit, then zeros: [I; I; 0]."""
    copies = duplicate(old, new)
    copies[new // old * old :] = 0
    return copies


def average_tail(old: int, new: int) -> Tensor:
    """As many whole copies as fit, then the mean of all units: [I; I; 1/old]. LEMON's average expansion.

    The mean over the grown axis stays the source's, and the tail has no deviation from it, so that a
    LayerNorm sees the source's statistics but for the factor of `norm_gain`.
    """
    copies = whole_copies(old, new)
    copies[new // old * old :] = 1 / old
    return copies


def norm_gain(old: int, new: int) -> float:
    """LEMON's eta: a LayerNorm over `average_tail` channels divides by eta times the source's deviation."""
    return float((new // old * old / new) ** 0.5)


def shared_read(write: Tensor) -> Tensor:
    """The reading side of a 0/1 copy map: each copy read at one over the number of copies."""
    return write / write.sum(dim=0)


def null_noise(shape: tuple[int, int], written: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """A random (new, old) matrix N with W^T N = 0 for every W in `written`, rows of about unit length.

    Added to a reading map it changes how copies share the work, never their sum: duplicated units get
    different gradients, in direction too, so that Adam, blind to scale, parts them as well.
    """
    noise = torch.randn(shape, generator=generator, dtype=DTYPE) / shape[1] ** 0.5
    basis, scales, _ = torch.linalg.svd(torch.cat(list(written), dim=1), full_matrices=False)
    basis = basis[:, scales > 1e-9 * scales[0]]
    return noise - basis @ (basis.T @ noise)


def spread_layers(old: int, new: int) -> Tensor:
    """Target layer l copies source layer floor(l * old / new): every source layer, in order, evenly repeated."""
    return torch.nn.functional.one_hot(torch.arange(new) * old // new, old).to(DTYPE)


def first_copies(write: Tensor) -> Tensor:
    """1 for the first target unit that copies each source unit, 0 for its later copies; shape (new,)."""
    source = write.argmax(dim=1)
    return torch.tensor([1.0 if s not in source[:i] else 0.0 for i, s in enumerate(source)], dtype=write.dtype)
