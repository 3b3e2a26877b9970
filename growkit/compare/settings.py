"""Settings of a comparison and a sweep; the command line makes its options from these."""

import re
from dataclasses import dataclass

from growkit.errors import GrowkitError
from growkit.ranges import MOST, option_of, refuse_choice, refuse_outside
from growkit.settings import STAGES, GrowSettings

SCHEMA = 4  # of every file a comparison writes
METRICS = ("top1", "loss")
RANK = re.compile(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){3}|[1-9]\d{0,3}")
SMALLEST_SHARE = 1e-6  # of the images: one of a million
CONTROLS = ("random-pad", "untrained-source", "untrained-operator", "source-longer")


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """How methods are compared. The full budget is what training the target from scratch costs, in FLOPs."""

    methods: str = "mango,ligo,bert2bert,bert2bert:variant=aki,lemon,net2net"
    """Methods, each with its options after colons, as in mango,mango:rank=4:steps=200,bert2bert:variant=aki."""

    controls: str = ",".join(CONTROLS)
    """Controls to run beside them: random-pad, untrained-source, untrained-operator, source-longer; or none."""

    seeds: int = 3
    """Paired repetitions: with one seed, every arm sees the same images in the same order."""

    budgets: str = "0.25,0.5,1"
    """Shares of the full budget to train every arm for, each with its own schedule."""

    lrs: str = "5e-4,1e-3,2e-3"
    """Learning rates; each arm and budget gets the best of them on held-out images, found on the first seed."""

    operator_steps: int = 100
    """Updates of operator training for learned methods; they come out of the budget."""

    operator_lrs: str = "1e-4,1e-3"
    """Learning rates of operator training; each learned method gets the one with the lowest held-out loss after it."""

    hold_out: float = 0.5
    """Share of the validation images used for selection; the others are the test images, scored once, at the end."""

    share: float = 1.0
    """Share of the training images to use."""

    metric: str = "top1"
    """Metric for selection and for savings: top1 or loss."""

    evals: int = 20
    """Evaluations on held-out images along a run of the full budget."""

    source_flops: float | None = None
    """FLOPs the source took to train, for savings that include it; known where growkit trained it."""

    def __post_init__(self) -> None:
        """Raise GrowkitError on a value that no comparison can use, naming the option."""
        refuse_outside(self, "seeds", "operator_steps", least=1)
        refuse_outside(self, "source_flops", least=0, most=1e30)
        _refuse_shared(self)
        shares = numbers("--budgets", self.budgets)
        _require(max(shares) == 1, f"--budgets {self.budgets}: the largest must be 1, the full budget")
        unknown = [name for name in self.listed_controls() if name not in CONTROLS]
        _require(not unknown, f"--controls {','.join(unknown)}: choose from {', '.join(CONTROLS)}, or none")

    def listed_controls(self) -> list[str]:
        """Return the names in `controls`."""
        return [] if self.controls == "none" else [name.strip() for name in self.controls.split(",")]


def numbers(option: str, text: str) -> tuple[float, ...]:
    """The positive numbers of a comma-separated option, ascending.

    Raises:
        GrowkitError: not numbers, not positive, or none.
    """
    try:
        found = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        found = ()
    if not found or not all(0 < number <= MOST for number in found):
        raise GrowkitError(f"{option} {text}: expected numbers above 0, and none above {MOST}, separated by commas")
    return found


def percent(budget: float) -> str:
    """A share of the full budget, to the digit that --budgets gave: 12.5%."""
    return f"{100 * budget:g}%"


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """What a pilot tries. Every trial spends the same FLOPs, operator training included."""

    share: float = 0.1
    """Share of the training images the pilot uses."""

    hold_out: float = 0.5
    """Share of the validation images to score trials on; the others are not used."""

    trials: int = 24
    """Maximum number of different trials; if there are no more combinations than that, all are tried."""

    methods: str = "mango"
    """Methods to try, as in mango,bert2bert:variant=aki; an option given there is fixed for that method."""

    rank_choices: str = "1,2,4"
    """Ranks of Mango's ring to try; x joins one rank per bond, as in 1,4,4x4x1x4."""

    ring_orders: str = "BOLI,BIOL"
    """Ring orders to try, above rank 1."""

    stage_choices: str = "both,width-first,depth-first"
    """Stages to try where width and depth both grow."""

    noises: str = "1,0.1"
    """Noise scales to try, for methods that have noise."""

    operator_steps: str = "0,20,100"
    """Updates of operator training to try; 0 leaves the operator where it starts."""

    operator_lrs: str = "1e-4,1e-3"
    """Learning rates of operator training to try."""

    lrs: str = "3e-4,1e-3,3e-3"
    """Learning rates of fine-tuning to try; training from scratch also gets twice the highest."""

    metric: str = "top1"
    """What trials are judged by: top1 or loss on held-out images."""

    evals: int = 8
    """Evaluations along a trial; losers stop at one of them."""

    def __post_init__(self) -> None:
        """Raise GrowkitError on a value that no sweep can use, naming the option."""
        refuse_outside(self, "trials", least=1)
        _refuse_shared(self)
        try:
            whole = all(0 <= int(part) <= MOST for part in self.operator_steps.split(","))
            scales = all(0 <= float(part) <= MOST for part in self.noises.split(","))
        except ValueError:
            whole = scales = False
        _require(whole and scales, "--operator-steps and --noises: expected numbers of 0 or more, separated by commas")
        for name, right, what in (
            ("rank_choices", RANK.fullmatch, "ranks such as 2, or 4x4x1x4 for each bond alone"),
            ("ring_orders", lambda part: sorted(part) == sorted(GrowSettings.ring_order), "orders of the letters BOLI"),
            ("stage_choices", STAGES.__contains__, f"some of {', '.join(STAGES)}"),
        ):
            given = getattr(self, name)
            _require(
                all(right(part.strip()) for part in given.split(",")),
                f"{option_of(name)} {given}: expected {what}, separated by commas",
            )


def _refuse_shared(settings: CompareSettings | SweepSettings) -> None:
    """Raise GrowkitError on a value of what both have that neither can use."""
    refuse_outside(settings, "evals", least=1)
    refuse_outside(settings, "hold_out", above=0, below=1)
    refuse_outside(settings, "share", least=SMALLEST_SHARE, most=1)
    refuse_choice("--metric", settings.metric, METRICS)
    numbers("--lrs", settings.lrs)
    numbers("--operator-lrs", settings.operator_lrs)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise GrowkitError(message)
