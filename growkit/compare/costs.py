"""What the arms of a comparison cost in FLOPs, and how many updates a budget pays for; nothing is trained."""

import math
from dataclasses import replace
from typing import Literal

from torch import nn

from growkit.arch import build
from growkit.arch.spec import Architecture
from growkit.compare.arms import LONGER, Arm
from growkit.compare.settings import percent
from growkit.errors import GrowkitError
from growkit.grow import grow, make_method
from growkit.plan import step_flops
from growkit.settings import GrowSettings
from growkit.source import Source
from growkit.train.batch_size import recompute_blocks
from growkit.train.batches import images_per_batch
from growkit.train.data import Data
from growkit.train.length import Length, length_of
from growkit.train.settings import FitSettings


class Costs:
    """What arms cost that grow `source` into `target` on `data`, by `recipe` and with operators by `operator`."""

    def __init__(
        self, source: Source, target: Architecture, data: Data, recipe: FitSettings, operator: FitSettings
    ) -> None:
        self.source, self.target, self.data = source, target, data
        self.recipe, self.operator = recipe, operator
        self._learned: dict[GrowSettings, bool] = {}
        self._prices: dict[GrowSettings | Literal["source", "target"], int] = {}

    @property
    def full(self) -> Length:
        """Length of training from scratch for the full budget."""
        return length_of(self.data, self.recipe)

    def operator_steps(self, arm: Arm) -> int:
        """Number of updates of the arm's operator training; 0 for fixed rules and untrained operators."""
        if arm.grow is None or not self.learned(arm.grow):
            return 0
        steps = self.operator.steps if arm.operator_steps is None else arm.operator_steps
        assert steps is not None
        return steps

    def learned(self, settings: GrowSettings) -> bool:
        """Whether a method has something to train for this pair.

        Raises:
            GrowkitError: it cannot grow this pair.
        """
        if settings not in self._learned:
            method = make_method(self.source.architecture, self.target, settings)
            self._learned[settings] = any(p.requires_grad for p in method.parameters())
        return self._learned[settings]

    def trained(self, arm: Arm) -> Architecture:
        """Architecture that the arm trains: the target, or the source for the control that trains it longer."""
        return self.source.architecture if arm.name == LONGER else self.target

    def operator_flops(self, arm: Arm) -> int:
        """FLOPs of the arm's operator training."""
        steps = self.operator_steps(arm)
        return steps and steps * self.operator_flops_per_step(arm)

    def operator_flops_per_step(self, arm: Arm) -> int:
        """FLOPs of one update of the arm's operator training, for an arm that has one."""
        assert arm.grow is not None
        priced = replace(arm.grow, noise=0.0)  # noise costs nothing
        if priced not in self._prices:
            grown = grow(self.source.architecture, self.target, self.source.state, priced).to("meta")
            self._prices[priced] = self._priced(grown, self.target)
        return self._prices[priced]

    def flops_per_step(self, arm: Arm) -> int:
        """FLOPs of one update of the arm's main training."""
        priced: Literal["source", "target"] = "source" if arm.name == LONGER else "target"
        if priced not in self._prices:
            trained = self.trained(arm)
            self._prices[priced] = self._priced(build(trained.name, trained.arguments, device="meta"), trained)
        return self._prices[priced]

    def _priced(self, model: nn.Module, architecture: Architecture) -> int:
        """FLOPs of an update as `fit` counts it."""
        if self.recipe.grad_checkpointing:
            recompute_blocks(model)
        images = images_per_batch(self.data, self.recipe)
        return step_flops(model, architecture, images, self.recipe.grad_accum_steps)

    def steps_left(self, arm: Arm, flops: float, spent: float) -> int:
        """Updates of main training that `flops` pays for after `spent` FLOPs on the operator; possibly none."""
        return max(0, math.floor((flops - spent) / self.flops_per_step(arm) + 1e-6))  # shares are rounded

    def steps_within(self, arm: Arm, flops: float, spent: float, *, share: float | None = None) -> int:
        """Like `steps_left`, but at least one; `share` says that `flops` are the smallest of a comparison's --budgets.

        Raises:
            GrowkitError: the budget does not pay for one update.
        """
        steps = self.steps_left(arm, flops, spent)
        if steps < 1 and not spent:
            raise GrowkitError(
                f"{arm.name}: a budget of {flops / 1e12:.3g} TFLOP does not pay for one update; train for more "
                "--epochs or --steps, or leave out the smallest of --budgets"
            )
        if steps < 1:
            most = math.floor((flops - self.flops_per_step(arm)) / spent * self.operator_steps(arm))
            # in a comparison, an arm with updates of its own does not heed the option
            option = "--operator-steps" if share is None or arm.operator_steps is None else "steps= in --methods"
            fewer = f"give it fewer {option} (at most {most} here)" if most > 0 else "leave it untrained (steps=0)"
            smallest = f" ({percent(share)} of the full one, the smallest of --budgets)" if share else ""
            whole = "give --budgets 1, " if share and self.steps_left(arm, flops / share, spent) else ""
            raise GrowkitError(
                f"{arm.name}: its operator takes {spent / 1e12:.3g} TFLOP, which leaves nothing of a budget of "
                f"{flops / 1e12:.3g}{smallest}; train for more --epochs or --steps, {whole}or {fewer}"
            )
        return steps
