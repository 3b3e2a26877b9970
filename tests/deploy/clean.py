"""Clean exports, architectures x forms: the gate must pass every one. A precision is one more form."""

from dataclasses import dataclass, replace
from typing import Any

from growkit.deploy.form import Form

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vit": {},
    "deit": {"name": "deit_tiny_patch16_224"},
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
    "layer scale": {"name": "deit3_small_patch16_224"},
    "register tokens": {"reg_tokens": 4},
    "norms of q and k": {"qk_norm": True},
    "average pooling": {"class_token": False, "global_pool": "avg"},
    "attention pooling": {"class_token": False, "global_pool": "map"},
    "norm before the blocks": {"pre_norm": True},
    "class token without position": {"no_embed_class": True},
    "no bias of q, k, v": {"qkv_bias": False},
    "one channel": {"in_chans": 1},
    "four channels": {"in_chans": 4},
    "small patches": {"patch_size": 4},
    "one patch": {"patch_size": 16},
    "wide image": {"img_size": (16, 24)},
    "one head": {"num_heads": 1},
    "eight heads": {"num_heads": 8},
    "one block": {"depth": 1},
    "three blocks": {"depth": 3},
    "square MLP": {"mlp_ratio": 1.0},
    "odd width": {"embed_dim": 33, "num_heads": 3},
    "two classes": {"num_classes": 2},
    "one class": {"num_classes": 1},
    "thirty-three classes": {"num_classes": 33},
}

KIN: dict[str, dict[str, Any]] = {
    "highest of the patches": {"global_pool": "max"},
    "norms inside": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "no last norm": {"final_norm": False},
    "quick GELU": {"name": "vit_base_patch16_clip_quickgelu_224"},
    "features": {"num_classes": 0},
    "SwiGLU in one tensor": {"name": "vit_giant_patch14_dinov2", "mlp_ratio": 4.0},
    "RMSNorm": {"name": "test_vit4"},
    "SwiGLU": {"name": "aimv2_large_patch14_224", "mlp_ratio": 2.0},
}
NO_SCRIPT = ("RMSNorm", "SwiGLU")  # torchscript's exporter has no words for an RMSNorm
FEW = ("vit", "two classes", "one class")  # few logits are the noisiest

SCRIPT = {
    "any batch": Form(exporter="torchscript"),
    "batch 1, ort-1.18": Form(exporter="torchscript", batch=1, target="ort-1.18"),
    "batch 3": Form(exporter="torchscript", batch=3),
    "probabilities": Form(exporter="torchscript", output="probabilities"),
    "top-1": Form(exporter="torchscript", output="top-1", target="ort-1.18"),
    "weights beside it": Form(exporter="torchscript", target="ort-1.18"),
    "pixels": Form(exporter="torchscript", pixels=True),
    "pixels, batch 2, top-1, weights beside it": Form(exporter="torchscript", pixels=True, batch=2, output="top-1"),
}
DYNAMO = {
    "dynamo": Form(),
    "dynamo, standard attention": Form(target="ort-1.23", attention="standard"),
    "dynamo, fused attention": Form(attention="contrib"),
    "dynamo, ort-1.18, batch 1": Form(target="ort-1.18", batch=1),
    "dynamo, ort-1.23, batch 5": Form(target="ort-1.23", batch=5),
    "dynamo, pixels, top-1": Form(pixels=True, output="top-1"),
}
LOW = {
    f"{precision}, {kind}": replace(form, precision=precision)
    for kind, form in {
        "any batch": Form(exporter="torchscript"),
        "batch 1": Form(exporter="torchscript", batch=1),
        "batch 3, ort-1.18": Form(exporter="torchscript", batch=3, target="ort-1.18"),
        "pixels, top-1": Form(exporter="torchscript", pixels=True, output="top-1"),
        "probabilities, weights beside it": Form(exporter="torchscript", output="probabilities"),
    }.items()
    for precision in ("fp16", "bf16", "int8", "int8-static")
}
LOW_DYNAMO = {
    "dynamo, fp16": Form(precision="fp16", target="ort-1.18"),
    "dynamo, bf16": Form(precision="bf16"),
    "dynamo, int8": Form(precision="int8"),
    "dynamo, int8-static": Form(precision="int8-static"),
    "dynamo, fp16, standard attention": Form(precision="fp16", target="ort-1.23", attention="standard"),
    "dynamo, bf16, standard attention": Form(precision="bf16", target="ort-1.23", attention="standard"),
    "dynamo, int8, standard attention": Form(precision="int8", target="ort-1.23", attention="standard"),
}


@dataclass(frozen=True)
class Clean:
    """One export; the fast ones run with every change."""

    architecture: str
    form: Form
    external: bool
    seed: int
    fast: bool


def _table() -> dict[str, Clean]:
    table = {}

    def add(architecture: str, forms: dict[str, Form], index: int, *, fast: bool) -> None:
        kind = list(forms)[index % len(forms)]
        form = forms[kind]
        if form.pixels and architecture in ("wide image", "four channels"):  # a centre crop is square, RGBA is blended
            return
        if form.attention == "contrib" and architecture == "norms of q and k":  # the operator has no place for them
            return
        if architecture == "one class":  # of which there is no probability
            form = replace(form, output="logits")
        name = f"{architecture}: {kind}"
        table[name] = Clean(architecture, form, "beside" in kind, len(table), fast)

    for index, architecture in enumerate(ARCHITECTURES):
        add(architecture, SCRIPT, index, fast=True)
        add(architecture, SCRIPT, index + 3, fast=False)
        add(architecture, DYNAMO, index, fast=False)
        add(architecture, DYNAMO, index + 1, fast=False)
    for index, architecture in enumerate(ARCHITECTURES):
        for step in range(4):  # every precision, each in another form
            add(architecture, LOW, 5 * index + 5 * step, fast=architecture in FEW)
        add(architecture, LOW_DYNAMO, index, fast=False)
    for index, architecture in enumerate(KIN):
        if architecture not in NO_SCRIPT:
            add(architecture, SCRIPT, index, fast=True)
            add(architecture, LOW, index, fast=False)
        add(architecture, DYNAMO, index, fast=architecture in NO_SCRIPT)
        add(architecture, DYNAMO, index + 3, fast=False)
        add(architecture, LOW_DYNAMO, index, fast=False)
        add(architecture, LOW_DYNAMO, index + 3, fast=False)
    return table


CLEAN = _table()
