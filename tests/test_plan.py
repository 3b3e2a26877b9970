"""`growkit plan`: what it says without storage is what real models cost."""

import pytest
import timm
import torch
from pairs import PAIRS, published_scale, tiny
from torch.nn.functional import cross_entropy

from growkit.arch import build, find
from growkit.arch.spec import Architecture
from growkit.errors import GrowkitError
from growkit.grow import grow, lossless_gap
from growkit.plan import RANKS, Plan, plan_growth
from growkit.settings import GrowSettings
from growkit.source import Source
from growkit.train.flops import count_step
from growkit_cli.plan import _methods, _ranks

BATCH = 3
SMALL, LARGE = PAIRS["wider and deeper"]
SETS = ("embed_dim=64", "depth=6", "num_heads=4")


def source_of(architecture: Architecture) -> Source:
    model = published_scale(architecture)
    return Source("small.pth", architecture, dict(model.state_dict()), "", {}, None, None, ())


def cost(model: torch.nn.Module) -> int:
    """FLOPs of one update on real tensors."""
    images, labels = torch.randn(BATCH, 3, 16, 16), torch.tensor([0, 1, 2])
    return count_step(model, (images, labels), cross_entropy).flops_per_step


@pytest.fixture(scope="module")
def planned() -> Plan:
    return plan_growth(source_of(SMALL), "vit_tiny", SETS, batch_size=BATCH)


def test_flops_of_both_models_are_those_of_a_real_update(planned: Plan) -> None:
    small, large = (build(a.name, a.arguments) for a in (SMALL, LARGE))
    assert planned.flops_per_step == (cost(small), cost(large))
    assert planned.flops_per_step[0] < planned.flops_per_step[1]


def test_flops_of_every_rank_are_those_of_a_real_update_through_the_operator(planned: Plan) -> None:
    state = published_scale(SMALL).state_dict()
    for rank in planned.ranks:
        grown = grow(SMALL, LARGE, state, GrowSettings(rank=rank.rank))
        assert rank.flops_per_step == cost(grown), rank.rank
        assert rank.macs_per_step == rank.flops_per_step // 2
        assert rank.operator_parameters == sum(p.numel() for p in grown.method.parameters())


def test_bigger_rank_costs_more(planned: Plan) -> None:
    assert tuple(rank.rank for rank in planned.ranks) == RANKS
    for lower, higher in zip(planned.ranks, planned.ranks[1:], strict=False):
        assert lower.operator_parameters < higher.operator_parameters
        assert lower.flops_per_step < higher.flops_per_step
        assert lower.slice_bytes <= higher.slice_bytes
    assert planned.ranks[0].slice_bytes <= planned.ranks[-1].slice_bytes  # a share of the model at any rank
    assert planned.ranks[0].flops_per_step > planned.flops_per_step[1]


def test_tables_give_costs_as_multiples_of_what_the_plain_target_costs(planned: Plan) -> None:
    plain = cost(build(LARGE.name, LARGE.arguments))
    times = [rank.flops_per_step / plain for rank in planned.ranks]
    (mango,) = [row for row in _methods(planned) if row[0] == "mango"]  # at its default rank, the first
    assert mango[3] == f"{times[0]:.2f}"
    shown = [(row[4], row[6]) for row in _ranks(planned, steps=100)]
    assert shown == [(f"{one:.2f}", f"{100 * one:,.0f}") for one in times]


def test_parameters_are_those_timm_counts(planned: Plan) -> None:
    for architecture, said in zip((SMALL, LARGE), planned.parameters, strict=True):
        model = timm.create_model(architecture.name, **architecture.arguments)
        assert said == sum(p.numel() for p in model.parameters())


def test_parameters_of_published_models_are_those_timm_counts() -> None:
    with torch.device("meta"):
        expected = {
            name: sum(p.numel() for p in timm.create_model(name).parameters())
            for name in ("deit_tiny_patch16_224", "deit_base_patch16_224")
        }
    assert expected["deit_tiny_patch16_224"] == 5_717_416  # as published, 5.7 M
    for name, count in expected.items():
        assert sum(torch.Size(shape).numel() for shape in find(name).shapes.values()) == count


def test_sizes_are_those_of_both_architectures(planned: Plan) -> None:
    said = {size.name: (size.source, size.target) for size in planned.sizes}
    assert said == {"embed": (32, 64), "attn": (32, 64), "mlp": (128, 256), "blocks": (3, 6)}
    assert planned.target == "vit_tiny_patch16_224"


def test_start_of_a_whole_multiple_is_exact_at_every_rank(planned: Plan) -> None:
    small = published_scale(SMALL).eval()
    for rank in planned.ranks:
        grown = grow(SMALL, LARGE, small.state_dict(), GrowSettings(rank=rank.rank))
        assert lossless_gap(small, grown.materialize(), seed=0) == pytest.approx(rank.gap, abs=1e-6)
        assert rank.gap < 1e-5


def test_planning_changes_neither_the_source_nor_the_random_numbers() -> None:
    source = source_of(tiny(32, 1, 2))
    before = {name: tensor.clone() for name, tensor in source.state.items()}
    random = torch.random.get_rng_state()
    plan_growth(source, "vit_tiny", ("embed_dim=64", "depth=1", "num_heads=4"), batch_size=1)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert [name for name in before if not torch.equal(before[name], source.state[name])] == []


def test_target_that_would_shrink_is_refused() -> None:
    with pytest.raises(GrowkitError, match="would shrink"):
        plan_growth(source_of(LARGE), "vit_tiny", ("embed_dim=32", "depth=3", "num_heads=2"), batch_size=1)


def test_every_method_is_told_with_what_it_can(planned: Plan) -> None:
    told = {method.name: method for method in planned.methods}
    assert {name for name, method in told.items() if method.cannot} == {"hypercloning", "stackbert", "llama-pro"}
    assert {name for name, method in told.items() if method.lossless} == {"mango", "lemon"}
    state = published_scale(SMALL).state_dict()
    ligo = grow(SMALL, LARGE, state, GrowSettings(method="ligo"))
    assert told["ligo"].flops_per_step == cost(ligo)
    assert told["ligo"].operator_parameters == sum(p.numel() for p in ligo.method.parameters())
    assert told["lemon"].flops_per_step is None


def test_gated_mlp_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("growkit.plan.RANKS", (4,))
    source, target = PAIRS["SwiGLU in one tensor"]
    sets = [f"{name}={target.arguments[name]}" for name in ("embed_dim", "depth", "num_heads", "mlp_ratio")]
    planned = plan_growth(source_of(source), "vit_giant_patch14_dinov2", sets, batch_size=BATCH)
    grown = grow(source, target, source_of(source).state, GrowSettings(rank=4))
    (rank,) = planned.ranks
    assert rank.flops_per_step == cost(grown)


def test_plan_of_a_pair_that_mango_cannot_grow_tells_the_others() -> None:
    planned = plan_growth(
        source_of(tiny(32, 2, 2)), "vit_tiny", (*SETS[:1], "depth=2", "num_heads=4", "mlp_ratio=4.5"), batch_size=2
    )
    assert planned.ranks == ()
    told = {method.name: method for method in planned.methods}
    assert "multiple of embed" in told["mango"].cannot
    assert told["lemon"].lossless
