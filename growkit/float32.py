"""How CUDA multiplies float32 matrices: in full, or in TF32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_PRODUCTS = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)  # type: ignore[attr-defined]


@contextmanager
def multiplying(tf32: bool) -> Iterator[None]:
    """Have CUDA multiply float32 matrices in TF32 or in full float32; afterwards torch's settings are restored."""
    before = _float32_products()
    try:
        _multiply_float32(("high" if tf32 else "highest", tf32), ["tf32" if tf32 else "ieee"] * len(_PRODUCTS))
        yield
    finally:
        _multiply_float32(*before)


def _float32_products() -> tuple[tuple[str, bool] | None, list[str]]:
    """The settings of torch's older interface, None where it disagrees with the newer one, and of the newer."""
    newer = [product.fp32_precision for product in _PRODUCTS]
    try:
        return (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32), newer
    except RuntimeError:
        return None, newer


def _multiply_float32(older: tuple[str, bool] | None, newer: list[str]) -> None:
    """Set both interfaces: torch's compiler reads the older one, which raises if the two disagree."""
    if older is not None:
        torch.set_float32_matmul_precision(older[0])
        torch.backends.cudnn.allow_tf32 = older[1]
    for product, precision in zip(_PRODUCTS, newer, strict=True):
        product.fp32_precision = precision
