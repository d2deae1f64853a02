"""What is timed beside each other: no cache, this package, the released code's way, and other packages' caches.

All compute the same steps. A cache that decides at run time pays for its decisions, but what comes of them is replaced
by the row's schedule: with random weights a threshold would say little.

Each is put on a `Loop`'s model. For every run it gets `start(schedule)`, then `tell(step)` before each step, then
`finish()`, which gives the steps that it computed; `remove()` takes it off.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace

import torch
from architectures import Row
from doubles.literal import LiteralRule
from torch import Tensor, nn

from adacache_triton import AdaCacheConfig, FixedSchedule, Schedule, apply_adacache
from adacache_triton.hooks import StackHook
from adacache_triton.models import stack_of
from adacache_triton.stack import Located


class Loop:
    """A denoising loop's model, latents and conditions."""

    def __init__(self, row: Row, device: str, dtype: torch.dtype, small: bool = False):
        self.row, self.device = row, torch.device(device)
        architecture = row.architecture
        video = architecture.shrunk if small else row.video
        torch.manual_seed(0)
        config = {**architecture.config, **(architecture.small if small else {})}
        self.model = architecture.build(device, dtype, **config)
        self.stack = stack_of(self.model)
        noise = functools.partial(torch.randn, device=self.device, dtype=dtype)
        self.latents = noise(1, *architecture.latents(config, video))
        self.conditions = [architecture.condition(config, video, row.samples, noise) for _ in range(row.calls)]
        self.timesteps = torch.linspace(1000, 1, row.steps, device=self.device)
        self._names = ("cond_uncond",) if row.calls == 1 else ("cond", "uncond")
        self._named = hasattr(self.model, "cache_context")

    @property
    def lists(self) -> list[nn.ModuleList]:
        return [self.model.get_submodule(path) for path in self.stack.lists]

    @property
    def weights_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def step(self, latents: Tensor, step: int) -> Tensor:
        """One denoising step: the transformer's calls, guidance, and a small move along its output."""
        row = self.row
        moving = {
            self.stack.input: latents.repeat(row.samples, *[1] * (latents.dim() - 1)),
            self.stack.timestep: self.timesteps[step - 1].expand(row.samples),
        }
        outputs = []
        for name, condition in zip(self._names, self.conditions):
            with self.model.cache_context(name) if self._named else nullcontext():
                output = self.model(**moving, **condition)
            outputs.append(output if isinstance(output, Tensor) else output[0])
        change = torch.cat(outputs)
        if row.branches == 2:
            first, second = change.chunk(2)
            change = second + 4 * (first - second)
        if change.shape != latents.shape:  # a variance beside the noise
            change = change.chunk(2, dim=1)[0]
        return latents + change / row.steps

    @contextmanager
    def emptied(self):
        """No blocks: embedders and head are left."""
        parents = [(self.model.get_submodule(path.rpartition(".")[0]), path) for path in self.stack.lists]
        full = self.lists
        for parent, path in parents:
            parent._modules[path.rpartition(".")[2]] = nn.ModuleList()
        try:
            yield
        finally:
            for (parent, path), blocks in zip(parents, full):
                parent._modules[path.rpartition(".")[2]] = blocks

    @contextmanager
    def compiled(self, backend: str):
        """Blocks compiled one by one, as `compile_repeated_blocks` does; those of a class share their graphs."""
        torch._dynamo.reset()
        blocks = [block for blocks in self.lists for block in blocks]
        for block in blocks:
            block.compile(backend=backend)
        try:
            yield
        finally:
            for block in blocks:
                block._compiled_call_impl = None


class NoCache:
    """The model as it is."""

    name, ours = "no cache", True

    def __init__(self, loop: Loop):
        self.loop, self._told = loop, []

    def start(self, schedule: Sequence[int]) -> None:
        self._told = []

    def tell(self, step: int) -> None:
        self._told.append(step)

    def finish(self) -> list[int]:
        return self._told

    @property
    def kept_bytes(self) -> int:
        """The most that was kept in the run. 0 for what keeps nothing."""
        return 0

    def remove(self) -> None:
        """Leave the model as it was."""


class AdaCache(NoCache):
    """This package. Its decisions are taken, and their rates replaced by those of the schedule."""

    name = "AdaCache"
    handle = None

    def __init__(self, loop: Loop):
        super().__init__(loop)
        self.decisions: list[tuple] = []  # marks before and after each measurement of the probe, by step
        self.mark: Callable | None = None  # set by who wants them
        self._patches = ExitStack()
        self._patches.enter_context(patched(StackHook, "_measure", self._timed))
        self._patches.enter_context(patched(Schedule, "decide", self._listed))

    def config(self, schedule: Sequence[int]) -> AdaCacheConfig:
        return replace(self.loop.row.config, num_steps=self.loop.row.steps)

    def start(self, schedule):
        self._schedule, config = tuple(schedule), self.config(schedule)
        if self.handle is None or self.handle.config != config:
            self._take_off()
            self.handle = apply_adacache(self.loop.model, config, calls_per_step=self.loop.row.calls)
        self._run = self.handle.run()
        self._run.__enter__()
        self.decisions, self._told = [], []

    def finish(self):
        self._run.__exit__(None, None, None)
        return self.handle.report().computed_steps

    @property
    def kept_bytes(self):
        return self.handle.report().kept_bytes

    def remove(self):
        self._take_off()
        self._patches.close()

    def _take_off(self):
        if self.handle is not None:
            self.handle.remove()

    def _timed(self, measure, hook, *args):
        begin = self.mark and self.mark()
        measure(hook, *args)
        if self.mark:
            self.decisions.append((self._told[-1], begin, self.mark()))

    def _listed(self, decide, schedule, sums):
        decide(schedule, sums)
        record = schedule.steps[-1]
        following = next((step for step in self._schedule if step > record.step), schedule.num_steps + 1)
        record.rate = schedule._rate = following - record.step


class Fixed(AdaCache):
    """This package with the schedule as a list: nothing is measured or decided."""

    name = "AdaCache, fixed schedule"

    def config(self, schedule):
        steps = self.loop.row.steps
        return AdaCacheConfig(schedule=FixedSchedule(tuple(schedule), steps), num_steps=steps)


class Released(NoCache):
    """The released code's way: two residuals kept in every block, the decision a chain of host reads in the forward.

    A block of Open-Sora's keeps what its attention added, and what cross-attention and MLP added together. A block of
    another class, for which nothing was released, is cut where its description says that attention has been added;
    its computed step pays for two subtractions that the released code does not need. Whatever else a block returns has
    one residual.
    """

    name, ours = "released code's way", False

    def __init__(self, loop: Loop):
        super().__init__(loop)
        self._located = Located(loop.model, loop.stack, None)
        self._probe = loop.model.get_submodule(self._located.probe_list)[self._located.probe_index]
        self._kept: dict[tuple, tuple[Tensor, ...]] = {}
        self._computes, self._after, self._hooks, self._call = True, None, [], 0
        for path, blocks in zip(loop.stack.lists, loop.lists):
            for block in blocks:
                own = hasattr(block, "attention_residual") and hasattr(block, "rest_residual")
                after = next((m for n in (loop.stack.probe_after, "attn2") if (m := getattr(block, n, None))), None)
                if not own and after is not None:
                    self._hooks.append(after.register_forward_pre_hook(self._see, with_kwargs=True))
                around = self._open_sora if own else self._any
                block.forward = functools.partial(around, path, block, type(block).forward)
        self._before = loop.model.register_forward_pre_hook(self._count)

    def start(self, schedule):
        row = self.loop.row
        motion, codebook = row.config.motion, row.config.codebook
        moreg = dict(
            steps=motion.window, strides=motion.frame_strides, scale=motion.scale, power=motion.power,
            divisor=motion.divisor, gradient_weight=motion.gradient_weight,
        )  # fmt: skip
        self._rules = [
            LiteralRule(list(codebook.thresholds), list(codebook.rates), moreg, row.steps) for _ in range(row.calls)
        ]
        self._schedule = set(schedule)
        self._kept.clear()

    def tell(self, step):
        self._step, self._computes, self._call = step, step in self._schedule, 0

    def finish(self):
        return [row["step"] for row in self._rules[0].trace]

    @property
    def kept_bytes(self):
        return held(self._kept.values())

    def remove(self):
        for hook in (*self._hooks, self._before):
            hook.remove()
        for block in (block for blocks in self.loop.lists for block in blocks):
            del block.forward

    def _count(self, *_):
        self._call += 1

    def _see(self, module, args, kwargs):
        self._after = args[0] if args else kwargs[self.loop.stack.hidden]

    def _decide(self, block, residual: Tensor) -> None:
        if block is not self._probe:
            return
        stack, row = self.loop.stack, self.loop.row
        arguments = {stack.input: self.loop.latents} | self.loop.conditions[0]
        view = stack.view(residual, row.samples, stack.frames(self.loop.model, arguments))
        self._rules[self._call - 1].decide(self._step, view.flatten(1, 2), view.shape[2])

    def _open_sora(self, path, block, forward, x, y, t, mask=None, x_mask=None, t0=None, T=None, S=None):
        key = (self._call, path, id(block))
        if not self._computes:
            attention, rest = self._kept[key]
            return x + attention + rest
        attention = block.attention_residual(x, t, T, S, x_mask, t0)
        x = x + attention
        cross = block.cross_attn(x, y, mask)
        x = x + cross
        mlp = block.mlp_residual(x, t, T, x_mask, t0)
        self._kept[key] = attention, cross + mlp
        self._decide(block, attention)
        return x + mlp

    def _any(self, path, block, forward, *args, **kwargs):
        key, positions = (self._call, path, id(block)), self._located.positions[path]
        inputs = [kwargs[n] if n in kwargs else args[positions[n]] for n in self.loop.stack.carried]
        if not self._computes:
            outputs = [sum(kept, x) for x, kept in zip(inputs, self._kept[key])]
            return outputs[0] if len(outputs) == 1 else tuple(outputs)
        self._after = None
        result = forward(block, *args, **kwargs)
        outputs = [result] if isinstance(result, Tensor) else result
        parts = [[output - x] for x, output in zip(inputs, outputs)]
        if self._after is not None:
            after = self._after.to(outputs[0].dtype)
            parts[0] = [after - inputs[0], outputs[0] - after]
        self._kept[key] = tuple(parts)
        self._decide(block, parts[0][0])
        return result


class FirstBlockCache(NoCache):
    """diffusers': the first block runs on every step, and what it changed is compared by a host read."""

    name, ours = "FirstBlockCache", False

    def __init__(self, loop: Loop):
        from diffusers import FirstBlockCacheConfig
        from diffusers.hooks.first_block_cache import FBCHeadBlockHook

        super().__init__(loop)
        loop.model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        self._patches = ExitStack()
        self._patches.enter_context(patched(FBCHeadBlockHook, "_should_compute_remaining_blocks", self._listed))

    def start(self, schedule):
        self.loop.model._reset_stateful_cache()
        self._schedule, self._computed = set(schedule), []

    def tell(self, step):
        self._step = step

    def finish(self):
        return list(dict.fromkeys(self._computed))

    @property
    def kept_bytes(self):
        hooks = (
            hook
            for module in self.loop.model.modules()
            if hasattr(module, "_diffusers_hook")
            for hook in module._diffusers_hook.hooks.values()
        )
        managers = {id(m): m for hook in hooks if (m := getattr(hook, "state_manager", None)) is not None}
        return held(vars(state).values() for m in managers.values() for state in m._state_cache.values())

    def remove(self):
        self._patches.close()
        self.loop.model.disable_cache()

    def _listed(self, decide, hook, residual):
        decide(hook, residual)
        computes = self._step in self._schedule
        if computes:
            self._computed.append(self._step)
        return computes


class CacheDit(NoCache):
    """cache-dit's DBCache by a mask of steps, which spares it its decisions, and with one block run on every step."""

    name, ours = "cache-dit", False

    def __init__(self, loop: Loop):
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")
        import cache_dit

        super().__init__(loop)
        self._cache_dit = cache_dit
        self._on = False

    def start(self, schedule):
        row = self.loop.row
        self._take_off()
        config = self._cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, num_inference_steps=row.steps, enable_separate_cfg=row.calls == 2,
            steps_computation_mask=[int(step in schedule) for step in range(1, row.steps + 1)],
            steps_computation_policy="static",
        )  # fmt: skip
        self._cache_dit.enable_cache(self.loop.model, cache_config=config)
        self._on, self._told = True, []

    def finish(self):
        cached = {step + 1 for context in self._states for step in context.cached_steps}
        return [step for step in self._told if step not in cached]

    @property
    def kept_bytes(self):
        return held(context.buffers.values() for context in self._states)

    @property
    def _states(self):
        return self.loop.model._context_manager._cached_context_manager.values()

    def remove(self):
        self._take_off()

    def _take_off(self):
        if self._on:
            self._cache_dit.disable_cache(self.loop.model)
            self._on = False


CONTENDERS = (NoCache, AdaCache, Fixed, Released, FirstBlockCache, CacheDit)
COMPILED = (NoCache, AdaCache, FirstBlockCache, CacheDit)  # those that are timed with compiled blocks, too


@contextmanager
def patched(owner: type, name: str, around: Callable):
    """A method called through `around(original, self, ...)`."""
    original = getattr(owner, name)
    setattr(owner, name, torch.compiler.disable(lambda *args: around(original, *args)))  # no graph is to hold it
    try:
        yield
    finally:
        setattr(owner, name, original)


def held(values: Iterable) -> int:
    """Bytes of the tensors in them, whose memory is counted once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(values)}
    return sum(found.values())


def _tensors(value) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif not isinstance(value, (str, bytes, dict)) and isinstance(value, Iterable):
        for item in value:
            yield from _tensors(item)
