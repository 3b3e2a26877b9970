"""What only a GPU can show: pytest -m gpu. The truth is the CPU, in float64 or float32."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from pairs import PAIRS, published_scale, randomised, tiny
from PIL import Image
from program import growkit
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from growkit.arch.spec import Architecture
from growkit.core import ring as ring_module
from growkit.core.ring import AXES, RingOperator
from growkit.errors import GrowkitError
from growkit.float32 import multiplying
from growkit.grow import grow
from growkit.settings import GrowSettings
from growkit.train import training
from growkit.train.data import Data, open_data
from growkit.train.loop import fit
from growkit.train.score import Scores, score_model
from growkit.train.settings import FitSettings

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
SIZES = [
    word
    for size in ("img_size=16", "patch_size=8", "embed_dim=32", "depth=2", "num_heads=2")
    for word in ("--set", size)
]
SOURCE, TARGET = tiny(32, 2, 2), tiny(64, 3, 4)
INPUT = {
    "input_size": (3, 16, 16),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}
PLAIN = FitSettings(
    steps=8, batch_size=16, lr=1e-3, workers=0, log_every=8, eval_every=0, color_jitter=0, precision="fp32"
)
RESIDENT = replace(PLAIN, cache="device")
# settings, and how far a loss may lie from float32's on the CPU: bfloat16 and TF32 round every factor
WAYS: dict[str, tuple[FitSettings, float]] = {
    "fp32": (PLAIN, 1e-4),
    "tf32": (replace(PLAIN, tf32=True), 5e-3),
    "bf16": (replace(PLAIN, precision="bf16"), 3e-2),
    "fp16": (replace(PLAIN, precision="fp16"), 1e-2),
    "compiled": (replace(PLAIN, compile="default"), 1e-4),
    "CUDA graphs": (replace(PLAIN, compile="reduce-overhead"), 1e-4),
    "CUDA graphs, accumulated": (
        replace(PLAIN, compile="reduce-overhead", batch_size=8, grad_accum_steps=2),
        1e-4,
    ),
    "recomputed": (replace(PLAIN, grad_checkpointing=True), 1e-4),
    "from memory": (replace(PLAIN, cache="ram"), 1e-4),
    "from the device": (RESIDENT, 1e-4),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven classes of 16 x 16 colours with noise."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 6)):
        for label in range(7):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            colour = 200 * np.array([label & 1, label >> 1 & 1, label >> 2])
            for index in range(count):
                noise = generator.integers(0, 55, (16, 16, 3)) + colour
                Image.fromarray(noise.astype(np.uint8)).save(folder / f"{index}.png")
    return root


def trained_of(operator: bool = False, pair: tuple[Architecture, Architecture] = (SOURCE, TARGET)) -> nn.Module:
    """An operator to train, or the plain target."""
    source, target = pair
    if not operator:
        return published_scale(target)
    return grow(source, target, published_scale(source).state_dict(), GrowSettings(rank=2))


def losses_of(images: Path, settings: FitSettings, device: torch.device, **what: Any) -> Tensor:
    torch.compiler.reset()
    data = open_data(str(images), INPUT, settings)

    def judge(model: nn.Module) -> Scores:
        return score_model(model, data, settings, device)

    return torch.tensor(fit(trained_of(**what), data, settings, device=device, evaluate=judge).losses)


@pytest.mark.parametrize("operator", [False, True], ids=["target", "operator"])
@pytest.mark.parametrize("way", WAYS)
def test_training_loses_what_it_loses_on_the_cpu(way: str, operator: bool, images: Path) -> None:
    settings, tolerance = WAYS[way]
    kept = replace(PLAIN, cache=settings.cache, grad_checkpointing=settings.grad_checkpointing)
    truth = losses_of(images, kept, torch.device("cpu"), operator=operator)
    found = losses_of(images, settings, GPU, operator=operator)
    compared = 1 if way == "fp16" else PLAIN.steps  # its first updates only find the scale of the loss
    assert (found - truth)[:compared].abs().max() <= tolerance
    assert (truth[-1] - truth[0]).abs() > 0.1, "weights that hardly move would agree anyway"


@pytest.mark.parametrize("rank", [1, 3])
def test_ring_sums_in_float32_inside_autocast(rank: int) -> None:
    """A relative error of float32; bfloat16's would be a thousand times as large."""
    source, target = tiny(96, 4, 3), tiny(192, 6, 6)
    state = randomised(source).state_dict()
    exact = grow(source, target, state, GrowSettings(rank=rank))
    weights = exact.weights()
    network = exact.method
    truth = torch.autograd.grad(sum(w.square().sum() for w in weights.values()), list(network.parameters()))
    single = {name: tensor.float() for name, tensor in state.items()}
    fast = grow(source, target, single, GrowSettings(rank=rank)).to(GPU)
    with torch.autocast("cuda", torch.bfloat16):
        made = fast.weights()
    found = torch.autograd.grad(sum(w.square().sum() for w in made.values()), list(fast.method.parameters()))
    for name, expected in weights.items():
        assert relative(made[name], expected) < 1e-5, name
    for one, expected in zip(found, truth, strict=True):
        assert relative(one, expected) < 1e-4


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().cpu().double(), expected.detach()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def random_ring(old: dict[str, int], new: dict[str, int], rank: int) -> tuple[RingOperator, Tensor]:
    """In float64, with what it grows."""
    ring = RingOperator(old, new, [rank] * 4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for core in ring.cores.values():
            core.normal_(generator=generator)
    return ring, torch.randn([old[axis] for axis in AXES], dtype=torch.float64, generator=generator)


def test_ring_sliced_on_the_gpu_equals_float64() -> None:
    exact, x = random_ring({"B": 12, "O": 96, "L": 4, "I": 96}, {"B": 12, "O": 384, "L": 8, "I": 384}, 4)
    fast = copy.deepcopy(exact).float().to(GPU)
    assert relative(fast(x.float().to(GPU)), exact(x)) < 1e-5


@pytest.mark.parametrize(
    ("rank", "count"), [(1, 4), (4, 5), (6, 24)], ids=["bonds of one", "odd sizes", "more than kernels take"]
)
def test_ring_of_float16_factors_is_as_near_float64_as_tf32(
    rank: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients, by kernels and, where the small factors have over 128 rows, by cuBLAS."""
    kernels = pytest.importorskip("growkit.core.kernels")
    products: list[bool] = []  # for each product that a kernel was asked for, whether it was made
    made = kernels.product

    def product(*given: Any) -> bool:
        products.append(made(*given))
        return products[-1]

    monkeypatch.setattr(kernels, "product", product)
    exact, x = random_ring(
        {"B": count, "O": 40, "L": count, "I": 24}, {"B": count, "O": 56, "L": count + 1, "I": 72}, rank
    )
    upstream = 1e-8 * torch.randn(exact(x).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    truth = [exact(x), *torch.autograd.grad(exact(x), list(exact.parameters()), upstream)]
    ring = copy.deepcopy(exact).float().to(GPU)
    gaps: dict[str, list[float]] = {}
    for way, halves, room in (
        *(("float16", ring_module.may_halve, 0), ("float16, kept", ring_module.may_halve, 2**30)),
        ("tf32", lambda _: False, 0),
    ):
        monkeypatch.setattr(ring_module, "may_halve", halves)
        ring.room = room
        with multiplying(tf32=True):
            grown = ring(x.float().to(GPU))
            found = [grown, *torch.autograd.grad(grown, list(ring.parameters()), upstream.float().to(GPU))]
        gaps[way] = [relative(here.detach(), there.detach()) for here, there in zip(found, truth, strict=True)]
    assert any(products[1:]) or rank * count > kernels.LARGEST  # the first may be the trial that finds kernels out
    for way in ("float16", "float16, kept"):
        for ours, theirs in zip(gaps[way], gaps["tf32"], strict=True):
            assert 1e-5 < ours < 2 * theirs + 1e-4


WAITING: dict[str, tuple[FitSettings, dict[str, Any]]] = {  # settings, and what is trained
    **{f"{name} from {cache}": (replace(PLAIN, precision=name, cache=cache), {})
       for name in ("fp32", "bf16", "fp16") for cache in ("none", "device")},
    "accumulated": (replace(PLAIN, batch_size=8, grad_accum_steps=2), {}),
    "operator": (replace(PLAIN, precision="bf16"), {"operator": True}),
    "operator in TF32": (replace(PLAIN, tf32=True), {"operator": True}),
    "operator in TF32 and bf16": (replace(PLAIN, tf32=True, precision="bf16"), {"operator": True}),
    "mixed and averaged": (replace(PLAIN, mixup=0.8, cutmix=1.0, model_ema=True), {}),
    "augmented": (replace(PLAIN, color_jitter=0.4, reprob=0.5), {}),
    "augmented on the device": (replace(RESIDENT, color_jitter=0.4, reprob=0.5), {}),
    "operator that carries a mean": (PLAIN, {"operator": True, "pair": PAIRS["pre-norm, odd"]}),
}  # fmt: skip


class PinnedCopies(TorchDispatchMode):
    """Requires that what is copied to the GPU lies in pinned memory: else the copy waits, without torch's knowledge."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            copied = args[1] if func is torch.ops.aten.copy_.default else args[0]
            assert not made.is_cuda or copied.is_cuda or copied.is_pinned(), (copied.shape, copied.dtype)
        return made


@pytest.mark.parametrize("what", WAITING)
def test_updates_never_wait_for_the_gpu(what: str, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are read back where they are reported; torch raises on any other wait."""
    update = training.Training.update
    watched: list[int] = []

    def strict(self: Any, step: int, batches: Any) -> Tensor:
        if step < 3:  # what is made once may wait: moments, the loss scaler's scale
            return update(self, step, batches)
        watched.append(step)
        torch.cuda.set_sync_debug_mode("error")
        try:
            with PinnedCopies():
                return update(self, step, batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(training.Training, "update", strict)
    settings, trained = WAITING[what]
    losses_of(images, replace(settings, workers=1), GPU, **trained)
    assert watched == [3, 4, 5, 6, 7, 8]


def test_scores_are_those_of_the_cpu(images: Path) -> None:
    data = open_data(str(images), INPUT, PLAIN)
    here, there = (score_model(published_scale(TARGET), data, PLAIN, torch.device(name)) for name in ("cpu", "cuda"))
    assert there.loss == pytest.approx(here.loss, abs=1e-4)
    assert (there.top1, there.count) == (here.top1, here.count)


def test_out_of_memory_names_a_batch_that_fits(images: Path) -> None:
    """A model of 86 M parameters, where others left 6 GB: enough for it, not for 64 images."""
    big = tiny(768, 12, 12, img_size=224, patch_size=16)
    asked = replace(PLAIN, steps=2, batch_size=64, log_every=1)
    data: Data = open_data(str(images), {**INPUT, "input_size": (3, 224, 224)}, asked)
    torch.cuda.empty_cache()
    others = torch.empty(torch.cuda.mem_get_info(GPU)[0] - 6 * 10**9, dtype=torch.uint8, device=GPU)
    try:
        with pytest.raises(GrowkitError, match=r"out of memory on cuda.*; --batch-size \d+") as told:
            fit(published_scale(big), data, asked, device=GPU)
        words = str(told.value).split()
        size, accumulated = (int(words[words.index(f"--{name}") + 1]) for name in ("batch-size", "grad-accum-steps"))
        assert size * accumulated == 64
        fit(published_scale(big), data, replace(asked, batch_size=size, grad_accum_steps=accumulated), device=GPU)
    finally:  # a failure shows its frames, and would keep this from the tests that follow
        others.set_()
        torch.cuda.empty_cache()


@pytest.mark.parametrize("more", [(), ("--shard",)], ids=["plain", "sharded"])
def test_torchrun_trains_on_a_gpu_of_its_own(more: tuple[str, ...], images: Path, tmp_path: Path) -> None:
    words = ["train", "vit_tiny", *SIZES, "--data", images, "--epochs", 1, "--workers", 0]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 1]
    asked = [*command, "-m", "growkit_cli", *words, "--batch-size", 16, "--device", "cuda", "--json", *more]
    ended = subprocess.run(list(map(str, asked)), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["best"]["count"] == 42


def test_torchrun_on_a_gpu_ends_with_the_status_of_an_error(images: Path, tmp_path: Path) -> None:
    words = ["train", "vit_tiny", *SIZES, "--data", images, "--epochs", 1, "--workers", 0, "--batch-size", 16]
    words += ["--lr", "1e9", "--opt", "sgd", "--weight-decay", 0]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 1]
    asked = [*command, "-m", "growkit_cli", *words, "--clip-grad", 0, "--device", "cuda"]
    ended = subprocess.run(list(map(str, asked)), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert "error: the loss is" in ended.stderr
    assert "exitcode  : 2 " in ended.stderr, ended.stderr


@pytest.fixture
def whole_way(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """growkit in a folder of its own with a trained model; fails where the command does."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object, status: int = 0) -> Any:
        ended, out, err = growkit(capsys, *words, "--json")
        assert ended == status, err
        return json.loads(out)

    run("train", "vit_tiny", *SIZES, "--data", images, "--epochs", 2, "--workers", 0)
    return run


BIGGER = ("--to", "vit_tiny", "--set", "embed_dim=64", "--set", "depth=3", "--set", "num_heads=4")


def test_grows_finetunes_and_serves_on_the_gpu(whole_way: Any, images: Path) -> None:
    grown = whole_way("grow", "run/trained", *BIGGER, "--data", images, "--steps", 4, "--device", "cuda")
    assert grown["step0_gap"] < 1e-5
    tuned = whole_way("finetune", "--data", images, "--epochs", 2, "--device", "cuda", "--workers", 0)
    for form in ((), ("--precision", "fp16")):
        whole_way("export", "--onnx", *form, "--force")
        verified = whole_way("verify", "--provider", "cuda", "--data", images, "--no-latency")
        assert verified["provider"]["used"] == "cuda"
        assert verified["verdict"] == "pass"
        scores = whole_way("evaluate", "run/onnx/model.onnx", "--data", images, "--device", "cuda")
        assert scores["top1"] == pytest.approx(tuned["best"]["top1"], abs=0.03)


@pytest.mark.parametrize("provider", ["cuda", "auto"])
def test_onnx_runtime_starts_cuda_in_a_process_of_its_own(provider: str, whole_way: Any, images: Path) -> None:
    """Where torch has not: what bounds the memory of a file must leave the driver what it takes."""
    whole_way("export", "run/trained", "--onnx")
    own = [sys.executable, "-m", "growkit_cli"]
    asked = [*own, "verify", "--provider", provider, "--data", str(images), "--no-latency", "--json"]
    ended = subprocess.run(asked, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["provider"]["used"] == "cuda"
    scored = [*own, "evaluate", "run/onnx/model.onnx", "--data", str(images), "--device", "cuda", "--json"]
    ended = subprocess.run(scored, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr


def test_damaged_weight_is_found_on_the_gpu_too(whole_way: Any) -> None:
    whole_way("export", "run/trained", "--onnx")
    file = Path("run/onnx/model.onnx")
    proto = onnx.load(file)
    tensor = max(proto.graph.initializer, key=lambda t: len(t.raw_data))
    array = numpy_helper.to_array(tensor).copy()
    array.flat[0] += 0.05
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(proto, file)
    assert whole_way("verify", "--provider", "cuda", "--no-latency", status=1)["verdict"] == "fail"


def test_faster_graph_for_the_gpu_is_chosen_by_measurement(whole_way: Any) -> None:
    exported = whole_way("export", "run/trained", "--onnx", "--for", "cuda")
    assert {choice["verdict"] for choice in exported["choices"]} <= {
        "kept",
        "faster",
        "slower",
        "no faster",
        "not decided",
    }
