"""What a checkpoint is, read off the names and shapes of its tensors, and what they do not show."""

from math import isqrt
from typing import Any

from growkit.arch.spec import StateDict
from growkit.arch.vit import POOL, ratio
from growkit.errors import GROWS, GrowkitError

# Names by (embed, depth); `--from` names any other.
KNOWN = {
    (192, 12): "deit_tiny_patch16_224",
    (384, 12): "deit_small_patch16_224",
    (768, 12): "deit_base_patch16_224",
    (1024, 24): "vit_large_patch16_224",
    (1280, 32): "vit_huge_patch14_224",
}
# Axes of the tensors whose shapes say what the network is.
AXES = {
    "patch_embed.proj.weight": 4,
    "blocks.0.mlp.fc1.weight": 2,
    "blocks.0.mlp.fc1_x.weight": 2,
    "blocks.0.mlp.fc2.weight": 2,
    "head.weight": 2,
    "head.bias": 1,
    "pos_embed": 3,
    "reg_token": 3,
}
# Tensors of networks whose norms and activations their shapes do not show, and a name that has them.
TELLTALES = {
    "norm_pre.weight": ("a CLIP-like ViT", "vit_base_patch16_clip_224"),
    f"{POOL}.latent": ("a SigLIP-like ViT", "vit_base_patch16_siglip_224"),
    "patch_embed.norm.weight": ("an AIMv2-like ViT", "aimv2_large_patch14_224"),
    "blocks.0.mlp.fc1_g.weight": ("a ViT with SwiGLU", "aimv2_large_patch14_224"),
    "blocks.0.mlp.norm.weight": ("a BEiT-3-like ViT", "beit3_base_patch16_224"),
}
# Tensors of other families, so that they are refused by name. Checked in this order.
FAMILIES = {
    "relative_position_bias_table": "a Swin Transformer or BEiT",
    "dwconv": "a ConvNeXt or a pyramid ViT",
    "conv_dw": "a ConvNeXt",
    "attention.self.query": "a BERT",
    "attention.attention.query": "a Hugging Face ViT, in other names than timm's",
    "attn.c_attn": "a GPT-2",
    "rope": "an EVA or another ViT with rotary embeddings",
    "attn.q_bias": "an EVA or BEiT",
    ".attn.q_proj": "an EVA",
    "self_attn": "a transformer of torch's or Hugging Face's",
    "encoder.layers.": "a torchvision ViT, in other names than timm's",
    "layer1.0.conv1": "a ResNet",
}
LAYER_SCALE = 1e-5  # timm's initial value, for the argument that describes a checkpoint's layer scale


def arguments_of(state: StateDict) -> dict[str, Any]:
    """Read the arguments of VisionTransformer off a checkpoint's shapes; all but `num_heads`, which leaves no trace.

    Raises:
        GrowkitError: the tensors are not a timm ViT's; the message names the family where it is known.
    """
    family = next((name for mark, name in FAMILIES.items() if any(mark in key for key in state)), None)
    if family:
        raise GrowkitError(f"these are the weights of {family}; {GROWS}")
    needed = ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc2.weight")
    if missing := [key for key in needed if key not in state]:
        raise GrowkitError(f"no ViT or DeiT: the weights lack {', '.join(missing)}")
    for key, axes in AXES.items():
        if key in state and (state[key].ndim != axes or not state[key].numel()):
            raise GrowkitError(f"no ViT or DeiT: {key} has shape {tuple(state[key].shape)}, expected {axes} axes")
    embed, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    # for a SwiGLU in one tensor, timm's ratio counts both halves
    wide = "blocks.0.mlp.fc1.weight" if "blocks.0.mlp.fc1.weight" in state else "blocks.0.mlp.fc1_x.weight"
    # found by either of its tensors: a missing one is named when the weights are checked against the architecture
    modules, head = {key.partition(".")[0] for key in state}, state.get("head.weight", state.get("head.bias"))
    class_token, pooled = "cls_token" in state, "fc_norm" in modules
    reg_tokens = state["reg_token"].shape[1] if "reg_token" in state else 0
    found: dict[str, Any] = {
        "embed_dim": embed,
        "depth": depth,
        "mlp_ratio": ratio(state[wide].shape[0] if wide in state else 4 * embed, embed),
        "in_chans": in_chans,
        "patch_size": patch,
        "num_classes": 0 if head is None else head.shape[0],
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "proj_bias": "blocks.0.attn.proj.bias" in state,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "scale_attn_norm": "blocks.0.attn.norm.weight" in state,
        "scale_mlp_norm": "blocks.0.mlp.norm.weight" in state,
        "init_values": LAYER_SCALE if "blocks.0.ls1.gamma" in state else None,
        "class_token": class_token,
        "pos_embed": "learn" if "pos_embed" in state else "none",
        "reg_tokens": reg_tokens,
        "pre_norm": "norm_pre.weight" in state,
        "final_norm": pooled or "norm" in modules,
        "fc_norm": pooled,
        "global_pool": "map" if f"{POOL}.latent" in state else "avg" if pooled or not class_token else "token",
    }
    if "pos_embed" in state:
        tokens = state["pos_embed"].shape[1]
        prefix = int(class_token) + reg_tokens + ("dist_token" in state)
        grid = isqrt(max(0, tokens - prefix))
        found["no_embed_class"] = grid**2 != tokens - prefix and isqrt(tokens) ** 2 == tokens
        if found["no_embed_class"]:
            grid = isqrt(tokens)
        found["img_size"] = grid * patch
    return found


def telltale(state: StateDict) -> tuple[str, str, str] | None:
    """Return a tensor that marks a kind whose norms and activation the shapes do not show, the kind, and an example."""
    for key, (kind, name) in TELLTALES.items():
        if key in state:
            return key, kind, name
    if "blocks.0.norm1.bias" not in state:
        return "blocks.0.norm1 without a bias", "a ViT with RMSNorm", "aimv2_large_patch14_224"
    if "norm.weight" in state and "cls_token" not in state:
        return "norm without a cls_token", "a SigLIP-like ViT", "vit_base_patch16_siglip_gap_224"
    fc1, fc2 = (state.get(f"blocks.0.mlp.{layer}.weight") for layer in ("fc1", "fc2"))
    if fc1 is not None and fc2 is not None and fc1.shape[0] == 2 * fc2.shape[1]:
        return "blocks.0.mlp.fc1 twice as wide as fc2", "a ViT with SwiGLU", "vit_giant_patch14_dinov2"
    return None
