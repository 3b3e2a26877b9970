"""--compile auto: the way that makes the run shorter is taken, whatever the times are, and nothing is learned."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from growkit.arch import build, find
from growkit.errors import GrowkitError
from growkit.grow import grow
from growkit.settings import GrowSettings
from growkit.train import compiling
from growkit.train.compiling import pays_after, with_compile
from growkit.train.data import Data
from growkit.train.loop import fit
from growkit.train.progress import start_nothing
from growkit.train.settings import FitSettings

CPU = torch.device("cpu")
AUTO = FitSettings(steps=100, batch_size=8, workers=0, warmup_epochs=0.0, compile="auto")


def images(count: int = 16) -> Data:
    held = TensorDataset(
        torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(count) % 4
    )
    return Data(train=held, val=held, classes=list("abcd"))


def vit(**more: Any) -> nn.Module:
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_classes": 4}
    return timm.create_model("vit_tiny_patch16_224", **sizes, **more)


def decided(settings: FitSettings = AUTO, model: nn.Module | None = None) -> tuple[str | None, str]:
    """The mode that was decided on, and the line that says so."""
    lines: list[str] = []
    found = with_compile(model or vit(), images(), settings, CPU, lines.append, start_nothing)
    assert replace(found, compile="auto") == settings
    return found.compile, "\n".join(lines)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let batches take given seconds: uncompiled, compiled, and compiled for the first time."""

    def takes(plain: float, compiled: float, first: float) -> None:
        def stopwatch(model: nn.Module, *_: object) -> Callable[[object], float]:
            made = iter((first, *[compiled] * compiling.ROUNDS))
            return lambda forward: plain if forward is model else next(made)

        monkeypatch.setattr(compiling, "_stopwatch", stopwatch)
        monkeypatch.setattr(torch, "compile", lambda model, *, mode: lambda images: model(images))

    return takes


@given(*[st.floats(1e-3, 1e3)] * 3)
def test_compiling_has_paid_where_both_ways_have_taken_the_same_time(
    plain: float, compiled: float, compiling: float
) -> None:
    batches = pays_after(plain, compiled, compiling)
    if math.isinf(batches):
        assert compiled >= plain
    else:
        assert batches * plain == pytest.approx(compiling + batches * compiled, rel=1e-6)


@pytest.mark.parametrize(
    ("times", "mode", "told"),
    [
        ((1.0, 0.5, 30.5), "default", "0.50 x the time, compiling 30 s: that pays after 60 of 100 batches"),
        ((1.0, 0.5, 50.6), None, "0.50 x the time, compiling 50 s: that does not pay in 100 batches"),
        ((1.0, 1.1, 30.0), None, "1.10 x the time, compiling 29 s: that does not pay in 100 batches"),
    ],
)
def test_the_shorter_run_is_taken(
    times: tuple[float, float, float], mode: str | None, told: str, timed: Callable[..., None]
) -> None:
    timed(*times)
    found, line = decided()
    assert found == mode
    assert line == f"--compile auto: {'compiled' if mode else 'not compiled'}; a batch takes {told}"


def test_all_batches_of_a_run_count(timed: Callable[..., None]) -> None:
    timed(1.0, 0.5, 30.5)
    assert decided(replace(AUTO, steps=30, batch_size=4))[0] is None
    assert decided(replace(AUTO, steps=30, batch_size=4, grad_accum_steps=4))[0] == "default"


def test_short_run_is_never_compiled(timed: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    timed(0.09, 0.01, 1.0)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    told = "--compile auto: not compiled; the run takes about 9 s, compiling alone takes longer"
    assert decided() == (None, told)


def test_other_modes_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_stopwatch", lambda *_: pytest.fail("timed"))
    for mode in (None, "default", "max-autotune"):
        settings = replace(AUTO, compile=mode)
        assert with_compile(vit(), images(), settings, CPU, pytest.fail, start_nothing) is settings


def test_what_does_not_compile_runs_uncompiled_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: nn.Module, *, mode: str) -> Callable[[Tensor], Tensor]:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCH_LOGS")

    monkeypatch.setattr(torch, "compile", refuse)
    monkeypatch.setattr(compiling, "SHORTEST", 0.0)
    told = "--compile auto: not compiled; it cannot be here: InvalidCxxCompiler: No working C++ compiler found"
    assert decided() == (None, told)


def operator() -> nn.Module:
    source, target = (
        find("deit_tiny", {"img_size": 8, "patch_size": 4, "num_classes": 4, **sizes})
        for sizes in (
            {"embed_dim": 24, "depth": 2, "num_heads": 2},
            {"embed_dim": 48, "depth": 3, "num_heads": 4},
        )
    )
    return grow(source, target, build(source.name, source.arguments).state_dict(), GrowSettings(rank=2))


@pytest.mark.parametrize("make", [lambda: vit(drop_rate=0.5), operator])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_trial_learns_nothing_and_draws_nothing(
    make: Callable[[], nn.Module], checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[bool] = []

    def compiled(model: nn.Module, *, mode: str) -> Callable[[Tensor], Tensor]:
        return lambda images: (modes.append(model.training), model(images))[1]

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(compiling, "SHORTEST", 0.0)
    model = make().eval()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    decided(replace(AUTO, grad_checkpointing=checkpointed), model)
    assert modes == [True] * (1 + compiling.ROUNDS)  # as in training
    assert not model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_batch_is_as_large_as_in_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[int, ...]] = set()
    model = vit()
    model.register_forward_pre_hook(lambda module, given: seen.add(tuple(given[0].shape)))
    for size, processes, part in ((8, 1, 8), (64, 1, 16), (8, 2, 4)):  # there are 16 images
        seen.clear()
        monkeypatch.setattr(compiling.distributed, "size", lambda processes=processes: processes)
        monkeypatch.setattr(compiling.distributed, "largest", lambda own: own)
        decided(replace(AUTO, steps=1, batch_size=size), model)
        assert seen == {(part, 3, 8, 8)}


def test_of_several_processes_the_slowest_counts(timed: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    timed(1.0, 0.5, 10.5)
    assert decided()[0] == "default"
    monkeypatch.setattr(compiling.distributed, "largest", lambda own: max(own, 600_000))
    assert decided()[0] == "default"  # 0.4 s saved in each of 100 batches
    monkeypatch.setattr(compiling.distributed, "largest", lambda own: max(own, 950_000))
    assert decided()[0] is None


def test_where_one_process_cannot_compile_none_does(
    timed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(1.0, 0.5, 10.5)
    monkeypatch.setattr(compiling.distributed, "gathered", lambda own: [*own, "no compiler"])
    assert decided() == (None, "--compile auto: not compiled; it cannot be here: no compiler")


def test_what_cannot_be_timed_is_refused() -> None:
    with pytest.raises(GrowkitError, match="--compile auto times a whole model; with --shard name the mode"):
        decided(replace(AUTO, shard=True))
    with pytest.raises(GrowkitError, match="--compile auto: only grow, finetune and train decide it"):
        fit(vit(), images(), AUTO)


@pytest.mark.slow  # the compiler takes its time
@pytest.mark.parametrize("make", [vit, operator])
def test_real_compiler_is_timed_and_the_run_after_it_learns_the_same(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "SHORTEST", 0.0)
    torch.manual_seed(0)
    model, data = make(), images()
    again = copy.deepcopy(model)
    times: list[tuple[float, float, float]] = []
    monkeypatch.setattr(compiling, "pays_after", lambda *given: times.append(given) or 0.0)
    mode, told = decided(model=model)
    ((plain, compiled, seconds),) = times
    assert mode == "default"
    assert told.startswith("--compile auto: compiled;")
    assert seconds > 10 * max(plain, compiled) > 0
    settings = replace(AUTO, steps=3, compile=None)
    usual = fit(again, data, settings)
    assert fit(model, data, replace(settings, compile=mode)).losses == pytest.approx(usual.losses, rel=1e-4)
