"""Watching a run and stopping it: its records, TensorBoard, Ctrl-C and SIGTERM."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from growkit.errors import GrowkitError, Terminated
from growkit.files import writing
from growkit.train.score import Scores
from growkit.train.settings import FitSettings


@dataclass(frozen=True)
class StepRecord:
    """A moment of a run: `step` of `total` updates are done. A line of metrics.jsonl.

    loss is that of this update, lr the one it used; images_per_second covers the updates since the
    record before; scores are there where the model was evaluated.
    """

    step: int
    total: int
    epoch: float
    loss: float
    lr: float
    images_per_second: float
    scores: Scores | None


class Stop:
    """A signal handler that asks for a stop; asked again, it stops at once."""

    asked = False
    number: int | None = None  # of the signal

    def __call__(self, number: int, _: FrameType | None) -> None:
        if self.asked:
            raise interruption(number)
        self.asked, self.number = True, number


def interruption(number: int | None) -> KeyboardInterrupt:
    """What a signal that asks for an end is raised as."""
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turn Ctrl-C and SIGTERM into a request; only the main thread can."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {name: signal.signal(name, stop) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


@contextmanager
def board(settings: FitSettings, folder: Path | None, start: int) -> Iterator[Callable[[StepRecord], None]]:
    """Yield what shows a record in TensorBoard, or does nothing when that was not asked for."""
    if not settings.tensorboard or folder is None:
        yield lambda record: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise GrowkitError("--tensorboard needs the package tensorboard; pip install 'growkit[tensorboard]'") from None
    place = folder / "tensorboard"
    with writing(place), SummaryWriter(str(place), purge_step=start + 1) as writer:

        def show(record: StepRecord) -> None:
            scalars = {name: getattr(record, name) for name in ("loss", "lr", "images_per_second")}
            if record.scores is not None:
                scalars |= {f"val/{name}": v for name, v in asdict(record.scores).items()}
            for name, value in scalars.items():
                writer.add_scalar(name, value, record.step)

        yield show
