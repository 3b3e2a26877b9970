"""Attention as a single graph operator where the target has one: fewer nodes than explicit softmax."""

import copy

import torch
from timm.layers import Attention
from torch import Tensor, nn

from growkit.deploy.form import CONTRIB


def prepared(model: nn.Module, kind: str) -> nn.Module:
    """Return a CPU copy in eval mode whose attention exports as `kind`, one of form.ATTENTIONS.

    Attention that the operator cannot express (per-head norms in 'contrib', gates) keeps explicit softmax.
    """
    copied = copy.deepcopy(model).cpu().eval()
    for module in copied.modules():
        if hasattr(module, "fused_attn"):
            # explicit softmax gives fewer nodes than the exporter's decomposition of fused attention
            setattr(module, "fused_attn", False)  # noqa: B010  (a plain flag, not a submodule)
    if kind == "unfused":
        return copied
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is Attention and _has_place(child, kind):
                setattr(parent, name, {"standard": _Standard, "contrib": _Contrib}[kind](child))
    return copied


def _has_place(attention: Attention, kind: str) -> bool:
    return getattr(attention, "gate", None) is None and (kind == "standard" or not _has_head_norms(attention))


def _has_head_norms(attention: Attention) -> bool:
    return not all(isinstance(norm, nn.Identity) for norm in (attention.q_norm, attention.k_norm))


class _Standard(nn.Module):
    """timm's attention as ai.onnx Attention (opset 23), on (batch, tokens, width) without splitting heads."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        own = self.attention
        q, k, v = own.qkv(x).chunk(3, dim=-1)
        if _has_head_norms(own):
            q, k = (
                norm(t.unflatten(-1, (own.num_heads, -1))).flatten(-2) for norm, t in ((own.q_norm, q), (own.k_norm, k))
            )
        mixed = torch.onnx.ops.attention(
            q, k, v, q_num_heads=own.num_heads, kv_num_heads=own.num_heads, scale=own.scale
        )[0]
        return own.proj(own.norm(mixed))


class _Contrib(nn.Module):
    """timm's attention as com.microsoft Attention, which takes the packed q, k and v weights itself."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        own = self.attention
        bias = own.qkv.bias if own.qkv.bias is not None else x.new_zeros(own.qkv.out_features)
        mixed = torch.onnx.ops.symbolic(
            f"{CONTRIB}::Attention",
            (x, own.qkv.weight.t(), bias),
            {"num_heads": own.num_heads, "scale": own.scale},
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )
        return own.proj(own.norm(mixed))
