"""What big targets need in memory and time, CALCULATED: nothing is trained and no GPU is touched.

    python examples/benchmarks/memory_table.py

Parameters and FLOPs are counted, FLOPs by torch over a whole update of the batch. Activations are what autograd keeps
from the forward to the backward pass, counted through its hooks for saved tensors on tensors without storage, with
attention's matrix never stored (flash attention) and, in bf16, under autocast. Seconds are FLOPs over a given
throughput, by default what an H200 reached on DeiT-S -> DeiT-B; the ring's contraction has two of its own,
in float32 and with --tf32. Not in the table: the buffers of kernels, of the allocator and of NCCL, and the
slices of the contraction.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy

from growkit.arch import build, find, find_target
from growkit.arch.spec import Architecture
from growkit.grow import GrownModel, make_method
from growkit.plan import step_flops
from growkit.record import versions
from growkit.settings import GrowSettings

RANKS = (1, 4)
# Source, target, and the target's settings: growkit keeps head size, so all heads are 64 wide, and Mango cuts the MLP
# into blocks of the width, so its ratio is whole. timm's ViT-H has 80-wide heads, its ViT-g 88 and a ratio of 4.36.
PAIRS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("vit_base_patch16_224", "vit_large_patch16_224", ()),
    ("vit_large_patch14_224", "vit_huge_patch14_224", ("num_heads=20",)),
    ("vit_large_patch14_224", "vit_giant_patch14_224", ("num_heads=22", "mlp_ratio=4")),
)


def main() -> None:
    """Calculate, print tables in Markdown, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=256, help="images of an update")
    parser.add_argument("--tflops", type=float, default=290, help="TFLOP/s of the network, in bf16")
    parser.add_argument("--fp32-tflops", type=float, default=39, help="TFLOP/s of the contraction, in float32")
    parser.add_argument("--tf32-tflops", type=float, default=320, help="TFLOP/s of the contraction with --tf32")
    parser.add_argument("--pairs", help="only targets whose name holds this")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    found = [calculate(*pair, options) for pair in PAIRS if (options.pairs or "") in pair[1]]
    print("Calculated, not measured. GB is 1e9 bytes.\n")
    columns = (
        *("target", "from", "parameters, M", "weights, GB", "weights + gradients + AdamW, GB", "bf16 copies, GB"),
        *("activations per image, MB: float32", "bf16"),
    )
    table(columns, [memory_row(row) for row in found])
    columns = (
        *("target", "update", "trained, M", "held besides activations, GB", "TFLOP per update"),
        *("s per update", "with --tf32"),
    )
    ring = f"{options.fp32_tflops:g} in the ring's contraction, {options.tf32_tflops:g} with --tf32"
    print(f"\nBatch {options.batch_size}, one GPU, at {options.tflops:g} TFLOP/s in the network and {ring}.\n")
    table(columns, [line for row in found for line in update_rows(row)])
    if options.out:
        content = {"calculated": found, "options": {**vars(options), "out": None}, "versions": versions()}
        options.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def calculate(small: str, big: str, sets: tuple[str, ...], options: argparse.Namespace) -> dict[str, Any]:
    """Calculate all figures of one pair, in bytes, FLOPs and seconds."""
    source = find(small)
    target, _ = find_target(source, big, sets)
    kept = {name: [saved_bytes(target, images, name) for images in (1, 2)] for name in ("fp32", "bf16")}
    plain = step_flops(build(target.name, target.arguments, device="meta"), target, options.batch_size)
    parameters, before = (size(architecture) for architecture in (target, source))
    updates = [
        {
            "update": "fine-tuning",
            "trained": parameters,
            "held_bytes": 16 * parameters,
            "flops": plain,
            "seconds": plain / options.tflops / 1e12,
            "tf32_seconds": plain / options.tflops / 1e12,
        }
    ]
    state = build(source.name, source.arguments, device="meta").state_dict()
    for rank in RANKS:
        method = make_method(source, target, GrowSettings(rank=rank))
        grown = GrownModel(target, method, source.split(state)).to("meta")
        trained = sum(parameter.numel() for parameter in grown.parameters())
        flops = step_flops(grown, target, options.batch_size)
        contraction = flops - plain
        updates.append(
            {
                "update": f"operator, rank {rank}",
                "trained": trained,
                # the source's weights, the grown weights with gradients, the operator's with gradients and moments
                "held_bytes": 4 * before + 8 * parameters + 16 * trained,
                "flops": flops,
                "seconds": (plain / options.tflops + contraction / options.fp32_tflops) / 1e12,
                "tf32_seconds": (plain / options.tflops + contraction / options.tf32_tflops) / 1e12,
            }
        )
    return {
        "source": " ".join((small, *arguments_of(source))),
        "target": " ".join((big, *sets)),
        "parameters": parameters,
        "activation_bytes_per_image": {name: two - one for name, (one, two) in kept.items()},
        "bf16_copies_bytes": kept["bf16"][0] - (kept["bf16"][1] - kept["bf16"][0]),
        "updates": updates,
    }


def size(architecture: Architecture) -> int:
    return sum(torch.Size(shape).numel() for shape in architecture.shapes.values())


def arguments_of(architecture: Architecture) -> list[str]:
    return [f"{key}={value}" for key, value in architecture.arguments.items()]


def saved_bytes(architecture: Architecture, images: int, precision: str) -> int:
    """Bytes of the distinct tensors that autograd keeps for the backward pass, without the parameters."""
    model = build(architecture.name, architecture.arguments, device="meta").train()
    shape = (images, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    found: dict[int, int] = {}
    # Not the meta device: there attention stores its matrix. The CPU's fused kernel keeps what flash attention keeps.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu")
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                found[storage._cdata] = storage.nbytes()
            kept.append(tensor)  # alive until the end, so that no two share an address
            return tensor

        kept: list[Tensor] = []
        inputs, labels = torch.empty(shape), torch.zeros(images, dtype=torch.long)
        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"),
        ):
            cross_entropy(model(inputs), labels)
    return sum(found.values())


def memory_row(row: dict[str, Any]) -> list[str]:
    p, kept = row["parameters"], row["activation_bytes_per_image"]
    return [
        *(row["target"], row["source"], f"{p / 1e6:.1f}", f"{4 * p / 1e9:.2f}", f"{16 * p / 1e9:.2f}"),
        *(f"{row['bf16_copies_bytes'] / 1e9:.2f}", f"{kept['fp32'] / 1e6:.0f}", f"{kept['bf16'] / 1e6:.0f}"),
    ]


def update_rows(row: dict[str, Any]) -> list[list[str]]:
    return [
        [
            *(row["target"].partition(" ")[0], update["update"], f"{update['trained'] / 1e6:.1f}"),
            f"{update['held_bytes'] / 1e9:.2f}",
            *(f"{update['flops'] / 1e12:.1f}", f"{update['seconds']:.2f}", f"{update['tf32_seconds']:.2f}"),
        ]
        for update in row["updates"]
    ]


def table(columns: tuple[str, ...], rows: list[list[str]]) -> None:
    print(f"| {' | '.join(columns)} |")
    print("|---|---|" + "---:|" * (len(columns) - 2))
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
