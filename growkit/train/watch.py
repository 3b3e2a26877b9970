"""Watching a run and stopping it: its records, TensorBoard, Ctrl-C and SIGTERM."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from growkit.errors import GrowkitError, Terminated
from growkit.files import writing
from growkit.train import distributed
from growkit.train.resume import BOARD
from growkit.train.score import Scores
from growkit.train.settings import FitSettings

log = logging.getLogger(__name__)
ANSWERED = 0.5  # seconds after which a signal is answered if the run has not ended
ANSWER = (
    "ending after the current batch or evaluation, with the state saved; a second signal ends at once, with the state"
    " that was saved last"
)


@dataclass(frozen=True)
class StepRecord:
    """A moment of a run: `step` of `total` updates are done. A line of metrics.jsonl.

    loss and lr are those of this update; images_per_second covers the updates since the previous
    record, and is 0 if a resumed run only made up for a missed evaluation; scores are there if the model was evaluated.
    """

    step: int
    total: int
    epoch: float
    loss: float
    lr: float
    images_per_second: float
    scores: Scores | None


class Stop:
    """A signal handler that requests a stop; a second signal stops at once."""

    asked = False
    number: int | None = None  # of the signal
    answer: threading.Timer | None = None
    _raises = False

    def __call__(self, number: int, _: FrameType | None) -> None:
        at_once = self.asked or self._raises
        self.asked, self.number = True, number
        if at_once:
            raise interruption(number)
        if distributed.leads():
            # in a thread: the interrupted code may be in the middle of writing
            self.answer = threading.Timer(ANSWERED, log.warning, [ANSWER])
            self.answer.daemon = True
            self.answer.start()

    @contextmanager
    def raising(self, at_once: bool) -> Iterator[None]:
        """Inside, a signal raises if `at_once`; otherwise it requests a stop."""
        self._raises = at_once
        try:
            yield
        finally:
            self._raises = False


def interruption(number: int | None) -> KeyboardInterrupt:
    """Return the exception for a signal that ends a run."""
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turn Ctrl-C and SIGTERM into a stop request; only the main thread can."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {name: signal.signal(name, stop) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except RuntimeError:  # perhaps from a lost process: torchrun ends the rest, which first say why
        if distributed.size() > 1:
            before[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
        if stop.answer is not None:
            stop.answer.cancel()


def summary_writer() -> Any:
    """Return TensorBoard's SummaryWriter.

    Raises:
        GrowkitError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise GrowkitError("--tensorboard needs the package tensorboard; pip install 'growkit[tensorboard]'") from None
    return SummaryWriter


@contextmanager
def board(settings: FitSettings, folder: Path | None, start: int) -> Iterator[Callable[[StepRecord], None]]:
    """Yield a function that writes a record to TensorBoard, or does nothing if that is off."""
    if not settings.tensorboard or folder is None:
        yield lambda record: None
        return
    place = folder / BOARD
    with writing(place), summary_writer()(str(place), purge_step=start + 1) as writer:

        def show(record: StepRecord) -> None:
            known = ("loss", "lr", *(("images_per_second",) if record.images_per_second else ()))
            scalars = {name: getattr(record, name) for name in known}
            if record.scores is not None:
                scalars |= {f"val/{name}": v for name, v in asdict(record.scores).items()}
            for name, value in scalars.items():
                writer.add_scalar(name, value, record.step)

        yield show
