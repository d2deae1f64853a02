"""Which generation and which denoising step a forward belongs to: two clocks with the same methods.

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

    No timestep is read, so nothing waits for the device.
    """

    def __init__(self, pipeline):
        self._pipeline = weakref.ref(pipeline)
        self._scheduler = None
        self._generation = self._step = self._call = 0
        self._watch(pipeline.scheduler)

    def _watch(self, scheduler) -> None:
        self.stop()
        self._scheduler = scheduler
        _Watched.on(scheduler, "set_timesteps").listeners.append(self._start)
        _Watched.on(scheduler, "step").listeners.append(self._advance)
        self._start()

    def _start(self) -> None:
        self.restart()
        self._step = self._call = 0
        # Written by a pipeline when its loop begins; what an older run wrote must not count.
        if getattr(self._pipeline(), "_num_timesteps", None) is not None:
            self._pipeline()._num_timesteps = None

    def _advance(self) -> None:
        self._step += 1
        self._call = 0

    def restart(self) -> None:
        """The next forward begins a generation, at the step where the scheduler is."""
        self._generation += 1

    def abort(self) -> None:
        """A forward raised. The scheduler says what comes next."""

    def read(self, arguments: Mapping[str, Any]) -> Moment:
        pipeline = self._pipeline()
        if pipeline is not None and pipeline.scheduler is not self._scheduler:
            self._watch(pipeline.scheduler)  # the user has put another one in
        self._call += 1
        # A pipeline that shortens the scheduler's list (image or video to video) notes what remains, or, run by
        # another pipeline of the same parts, tells the scheduler where it begins.
        steps = getattr(pipeline, "_num_timesteps", None)
        if not isinstance(steps, int):
            steps = len(self._scheduler.timesteps) - (getattr(self._scheduler, "begin_index", None) or 0)
        return Moment(self._generation, self._step + 1, steps, self._call)

    def stop(self) -> None:
        """Leave the scheduler as it was."""
        if self._scheduler is not None:
            _Watched.off(self._scheduler, "set_timesteps", self._start)
            _Watched.off(self._scheduler, "step", self._advance)


class _Watched:
    """A scheduler's method that also tells its listeners, of which every cached pipeline that shares it has one."""

    def __init__(self, scheduler, method: str):
        self.owner, self.method = weakref.ref(scheduler), method
        self.own = method in vars(scheduler)  # somebody had put another method on this scheduler already
        self.__wrapped__ = getattr(scheduler, method)  # pipelines inspect the signature
        self.listeners: list = []

    def __call__(self, *args, **kwargs):
        result = self.__wrapped__(*args, **kwargs)
        for tell in self.listeners:
            tell()
        return result

    def __reduce__(self):
        # Copying and pickling reach the owner first, so this is the plain method of the owner's copy.
        return getattr, (self.owner(), self.method)

    @staticmethod
    def on(scheduler, method: str) -> _Watched:
        if not isinstance(vars(scheduler).get(method), _Watched):
            setattr(scheduler, method, _Watched(scheduler, method))
        return vars(scheduler)[method]

    @staticmethod
    def off(scheduler, method: str, tell) -> None:
        watched = vars(scheduler).get(method)
        if isinstance(watched, _Watched) and tell in watched.listeners:
            watched.listeners.remove(tell)
            if not watched.listeners and watched.own:
                setattr(scheduler, method, watched.__wrapped__)
            elif not watched.listeners:
                delattr(scheduler, method)


class TimestepClock:
    """For a bare transformer: the step is told by the timestep, or counted inside `counting`.

    A timestep that repeats is another call of the same step, as far as `calls_per_step` allows; one that goes
    on in the run's direction is the next step; any other starts a generation. So a run that was left between two
    forwards and followed by one that begins further on cannot be told from one run: `counting` can, and it does
    not read a timestep, which waits for the device where it lies on one.
    """

    def __init__(self, num_steps: int, calls_per_step: int, timestep: str):
        self._num_steps, self._calls, self._timestep = num_steps, calls_per_step, timestep
        self._generation = 0
        self.counting = False
        self.restart()

    def restart(self) -> None:
        """The next forward is the first of a generation."""
        self._generation += 1
        self._step = self._call = 0
        self._value: float | None = None
        self._direction = 0.0

    def abort(self) -> None:
        """A forward raised: whatever comes next is another run."""
        self.restart()

    def read(self, arguments: Mapping[str, Any]) -> Moment:
        if self.counting:
            if self._call in (0, self._calls):
                self._step, self._call = self._step + 1, 0
        elif self._timestep not in arguments:
            raise ValueError(f"{self._timestep}: expected among the arguments of a cached transformer, got none")
        else:
            self._follow(_scalar(arguments[self._timestep]))
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
