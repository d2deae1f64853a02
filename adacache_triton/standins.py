"""Modules that stand in for a model's own during one forward: lists of blocks, blocks, and a block's parts.

A transformer's forward runs as it is; only what its lists hold is exchanged, from its beginning to its end. A
stand-in shows the parameters and attributes of the module it stands for, so nobody who looks misses a weight.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .distributed import entered, splits
from .kernels import keep, reuse


class StandIn(nn.Module):
    """In the place of `module`, for the hook of a cached transformer, at `key`."""

    def __init__(self, module: nn.Module, hook, key):
        super().__init__()
        # Past nn.Module's registration: parameters and children keep the names they have in the model.
        own = dict(module=module, hook=hook, key=key)
        own |= {name: module.__dict__[name] for name in ("_parameters", "_buffers", "_modules")}
        self.__dict__.update(own)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


class Tap(StandIn):
    """Shows the hook what goes into a block."""

    def forward(self, *args, **kwargs):
        seen = args, kwargs
        if self.key[1] == 0 and splits(self.module):
            # Copied, as views would hold on to all ranks' tokens until the stack's end.
            seen = tree_map_only(Tensor, Tensor.clone, entered(self.module, args, kwargs))
        self.hook.enter(self.key, *seen)
        if self.module._compiled_call_impl is not None and self.key == self.hook.probe:
            # Blocks compiled one by one share a graph that sees no hooks, so the probed one runs as written.
            return self.module._call_impl(*args, **kwargs)
        return self.module(*args, **kwargs)


class BlockTap(Tap):
    """A computed block: what it added to each of its arguments is kept."""

    def forward(self, *args, **kwargs):
        result = super().forward(*args, **kwargs)
        carried = self.hook.stack.carried
        if isinstance(result, Tensor) != (len(carried) == 1) or (len(carried) > 1 and len(result) != len(carried)):
            got = "a tensor" if isinstance(result, Tensor) else f"{len(result)} values"
            raise ValueError(f"BlockStack.returns: expected {carried} from {self.key[0]}.{self.key[1]}, got {got}")
        args, kwargs = entered(self.module, args, kwargs)
        for name, output in zip(carried, (result,) if len(carried) == 1 else result):
            if isinstance(output, Tensor):
                before = self.hook.argument(self.key[0], name, args, kwargs)
                (residual,), sums = keep(output, before, dtype=output.dtype)
                self.hook.kept[(*self.key, name)] = residual
                self.hook.check = self.hook.check + sums[:, 4].sum()
        return result


class BlockReplay(StandIn):
    """A reused block: what it kept is added to its arguments."""

    def forward(self, *args, **kwargs):
        kept, outputs = self.hook.branch.residuals, []
        args, kwargs = entered(self.module, args, kwargs)
        for name in self.hook.stack.carried:
            residual = kept.get((*self.key, name))
            if residual is not None:
                before = self.hook.argument(self.key[0], name, args, kwargs)
                residual = reuse(before.to(residual.dtype), residual)
            outputs.append(residual)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


class Entrance(StandIn):
    """In the place of a list's first block, hands its arguments on: this rank's tokens, where it takes them out."""

    def forward(self, *args, **kwargs):
        args, kwargs = entered(self.module, args, kwargs)
        outputs = [self.hook.argument(self.key, name, args, kwargs) for name in self.hook.stack.carried]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


class Last(StandIn):
    """Around the last block of the list from which the stream leaves the stack, or around what stands in for it."""

    def forward(self, *args, **kwargs):
        return self.hook.left(self.module(*args, **kwargs))


class Skipped(nn.ModuleList):
    """A block list of which a loop sees nothing, while parameters and state are there for everybody else.

    But for one block, where its arguments are split, or where the stream is taken from a list: a loop over several
    lists then runs once.
    """

    def __init__(self, blocks: nn.ModuleList, hook, path: str):
        self.__dict__.update(vars(blocks))  # without nn.Module's registration, which takes longer than a reused step
        entered = splits(blocks[0]) or hook.stack.exit in hook.stack.lists
        self.__dict__["left"] = [Entrance(blocks[0], hook, path)] if entered else []

    def __iter__(self):
        return iter(self.left)

    def __len__(self):
        return len(self.left)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return nn.ModuleList()
        raise IndexError(f"block {index} of a list that is skipped on a reused step")


def replaced(blocks: nn.ModuleList, stand_ins: dict[int, nn.Module]) -> nn.ModuleList:
    """The list with some of its blocks exchanged."""
    changed = nn.ModuleList()
    changed._modules = {name: stand_ins.get(i, block) for i, (name, block) in enumerate(blocks._modules.items())}
    return changed


def ended(blocks: nn.ModuleList, hook, path: str) -> nn.ModuleList:
    """The list, where the stream leaves the stack behind its last block."""
    if isinstance(blocks, Skipped):
        blocks.__dict__["left"] = [Last(block, hook, path) for block in blocks.left]
        return blocks
    return replaced(blocks, {len(blocks) - 1: Last(blocks[-1], hook, path)})
