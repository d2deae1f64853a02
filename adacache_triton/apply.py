"""The public entry: cache a pipeline's transformer, or a bare one, and get a handle back."""

from __future__ import annotations

import weakref
from contextlib import contextmanager

from torch import nn

from .clock import PipelineClock, TimestepClock
from .config import AdaCacheConfig
from .hooks import StackHook
from .models import stack_of
from .report import Report
from .schedule import Step
from .session import Session
from .stack import BlockStack, Located

_MARK = "_adacache_handle"


class AdaCacheHandle:
    """A cached transformer: what it did, and the way back."""

    def __init__(self, transformer: nn.Module, config: AdaCacheConfig, located: Located, clock):
        self.config, self._clock = config, clock
        self._transformer = weakref.ref(transformer)
        self._session = Session(config, clock)
        self._hook = StackHook(transformer, located, self._session)
        self._removed: Report | None = None  # the last report of a handle that was removed
        setattr(transformer, _MARK, self)

    def __reduce__(self):
        return type(None), ()  # a copied or pickled transformer is not cached

    def report(self) -> Report:
        """What the run in progress, or the last one, did so far. Reads measured values from the device."""
        if self._removed is not None:
            return self._removed
        schedule = self._session.schedule
        num_steps = schedule.num_steps if schedule else 0
        return Report(num_steps, tuple(self._session.steps()), self._session.kept_bytes)

    @property
    def current(self) -> Step | None:
        """The record of the step begun last; None before the first. Nothing is read from the device."""
        schedule = self._session.schedule
        return schedule.steps[-1] if schedule and schedule.steps else None

    def reset(self) -> None:
        """Drop what is kept: the next forward is computed, as the first of a new run."""
        self._clock.restart()
        self._session.settle()
        self._session.forget()

    @contextmanager
    def run(self):
        """One run of a bare transformer's denoising loop, its forwards counted: no timestep is read.

        Leaving the block, by an exception too, ends the run.
        """
        if not isinstance(self._clock, TimestepClock):
            raise TypeError("run: expected a handle of a bare transformer; a pipeline tells its steps itself")
        if self._clock.counting:
            raise RuntimeError("run: expected no run in progress; leave its `with` block first")
        self.reset()
        self._clock.counting = True
        try:
            yield self
        finally:
            self._clock.counting = False
            self.reset()

    def remove(self) -> None:
        """Take every hook off: model and scheduler are as they were. A second call does nothing."""
        transformer = self._transformer()
        if self._removed is None:
            self._removed = self.report()
            if transformer is not None:
                delattr(transformer, _MARK)
            self._hook.remove()
            self._clock.stop()
            self._session.forget()


def apply_adacache(
    pipeline_or_transformer,
    config: AdaCacheConfig,
    *,
    stack: BlockStack | None = None,
    calls_per_step: int = 1,
) -> AdaCacheHandle:
    """Cache a video diffusion transformer.

    Args:
        pipeline_or_transformer: a diffusers pipeline with `transformer` and `scheduler`, or a transformer.
        config: when to compute; `AdaCacheConfig.official(...)` for the paper's presets. A pipeline says itself
            how many steps a run has; for a bare transformer `config.num_steps` must.
        stack: description of the blocks, for a class that the package does not know.
        calls_per_step: bare transformers only: forwards in one denoising step (2 where the two halves of
            classifier-free guidance are separate calls).

    Returns:
        AdaCacheHandle: `report()`, `reset()`, `remove()`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. Nothing is left applied.
    """
    if not isinstance(config, AdaCacheConfig):
        raise TypeError(f"config: expected an AdaCacheConfig, got {config!r}")
    if isinstance(calls_per_step, bool) or not isinstance(calls_per_step, int) or calls_per_step < 1:
        raise ValueError(f"calls_per_step: expected an integer >= 1, got {calls_per_step!r}")
    pipeline = None if isinstance(pipeline_or_transformer, nn.Module) else pipeline_or_transformer
    transformer = pipeline_or_transformer if pipeline is None else getattr(pipeline, "transformer", None)
    scheduled = pipeline is None or getattr(pipeline, "scheduler", None) is not None
    if not isinstance(transformer, nn.Module) or not scheduled:
        got = type(pipeline_or_transformer).__name__
        raise TypeError(
            "pipeline_or_transformer: expected a transformer, or a pipeline with `transformer` and `scheduler`, "
            f"got {got}"
        )
    if getattr(transformer, _MARK, None) is not None:
        raise ValueError(f"transformer: {type(transformer).__name__} is cached already; remove() that handle first")
    if getattr(transformer, "is_cache_enabled", False):
        raise ValueError("transformer: another cache is enabled; call its disable_cache() first")
    stack = stack or stack_of(transformer)
    located = Located(transformer, stack, config.probe_block)
    if pipeline is not None and config.num_steps is not None:
        expected = "expected None for a pipeline, which says how many steps a run has"
        raise ValueError(f"config.num_steps: {expected}, got {config.num_steps}")
    if pipeline is not None:
        clock = PipelineClock(pipeline)
    elif config.num_steps is None:
        raise ValueError("config.num_steps: expected the number of steps for a bare transformer, got None")
    else:
        clock = TimestepClock(config.num_steps, calls_per_step, stack.timestep)
    return AdaCacheHandle(transformer, config, located, clock)
