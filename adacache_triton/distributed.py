"""Ranks that work on one video: which of them decide together, and how their parts of it make up the whole.

What is measured is a sum over tokens, so each rank sums over its own and a few numbers are added up over the group
(`readback.py`): the same for every rank, hence the same decision. Only motion looks across the border between two
ranks' tokens, and needs those of one frame, or few, from the ranks before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .kernels import residual_stats
from .readback import Readback


def group_of(
    model: nn.Module, blocks: Iterable[nn.Module], group: dist.ProcessGroup | None
) -> dist.ProcessGroup | None:
    """The ranks that decide together, because they must or because the user wants it; None: each decides alone.

    Ranks must where they run the blocks' collectives together, as one that leaves the blocks out lets the others wait:
    those of the context parallelism that diffusers set up, and those among which FSDP or tensor parallelism shards
    the parameters of a block. Replicas, with data of their own, need not.

    Args:
        model: the transformer.
        blocks: one of each block list; blocks of a list are sharded alike.
        group: the user's, which must hold all these ranks; or None.

    Cost: nothing without process groups, else a look at each parameter of these blocks. FSDP2 leaves them as plain
    tensors while they are gathered, for good where they are not to be resharded: an answer holds from then on.

    Raises:
        ValueError: `group` lacks this rank or one that must decide with it, or was left out where none of the groups
            found holds all the ranks.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    if group is not None and dist.get_rank(group) < 0:
        raise ValueError(f"group: expected a process group that holds this rank, {dist.get_rank()}, got one without it")
    context = _context(model)
    found = _sharding(blocks) + ([context] if context is not None else [])
    needed = {rank for each in found for rank in dist.get_process_group_ranks(each)}
    for each in found if group is None else [group]:
        if needed <= set(dist.get_process_group_ranks(each)):
            return each if dist.get_world_size(each) > 1 else None
    if not found:
        return None
    got = None if group is None else f"one of ranks {dist.get_process_group_ranks(group)}"
    raise ValueError(f"group: expected one that holds ranks {sorted(needed)}, which run the blocks together, got {got}")


def _context(model: nn.Module) -> dist.ProcessGroup | None:
    """Of the context parallelism that diffusers' `enable_parallelism` set up."""
    config = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    return None if config is None else config._flattened_mesh.get_group()


def _sharding(blocks: Iterable[nn.Module]) -> list[dist.ProcessGroup]:
    """Those among whose ranks parameters of the blocks are split: as DTensors, or by FSDP1, which hides them."""
    groups = {}
    for module in (module for block in blocks for module in block.modules()):
        for parameter in module.parameters(recurse=False):
            for dim, placement in enumerate(getattr(parameter, "placements", ())):
                if not placement.is_replicate():
                    group = parameter.device_mesh.get_group(dim)
                    groups[group.group_name] = group
        if type(module).__name__ == "FullyShardedDataParallel" and module.sharding_strategy.name != "NO_SHARD":
            groups[module.process_group.group_name] = module.process_group
    return list(groups.values())


def sequence_group(
    model: nn.Module, block: nn.Module, sharded: bool, group: dist.ProcessGroup | None
) -> dist.ProcessGroup | None:
    """The ranks that hold runs of a video's tokens, in rank order; None where each has all of them, or of every frame.

    Args:
        model: the transformer; the context parallelism that diffusers set up has its own group.
        block: any of its blocks. One that gathers the tokens itself, as Helios' do, hands on all of them.
        sharded: whether ranks hold runs of tokens otherwise (`BlockStack.sequence_shards`).
        group: the user's, whose ranks these are then.
    """
    context = _context(model)
    if context is None:
        return group if sharded else None
    gathered = any(_hooks(module, "ContextParallelGatherHook") for module in block.modules())
    return None if gathered else context


def splits(block: nn.Module) -> bool:
    """Whether diffusers' context parallelism takes this rank's tokens out of the block's arguments, at its door."""
    return bool(_hooks(block, "ContextParallelSplitHook"))


def entered(block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A block's arguments as its own forward gets them: behind that split, of which they are views."""
    for hook in reversed(_hooks(block, "ContextParallelSplitHook")):  # the last one stands in front
        args, kwargs = hook.pre_forward(block, *args, **kwargs)
    return args, kwargs


def _hooks(module: nn.Module, kind: str) -> list:
    """diffusers' hooks of that class on a module."""
    registry = getattr(module, "_diffusers_hook", None)
    return [hook for hook in registry.hooks.values() if type(hook).__name__ == kind] if registry is not None else []


class Shards:
    """The tokens of a sequence on the ranks of a group: a run of them on each, one after another in rank order.

    Every rank sends the length of its run when this is made, all at the same step; nobody waits for the lengths
    before they are needed, a computed step later.
    """

    def __init__(self, length: int, group: dist.ProcessGroup, device: torch.device):
        self.group, self.rank = group, dist.get_rank(group)
        lengths = torch.zeros(1, dist.get_world_size(group), device=device)  # exact up to 2^24 tokens
        lengths[0, self.rank] = length
        self._lengths = Readback(lengths, group)

    @cached_property
    def ends(self) -> list[int]:
        """For each rank, where its run ends in the sequence; the next one's begins there."""
        return list(accumulate(map(int, self._lengths.row(0))))

    @property
    def starts(self) -> list[int]:
        return [0, *self.ends[:-1]]

    def before(self, tokens: Tensor, reach: int) -> Tensor:
        """The last tokens in front of this rank's run, `reach` or as many as there are: [B, H, C].

        Args:
            tokens: [B, L, C] of this rank.
            reach: how many tokens every rank wants. They may lie on several ranks.

        Bytes on the wire: B * H * C elements to each rank, none of which waits for the host.
        """
        starts, ends, length = self.starts, self.ends, tokens.shape[1]

        def count(source: int, rank: int) -> int:  # of the source's last tokens, those that the rank wants
            return max(0, min(ends[source], starts[rank]) - max(starts[source], starts[rank] - reach))

        sent = [count(self.rank, rank) for rank in range(len(ends))]
        received = [count(source, self.rank) for source in range(len(ends))]
        batch, channels = tokens.shape[0], tokens.shape[2]
        outgoing = torch.cat([tokens[:, length - n :].transpose(0, 1) for n in sent])
        halo = outgoing.new_empty(sum(received), batch, channels)
        dist.all_to_all_single(halo, outgoing.contiguous(), received, sent, group=self.group)
        return halo.transpose(0, 1)


def motion_sums(residual: Tensor, shards: Shards, frames: int, frame_strides: Sequence[int]) -> Tensor:
    """The motion columns of `residual_stats`, where a residual's tokens lie on several ranks.

    With r the whole residual as [T * S, C], s a stride and i over this rank's tokens, for each sample and stride::

        sum_i |r[i] - r[i - s S]|,    sum_i |r[i]| + |r[i - s S]|

    over those i that have a token s frames earlier. Summed over the ranks, that is every pair once, whatever frames
    the borders cut.

    Args:
        residual: [B, L, C] of this rank, frame-major; the stride of C is 1.
        shards: of the same L.
        frames: T, of the whole.
        frame_strides: as in `residual_stats`.

    Returns:
        float32 [B, 2 * len(frame_strides)], of this rank.

    Bytes moved: the residual once for each stride, and the halo of max(s) S tokens, also over the wire.

    Raises:
        ValueError: T does not divide the tokens; on every rank.
    """
    total, start, length = shards.ends[-1], shards.starts[shards.rank], residual.shape[1]
    if total % frames:
        raise ValueError(f"BlockStack.frames: expected a divisor of the {total} tokens of all ranks, got {frames}")
    distances = [stride * total // frames if stride < frames else 0 for stride in frame_strides]
    halo = shards.before(residual, max(distances)) if any(distances) else None
    columns = []
    for distance in distances:
        sums = torch.zeros(len(residual), 2, device=residual.device)
        first, last = max(0, distance - start), min(distance, length)  # tokens whose partners came with the halo
        if first < last:
            offset = halo.shape[1] - distance
            pairs = torch.stack((halo[:, offset + first : offset + last], residual[:, first:last]), 1)
            sums += residual_stats(pairs, frame_strides=(1,))[:, 2:]
        if 0 < distance < length:
            pairs = residual.unfold(1, length - distance, distance).transpose(2, 3)  # a view: both ends of the run
            sums += residual_stats(pairs, frame_strides=(1,))[:, 2:]
        columns.append(sums)
    return torch.cat(columns, 1)
