"""Which generation and which denoising step a forward belongs to: two clocks with the same methods.

`read(arguments)` returns a `Moment`, or None where a forward is none of this loop's. A generation is one run of the
denoising loop; whatever is left of an older one, finished or not, is never used in a newer one. Forwards of different
threads are not of one run.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import get_ident
from typing import Any

from torch import Tensor

from .watched import Watched

PREPARE = "prepare_latents"  # a method of diffusers' pipelines, which returns them, a sample a video


@dataclass(frozen=True)
class Moment:
    """A forward's place: generation, step (from 1), steps of the generation, and call within the step.

    Where two transformers share a generation, step and steps are those of this one, after `earlier` of the other, of
    `total` for both.
    """

    generation: int
    step: int
    num_steps: int
    call: int
    total: int
    earlier: int = 0


class PipelineClock:
    """Follows a pipeline's scheduler: `set_timesteps` starts a generation, `step` ends a denoising step.

    A loop that steps copies of the scheduler (one a frame, say) is followed by the timestep that the pipeline
    shows. No timestep is read in a run, so nothing waits for the device.

    Args:
        pipeline: with `scheduler`.
        promised: whether every step calls the transformer equally often, in one order.
        share: whether a timestep is one of this transformer's, where another takes the rest of a run. None: all are.
    """

    def __init__(self, pipeline, share: Callable[[float], bool] | None = None, promised: bool = False):
        self._pipeline, self._share, self.promised = weakref.ref(pipeline), share, promised
        self._scheduler = None
        self._generation = self._step = self._call = 0
        self._latents: int | None = None  # videos that the pipeline makes at a time
        if hasattr(pipeline, PREPARE):
            Watched.on(pipeline, PREPARE, self._prepared)
        self._watch(pipeline.scheduler)

    def _watch(self, scheduler) -> None:
        self._leave_scheduler()
        self._scheduler = scheduler
        Watched.on(scheduler, "set_timesteps", self._start)
        Watched.on(scheduler, "step", self._advance)
        self._begin()

    def _prepared(self, latents, /, *_, **__) -> None:
        first = latents[0] if isinstance(latents, (list, tuple)) else latents
        self._latents = len(first) if isinstance(first, Tensor) and first.dim() else None

    def videos(self, batch: int) -> int:
        """How many videos a batch of the transformer holds."""
        if self._latents and batch % self._latents == 0:
            return self._latents
        if batch > 1:
            warnings.warn(
                f"AdaCache: how many videos a batch of {batch} holds is not known, so they decide together; say so by "
                "branches_in_batch",
                stacklevel=5,
            )
        return 1

    def _start(self, *_, **__) -> None:
        # Written by a pipeline when its loop begins; what an older run wrote must not count.
        for name in ("_num_timesteps", "_current_timestep"):
            if getattr(self._pipeline(), name, None) is not None:
                setattr(self._pipeline(), name, None)
        self._begin()

    def _begin(self) -> None:
        self.restart()
        self._step = self._call = 0
        self._thread = get_ident()
        # The pipeline's timestep as last seen, whether the scheduler has ended a step since, and which.
        self._shown, self._moved, self._ended = None, False, None
        self._mine = None
        if self._share is not None and self._scheduler.timesteps is not None:
            self._mine = [self._share(t) for t in self._scheduler.timesteps.tolist()]

    def _advance(self, *_, **__) -> None:
        shown = getattr(self._pipeline(), "_current_timestep", None)
        if shown is not None and shown is self._ended:
            return  # a second call of `step` in one denoising step
        self._step, self._call, self._moved, self._ended = self._step + 1, 0, True, shown

    def restart(self) -> None:
        """The next forward begins a generation, at the step where the scheduler is."""
        self._generation += 1

    def abort(self) -> None:
        """A forward raised. The scheduler says what comes next."""

    def read(self, arguments: Mapping[str, Any]) -> Moment | None:
        pipeline = self._pipeline()
        if pipeline is not None and pipeline.scheduler is not self._scheduler:
            self._watch(pipeline.scheduler)  # the user has put another one in, which may have begun already
            begun, skipped = (getattr(self._scheduler, name, None) or 0 for name in ("step_index", "begin_index"))
            self._step = max(begun - skipped, 0)
        if self._thread != get_ident():
            self._thread = get_ident()
            self.restart()
        steps = self._steps(pipeline)
        shown = getattr(pipeline, "_current_timestep", None)
        if shown is not None and shown is self._ended:
            return None  # the pipeline's loop has not gone on since: another one uses its transformer
        if shown is not None and shown is not self._shown:
            if self._shown is not None and not self._moved:
                self._step, self._call = self._step + 1, 0
                if self._step >= steps:  # the next window of a longer video
                    self._step = 0
                    self.restart()
            self._shown, self._moved = shown, False
        self._call += 1
        if self._mine is None:
            return Moment(self._generation, self._step + 1, steps, self._call, steps)
        mine = self._mine[-steps:] if steps else []
        earlier = mine.index(True) if True in mine else 0
        if not (self._step < len(mine) and mine[self._step]):
            return None  # called out of its share
        return Moment(self._generation, sum(mine[: self._step + 1]), sum(mine), self._call, steps, earlier)

    def _steps(self, pipeline) -> int:
        # A pipeline that shortens the scheduler's list (image or video to video) notes what remains, or, run by
        # another pipeline of the same parts, tells the scheduler where it begins.
        steps = getattr(pipeline, "_num_timesteps", None)
        if isinstance(steps, int):
            return steps
        return len(self._scheduler.timesteps) - (getattr(self._scheduler, "begin_index", None) or 0)

    def stop(self) -> None:
        """Leave the pipeline and the scheduler as they were."""
        if self._pipeline() is not None:
            Watched.off(self._pipeline(), PREPARE, self._prepared)
        self._leave_scheduler()

    def _leave_scheduler(self) -> None:
        if self._scheduler is not None:
            Watched.off(self._scheduler, "set_timesteps", self._start)
            Watched.off(self._scheduler, "step", self._advance)


class TimestepClock:
    """For a bare transformer: the step is told by the timestep, or counted inside `counting`.

    A timestep that repeats is another call of the same step, as far as `calls_per_step` allows; one that goes
    on in the run's direction is the next step; any other starts a generation. So a run that was left between two
    forwards and followed by one that begins further on cannot be told from one run: `counting` can, and it does
    not read a timestep, which waits for the device where it lies on one.
    """

    promised = True  # how often a step calls the transformer

    def __init__(self, num_steps: int | None, calls_per_step: int, timestep: str):
        self._num_steps, self._calls, self._timestep = num_steps, calls_per_step, timestep
        self._generation = self._repeats = 0
        self.counting = False
        self.restart()

    def restart(self) -> None:
        """The next forward is the first of a generation."""
        self._generation += 1
        self._step = self._call = 0
        self._thread = get_ident()
        self._value: float | None = None
        self._direction = 0.0

    def abort(self) -> None:
        """A forward raised: whatever comes next is another run."""
        self.restart()

    def videos(self, batch: int) -> int:
        raise ValueError(
            "branches_in_batch: expected how many guidance branches a batch of the bare transformer holds, with "
            "config.per_video; got None"
        )

    def read(self, arguments: Mapping[str, Any]) -> Moment:
        if self._num_steps is None:
            raise ValueError("config.num_steps: expected the number of steps outside of handle.step(), got None")
        if self.counting:
            if self._call in (0, self._calls):
                self._step, self._call = self._step + 1, 0
        elif self._timestep not in arguments:
            raise ValueError(f"{self._timestep}: expected among the arguments of a cached transformer, got none")
        else:
            self._follow(_scalar(arguments[self._timestep]))
        self._call += 1
        return Moment(self._generation, self._step, self._num_steps, self._call, self._num_steps)

    def _follow(self, value: float) -> None:
        if self._thread != get_ident():
            self.restart()
        if value == self._value and self._call < self._calls:
            return
        change = 0.0 if self._value is None else value - self._value
        self._repeats += change == 0 and self._value is not None
        if change == 0 and self._repeats == 2:  # once may be a run that was left and begun again
            warnings.warn(
                f"AdaCache: {self._timestep} repeats, so nothing is reused; where a step calls the transformer more "
                "than once, as for the two halves of guidance, say so by calls_per_step",
                stacklevel=5,
            )
        if change == 0 or change * self._direction < 0:
            self.restart()
        else:
            self._direction = change
        self._value = value
        self._step, self._call = self._step + 1, 0

    def stop(self) -> None:
        """Nothing to leave."""


def _scalar(timestep) -> float:
    """The timestep of a call; of a value a token or a frame the largest, as clean ones stay at 0."""
    return float(timestep.max()) if hasattr(timestep, "max") else float(timestep)
