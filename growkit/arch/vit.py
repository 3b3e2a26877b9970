"""timm's VisionTransformer: DeiT (Touvron et al., ICML 2021), ViT (Dosovitskiy et al., ICLR 2021) and their kin.

DeiT III, distilled DeiT, CLIP, SigLIP, DINOv2, AIMv2, BEiT-3: one table, of which a network has the rows whose tensors
it has. Other designs (parallel blocks, norms after the branch, a convolutional stem) are refused by name.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from timm.layers import Attention, AttentionPoolLatent, GluMlp, LayerScale, Mlp, PatchEmbed, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from growkit.arch.spec import Architecture, Space, TensorSpec, conv, linear, norm, table
from growkit.errors import GROWS, GrowkitError

BLOCK = "blocks.{l}"
POOL = "attn_pool"
ROWS = (
    *table("cls_token", None, None, "embed"),
    *table("dist_token", None, None, "embed"),
    *table("reg_token", None, None, "embed"),
    *table("pos_embed", None, None, "embed"),
    *conv("patch_embed.proj", out="embed"),
    *norm("patch_embed.norm", "embed", "norm_patch"),
    *norm("norm_pre", "embed", "norm_pre"),
    *norm(f"{BLOCK}.norm1", "embed", "norm1"),
    *linear(f"{BLOCK}.attn.qkv", out="attn", reads="embed", slots=("q", "k", "v")),
    *norm(f"{BLOCK}.attn.q_norm", None, "norm_q"),  # inside a head, whose size stays
    *norm(f"{BLOCK}.attn.k_norm", None, "norm_k"),
    *norm(f"{BLOCK}.attn.norm", "attn", "norm_attn"),
    *linear(f"{BLOCK}.attn.proj", out="embed", reads="attn", slots=("o",)),
    *table(f"{BLOCK}.ls1.gamma", "embed", slot="scale1.gamma"),
    *norm(f"{BLOCK}.norm2", "embed", "norm2"),
    *linear(f"{BLOCK}.mlp.fc1", out="mlp", reads="embed", slots=("in",)),
    *linear(f"{BLOCK}.mlp.fc1_g", out="mlp", reads="embed", slots=("gate",)),
    *linear(f"{BLOCK}.mlp.fc1_x", out="mlp", reads="embed", slots=("in",)),
    *norm(f"{BLOCK}.mlp.norm", "mlp", "norm_mlp"),
    *linear(f"{BLOCK}.mlp.fc2", out="embed", reads="mlp", slots=("out",)),
    *table(f"{BLOCK}.ls2.gamma", "embed", slot="scale2.gamma"),
    *norm("norm", "embed", "norm"),
    *norm("fc_norm", "embed", "norm"),  # instead of `norm` where the patches are pooled
    # A latent that attends to the tokens, with an MLP behind it: SigLIP's pooling.
    *table(f"{POOL}.latent", None, None, "embed"),
    *linear(f"{POOL}.q", out="pool_attn", reads="embed", slots=("pool_q",), raw=True),
    *linear(f"{POOL}.kv", out="pool_attn", reads="embed", slots=("pool_k", "pool_v")),
    *linear(f"{POOL}.proj", out="embed", reads="pool_attn", slots=("pool_o",)),
    *norm(f"{POOL}.norm", "embed", "norm_pool"),
    *linear(f"{POOL}.mlp.fc1", out="pool_mlp", reads="embed", slots=("pool_in",)),
    *linear(f"{POOL}.mlp.fc2", out="embed", reads="pool_mlp", slots=("pool_out",)),
    *linear("head", out=None, reads="embed", slots=("head",)),
    *linear("head_dist", out=None, reads="embed", slots=("head_dist",)),
)

# The fields of a network that growing leaves alone: they come from the source.
INPUT_ARGUMENTS = (
    "img_size",
    "patch_size",
    "in_chans",
    "num_classes",
    "qkv_bias",
    "proj_bias",
    "qk_norm",
    "scale_attn_norm",
    "scale_mlp_norm",
    "init_values",
    "class_token",
    "pos_embed",
    "no_embed_class",
    "reg_tokens",
    "pre_norm",
    "final_norm",
    "fc_norm",
    "global_pool",
    "pool_include_prefix",
    "dynamic_img_size",
    "dynamic_img_pad",
)


def describe(model: VisionTransformer, name: str, arguments: Mapping[str, Any]) -> Architecture:
    """The table of a timm network (its parameters may be on the meta device).

    Raises:
        GrowkitError: parameters or parts that the table does not cover; the message names them.
    """
    if not len(model.blocks):
        raise GrowkitError(f"{name} with depth 0 has no layers; set a depth of at least 1")
    if part := _foreign_part(model):
        raise GrowkitError(f"{name} has {part}, which growkit's ViT table does not cover; {GROWS}")
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    rows = tuple(_as_in(model, row) for row in ROWS if row.key.format(l=0) in shapes)
    covered = {row.key.format(l=layer) for row in rows for layer in range(len(model.blocks))}
    buffers = {key for key, _ in model.named_buffers()}
    if uncovered := sorted((set(shapes) | buffers) - covered):
        some = ", ".join(uncovered[:3])
        raise GrowkitError(f"{name} has {some}, which growkit's ViT table does not cover; {GROWS}")
    attention, pool = model.blocks[0].attn, model.attn_pool
    spaces = {
        "embed": Space(model.embed_dim),
        "attn": Space(attention.num_heads * attention.head_dim, group=attention.head_dim),
        "mlp": Space(model.blocks[0].mlp.fc2.in_features),
        "blocks": Space(len(model.blocks)),
    }
    if pool is not None:
        spaces["pool_attn"] = Space(pool.num_heads * pool.head_dim, group=pool.head_dim)
        spaces["pool_mlp"] = Space(pool.mlp.fc2.in_features)
    return Architecture(name, dict(arguments), spaces, rows, shapes, _kind(model))


def _foreign_part(model: VisionTransformer) -> str | None:
    """Name the first part that the table does not describe: parts of another class may have the same tensor names."""
    block = model.blocks[0]
    for part, words, known in (
        (model.patch_embed, "a stem of its own", (PatchEmbed,)),
        (block, "blocks of its own", (Block,)),
        (getattr(block, "attn", None), "attention of its own", (Attention,)),
        (getattr(block, "mlp", None), "an MLP of its own", (Mlp, GluMlp, SwiGLU)),
        (model.attn_pool, "pooling of its own", (AttentionPoolLatent, type(None))),
    ):
        if type(part) not in known:
            return f"{words} ({type(part).__name__})"
    return None


def _as_in(model: VisionTransformer, row: TensorSpec) -> TensorSpec:
    """Adapt a row to this network: SwiGLU's two halves in one tensor, a head without a norm before it."""
    mlp = model.blocks[0].mlp
    if isinstance(mlp, GluMlp) and row.slots[0].startswith("in."):
        kind = row.slots[0].removeprefix("in.")
        halves = (f"in.{kind}", f"gate.{kind}") if mlp.gate_last else (f"gate.{kind}", f"in.{kind}")
        return replace(row, slots=halves)
    unnormed = isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity)
    pooled = model.attn_pool is not None
    raw = {"head.weight": unnormed or pooled, "head_dist.weight": unnormed, f"{POOL}.kv.weight": unnormed}
    return replace(row, raw=True) if raw.get(row.key) else row


def _kind(model: VisionTransformer) -> dict[str, str]:
    """Describe, in words, what affects the network's function but leaves no trace in its weights."""
    norm_layer, activation = model.blocks[0].norm1, model.blocks[0].mlp.act
    curve = type(activation).__name__
    if getattr(activation, "approximate", "none") != "none":
        curve += f" ({activation.approximate})"
    return {
        "norm": f"{type(norm_layer).__name__} eps {getattr(norm_layer, 'eps', 0):g}",
        "activation": curve,
        "MLP": type(model.blocks[0].mlp).__name__,
        "pooling": model.global_pool,
        "heads": "two, distilled" if isinstance(model, VisionTransformerDistilled) else "one",
    }


def input_arguments(model: VisionTransformer) -> dict[str, Any]:
    """The arguments of a VisionTransformer that growing leaves alone, as this network has them."""
    block, positions = model.blocks[0], model.pos_embed
    prefix = positions is not None and positions.shape[1] > model.patch_embed.num_patches

    def there(module: nn.Module) -> bool:
        return not isinstance(module, nn.Identity)

    return {
        "img_size": model.patch_embed.img_size[0],
        "patch_size": model.patch_embed.patch_size[0],
        "in_chans": model.in_chans,
        "num_classes": model.num_classes,
        "qkv_bias": block.attn.qkv.bias is not None,
        "proj_bias": block.attn.proj.bias is not None,
        "qk_norm": there(block.attn.q_norm),
        "scale_attn_norm": there(block.attn.norm),
        "scale_mlp_norm": there(block.mlp.norm),
        "init_values": block.ls1.init_values if isinstance(block.ls1, LayerScale) else None,
        "class_token": model.has_class_token,
        "pos_embed": "learn" if positions is not None else "none",
        "no_embed_class": positions is not None and not prefix and bool(model.num_prefix_tokens),
        "reg_tokens": model.num_reg_tokens,
        "pre_norm": there(model.norm_pre),
        "final_norm": there(model.norm) or there(model.fc_norm),
        "fc_norm": there(model.fc_norm),
        "global_pool": model.global_pool,
        "pool_include_prefix": model.pool_include_prefix,
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": model.patch_embed.dynamic_img_pad,
    }


def grown_arguments(model: VisionTransformer) -> dict[str, Any]:
    """The arguments that growing changes, as this network has them."""
    mlp = model.blocks[0].mlp
    hidden = mlp.fc1_x.out_features if isinstance(mlp, SwiGLU) else mlp.fc1.out_features
    return {"embed_dim": model.embed_dim, "depth": len(model.blocks), "mlp_ratio": ratio(hidden, model.embed_dim)}


def ratio(hidden: int, embed: int) -> float:
    """The `mlp_ratio` that gives this many hidden units; timm rounds their product down."""
    exact = hidden / embed
    return exact if int(embed * exact) == hidden else (hidden + 0.5) / embed


def same_argument(key: str, one: Any, other: Any) -> bool:
    """Return whether two values of an argument describe the same network; a layer scale's start does not count."""
    return (one is None) == (other is None) if key == "init_values" else one == other
