"""What a job needs besides its settings: run folder, device, what may be replaced, and who is told of progress."""

from dataclasses import dataclass

from growkit.errors import GrowkitError
from growkit.record import RunFolder
from growkit.train.progress import FollowRun, Say, StartProgress, follow_nothing, say_nothing, start_nothing


@dataclass(frozen=True)
class Job:
    """Growing, training or comparing in a run folder, as the commands of those names request it.

    device   auto, cpu, cuda or cuda:N
    force    replace existing output
    resume   continue stopped work
    say      receives lines for the user
    tell     receives the progress of long work
    follow   receives the progress of one of several runs

    Raises:
        GrowkitError: both `force` and `resume`.
    """

    run: RunFolder
    device: str = "auto"
    force: bool = False
    resume: bool = False
    say: Say = say_nothing
    tell: StartProgress = start_nothing
    follow: FollowRun = follow_nothing

    def __post_init__(self) -> None:
        if self.force and self.resume:
            raise GrowkitError("--resume goes on with a run and --force begins it anew: give one of them")
