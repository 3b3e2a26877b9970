"""Architectures: told from weights or names, covered to the last parameter, and held against checkpoints by name."""

import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from pairs import PAIRS, randomised, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from growkit.arch import build, detect, find, find_target, full_name, parse_sets, vit
from growkit.arch.spec import Architecture
from growkit.errors import GrowkitError
from growkit.grow import grow
from growkit.settings import GrowSettings
from growkit.source import load_source

ARCHITECTURES = {
    f"{name}, {side}": pair[i] for name, pair in PAIRS.items() for i, side in enumerate(("small", "large"))
}
PUBLISHED = (
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "deit_base_patch16_224",
    "vit_base_patch16_224",
    "vit_large_patch16_224",
)
HUGE, NARROW = "vit_huge_patch14_224", {"mlp_ratio": 0.1}


def state_of(architecture: Architecture) -> dict[str, Tensor]:
    return dict(randomised(architecture, dtype=torch.float32).state_dict())


def zeros(embed: int, depth: int) -> dict[str, Tensor]:
    """A checkpoint of a ViT for 16 x 16 images; its head count leaves no trace in it."""
    return state_of(tiny(embed, depth, 1))


def heads(architecture: Architecture) -> int:
    attention = architecture.spaces["attn"]
    return attention.size // attention.group


# What tells the head count


def test_head_count_comes_from_the_files_name() -> None:
    state = zeros(192, 12)
    by_shapes, _ = detect(state)
    assert heads(by_shapes) == 3
    for hint in ("deit_tiny_patch16_224", "deit_tiny-a1311bcf", "DeiT-Tiny_patch16_224"):
        architecture, how = detect(state, hint=hint)
        assert (architecture.name, heads(architecture)) == ("deit_tiny_patch16_224", 3)
        assert how == "deit_tiny_patch16_224, from the file's name"


@pytest.mark.parametrize("short", ["vit_large", "deit3_huge"])
def test_files_short_name_is_completed_as_that_of_a_target(short: str) -> None:
    name = full_name(short)
    state = {key: torch.zeros(1).expand(shape) for key, shape in find(name).shapes.items()}
    assert detect(state, hint=short)[0].name == name


def test_files_name_of_another_size_is_not_believed() -> None:
    architecture, how = detect(zeros(192, 12), hint="deit_base_patch16_224")
    assert architecture.name == "deit_tiny_patch16_224"
    assert "from its shapes" in how


@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        ("deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224"),
        ("deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"),
    ],
)
def test_files_name_is_not_believed_where_weights_and_it_differ_in_the_distillation_token(kind: str, hint: str) -> None:
    architecture = tiny(192, 12, 3, name=kind)
    found, _ = detect(state_of(architecture), hint=hint)
    assert (found.name, found.shapes) == (kind, architecture.shapes)


def test_files_name_of_a_plain_vit_is_not_believed_for_a_kind_that_shapes_do_not_show() -> None:
    state = {key: torch.zeros(shape) for key, shape in find("vit_base_patch16_clip_224").shapes.items()}
    with pytest.raises(GrowkitError, match=r"norm_pre\.weight: a CLIP-like ViT, .* --from NAME says which"):
        detect(state, hint="vit_base_clip")


def test_head_count_comes_from_from() -> None:
    architecture, how = detect(zeros(192, 12), name="vit_tiny", hint="deit_base")
    assert (architecture.name, heads(architecture)) == ("vit_tiny_patch16_224", 3)
    assert how == "--from vit_tiny"


def test_head_size_is_that_of_from_at_another_width() -> None:
    state = zeros(160, 2)
    architecture, _ = detect(state, name=HUGE)
    assert (heads(architecture), architecture.spaces["attn"].group) == (2, 80)


@pytest.mark.parametrize(
    ("state", "said", "size"),
    [
        (zeros(128, 2), "a ViT of 2 layers, 128 wide", 64),
        ({key: torch.zeros(()).expand(shape) for key, shape in find(HUGE, NARROW).shapes.items()}, HUGE, 80),
    ],
    ids=["unpublished", "ViT-H"],
)
def test_head_count_is_assumed_from_the_usual_width_of_heads_and_said(
    state: dict[str, Tensor], said: str, size: int
) -> None:
    architecture, how = detect(state)
    assert architecture.spaces["attn"].group == size
    assert (
        how == f"{said}, from its shapes; {size}-wide heads assumed, which "
        "weights do not show (--from-set num_heads=N says otherwise)"
    )


def test_set_decides_over_64_wide_heads() -> None:
    architecture, how = detect(zeros(128, 2), sets=["num_heads=8"])
    assert heads(architecture) == 8
    assert how.endswith("heads as --from-set")


def test_width_that_is_no_multiple_of_64_asks_for_the_head_count() -> None:
    state = zeros(48, 2)
    with pytest.raises(GrowkitError, match=r"48 is no multiple of 64; --from-set num_heads=N says it"):
        detect(state)
    architecture, _ = detect(state, sets=["num_heads=3"])
    assert heads(architecture) == 3


def test_line_about_the_source_reaches_the_user(tmp_path: Path) -> None:
    torch.save(zeros(192, 12), tmp_path / "deit_tiny_patch16_224-a1311bcf.pth")
    source = load_source(str(tmp_path / "deit_tiny_patch16_224-a1311bcf.pth"))
    assert source.notes == ("source is deit_tiny_patch16_224, from the file's name",)


def traceless(architecture: Architecture) -> bool:
    """Whether norms or activations differ from a plain ViT's, said here once more; these leave no trace in weights."""
    plain = {"norm": "LayerNorm eps 1e-06", "activation": "GELU", "MLP": "Mlp"}
    other = any(architecture.kind[what] != kind for what, kind in plain.items())
    return other or architecture.kind["pooling"] in ("max", "map") or architecture.has("norm_pre")


@pytest.mark.parametrize("name", [name for name, known in ARCHITECTURES.items() if not traceless(known)])
def test_shapes_rebuild_the_architecture(name: str) -> None:
    architecture = ARCHITECTURES[name]
    state, sets = state_of(architecture), [f"num_heads={heads(architecture)}"]
    if architecture.has("norm_mlp"):
        with pytest.raises(GrowkitError, match="--from NAME says which"):
            detect(state, sets=sets)
        return
    found, _ = detect(state, sets=sets)
    assert found.shapes == architecture.shapes
    assert found.spaces == architecture.spaces
    assert found.kind == architecture.kind


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shapes_and_name_rebuild_the_architecture(name: str) -> None:
    architecture = ARCHITECTURES[name]
    sets = [f"num_heads={heads(architecture)}"]
    if architecture.kind["pooling"] == "max":  # of no name, and without a trace
        sets.append("global_pool=max")
    if "pos_embed" not in architecture.shapes:  # which would show the size
        sets.append("img_size=16")
    found, how = detect(state_of(architecture), name=architecture.name, sets=sets)
    assert how == f"--from {architecture.name}"
    assert found.shapes == architecture.shapes
    assert found.spaces == architecture.spaces
    assert found.kind == architecture.kind
    built, wanted = (build(a.name, a.arguments) for a in (found, architecture))
    weights = {key: torch.randn(shape) for key, shape in architecture.shapes.items()}
    images = torch.randn(2, 3, 16, 16)
    for model in (built, wanted):
        model.load_state_dict(weights)
    assert torch.equal(built.eval()(images), wanted.eval()(images))


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        (tiny(64, 2, 1, pre_norm=True), "norm_pre.weight: a CLIP-like ViT"),
        (tiny(64, 2, 1, name="vit_base_patch16_siglip_224"), "attn_pool.latent: a SigLIP-like ViT"),
        (tiny(64, 2, 1, name="vit_base_patch16_siglip_gap_224"), "norm without a cls_token: a SigLIP-like ViT"),
        (tiny(64, 2, 1, name="test_vit4"), "blocks.0.norm1 without a bias: a ViT with RMSNorm"),
        (tiny(64, 2, 1, name="vit_giant_patch14_dinov2", mlp_ratio=4), "fc1 twice as wide as fc2: a ViT with SwiGLU"),
    ],
    ids=["pre-norm", "pooled by attention", "pooled after the norm", "RMSNorm", "SwiGLU"],
)
def test_kind_that_shapes_do_not_show_in_full_asks_for_its_name(
    architecture: Architecture, said: str, tmp_path: Path
) -> None:
    state = state_of(architecture)
    with pytest.raises(
        GrowkitError, match=rf"{re.escape(said)}, .* --from NAME says which, as in --from (\w+)"
    ) as asked:
        detect(state)
    example = str(asked.value).rpartition(" ")[2]
    assert find(example).kind["norm"]  # a name that there is, and that grows


def test_files_name_says_a_kind_that_shapes_do_not_show() -> None:
    name = "vit_base_patch16_clip_224"
    state = {key: torch.zeros(shape) for key, shape in find(name).shapes.items()}
    found, how = detect(state, hint=f"{name}.openai")
    assert (found.name, how) == (name, f"{name}, from the file's name")
    assert found.kind["norm"] == "LayerNorm eps 1e-05"


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("layers.0.blocks.0.attn.relative_position_bias_table", "Swin"),
        ("stages.0.blocks.0.conv_dw.weight", "ConvNeXt"),
        ("bert.encoder.layer.0.attention.self.query.weight", "BERT"),
        ("vit.encoder.layer.0.attention.attention.query.weight", "Hugging Face ViT"),
        ("blocks.0.attn.q_proj.weight", "EVA"),
        ("encoder.layers.encoder_layer_0.ln_1.weight", "torchvision"),
        ("layer1.0.conv1.weight", "ResNet"),
        ("h.0.attn.c_attn.weight", "GPT-2"),
        ("vision_model.encoder.layers.0.self_attn.q_proj.weight", "Hugging Face's"),
        ("layers.0.self_attn.in_proj_weight", "torch's"),
        ("blocks.0.attn.q_bias", "BEiT"),
        ("stages.0.0.dwconv.weight", "ConvNeXt"),
    ],
)
def test_weights_of_another_family_are_refused_by_its_name(key: str, family: str) -> None:
    with pytest.raises(GrowkitError, match=f"these are the weights of .*{family}.*; {LISTED}"):
        detect({key: torch.zeros(3, 3)})


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_tiny", "eva02_tiny_patch14_224"])
def test_weights_of_timms_other_families_are_told_by_their_tensors(name: str) -> None:
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    with pytest.raises(GrowkitError, match="these are the weights of") as refused:
        detect(state)
    assert name[:3] in str(refused.value).lower()


@pytest.mark.parametrize(
    "more",
    [
        {"no_embed_class": True},
        {"reg_tokens": 4},
        {"reg_tokens": 4, "no_embed_class": True},
        {"reg_tokens": 1, "class_token": False, "global_pool": "avg"},
        {"global_pool": "avg"},
        {"class_token": False, "global_pool": "avg"},
        {"in_chans": 1, "qkv_bias": False},
        {"img_size": 32, "num_classes": 3},
    ],
    ids=str,
)
def test_tokens_and_input_are_told_from_the_weights(more: dict) -> None:
    architecture = tiny(64, 2, 1, **more)
    found, _ = detect(state_of(architecture))
    assert found.shapes == architecture.shapes
    rebuilt, expected = (build(a.name, a.arguments, device="meta") for a in (found, architecture))
    assert vit.input_arguments(rebuilt) == vit.input_arguments(expected)


def test_pooling_behind_the_norm_is_told_from_the_weights_of_a_named_network() -> None:
    architecture = tiny(64, 2, 1, class_token=False, global_pool="avg", fc_norm=False)
    found, _ = detect(state_of(architecture), name="vit_tiny")
    assert found.shapes == architecture.shapes


@pytest.mark.parametrize(("has", "named"), [("map", "siglip_gap_224"), ("avg", "siglip_224")])
def test_attention_pooling_is_told_from_the_weights_whatever_their_name_has(has: str, named: str) -> None:
    architecture = tiny(64, 2, 1, name="vit_base_patch16_siglip_224", global_pool=has, fc_norm=has == "avg")
    found, _ = detect(state_of(architecture), name=f"vit_base_patch16_{named}")
    assert found.shapes == architecture.shapes
    assert found.kind == architecture.kind


# What does not fit


def test_missing_and_unknown_tensors_are_named() -> None:
    state = zeros(64, 2)
    del state["blocks.1.norm2.bias"]
    state["blocks.1.ls1.gamma"] = torch.ones(64)
    with pytest.raises(GrowkitError) as caught:
        detect(state)
    assert "lacks blocks.1.norm2.bias" in str(caught.value)
    assert "has unknown blocks.1.ls1.gamma" in str(caught.value)
    assert "--from" in str(caught.value)


@pytest.mark.parametrize(
    ("said", "given"),
    [
        ("a ViT of 2 layers, 64 wide, from its shapes", {}),
        ("--from vit_small", {"name": "vit_small"}),
        ("vit_small_patch16_224, from the file's name", {"hint": "vit_small-1", "embed": 384, "depth": 12}),
        ("deit_small_patch16_224, from its shapes", {"embed": 384, "depth": 12}),
    ],
)
def test_what_the_weights_were_taken_for_is_told_when_one_is_missing(said: str, given: dict) -> None:
    architecture = tiny(given.pop("embed", 64), given.pop("depth", 2), 1)
    state = state_of(architecture)
    del state["blocks.1.mlp.fc2.weight"]
    with pytest.raises(GrowkitError) as caught:
        detect(state, **given)
    lacking = "lacks blocks.1.mlp.fc2.weight; give all of its weights and no others"
    told = f"weights do not fit what they were taken for ({said}): {lacking}, or name what they are (--from)"
    assert str(caught.value) == told
    with pytest.raises(GrowkitError) as caught:  # a model folder's, for which there is no --from
        architecture.check(state)
    assert str(caught.value) == f"weights do not fit {architecture.name}: {lacking}"


@pytest.mark.parametrize("name", ["norm.weight", "norm.bias", "head.weight", "head.bias"])
def test_of_two_tensors_the_missing_one_is_named(name: str) -> None:
    state = {key: tensor for key, tensor in zeros(64, 2).items() if key != name}
    with pytest.raises(GrowkitError, match=rf"lacks {name}; give all"):
        detect(state)


def test_many_missing_tensors_are_counted() -> None:
    state = {name: tensor for name, tensor in zeros(64, 2).items() if "norm2" not in name and "fc1.bias" not in name}
    with pytest.raises(GrowkitError, match=r"lacks blocks\.0\.norm2\.weight, .*, .* and 3 more"):
        detect(state)


def test_misshapen_tensor_is_named_with_both_shapes() -> None:
    state = zeros(64, 2) | {"blocks.1.mlp.fc1.bias": torch.zeros(5)}
    with pytest.raises(GrowkitError, match=r"blocks\.1\.mlp\.fc1\.bias has shape \(5,\), expected \(256,\)"):
        detect(state)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_tensor_that_is_not_finite_is_named(value: float) -> None:
    state = zeros(64, 2)
    state["blocks.0.attn.proj.weight"][3, 5] = value
    with pytest.raises(GrowkitError, match=r"blocks\.0\.attn\.proj\.weight holds values that are not finite"):
        detect(state)


@pytest.mark.parametrize(
    ("embed", "depth", "name"),
    [
        (192, 12, "deit_tiny_distilled_patch16_224"),
        (64, 2, "deit_small_distilled_patch16_224"),
        (1024, 24, "deit_small_distilled_patch16_224"),  # of which there is a ViT, and no distilled DeiT
    ],
)
def test_distilled_deit_is_told_by_its_token(embed: int, depth: int, name: str) -> None:
    architecture = tiny(embed, depth, embed // 64, name="deit_base_distilled_patch16_224")
    found, how = detect({key: torch.zeros(()).expand(shape) for key, shape in architecture.shapes.items()})
    assert found.name == name
    assert found.shapes == architecture.shapes
    assert "64-wide heads assumed" in how


def test_weights_of_something_else_are_refused_by_what_they_lack() -> None:
    with pytest.raises(GrowkitError, match=r"no ViT or DeiT: the weights lack patch_embed\.proj\.weight, .*"):
        detect({"conv1.weight": torch.zeros(3, 3)})


@pytest.mark.parametrize(
    "key",
    [
        "patch_embed.proj.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
        "head.weight",
        "pos_embed",
        "reg_token",
    ],
)
@pytest.mark.parametrize("shape", [(), (3,), (0, 0)], ids=str)
def test_tensor_of_the_wrong_rank_is_refused_whatever_it_decides(key: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(GrowkitError, match=re.escape(f"{key} has shape {shape}, expected ")):
        detect(zeros(64, 2) | {key: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("gone", "key"), [("head.weight", "head.bias"), ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc1_x.weight")]
)
def test_tensor_that_decides_where_another_is_missing_is_refused_for_its_rank(gone: str, key: str) -> None:
    state = zeros(64, 2) | {key: torch.zeros(())}
    del state[gone]
    with pytest.raises(GrowkitError, match=rf"{re.escape(key)} has shape \(\), expected"):
        detect(state)


# Names and arguments


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("deit_base", "deit_base_patch16_224"),
        ("vit_large", "vit_large_patch16_224"),
        ("vit_huge", "vit_huge_patch14_224"),
        ("deit_small_patch16_224", "deit_small_patch16_224"),
        ("deit_small_patch16_224.fb_in1k", "deit_small_patch16_224"),
    ],
)
def test_short_names_are_completed(given: str, name: str) -> None:
    assert full_name(given) == name
    assert find(given).name == name


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("deit_bse", "deit_base"), ("diet_small", "deit_small"), ("vit_lrge", "vit_large"), ("deit3_hug", "deit3_huge")],
)
def test_typo_is_offered_the_nearest_names(typo: str, meant: str) -> None:
    with pytest.raises(GrowkitError) as caught:
        find(typo)
    assert f"unknown architecture {typo!r}" in str(caught.value)
    assert meant in str(caught.value).partition("nearest:")[2].replace(" ", "").split(",")


LISTED = "growkit grows timm's plain ViT and DeiT; docs/architectures.md lists the names"


@pytest.mark.parametrize("name", ["gpt2", "bert-base-uncased", "resnet5000", "?"])
def test_name_near_to_none_is_told_what_grows(name: str) -> None:
    with pytest.raises(GrowkitError) as caught:
        find(name)
    assert str(caught.value) == f"unknown architecture {name!r}; {LISTED}"


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "swin_tiny_patch4_window7_224",
        "eva02_tiny_patch14_224",
        "vit_base_r50_s16_224",
        "beit_base_patch16_224",
    ],
)
def test_network_of_another_kind_is_refused_by_name(name: str) -> None:
    with pytest.raises(GrowkitError, match=f"{name} (is timm's|has a stem) .*; {LISTED}"):
        find(name)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("vit_base_patch16_rpn_224", "ResPostBlock"),  # whose tensors have a plain block's names
        ("vit_base_patch16_xp_224", "ParallelScalingBlock"),
        ("vit_small_patch16_18x2_224", "ParallelThingsBlock"),
        ("vit_dwee_patch16_reg1_gap_256", "DiffAttention"),
        ("vit_small_r26_s32_224", "HybridEmbed"),
    ],
)
def test_vit_with_a_part_outside_the_table_is_refused_by_that_part(name: str, part: str) -> None:
    with pytest.raises(GrowkitError, match=f"{name} has .* of its own \\({part}\\)"):
        find(name)
    with pytest.raises(GrowkitError, match=part):
        find_target(tiny(64, 2, 1), name)
    with pytest.raises(GrowkitError, match=part):
        detect(zeros(64, 2), name=name)


def test_set_values_are_python_literals_or_words() -> None:
    parsed = parse_sets(["depth=8", "mlp_ratio=2.5", "qkv_bias=False", "global_pool=avg"])
    assert parsed == {"depth": 8, "mlp_ratio": 2.5, "qkv_bias": False, "global_pool": "avg"}
    deep = "-" * 10**4 + "1"  # too deep for Python
    assert parse_sets([f"depth={deep}"]) == {"depth": deep}
    parsed = parse_sets(["qkv_bias=false", "class_token=TRUE", "init_values=none"])
    assert parsed == {"qkv_bias": False, "class_token": True, "init_values": None}


def test_set_without_equals_says_how_it_is_written() -> None:
    with pytest.raises(GrowkitError, match=r"--set depth: expected KEY=VALUE, as in --set depth=8"):
        parse_sets(["depth"])


def test_set_of_an_unknown_argument_offers_the_nearest() -> None:
    with pytest.raises(GrowkitError, match=r"no argument 'embed_dims'; nearest: embed_dim"):
        parse_sets(["embed_dims=8"])


@pytest.mark.parametrize("arguments", [{"depth": "many"}, {"num_heads": 0}, {"embed_dim": "wide"}])
def test_arguments_that_timm_refuses_are_quoted(arguments: dict) -> None:
    ((key, value),) = arguments.items()
    with pytest.raises(GrowkitError, match=f"cannot build vit_tiny_patch16_224 with {key}={value}") as caught:
        find("vit_tiny", arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"embed_dim": 97}, "num_heads=3: embed_dim=97 is no multiple of it, embed_dim=99 is"),
        ({"num_heads": 5}, "num_heads=5: embed_dim=192 is no multiple of it, but of num_heads=4"),
        ({"embed_dim": 96, "num_heads": 7}, "num_heads=7: embed_dim=96 is no multiple of it, but of num_heads=6"),
    ],
)
def test_width_and_heads_that_do_not_fit_are_told_what_does(arguments: dict, said: str) -> None:
    with pytest.raises(GrowkitError) as caught:
        find("vit_tiny", arguments)
    assert str(caught.value) == said
    assert find("vit_tiny", arguments | parse_sets(re.findall(r"\w+=\d+", said)[-1:])).name == "vit_tiny_patch16_224"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"qkv_bias": "maybe"}, "expected true or false"),
        ({"class_token": -5}, "expected true or false"),
        ({"num_classes": -1}, "expected a whole number up to 1048576"),
        ({"num_classes": True}, "expected a whole number up to 1048576"),
        ({"depth": 10**6}, "expected a whole number up to 1024"),
        ({"img_size": (224, 2**30)}, "expected a whole number up to 1048576"),
        ({"embed_dim": (192, 192)}, "expected a whole number up to 1048576"),
        ({"drop_path_rate": 1}, "expected a number from 0 to below 1"),
        ({"init_values": float("nan")}, "expected a number from 0 to 1048576"),
        ({"mlp_ratio": -1}, "expected a number from 0 to 1048576"),
        ({"mlp_ratio": None}, "expected a number from 0 to 1048576"),
    ],
)
def test_arguments_that_timm_would_take_for_others_are_refused(arguments: dict, said: str) -> None:
    ((key, value),) = arguments.items()
    with pytest.raises(GrowkitError) as caught:
        find("vit_tiny", arguments)
    assert str(caught.value) == f"cannot build vit_tiny_patch16_224 with {key}={value}: {said}"


class Called(TorchDispatchMode):
    """While entered, collects the names of torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_mlp_ratio_gives_the_hidden_units_back_as_timm_rounds_them() -> None:
    for embed, hidden in product(range(1, 100), range(1, 400)):
        assert int(embed * vit.ratio(hidden, embed)) == hidden


def test_network_without_values_draws_none_and_is_the_same_otherwise() -> None:
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
    with Called() as drawn:
        filled = build("deit_tiny_patch16_224", sizes)
    with Called() as none:
        bare = build("deit_tiny_patch16_224", sizes, device="meta")
    drawing = {"erfinv_", "clamp_", "add_", "mul_"}
    assert drawn.names >= drawing
    assert not none.names & drawing
    shapes, wanted = (
        {name: tuple(value.shape) for name, value in model.state_dict().items()} for model in (bare, filled)
    )
    assert shapes == wanted
    assert repr(bare) == repr(filled)
    assert bare._model_args == filled._model_args  # timm writes them into config.json


def test_arguments_of_every_kind_are_taken() -> None:
    arguments = {"img_size": [32, 32], "patch_size": 8, "init_values": None, "drop_path_rate": 0, "fc_norm": None}
    assert find("vit_tiny", arguments).spaces["embed"].size == 192


# The table


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_split_and_join_give_the_checkpoint_back(name: str) -> None:
    architecture = ARCHITECTURES[name]
    state = state_of(architecture)
    joined = architecture.join(architecture.split(state))
    assert set(joined) == set(state)
    assert [key for key in state if not torch.equal(joined[key], state[key])] == []
    assert [key for key in state if joined[key].shape != state[key].shape] == []


def test_fused_tensor_is_split_in_order_and_layers_are_stacked() -> None:
    architecture = tiny(32, 3, 2)
    state = state_of(architecture)
    slots = architecture.split(state)
    for layer in range(3):
        fused = state[f"blocks.{layer}.attn.qkv.weight"]
        for position, slot in enumerate("qkv"):
            assert torch.equal(slots[f"{slot}.weight"][layer], fused[32 * position : 32 * (position + 1)])
        assert torch.equal(slots["out.weight"][layer], state[f"blocks.{layer}.mlp.fc2.weight"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_parameter_of_published_models_is_covered(name: str) -> None:
    architecture = find(name)
    model = build(name, {}, device="meta")
    layers = range(architecture.spaces["blocks"].size)
    covered = [row.key.format(l=layer) for row in architecture.tensors for layer in (layers if row.layered else (0,))]
    assert sorted(covered) == sorted(key for key, _ in model.named_parameters())
    for row in architecture.tensors:
        shape = architecture.shapes[row.key.format(l=0)]
        assert len(row.dims) == len(shape), row.key
        for axis, space in enumerate(row.dims):
            if space is not None:
                times = len(row.slots) if axis == 0 else 1
                assert shape[axis] == times * architecture.spaces[space].size, row.key


@pytest.mark.parametrize("dropped", [row.key for row in vit.ROWS])
def test_dropped_table_row_is_reported_by_name(monkeypatch: pytest.MonkeyPatch, dropped: str) -> None:
    rare = (
        tiny(32, 2, 2, name="aimv2_large_patch14_224", proj_bias=True),
        tiny(32, 2, 2, embed_norm_layer="layernorm"),
        tiny(32, 2, 2, global_pool="avg"),
    )
    key = dropped.format(l=0)
    architecture = next(known for known in (*ARCHITECTURES.values(), *rare) if key in known.shapes)
    monkeypatch.setattr(vit, "ROWS", tuple(row for row in vit.ROWS if row.key != dropped))
    with pytest.raises(GrowkitError, match=key.replace(".", r"\.")):
        find(architecture.name, architecture.arguments)


def test_row_with_a_wrong_space_does_not_join_back() -> None:
    architecture = tiny(32, 2, 2)
    rows = tuple(replace(row, slots=("k", "q", "v")) if "qkv" in row.key else row for row in architecture.tensors)
    broken = replace(architecture, tensors=rows)
    weights = broken.split(state_of(architecture))
    with pytest.raises(KeyError, match=r"q\.weight"):
        architecture.join(weights)


# Targets


def test_target_keeps_the_sources_input_and_says_so() -> None:
    source = tiny(64, 2, 1, in_chans=1, num_classes=5)
    target, notes = find_target(source, "deit_base")
    (note,) = notes
    assert note.startswith("target takes the source's img_size 16 (deit_base_patch16_224 has 224; --set img_size=224")
    for said in ("patch_size 8", "in_chans 1", "num_classes 5"):
        assert said in note
    kept, has = (build(a.name, a.arguments, device="meta") for a in (source, target))
    assert vit.input_arguments(kept) == vit.input_arguments(has)
    assert target.spaces["embed"].size == 768


def test_target_of_the_same_input_has_nothing_to_say() -> None:
    assert find_target(find("deit_tiny"), "deit_small")[1] == []
    # how a layer scale started is told by no weights
    for sets in ((), ("init_values=0.1",)):
        assert find_target(find("deit3_small", {"init_values": 1e-5}), "deit3_base", sets)[1] == []


@pytest.mark.parametrize(
    "more",
    [
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
        {"act_layer": "quick_gelu"},
        {"norm_layer": "rmsnorm"},
        {"img_size": 20, "dynamic_img_size": True, "dynamic_img_pad": True},
    ],
    ids=str,
)
def test_target_of_a_plain_name_takes_over_what_the_source_is_besides(more: dict) -> None:
    source = tiny(64, 2, 1, **more)
    target, _ = find_target(source, "vit_base", ["embed_dim=128", "depth=3", "num_heads=2"])
    small = randomised(source)
    size = small.patch_embed.img_size[0]
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    big = grow(source, target, small.state_dict(), GrowSettings()).materialize()
    assert torch.allclose(big(images), small(images), rtol=1e-9)


@pytest.mark.parametrize("item", ["img_size=32", "patch_size=4", "num_classes=3", "in_chans=1", "class_token=False"])
def test_set_that_contradicts_the_source_is_refused(item: str) -> None:
    key = item.partition("=")[0]
    with pytest.raises(GrowkitError, match=f"--set {item}: the source has .*, and growing keeps it"):
        find_target(tiny(64, 2, 1), "deit_base", [item])
    agreed = f"{key}={vit.input_arguments(build_tiny())[key]}"
    assert find_target(tiny(64, 2, 1), "deit_base", [agreed])[0].spaces["embed"].size == 768


def build_tiny() -> torch.nn.Module:
    architecture = tiny(64, 2, 1)
    return build(architecture.name, architecture.arguments, device="meta")


def test_width_that_timm_refuses_is_refused_with_the_heads_that_fit_the_source() -> None:
    source = find("deit_tiny", {"embed_dim": 32, "num_heads": 2})
    with pytest.raises(
        GrowkitError, match=r"64 is no multiple of 3 heads; the source's are 16 wide: --set num_heads=4$"
    ):
        find_target(source, "deit_tiny", ["embed_dim=64"])
    told = r"65 is no multiple of 3 heads; the source's are 16 wide: --set embed_dim=80 --set num_heads=5$"
    with pytest.raises(GrowkitError, match=told):
        find_target(source, "deit_tiny", ["embed_dim=65"])
    with pytest.raises(GrowkitError, match=r"192 is no multiple of 5 heads; .* 16 wide: --set num_heads=12$"):
        find_target(source, "deit_tiny", ["num_heads=5"])
    with pytest.raises(GrowkitError, match=r"with embed_dim=64 num_heads=0: "):
        find_target(source, "deit_tiny", ["embed_dim=64", "num_heads=0"])
    with pytest.raises(GrowkitError, match=r"embed_dim=-64: expected a whole number"):
        find_target(source, "deit_tiny", ["embed_dim=-64"])
    with pytest.raises(GrowkitError, match=r"foo'?$"):
        find_target(source, "deit_tiny", ["embed_dim=64", "num_heads=4", "act_layer=foo"])
