"""Settings name the option that no run can use, and load without torch."""

import ast
import dataclasses
import inspect
import itertools
import subprocess
import sys

import pytest

from growkit.errors import GrowkitError
from growkit.train import settings as module
from growkit.train.settings import FitSettings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("steps", 0),
        ("epochs", 0.0),
        ("lr", -1.0),
        ("warmup_epochs", -1.0),
        ("smoothing", 1.0),
        ("hflip", 1.5),
        ("scale_min", 0.0),
        ("sched", "plateau"),
        ("precision", "fp8"),
        ("seed", -1),
        ("mixup", -0.1),
    ],
)
def test_unusable_value_is_refused_by_option_name(name: str, value: object) -> None:
    told = f"{value:g}" if isinstance(value, float) else value
    with pytest.raises(GrowkitError, match=f"^--{name.replace('_', '-')} {told}: (unknown|expected)"):
        FitSettings(**{name: value})


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_sharded_gradients_are_not_added_up_in_the_memory_of_cuda_graphs(mode: str) -> None:
    FitSettings(compile=mode, shard=True)
    FitSettings(compile="default", shard=True, grad_accum_steps=2)
    with pytest.raises(GrowkitError, match=f"^--compile {mode} with --shard .* give --compile default"):
        FitSettings(compile=mode, shard=True, grad_accum_steps=2)


def test_values_at_the_allowed_edge_pass() -> None:
    FitSettings(batch_size=1, smoothing=0.0, hflip=1.0, scale_min=1.0, clip_grad=0.0, seed=0)


def test_every_field_has_a_string_below_it() -> None:
    body = next(node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.ClassDef)).body
    documented = {
        field.target.id
        for field, below in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
    }
    assert documented == {field.name for field in dataclasses.fields(FitSettings)}


def test_settings_load_without_torch_and_timm() -> None:
    code = "import sys, growkit.train.settings; print(sorted({'torch', 'timm'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
