"""One place that knows where a run is: its schedule, its guidance branches, and what each of them keeps."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from .clock import Moment
from .config import AdaCacheConfig
from .kernels import residual_stats
from .schedule import Schedule, Step

MAX_BRANCHES = 8  # calls a step; a loop that never tells its steps would keep a residual for each


class Mode(Enum):
    """What a forward does."""

    PLAIN = "plain"  # as if there were no cache
    COMPUTE = "compute"
    REUSE = "reuse"


@dataclass(eq=False)
class Branch:
    """What is kept for one guidance branch, that is for one of the transformer's calls in a step.

    Attributes:
        signature: shapes, dtypes, devices and plain values of the call's arguments; another signature is another
            video.
        name: what the pipeline calls it (diffusers' `cache_context`), or None.
        conditions: the tensors besides the latents, as long as the pipeline keeps them: they tell branches apart.
        residuals: what the block stack added at step `computed`, a tensor for each of its streams; what each block
            or module added, where these are cached one by one.
        probes: the probe's attention residual of that step, [B, T, S, C], for each stream.
        held: whether a later call found conditions alive: a pipeline that holds them does so until its run ends.
        computed: the step that both are of; 0 before the first.
        called: the step of the last call.
    """

    signature: tuple
    name: str | None
    conditions: tuple[weakref.ref, ...]
    residuals: dict[Hashable, Any] = field(default_factory=dict)
    probes: dict[int, Tensor] = field(default_factory=dict)
    held: bool = False
    computed: int = 0
    called: int = 0

    @property
    def nbytes(self) -> int:
        tensors = list(self.probes.values())
        for kept in self.residuals.values():
            tensors += [kept] if isinstance(kept, Tensor) else kept.tensors()
        # A probe may be a view of what a module keeps.
        return sum({t.untyped_storage().data_ptr(): t.nbytes for t in tensors}.values())

    def clear(self) -> None:
        self.residuals.clear()
        self.probes.clear()

    def condition(self, tensors: tuple[Tensor, ...]) -> bool | None:
        """Whether a call with these conditions is this branch; None where no tensor outlived its call."""
        alive = [(old(), new) for old, new in zip(self.conditions, tensors) if old() is not None]
        if not alive:
            return False if self.held else None
        return all(old is new for old, new in alive)


@dataclass(frozen=True)
class Call:
    """The arguments of a forward.

    Attributes:
        arguments: by name.
        signature: see `Branch`.
        conditions: the tensors besides the latents and the timesteps.
        name: of the guidance branch, where the pipeline gives one.
    """

    arguments: Mapping[str, Any]
    signature: tuple
    conditions: tuple[Tensor, ...]
    name: str | None = None


class Readback:
    """A few numbers on their way to the host: sent when they are queued on the device, waited for when read."""

    def __init__(self, numbers: Tensor):
        self._host, self._arrived = numbers, None
        if numbers.is_cuda:
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(numbers.device))

    def tolist(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()


class Session:
    """The state of the run in progress, or of the last one.

    For every forward `begin`, then, where it computes, `observe` and `keep` for the branch in `branch`.
    """

    def __init__(self, config: AdaCacheConfig, clock):
        self.config, self.clock = config, clock
        self.schedule: Schedule | None = None
        self.branches: list[Branch] = []  # in the order of their calls
        self.branch: Branch | None = None
        self.kept_bytes = 0  # the most that this run kept at a time
        self.generation = self.num_steps = self.earlier = 0  # as the clock counts them
        self.doubted = False  # whether a call was computed because nothing told whose it was
        self._forget_measured()

    def _forget_measured(self) -> None:
        self._sums: dict[int, Tensor] = {}  # measured by this forward's probe, for each stream
        self._total: Tensor | None = None  # over the branches of the last computed step
        self._readback: Readback | None = None  # of the total; None where none had anything to compare

    @property
    def over(self) -> bool:
        """Whether the step begun last is the last of the run: nothing is kept from then on."""
        steps = self.schedule.steps
        return bool(steps) and steps[-1].step == self.schedule.num_steps

    def begin(self, call: Call) -> Mode:
        """Start a forward: find its run, step and branch, and say what it does."""
        moment = self.clock.read(call.arguments)
        if moment is None:
            return Mode.PLAIN
        if moment.generation != self.generation:
            self.forget()
            self.generation, self.kept_bytes = moment.generation, 0
            self.num_steps, self.earlier = moment.num_steps, moment.earlier
            # Of fewer than three steps all would be computed.
            self.schedule = Schedule(self.config, moment.num_steps) if moment.num_steps >= 3 else None
        if self.schedule is None or moment.step > moment.num_steps or moment.call > MAX_BRANCHES:
            return Mode.PLAIN
        schedule = self.schedule
        if not schedule.steps or moment.step != schedule.steps[-1].step:
            self._settle(schedule)
            self._forget_measured()
            before = schedule.computed
            if schedule.begin(moment.step).computed:
                # A branch that sat out the last computed step has nothing to compare with, or is gone for good.
                self.branches = [b for b in self.branches if b.computed == before]
        self.branch, certain = self._find(call, moment)
        self.branch.called = moment.step
        if not schedule.steps[-1].computed:
            if certain and self.branch.residuals and self.branch.computed == schedule.computed:
                return Mode.REUSE
            self.doubted = self.doubted or not certain
            schedule.restart()  # nothing is kept, or whose it is or how old is in doubt
            self.branch.probes.clear()
        if self.config.granularity != "module":  # whose kept tensors are overwritten in place
            self.branch.residuals.clear()  # freed before the blocks run
        return Mode.COMPUTE

    def _find(self, call: Call, moment: Moment) -> tuple[Branch, bool]:
        """The branch that a call belongs to: by name, by the conditions that it shares, by its place in the step.

        And whether that is certain: of several branches with the same conditions, or none, place alone says which,
        and a call left out would take the next one's residual. It is certain where calls a step are promised.
        """
        if call.name is not None:
            known = [b for b in self.branches if b.name == call.name and b.condition(call.conditions) is not False]
        else:
            known = [b for b in self.branches if b.condition(call.conditions)]
        by_place = not known and call.name is None
        if by_place:
            known = [b for b in self.branches[moment.call - 1 :][:1] if b.condition(call.conditions) is None]
        certain = self.clock.promised or call.name is not None or len(self.branches if by_place else known) <= 1
        found = next((b for b in known if b.called != moment.step), None)
        if found is not None and found.signature == call.signature:
            found.held = found.held or bool(found.condition(call.conditions))
            return found, certain
        branch = Branch(call.signature, call.name, tuple(map(weakref.ref, call.conditions)))
        if found is None:
            self.branches.append(branch)
        else:
            self.branches[self.branches.index(found)] = branch
        return branch, True

    def observe(self, residual: Tensor, stream: int = 0) -> None:
        """Measure the probe's residual [B, T, S, C] of a computed step against the kept one, and keep it.

        Motion is that of the first stream.
        """
        kept, sums = self.branch.probes.get(stream), None
        if kept is not None:
            strides = self.frame_strides if stream == 0 else ()
            sums = residual_stats(residual, kept, frame_strides=strides, metric=self.config.metric)
        self.observed(residual, sums, stream)

    @property
    def frame_strides(self) -> tuple[int, ...]:
        return self.config.motion.frame_strides if self.config.motion else ()

    def observed(self, residual: Tensor, sums: Tensor | None, stream: int = 0) -> None:
        """A probe's residual and its sums [B, columns] against the one kept before, None where there was none."""
        if sums is not None:
            self._sums[stream] = sums.sum(0)
        self.branch.probes[stream] = residual

    def keep(self, residuals: Mapping[Hashable, Any], check: Tensor, streams: int) -> None:
        """Keep the residuals of a computed step, in which so many streams took part. `check` is finite if they are."""
        branch, schedule = self.branch, self.schedule
        branch.residuals, branch.computed = dict(residuals), schedule.computed
        self.kept_bytes = max(self.kept_bytes, sum(b.nbytes for b in self.branches))
        # 0, or NaN where any value is not finite: one broken residual breaks the distance, and rate 1 follows.
        measured = len(self._sums) == streams
        row = check * 0
        if measured:
            row = row + torch.cat([self._sums[i] for i in sorted(self._sums)])
        self._total = row if self._total is None else self._total + row
        if measured or self._readback is not None:
            self._readback = Readback(self._total)
        self._sums = {}
        if self.over:
            branch.clear()  # the run is over

    def steps(self) -> list[Step]:
        """The records of the run so far, what was measured last included."""
        schedule = copy.deepcopy(self.schedule)  # decided here, the other branches of the step would be left out
        if schedule is None:
            return []
        self._settle(schedule)
        return schedule.steps

    def settle(self) -> None:
        """Put what was measured last into the records: the run ends here."""
        if self.schedule is not None:
            self._settle(self.schedule)
            self._forget_measured()

    def _settle(self, schedule: Schedule) -> None:
        """Decide on what the last computed step measured, all branches together."""
        if self._readback is not None and schedule.steps[-1].reason != "restart":
            schedule.decide(self._readback.tolist())

    def drop(self) -> None:
        """What is kept is of other weights than the next step's, or the run was left; that step is computed."""
        if self.schedule is not None and not self.over:
            self.forget()

    def forget(self) -> None:
        """Drop all that is kept: the next forward computes. The records stay until the next run."""
        self.branches, self.branch = [], None
        self._forget_measured()
