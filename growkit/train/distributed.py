"""Training on several processes started by torchrun: ranks, each process's part of a batch, collective operations.

On a single process nothing here communicates: it leads, its part of a batch is the whole batch, and sums are its own.
With several, every process must call the functions below in the same order.
"""

import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from growkit.errors import GrowkitError

T = TypeVar("T")
CPU = torch.device("cpu")
BEGUN = "growkit has begun"  # a key of torchrun's store, which outlives the processes that it restarts


def local_rank() -> int | None:
    """Return this process's rank on its host; None if torchrun did not start it."""
    return int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else None


def size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Rank of this process among them."""
    return dist.get_rank() if dist.is_initialized() else 0


def leads() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Train together with the other processes that torchrun started; does nothing without torchrun.

    Raises:
        GrowkitError: another process ended while this one needed it.
    """
    if local_rank() is None:
        yield
        return
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"  # what is decided on the CPU never waits for the GPU
    done = False
    try:
        with _ended_by_sigterm():
            store, number, count = next(rendezvous("env://"))
            own = PrefixStore(_group_name(store, number, count), store)
            dist.init_process_group(backend, store=own, rank=number, world_size=count)
        yield
        done = True
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        raise GrowkitError(
            "another process of this run ended or cannot be reached; its own output says why. The last saved state is"
            " intact: --resume goes on from there, or begins anew if nothing was saved"
        ) from error
    finally:
        # gloo's threads must not outlive the interpreter, which would end this process by SIGABRT in place of its own
        # status. NCCL, unless it was aborted, would wait for the others, which an error may have ended.
        if dist.is_initialized():
            if dist.group.WORLD is not None and not done and backend != "gloo":
                dist.group.WORLD.abort()
            dist.destroy_process_group()


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM ends this process: no Python handler runs while torch waits for others, which may be gone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _group_name(store: Store, number: int, count: int) -> str:
    """Agree with the other processes on a name that no earlier process knew.

    torchrun keeps one store across restarts, and in it a group would read dead processes' addresses; its count of
    restarts may differ by host. The leader answers questions, old ones too, until all have their answer.
    """
    mine = f"growkit {uuid.uuid4().hex}"
    if number:
        store.set(f"growkit {number} asks", mine)
        name = store.get(mine).decode()
        store.set(f"{name} knows {number}", "")
        return name
    given_up = time.monotonic() + default_pg_timeout.total_seconds()
    while missing := [other for other in range(1, count) if not store.check([f"{mine} knows {other}"])]:
        if time.monotonic() > given_up:
            raise dist.DistStoreError(f"process {missing[0]} did not come")
        for question in (f"growkit {other} asks" for other in missing):
            if store.check([question]):
                store.set(store.get(question).decode(), mine)
        time.sleep(0.05)
    return mine


def _is_lost(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()  # gloo has no error class of its own


def _store() -> Store:
    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=10)))
    return store


def first_to_say(line: str) -> bool:
    """Return whether no other process has said `line` yet; an error may strike one process or all."""
    if local_rank() is None:
        return True
    attempt = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)} of {os.environ['WORLD_SIZE']}"
    try:
        return _store().add(f"growkit {attempt} said {line}", 1) == 1
    except RuntimeError:  # the store is gone with its host
        return True


def begin() -> None:
    """Note that from now on the run's folder holds this job's own state; see `restarted`."""
    if local_rank() is not None and leads():
        _store().set(BEGUN, "")


def restarted() -> bool:
    """Return whether torchrun restarted these processes after earlier ones had begun the same work."""
    return local_rank() is not None and by_leader(lambda: _store().check([BEGUN]))


def part(whole: int) -> slice:
    """Return this process's slice of a batch of `whole` images; `refuse_indivisible` ensures that they divide."""
    each = whole // size()
    return slice(rank() * each, (rank() + 1) * each)


def refuse_indivisible(images: int) -> None:
    """Raise GrowkitError where a batch of `images` does not divide among the processes."""
    if images % size():
        able = [count for count in range(1, images + 1) if images % count == 0]
        fewer, more = max(n for n in able if n < size()), min((n for n in able if n > size()), default=None)
        raise GrowkitError(
            f"--batch-size: {images} images do not divide among {size()} processes; start {fewer}"
            f"{f' or {more}' if more else ''} processes, or set --batch-size {max(images // size(), 1) * size()}"
        )


def own_draws() -> tuple[int, ...]:
    """Return extra seed parts that make processes draw differently: the rank; none on the leading process."""
    return (rank(),) if rank() else ()


def anywhere(*wishes: bool) -> list[bool]:
    """Return, for each wish, whether any process has it."""
    if size() == 1:
        return list(wishes)
    found = torch.tensor(wishes, dtype=torch.int32)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return [bool(wish) for wish in found.tolist()]


def least(count: int) -> int:
    """The smallest `count` of any process."""
    if size() == 1:
        return count
    found = torch.tensor(count)
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return int(found)


def largest(count: int) -> int:
    """The largest `count` of any process."""
    return -least(-count)


def gathered(lines: Iterable[str]) -> list[str]:
    """Return the `lines` of all processes in rank order, without duplicates."""
    told: list[Any] = [list(lines)] * size()
    if size() > 1:
        dist.all_gather_object(told, list(lines))
    return list(dict.fromkeys(line for own in told for line in own))


def summed(values: Tensor) -> Tensor:
    """`values`, added up in place over all processes."""
    if size() > 1:
        dist.all_reduce(values)
    return values


def by_leader(act: Callable[[], T]) -> T:
    """Run `act` on the leading process while the others wait; every process returns its result or raises its error."""
    if size() == 1:
        return act()
    told: list[Any] = [None, None]
    if leads():
        try:
            told[0] = act()
        except (GrowkitError, OSError) as error:
            told[1] = error
    dist.broadcast_object_list(told, src=0, device=CPU)
    if told[1] is not None:
        raise told[1]
    return told[0]


def together(model: nn.Module, device: torch.device) -> nn.Module:
    """Return what to call in place of `model` to average gradients over all processes; on one process, `model` itself.

    Raises:
        GrowkitError: the model has state besides parameters, such as running statistics, which would differ by process.
    """
    if size() == 1:
        return model
    if kept := statistics(model):
        raise GrowkitError(f"{kept[0]} is no parameter and would differ by process; train this model on one process")
    if sharded(model):
        return model
    # The only buffers left are a grown model's source weights: the same everywhere, and never sent.
    settled = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, settled)
    place = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=place, gradient_as_bucket_view=True)


def statistics(model: nn.Module) -> list[str]:
    """List the state `model` keeps besides parameters, such as running statistics: every batch changes it."""
    return sorted(model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys())


def syncing_gradients(network: nn.Module, now: bool) -> AbstractContextManager[Any]:
    """Wrap a forward and backward pass: average gradients `now`, or leave that to the update's last batch."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(now)
    return network.no_sync() if isinstance(network, DistributedDataParallel) and not now else nullcontext()


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard the parameters of `model` over the processes, in place and block by block, so that none holds them all.

    Blocks are the members of the model's own module lists, such as timm's `blocks`.

    Raises:
        GrowkitError: torchrun did not start this process.
    """
    if not dist.is_initialized():
        raise GrowkitError("--shard spreads a model over the processes that torchrun starts; start it with torchrun")
    mesh = init_device_mesh(device.type, (size(),))
    lists = (child for child in model.children() if isinstance(child, (nn.Sequential, nn.ModuleList)))
    for part in (*(block for blocks in lists for block in blocks), model):
        # the root is resharded after a forward pass, too: else model.parameters() are not the optimizer's tensors
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


def sharded(model: nn.Module) -> bool:
    """Whether `shard` has spread `model`."""
    return isinstance(model, FSDPModule)


def whole(state: Any) -> Any:
    """Return `state` with sharded tensors gathered on the leading process's CPU; the others get None for them."""
    if isinstance(state, DTensor):
        full = state.full_tensor()
        return full.cpu() if leads() else None
    if isinstance(state, dict):
        return {name: whole(value) for name, value in state.items()}
    return [whole(value) for value in state] if isinstance(state, list) else state


def sharded_like(value: Any, like: Tensor) -> Any:
    """Shard `value` like `like` if both are tensors of the same shape and `like` is sharded."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    mesh = like.device_mesh
    # every process has read the whole value; nothing is sent
    return distribute_tensor(value.to(mesh.device_type), mesh, like.placements, src_data_rank=None)
