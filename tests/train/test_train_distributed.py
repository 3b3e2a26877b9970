"""Two processes train as one does: the same gradients, weights and scores to rounding; what is stopped goes on.

Everything is in float64, where adding up in another order moves a value of size 1 by some 1e-16. That is more than a
matter of taste: the gradient of a key's bias is zero but for rounding, and Adam divides it by its own size. In float64
that rounding stays below Adam's eps of 1e-8 and moves nothing; in float32 it would move the bias by --lr.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import typer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from train_samples import CONFIG

from growkit.arch import build, find
from growkit.checkpoint import WEIGHTS
from growkit.errors import GrowkitError, Terminated
from growkit.grow import grow
from growkit.job import Job
from growkit.record import RunFolder
from growkit.settings import GrowSettings
from growkit.stage import settled
from growkit.train import batches as reading
from growkit.train import distributed
from growkit.train.augment import crop_and_flip
from growkit.train.batches import val_batches
from growkit.train.data import _timm_dataset, open_data
from growkit.train.device import pick_device
from growkit.train.distributed import joined
from growkit.train.loop import FitResult, fit
from growkit.train.progress import Progress
from growkit.train.score import Scores, evaluate, predictor
from growkit.train.settings import AUTO, FitSettings
from growkit.train.watch import StepRecord
from growkit_cli.processes import on_processes

ROUNDING = 1e-12  # of weights of size 1 after six updates; found on the CPU: at most 1.1e-13
SIZES = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 2}
PLAIN = FitSettings(
    steps=6, batch_size=8, lr=0.01, workers=0, log_every=1, eval_every=0.9, save_seconds=0.0, clip_grad=0.5
)
ACCUMULATED = replace(PLAIN, grad_accum_steps=2)
SHARDED = replace(PLAIN, grad_accum_steps=2, model_ema=True, shard=True)
MANGO = GrowSettings(rank=2)
UNLIKE: dict[str, tuple[Any, Any, str]] = {
    "lr": (0.01, 0.02, "--lr 0.01, not 0.02"),
    "log_every": (3, 4, "--log-every 3, not 4"),
    "batch_size": (8, AUTO, "--batch-size 8, not auto"),
    "shard": (False, True, "no --shard"),
}
CASES: dict[str, tuple[FitSettings, GrowSettings | None]] = {  # with the growth operator where that is what is trained
    "plain": (replace(PLAIN, aa="rand-m9-mstd0.5", reprob=0.3), None),
    "accumulated": (replace(PLAIN, grad_accum_steps=2, smoothing=0.1, model_ema=True, workers=1), None),
    "resident": (replace(PLAIN, cache="device", color_jitter=0.0), None),
    # Adam divides what is zero but for rounding by 1e-8: here that moves a weight by 1e-12, and in two stages by 1e-11
    "grown": (replace(PLAIN, lr=0.001), MANGO),
    "grown, accumulated": (replace(ACCUMULATED, model_ema=True), MANGO),
    "grown in two stages": (replace(PLAIN, opt="sgd"), replace(MANGO, stages="width-first")),
    "grown without a ring": (PLAIN, GrowSettings(method="ligo")),
    "sharded": (SHARDED, None),
    "sharded, with a loss scaler": (replace(SHARDED, precision="fp16"), None),  # float64 stays as it is
}


def doubled(model: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """A hook before forward: images in float64."""
    return (inputs[0].double(),)


def model_of(growth: GrowSettings | None) -> nn.Module:
    source = find("vit_tiny", SIZES)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(source.name, source.arguments).double()
    target = find("vit_tiny", {**SIZES, "embed_dim": 24, "depth": 2, "num_heads": 3})
    model = grow(source, target, network.state_dict(), growth) if growth else network
    model.register_forward_pre_hook(doubled)
    return model


def whole_of(value: Any) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


@contextmanager
def first_gradients() -> Iterator[dict[str, Tensor]]:
    """Collects what the first step of an optimizer finds, by the parameters' order."""
    found: dict[str, Tensor] = {}

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not found:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            found.update({str(number): whole_of(p.grad).clone() for number, p in enumerate(parameters)})

    handle = register_optimizer_step_pre_hook(look)
    try:
        yield found
    finally:
        handle.remove()


def train(
    images: Path, settings: FitSettings, *, growth: GrowSettings | None = None, struck: bool = False, **more: Any
) -> dict[str, Any]:
    """What a run of fit gave; no class instances, so that it can be stored.

    `struck`: the second process is sent a signal while it scores.
    """
    model, data = model_of(growth), open_data(str(images), CONFIG, settings)

    def judge(judged: nn.Module) -> Scores:
        if struck and distributed.rank():
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(predictor(judged, "cpu"), val_batches(data, settings))

    with first_gradients() as gradients:
        result = fit(model, data, settings, evaluate=judge, **more)
    return {
        "gradients": gradients,
        "weights": {name: whole_of(p.detach()) for name, p in model.named_parameters()},
        "losses": torch.tensor(result.losses, dtype=torch.float64),
        "history": history_of(result),
        "flops": result.flops_per_step,
        "images_per_step": result.images_per_step,
        "interrupted": result.interrupted,
        "stopped_by": result.stopped_by,
    }


def history_of(result: FitResult) -> list[list[float]]:
    return [[step, s.top1, s.top5, s.loss, s.ece, s.count] for step, s in result.history]


def stop_at(step: int, *, of_rank: int = 0) -> Callable[[StepRecord], None]:
    """An on_step that asks for a stop in one process alone."""

    def watch(record: StepRecord) -> None:
        if record.step == step and distributed.rank() == of_rank:
            raise KeyboardInterrupt

    return watch


def strike_at(done: float, *, of_rank: int) -> Progress:
    """What sends a signal to one process, before the batch with which `done` updates are done."""

    def progress(now: float, total: int, note: str = "") -> None:
        if now == done and distributed.rank() == of_rank:
            os.kill(os.getpid(), signal.SIGTERM)

    return progress


def work(*places: str) -> None:
    """All that two processes do in these tests, in one start of them."""
    images, folder = map(Path, places)
    found: dict[str, Any] = {}
    with joined(torch.device("cpu")):
        rank = distributed.rank()
        for name, (settings, growth) in CASES.items():
            found[name] = train(images, settings, growth=growth)
        found["stopped"] = train(images, PLAIN, folder=folder / "stopped", on_step=stop_at(3, of_rank=1))
        struck = folder / "struck"
        found["struck"] = train(images, ACCUMULATED, growth=MANGO, folder=struck, progress=strike_at(2.5, of_rank=1))
        found["struck while scoring"] = train(images, PLAIN, folder=folder / "scoring", struck=True)
        try:
            train(images, ACCUMULATED, folder=folder / "nothing", progress=strike_at(0.5, of_rank=1))
        except Terminated:
            found["nothing"] = "terminated"
        found["went on"] = train(images, PLAIN, folder=folder / "alone", resume=True)
        train(images, SHARDED, folder=folder / "sharded", on_step=stop_at(3))
        found["went on sharded"] = train(images, SHARDED, folder=folder / "unsharded", resume=True)
        for name, settings in (("odd", replace(PLAIN, batch_size=9)), ("mixed", replace(PLAIN, batch_size=6, mixup=1))):
            try:
                train(images, settings)
            except GrowkitError as error:
                found[name] = str(error)
        try:
            distributed.together(nn.BatchNorm1d(3), torch.device("cpu"))
        except GrowkitError as error:
            found["statistics"] = str(error)
        try:
            distributed.by_leader(lambda: (folder / f"only-{rank}").mkdir(exist_ok=False))
            distributed.by_leader(lambda: (folder / "only-0").mkdir(exist_ok=False))
        except FileExistsError as error:
            found["raised"] = str(error)
        data, job = open_data(str(images), CONFIG, PLAIN), Job(RunFolder(folder), "cpu", say=print)
        for name, (one, other, _) in UNLIKE.items():
            settings = replace(PLAIN, **{name: other if rank else one})
            try:
                settled(job, model_of(None), data, settings, torch.device("cpu"), None)
            except GrowkitError as error:
                found[f"unlike {name}"] = str(error)
        found["said"] = distributed.first_to_say("the same line")
        found["least"] = distributed.least(3 + rank)
        found["gathered"] = distributed.gathered(["of both", f"of {rank}"])
        data, model = open_data(str(images), CONFIG, PLAIN), model_of(None)
        data.unreadable[f"met by {rank}"] = None
        fit(model, data, PLAIN, folder=folder / "unreadable")
        found["unreadable"] = list(data.unreadable)
    torch.save(found, folder / f"{rank}.pt")


def work_compiled(*places: str) -> None:
    """Train an operator with its network compiled, as one of two processes."""
    images, folder = map(Path, places)
    settings, growth = CASES["grown, accumulated"]
    with joined(torch.device("cpu")):
        found = train(images, replace(settings, compile="default"), growth=growth)
        torch.save(found, folder / f"compiled-{distributed.rank()}.pt")


def leave(how: str, device: str) -> None:
    """Join the other process and leave it, done, stopped or refused; print whether the process group is there still."""
    if device == "cuda":  # all but NCCL
        begin, torch.cuda.set_device = dist.init_process_group, lambda device: None
        dist.init_process_group = lambda backend, **more: begin(backend.removesuffix(",cuda:nccl"), **more)
        abort = dist.ProcessGroup.abort
        dist.ProcessGroup.abort = lambda group: print("aborted", flush=True) or abort(group)
    try:
        with joined(torch.device(device)):
            distributed.anywhere(True)
            if how != "done":
                raise {"left": typer.Exit(130), "refused": GrowkitError("no")}[how]
    finally:
        print(dist.is_initialized(), flush=True)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


ROOT = Path(__file__).parents[2]


def environment(*paths: Path, **more: str) -> dict[str, str]:
    """This process's own, with growkit of this folder and one thread for each process."""
    found = os.pathsep.join(map(str, (ROOT, ROOT / "cli", *paths)))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": found, **more}


# Forks two processes for each line that it reads: they do a function of this module and end as Python ends a program.
PAIRS = """
import gc, json, os, signal, sys, test_train_distributed
gc.freeze()  # a collector would touch all that is shared, and so copy it
for line in sys.stdin:
    work, given, environments = json.loads(line)
    started = []
    for own in environments:
        hear, said = os.pipe()
        if not (process := os.fork()):
            os.dup2(said, 1)
            os.environ.update(own)
            signal.alarm(300)  # one that hangs outlives no test
            sys.exit(getattr(test_train_distributed, work)(*given))
        os.close(said)
        started.append((process, open(hear)))
    told = [heard.read() for _, heard in started]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process, _ in started]
    print(json.dumps([told, statuses]), flush=True)
"""


@pytest.fixture(scope="module")
def two() -> Iterator[Callable[..., tuple[list[str], list[int]]]]:
    """What two processes that do a function of this module print, and their statuses; torch is loaded once for all.

    `others` is what only the environment of one has.
    """
    with subprocess.Popen(
        [sys.executable, "-c", PAIRS],
        env=environment(Path(__file__).parent),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as program:

        def ask(work: str, *given: object, port: object = None, others: Any = ({}, {})) -> tuple[list[str], list[int]]:
            here = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port())}
            ranks = [{**here, "RANK": str(n), "LOCAL_RANK": str(n), **more} for n, more in enumerate(others)]
            print(json.dumps([work, [str(one) for one in given], ranks]), file=program.stdin, flush=True)
            told, statuses = json.loads(program.stdout.readline())
            return told, statuses

        yield ask


@pytest.fixture(scope="module")
def alone(images: Path) -> dict[str, dict[str, Any]]:
    """Each case on one process."""
    return {name: train(images, replace(s, shard=False), growth=growth) for name, (s, growth) in CASES.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def both(images: Path, folder: Path, two: Callable[..., Any]) -> list[dict[str, Any]]:
    """What either of two processes found; a run that one process had begun is finished by them."""
    train(images, PLAIN, folder=folder / "alone", on_step=stop_at(3))
    train(images, replace(SHARDED, shard=False), folder=folder / "unsharded", on_step=stop_at(3))
    assert two("work", images, folder)[1] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def furthest(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_find_the_gradients_and_weights_of_one(
    case: str, alone: dict[str, dict[str, Any]], both: list[dict[str, Any]]
) -> None:
    one, (two, other) = alone[case], (found[case] for found in both)
    assert furthest(one["gradients"], two["gradients"]) < ROUNDING
    assert furthest(one["weights"], two["weights"]) < ROUNDING
    assert furthest(two["weights"], other["weights"]) == 0
    assert torch.allclose(one["losses"], two["losses"], rtol=0, atol=1e-6)  # a loss is read as float32
    assert one["images_per_step"] == two["images_per_step"]


@pytest.mark.slow  # the compiler takes its time
def test_compiled_operator_on_two_processes_is_that_of_one(
    alone: dict[str, dict[str, Any]], images: Path, tmp_path: Path, two: Callable[..., Any]
) -> None:
    assert two("work_compiled", images, tmp_path)[1] == [0, 0]
    one, other = (torch.load(tmp_path / f"compiled-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert furthest(one["weights"], other["weights"]) == 0
    assert furthest(alone["grown, accumulated"]["gradients"], one["gradients"]) < ROUNDING


def test_other_images_would_give_other_weights(alone: dict[str, dict[str, Any]], images: Path) -> None:
    other = train(images, replace(CASES["plain"][0], seed=1))
    assert furthest(alone["plain"]["gradients"], other["gradients"]) > 1e-3
    assert furthest(alone["plain"]["weights"], other["weights"]) > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_both_processes_see_the_scores_of_all_images(
    case: str, alone: dict[str, dict[str, Any]], both: list[dict[str, Any]]
) -> None:
    one, (two, other) = alone[case]["history"], (found[case]["history"] for found in both)
    assert two == other
    assert len(two) > 1
    assert {row[-1] for row in two} == {12}
    for expected, found in zip(one, two, strict=True):
        assert found == pytest.approx(expected, abs=ROUNDING)


def test_flops_are_added_up_and_a_ring_counts_once_for_all_processes(
    alone: dict[str, dict[str, Any]], both: list[dict[str, Any]]
) -> None:
    for case in ("plain", "accumulated", "resident"):
        assert both[0][case]["flops"] == alone[case]["flops"]
    for case in ("grown", "grown, accumulated", "grown in two stages"):  # slices are made again, vectors by each
        assert 1 < both[0][case]["flops"] / alone[case]["flops"] < 1.2
    every = both[0]["grown without a ring"]["flops"]
    assert alone["grown without a ring"]["flops"] < every < 2 * alone["grown without a ring"]["flops"]


def test_stop_that_one_process_was_asked_for_stops_both_and_one_goes_on(
    alone: dict[str, dict[str, Any]], both: list[dict[str, Any]], images: Path, folder: Path
) -> None:
    assert [found["stopped"]["interrupted"] for found in both] == [True, True]
    assert [len(found["stopped"]["losses"]) for found in both] == [3, 3]
    unbroken = train(images, PLAIN)
    resumed = train(images, PLAIN, folder=folder / "stopped", resume=True)
    assert furthest(unbroken["weights"], resumed["weights"]) < ROUNDING
    assert len((folder / "stopped" / "metrics.jsonl").read_text().splitlines()) == 6


def test_signal_to_one_process_between_the_batches_of_an_update_ends_both(
    both: list[dict[str, Any]], images: Path, folder: Path
) -> None:
    assert [(found["struck"]["interrupted"], len(found["struck"]["losses"])) for found in both] == [(True, 2)] * 2
    assert [found["struck"]["stopped_by"] for found in both] == [signal.SIGTERM] * 2
    assert [found["nothing"] for found in both] == ["terminated"] * 2  # nothing was learned
    unbroken = train(images, ACCUMULATED, growth=MANGO)
    resumed = train(images, ACCUMULATED, growth=MANGO, folder=folder / "struck", resume=True)
    assert furthest(unbroken["weights"], resumed["weights"]) < ROUNDING


def test_signal_to_one_process_while_both_score_lets_them_finish_that(
    both: list[dict[str, Any]], images: Path, folder: Path
) -> None:
    found = [one["struck while scoring"] for one in both]
    steps = [[score[0] for score in one["history"]] for one in found]
    assert steps[0] == steps[1] == [len(found[0]["losses"])]
    assert [(one["interrupted"], one["stopped_by"]) for one in found] == [(True, signal.SIGTERM)] * 2
    unbroken = train(images, PLAIN)
    resumed = train(images, PLAIN, folder=folder / "scoring", resume=True)
    assert furthest(unbroken["weights"], resumed["weights"]) < ROUNDING
    assert len(resumed["history"]) == len(unbroken["history"])


def test_two_processes_go_on_with_what_one_began(both: list[dict[str, Any]], images: Path, folder: Path) -> None:
    unbroken = train(images, PLAIN)
    assert furthest(unbroken["weights"], both[0]["went on"]["weights"]) < ROUNDING
    for expected, found in zip(unbroken["history"], both[0]["went on"]["history"], strict=True):
        assert found == pytest.approx(expected, abs=ROUNDING)
    assert len((folder / "alone" / "metrics.jsonl").read_text().splitlines()) == 6


def test_sharded_run_goes_on_unsharded_and_the_other_way_round(
    alone: dict[str, dict[str, Any]], both: list[dict[str, Any]], images: Path, folder: Path
) -> None:
    whole = alone["sharded"]
    assert furthest(whole["weights"], both[0]["went on sharded"]["weights"]) < ROUNDING
    resumed = train(images, replace(SHARDED, shard=False), folder=folder / "sharded", resume=True)
    assert furthest(whole["weights"], resumed["weights"]) < ROUNDING
    for expected, found in zip(whole["history"], resumed["history"], strict=True):
        assert found == pytest.approx(expected, abs=ROUNDING)


def test_sharding_without_torchrun_is_refused_with_the_remedy(images: Path) -> None:
    with pytest.raises(GrowkitError, match=r"--shard spreads a model over .*; start it with torchrun"):
        train(images, SHARDED)


def test_batch_that_does_not_divide_is_refused_with_the_remedy(both: list[dict[str, Any]]) -> None:
    expected = "--batch-size: 9 images do not divide among 2 processes; start 1 or 3 processes, or set --batch-size 8"
    assert [found["odd"] for found in both] == [expected] * 2
    assert "3 is odd; set --batch-size 4" in both[0]["mixed"]


def test_processes_that_were_not_given_the_same_are_refused(both: list[dict[str, Any]]) -> None:
    """Each would train on its part of other batches, and no one would know, or wait for what the others never send."""
    for name, (_, _, wrong) in UNLIKE.items():
        told = f"the first process was given {wrong}: give all processes the same"
        assert [found.get(f"unlike {name}") for found in both] == [told] * 2


def test_running_statistics_which_would_differ_by_process_are_refused(both: list[dict[str, Any]]) -> None:
    assert both[0]["statistics"].startswith("num_batches_tracked is no parameter and would differ by process")


def test_leader_acts_for_all_and_its_error_is_everybodys(both: list[dict[str, Any]], folder: Path) -> None:
    assert [path.name for path in folder.glob("only-*")] == ["only-0"]
    assert both[0]["raised"] == both[1]["raised"]


def test_of_one_error_one_process_tells(both: list[dict[str, Any]]) -> None:
    assert sorted(found["said"] for found in both) == [False, True]


def test_the_least_of_all_is_found(both: list[dict[str, Any]]) -> None:
    assert [found["least"] for found in both] == [3, 3]


def test_lines_of_all_are_gathered_once_each(both: list[dict[str, Any]]) -> None:
    assert [found["gathered"] for found in both] == [["of both", "of 0", "of 1"]] * 2


def test_images_that_any_process_could_not_read_are_known_to_all_and_kept(
    both: list[dict[str, Any]], folder: Path
) -> None:
    state = torch.load(folder / "unreadable" / "state.pt", weights_only=True)
    met = ["met by 0", "met by 1"]
    assert [sorted(found["unreadable"]) for found in both] == [met, met]
    assert state["unreadable"] == met


def test_one_process_fetches_a_dataset_and_the_others_find_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two would unpack what the other is still fetching."""
    asked: list[bool] = []

    def create(*_: Any, download: bool, **__: Any) -> Any:
        asked.append(download)
        return SimpleNamespace()

    monkeypatch.setattr("growkit.train.data.create_dataset", create)
    settings = FitSettings(dataset_download=True)
    _timm_dataset("torch/cifar10", "train", settings, "RGB")
    monkeypatch.setattr("growkit.train.data.size", lambda: 2)
    for leads in (True, False):
        monkeypatch.setattr("growkit.train.data.by_leader", lambda act, leads=leads: act() if leads else None)
        _timm_dataset("torch/cifar10", "train", settings, "RGB")
    assert asked == [True, True, False, False]


@pytest.mark.parametrize(
    ("images", "batch_size", "size"), [(12, 8, 2), (33, 8, 8), (9, 8, 8), (8, 64, 8), (100, 16, 4)]
)
def test_evaluation_gives_every_image_to_one_process_in_equally_many_batches(
    images: int, batch_size: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = []
    for rank in range(size):
        monkeypatch.setattr(reading, "size", lambda: size)
        monkeypatch.setattr(reading, "rank", lambda rank=rank: rank)
        shares.append(reading._shares(images, batch_size))
    assert len({len(share) for share in shares}) == 1
    assert min(len(batch) for share in shares for batch in share) > 0
    assert max(len(batch) for share in shares for batch in share) <= max(-(-2 * batch_size // size), 1)
    assert sorted(place for share in shares for batch in share for place in batch) == list(range(images))


def test_fewer_images_for_evaluation_than_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "size", lambda: 4)
    with pytest.raises(GrowkitError, match="3 images for evaluation do not give each of 4 processes one"):
        reading._shares(3, 8)


@pytest.mark.parametrize("scale_min", [0.2, 1.0])
def test_crops_of_a_part_are_those_of_the_whole_batch(scale_min: float) -> None:
    images = torch.rand(16, 3, 8, 8) * 255
    settings = FitSettings(scale_min=scale_min)
    whole = crop_and_flip(images, settings, torch.Generator().manual_seed(3))
    part = slice(8, 16)
    found = crop_and_flip(images[part], settings, torch.Generator().manual_seed(3), whole=16, part=part)
    assert torch.equal(found, whole[part])
    assert not torch.equal(found, crop_and_flip(images[part], settings, torch.Generator().manual_seed(3)))


# On the command line. The driver is growkit, but in update 4 its second process kills itself, at the first attempt, or
# asks torchrun to end, there or before training.
DRIVER = """
import os, signal, time
from growkit import fitting
from growkit.train import training
from growkit_cli.main import main
real = training.Training.update
def update(self, step, batches):
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    if os.environ.get("KILL") and first and os.environ["RANK"] == "1" and step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("END") == "in update 4" and step >= 4:
        if os.environ["RANK"] == "1" and step == 4:
            os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(0.5)
    return real(self, step, batches)
training.Training.update = update
def wait(*_, **__):
    if os.environ["RANK"] == "1":
        os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
if os.environ.get("END") == "before training":
    fitting.read_through = wait
main()
"""
NETWORK = [word for key in SIZES if key != "num_classes" for word in ("--set", f"{key}={SIZES[key]}")]
# SGD, for in float32 Adam would blow up the rounding of key biases, see above
QUICK = ["--opt", "sgd", "--lr", "0.01", "--batch-size", "8", "--workers", "0", "--steps", "6", "--save-seconds", "0"]


def torchrun(
    place: Path,
    images: Path,
    *words: object,
    asked: Sequence[object] | None = None,
    restarts: int = 0,
    kill: bool = True,
    end: str = "",
) -> subprocess.CompletedProcess[str]:
    """The command that is `asked`, or growkit train, on two processes."""
    script = place / "driver.py"
    script.write_text(DRIVER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), "--", str(script), *map(str, (*(asked or training(images)), *words))]
    return subprocess.run(
        command,
        cwd=place,
        env=environment(KILL="1" if kill else "", END=end),
        capture_output=True,
        text=True,
        timeout=300,
    )


def training(images: Path) -> list[str]:
    return ["train", "vit_tiny", *NETWORK, "--data", str(images), "--device", "cpu", *QUICK]


def growkit(*words: object) -> int:
    from growkit_cli.main import app

    try:
        app([*map(str, words)], standalone_mode=False)
    except SystemExit as done:
        return int(done.code or 0)
    return 0


def weights_in(run: Path) -> dict[str, Tensor]:
    return load_file(run / "trained" / "last" / WEIGHTS)


def test_killed_worker_ends_the_job_with_a_clear_error_and_one_process_goes_on(tmp_path: Path, images: Path) -> None:
    done = torchrun(tmp_path, images, "--run", tmp_path / "killed")
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: another process of this run ended")
    assert "--resume goes on" in line
    assert torch.load(tmp_path / "killed/trained/last/state.pt", weights_only=True)["step"] == 3
    growkit(*training(images), "--run", tmp_path / "killed", "--resume")
    growkit(*training(images), "--run", tmp_path / "whole")
    assert furthest(weights_in(tmp_path / "killed"), weights_in(tmp_path / "whole")) < 1e-5
    assert len((tmp_path / "killed/trained/last/metrics.jsonl").read_text().splitlines()) >= 2


def test_sigterm_to_torchrun_saves_what_was_learned_whoever_reads(tmp_path: Path, images: Path) -> None:
    """torchrun passes it on to all processes, to those that read images, too."""
    words = ("--workers", 1, "--steps", 60, "--save-seconds", 300, "--run", tmp_path / "ended")
    done = torchrun(tmp_path, images, *words, kill=False, end="in update 4")
    assert done.returncode != 0
    assert "error: " not in done.stderr
    assert "interrupted; what was learned is saved" in done.stderr
    assert 4 <= torch.load(tmp_path / "ended/trained/last/state.pt", weights_only=True)["step"] < 60


def test_sigterm_to_torchrun_before_training_leaves_nothing_and_says_so(tmp_path: Path, images: Path) -> None:
    done = torchrun(tmp_path, images, "--run", tmp_path / "ended", kill=False, end="before training")
    assert done.returncode != 0
    assert "error: " not in done.stderr
    assert done.stderr.count("interrupted; what was complete before is as it was") == 1
    assert not (tmp_path / "ended").exists()


@pytest.mark.slow  # torchrun starts its workers twice
def test_restarted_workers_go_on_from_the_saved_state(tmp_path: Path, images: Path) -> None:
    done = torchrun(tmp_path, images, "--run", tmp_path / "killed", restarts=1)
    assert done.returncode == 0, done.stderr
    assert "already exists" not in done.stderr
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed/trained/last/metrics.jsonl").open()]
    assert steps == [3, 6]
    growkit(*training(images), "--run", tmp_path / "whole")
    assert furthest(weights_in(tmp_path / "killed"), weights_in(tmp_path / "whole")) < 1e-5
    # a job that was refused at its first attempt is refused at its second
    refused = torchrun(tmp_path, images, "--run", tmp_path / "killed", restarts=1)
    assert refused.returncode != 0
    why = "killed/trained already exists; --resume goes on with it, --force replaces it"
    said = [line for line in refused.stderr.splitlines() if why in line]
    assert sum(line.startswith("error: ") for line in said) == 2
    assert said[-1].startswith("  traceback : error: ")  # of torchrun's summary


@pytest.mark.slow  # five starts of growkit
def test_growing_and_fine_tuning_on_two_processes_give_what_one_gives_though_a_worker_was_killed(
    tmp_path: Path, images: Path
) -> None:
    growkit(*training(images), "--run", tmp_path / "small")
    bigger = [word for key in ("embed_dim=32", "depth=2", "num_heads=4") for word in ("--set", key)]
    common = ["--data", images, "--device", "cpu", *QUICK]
    steps = (
        (["grow", tmp_path / "small" / "trained", "--to", "vit_tiny", *bigger, *common], "grown"),
        (["finetune", *common], "finetuned/last"),
    )
    for asked, stage in steps:
        growkit(*asked, "--run", tmp_path / "one")
        done = torchrun(tmp_path, images, "--run", tmp_path / "two", asked=asked, restarts=1)
        assert done.returncode == 0, done.stderr
        assert "goes on after update 3" in done.stdout
        found, expected = (load_file(tmp_path / run / stage / WEIGHTS) for run in ("two", "one"))
        assert furthest(found, expected) < 1e-5


@pytest.mark.slow  # two starts of torchrun
def test_sharded_training_writes_plain_models_and_growing_refuses_it(tmp_path: Path, images: Path) -> None:
    done = torchrun(tmp_path, images, "--run", tmp_path / "shards", "--shard", kill=False)
    assert done.returncode == 0, done.stderr
    growkit(*training(images), "--run", tmp_path / "whole")
    for stage in ("", "last"):
        found, expected = (load_file(tmp_path / run / "trained" / stage / WEIGHTS) for run in ("shards", "whole"))
        assert furthest(found, expected) < 1e-5
    tune = ["finetune", tmp_path / "whole" / "trained", "--data", images, "--device", "cpu", *QUICK]
    done = torchrun(tmp_path, images, "--run", tmp_path / "shards", "--shard", asked=tune, kill=False)
    assert done.returncode == 0, done.stderr
    growkit(*tune, "--run", tmp_path / "whole")
    starts = [json.loads((tmp_path / run / "finetuned/last/start.json").read_text()) for run in ("shards", "whole")]
    assert starts[0] == pytest.approx(starts[1], rel=1e-5)
    words = ("grow", tmp_path / "whole/trained", "--to", "vit_tiny", *NETWORK, "--data", images, "--shard")
    with pytest.raises(GrowkitError, match="--shard: every process holds the whole target"):
        growkit(*words, "--run", tmp_path / "grown")


@pytest.mark.parametrize(
    ("how", "device", "status"),
    [("done", "cpu", 0), ("left", "cpu", 1), ("refused", "cpu", 1), ("refused", "cuda", 1)],
)
def test_no_thread_of_gloo_outlives_the_interpreter(
    how: str, device: str, status: int, two: Callable[..., Any]
) -> None:
    """One that does ends the process by SIGABRT, in one of some thirty."""
    told, statuses = two("leave", how, device)
    assert told == [("aborted\n" if device == "cuda" else "") + "False\n"] * 2
    assert statuses == [status] * 2


def test_workers_find_each_other_though_their_hosts_count_restarts_differently(two: Callable[..., Any]) -> None:
    """The torchrun of a host whose worker died counts a restart; those that restart theirs to join it do not."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for counts in (("0", "0"), ("0", "1")):  # in one store, with the addresses of those before
        others = [{"TORCHELASTIC_RESTART_COUNT": n, "TORCHELASTIC_USE_AGENT_STORE": "True"} for n in counts]
        assert two("leave", "done", "cpu", port=store.port, others=others)[1] == [0, 0]


@pytest.mark.parametrize(("raised", "done"), [(typer.Exit(130), True), (GrowkitError("no"), False)])
def test_processes_that_were_stopped_leave_as_those_that_are_done(
    raised: Exception, done: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an error NCCL is aborted: the others may not come. After a stop they do."""
    left: list[bool] = []

    @contextmanager
    def noting(device: torch.device) -> Iterator[None]:
        left.append(False)
        yield
        left[0] = True

    def command(**_: object) -> None:
        raise raised

    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr(distributed, "joined", noting)
    monkeypatch.setattr(distributed, "first_to_say", lambda _: True)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(type(raised)):
            on_processes(command)(device="cpu")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert left == [done]
    assert (tmp_path / "error.json").exists() != done
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    assert ("traceback : error: no\n" in ChildFailedError("growkit", {0: failure}).format_msg()) != done


@pytest.mark.parametrize("command", ["compare", "export", "sweep"])
def test_other_commands_refuse_several_processes(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from growkit_cli.main import app, main

    words = [command, "a", "--to", "b", "--data", "c"]
    monkeypatch.setattr(sys, "argv", ["growkit", *words])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as left:
            main()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN  # which torchrun may send before it has spoken
    finally:
        signal.signal(signal.SIGTERM, before)
    line = f"error: growkit {command} runs in one process; start it without torchrun\n"
    assert (left.value.code, capsys.readouterr().err) == (2, line)
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    assert f"traceback : {line}" in ChildFailedError("growkit", {0: failure}).format_msg()
    (tmp_path / "error.json").unlink()
    monkeypatch.setenv("RANK", "1")  # of several processes one speaks; torchrun's summary may end with any
    try:
        assert app(words, standalone_mode=False) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "runs in one process" in (tmp_path / "error.json").read_text()


def test_device_under_torchrun_is_the_process_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert {str(pick_device(name)) for name in ("auto", "cuda")} == {"cuda:1"}
    assert set(current) == {torch.device("cuda:1")}
    with pytest.raises(GrowkitError, match="--device cuda:0: torchrun gives each process a GPU of its own"):
        pick_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(GrowkitError, match="torch sees 1 CUDA devices here; start as many with --nproc-per-node"):
        pick_device("cuda")
