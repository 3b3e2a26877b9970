"""How a piece of work is asked for: in which run, on what device, what may be replaced, and who hears of it."""

from dataclasses import dataclass

from growkit.files import refuse_both
from growkit.record import RunFolder
from growkit.train.telling import Follow, Say, Tell, silent, unfollowed, unsaid


@dataclass(frozen=True)
class Job:
    """Growing, training or comparing in a run folder, as the commands of those names ask for it.

    device   auto, cpu, cuda or cuda:N
    force    replace what is there
    resume   go on with what was stopped
    say      gets lines for the user
    tell     is told how far long work is
    follow   is told how far one of several runs is

    Raises:
        GrowkitError: both `force` and `resume`.
    """

    run: RunFolder
    device: str = "auto"
    force: bool = False
    resume: bool = False
    say: Say = unsaid
    tell: Tell = silent
    follow: Follow = unfollowed

    def __post_init__(self) -> None:
        refuse_both(self.force, self.resume)
