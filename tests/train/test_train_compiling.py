"""--compile auto: the way that makes the run shorter is taken, whatever the times are, and nothing is learned."""

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from growkit.arch import build, find
from growkit.errors import GrowkitError
from growkit.grow import grow
from growkit.settings import GrowSettings
from growkit.train import compiling
from growkit.train.compiling import with_compile
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
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[object]]:
    """Let batches take given seconds, uncompiled and compiled; gives a list of those that were timed."""

    def takes(plain: float, compiled: float) -> list[object]:
        calls: list[object] = []

        def stopwatch(model: nn.Module, *_: object) -> Callable[[object], float]:
            return lambda forward: (calls.append(forward), plain if forward is model else compiled)[1]

        monkeypatch.setattr(compiling, "_stopwatch", stopwatch)
        monkeypatch.setattr(torch, "compile", lambda model, *, mode: lambda images: model(images))
        return calls

    return takes


@pytest.mark.parametrize(("compiled", "mode"), [(1.0, "default"), (2.1, None)])
def test_the_faster_way_is_taken(compiled: float, mode: str | None, timed: Callable[..., list[object]]) -> None:
    timed(2.0, compiled)
    told = f"a batch takes {compiled / 2:.2f} x the time compiled"
    assert decided() == (mode, f"--compile auto: {'compiled' if mode else 'not compiled'}; {told}")


@pytest.mark.parametrize(
    ("plain", "batches", "short"),
    [
        (1.79, 100, "takes about 179 s"),
        (9.0, 89, f"has fewer than {compiling.BATCHES} batches"),
        (0.00001, 1, "takes about 1 s"),
    ],
)
def test_short_run_is_never_compiled(
    plain: float, batches: int, short: str, timed: Callable[..., list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(plain, plain / 2)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    told = f"--compile auto: not compiled; the run {short}, and trying a minute or more"
    assert decided(replace(AUTO, steps=batches)) == (None, told)


def test_all_batches_of_a_run_count(timed: Callable[..., list[object]]) -> None:
    timed(2.0, 1.0)
    assert decided(replace(AUTO, steps=50, batch_size=4))[0] is None
    assert decided(replace(AUTO, steps=50, batch_size=4, grad_accum_steps=2))[0] == "default"


def test_few_batches_are_timed(timed: Callable[..., list[object]]) -> None:
    calls = timed(2.0, 1.0)
    decided()
    assert len(calls) <= 0.1 * compiling.BATCHES


def test_other_modes_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_stopwatch", lambda *_: pytest.fail("timed"))
    for mode in (None, "default", "max-autotune"):
        settings = replace(AUTO, compile=mode)
        assert with_compile(vit(), images(), settings, CPU, pytest.fail, start_nothing) is settings


def test_what_does_not_compile_runs_uncompiled_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: nn.Module, *, mode: str) -> Callable[[Tensor], Tensor]:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCH_LOGS")

    monkeypatch.setattr(torch, "compile", refuse)
    monkeypatch.setattr(compiling, "SECONDS", 0.0)
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
    monkeypatch.setattr(compiling, "SECONDS", 0.0)
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


def test_of_several_processes_the_slowest_counts(
    timed: Callable[..., list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(2.0, 1.0)
    assert decided()[0] == "default"
    monkeypatch.setattr(compiling.distributed, "largest", lambda own: max(own, 1_900_000))
    assert decided()[0] == "default"
    monkeypatch.setattr(compiling.distributed, "largest", lambda own: max(own, 2_000_000))
    assert decided()[0] is None


def test_where_one_process_cannot_compile_none_does(
    timed: Callable[..., list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(2.0, 1.0)
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
    monkeypatch.setattr(compiling, "SECONDS", 0.0)
    torch.manual_seed(0)
    model, data = make(), images()
    again = copy.deepcopy(model)
    began = time.perf_counter()
    mode, told = decided(model=model)
    trial = time.perf_counter() - began
    assert told.startswith(f"--compile auto: {'compiled' if mode else 'not compiled'}; a batch takes")
    settings = replace(AUTO, steps=3, compile=None)
    usual = fit(again, data, settings)
    began = time.perf_counter()
    compiled = fit(model, data, replace(settings, compile=compiling.MODE))
    assert time.perf_counter() - began < trial / 2  # it goes on with what the trial compiled
    assert compiled.losses == pytest.approx(usual.losses, rel=1e-4)
