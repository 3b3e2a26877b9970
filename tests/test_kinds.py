"""Kinds of ViT that nobody thought of: any mixture of what the table covers, grown by any method that can."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import randomised, tiny
from test_methods import eps_at

from growkit.arch import detect
from growkit.errors import GrowkitError
from growkit.grow import grow, lossless_gap
from growkit.methods import METHODS, able
from growkit.settings import GrowSettings

HEAD = 8
PLAIN = "vit_tiny_patch16_224"
POOLINGS = ("token", "avg", "max", "avgmax", "map")
switches = {
    name: st.booleans()
    for name in (
        "qkv_bias",
        "proj_bias",
        "qk_norm",
        "pre_norm",
        "no_embed_class",
        "final_norm",
        "pool_include_prefix",
    )
}
kinds = st.fixed_dictionaries(
    {
        **switches,
        "class_token": st.booleans(),
        # rare, for next to them nothing is claimed at odd widths
        "scale_attn_norm": st.sampled_from((False, False, False, False, True)),
        "scale_mlp_norm": st.sampled_from((False, False, False, False, True)),
        "reg_tokens": st.integers(0, 2),
        "init_values": st.sampled_from((None, 1e-5)),
        "global_pool": st.sampled_from(POOLINGS),
        "fc_norm": st.sampled_from((None, True, False)),
        "num_classes": st.sampled_from((0, 3)),
        "act_layer": st.sampled_from(("gelu", "relu")),
    }
)
ratios = st.sampled_from((1.0, 1.5, 2.0))


def possible(kind: dict) -> dict:
    """The kind with what timm refuses put right: token pooling needs the token, SwiGLU its own activation."""
    if kind["global_pool"] == "token" and not kind["class_token"]:
        kind = {**kind, "global_pool": "avg"}
    if kind.get("name", PLAIN) != PLAIN:
        kind = {**kind, "act_layer": "silu"}
    return kind


@pytest.mark.parametrize(
    ("norm_layer", "name"),
    [("layernorm", PLAIN), ("rmsnorm", PLAIN), ("rmsnorm", "aimv2_large_patch14_224")],
    ids=["LayerNorm", "RMSNorm", "RMSNorm and SwiGLU"],
)
@pytest.mark.parametrize(("heads", "wider"), [(2, 1), (3, 5), (1, 2)], ids=["half as wide again", "odd", "whole"])
@settings(max_examples=8)
@given(kind=kinds, depth=st.integers(1, 2), deeper=st.integers(0, 2), ratio=ratios, drawn=st.sampled_from((*METHODS,)))
def test_whatever_kind_is_grown_keeps_the_function_where_that_is_claimed(
    norm_layer, name, heads, wider, kind, depth, deeper, ratio, drawn
):
    kind = possible({**kind, "norm_layer": norm_layer, "name": name})
    source = tiny(HEAD * heads, depth, heads, mlp_ratio=ratio, **kind)
    target = tiny(HEAD * (heads + wider), depth + deeper, heads + wider, mlp_ratio=ratio, **kind)
    model = randomised(source)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        largest = float(model(images).abs().max())
    for method in {"lemon", "mango", drawn} & {*able(source, target)}:
        grown = grow(source, target, model.state_dict(), GrowSettings(method=method, rank=1 + wider))
        plain = grown.materialize()
        assert {name: tuple(w.shape) for name, w in plain.state_dict().items()} == dict(target.shapes)
        assert torch.allclose(grown(images), plain(images), rtol=1e-9, atol=1e-9)
        if grown.method.lossless:
            nearly = wider % heads and kind["pre_norm"] and source.centred
            gap = lossless_gap(eps_at(copy.deepcopy(model), 1e-24), eps_at(plain, 1e-24), seed=1)
            assert gap <= (1e-4 if nearly else 1e-9) * max(1, largest), method


@settings(max_examples=15)
@given(kind=kinds, heads=st.integers(1, 3), ratio=ratios, norm_layer=st.sampled_from(("layernorm", "rmsnorm")))
def test_whatever_kind_is_told_from_its_weights_and_the_name_or_refused(kind, heads, ratio, norm_layer):
    source = tiny(HEAD * heads, 2, heads, mlp_ratio=ratio, **possible({**kind, "norm_layer": norm_layer}))
    state = randomised(source).state_dict()
    told = [f"{name}={value}" for name, value in source.arguments.items()]
    for sets in (told, [f"num_heads={heads}", "img_size=16"]):
        try:
            found, _ = detect(state, name=source.name, sets=sets)
        except GrowkitError:
            assert sets is not told
        else:
            assert found.shapes == source.shapes
