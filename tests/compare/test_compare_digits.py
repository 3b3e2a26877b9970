"""The harness on digits: growth gets there in fewer steps. A check that it works, not a claim of how much it saves."""

from dataclasses import replace

import pytest
import torch
from compare_samples import RECIPE, options

from growkit.arch import find_target
from growkit.compare.compare import compare_methods
from growkit.compare.savings import flops_to
from growkit.fitting import train_model
from growkit.grow import grow
from growkit.job import Job
from growkit.record import RunFolder
from growkit.settings import GrowSettings
from growkit.source import load_source

TARGET = ("embed_dim=64", "depth=2", "num_heads=4")
INPUT = ("img_size=8", "patch_size=4", "in_chans=1")


@pytest.mark.slow  # trains 25 small models
def test_grown_models_reach_the_target_loss_in_fewer_steps_in_four_of_five_seeds(digits, tmp_path):
    recipe = replace(RECIPE, epochs=2, lr=3e-3)
    job, small = Job(RunFolder(tmp_path), "cpu"), (*INPUT, "embed_dim=32", "depth=2", "num_heads=2")
    trained = train_model(job, "deit_tiny", digits, replace(recipe, epochs=3), sets=small)
    source = load_source(str(trained.folder))
    compared = compare_methods(
        job,
        source,
        "deit_tiny",
        digits,
        options(
            methods="mango,ligo,lemon,bert2bert:variant=aki",
            seeds=5,
            share=1.0,
            lrs="3e-3",
            metric="loss",
            operator_steps=10,
            evals=6,
        ),
        recipe,
        sets=TARGET,
    )
    runs = compared.content["runs"]
    scratch = {run["seed"]: run for run in runs if run["arm"] == "from scratch"}
    source_top1 = compared.content["source_score"]["top1"]
    target = find_target(source.architecture, "deit_tiny", TARGET)[0]
    for method in ("mango", "ligo"):
        operator = grow(source.architecture, target, source.state, GrowSettings(method=method))
        operator(torch.randn(4, 1, 8, 8)).square().mean().backward()
        assert all(parameter.grad.any() for parameter in operator.parameters()), method
    for name in ("mango", "ligo", "lemon", "bert2bert:variant=aki"):
        ahead = 0
        for run in (run for run in runs if run["arm"] == name):
            alone = scratch[run["seed"]]
            target = alone["final"]["loss"]
            steps = {
                who["arm"]: flops_to([(at, loss) for at, _, loss in who["curve"]], target, higher=False)
                for who in (run, alone)
            }
            ahead += steps[name] is not None and steps[name] < steps["from scratch"]
            if name in ("mango", "lemon"):  # which claim to lose nothing
                assert run["step0"]["top1"] == pytest.approx(source_top1)
        assert ahead >= 4, name
