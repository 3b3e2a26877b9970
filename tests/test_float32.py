"""What CUDA is told of float32, which needs no GPU to be looked at."""

from collections.abc import Callable, Iterator

import pytest
import torch

from growkit.float32 import multiplying


@pytest.fixture
def products() -> Iterator[Callable[[], list[object]]]:
    """Says how torch multiplies float32, by both of its interfaces; afterwards it does so as in the beginning."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul

    def read(name: Callable[[], object]) -> object:
        try:
            return name()
        except RuntimeError:  # the older interface, where the two disagree
            return "mixed"

    def told() -> list[object]:
        older = torch.get_float32_matmul_precision, lambda: matmul.allow_tf32, lambda: cudnn.allow_tf32
        return [*map(read, older), matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision]

    found = told()
    yield told
    torch.set_float32_matmul_precision(str(found[0]))
    cudnn.allow_tf32 = found[2]
    for product, precision in zip((matmul, cudnn.conv, cudnn.rnn), found[3:], strict=True):
        product.fp32_precision = precision
    assert told() == found


@pytest.mark.parametrize("chosen", [True, False])
@pytest.mark.parametrize("before", ["as it begins", "none", "ieee", "tf32", "high", "medium"])
def test_products_are_in_tf32_by_choice_alone_and_torch_is_left_as_it_was(
    chosen: bool, before: str, products: Callable[[], list[object]]
) -> None:
    if before in ("high", "medium"):
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = False
    elif before != "as it begins":
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = before
    was = products()
    kept = slice(3 if "mixed" in was else 0, None)  # the newer interface is what torch multiplies by
    inside: list[object] = ["high", True, True, "tf32", "tf32", "tf32"]
    with multiplying(chosen):
        # torch's compiler asks the older interface, which raises where the two disagree
        assert products() == (inside if chosen else ["highest", False, False, "ieee", "ieee", "ieee"])
    assert products()[kept] == was[kept]
    with pytest.raises(ZeroDivisionError), multiplying(chosen):
        raise ZeroDivisionError
    assert products()[kept] == was[kept]
