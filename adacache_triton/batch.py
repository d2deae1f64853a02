"""The batch at a transformer's door: which videos are in it, which of them compute, and which reuse."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Hashable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Lock, get_ident
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .config import AdaCacheConfig
from .distributed import Shards, motion_sums
from .kernels import residual_stats
from .readback import Readback
from .session import AdaCacheSession, Branch, Call, Mode

MAX_BRANCHES = 8  # calls a step; a loop that never tells its steps would keep a residual for each


def warn_elsewhere(differences: Sequence[str]) -> None:
    """A calibrated schedule is used where it was not searched."""
    if differences:
        warnings.warn(
            f"AdaCache: the schedule was calibrated elsewhere, here: {', '.join(differences)}; run `adacache-triton "
            "calibrate` for this model",
            stacklevel=4,
        )


@dataclass(eq=False)
class Part:
    """The samples of a batch that go through the transformer together: those that compute, or those that reuse.

    Sample b of a part with n sessions is of session b % n: guidance halves lie one after the other.

    Attributes:
        mode: what the forward does.
        sessions: the runs that take part, in the batch's order.
        rows: its samples in the batch.
        videos: sessions in the whole batch.
        apart: whether sessions stand for single videos; else there is one, for the whole batch.
    """

    mode: Mode
    sessions: tuple[AdaCacheSession, ...]
    rows: Sequence[int]
    videos: int
    apart: bool

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Each session's samples of a tensor that holds the part's, as views; frames come out of the batch."""
        if not self.apart:
            return [tensor]
        if len(tensor) % len(self.rows):
            raise ValueError(
                f"config.per_video: expected the batch first in a block's tensors, {len(self.rows)} samples or a "
                f"multiple, got shape {tuple(tensor.shape)}"
            )
        if len(tensor) != len(self.rows):
            tensor = tensor.unflatten(0, (len(self.rows), -1))
        return [tensor[i :: len(self.sessions)] for i in range(len(self.sessions))]


class Batch:
    """What a cached transformer works at: the runs of the videos in its batch.

    For every forward `begin`, then for each `part` of it that computes `observe` and `keep`.

    Attributes:
        sessions: a run for each video, or one for all of them together.
        part: the one that a forward is at.
        kept_bytes: the most that the run in progress, or the last one, kept at a time.
        given: the ranks that decide together as the user says; `group` are those that do.
    """

    def __init__(self, config: AdaCacheConfig, clock, branches: int | None, given: dist.ProcessGroup | None):
        self.config, self.clock, self.given = config, clock, given
        self.group: dist.ProcessGroup | None = None
        self._branches = branches
        self._looked = False  # at the first call, whether the schedule was made for such latents
        self.sessions: list[AdaCacheSession] = []
        self.part: Part | None = None
        self.generation = self.num_steps = self.earlier = self.total = self.kept_bytes = 0  # as the clock counts them
        self._served: weakref.WeakSet[AdaCacheSession] = weakref.WeakSet()  # runs of a serving loop
        self._open: list[AdaCacheSession] | None = None  # those of its step
        self._calls = self._unnamed = self._thread = 0  # in it
        self._lock = Lock()  # other threads may bring new ones

    @property
    def doubted(self) -> bool:
        return any(session.doubted for session in self.sessions)

    @property
    def frame_strides(self) -> tuple[int, ...]:
        return self.config.motion.frame_strides if self.config.motion else ()

    @property
    def branch(self) -> Branch:
        """Of a part with one session: what is kept for this call."""
        (session,) = self.part.sessions
        return session.branch

    def begin(self, call: Call, single: bool = False) -> list[Part]:
        """Start a forward: the parts that it falls into; none where it is as if there were no cache.

        `single`: every video has a part of its own.
        """
        if self._open is not None:
            if get_ident() != self._thread:
                return []  # somebody else's call, of other videos
            self._calls += 1
            self._unnamed += call.name is None
            if self._calls > MAX_BRANCHES:
                raise RuntimeError(f"step: expected at most {MAX_BRANCHES} calls of the transformer, got another one")
            sessions, place, promised = self._open, self._calls, True
            call = replace(call, conditions=())  # of other videos when the batch changes
            steps = [session.step for session in sessions]
        else:
            moment = self.clock.read(call.arguments)
            if moment is None:
                return []
            if moment.generation != self.generation:
                self.generation, self.sessions = moment.generation, []
                self.num_steps, self.earlier, self.kept_bytes = moment.num_steps, moment.earlier, 0
                self.total = moment.total
            # Of fewer than three steps all would be computed.
            if moment.num_steps < 3 or moment.step > moment.num_steps or moment.call > MAX_BRANCHES:
                return []
            videos = self._videos(call.batch)
            if len(self.sessions) != videos:  # at a run's beginning, or in its middle, which is a fresh start
                run = moment.num_steps, moment.earlier, moment.total
                if not self._looked:
                    self._check_latents(call)
                self.sessions = [AdaCacheSession(self.config, *run) for _ in range(videos)]
            sessions, place, promised = self.sessions, moment.call, self.clock.promised
            if self.group is not None:
                call = replace(call, conditions=())  # which tensors are alive, ranks may differ in
            steps = [moment.step] * videos
        videos = len(sessions)
        if call.batch % videos:
            raise ValueError(
                f"batch: expected the samples of {videos} videos, equally many of each, got a batch of {call.batch}"
            )
        samples, signature = call.batch // videos, call.signature(videos)
        modes = [session.begin(step, place, signature, call, promised) for session, step in zip(sessions, steps)]
        groups = [[i] for i in range(videos)]
        if not single:
            groups = [[i for i in range(videos) if modes[i] is mode] for mode in (Mode.COMPUTE, Mode.REUSE)]
        return [
            Part(
                modes[group[0]],
                tuple(sessions[i] for i in group),
                [half * videos + i for half in range(samples) for i in group],
                videos,
                self.config.per_video,
            )
            for group in groups
            if group
        ]

    def _videos(self, batch: int) -> int:
        """How many runs the batch holds: one, or that of its videos."""
        if not self.config.per_video:
            return 1
        if self._branches is not None:
            if batch % self._branches:
                raise ValueError(f"branches_in_batch: expected a divisor of the batch of {batch}, got {self._branches}")
            return batch // self._branches
        return self.clock.videos(batch)

    def _check_latents(self, call: Call) -> None:
        made_for, self._looked = getattr(self.config.schedule, "made_for", None), True
        if made_for is not None:
            warn_elsewhere(made_for.differences(latents=call.latents))

    def admit(self, num_steps: int) -> AdaCacheSession:
        """A new run of a serving loop."""
        session = AdaCacheSession(self.config, num_steps)
        with self._lock:
            self._served.add(session)
        return session

    @contextmanager
    def step(self, sessions: Sequence[AdaCacheSession]):
        """One denoising step of a serving loop, whose calls hold these videos in this order."""
        if self._open is not None:
            raise RuntimeError("step: expected no step in progress; leave its `with` block first")
        if not isinstance(sessions, (list, tuple)):
            raise TypeError(f"sessions: expected a list, got {sessions!r}")
        if not sessions:
            raise ValueError("sessions: expected at least one, got none")
        for i, session in enumerate(sessions):
            if session not in self._served:
                raise ValueError(f"sessions[{i}]: expected one made by this handle's session(), got {session!r}")
            if session in sessions[:i]:
                raise ValueError(f"sessions[{i}]: expected each session once in a step, got one of them again")
            if session.over:
                raise ValueError(f"sessions[{i}]: expected steps to do, got a run that has had its {session.num_steps}")
        for session in sessions:
            session.step += 1
        self._open, self._calls, self._unnamed, self._thread = list(sessions), 0, 0, get_ident()
        try:
            yield
            self._check_calls()
        except BaseException:
            self.forget()
            for session in sessions:
                session.step -= 1  # it may be tried again
            raise
        finally:
            self._open = None
        for session in sessions:
            if session.over:
                session.drop()

    def _check_calls(self) -> None:
        """Calls without a name are told apart by their order: a step must make as many as the one before."""
        for i, session in enumerate(self._open):
            if session.unnamed not in (None, self._unnamed):
                if session.schedule.steps and not session.schedule.steps[-1].computed:
                    raise RuntimeError(
                        f"step: expected {session.unnamed} calls for sessions[{i}], as in its step before, got "
                        f"{self._unnamed}; name them by cache_context, as what they reuse may be another's"
                    )
                session.forget()
            session.unnamed = self._unnamed

    def observe(
        self, residuals: list[Tensor], stream: int, sharded: tuple[dist.ProcessGroup, int] | None = None
    ) -> None:
        """Measure the probe's residuals [G, T, S, C], one a session, against those kept, and keep them.

        Motion is that of the first stream. Where ranks hold runs of its tokens, `sharded` is their group and the
        number of frames of all, and T is 1.
        """
        rows, measured = [], []
        for session, residual in zip(self.part.sessions, residuals):
            branch = session.branch
            kept, branch.probes[stream] = branch.probes.get(stream), residual
            if sharded and branch.shards is None:
                branch.shards = Shards(residual[0, 0].shape[0], sharded[0], residual.device)
            if kept is not None:
                strides = self.frame_strides if stream == 0 and not sharded else ()
                sums = residual_stats(residual, kept, frame_strides=strides, metric=self.config.metric)
                if sharded:
                    sums = torch.cat([sums, self._motion(session, residual.squeeze(1), sharded[1])], 1)
                rows.append(sums)
                measured.append(session)
        self._send(rows, measured, stream)

    def _motion(self, session: AdaCacheSession, residual: Tensor, frames: int) -> Tensor:
        """The motion sums of a run of tokens; nothing goes over the wire where they are not looked at."""
        first, last = self.config.motion.window
        if first <= session.step <= last:
            return motion_sums(residual, session.branch.shards, frames, self.frame_strides)
        return residual.new_zeros(len(residual), 2 * len(self.frame_strides), dtype=torch.float32)

    def observed(self, residual: Tensor, sums: Tensor | None) -> None:
        """A probe's residual and its sums [G, columns] against the one kept before, None where there was none."""
        (session,) = self.part.sessions
        session.branch.probes[0] = residual
        self._send([] if sums is None else [sums], [session], 0)

    def _send(self, sums: list[Tensor], sessions: list[AdaCacheSession], stream: int) -> None:
        """Right after the probe, so that the decision arrives while the later blocks still run."""
        if sums:
            readback = Readback(torch.stack([each.sum(0) for each in sums]), self.group)
            for row, session in enumerate(sessions):
                session.sent(stream, readback, row)

    def keep(self, residuals: list[Mapping[Hashable, Any]], checks: list[Tensor], streams: int) -> None:
        """Keep each session's residuals of a computed step. A check is finite if they are."""
        for session, kept in zip(self.part.sessions, residuals):
            session.keep(kept, streams)
        self.kept_bytes = max(self.kept_bytes, sum(session.nbytes for session in self.sessions))
        readback = Readback(torch.stack(checks).unsqueeze(1), self.group)
        for row, session in enumerate(self.part.sessions):
            session.checked(readback, row)

    def settle(self) -> None:
        for session in self.sessions:
            session.settle()

    def drop(self) -> None:
        """What is kept is of other weights than the next step's."""
        with self._lock:
            served = tuple(self._served)
        for session in (*self.sessions, *served):
            session.drop()

    def forget(self) -> None:
        """What the forward in progress was about to keep, or what the run kept, is gone."""
        for session in self.sessions if self._open is None else self._open:
            session.forget()
