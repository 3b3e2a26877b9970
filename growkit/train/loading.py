"""Worker processes that read a data set image by image and hand it over in batches of uint8 images."""

import atexit
import errno
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from multiprocessing import Pipe, active_children, get_start_method
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate

from growkit.errors import GrowkitError, first_line, is_memory_full
from growkit.pictures import NOT_READABLE, UnreadablePictureError, unreadable
from growkit.seeds import random_kept, seed_all
from growkit.text import some
from growkit.train.erasing import Erased, together
from growkit.train.settings import FitSettings

PATIENCE = 60  # seconds that a worker keeps reading after SIGTERM
SHARED_MEMORY_IS_FULL = ("unable to resize file", "unable to write to file", "unable to allocate shared memory")
MEMORY_ERRORS = (errno.ENOSPC, errno.ENOMEM, errno.EAGAIN)  # when a process is started
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
DYING = 1.0  # seconds within which a process whose pipes closed has ended
BORN = 60.0  # seconds after which a forked process that did not start never will
READING_ON = 20  # seconds to read on after an unreadable image for evaluation, to name others with it
STAND_INS = 10  # images after an unreadable one that are tried in its place; timm's number
log = logging.getLogger(__name__)
_readers: WeakKeyDictionary[BaseProcess, int] = WeakKeyDictionary()  # with the id of the process that started each
_most = [1024]  # workers that the machine was found to support, for this process's later loaders
# Loaders that lost a worker, and errors whose frames hold half-started loaders. They are never freed: when they are
# destroyed, torch would wait for a lock that the dead worker holds, or fail.
_kept: list[Any] = []


class Read(Dataset[Any]):
    """Wraps `dataset` for loaders: gives samples, each with the reason if another one replaces it.

    An error raised in a worker would reach the user as a page of traceback, so reasons travel with the batch. An
    unreadable image is replaced by the next readable one, up to `stand_ins` further on: which one depends on the image
    alone.
    """

    def __init__(self, dataset: Any, stand_ins: int):
        self.dataset, self.stand_ins = dataset, stand_ins

    def __getitems__(self, places: list[Any]) -> list[Any]:
        """Return a whole batch, as loaders ask for it."""
        return [self._read(place) for place in places]

    def _read(self, index: int) -> tuple[Any, str | None]:
        why = None
        for step in range(1 + self.stand_ins):
            place = (index + step) % len(self.dataset)
            try:
                return self.dataset[place], why
            except UnreadablePictureError as error:
                why = why or str(error)
            except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # PIL's, raised through torchvision
                why = why or unreadable(f"image {place}", first_line(error, 160))
        return None, why


class Augmented(Read):
    """Wraps `dataset`, indexed by (epoch, index): an image's random draws depend on these and the seed alone."""

    def __init__(self, dataset: Any, seed: int):
        super().__init__(dataset, STAND_INS)
        self.seed = seed

    def __getitems__(self, places: list[tuple[int, int]]) -> list[Any]:
        """Return a whole batch, with the random state restored only once: that takes NumPy 0.2 ms."""
        with random_kept():
            return [self._draw(epoch, index) for epoch, index in places]

    def _draw(self, epoch: int, index: int) -> Any:
        seed_all(self.seed, "image", epoch, index)
        return self._read(index)


def _collated(read: list[tuple[Any, str | None]]) -> tuple[Any, list[str]]:
    """Collate samples into a batch, with the reasons for replaced ones; if one is missing, return None and why."""
    missing = [why for sample, why in read if sample is None and why]
    if missing:
        return None, missing
    samples = [sample for sample, _ in read]
    if isinstance(samples[0][0], Erased):
        images, labels = (list(part) for part in zip(*samples, strict=True))
        return (together(images), default_collate(labels)), [why for _, why in read if why]
    return default_collate(samples), [why for _, why in read if why]


def loaded(dataset: Read, sampler: Any, settings: FitSettings, *, pin_memory: bool = False) -> Iterator[Any]:
    """Yield batches, each with the reasons for its replaced images.

    If a worker is killed, for lack of memory for example, or finds shared memory full, half as many read on from the
    batch that was due. If one does not start, all are started once more.

    Raises:
        UnreadablePictureError: an image cannot be read, nor can any that may replace it.
        GrowkitError: a worker crashed, as it would again.
    """
    count, due, again = min(settings.workers, len(sampler), _most[0]), 0, True
    while due < len(sampler):
        try:
            batches, readers, born = _begun(dataset, islice(sampler, due, None), count, pin_memory=pin_memory)
        except (OSError, RuntimeError) as error:
            if not count or not (is_memory_full(error) or getattr(error, "errno", None) in MEMORY_ERRORS):
                raise
            _kept.append(error)
            why = getattr(error, "strerror", None) or first_line(error)
            count = _fewer(count, f"a process that reads images cannot begin ({why})")
            continue
        if not born:
            _end(readers)
            _kept.append(batches)
            why = f"a process that reads images did not begin in {BORN:g} s"
            if again:
                log.warning(f"{why}; all are begun once more")
            count, again = count if again else _fewer(count, why), False
            continue
        for _ in range(due, len(sampler)):
            try:
                batch, told = next(batches)
            except Exception as error:  # a dozen kinds: reading what a dead worker sent may need that worker
                if not readers:
                    raise
                full = any(words in str(error) for words in SHARED_MEMORY_IS_FULL)
                dead = [] if full else _dead_of(readers)
                _end(readers)
                _kept.append(batches)
                if not (full or dead):
                    raise
                _refuse_crashed(dead)
                why = "shared memory (/dev/shm) is full" if full else "a process that reads images was killed"
                count = _fewer(count, why)
                break
            if batch is None:
                if dataset.stand_ins:
                    why = f"{told[0]}; nor can the {dataset.stand_ins} images after it be read"
                else:
                    why = _with_others(told, batches)
                # held by the error's frames, they might be left to the collector, which torch stalls for ten seconds
                del batches
                raise UnreadablePictureError(why)
            due += 1
            yield batch, told


def _with_others(told: list[str], batches: Iterator[Any]) -> str:
    """Return the message for the first unreadable image, with the names of others found by reading on for a while."""
    end, others = time.monotonic() + READING_ON, told[1:]
    with suppress(Exception):  # a process that dies now changes nothing
        while time.monotonic() < end:
            batch, more = next(batches)
            others += more if batch is None else []
    if not others:
        return told[0]
    names = [line.partition(NOT_READABLE)[0] for line in others]
    return f"{told[0]}; also unreadable: {some(names, most=20)}"


def _fewer(count: int, why: str) -> int:
    """Halve the number of workers, log that with the reason, and return it."""
    left = _most[0] = count // 2
    instead = f"{left} read on" if left else "images are read without processes of their own"
    log.warning(f"{why}; {instead}. Fewer --workers take less memory")
    return left


def _begun(
    dataset: Read, places: Iterable[Any], count: int, *, pin_memory: bool
) -> tuple[Iterator[Any], list[BaseProcess], bool]:
    """Start `count` workers; return the batches they read at `places`, the workers, and whether all came to life.

    A worker's death shows when its batch is due: torch would raise it wherever the main thread happens to be.
    """
    before, handler = active_children(), signal.getsignal(signal.SIGCHLD)
    heard, cry = Pipe(duplex=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores, as asked
        loader = DataLoader(
            dataset,
            batch_sampler=places,
            collate_fn=_collated,
            num_workers=count,
            pin_memory=pin_memory,
            worker_init_fn=partial(_quiet_worker, cry),
            generator=torch.Generator(),  # else a loader draws from the global one
        )
        try:
            try:
                batches = iter(loader)
            finally:
                if threading.current_thread() is threading.main_thread():  # elsewhere torch sets no handler
                    signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        except (OSError, RuntimeError):  # some may have started
            _end(set(active_children()).difference(before))
            raise
    # multiprocessing.active_children() leaves out those that have ended already
    readers: list[BaseProcess] = getattr(batches, "_workers", [])
    _readers.update(dict.fromkeys(readers, os.getpid()))
    with heard, cry:
        return batches, readers, get_start_method() != "fork" or _all_born(readers, heard)


def _all_born(readers: list[BaseProcess], heard: Connection) -> bool:
    """Return whether all came to life: on Python 3.11 a fork hangs forever if another thread, such as one of torch's,
    happens to hold the interpreter's list of threads (fixed in 3.13)."""
    end, born = time.monotonic() + BORN, 0
    while born < len(readers):
        ready = wait([heard, *(reader.sentinel for reader in readers)], timeout=max(0.0, end - time.monotonic()))
        if heard not in ready:
            return bool(ready)  # one died, which shows when its batch is due
        heard.recv_bytes()
        born += 1
    return True


@atexit.register
def _end_all() -> None:
    """Kill all workers when the main process ends, also by an error: Python sends SIGTERM, after which they read on."""
    _end(reader for reader, owner in _readers.items() if owner == os.getpid())


def _end(readers: Iterable[BaseProcess]) -> None:
    for reader in readers:
        reader.kill()


def _dead_of(readers: Iterable[BaseProcess]) -> list[BaseProcess]:
    """Return the processes that have ended or are about to: their pipes close before they have an exit status."""
    sentinels = wait([reader.sentinel for reader in readers], timeout=DYING)
    dead = [reader for reader in readers if reader.sentinel in sentinels]
    for reader in dead:
        reader.join()
    return dead


def _refuse_crashed(dead: Iterable[BaseProcess]) -> None:
    """Raise GrowkitError if one of the processes crashed in native code."""
    for number in (-(reader.exitcode or 0) for reader in dead):
        if number in CRASHES:
            raise GrowkitError(
                f"a process that reads images crashed ({signal.Signals(number).name}): an image, or the library that"
                " decodes it, is the likely cause; PYTHONFAULTHANDLER=1 in the environment shows where"
            ) from None


def in_order(dataset: Any, stand_ins: int, settings: FitSettings) -> Iterator[Any]:
    """Yield all images of `dataset` once, with a line on each that could not be read."""
    places = torch.arange(len(dataset)).split(256)
    return loaded(Read(dataset, stand_ins), [batch.tolist() for batch in places], settings)


def _quiet_worker(cry: Connection, _: int) -> None:
    """Report that this worker is alive, leave signals to the main process, and stay silent when that one dies.

    The main process ends its workers when it is done with them. torchrun, `timeout` and schedulers send SIGTERM to all
    processes of a job, and training needs its images until it has saved. Python hands images on in a thread of the
    worker, which fails if the main process is killed meanwhile.
    """
    with suppress(OSError):  # without fork nobody listens
        cry.send_bytes(b"born")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(PATIENCE))
    shown = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, EOFError | ConnectionError):
            shown(kind, error, trace)

    sys.excepthook = show
