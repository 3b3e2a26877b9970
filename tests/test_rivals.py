"""Each rival against its rule written once more in NumPy, index by index, without growkit's matrices."""

import numpy as np
import pytest
import torch
from pairs import PAIRS, kin, randomised, tiny
from torch.nn.init import trunc_normal_

from growkit.core import maps
from growkit.grow import grow
from growkit.methods.expand import SpaceMap, expand
from growkit.settings import GrowSettings

# Slots by what their axes are, written down from timm's ViT: (out, in), or (out,) for vectors.
WRITES = {
    "q": ("attn", "embed"),
    "k": ("attn", "embed"),
    "v": ("attn", "embed"),
    "o": ("embed", "attn"),
    "in": ("mlp", "embed"),
    "out": ("embed", "mlp"),
    "head": (None, "embed"),
}
LAYERED = ("q", "k", "v", "o", "in", "out", "norm1", "norm2", "norm_attn", "norm_mlp")
EMBEDDINGS = ("cls_token", "pos_embed")


def grown_and_source(pair, **settings):
    source, target = PAIRS[pair]
    state = randomised(source).state_dict()
    model = grow(source, target, state, GrowSettings(**settings))
    with torch.no_grad():
        grown = {slot: t.numpy() for slot, t in model.method(source.split(state)).items()}
    return grown, {slot: t.numpy() for slot, t in source.split(state).items()}, model.method


def gather(weights, index, counts):
    """Duplicate by index: out axes gathered, in axes gathered and divided by the copies of what they read."""
    grown = {}
    for slot, tensor in weights.items():
        name, _, kind = slot.partition(".")
        if slot in EMBEDDINGS:
            grown[slot] = tensor[:, :, index["embed"]]
        elif slot.startswith("patch_embed"):
            grown[slot] = tensor[index["embed"]]
        elif name.startswith("norm"):
            grown[slot] = tensor[..., index["embed"]]
        else:
            out, read = WRITES[name]
            first = 1 if name in LAYERED else 0
            if out is not None:
                tensor = np.take(tensor, index[out], axis=first)
            if kind == "weight":
                tensor = np.take(tensor, index[read], axis=first + 1) / counts[read][index[read]]
            grown[slot] = tensor
    return grown


def modulo(pair):
    """Whole copies in a circle, heads of 16 whole: index and counts of each space."""
    source, target = PAIRS[pair]
    index, counts = {}, {}
    for name in ("embed", "attn", "mlp"):
        old, new, group = source.spaces[name].size, target.spaces[name].size, 16 if name == "attn" else 1
        index[name] = np.array([j // group % (old // group) * group + j % group for j in range(new)])
        counts[name] = np.bincount(index[name], minlength=old)
    return index, counts


def assert_equal(grown, expected):
    assert set(grown) == set(expected)
    for slot, tensor in expected.items():
        assert np.allclose(grown[slot], tensor, rtol=0, atol=1e-13), slot


def pick_layers(weights, layers):
    return {slot: t[layers] if slot.partition(".")[0] in LAYERED else t for slot, t in weights.items()}


@pytest.mark.parametrize("pair", ["twice as wide", "thrice as wide", "larger MLP ratio"])
def test_fpi_and_hypercloning_are_tiles_divided_by_their_number(pair):
    for method in ("bert2bert", "hypercloning"):
        grown, weights, _ = grown_and_source(pair, method=method, noise=0.0)
        assert_equal(grown, gather(weights, *modulo(pair)))


def test_hypercloning_is_np_tile():
    grown, weights, _ = grown_and_source("twice as wide", method="hypercloning", noise=0.0)
    assert np.allclose(grown["in.weight"], np.tile(weights["in.weight"], (1, 2, 2)) / 2)
    assert np.allclose(grown["in.bias"], np.tile(weights["in.bias"], (1, 2)))
    assert np.allclose(grown["head.weight"], np.tile(weights["head.weight"], (1, 2)) / 2)
    assert np.allclose(grown["norm.weight"], np.tile(weights["norm.weight"], 2))


def drawn(method, space):
    """Which source unit each target unit copies, read off the method's 0/1 matrix: (new,) or (L, new)."""
    return method.maps[space].write.argmax(-1).numpy()


@pytest.mark.parametrize("pair", ["half as wide again", "odd width and depth"])
def test_fpi_draws_what_is_left_over_without_replacement_and_divides_by_counts(pair):
    grown, weights, method = grown_and_source(pair, method="bert2bert", noise=0.0)
    source, target = PAIRS[pair]
    index = {name: drawn(method, name) for name in ("embed", "attn", "mlp")}
    counts = {name: np.bincount(index[name], minlength=source.spaces[name].size) for name in index}
    for name, count in counts.items():
        old, new = source.spaces[name].size, target.spaces[name].size
        assert set(count) == {new // old, new // old + 1}
        assert (index[name][:old] == np.arange(old)).all()
    heads = index["attn"].reshape(-1, 16)
    assert (heads % 16 == np.arange(16)).all()
    assert (heads // 16 == heads[:, :1] // 16).all()
    layers, deep = source.spaces["blocks"].size, target.spaces["blocks"].size
    left = deep % layers
    stacked = [*(list(range(layers)) * (deep // layers)), *range(layers - left, layers)]
    assert_equal(grown, pick_layers(gather(weights, index, counts), stacked))


def test_aki_takes_new_outputs_from_the_layer_above():
    grown, weights, _ = grown_and_source("twice as wide", method="bert2bert", variant="aki", noise=0.0)
    index, counts = modulo("twice as wide")
    own = gather(weights, index, counts)
    layers = len(weights["q.weight"])
    above = gather(pick_layers(weights, [*range(1, layers), layers - 1]), index, counts)
    expected = dict(own)
    for name in ("q", "k", "v", "o", "in", "out"):
        for kind in ("weight", "bias"):
            slot = f"{name}.{kind}"
            old = weights[slot].shape[1]
            expected[slot] = np.concatenate([own[slot][:, :old], above[slot][:, old:]], axis=1)
    assert_equal(grown, expected)
    assert np.array_equal(grown["q.weight"][-1], own["q.weight"][-1])  # the last layer has none above


def test_net2net_divides_by_counts_of_draws_that_differ_from_layer_to_layer():
    grown, weights, method = grown_and_source("half as wide again", method="net2net", noise=0.0)
    source, _ = PAIRS["half as wide again"]
    embed, hidden = drawn(method, "embed"), {name: drawn(method, name) for name in ("attn", "mlp")}
    assert hidden["mlp"].shape == (3, 192)
    assert not np.array_equal(hidden["mlp"][0], hidden["mlp"][1])
    assert (hidden["attn"][:, :32] == np.arange(32)).all()
    for layer in range(3):
        index = {"embed": embed, **{name: found[layer] for name, found in hidden.items()}}
        counts = {name: np.bincount(i, minlength=source.spaces[name].size) for name, i in index.items()}
        one = gather(weights, index, counts)
        for slot in one:
            if slot.partition(".")[0] in LAYERED:
                assert np.allclose(grown[slot][layer], one[slot][layer], rtol=0, atol=1e-13), slot
            else:
                assert np.allclose(grown[slot], one[slot], rtol=0, atol=1e-13), slot


def test_lemon_by_hand():
    """32 -> 48 wide: eta^2 = 32 / 48; whole copies, means in the tail, columns of the tail free."""
    grown, weights, _ = grown_and_source("half as wide again", method="lemon", noise=0.0)
    eta = np.sqrt(32 / 48)

    def averaged(tensor, axis):
        mean = tensor.mean(axis=axis, keepdims=True)
        return np.concatenate([tensor, np.repeat(mean, 16, axis=axis)], axis=axis)

    assert np.allclose(grown["pos_embed"], averaged(weights["pos_embed"], 2))
    assert np.allclose(grown["patch_embed.proj.weight"], averaged(weights["patch_embed.proj.weight"], 0))
    assert np.allclose(grown["norm1.weight"][:, :32], eta * weights["norm1.weight"])
    assert np.allclose(grown["norm1.bias"], np.pad(weights["norm1.bias"], ((0, 0), (0, 16))))
    assert np.allclose(grown["head.weight"], np.pad(weights["head.weight"], ((0, 0), (0, 16))))
    units = np.arange(192) % 128
    counts = np.bincount(units)
    assert np.allclose(grown["in.weight"], np.pad(weights["in.weight"][:, units], ((0, 0), (0, 0), (0, 16))))
    assert np.allclose(grown["out.weight"], averaged(weights["out.weight"], 1)[:, :, units] / counts[units])
    channels = np.arange(48) % 32  # two heads of 16, then the first once more
    copies = np.bincount(channels)
    assert np.allclose(grown["v.bias"], weights["v.bias"][:, channels])
    assert np.allclose(grown["o.weight"], averaged(weights["o.weight"], 1)[:, :, channels] / copies[channels])


@pytest.mark.parametrize("method", ["lemon", "net2net", "llama-pro"])
def test_new_layers_are_copies_that_write_nothing(method):
    grown, weights, _ = grown_and_source("deeper", method=method, noise=0.0)
    # two layers become five: the first twice or thrice, the second the rest
    layers = {"llama-pro": [0, 0, 1, 1, 1]}.get(method, [0, 0, 0, 1, 1])
    first = np.array([layers.index(layer) == place for place, layer in enumerate(layers)], dtype=float)
    for slot, tensor in weights.items():
        name = slot.partition(".")[0]
        if name in ("o", "out"):
            shape = (-1,) + (1,) * (tensor.ndim - 1)
            assert np.allclose(grown[slot], tensor[layers] * first.reshape(shape)), slot
        elif name in LAYERED:
            assert np.allclose(grown[slot], tensor[layers]), slot
        else:
            assert np.allclose(grown[slot], tensor), slot


LAYER_MAPS = {
    ("stack", 2, 5): [0, 1, 0, 1, 0],
    ("stack", 3, 6): [0, 1, 2, 0, 1, 2],
    ("interlace", 2, 5): [0, 0, 0, 1, 1],
    ("interlace", 3, 6): [0, 0, 1, 1, 2, 2],
    ("round", 2, 5): [0, 0, 1, 1, 1],
    ("round", 4, 6): [0, 1, 1, 2, 3, 3],
    ("round", 22, 28): [min(21, int(i * 22 / 28 + 0.5)) for i in range(28)],
    ("solar", 4, 6): [0, 1, 2, 1, 2, 3],
    ("solar", 32, 48): [*range(24), *range(8, 32)],
    ("solar", 3, 5): [0, 1, 2, 1, 2],
}


@pytest.mark.parametrize(("variant", "old", "new"), LAYER_MAPS)
def test_stackberts_maps_of_layers(variant, old, new):
    source, target = tiny(16, old, 1, mlp_ratio=1), tiny(16, new, 1, mlp_ratio=1)
    state = randomised(source).state_dict()
    grown = grow(source, target, state, GrowSettings(method="stackbert", variant=variant)).weights()
    for place, layer in enumerate(LAYER_MAPS[variant, old, new]):
        for name in ("attn.qkv.weight", "mlp.fc2.bias", "norm2.weight"):
            assert torch.equal(grown[f"blocks.{place}.{name}"], state[f"blocks.{layer}.{name}"])
    assert torch.equal(grown["pos_embed"], state["pos_embed"])


@pytest.mark.parametrize(
    ("old", "new", "layers"),
    [
        (4, 6, [0, 1, 1, 2, 3, 3]),
        (3, 4, [0, 1, 2, 2]),
        (2, 7, [0, 0, 0, 1, 1, 1, 1]),
        (8, 10, [0, 1, 2, 3, 3, 4, 5, 6, 7, 7]),
    ],
)
def test_llama_pro_puts_a_copy_after_each_group(old, new, layers):
    assert maps.inserted_layers(old, new).argmax(1).tolist() == layers


def ligo_by_numpy(method, weights, layers):
    """W_new,l = sum_j w_lj B_j W_j A_j^T with the paper's ties, one matrix product at a time."""
    embed = method.embed.detach().numpy()
    hidden = {slot: m.detach().numpy() for slot, m in method.hidden.items()}
    depth = {module: w.detach().numpy() for module, w in method.depth.items()}
    out_of = {"q": hidden["q"], "k": hidden["k"], "v": hidden["v"], "in": hidden["in"], "o": embed, "out": embed}
    of_norm = {"norm_attn": hidden["v"], "norm_mlp": hidden["in"]}  # over what these write
    read_by = {"q": embed, "k": embed, "v": embed, "in": embed, "o": hidden["v"], "out": hidden["in"]}

    def of_layer(matrices, layer):
        return matrices[layer] if matrices.ndim == 3 else matrices

    grown = {}
    for slot, tensor in weights.items():
        name, _, kind = slot.partition(".")
        if slot in EMBEDDINGS or slot == "head.weight":
            grown[slot] = tensor @ embed.T
        elif slot == "head.bias":
            grown[slot] = tensor
        elif name not in LAYERED:
            grown[slot] = np.tensordot(embed, tensor, axes=1)
        else:
            wide = []
            for layer in range(layers):
                if name.startswith("norm"):
                    wide.append(of_layer(of_norm.get(name, embed), layer) @ tensor[layer])
                    continue
                out = of_layer(out_of[name], layer)
                one = out @ tensor[layer]
                wide.append(one @ of_layer(read_by[name], layer).T if kind == "weight" else one)
            grown[slot] = np.stack(
                [sum(depth[name][new, old] * wide[old] for old in range(layers)) for new in range(len(depth[name]))]
            )
    return grown


@pytest.mark.parametrize(
    "pair", ["wider and deeper", "half as wide again", "odd width and depth", "larger MLP ratio", "norms inside"]
)
def test_ligo_is_its_equation_wherever_its_parameters_are(pair):
    source, target = PAIRS[pair]
    state = randomised(source).state_dict()
    method = grow(source, target, state, GrowSettings(method="ligo")).method
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in method.parameters():
            p.normal_(generator=generator)
        grown = {slot: t.numpy() for slot, t in method(source.split(state)).items()}
    weights = {slot: t.numpy() for slot, t in source.split(state).items()}
    expected = ligo_by_numpy(method, weights, source.spaces["blocks"].size)
    for slot, tensor in expected.items():
        assert np.allclose(grown[slot], tensor, rtol=1e-10, atol=1e-10), slot


def test_ligo_is_a_kronecker_product_on_the_stacked_weights():
    """vec(W_new) = (w x A x B) vec(W) for a module of shared matrices (Eq. 3 and 4), here the norms' gains."""
    source, target = PAIRS["wider and deeper"]
    state = randomised(source).state_dict()
    method = grow(source, target, state, GrowSettings(method="ligo")).method
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in method.parameters():
            p.normal_(generator=generator)
        grown = method(source.split(state))["norm1.weight"].numpy()
    operator = np.kron(method.depth["norm1"].detach().numpy(), method.embed.detach().numpy())
    assert np.allclose(grown.ravel(), operator @ source.split(state)["norm1.weight"].numpy().ravel())


@pytest.mark.parametrize("pair", ["wider and deeper", "odd width and depth"])
def test_ligo_starts_as_duplication_and_stacking(pair):
    """Identity: each side of a tied matrix takes the root of the number of copies; layers are stacked."""
    source, target = PAIRS[pair]
    state = randomised(source).state_dict()
    grown = grow(source, target, state, GrowSettings(method="ligo", noise=0.0)).weights()
    by_space = {}
    for name, space in source.spaces.items():
        copies = maps.duplicate(space.size, target.spaces[name].size, space.group)
        root = copies / copies.sum(0).sqrt()
        by_space[name] = SpaceMap(copies, copies) if name == "blocks" else SpaceMap(root, root)
        if name == "attn":
            for slot in ("q", "k"):
                for kind in ("weight", "bias"):
                    by_space[f"{slot}.{kind}", name] = SpaceMap(copies, copies)
    expected = target.join(expand(source.tensors, source.split(state), by_space))
    for name, tensor in expected.items():
        assert torch.allclose(grown[name], tensor, rtol=0, atol=1e-13), name


def test_ligo_of_depth_alone_starts_as_stackbert():
    source, target = PAIRS["deeper"]
    state = randomised(source).state_dict()
    ligo, stacked = (grow(source, target, state, GrowSettings(method=m)).weights() for m in ("ligo", "stackbert"))
    assert all(torch.allclose(ligo[name], stacked[name], rtol=0, atol=1e-14) for name in stacked)


def test_mango_at_rank_1_starts_as_fpi_up_to_the_order_of_mlp_units():
    """Mango duplicates inside each of the MLP's four blocks, FPI the whole MLP; as a set of units it is the same."""
    pair = "twice as wide"
    mango, _, _ = grown_and_source(pair, method="mango", noise=0.0)
    fpi, _, _ = grown_and_source(pair, method="bert2bert", noise=0.0)
    # Mango's place of unit u's copy c: block u // 32, copy c within it; FPI's: copy c of all 128 units
    order = np.array([c * 128 + block * 32 + unit for block in range(4) for c in range(2) for unit in range(32)])
    fpi["in.weight"], fpi["in.bias"] = fpi["in.weight"][:, order], fpi["in.bias"][:, order]
    fpi["out.weight"] = fpi["out.weight"][:, :, order]
    assert_equal(mango, fpi)


def test_random_pad_keeps_the_corner_and_draws_the_rest_as_timm_does():
    source, target = kin((32, 2, 2), (256, 4, 16), init_values=0.1)
    state = randomised(source).state_dict()
    model = grow(source, target, state, GrowSettings(method="random-pad"))
    grown, weights = model.method(source.split(state)), source.split(state)
    for slot, tensor in weights.items():
        assert torch.equal(grown[slot][tuple(slice(size) for size in tensor.shape)], tensor)
    fresh = torch.cat([grown["in.weight"][2:].flatten(), grown["q.weight"][:, 32:].flatten()])
    expected = trunc_normal_(torch.empty(100_000), std=0.02, a=-0.04, b=0.04).std()
    assert fresh.std() == pytest.approx(float(expected), rel=0.02)
    assert fresh.abs().max() <= 0.04
    assert (grown["in.bias"][2:] == 0).all()
    assert (grown["norm1.weight"][2:] == 1).all()
    assert (grown["norm.weight"][32:] == 1).all()
    assert (grown["scale2.gamma"][:, 32:].float() == 1e-5).all()
