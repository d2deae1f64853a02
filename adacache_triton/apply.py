"""The public entry: cache a pipeline's transformers, or a bare one, and get a handle back."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from .clock import PipelineClock, TimestepClock
from .config import AdaCacheConfig
from .hooks import StackHook
from .models import stack_of
from .report import Report
from .schedule import Step
from .session import Session
from .stack import BlockStack, Located
from .watched import Watched

_MARK = "_adacache_handle"
FREE = "maybe_free_model_hooks"  # what a diffusers pipeline calls at the end of a call
TRANSFORMERS = ("transformer", "transformer_2")  # the second takes the later steps of a run, as in Wan 2.2


class _Cached:
    """One transformer: its session and its hooks."""

    def __init__(self, transformer: nn.Module, located: Located, config: AdaCacheConfig, clock):
        self.model = weakref.ref(_plain(transformer))
        self.clock = clock
        self.session = Session(config, clock)
        self.hook = StackHook(transformer, located, self.session)

    def finish(self, *_, **__) -> None:
        """A pipeline's call is over, however far its loop came."""
        self.clock.restart()
        self.session.settle()
        self.session.forget()

    def steps(self) -> list[Step]:
        """The records so far, numbered as the pipeline's steps."""
        return [replace(s, step=s.step + self.session.earlier) for s in self.session.steps()]


class AdaCacheHandle:
    """What was cached: what it did, and the way back."""

    def __init__(self, config: AdaCacheConfig, cached: list[_Cached], pipeline=None):
        self.config, self._cached = config, cached
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        if hasattr(pipeline, FREE):
            for each in cached:
                Watched.on(pipeline, FREE, each.finish)
        self._removed: Report | None = None  # the last report of a handle that was removed
        for each in cached:
            setattr(each.model(), _MARK, self)

    def __reduce__(self):
        return type(None), ()  # a copied or pickled transformer is not cached

    def _in_run(self) -> list[_Cached]:
        """What took part in the run in progress, or in the last one."""
        latest = max(each.session.generation for each in self._cached)
        return [each for each in self._cached if latest and each.session.generation == latest]

    def report(self) -> Report:
        """What the run in progress, or the last one, did so far. Reads measured values from the device."""
        if self._removed is not None:
            return self._removed
        ran = self._in_run()
        num_steps = sum(each.session.num_steps for each in ran)
        kept = max((each.session.kept_bytes for each in ran), default=0)
        return Report(num_steps, tuple(step for each in ran for step in each.steps()), kept, self.config.granularity)

    @property
    def current(self) -> Step | None:
        """The record of the step begun last; None before the first. Nothing is read from the device."""
        begun = [
            replace(steps[-1], step=steps[-1].step + each.session.earlier)
            for each in self._in_run()
            if each.session.schedule is not None and (steps := each.session.schedule.steps)
        ]
        return max(begun, key=lambda record: record.step, default=None)

    def reset(self) -> None:
        """Drop what is kept: the next forward is computed, as the first of a new run."""
        for each in self._cached:
            each.finish()

    @contextmanager
    def run(self):
        """One run of a bare transformer's denoising loop, its forwards counted: no timestep is read.

        Leaving the block, by an exception too, ends the run.
        """
        clock = self._cached[0].clock
        if not isinstance(clock, TimestepClock):
            raise TypeError("run: expected a handle of a bare transformer; a pipeline tells its steps itself")
        if clock.counting:
            raise RuntimeError("run: expected no run in progress; leave its `with` block first")
        self.reset()
        clock.counting = True
        try:
            yield self
        finally:
            clock.counting = False
            self.reset()

    def remove(self) -> None:
        """Take every hook off: model and scheduler are as they were. A second call does nothing."""
        if self._removed is None:
            self._removed = self.report()
            for each in self._cached:
                model = each.model()
                if model is not None:
                    delattr(model, _MARK)
                each.hook.remove()
                if self._pipeline is not None and self._pipeline() is not None:
                    Watched.off(self._pipeline(), FREE, each.finish)
                each.clock.stop()
                each.session.forget()


def _plain(transformer: nn.Module) -> nn.Module:
    """The transformer itself where `torch.compile` has wrapped it."""
    return getattr(transformer, "_orig_mod", transformer)


def apply_adacache(
    pipeline_or_transformer,
    config: AdaCacheConfig,
    *,
    stack: BlockStack | None = None,
    calls_per_step: int | None = None,
) -> AdaCacheHandle:
    """Cache a video diffusion transformer.

    Args:
        pipeline_or_transformer: a diffusers pipeline with `transformer` and `scheduler`, or a transformer. Of a
            pipeline with `transformer_2` as well, each is cached for its own share of the steps.
        config: when to compute; `AdaCacheConfig.official(...)` for the paper's presets. A pipeline says itself
            how many steps a run has; for a bare transformer `config.num_steps` must.
        stack: description of the blocks, for a class that the package does not know.
        calls_per_step: forwards in every denoising step, in one order: 2 where the two halves of classifier-free
            guidance are separate calls. None: 1 for a bare transformer; a pipeline's calls are told apart by the
            names that it gives them, or by the conditions that it holds on to, and computed where that fails.

    Returns:
        AdaCacheHandle: `report()`, `reset()`, `remove()`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. Nothing is left applied.
    """
    if not isinstance(config, AdaCacheConfig):
        raise TypeError(f"config: expected an AdaCacheConfig, got {config!r}")
    if calls_per_step is not None and (
        isinstance(calls_per_step, bool) or not isinstance(calls_per_step, int) or calls_per_step < 1
    ):
        raise ValueError(f"calls_per_step: expected an integer >= 1, got {calls_per_step!r}")
    pipeline = None if isinstance(pipeline_or_transformer, nn.Module) else pipeline_or_transformer
    transformers = {"transformer": pipeline_or_transformer}
    if pipeline is not None:
        found = {name: getattr(pipeline, name, None) for name in TRANSFORMERS}
        transformers = {name: module for name, module in found.items() if isinstance(module, nn.Module)}
    if not transformers or (pipeline is not None and getattr(pipeline, "scheduler", None) is None):
        got = type(pipeline_or_transformer).__name__
        raise TypeError(
            "pipeline_or_transformer: expected a transformer, or a pipeline with `transformer` and `scheduler`, "
            f"got {got}"
        )
    if len(set(map(id, transformers.values()))) < len(transformers):
        raise ValueError("transformer_2: expected another module than transformer, got the same")
    located = {name: _locate(name, transformer, config, stack) for name, transformer in transformers.items()}
    if pipeline is not None and config.num_steps is not None:
        expected = "expected None for a pipeline, which says how many steps a run has"
        raise ValueError(f"config.num_steps: {expected}, got {config.num_steps}")
    if pipeline is None and config.num_steps is None:
        raise ValueError("config.num_steps: expected the number of steps for a bare transformer, got None")
    cached = []
    for name, transformer in transformers.items():
        if pipeline is not None:
            clock = PipelineClock(pipeline, _share(pipeline, name), calls_per_step is not None)
        else:
            clock = TimestepClock(config.num_steps, calls_per_step or 1, located[name].stack.timestep)
        cached.append(_Cached(transformer, located[name], config, clock))
    return AdaCacheHandle(config, cached, pipeline)


def _locate(name: str, transformer: nn.Module, config: AdaCacheConfig, stack: BlockStack | None) -> Located:
    """The description of a transformer, resolved; every reason not to cache it is raised here."""
    model = _plain(transformer)
    if getattr(model, _MARK, None) is not None:
        raise ValueError(f"{name}: {type(model).__name__} is cached already; remove() that handle first")
    other = _other_cache(model)
    if other is not None:
        raise ValueError(f"{name}: expected no other cache on {type(model).__name__}, got {other}; disable it first")
    located = Located(model, stack or stack_of(model), config.probe_block)
    if config.motion is not None and located.stack.frames is None:
        raise ValueError(
            f"config.motion: expected None for {type(model).__name__}, whose tokens do not lie in frames: "
            "motion cannot be measured"
        )
    modules = located.stack.modules
    for part, _ in config.modules or ():
        if part not in modules:
            raise ValueError(f"config.modules: {type(model).__name__} has {', '.join(modules) or 'none'}, got {part!r}")
    if config.granularity == "module" and not modules:
        raise ValueError(f"config.granularity: no modules are described for {type(model).__name__}, got 'module'")
    return located


def _other_cache(model: nn.Module) -> str | None:
    """What else keeps something from step to step: the configuration of diffusers' `enable_cache`, or a hook."""
    if (config := getattr(model, "_cache_config", None)) is not None:
        return type(config).__name__
    registries = [getattr(module, "_diffusers_hook", None) for module in model.modules()]
    hooks = [hook for registry in registries if registry is not None for hook in registry.hooks.values()]
    return next((type(hook).__name__ for hook in hooks if hook._is_stateful), None)


def _share(pipeline, name: str):
    """Which timesteps are a transformer's own: those above or below the pipeline's boundary, where it has one."""
    ratio = getattr(getattr(pipeline, "config", None), "boundary_ratio", None)
    if ratio is None:
        return None
    boundary = ratio * pipeline.scheduler.config.num_train_timesteps
    return (lambda t: t >= boundary) if name == "transformer" else (lambda t: t < boundary)
