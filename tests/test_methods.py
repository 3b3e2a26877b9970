"""The conformance matrix: every method on every tiny pair, and identities between methods."""

import copy

import numpy as np
import pytest
import torch
from pairs import EXACT, PAIRS, published_scale, randomised, tiny
from torch.nn.functional import cross_entropy

from growkit.arch import find
from growkit.core import maps
from growkit.errors import GrowkitError
from growkit.grow import GrownModel, grow, lossless_gap
from growkit.methods import METHODS
from growkit.methods.expand import SpaceMap, expand
from growkit.methods.mango import Mango, pack, unpack
from growkit.settings import GrowSettings

SETTINGS = {
    "rank 1": {"rank": 1},
    "rank 2": {"rank": 2},
    "rank 4, BIOL": {"rank": 4, "ring_order": "BIOL"},
}
MATRIX = [
    pytest.param(method, pair, GrowSettings(method=method, **options), id=f"{method}, {pair}, {label}")
    for method in METHODS
    for pair in PAIRS
    for label, options in SETTINGS.items()
]


def eps_at(model, eps):
    """The network with its LayerNorms' eps replaced; growing changes their input's scale, not the eps."""
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = eps
    return model


@pytest.mark.parametrize(("method", "pair", "settings"), MATRIX)
def test_growth_keeps_the_function(method, pair, settings):
    if not METHODS[method].lossless:
        return
    source, target = PAIRS[pair]
    model = randomised(source)
    grown = grow(source, target, model.state_dict(), settings).materialize()
    gap = lossless_gap(model, grown, seed=1)
    assert gap < (1e-12 if pair in EXACT else 1e-5)
    assert lossless_gap(eps_at(model, 1e-24), eps_at(grown, 1e-24), seed=1) < 1e-12


@pytest.mark.parametrize(("method", "pair", "settings"), MATRIX)
def test_shapes_are_the_targets_and_the_source_is_untouched(method, pair, settings):
    source, target = PAIRS[pair]
    state = randomised(source, dtype=torch.float32).state_dict()
    before = copy.deepcopy(state)
    weights = grow(source, target, state, settings).weights()
    assert {name: tuple(w.shape) for name, w in weights.items()} == dict(target.shapes)
    assert all(w.dtype is torch.float32 for w in weights.values())
    assert all(torch.equal(state[name], before[name]) for name in before)


@pytest.mark.parametrize(("method", "pair", "settings"), MATRIX)
def test_every_trainable_parameter_gets_a_gradient(method, pair, settings):
    source, target = PAIRS[pair]
    model = grow(source, target, randomised(source).state_dict(), settings)
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cross_entropy(model(images), torch.tensor([0, 3, 6])).backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not dead
    assert all(name.startswith("method.") for name, _ in model.named_parameters())


@pytest.mark.parametrize("pair", PAIRS)
def test_same_seed_same_result_and_functional_equals_materialized(pair):
    source, target = PAIRS[pair]
    state = randomised(source).state_dict()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first, second = (grow(source, target, state, GrowSettings(rank=2, seed=5)) for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        for p in first.parameters():  # leave the start, where dead bonds are skipped
            p += 0.01 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(first(images), first.materialize()(images), rtol=1e-10, atol=1e-10)


def test_another_seed_another_noise():
    source, target = PAIRS["twice as wide"]
    state = randomised(source).state_dict()
    a, b = (grow(source, target, state, GrowSettings(seed=seed)).weights() for seed in (0, 1))
    assert not torch.equal(a["blocks.0.mlp.fc2.weight"], b["blocks.0.mlp.fc2.weight"])


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("pair", ["twice as wide", "larger MLP ratio", "half as wide again", "wider and deeper"])
def test_duplicated_units_part_under_adam(rank, pair):
    """Adam divides by the gradient's size, so copies must differ in direction or they move as one for ever."""
    source, target = PAIRS[pair]
    model = grow(source, target, randomised(source).state_dict(), GrowSettings(rank=rank, noise=0.1)).materialize()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    images = torch.randn(16, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(16) % 7
    for _ in range(5):
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
    fc1 = model.blocks[0].mlp.fc1.weight
    value = model.blocks[0].attn.qkv.weight[2 * model.embed_dim :]
    for rows in (fc1, value):
        distance = torch.cdist(rows, rows) + torch.eye(len(rows), dtype=rows.dtype)
        assert distance.min() > 1e-4


def test_without_noise_duplicated_units_stay_together():
    """The twin of the test above: what the noise is for."""
    source, target = PAIRS["twice as wide"]
    model = grow(source, target, randomised(source).state_dict(), GrowSettings(noise=0.0)).materialize()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        images = torch.randn(16, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        cross_entropy(model(images), torch.arange(16) % 7).backward()
        optimizer.step()
    fc1 = model.blocks[0].mlp.fc1.weight
    half = 32  # one block's copies lie side by side in rows 0..31 and 32..63
    assert (fc1[:half] - fc1[half : 2 * half]).abs().max() < 1e-9


def test_mango_at_rank_1_without_noise_is_duplication():
    """Rank 1 at its start equals FPI (bert2BERT, Chen et al., ACL 2022, section 3.2) on whole multiples."""
    source, target = PAIRS["twice as wide"]
    weights = source.split(randomised(source).state_dict())
    mango = Mango(source, target, GrowSettings(rank=1, noise=0.0))
    spaces = {}
    for name, space in source.spaces.items():
        write = maps.duplicate(space.size, target.spaces[name].size)
        if name == "mlp":  # Mango duplicates inside each of the MLP's k blocks, each as wide as attention
            block = maps.duplicate(source.spaces["attn"].size, target.spaces["attn"].size)
            write = torch.block_diag(*[block] * 4)
        spaces[name] = SpaceMap(write, maps.shared_read(write))
    expected = expand(source.tensors, weights, spaces)
    actual = mango(weights)
    assert set(actual) == set(expected)
    for slot in expected:
        assert torch.allclose(actual[slot], expected[slot], rtol=0, atol=1e-14), slot


@pytest.mark.parametrize("method", METHODS)
def test_growing_to_the_same_size_is_the_identity(method):
    source, target = PAIRS["same"]
    state = randomised(source).state_dict()
    grown = grow(source, target, state, GrowSettings(method=method)).weights()
    for name, tensor in state.items():
        assert torch.allclose(grown[name], tensor, rtol=0, atol=1e-14), name


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_pack_and_unpack_are_inverse_and_keep_blocks(ratio):
    source = tiny(32, 3, 2, mlp_ratio=ratio)
    weights = source.split(randomised(source).state_dict())
    stacked = pack(weights)
    assert stacked.shape == (4 + 2 * ratio, 32, 3, 32)
    assert torch.equal(stacked[2, :, 1], weights["v.weight"][1])
    assert torch.equal(stacked[4 + ratio - 1, :, 0], weights["in.weight"][0, -32:])
    assert torch.equal(stacked[4 + ratio, :, 0], weights["out.weight"][0, :, :32])
    for slot, tensor in unpack(stacked).items():
        assert torch.equal(tensor, weights[slot])


def test_mango_equals_the_formula_written_in_numpy():
    """Section 4's einsum, by numpy, on a trained-looking ring of unequal ranks and slots."""
    source, target = PAIRS["odd, larger MLP ratio"]
    mango = Mango(source, target, GrowSettings(ranks="2,3,2,4"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for core in mango.ring.cores.values():
            core.normal_(generator=generator)
    weights = source.split(randomised(source).state_dict())
    cores = {axis: core.detach().numpy() for axis, core in mango.ring.cores.items()}
    # boli,pbBq,qoOr,rlLs,siIp->BOLI, one core at a time
    y = np.einsum("boli,siIp->bolsIp", pack(weights).numpy(), cores["I"])
    y = np.einsum("bolsIp,rlLs->borLIp", y, cores["L"])
    y = np.einsum("borLIp,pbBq->orLIBq", y, cores["B"])
    y = np.einsum("orLIBq,qoOr->BOLI", y, cores["O"])
    grown = mango(weights)
    ratio = 3
    for slot, index in {"q": 0, "k": 1, "v": 2, "o": 3}.items():
        assert np.allclose(grown[f"{slot}.weight"].detach().numpy(), y[index].transpose(1, 0, 2))
    for block in range(ratio):
        rows = slice(48 * block, 48 * (block + 1))
        into = grown["in.weight"].detach().numpy()[:, rows]
        out = grown["out.weight"].detach().numpy()[:, :, rows]
        assert np.allclose(into, y[4 + block].transpose(1, 0, 2))
        assert np.allclose(out, y[4 + ratio + block].transpose(1, 0, 2))


@pytest.mark.parametrize(
    ("source", "target", "says"),
    [
        (tiny(64, 2, 4), tiny(32, 2, 2), "embed: 64 -> 32 would shrink"),
        (tiny(32, 4, 2), tiny(32, 2, 2), "blocks: 4 -> 2 would shrink"),
        (tiny(32, 2, 2), tiny(64, 2, 2), "head size 16 -> 32.*num_heads=4"),
        (tiny(32, 2, 2, mlp_ratio=4), tiny(96, 2, 6, mlp_ratio=2), "ratio 4 -> 2"),
        (tiny(32, 2, 2, mlp_ratio=2), tiny(64, 2, 4, mlp_ratio=2.5), "multiple of embed 64"),
        (tiny(32, 2, 2), tiny(64, 2, 4, qkv_bias=False), "differ in"),
    ],
)
def test_what_cannot_be_grown_is_refused_with_what_would_work(source, target, says):
    with pytest.raises(GrowkitError, match=says):
        grow(source, target, randomised(source).state_dict(), GrowSettings())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": 0}, "--rank 0"),
        ({"ranks": "1,2,3"}, "--ranks 1,2,3"),
        ({"ranks": "a,b,c,d"}, "--ranks"),
        ({"ring_order": "BOLX"}, "ring order"),
        ({"method": "mongo"}, "nearest: mango"),
        ({"noise": -1.0}, "--noise"),
    ],
)
def test_wrong_settings_are_refused(options, says):
    source, target = PAIRS["twice as wide"]
    with pytest.raises(GrowkitError, match=says):
        grow(source, target, randomised(source).state_dict(), GrowSettings(**options))


def test_a_damaged_grown_weight_shows_in_the_gap():
    source, target = PAIRS["twice as wide"]
    model = randomised(source)
    grown = grow(source, target, model.state_dict(), GrowSettings()).materialize()
    with torch.no_grad():
        grown.blocks[1].attn.proj.weight[3, 5] += 0.01
    assert lossless_gap(model, grown, seed=1) > 1e-6


def test_moving_and_saving_touches_the_method_alone():
    source, target = PAIRS["twice as wide"]
    model = grow(source, target, randomised(source).state_dict(), GrowSettings())
    assert isinstance(model, GrownModel)
    assert all(name.startswith("method.") for name in model.state_dict())
    assert all(t.dtype is torch.float32 for t in model.to(torch.float32).weights().values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("small", "big", "rank"),
    [
        ("deit_tiny", "deit_small", 1),
        ("deit_small", "deit_base", 1),
        ("deit_small", "deit_base", 4),
        ("vit_base", "vit_large", 2),
    ],
)
def test_published_pairs_start_where_the_source_stands_in_float32(small, big, rank):
    source, target = find(small), find(big)
    model = published_scale(source)
    grown = grow(source, target, model.state_dict(), GrowSettings(rank=rank)).materialize()
    assert lossless_gap(model, grown, seed=1) <= 1e-5
