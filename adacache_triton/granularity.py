"""What keeps a residual: the whole block stack, each block, or (in `modules.py`) each module of a block.

A granularity says what stands in for a block list during a forward, what a reused step adds at the stack's exit,
and what a computed step leaves to be kept. It has no state: that is the hook's and the session's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .batch import Part
from .forecast import History
from .kernels import reuse
from .modules import Modules
from .session import Mode
from .stack import Stream
from .standins import BlockReplay, BlockTap, Skipped, Tap, replaced


class Stack:
    """The last residuals of each stream, as many as the forecast takes; on a reused step no block runs."""

    @staticmethod
    def exchange(hook, path: str, blocks: nn.ModuleList) -> nn.ModuleList:
        if hook.mode is Mode.REUSE:
            return Skipped(blocks, hook, path)
        if path in hook.stack.aside:
            return blocks
        tapped = {0, hook.probe[1]} if path == hook.probe[0] else {0}
        return replaced(blocks, {i: Tap(blocks[i], hook, (path, i)) for i in tapped})

    @staticmethod
    def leave(hook, stream: Stream, hidden: Tensor) -> Tensor:
        part = hook.batch.part
        histories = [session.branch.residuals[stream.exit] for session in part.sessions]
        if len(histories) == 1:
            (history,) = histories
            return reuse(_samples(part, hidden)[0], history.kept, history.weights).reshape(hidden.shape)
        out = torch.empty_like(hidden)
        for rows, history, into in zip(_samples(part, hidden), histories, _samples(part, out)):
            reuse(rows, history.kept, history.weights, out=into)
        return out

    @staticmethod
    def residuals(hook) -> tuple[list[dict], list[Tensor]]:
        part = hook.batch.part
        kept: list[dict] = [{} for _ in part.sessions]
        checks: list = [0] * len(kept)
        for stream, entry, output in hook.passed():
            for i, (after, before) in enumerate(zip(_samples(part, output), _samples(part, entry))):
                session = part.sessions[i]
                history = session.branch.residuals.get(stream.exit) or History(hook.batch.config.forecast)
                checks[i] = checks[i] + history.store(after, before, session.step)
                kept[i][stream.exit] = history
        return kept, checks


def _samples(part: Part, tensor: Tensor) -> list[Tensor]:
    """Each session's samples of a stream, frames out of the batch: a forecast is fitted to a sample."""
    rows = len(part.rows)
    if part.apart or len(tensor) == rows or len(tensor) % rows:
        return part.split(tensor)
    return [tensor.unflatten(0, (rows, -1))]


class Blocks:
    """A residual for each block: what the model does between its blocks is done on every step."""

    @staticmethod
    def exchange(hook, path: str, blocks: nn.ModuleList) -> nn.ModuleList:
        if path in hook.stack.aside:
            return blocks
        stand_in = BlockReplay if hook.mode is Mode.REUSE else BlockTap
        return replaced(blocks, {i: stand_in(block, hook, (path, i)) for i, block in enumerate(blocks)})

    @staticmethod
    def leave(hook, stream: Stream, hidden: Tensor) -> Tensor:
        return hidden

    @staticmethod
    def residuals(hook) -> tuple[list[dict], list[Tensor]]:
        if hook.in_graph:
            return [{key: residual.clone() for key, residual in hook.kept.items()}], [hook.check]
        return [hook.kept], [hook.check]


GRANULARITIES = {"stack": Stack, "block": Blocks, "module": Modules}
