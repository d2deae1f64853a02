"""Which generation and which denoising step a forward belongs to: two clocks with one method.

`read(arguments)` returns a `Moment`. A generation is one run of the denoising loop; whatever is left of an
older one, finished or not, is never used in a newer one.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Moment:
    """A forward's place: generation, step (from 1), steps of the generation, and call within the step."""

    generation: int
    step: int
    num_steps: int
    call: int


class PipelineClock:
    """Follows a pipeline's scheduler: `set_timesteps` starts a generation, `step` ends a denoising step.

    Nothing is read from the device, and two calls in one step are two guidance branches without guessing.
    """

    def __init__(self, pipeline):
        self._pipeline = weakref.ref(pipeline)
        self._scheduler = None
        self._generation = self._step = self._call = 0
        self._watch(pipeline.scheduler)

    def _watch(self, scheduler) -> None:
        self.stop()
        self._scheduler = scheduler
        scheduler.set_timesteps = _Watched(scheduler, "set_timesteps", self.restart)
        scheduler.step = _Watched(scheduler, "step", self._advance)
        self.restart()

    def restart(self) -> None:
        """The next forward is the first of a generation."""
        self._generation += 1
        self._step = self._call = 0

    def _advance(self) -> None:
        self._step += 1
        self._call = 0

    def read(self, arguments: Mapping[str, Any]) -> Moment:
        pipeline = self._pipeline()
        if pipeline is not None and pipeline.scheduler is not self._scheduler:
            self._watch(pipeline.scheduler)  # the user has put another one in
        self._call += 1
        # Pipelines shorten the scheduler's list (image or video to video) and note the length that remains.
        steps = getattr(pipeline, "_num_timesteps", None)
        if not isinstance(steps, int):
            steps = len(self._scheduler.timesteps)
        return Moment(self._generation, self._step + 1, steps, self._call)

    def stop(self) -> None:
        """Leave the scheduler as it was."""
        for name in ("set_timesteps", "step"):
            if self._scheduler is not None and isinstance(vars(self._scheduler).get(name), _Watched):
                delattr(self._scheduler, name)


class _Watched:
    """A scheduler's method that also tells the clock. A copy of the scheduler gets the plain method back."""

    def __init__(self, scheduler, name: str, tell):
        self._scheduler, self._name, self._tell = weakref.ref(scheduler), name, tell
        self.__wrapped__ = getattr(type(scheduler), name)  # pipelines inspect the signature

    def __call__(self, *args, **kwargs):
        result = self.__wrapped__(self._scheduler(), *args, **kwargs)
        self._tell()
        return result

    def __reduce__(self):
        # Copying and pickling reach the owner first, so this is the plain method of the owner's copy.
        return getattr, (self._scheduler(), self._name)


class TimestepClock:
    """For a bare transformer: the step is told by the timestep, or counted inside `counting`.

    A timestep that repeats is another call of the same step, as far as `calls_per_step` allows; one that goes
    on in the run's direction is the next step; anything else starts a generation. Reading a timestep that
    lies on a GPU waits for the GPU; a pipeline, or `counting`, avoids that.
    """

    def __init__(self, num_steps: int, calls_per_step: int, timestep: str):
        self._num_steps, self._calls, self._name = num_steps, calls_per_step, timestep
        self._generation = 0
        self.counting: bool = False
        self.restart()

    def restart(self) -> None:
        """The next forward is the first of a generation."""
        self._generation += 1
        self._step = self._call = 0
        self._value: float | None = None
        self._direction = 0.0

    def read(self, arguments: Mapping[str, Any]) -> Moment:
        if self.counting:
            if self._call in (0, self._calls):
                self._step, self._call = self._step + 1, 0
        else:
            self._follow(_scalar(arguments[self._name]))
        self._call += 1
        return Moment(self._generation, self._step, self._num_steps, self._call)

    def _follow(self, value: float) -> None:
        if value == self._value and self._call < self._calls:
            return
        change = 0.0 if self._value is None else value - self._value
        if change == 0 or change * self._direction < 0:
            self.restart()
        else:
            self._direction = change
        self._value = value
        self._step, self._call = self._step + 1, 0

    def stop(self) -> None:
        """Nothing to leave."""


def _scalar(timestep) -> float:
    return float(timestep.flatten()[0]) if hasattr(timestep, "flatten") else float(timestep)
