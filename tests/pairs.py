"""Tiny source and target pairs, every parameter randomised, that the shared tests run on."""

import torch
from torch import nn

from growkit.arch import build, find
from growkit.arch.spec import Architecture


def tiny(
    embed: int, depth: int, heads: int, *, name: str = "vit_tiny_patch16_224", mlp_ratio: float = 4, **more: object
) -> Architecture:
    """A ViT for 16 x 16 images in four patches and 7 classes."""
    arguments = {"img_size": 16, "patch_size": 8, "num_classes": 7}
    sizes = {"embed_dim": embed, "depth": depth, "num_heads": heads, "mlp_ratio": mlp_ratio}
    return find(name, {**arguments, **sizes, **more})


def kin(*sizes: tuple[int, int, int], **more: object) -> tuple[Architecture, Architecture]:
    """A source and a target of one kind; sizes are (embed, depth, heads)."""
    source, target = (tiny(*size, **more) for size in sizes)
    return source, target


# name: (source, target), sizes are (embed, depth, heads)
PAIRS: dict[str, tuple[Architecture, Architecture]] = {
    "same": (tiny(32, 3, 2), tiny(32, 3, 2)),
    "twice as wide": (tiny(32, 3, 2), tiny(64, 3, 4)),
    "thrice as wide": (tiny(32, 2, 2), tiny(96, 2, 6)),
    "deeper": (tiny(32, 2, 2), tiny(32, 5, 2)),
    "wider and deeper": (tiny(32, 3, 2), tiny(64, 6, 4)),
    "half as wide again": (tiny(32, 3, 2), tiny(48, 3, 3)),
    "odd width and depth": (tiny(48, 4, 3), tiny(112, 7, 7)),
    "larger MLP ratio": (tiny(32, 2, 2, mlp_ratio=2), tiny(64, 2, 4, mlp_ratio=4)),
    "odd, larger MLP ratio": (tiny(32, 2, 2, mlp_ratio=2), tiny(48, 3, 3, mlp_ratio=3)),
    "pooled, no biases": (
        tiny(32, 2, 2, class_token=False, global_pool="avg", qkv_bias=False),
        tiny(64, 3, 4, class_token=False, global_pool="avg", qkv_bias=False),
    ),
    "twice as deep": (tiny(32, 2, 2), tiny(32, 4, 2)),
    "wider MLP alone": (tiny(32, 2, 2, mlp_ratio=2), tiny(32, 2, 2, mlp_ratio=4)),
    "register tokens": (tiny(32, 2, 2, reg_tokens=2), tiny(64, 2, 4, reg_tokens=2)),
    "distilled": kin((32, 2, 2), (48, 3, 3), name="deit_tiny_distilled_patch16_224"),
    "layer scale": kin((32, 2, 2), (64, 3, 4), init_values=1e-5),
    "layer scale, odd": kin((32, 2, 2), (48, 3, 3), init_values=1e-5, no_embed_class=True),
    "qk-norm": kin((32, 2, 2), (80, 3, 5), qk_norm=True),
    "pre-norm": kin((32, 2, 2), (64, 3, 4), pre_norm=True),
    "pre-norm, odd": kin((32, 2, 2), (48, 2, 3), pre_norm=True),
    "pooled by attention": kin((32, 2, 2), (64, 3, 4), name="vit_base_patch16_siglip_224"),
    "pooled by attention, odd": kin((32, 2, 2), (80, 2, 5), name="vit_base_patch16_siglip_224"),
    "highest of the patches, odd": kin((32, 2, 2), (48, 2, 3), global_pool="max"),
    "no last norm, odd": kin((32, 2, 2), (80, 3, 5), final_norm=False),
    "norms inside": kin((32, 2, 2), (64, 3, 4), scale_attn_norm=True, scale_mlp_norm=True),
    "norms inside, odd": kin((32, 2, 2), (48, 2, 3), scale_attn_norm=True, scale_mlp_norm=True),
    "norm inside, larger MLP ratio": (
        tiny(32, 2, 2, mlp_ratio=2, scale_mlp_norm=True),
        tiny(32, 2, 2, mlp_ratio=3, scale_mlp_norm=True),
    ),
    "RMSNorm": kin((32, 2, 2), (64, 3, 4), name="test_vit4"),
    "RMSNorm, odd": kin((32, 2, 2), (80, 3, 5), name="test_vit4", pre_norm=True, global_pool="max"),
    "SwiGLU, RMSNorm, no biases, odd": kin((32, 2, 2), (48, 3, 3), name="aimv2_large_patch14_224", mlp_ratio=2),
    "SwiGLU in one tensor": kin((32, 2, 2), (64, 3, 4), name="vit_giant_patch14_dinov2", mlp_ratio=2),
    "SwiGLU, no whole ratio": kin((32, 2, 2), (48, 3, 3), name="aimv2_large_patch14_224", mlp_ratio=2.75),
    "no head, no positions, odd": kin((32, 2, 2), (80, 3, 5), num_classes=0, pos_embed="none"),
}
# Where the width is a whole multiple, LayerNorm's eps does no harm and the start is exact.
# A norm before the blocks gets the mean of its new channels all but exactly.
NEARLY = ("pre-norm, odd",)
EXACT = tuple(name for name, (s, t) in PAIRS.items() if t.spaces["embed"].size % s.spaces["embed"].size == 0)


def randomised(architecture: Architecture, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The network with every parameter random: biases, norms, tokens and head too, which timm leaves at 0 or 1."""
    model = build(architecture.name, architecture.arguments, device="meta").to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            gain = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if gain else (0.1 if parameter.ndim > 1 else 0.3) * noise)
    return model.to(dtype).eval()


def published_scale(architecture: Architecture, *, seed: int = 0) -> nn.Module:
    """As `randomised`, at the scale of trained weights, so that float32 rounding is that of a real model."""
    model = build(architecture.name, architecture.arguments, device="meta").to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            gain = "norm" in name and name.endswith("weight")
            small = parameter.ndim > 1 and "embed" not in name and "token" not in name
            parameter.copy_((1 if gain else 0) + (0.02 if small else 0.3) * noise)
        if architecture.classes:
            model.head.weight.mul_(5)
    return model.eval()


def can_grow(method: str, variant: str | None, pair: str) -> bool:
    """Whether a method is made for a pair's sizes, said here once more, independently of the methods."""
    if method == "mango":
        return pair != "SwiGLU, no whole ratio"
    source, target = ({name: space.size for name, space in side.spaces.items()} for side in PAIRS[pair])
    same_width = all(source[name] == target[name] for name in ("embed", "attn", "mlp"))
    if variant == "solar" and target["blocks"] > 2 * source["blocks"]:
        return False
    if method in ("stackbert", "llama-pro"):
        return same_width
    if method == "hypercloning":
        whole = all(target[name] % source[name] == 0 for name in ("embed", "attn", "mlp"))
        return whole and source["blocks"] == target["blocks"]
    return True
