"""The conformance matrix: every method on every tiny pair, and identities between methods."""

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from pairs import EXACT, NEARLY, PAIRS, can_grow, kin, published_scale, randomised, tiny
from torch.nn.functional import cross_entropy

from growkit.arch import find
from growkit.core import maps
from growkit.errors import GrowkitError
from growkit.grow import GrownModel, grow, lossless_gap
from growkit.methods import METHODS
from growkit.methods.carried_mean import alternating
from growkit.methods.expand import SCALED, Expansion, SpaceMap, even_scales, expand
from growkit.methods.mango import Mango, pack, unpack
from growkit.methods.staged import Staged
from growkit.settings import GrowSettings

RINGS = {"rank 1": {"rank": 1}, "rank 2": {"rank": 2}, "rank 4, BIOL": {"rank": 4, "ring_order": "BIOL"}}
LEARNED = ("mango", "ligo")
VARIANTS = [(method, variant) for method, kind in METHODS.items() for variant in kind.VARIANTS or (None,)]
MATRIX = [
    pytest.param(pair, GrowSettings(method=method, variant=variant, **ring), id=f"{method} {variant}, {pair}, {label}")
    for method, variant in VARIANTS
    for pair in PAIRS
    for label, ring in (RINGS.items() if variant == "lossless" else [("", {})])
    if can_grow(method, variant, pair)
]
BEYOND = [
    pytest.param(pair, GrowSettings(method=method, variant=variant), id=f"{method} {variant}, {pair}")
    for method, variant in VARIANTS
    for pair in PAIRS
    if not can_grow(method, variant, pair)
]


def eps_at(model, eps):
    """The network with its norms' eps replaced; growing changes their input's scale, not the eps."""
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = eps
    return model


@pytest.mark.parametrize(("pair", "settings"), MATRIX)
def test_lossless_is_claimed_where_the_function_is_kept_and_nowhere_else(pair, settings):
    source, target = PAIRS[pair]
    model = randomised(source)
    grown = grow(source, target, model.state_dict(), settings)
    trained = [name for name, p in grown.named_parameters() if p.requires_grad]
    assert bool(trained) == (settings.method in LEARNED)
    assert all(name.startswith("method.") for name in trained)
    plain = grown.materialize()
    gap = lossless_gap(model, plain, seed=1)
    if not grown.method.lossless:
        assert gap > 1e-4
        return
    assert gap < (1e-12 if pair in EXACT else 1e-5)
    assert lossless_gap(eps_at(model, 1e-24), eps_at(plain, 1e-24), seed=1) < (1e-5 if pair in NEARLY else 1e-12)


@pytest.mark.parametrize(("pair", "settings"), MATRIX)
def test_shapes_are_the_targets_and_the_source_is_untouched(pair, settings):
    source, target = PAIRS[pair]
    state = randomised(source, dtype=torch.float32).state_dict()
    before = copy.deepcopy(state)
    weights = grow(source, target, state, settings).weights()
    assert {name: tuple(w.shape) for name, w in weights.items()} == dict(target.shapes)
    assert all(w.dtype is torch.float32 for w in weights.values())
    assert all(torch.equal(state[name], before[name]) for name in before)


@pytest.mark.parametrize(("pair", "settings"), [case for case in MATRIX if case.values[1].method in LEARNED])
def test_every_trainable_parameter_gets_a_gradient(pair, settings):
    source, target = PAIRS[pair]
    model = grow(source, target, randomised(source).state_dict(), settings)
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cross_entropy(model(images), torch.tensor([0, 3, 6])).backward()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert not [name for name, p in trained if p.grad is None or p.grad.abs().max() == 0]


@pytest.mark.parametrize(("method", "variant"), VARIANTS)
def test_same_seed_same_weights(method, variant):
    pair = next(
        name for name in ("wider and deeper", "twice as wide", "twice as deep") if can_grow(method, variant, name)
    )
    settings = GrowSettings(method=method, variant=variant, rank=2)
    source, target = PAIRS[pair]
    state = randomised(source).state_dict()
    first, second = (grow(source, target, state, replace(settings, seed=3)).weights() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("pair", "settings"), BEYOND)
def test_pair_out_of_reach_is_refused_with_methods_that_can(pair, settings):
    source, target = PAIRS[pair]
    with pytest.raises(GrowkitError, match=f"^{settings.method}: .*; methods that can: ") as refused:
        grow(source, target, randomised(source).state_dict(), settings)
    offered = str(refused.value).partition("methods that can: ")[2].split(", ")
    assert offered == [name for name in METHODS if can_grow(name, None, pair)]


@pytest.mark.parametrize(
    ("settings", "pair"),
    [
        pytest.param(settings, pair, id=f"{settings.method}-{pair}")
        for settings in (GrowSettings(rank=2), GrowSettings(method="ligo"))
        for pair in PAIRS
        if can_grow(settings.method, None, pair)
    ],
)
def test_functional_equals_materialized_away_from_the_start_too(pair, settings):
    source, target = PAIRS[pair]
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grown = grow(source, target, randomised(source).state_dict(), settings)
    with torch.no_grad():
        for p in grown.parameters():  # leave the start, where dead bonds are skipped
            p += 0.01 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(grown(images), grown.materialize()(images), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["mango", "ligo", "bert2bert", "net2net", "lemon", "hypercloning", "random-pad"])
def test_another_seed_another_draw(method):
    source, target = PAIRS["twice as wide"]
    state = randomised(source).state_dict()
    a, b = (grow(source, target, state, GrowSettings(method=method, seed=seed)).weights() for seed in (0, 1))
    assert not torch.equal(a["blocks.0.mlp.fc2.weight"], b["blocks.0.mlp.fc2.weight"])


PARTING = [
    GrowSettings(rank=1),
    GrowSettings(rank=4),
    *(GrowSettings(method=name) for name in ("ligo", "bert2bert", "net2net", "lemon", "hypercloning")),
]


@pytest.mark.parametrize(
    ("settings", "pair"),
    [
        pytest.param(settings, pair, id=f"{settings.method} rank {settings.rank}, {pair}")
        for settings in PARTING
        for pair in ("twice as wide", "larger MLP ratio", "half as wide again", "wider and deeper")
        if can_grow(settings.method, None, pair)
    ],
)
def test_duplicated_units_part_under_adam(settings, pair):
    """Adam divides by the gradient's size, so copies must differ in direction or they move as one for ever."""
    source, target = PAIRS[pair]
    model = grow(source, target, randomised(source).state_dict(), settings).materialize()
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


@pytest.mark.parametrize(("method", "variant"), [("ligo", None), ("mango", "noisy")])
@pytest.mark.parametrize("pair", ["twice as wide", "wider and deeper"])
def test_noise_that_nothing_cancels_does_not_drown_the_start(method, variant, pair):
    """At ten times as much, the outputs differ by as much as those of strangers (0.85 to 1.4)."""
    source, target = PAIRS[pair]
    state = randomised(source).state_dict()
    images = torch.randn(8, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = GrowSettings(method=method, variant=variant, noise=0.0)
    with torch.no_grad():
        without, by_default = (
            grow(source, target, state, replace(plain, noise=noise)).materialize()(images)
            for noise in (0.0, GrowSettings.noise)
        )
    assert 0 < (by_default - without).norm() / without.norm() < 0.6


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


def test_dropout_of_the_network_follows_the_mode_of_the_grown_model():
    source, target = PAIRS["deeper"]
    grown = grow(source, target, randomised(source).state_dict(), GrowSettings())
    for mode in (False, True):
        assert {part.training for part in grown.train(mode).network.modules()} == {mode}


@pytest.mark.parametrize("stages", ["width-first", "depth-first"])
@pytest.mark.parametrize("method", ["mango", "lemon"])
def test_stages_keep_the_function_and_train_both_operators(method, stages):
    source, target = PAIRS["wider and deeper"]
    model = randomised(source)
    grown = grow(source, target, model.state_dict(), GrowSettings(method=method, stages=stages))
    assert isinstance(grown.method, Staged)
    assert grown.method.lossless
    assert lossless_gap(model, grown.materialize(), seed=1) < 1e-12
    middle = grown.method.first.target.spaces
    wide, deep = middle["embed"].size == 64, middle["blocks"].size == 6
    assert (wide, deep) == (stages == "width-first", stages == "depth-first")
    if method == "mango":
        images = torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        cross_entropy(grown(images), torch.tensor([0, 3, 6])).backward()
        for part in (grown.method.first, grown.method.second):
            assert not [name for name, p in part.named_parameters() if p.grad.abs().max() == 0]


def test_stages_of_a_pair_that_grows_one_way_are_one():
    source, target = PAIRS["twice as wide"]
    grown = grow(source, target, randomised(source).state_dict(), GrowSettings(stages="depth-first"))
    assert isinstance(grown.method, Mango)


def test_without_vectors_the_ring_alone_is_trained():
    source, target = PAIRS["twice as wide"]
    grown = grow(source, target, randomised(source).state_dict(), GrowSettings(vectors=False))
    trained = {name for name, p in grown.named_parameters() if p.requires_grad}
    assert trained == {f"method.ring.cores.{axis}" for axis in "BOLI"}


def test_vectors_that_are_alike_grow_together_and_no_others():
    """Where nothing grows, stacked ones would be copies that share memory."""
    source, target = PAIRS["twice as wide"]
    weights = source.split(randomised(source).state_dict())
    kept = expand(source.tensors, weights, {})
    assert all(kept[slot] is weights[slot] for slot in weights)
    width = source.spaces["embed"].size
    spaces = {"embed": SpaceMap(*[maps.duplicate(width, target.spaces["embed"].size).float()] * 2)}
    single = {slot: weight.float() for slot, weight in weights.items()}
    alone = {spec.slots[0]: expand([spec], single, spaces) for spec in source.tensors}
    together = expand(source.tensors, single, spaces)
    assert list(together) == [slot for spec in source.tensors for slot in spec.slots]
    for grown in alone.values():
        assert all(torch.allclose(together[slot], grown[slot], atol=1e-6) for slot in grown)


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


# Mango's noisy and random starts disturb whatever they start from.
@pytest.mark.parametrize(("method", "variant"), [v for v in VARIANTS if v[1] not in ("noisy", "random")])
def test_growing_to_the_same_size_is_the_identity(method, variant):
    source, target = PAIRS["same"]
    state = randomised(source).state_dict()
    grown = grow(source, target, state, GrowSettings(method=method, variant=variant)).weights()
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
        (tiny(32, 2, 2, mlp_ratio=2), tiny(64, 2, 4, mlp_ratio=2.5), "multiple of embed 64.*--set mlp_ratio=3;"),
        (tiny(32, 2, 2, mlp_ratio=4), tiny(64, 2, 4, mlp_ratio=2.5), "multiple of embed 64.*--set mlp_ratio=4;"),
        (
            tiny(32, 2, 2, mlp_ratio=2.5),
            tiny(64, 2, 4, mlp_ratio=3),
            "source's mlp: 80 is no.*blocks; methods that",
        ),
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
        ({"variant": "fpi"}, "--variant fpi: not a variant of mango; choose lossless or noisy or random"),
        ({"method": "lemon", "variant": "fpi"}, "not a variant of lemon; it has none"),
        ({"stages": "depth"}, "--stages depth: unknown; choose both, width-first or depth-first"),
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


def test_gap_is_the_largest_difference_either_way_and_modes_are_left():
    source, target = PAIRS["twice as wide"]
    model = randomised(source).train()
    grown = grow(source, target, model.state_dict(), GrowSettings()).materialize()
    with torch.no_grad():
        grown.head.bias[2] += 3
    assert lossless_gap(model, grown, seed=1) == pytest.approx(3)
    assert (model.training, grown.training) == (True, False)


def test_moving_and_saving_touches_the_method_alone():
    source, target = PAIRS["twice as wide"]
    model = grow(source, target, randomised(source).state_dict(), GrowSettings())
    assert isinstance(model, GrownModel)
    assert all(name.startswith("method.") for name in model.state_dict())
    assert all(t.dtype is torch.float32 for t in model.to(torch.float32).weights().values())


def test_blocks_computed_again_give_the_same_gradients_and_keep_less():
    source, target = PAIRS["wider and deeper"]
    model = grow(source, target, randomised(source).state_dict(), GrowSettings(rank=2))
    images = torch.randn(32, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def step():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
            loss = model(images).square().mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        return sum(kept), gradients

    usual, expected = step()
    model.set_grad_checkpointing()
    less, found = step()
    assert less < 0.6 * usual
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    model.set_grad_checkpointing(False)
    assert step()[0] == usual


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


def test_scales_made_even_keep_the_function_and_are_one_number_for_each_layer():
    source, _ = PAIRS["layer scale, odd"]
    model = randomised(source)
    state = model.state_dict()
    with torch.no_grad():
        state["blocks.1.ls1.gamma"][:3] = torch.tensor([0.0, -2.0, 5.0], dtype=torch.float64)
        state["blocks.0.ls2.gamma"].zero_()  # a branch that is silent
    even = even_scales(source.split(state))
    assert all(torch.equal(even[scale], even[scale][:, :1].expand_as(even[scale])) for scale in SCALED)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = model(images)
    model.load_state_dict(source.join(even))
    assert torch.allclose(model(images), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("embed", "heads"), [(48, 3), (80, 5), (33 * 16, 33)], ids=str)
@pytest.mark.parametrize("settings", [GrowSettings(method="lemon"), GrowSettings(rank=1)], ids=["lemon", "mango"])
def test_norm_before_the_blocks_gets_its_mean_carried(embed, heads, settings):
    """Without what `carry_mean` does, outputs differ by some thousandths."""
    source, target = tiny(32, 2, 2, pre_norm=True), tiny(embed, 2, heads, pre_norm=True)
    model = randomised(source)
    grown = grow(source, target, model.state_dict(), settings).materialize()
    assert lossless_gap(model, grown, seed=1) < 1e-5
    if embed % 32:
        tail = grown.norm_pre.weight[-(embed % 32) :]
        assert torch.allclose(tail.sum(), torch.zeros(()).to(tail), atol=1e-9)
        with torch.no_grad():
            tail.copy_(torch.ones_like(tail))
        assert lossless_gap(model, grown, seed=1) > 1e-3


def test_norm_of_equal_gains_is_left_as_it_is():
    source, target = PAIRS["pre-norm, odd"]
    weights = source.split(randomised(source).state_dict())
    weights["norm_pre.weight"] = torch.full_like(weights["norm_pre.weight"], 0.7)
    method = METHODS["lemon"](source, target, GrowSettings(method="lemon"))
    grown, plain = method(weights), Expansion.forward(method, weights)
    assert all(torch.equal(grown[name], plain[name]) for name in plain)


@pytest.mark.parametrize("embed", [48, 80])
def test_what_carries_the_mean_adds_a_millionth_to_the_variance(embed):
    """Of 32 independent channels of variance 1: a kernel that is the identity shows what each new channel holds."""
    source, target = tiny(32, 2, 2, pre_norm=True), tiny(embed, 2, embed // 16, pre_norm=True)
    weights = source.split(randomised(source).state_dict())
    weights["patch_embed.proj.weight"] = torch.eye(32, 192, dtype=torch.float64).reshape(32, 3, 8, 8)
    method = METHODS["lemon"](source, target, GrowSettings(method="lemon"))
    grown, plain = (made["patch_embed.proj.weight"] for made in (method(weights), Expansion.forward(method, weights)))
    assert float((grown - plain).square().sum() / (embed - 16)) == pytest.approx(1e-6)


@pytest.mark.parametrize("method", ["lemon", "mango"])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        kin((4, 2, 4), (9, 2, 9), pre_norm=True),
        kin((32, 2, 2), (48, 2, 3), embed_norm_layer="layernorm"),
    ],
    ids=["one new channel", "norm over patches"],
)
def test_nothing_is_claimed_where_the_mean_cannot_be_carried(source, target, method):
    model = randomised(source)
    grown = grow(source, target, model.state_dict(), GrowSettings(method=method))
    assert not grown.method.lossless
    assert lossless_gap(model, grown.materialize(), seed=1) > 1e-4


@pytest.mark.parametrize("count", range(2, 12))
def test_alternating_numbers_cancel_and_none_is_zero(count):
    signs = alternating(count, torch.empty(0, dtype=torch.float64))
    assert len(signs) == count
    assert signs.sum() == 0
    assert signs.abs().min() == 1


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ((tiny(32, 2, 2), tiny(64, 2, 4, act_layer="relu")), "differ in activation GELU -> ReLU;"),
        ((tiny(32, 2, 2), tiny(64, 2, 4, name="test_vit4")), "differ in norm LayerNorm eps 1e-06 -> RmsNorm eps 1e-06"),
        ((tiny(32, 2, 2), tiny(64, 2, 4, global_pool="avg", fc_norm=False)), "differ in pooling token -> avg"),
        (
            (tiny(32, 2, 2), tiny(64, 2, 4, name="deit_tiny_distilled_patch16_224")),
            "differ in heads one -> two, distilled",
        ),
        ((tiny(32, 2, 2), tiny(64, 2, 4, init_values=1e-5)), "differ in blocks.{l}.ls1.gamma"),
    ],
    ids=["activation", "norm", "pooling", "distilled", "layer scale"],
)
def test_target_of_another_kind_is_refused_by_what_differs(pair, said):
    source, target = pair
    with pytest.raises(GrowkitError, match=re.escape(said)) as refused:
        grow(source, target, randomised(source).state_dict(), GrowSettings())
    assert str(refused.value).endswith(
        "as --to vit_tiny_patch16_224 --set embed_dim=64 --set num_heads=4 --set depth=2"
    )
