"""One place that knows where a run is: its schedule, its guidance branches, and what each of them keeps."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from .config import AdaCacheConfig
from .kernels import residual_stats
from .schedule import Schedule, Step

MAX_BRANCHES = 8  # calls a step; a loop that never tells its steps would keep a residual for each


class Mode(Enum):
    """What a forward does."""

    PLAIN = "plain"  # as if there were no cache
    COMPUTE = "compute"
    REUSE = "reuse"


@dataclass
class Branch:
    """What is kept for one guidance branch, that is for one of the transformer's calls in a step.

    Attributes:
        signature: shapes, dtypes and devices of the call's tensors; another signature is another video.
        stack_residual: what the whole block stack added at step `computed`.
        probe_residual: the probe's attention residual of that step, [B, T, S, C].
        computed: the step that both are of; 0 before the first.
    """

    signature: tuple
    stack_residual: Tensor | None = None
    probe_residual: Tensor | None = None
    computed: int = 0

    @property
    def nbytes(self) -> int:
        kept = (self.stack_residual, self.probe_residual)
        return sum(t.numel() * t.element_size() for t in kept if t is not None)


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
        self.branches: dict[int, Branch] = {}
        self.branch: Branch | None = None
        self.kept_bytes = 0  # the most that this run kept at a time
        self._generation = 0
        self._compared = 0  # the computed step before the one begun last
        self._sums: Tensor | None = None  # what this forward's probe measured
        self._pending: list[Readback] = []  # the sums of each branch measured at the last computed step

    def begin(self, arguments: Mapping[str, Any]) -> Mode:
        """Start a forward: find its run, step and branch, and say what it does."""
        moment = self.clock.read(arguments)
        if moment.generation != self._generation:
            self.forget()
            self._generation, self.kept_bytes, self._compared = moment.generation, 0, 0
            # Of fewer than three steps all would be computed.
            self.schedule = Schedule(self.config, moment.num_steps) if moment.num_steps >= 3 else None
        if self.schedule is None or moment.step > moment.num_steps or moment.call > MAX_BRANCHES:
            return Mode.PLAIN
        schedule = self.schedule
        if not schedule.steps or moment.step != schedule.steps[-1].step:
            self._settle(schedule)
            self._pending = []
            self._compared = schedule.computed
            schedule.begin(moment.step)
        signature = tuple((t.shape, t.dtype, t.device) for t in arguments.values() if isinstance(t, Tensor))
        self.branch = self.branches.get(moment.call)
        if self.branch is None or self.branch.signature != signature:
            self.branch = self.branches[moment.call] = Branch(signature)
        if not schedule.steps[-1].computed:
            if self.branch.stack_residual is not None and self.branch.computed == schedule.computed:
                return Mode.REUSE
            schedule.restart()  # nothing is kept, or it is older than what the other branches reuse
        self.branch.stack_residual = None  # free it before the blocks run
        if self.branch.computed != self._compared:
            self.branch.probe_residual = None
        return Mode.COMPUTE

    def observe(self, residual: Tensor) -> None:
        """Measure the probe's residual [B, T, S, C] of a computed step against the kept one, and keep it."""
        if self.branch.probe_residual is not None:
            strides = self.config.motion.frame_strides if self.config.motion else ()
            self._sums = residual_stats(residual, self.branch.probe_residual, frame_strides=strides).sum(0)
        self.branch.probe_residual = residual

    def keep(self, residual: Tensor) -> None:
        """Keep the stack residual of a computed step."""
        branch, schedule = self.branch, self.schedule
        branch.stack_residual, branch.computed = residual, schedule.computed
        self.kept_bytes = max(self.kept_bytes, sum(b.nbytes for b in self.branches.values()))
        if self._sums is not None:
            # 0, or NaN where any value is not finite: a broken residual breaks the distance, and rate 1 follows.
            check = residual.sum(dtype=torch.float32) * 0
            self._pending.append(Readback(self._sums + check))
            self._sums = None
        if schedule.steps[-1].step == schedule.num_steps:
            branch.stack_residual = branch.probe_residual = None  # the run is over

    def steps(self) -> list[Step]:
        """The records of the run so far, what was measured last included."""
        schedule = copy.deepcopy(self.schedule)  # decided here, the other branches of the step would be left out
        if schedule is None:
            return []
        self._settle(schedule)
        return schedule.steps

    def _settle(self, schedule: Schedule) -> None:
        """Decide on what the last computed step measured, all branches together."""
        if self._pending and schedule.steps[-1].reason != "restart":
            rows = [readback.tolist() for readback in self._pending]
            schedule.decide([sum(column) for column in zip(*rows)])

    def forget(self) -> None:
        """Drop all that is kept: the next forward computes. The records stay until the next run."""
        self.branches.clear()
        self.branch, self._sums, self._pending = None, None, []
