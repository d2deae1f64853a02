"""The state of one run: its schedule, its guidance branches, and what each of them keeps."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from .config import AdaCacheConfig
from .distributed import Shards
from .forecast import History
from .readback import Readback
from .report import Report
from .schedule import Schedule, Step
from .stopwatch import Stopwatch


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
        place: of its call in a step, from 1.
        conditions: the tensors besides the latents, as long as the pipeline keeps them: they tell branches apart.
        residuals: what the block stack added at step `computed`, a tensor for each of its streams; what each block
            or module added, where these are cached one by one.
        probes: the probe's attention residual of that step, [B, T, S, C], for each stream.
        shards: how the tokens lie on several ranks, where frames lie across them and motion is measured.
        held: whether a later call found conditions alive: a pipeline that holds them does so until its run ends.
        computed: the step that both are of; 0 before the first.
        called: the step of the last call.
    """

    signature: tuple
    name: str | None
    place: int
    conditions: tuple[weakref.ref, ...]
    residuals: dict[Hashable, Any] = field(default_factory=dict)
    probes: dict[int, Tensor] = field(default_factory=dict)
    shards: Shards | None = None
    held: bool = False
    computed: int = 0
    called: int = 0

    def tensors(self) -> list[Tensor]:
        """The kept residuals, of whatever granularity."""
        kept = self.residuals.values()
        return [t for each in kept for t in ([each] if isinstance(each, Tensor) else each.tensors())]

    @property
    def nbytes(self) -> int:
        # A probe may be a view of what a module keeps.
        tensors = (*self.tensors(), *self.probes.values())
        return sum({t.untyped_storage().data_ptr(): t.nbytes for t in tensors}.values())

    def clear(self) -> None:
        self.residuals.clear()
        self.probes.clear()

    def aim(self, step: int) -> None:
        """The step that is about to reuse what is kept."""
        for each in self.residuals.values():
            if isinstance(each, History):
                each.aim(step)

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
        batch: samples in it.
        latents: shape of one's latents.
        dtype: of the latents.
        values: the plain ones, by name, but for the timestep.
        tensors: each with its place, and whether its first dimension may be the batch.
        conditions: the tensors besides the latents and the timesteps.
        name: of the guidance branch, where the pipeline gives one.
    """

    arguments: Mapping[str, Any]
    batch: int
    latents: tuple[int, ...]
    dtype: torch.dtype
    values: tuple[tuple[str, Any], ...]
    tensors: tuple[tuple[str, bool, Tensor], ...]
    conditions: tuple[Tensor, ...]
    name: str | None = None

    def signature(self, videos: int) -> tuple:
        """What identifies one of the batch's videos: values, shapes for that video alone, dtypes and devices."""
        alone = {videos: 1, self.batch: self.batch // videos}
        shapes = (
            (alone.get(tensor.shape[0], tensor.shape[0]), *tensor.shape[1:])
            if batched and tensor.dim()
            else tensor.shape
            for _, batched, tensor in self.tensors
        )
        facts = ((place, tensor.dtype, tensor.device) for place, _, tensor in self.tensors)
        return (self.batch // videos, self.values, *zip(facts, shapes))


class AdaCacheSession:
    """One run: of a video that follows its own schedule, or of all videos of a batch that follow one together.

    For every forward `begin`, then, where it computes, `sent` for each stream that was measured, and `keep`.

    Attributes:
        num_steps: denoising steps of the run.
        step: the one begun last, counted from 1; 0 before the first.
        stopwatch: what the transformer's calls of each step took.
        kept_bytes: the most that this run kept at a time.
    """

    def __init__(self, config: AdaCacheConfig, num_steps: int, earlier: int = 0, total: int | None = None):
        self.config, self.num_steps = config, num_steps
        self.schedule = Schedule(config, num_steps, earlier, total)
        self.step = self.kept_bytes = 0
        self.branches: list[Branch] = []
        self.unnamed: int | None = None  # calls of the last step of a serving loop that had no name
        self.branch: Branch | None = None
        self.stopwatch = Stopwatch()
        self.doubted = False  # whether a call was computed because nothing told whose it was
        self._slopes: list[Tensor] = []  # that a forecast fitted to each sample, in the middle half of the run
        self._forget_measured()

    def _forget_measured(self) -> None:
        self._sent: dict[int, tuple[Readback, int]] = {}  # this forward's sums for each stream, by row
        self._measured: list[list[tuple[Readback, int]]] = []  # of the last computed step, for each of its branches
        self._checks: list[tuple[Readback, int]] = []  # finite if what the step kept is, likewise

    @property
    def over(self) -> bool:
        """Whether the step begun last is the last of the run: nothing is kept from then on."""
        return self.step >= self.num_steps

    @property
    def nbytes(self) -> int:
        """What is kept now, over all guidance branches."""
        return sum(branch.nbytes for branch in self.branches)

    def report(self) -> Report:
        """What the run did so far. Reads measured values from the device."""
        return Report(
            self.num_steps, tuple(self.steps()), self.kept_bytes, self.config.granularity, config=self.config.to_dict()
        )

    def begin(self, step: int, place: int, signature: tuple, call: Call, promised: bool) -> Mode:
        """Start a forward: find its branch, and say what it does.

        Args:
            step: from 1.
            place: of the call in the step, from 1.
            signature: of the call's arguments, for this run alone.
            call: its arguments.
            promised: whether every step makes the same calls in one order.
        """
        schedule = self.schedule
        if not schedule.steps or step != schedule.steps[-1].step:
            self._settle(schedule)
            before = schedule.computed
            planned = schedule.begin(step)
            self.step = step
            if not planned.computed and self._broken():
                schedule.restart("not finite")
            if planned.computed:
                self._forget_measured()
                # A branch that sat out the last computed step has nothing to compare with, or is gone for good.
                self.branches = [b for b in self.branches if b.computed == before]
        self.branch, certain = self._find(signature, place, call, promised)
        self.branch.called = step
        if not schedule.steps[-1].computed:
            if certain and self.branch.residuals and self.branch.computed == schedule.computed:
                self.branch.aim(step)
                return Mode.REUSE
            self.doubted = self.doubted or not certain
            schedule.restart(
                "changed" if certain else "doubt"
            )  # nothing is kept, or whose it is or how old is in doubt
            self._forget_measured()
        if schedule.steps[-1].reason == "restart":
            self.branch.clear()
        if self.config.granularity != "module" and self.config.forecast == "none":
            self.branch.residuals.clear()  # freed before the blocks run; others are written over
        return Mode.COMPUTE

    def _find(self, signature: tuple, place: int, call: Call, promised: bool) -> tuple[Branch, bool]:
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
            known = [b for b in self.branches if b.place == place and b.condition(call.conditions) is None]
        certain = promised or call.name is not None or len(self.branches if by_place else known) <= 1
        found = next((b for b in known if b.called != self.step), None)
        if found is not None and found.signature == signature:
            found.held = found.held or bool(found.condition(call.conditions))
            return found, certain
        branch = Branch(signature, call.name, place, tuple(map(weakref.ref, call.conditions)))
        if found is None:
            self.branches.append(branch)
        else:
            self.branches[self.branches.index(found)] = branch
        return branch, True

    def sent(self, stream: int, readback: Readback, row: int) -> None:
        """A stream's sums of this forward are on their way."""
        self._sent[stream] = readback, row

    def keep(self, residuals: Mapping[Hashable, Any], streams: int) -> None:
        """Keep the residuals of a computed step, in which so many streams took part."""
        branch = self.branch
        branch.residuals, branch.computed = dict(residuals), self.schedule.computed
        self.kept_bytes = max(self.kept_bytes, self.nbytes)
        if self.num_steps / 4 < self.step <= self.num_steps * 3 / 4:
            self._slopes += [h.slope for h in residuals.values() if isinstance(h, History) and h.slope is not None]
        if len(self._sent) == streams:
            self._measured.append([self._sent[stream] for stream in sorted(self._sent)])
        self._sent = {}
        if self.over:
            branch.clear()  # the run is over

    def checked(self, readback: Readback, row: int) -> None:
        """Whether what this forward kept is finite is on its way."""
        self._checks.append((readback, row))

    def steps(self) -> list[Step]:
        """The records of the run so far, what was measured last included."""
        schedule = copy.deepcopy(self.schedule)  # decided here, the other branches of the step would be left out
        self._settle(schedule)
        for record in schedule.steps:
            record.seconds = self.stopwatch.seconds(record.step)
        return schedule.steps

    def slopes(self) -> list[float]:
        """What a forecast fitted in the middle half of the run. Reads it from the device."""
        return torch.cat(self._slopes).tolist() if self._slopes else []

    def settle(self) -> None:
        """Put what was measured last into the records: the run ends here."""
        self._settle(self.schedule)
        self._forget_measured()

    def _settle(self, schedule: Schedule) -> None:
        """Decide on what the last computed step measured, all branches together."""
        last = schedule.steps[-1] if schedule.steps else None
        if not self._measured or not last.computed or last.reason == "restart" or last.rate is not None:
            return
        sums: list[float] = []
        for stream in zip(*self._measured):
            sums += map(sum, zip(*(readback.row(i) for readback, i in stream)))
        schedule.decide([math.nan] * len(sums) if self._broken() else sums)

    def _broken(self) -> bool:
        """Whether anything that the last computed step kept is not finite.

        A device that works on its own is asked a step later: it would run dry while the host waited for the end of the
        step just queued. What is reused until then makes nothing worse: a stream that is not finite at the stack's
        exit has made that step's own output so. Only a float16 residual may overflow where its stream does not.
        """
        late = any(readback.late for readback, _ in self._checks)
        if late and self.step <= self.schedule.computed + 1:
            kept = (tensor for branch in self.branches for tensor in branch.tensors())
            if not any(tensor.dtype == torch.float16 for tensor in kept):
                return False
        return not all(math.isfinite(number) for readback, i in self._checks for number in readback.row(i))

    def drop(self) -> None:
        """What is kept is of other weights than the next step's, which is computed."""
        if self.over:
            self.branches = []  # what was measured last is still for the records
        else:
            self.forget()

    def forget(self) -> None:
        """Drop all that is kept: the next forward computes. The records stay."""
        self.branches, self.branch = [], None
        self._forget_measured()
