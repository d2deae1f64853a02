"""What a stream's last stack residuals say of the steps to come: the weights of a reused step's sum."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import FORECASTS
from .kernels import keep

DAMPED = 0.7  # the slope until one has been fitted: a whole one overshoots where gaps grow
STEEPEST = 1.5


class History:
    """The residuals that one stream's blocks added at the last computed steps.

    With r1, r0 and r the last three, newest first, kept at steps n1, n0 and n, and m the step to come, at the place
    u = (m - n1) / (n1 - n0)::

        fitted       r1 + w u (r1 - r0),    w = <r1 - r0, r0 - r> / <r0 - r, r0 - r> (n0 - n) / (n1 - n0)
        quadratic    the mean of w = 1 and of the parabola through the three

    The slope w is what would have been right at step n1: for each sample, clipped to [0, 1.5], fitted on the device
    in the pass that stores the residual. Ranks that hold parts of a sample fit each their own.

    Attributes:
        tensors: the residuals, [B, ...], newest first.
        weights: float32 [B, n] or [n] for the step aimed at, or None: the newest as it is.
    """

    def __init__(self, forecast: str):
        self.forecast = forecast
        self.kept: tuple[Tensor, ...] = ()
        self.steps: list[int] = []
        self.weights: Tensor | None = None
        self._slope: Tensor | None = None

    @property
    def slope(self) -> Tensor | None:
        """Fitted for each sample at the step stored last, of the change a step; None where none was."""
        return self._slope if len(self.steps) == 3 else None

    def tensors(self) -> tuple[Tensor, ...]:
        return self.kept

    def store(self, output: Tensor, input: Tensor, step: int) -> Tensor:
        """Keep `output - input` of a computed step; a number that is finite if all of it is."""
        depth = FORECASTS[self.forecast]
        self.kept, sums = keep(output, input, self.kept, depth=depth)
        self.steps = [step, *self.steps][:3]
        if self.forecast == "fitted":
            if len(self.steps) == 3:
                n1, n0, n = self.steps
                slope = sums[:, 0] / sums[:, 1] * ((n0 - n) / (n1 - n0))
                self._slope = torch.nan_to_num(slope, 0.0, STEEPEST, 0.0).clamp_(0, STEEPEST)
            else:
                self._slope = torch.full_like(sums[:, 0], DAMPED)
        return sums[:, 4].sum()

    def aim(self, step: int) -> None:
        """Set the weights for a reused step."""
        if len(self.kept) == 1:
            return
        n1, n0 = self.steps[:2]
        ahead = (step - n1) / (n1 - n0)
        if self.forecast == "fitted":
            change = self._slope * ahead
            self.weights = torch.stack([1 + change, -change], 1)
        else:
            line, (like, *_) = (1 + ahead, -ahead, 0.0), self.kept
            weights = [(a + b) / 2 for a, b in zip(line, parabola(step, self.steps))] if len(self.kept) == 3 else line
            # Filled in on the device: a copy from the host would wait for it.
            self.weights = torch.empty(len(self.kept), dtype=torch.float32, device=like.device)
            for i, weight in enumerate(weights[: len(self.kept)]):
                self.weights[i].fill_(weight)


def parabola(x: float, places: list[int]) -> list[float]:
    """Weights of the values at three places whose parabola is wanted at x (Lagrange)."""
    weights = []
    for i, a in enumerate(places):
        b, c = places[:i] + places[i + 1 :]
        weights.append((x - b) * (x - c) / ((a - b) * (a - c)))
    return weights
