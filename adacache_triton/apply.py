"""The public entry: cache a pipeline's transformers, or a bare one, and get a handle back."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch.distributed as dist
from torch import nn

from .advice import advise
from .batch import Batch, warn_elsewhere
from .clock import PipelineClock, TimestepClock
from .config import AdaCacheConfig, _number
from .corrector import Corrector
from .distributed import group_of
from .hooks import StackHook
from .models import stack_of
from .report import Report
from .schedule import Step
from .session import AdaCacheSession
from .stack import BlockStack, Located
from .watched import Watched

_MARK = "_adacache_handle"
FREE = "maybe_free_model_hooks"  # what a diffusers pipeline calls at the end of a call
TRANSFORMERS = ("transformer", "transformer_2")  # the second takes the later steps of a run, as in Wan 2.2


class _Cached:
    """One transformer: its batch and its hooks."""

    def __init__(self, transformer: nn.Module, located: Located, batch: Batch):
        self.model = weakref.ref(_plain(transformer))
        self.batch, self.clock = batch, batch.clock
        self.hook = StackHook(transformer, located, batch)

    def finish(self, *_, **__) -> None:
        """A pipeline's call is over, however far its loop came."""
        self.clock.restart()
        self.batch.settle()
        self.batch.forget()

    def begun(self) -> Iterator[Step]:
        """The record of the step begun last for each video, numbered as the pipeline's steps."""
        for run in self.batch.sessions:
            if run.schedule.steps:
                record = run.schedule.steps[-1]
                yield replace(record, step=record.step + self.batch.earlier)


class AdaCacheHandle:
    """What was cached: what it did, and the way back."""

    def __init__(self, config: AdaCacheConfig, cached: list[_Cached], pipeline=None):
        self.config, self._cached = config, cached
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        if hasattr(pipeline, FREE):
            for each in cached:
                Watched.on(pipeline, FREE, each.finish)
            Watched.on(pipeline, FREE, self._advise)
        self._corrector = Corrector(pipeline, self._computed) if config.correct and pipeline is not None else None
        self._removed: Report | None = None  # the last report of a handle that was removed
        self._advised: set[str] = set()
        for each in cached:
            setattr(each.model(), _MARK, self)

    def __reduce__(self):
        return type(None), ()  # a copied or pickled transformer is not cached

    def _in_run(self) -> list[_Cached]:
        """What took part in the run in progress, or in the last one."""
        latest = max(each.batch.generation for each in self._cached)
        return [each for each in self._cached if latest and each.batch.generation == latest]

    def _computed(self) -> list[bool]:
        """Whether the step begun last was computed, for each run that is in the batch."""
        begun = [list(each.begun()) for each in self._in_run()]
        return [
            r.computed for r in max(begun, key=lambda records: max((r.step for r in records), default=0), default=[])
        ]

    def report(self) -> Report:
        """What the run in progress, or the last one, did so far. Reads measured values from the device."""
        if self._removed is None:
            self._advise()
        return self._removed or self._report()

    def _report(self) -> Report:
        ran = self._in_run()
        num_steps = sum(each.batch.num_steps for each in ran)
        kept = max((each.batch.kept_bytes for each in ran), default=0)
        count = max((len(each.batch.sessions) for each in ran), default=0)
        whole = Report(num_steps, (), kept, self.config.granularity, config=self.config.to_dict())
        videos = []
        for i in range(count):
            runs = [(each.batch.earlier, each.batch.sessions[i]) for each in ran if i < len(each.batch.sessions)]
            steps = tuple(replace(s, step=s.step + earlier) for earlier, run in runs for s in run.steps())
            most = max(run.kept_bytes for _, run in runs)
            videos.append(replace(whole, steps=steps, kept_bytes=most))
        if count == 1:
            return replace(videos[0], videos=tuple(videos)) if self.config.per_video else videos[0]
        return replace(whole, videos=tuple(videos))

    def _advise(self, *_, **__) -> None:
        """Where a run is over: say why caching did not help, each kind once. Not where the hooks have said so."""
        ran = self._in_run()
        if not ran or any(each.hook.warned for each in ran):
            return
        total = max(each.batch.total for each in ran)
        sessions = [session for each in ran for session in each.batch.sessions]
        if sessions and max(each.batch.earlier + s.step for each in ran for s in each.batch.sessions) < total:
            return
        models = [model for each in ran if (model := each.model()) is not None]
        slopes = [slope for session in sessions for slope in session.slopes()]
        scheduler = None if self._pipeline is None else getattr(self._pipeline(), "scheduler", None)
        for kind, message in advise(self._report(), total, self.config, models, scheduler, slopes).items():
            if kind not in self._advised:
                self._advised.add(kind)
                warnings.warn(f"AdaCache: advice: {message}", stacklevel=3)

    @property
    def current(self) -> Step | None:
        """The record of the step begun last; None before the first. Nothing is read from the device.

        Of several videos with schedules of their own, that of one which computed, if any did.
        """
        begun = (record for each in self._in_run() for record in each.begun())
        return max(begun, key=lambda record: (record.step, record.computed), default=None)

    def session(self, num_steps: int) -> AdaCacheSession:
        """The state of one video's run, for a serving loop with a bare transformer.

        Videos come and go between steps, each with its own number of steps: see `step`. Dropping the session frees
        what it keeps.
        """
        return self._serving("session").batch.admit(_number("num_steps", num_steps, 1, integer=True))

    @contextmanager
    def step(self, sessions: Sequence[AdaCacheSession]):
        """A context for one denoising step of these videos: the transformer's calls inside are theirs.

        Sample b of a batch is of video b % V, V the number of sessions: guidance halves lie one after the other. A
        step may call the transformer more than once, for the guidance branches one by one, always in one order or
        under diffusers' `cache_context`. Where it raises, what its sessions keep is dropped, and it may be tried again.

        Raises:
            ValueError: a session twice, of another handle, or one that has had all its steps.
            RuntimeError: another step is in progress.
        """
        cached = self._serving("step")
        with cached.batch.step(sessions):
            try:
                yield
            except BaseException:
                cached.hook.leave()
                raise

    def _serving(self, name: str) -> _Cached:
        cached = self._cached[0]
        if self._removed is not None:
            raise RuntimeError(f"{name}: expected a handle in use, got one that was removed")
        if not isinstance(cached.clock, TimestepClock):
            raise TypeError(f"{name}: expected a handle of a bare transformer; a pipeline tells its steps itself")
        if not self.config.per_video:
            raise ValueError(f"config.per_video: expected True for {name}(), got False")
        return cached

    def reset(self) -> None:
        """Drop what is kept, by sessions too: the next forward is computed, as the first of a new run."""
        for each in self._cached:
            each.finish()
            each.batch.drop()

    @contextmanager
    def run(self):
        """One run of a bare transformer's denoising loop, its forwards counted: no timestep is read.

        Leaving the block, by an exception too, ends the run.
        """
        cached = self._cached[0]
        clock = cached.clock
        if self._removed is not None:
            raise RuntimeError("run: expected a handle in use, got one that was removed")
        if not isinstance(clock, TimestepClock):
            raise TypeError("run: expected a handle of a bare transformer; a pipeline tells its steps itself")
        if clock.counting:
            raise RuntimeError("run: expected no run in progress; leave its `with` block first")
        cached.finish()
        clock.counting = True
        try:
            yield self
        finally:
            clock.counting = False
            cached.finish()
        self._advise()

    def remove(self) -> None:
        """Take every hook off: model and scheduler are as they were. A second call does nothing."""
        if self._removed is None:
            self._removed = self._report()
            if self._corrector is not None:
                self._corrector.remove()
            for each in self._cached:
                model = each.model()
                if model is not None:
                    delattr(model, _MARK)
                each.hook.remove()
                if self._pipeline is not None and self._pipeline() is not None:
                    Watched.off(self._pipeline(), FREE, each.finish)
                    Watched.off(self._pipeline(), FREE, self._advise)
                each.clock.stop()
                each.batch.drop()
            self._advise()


def _plain(transformer: nn.Module) -> nn.Module:
    """The transformer itself where `torch.compile` has wrapped it."""
    return getattr(transformer, "_orig_mod", transformer)


def apply_adacache(
    pipeline_or_transformer,
    config: AdaCacheConfig | None = None,
    *,
    stack: BlockStack | None = None,
    calls_per_step: int | None = None,
    branches_in_batch: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> AdaCacheHandle:
    """Cache a video diffusion transformer.

    Args:
        pipeline_or_transformer: a diffusers pipeline with `transformer` and `scheduler`, or a transformer. Of a
            pipeline with `transformer_2` as well, each is cached for its own share of the steps.
        config: when to compute, and what is reused. None: `AdaCacheConfig.for_speedup(2.5)`, which needs no calibration
            and holds on any model; `AdaCacheConfig.official(...)` for the paper's presets. A pipeline says itself
            how many steps a run has; for a bare transformer `config.num_steps` must, or `AdaCacheHandle.session`.
        stack: description of the blocks, for a class that the package does not know.
        calls_per_step: forwards in every denoising step, in one order: 2 where the two halves of classifier-free
            guidance are separate calls. None: 1 for a bare transformer; a pipeline's calls are told apart by the
            names that it gives them, or by the conditions that it holds on to, and computed where that fails.
        branches_in_batch: guidance branches that a batch holds one after the other, where `config.per_video` and
            nothing tells: 2 for [unconditional.., conditional..], 1 without guidance. A pipeline's own number of
            videos tells, and so do the sessions of `AdaCacheHandle.step`.
        group: the ranks that decide together. None: those of the context or tensor parallelism that diffusers'
            `enable_parallelism` set up, or those that FSDP shards the blocks over, if any; else each rank decides
            alone. With a sequence split in another way, give its group; to decide together with the ranks that run
            the other guidance branch, one that has both.

    Returns:
        AdaCacheHandle: `report()`, `reset()`, `remove()`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. Nothing is left applied.
    """
    if config is None:
        config = AdaCacheConfig.for_speedup(2.5)
    if not isinstance(config, AdaCacheConfig):
        raise TypeError(f"config: expected an AdaCacheConfig or None, got {config!r}")
    for name, count in (("calls_per_step", calls_per_step), ("branches_in_batch", branches_in_batch)):
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(f"{name}: expected an integer >= 1, got {count!r}")
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
    for name, transformer in transformers.items():
        group_of(_plain(transformer), [blocks[0] for blocks in located[name].lists.values()], group)
    if pipeline is not None and config.num_steps is not None:
        expected = "expected None for a pipeline, which says how many steps a run has"
        raise ValueError(f"config.num_steps: {expected}, got {config.num_steps}")
    made_for = getattr(config.schedule, "made_for", None)
    if made_for is not None:
        blocks = {name: sum(map(len, each.lists.values())) for name, each in located.items()}
        scheduler = {} if pipeline is None else {"scheduler": type(pipeline.scheduler).__name__}
        for name, transformer in transformers.items():
            found = dict(transformer=type(_plain(transformer)).__name__, blocks=blocks[name]) | scheduler
            warn_elsewhere(made_for.differences(**found))
    num_steps = config.num_steps or getattr(config.schedule, "num_steps", None)
    if pipeline is None and num_steps is None and not config.per_video:
        raise ValueError("config.num_steps: expected the number of steps for a bare transformer, got None")
    cached = []
    for name, transformer in transformers.items():
        if pipeline is not None:
            clock = PipelineClock(pipeline, _share(pipeline, name), calls_per_step is not None)
        else:
            clock = TimestepClock(num_steps, calls_per_step or 1, located[name].stack.timestep)
        batch = Batch(config, clock, branches_in_batch, group)
        cached.append(_Cached(transformer, located[name], batch))
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
