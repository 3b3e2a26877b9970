"""timm's plain VisionTransformer: DeiT (Touvron et al., ICML 2021) and ViT (Dosovitskiy et al., ICLR 2021)."""

from collections.abc import Mapping
from math import isqrt
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from growkit.arch.spec import Architecture, Space, StateDict, conv, linear, norm, table
from growkit.errors import GrowkitError

BLOCK = "blocks.{l}"
ROWS = (
    *table("cls_token", None, None, "embed"),
    *table("reg_token", None, None, "embed"),
    *table("pos_embed", None, None, "embed"),
    *conv("patch_embed.proj", out="embed"),
    *norm(f"{BLOCK}.norm1", "embed", "norm1"),
    *linear(f"{BLOCK}.attn.qkv", out="attn", reads="embed", slots=("q", "k", "v")),
    *linear(f"{BLOCK}.attn.proj", out="embed", reads="attn", slots=("o",)),
    *norm(f"{BLOCK}.norm2", "embed", "norm2"),
    *linear(f"{BLOCK}.mlp.fc1", out="mlp", reads="embed", slots=("in",)),
    *linear(f"{BLOCK}.mlp.fc2", out="embed", reads="mlp", slots=("out",)),
    *norm("norm", "embed", "norm"),
    *norm("fc_norm", "embed", "norm"),  # instead of `norm` where the patches are pooled
    *linear("head", out=None, reads="embed", slots=("head",)),
)

# What a name is looked up by: (embed, depth, head size). The first is taken; `--from` names any other.
KNOWN = {
    (192, 12, 64): "deit_tiny_patch16_224",
    (384, 12, 64): "deit_small_patch16_224",
    (768, 12, 64): "deit_base_patch16_224",
    (1024, 24, 64): "vit_large_patch16_224",
    (1280, 32, 80): "vit_huge_patch14_224",
}
# Axes of the tensors whose shapes say what the network is.
AXES = {
    "patch_embed.proj.weight": 4,
    "blocks.0.attn.qkv.weight": 2,
    "blocks.0.mlp.fc1.weight": 2,
    "head.weight": 2,
    "pos_embed": 3,
    "reg_token": 3,
}
# The fields of a network that growing leaves alone: they come from the source.
INPUT_ARGUMENTS = (
    "img_size",
    "patch_size",
    "in_chans",
    "num_classes",
    "qkv_bias",
    "class_token",
    "no_embed_class",
    "reg_tokens",
    "global_pool",
)


def describe(model: VisionTransformer, name: str, arguments: Mapping[str, Any]) -> Architecture:
    """The table of a timm network (its parameters may be on the meta device).

    Raises:
        GrowkitError: parameters that the table does not cover; the message names them.
    """
    if not len(model.blocks):
        raise GrowkitError(f"{name} with depth 0 has no layers; set a depth of at least 1")
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    rows = tuple(row for row in ROWS if row.key.format(l=0) in shapes)
    covered = {row.key.format(l=layer) for row in rows for layer in range(len(model.blocks))}
    buffers = {key for key, _ in model.named_buffers()}
    if uncovered := sorted((set(shapes) | buffers) - covered):
        some = ", ".join(uncovered[:3])
        raise GrowkitError(f"{name} has {some}, which growkit's ViT table does not cover; choose a plain ViT or DeiT")
    attention = model.blocks[0].attn
    spaces = {
        "embed": Space(model.embed_dim),
        "attn": Space(attention.num_heads * attention.head_dim, group=attention.head_dim),
        "mlp": Space(model.blocks[0].mlp.fc1.out_features),
        "blocks": Space(len(model.blocks)),
    }
    return Architecture(name, dict(arguments), spaces, rows, shapes)


def input_arguments(model: VisionTransformer) -> dict[str, Any]:
    """The arguments of a VisionTransformer that growing leaves alone, as this network has them."""
    prefix = model.pos_embed is not None and model.pos_embed.shape[1] > model.patch_embed.num_patches
    return {
        "img_size": model.patch_embed.img_size[0],
        "patch_size": model.patch_embed.patch_size[0],
        "in_chans": model.in_chans,
        "num_classes": model.num_classes,
        "qkv_bias": model.blocks[0].attn.qkv.bias is not None,
        "class_token": model.has_class_token,
        "no_embed_class": not prefix and bool(model.num_prefix_tokens),
        "reg_tokens": model.num_reg_tokens,
        "global_pool": model.global_pool,
    }


def arguments_of(state: StateDict) -> dict[str, Any]:
    """Arguments of VisionTransformer read off a checkpoint's shapes; all but `num_heads`, which leaves no trace.

    Raises:
        GrowkitError: the tensors are not a plain ViT's, or belong to a variant that the table does not cover.
    """
    for token in ("dist_token", "head_dist.weight"):
        if token in state:
            raise GrowkitError(f"the weights hold {token}: a distilled DeiT; use the plain model of the same size")
    needed = (
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.mlp.fc1.weight",
        "head.weight",
    )
    if missing := [key for key in needed if key not in state]:
        raise GrowkitError(f"no ViT or DeiT: the weights lack {', '.join(missing)}")
    for key, axes in AXES.items():
        if key in state and (state[key].ndim != axes or not state[key].numel()):
            raise GrowkitError(f"no ViT or DeiT: {key} has shape {tuple(state[key].shape)}, expected {axes} axes")
    embed, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    mlp = state["blocks.0.mlp.fc1.weight"].shape[0]
    class_token = "cls_token" in state
    reg_tokens = state["reg_token"].shape[1] if "reg_token" in state else 0
    found: dict[str, Any] = {
        "embed_dim": embed,
        "depth": depth,
        "mlp_ratio": mlp / embed,
        "in_chans": in_chans,
        "patch_size": patch,
        "num_classes": state["head.weight"].shape[0],
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "class_token": class_token,
        "reg_tokens": reg_tokens,
        "global_pool": "avg" if "fc_norm.weight" in state or not class_token else "token",
    }
    if "pos_embed" in state:
        tokens = state["pos_embed"].shape[1]
        prefix = int(class_token) + reg_tokens
        grid = isqrt(max(0, tokens - prefix))
        found["no_embed_class"] = bool(prefix) and grid**2 != tokens - prefix and isqrt(tokens) ** 2 == tokens
        if found["no_embed_class"]:
            grid = isqrt(tokens)
        found["img_size"] = grid * patch
    return found
