"""What keeps a residual: the whole block stack, each block, or (in `modules.py`) each module of a block.

A granularity says what stands in for a block list during a forward, what a reused step adds at the stack's exit,
and what a computed step leaves to be kept. It has no state: that is the hook's and the session's.
"""

from __future__ import annotations

from torch import Tensor, nn

from .kernels import keep, reuse
from .modules import Modules
from .session import Mode
from .stack import Stream
from .standins import BlockReplay, BlockTap, Skipped, Tap, replaced


class Stack:
    """One residual for each stream; on a reused step no block runs."""

    @staticmethod
    def exchange(hook, path: str, blocks: nn.ModuleList) -> nn.ModuleList:
        if hook.mode is Mode.REUSE:
            return Skipped(blocks)
        if path in hook.stack.aside:
            return blocks
        tapped = {0, hook.probe[1]} if path == hook.probe[0] else {0}
        return replaced(blocks, {i: Tap(blocks[i], hook, (path, i)) for i in tapped})

    @staticmethod
    def leave(hook, stream: Stream, hidden: Tensor) -> Tensor:
        return reuse(hidden, hook.session.branch.residuals[stream.exit])

    @staticmethod
    def residuals(hook) -> tuple[dict, Tensor]:
        kept, check = {}, 0
        for stream, entry, output in hook.passed():
            (kept[stream.exit],), sums = keep(output, entry)
            check = check + sums[:, 4].sum()
        return kept, check


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
    def residuals(hook) -> tuple[dict, Tensor]:
        if hook.in_graph:
            return {key: residual.clone() for key, residual in hook.kept.items()}, hook.check
        return hook.kept, hook.check


GRANULARITIES = {"stack": Stack, "block": Blocks, "module": Modules}
