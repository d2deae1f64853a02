"""Correction of the latents at a computed step, for what the reused steps before it got wrong."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .watched import Watched

SCHEDULER = "FlowMatchEulerDiscreteScheduler"


class Correction:
    """Of one run of the sampler x' = x + (s' - s) v from noise level s to s', with x = (1 - s) x0 + s noise.

    What the model foretells of the clean sample, y = x - s v, is known at a computed step b, and at the next one, c.
    On the steps m between, y_m came of a forecast; a line from y_b to y_c is nearer the truth, as it knows both
    ends. What that makes of the latents follows by the sampler's own recursion,

        d <- q d + (1 - q) (y_b + (m - b) / (c - b) (y_c - y_b) - y_m),    q = s' / s

    and q d is added to the latents behind step c: y_c is taken as it is, and the rest of x scales with the noise. In
    terms of x0 the recursion is exact, however long the steps (as in DPM-Solver, Lu et al., arXiv 2206.00927).

    It keeps two tensors of the latents' size in float32, and reads nothing from the device.
    """

    def __init__(self):
        self._step = self._gap = 0  # of the last call; steps since b
        self._base: Tensor | None = None  # y_b
        self._restart()

    def _restart(self) -> None:
        # d = a y_b + b (y_c - y_b) / (c - b) - y, the two numbers and the tensor carried from step to step
        self._a = self._b = 0.0
        self._y: Tensor | None = None

    def __call__(self, velocity: Tensor, sample: Tensor, levels: tuple[float, float], step: int, computed: bool):
        """What is to be added to the latents behind this step, float32 of their shape; None for nothing.

        Args:
            velocity: the model's, guided, of the latents' shape.
            sample: the latents before the step.
            levels: of noise, before and after it.
            step: its number; one that does not follow the last call's begins anew.
            computed: whether the transformer's blocks ran for it.
        """
        now, after = levels
        follows = step == self._step + 1 and self._base is not None and self._base.shape == sample.shape
        self._step = step
        if not follows:
            self._base = None
            self._restart()
        if not computed and self._base is None:
            return None
        clean = torch.add(sample.float(), velocity.float(), alpha=-now)
        keep = after / now
        if not computed:
            self._gap += 1
            new = 1 - keep
            self._a = keep * self._a + new
            self._b = keep * self._b + new * self._gap
            self._y = clean.mul_(new) if self._y is None else self._y.mul_(keep).add_(clean, alpha=new)
            return None
        change = None
        if self._y is not None:
            share = self._b / (self._gap + 1)
            change = (self._base * (self._a - share)).add_(clean, alpha=share).sub_(self._y).mul_(keep)
        self._base, self._gap = clean, 0
        self._restart()
        return change


class Corrector:
    """Corrects the runs of a pipeline whose scheduler is diffusers' FlowMatchEulerDiscreteScheduler; others it leaves.

    Args:
        pipeline: with `scheduler`.
        computed: which of the latents' videos were computed at the step that ends: one value for all, or one each.
    """

    def __init__(self, pipeline, computed: Callable[[], Sequence[bool]]):
        self._computed, self._scheduler = computed, weakref.ref(pipeline.scheduler)
        self._tracks: list[Correction] = []
        self._levels: list[float] = []
        Watched.on(pipeline.scheduler, "set_timesteps", self._start)
        Watched.on(pipeline.scheduler, "step", self._correct)

    def _start(self, *_, **__) -> None:
        """A run begins: its noise levels go to the host once, before the loop."""
        self._tracks, self._levels = [], []
        scheduler = self._scheduler()
        config = scheduler.config
        if type(scheduler).__name__ == SCHEDULER and not (config.stochastic_sampling or config.invert_sigmas):
            self._levels = scheduler.sigmas.tolist()

    def _correct(self, result, /, *args, **kwargs):
        names = dict(zip(("model_output", "timestep", "sample"), args)) | kwargs
        velocity, sample = names["model_output"], names["sample"]
        step, computed = self._scheduler().step_index, self._computed()
        apart = len(computed) > 1 and len(computed) == len(sample)
        plain = velocity.shape == sample.shape and names.get("per_token_timesteps") is None
        if not (self._levels and plain and computed and step and (apart or len(set(computed)) == 1)):
            self._tracks = []
            return None
        parts = len(computed) if apart else 1
        if len(self._tracks) != parts:
            self._tracks = [Correction() for _ in range(parts)]
        levels = self._levels[step - 1], self._levels[step]
        latents = result[0]
        rows = zip(velocity.chunk(parts), sample.chunk(parts), computed)
        changes = [track(v, x, levels, step, c) for track, (v, x, c) in zip(self._tracks, rows)]
        for part, change in zip(latents.chunk(parts), changes):
            if change is not None:
                part.copy_(part + change)
        return None

    def remove(self) -> None:
        scheduler = self._scheduler()
        if scheduler is not None:
            Watched.off(scheduler, "set_timesteps", self._start)
            Watched.off(scheduler, "step", self._correct)
