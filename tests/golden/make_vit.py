"""Reference outputs of a small ViT in plain NumPy, float64: no torch, no timm, no growkit.

    python tests/golden/make_vit.py        # writes vit.json beside this file

Every parameter is random (NumPy's PCG64, seed 0), by timm's names. A grown model must answer like this source.
"""

import json
import math
from pathlib import Path

import numpy as np

EMBED, DEPTH, HEADS, MLP, PATCH, SIZE, CLASSES = 32, 2, 2, 128, 8, 16, 7
EPS = 1e-6
erf = np.vectorize(math.erf)


def shapes() -> dict[str, tuple[int, ...]]:
    """Checkpoint names and shapes."""
    tokens = (SIZE // PATCH) ** 2 + 1
    found = {
        "cls_token": (1, 1, EMBED),
        "pos_embed": (1, tokens, EMBED),
        "patch_embed.proj.weight": (EMBED, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (EMBED,),
    }
    for layer in range(DEPTH):
        block = f"blocks.{layer}"
        for name, out, into in (
            ("attn.qkv", 3 * EMBED, EMBED),
            ("attn.proj", EMBED, EMBED),
            ("mlp.fc1", MLP, EMBED),
            ("mlp.fc2", EMBED, MLP),
        ):
            found |= {f"{block}.{name}.weight": (out, into), f"{block}.{name}.bias": (out,)}
        for norm in ("norm1", "norm2"):
            found |= {f"{block}.{norm}.weight": (EMBED,), f"{block}.{norm}.bias": (EMBED,)}
    found |= {"norm.weight": (EMBED,), "norm.bias": (EMBED,)}
    return found | {"head.weight": (CLASSES, EMBED), "head.bias": (CLASSES,)}


def parameters() -> dict[str, np.ndarray]:
    """Every parameter random; gains around 1."""
    generator = np.random.default_rng(0)
    state = {}
    for name, shape in shapes().items():
        noise = generator.standard_normal(shape)
        gain = "norm" in name and name.endswith("weight")
        state[name] = 1 + 0.3 * noise if gain else (0.1 if len(shape) > 1 else 0.3) * noise
    return state


def images() -> np.ndarray:
    """(3, 3, 16, 16)."""
    return np.random.default_rng(1).standard_normal((3, 3, SIZE, SIZE))


def forward(state: dict[str, np.ndarray], pixels: np.ndarray) -> np.ndarray:
    """Logits (N, classes) of a pre-norm ViT (Dosovitskiy et al., ICLR 2021)."""

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS)
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    count, grid = len(pixels), SIZE // PATCH
    patches = pixels.reshape(count, 3, grid, PATCH, grid, PATCH).transpose(0, 2, 4, 1, 3, 5).reshape(count, grid**2, -1)
    x = patches @ state["patch_embed.proj.weight"].reshape(EMBED, -1).T + state["patch_embed.proj.bias"]
    token = np.broadcast_to(state["cls_token"], (count, 1, EMBED))
    x = np.concatenate([token, x], axis=1) + state["pos_embed"]
    for layer in range(DEPTH):
        block = f"blocks.{layer}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        q, k, v = qkv.reshape(count, -1, 3, HEADS, EMBED // HEADS).transpose(2, 0, 3, 1, 4)
        scores = q @ k.swapaxes(-1, -2) / math.sqrt(EMBED // HEADS)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (weights / weights.sum(-1, keepdims=True)) @ v
        x = x + linear(mixed.transpose(0, 2, 1, 3).reshape(count, -1, EMBED), f"{block}.attn.proj")
        hidden = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + erf(hidden / math.sqrt(2)))
        x = x + linear(hidden, f"{block}.mlp.fc2")
    return linear(norm(x, "norm")[:, 0], "head")


if __name__ == "__main__":
    logits = forward(parameters(), images())
    Path(__file__).with_name("vit.json").write_text(json.dumps({"logits": logits.tolist()}, indent=1) + "\n")
