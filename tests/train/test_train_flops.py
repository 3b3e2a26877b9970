"""FLOPs of a step against a formula written out by hand, and a model left as it was."""

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from growkit.train.flops import count_step

WIDTH, DEPTH, PATCHES, IMAGES, CLASSES = 24, 2, 16, 3, 5


@pytest.fixture
def vit() -> nn.Module:
    """A timm ViT: 16 patches of 8x8 pixels and a class token, MLP four times as wide."""
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=3,
        num_classes=CLASSES,
        proj_drop_rate=0.1,
    )


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(IMAGES, 3, 32, 32), torch.arange(IMAGES) % CLASSES


def forward_macs() -> tuple[int, int]:
    """MACs of a forward pass: of the patch embedding, and of all else."""
    tokens = IMAGES * (PATCHES + 1)
    linear = tokens * (3 * WIDTH * WIDTH + WIDTH * WIDTH + 2 * 4 * WIDTH * WIDTH)
    attention = 2 * tokens * (PATCHES + 1) * WIDTH  # scores, and the sum of the values
    patches = IMAGES * PATCHES * WIDTH * 3 * 8 * 8
    return patches, DEPTH * (linear + attention) + IMAGES * WIDTH * CLASSES


def test_step_of_a_vit_costs_what_the_formula_says(vit: nn.Module) -> None:
    # Exact: both count products of matrices alone. Each has two gradients of its own size, but
    # the image needs none.
    patches, rest = forward_macs()
    cost = count_step(vit, batch(), cross_entropy)
    assert cost.flops_per_step == 2 * (2 * patches + 3 * rest)


def test_frozen_weights_cost_no_gradient(vit: nn.Module) -> None:
    whole = count_step(vit, batch(), cross_entropy).flops_per_step
    for name, parameter in vit.named_parameters():
        parameter.requires_grad_(name.startswith("head."))
    patches, rest = forward_macs()
    cost = count_step(vit, batch(), cross_entropy).flops_per_step
    assert cost == 2 * (patches + rest + IMAGES * WIDTH * CLASSES) < whole


def test_recomputation_under_checkpoint_is_counted() -> None:
    class Again(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    layers = [nn.Linear(4, 4), nn.Linear(4, 4)]
    x = torch.ones(2, 4, requires_grad=True), torch.zeros(2, dtype=torch.long)
    plain = count_step(nn.Sequential(*layers), x, cross_entropy).flops_per_step
    assert plain == 2 * 2 * 3 * 2 * 4 * 4
    # recomputing stops when the input of the last layer is there again
    assert count_step(Again(*layers), x, cross_entropy).flops_per_step == plain + 2 * 2 * 4 * 4


def test_counting_leaves_model_and_random_numbers_alone(vit: nn.Module) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), vit).eval()
    model[0].train()
    kept = torch.ones_like(vit.head.bias)
    vit.head.bias.grad = kept
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    inputs = batch()
    random = torch.get_rng_state()
    count_step(model, inputs, cross_entropy)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert vit.head.bias.grad is kept
    assert vit.head.weight.grad is None
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
