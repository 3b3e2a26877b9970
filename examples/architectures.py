"""Which of timm's networks grow, how exactly, and why the others do not: docs/architectures.md.

Every name of timm's registry is tried. Those that grow are built small, every parameter random, and grown in float64 by
LEMON and, where possible, by Mango at rank 1. A cell gives the larger of the two methods' differences between the grown
network's outputs and the source's, relative to the largest output.

python examples/architectures.py > docs/architectures.md
python examples/architectures.py deit3_base_patch16_224 vit_base_patch14_dinov2
"""

import argparse
import copy
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import timm
import torch
from torch import nn

from growkit.arch import build, find
from growkit.arch.spec import Architecture
from growkit.errors import GrowkitError
from growkit.grow import grow, lossless_gap
from growkit.methods import METHODS
from growkit.settings import GrowSettings

EXACT, NEARLY, TO_EPS = 1e-12, 1e-5, 1e-4
COVERED = "vision_transformer", "deit", "vision_transformer_hybrid"  # timm's files that make VisionTransformers
WHOLE, PART = "32 -> 96 wide, 2 -> 3 deep", "32 -> 48 wide, 2 -> 3 deep"
SIZES = {WHOLE: (96, 6, 3), PART: (48, 3, 3)}  # embed, heads, depth


@dataclass(frozen=True)
class Row:
    """One name's row of the table; `verdicts` by the sizes it was grown to."""

    name: str
    besides: str
    verdicts: dict[str, str]
    mango: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="print only these, one line each, without the page around them")
    names = parser.parse_args().names
    if names:
        print("\n".join(line_of(name) for name in names))
        return
    families: dict[str, list[str]] = defaultdict(list)
    for name in timm.list_models():
        families[timm.models.model_entrypoint(name).__module__.rpartition(".")[2]].append(name)
    ours = sorted(name for family in COVERED for name in families.pop(family))
    lines = [line_of(name) for name in ours]
    grows = sum("| no:" not in line for line in lines)
    print(
        f"""# Which networks grow

Made by `python examples/architectures.py > docs/architectures.md` with timm {timm.__version__}; a test checks it
against the code. {grows} of timm's {len(ours)} `VisionTransformer` names grow.

Each was built small, every parameter random, and grown in float64 by LEMON and, where possible, by Mango at rank 1. A
cell gives the larger of the two differences between the grown network's outputs and the source's, relative to the
largest output:

* **exact**: 1e-12 at most;
* **to eps**: exact except for the eps of the norms, which stays timm's so that the file stays timm's;
* **nearly**: exact except for a millionth of the variance that a norm before the blocks sees
  (`methods/carried_mean.py`);
* **off by**: the function is not kept, and `growkit grow` says so: a norm inside a layer sees whole copies only at
  whole multiples, of the MLP's width too.

A network without a head outputs features: the first of the grown ones are the source's. Mango cuts the MLP into blocks
as wide as attention, so it needs a whole MLP ratio, `--set mlp_ratio=N`; every other method takes any.

| name | besides a plain ViT | {WHOLE} | {PART} | Mango |
|---|---|---|---|---|"""
    )
    print("\n".join(lines))
    print("\nRefused by name, one of each family tried:\n\n| timm's file | names | what is said |\n|---|---|---|")
    for family, members in sorted(families.items()):
        print(f"| {family} | {len(members)} | {refusal(members[0])} |")


def line_of(name: str) -> str:
    """A name's line of the table; for one that does not grow, the reason after 'no:'."""
    try:
        row = tried(name)
    except GrowkitError as error:
        return f"| {name} | no: {said(error, name)} | | | |"
    return f"| {row.name} | {row.besides} | {row.verdicts[WHOLE]} | {row.verdicts[PART]} | {row.mango} |"


def tried(name: str) -> Row:
    """Build a name small, grow it both ways, and compare outputs.

    Raises:
        GrowkitError: the name does not grow.
    """
    published = build(name, {}, device="meta")
    find(name)
    side = 2 * published.patch_embed.patch_size[0]
    small = {"img_size": side, "embed_dim": 32, "num_heads": 2, "depth": 2}
    source = find(name, small)
    model = randomised(source)
    verdicts, mango = {}, "yes"
    for label, (embed, heads, depth) in SIZES.items():
        target = find(name, {**small, "embed_dim": embed, "num_heads": heads, "depth": depth})
        gaps = []
        for method in ("lemon", "mango"):
            settings = GrowSettings(method=method, rank=1)
            if reason := METHODS[method].cannot(source, target, settings):
                mango = "not at its MLP ratio" if "mlp" in reason else f"no: {reason}"
                continue
            gaps.append(gap(source, target, model, settings))
        verdicts[label] = verdict(gaps)
    return Row(name, besides(source), verdicts, mango)


def randomised(architecture: Architecture) -> nn.Module:
    """The small network in float64 with every parameter random; norm gains are drawn around one."""
    model = build(architecture.name, architecture.arguments).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            gain = "norm" in key and key.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if gain else 0.2 * noise)
    return model


def gap(source: Architecture, target: Architecture, model: nn.Module, settings: GrowSettings) -> tuple[float, float]:
    """Largest difference of outputs relative to the largest output: as grown, and with a negligible eps."""
    grown = grow(source, target, model.state_dict(), settings).materialize()
    shares = []
    for eps in (None, 1e-24):
        pair = [with_eps(network, eps) for network in (model, grown)]
        image = torch.randn(4, 3, *pair[0].patch_embed.img_size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            largest = pair[0](image.double()).abs().max()
        shares.append(lossless_gap(pair[0], pair[1], seed=1) / float(largest))
    return shares[0], shares[1]


def with_eps(model: nn.Module, eps: float | None) -> nn.Module:
    """A copy of the network with this eps in all its norms; the network itself if `eps` is None."""
    if eps is None:
        return model
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if hasattr(module, "eps"):
            module.eps = eps
    return copied


def verdict(gaps: Iterable[tuple[float, float]]) -> str:
    """The worse method's gap, in words."""
    as_grown, without_eps = map(max, zip(*gaps, strict=True))
    if as_grown <= EXACT:
        return "exact"
    if as_grown <= TO_EPS and without_eps <= NEARLY:
        return f"{'to eps' if without_eps <= EXACT else 'nearly'}, {as_grown:.0e}"
    return f"off by {as_grown:.0e}"


def besides(architecture: Architecture) -> str:
    """The parts that a network has and a plain ViT lacks, or the other way round."""
    kind, shapes = architecture.kind, architecture.shapes
    registers = shapes["reg_token"][1] if "reg_token" in shapes else 0
    pooling = {"token": "", "map": "attention pooling", "avg": "mean of the patches"}
    words = (
        ("distillation token", architecture.has("dist_token")),
        (f"{registers} register token{'s' * (registers > 1)}", registers),
        ("no class token", "cls_token" not in shapes),
        (pooling.get(kind["pooling"], f"{kind['pooling']} pooling"), kind["pooling"] != "token"),
        ("layer scale", architecture.has("scale1")),
        ("norm before the blocks", architecture.has("norm_pre")),
        ("norm on the patches", architecture.has("norm_patch")),
        ("norms inside the layers", architecture.has("norm_attn") or architecture.has("norm_mlp")),
        ("qk-norm", architecture.has("norm_q")),
        ("RMSNorm", not architecture.centred),
        ("SwiGLU", architecture.has("gate")),
        (kind["activation"], kind["activation"] not in ("GELU", "SiLU")),
        ("no qkv bias", not any("q.bias" in row.slots for row in architecture.tensors)),
        ("no last norm", not architecture.has("norm")),
        ("no head", not architecture.classes),
    )
    return ", ".join(word for word, there in words if there) or "nothing"


def refusal(name: str) -> str:
    """growkit's reason why a name does not grow."""
    try:
        find(name)
    except GrowkitError as error:
        return said(error, name)
    return "grows"


def said(error: GrowkitError, name: str) -> str:
    """An error's message without the parts that are the same for every name."""
    return str(error).removeprefix(f"{name} ").partition(";")[0].partition(", which growkit")[0]


if __name__ == "__main__":
    main()
