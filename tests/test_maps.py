"""Width and depth matrices: what each promises about the numbers it maps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growkit.core import maps

widths = st.tuples(st.integers(1, 12), st.integers(0, 20)).map(lambda t: (t[0], t[0] + t[1]))


@given(widths)
def test_average_tail_keeps_mean_and_scales_deviation_by_norm_gain(size):
    old, new = size
    x = torch.randn(old, dtype=torch.float64, generator=torch.Generator().manual_seed(old))
    y = maps.average_tail(old, new) @ x
    assert torch.allclose(y.mean(), x.mean())
    assert torch.allclose(y.std(unbiased=False), maps.norm_gain(old, new) * x.std(unbiased=False), atol=1e-12)


@given(widths, st.integers(1, 3))
def test_duplicates_move_in_whole_groups_and_are_shared_out(size, group):
    old, new = size[0] * group, size[1] * group
    write = maps.duplicate(old, new, group)
    source = write.argmax(dim=1).reshape(-1, group)
    assert (source - source[:, :1] == torch.arange(group)).all()
    assert (source[:, 0] % group == 0).all()
    assert torch.allclose(write.T @ maps.shared_read(write), torch.eye(old, dtype=torch.float64))


@given(widths, st.integers(0, 5))
def test_null_noise_cancels_over_copies(size, seed):
    old, new = size
    written = [maps.whole_copies(old, new), maps.average_tail(old, new)]
    noise = maps.null_noise((new, old), written, torch.Generator().manual_seed(seed))
    assert max(float((w.T @ noise).abs().max()) for w in written) < 1e-12
    if new >= 2 * old:
        assert noise.abs().max() > 1e-3


@given(widths)
def test_layers_keep_their_order_and_first_copies_are_the_source(size):
    old, new = size
    layers = maps.spread_layers(old, new)
    source = layers.argmax(dim=1)
    assert (source.diff() >= 0).all()
    first = maps.first_copies(layers)
    assert torch.equal(first[first.any(dim=1)], torch.eye(old, dtype=first.dtype))


@pytest.mark.parametrize(("old", "new", "group"), [(4, 8, 1), (6, 10, 2), (5, 5, 1), (32, 112, 16)])
def test_parting_noise_cancels_over_copies_as_null_noise_does(old, new, group):
    copies = maps.duplicate(old, new, group)
    noise = maps.parting_noise(copies, torch.Generator().manual_seed(0))
    assert (copies.T @ noise).abs().max() < 1e-14
    same = maps.null_noise((new, old), [copies], torch.Generator().manual_seed(0))
    assert torch.allclose(noise, same, rtol=0, atol=1e-13)
    assert bool(noise.any()) == (new > old)
