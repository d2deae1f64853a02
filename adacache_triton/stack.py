"""The description of a model's block stack: all that caching needs to know about a model, as data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from .session import Call

LAYOUTS = ("b (t s) c", "(b t) s c", "(b s) t c", "(t s) c")
Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Stream:
    """A hidden state that goes through the blocks. Most models have one; audio beside video is a second.

    Args:
        hidden: name of the blocks' argument that holds it (and of `probe_after`'s, where passed by keyword).
        exit: path of the module whose first argument is the stream after the last block. Or that of a list in `lists`:
            the stream as its last block returns it, before something else is done with it.
        probe_after: path, inside a block, of the module whose first argument is the stream right after attention.
        probe_before: the same right before attention. None: that is the block's input.
        entry: the stream before the first block in the form in which `exit` gets it, from the first block's
            arguments by name and the input of `exit`. None: the tensor as it is.
    """

    hidden: str
    exit: str
    probe_after: str
    probe_before: str | None = None
    entry: Callable[[Arguments, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class BlockStack:
    """Where a transformer's blocks are, what to measure and how its tokens lie.

    A computed step measures the probe's attention residual, the stream right after attention was added minus the
    stream before it, and keeps the stack residual, the input of `exit` minus that of the first block. A reused
    step runs with the lists empty and adds the stack residual to the input of `exit`.

    Args:
        lists: attribute paths of all block lists of the stack. What lies between their blocks is skipped with them.
        aside: likewise, of blocks that only feed those of `lists`. They are skipped with the whole stack; with a
            smaller granularity they run.
        exit, probe_after, probe_before, entry, hidden: of the video's stream, see `Stream`.
        probe_list: the list, one of `lists`, whose middle block is measured. None: the first.
        probe_places: where in that list stand the blocks that may be measured. None: anywhere.
        layout: of a block's input: `b (t s) c` frame-major tokens, `(b t) s c` frames in the batch, `(b s) t c`
            tokens in the batch, or `(t s) c` for one video without a batch.
        frames: number of latent frames T after patching, from the model and the arguments of its forward. None,
            or a call of it that gives None: tokens do not lie in frames, motion cannot be measured.
        tokens: which tokens of the stream are the video's, likewise. None: all.
        input: name of the forward's argument that holds the latents; its first dimension is the batch.
        timestep: name of the forward's timestep argument.
        extra: further streams, such as audio. The stream that changed most decides; all are reused together.
        returns: names of the blocks' arguments that the next block gets from a block's outputs, in their order, for
            granularity `block`. None: `hidden` alone.
        attention_alone: whether nothing but the gated output of the first attention module is added between
            `probe_before` and `probe_after`, so that granularity `module` may measure it where it is added.
        modules: for granularity `module`, paths inside a block of its attention, cross-attention and MLP modules.
        direct: the model's own code calls its `forward`, past PyTorch's hooks, as methods named `forward_with_cfg` do.
        shared: names of the forward's arguments that have no batch, such as rotary tables and indices of frames.
        listed: names of those that may be lists with an item a sample.
        sequence_shards: whether each rank of the group that decides together holds a run of a block's tokens, so that
            frames lie across ranks. Known without it for the context parallelism of diffusers; ranks that hold a part
            of every frame, as Open-Sora's, need nothing.
        refused: a reason why this model cannot be cached.
    """

    lists: tuple[str, ...] = ()
    exit: str = "norm_out"
    probe_after: str = "norm2"
    probe_list: str | None = None
    probe_places: slice | None = None
    layout: str = "b (t s) c"
    frames: Callable[[nn.Module, Arguments], int | None] | None = None
    tokens: Callable[[nn.Module, Arguments], slice] | None = None
    input: str = "hidden_states"
    timestep: str = "timestep"
    hidden: str = "hidden_states"
    probe_before: str | None = None
    entry: Callable[[Arguments, Tensor], Tensor] | None = None
    extra: tuple[Stream, ...] = ()
    returns: tuple[str, ...] | None = None
    attention_alone: bool = True
    modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    aside: tuple[str, ...] = ()
    direct: bool = False
    shared: tuple[str, ...] = ()
    listed: tuple[str, ...] = ()
    sequence_shards: bool = False
    refused: str | None = None

    def __post_init__(self):
        if self.refused is None and (not isinstance(self.lists, tuple) or not self.lists):
            raise TypeError(f"BlockStack.lists: expected a tuple of attribute paths, got {self.lists!r}")
        if self.probe_list is not None and self.probe_list not in self.lists:
            raise ValueError(f"BlockStack.probe_list: expected one of {self.lists}, got {self.probe_list!r}")
        if self.exit in self.lists and len(self.carried) > 1:
            raise ValueError(f"BlockStack.exit: expected a module, as blocks return {self.carried}, got {self.exit!r}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"BlockStack.layout: expected one of {LAYOUTS}, got {self.layout!r}")
        if self.sequence_shards and (self.layout != "b (t s) c" or self.tokens is not None):
            raise ValueError("BlockStack.sequence_shards: expected layout 'b (t s) c' and no tokens with it")
        if self.tokens is not None and self.layout != "b (t s) c":
            raise ValueError(f"BlockStack.tokens: expected layout 'b (t s) c' with it, got {self.layout!r}")
        for name in self.modules:
            if name not in PARTS:
                raise ValueError(f"BlockStack.modules: expected some of {', '.join(PARTS)}, got {name!r}")

    @cached_property
    def streams(self) -> tuple[Stream, ...]:
        return (Stream(self.hidden, self.exit, self.probe_after, self.probe_before, self.entry), *self.extra)

    @property
    def carried(self) -> tuple[str, ...]:
        """The blocks' arguments that the next block gets from their outputs."""
        return self.returns or tuple(stream.hidden for stream in self.streams)

    def call(self, arguments: Arguments, name: str | None) -> Call:
        """A forward's arguments, told apart: what identifies the video, what the guidance branch."""
        latents = arguments[self.input]
        listed = isinstance(latents, (list, tuple))  # a tensor a sample
        batch = 1 if self.layout == "(t s) c" else len(latents)
        values, tensors, conditions = [], [], []
        for argument, value in arguments.items():
            if isinstance(value, (bool, int, float, str)):
                if argument != self.timestep:
                    values.append((argument, value))
                continue
            for place, tensor in _tensors(argument, value):
                tensors.append((place, argument not in self.shared, tensor))
                # Another timestep, or sigma, is of another step, not of another branch.
                if argument not in (self.input, self.timestep) and "timestep" not in argument and tensor.dim() > 1:
                    conditions.append(tensor)
        dtype = latents[0].dtype if listed else latents.dtype
        whole = listed or self.layout == "(t s) c"
        shape = tuple(latents[0].shape if listed else latents.shape if whole else latents.shape[1:])
        return Call(arguments, batch, shape, dtype, tuple(values), tuple(tensors), tuple(conditions), name)

    def view(self, residual: Tensor, batch: int, frames: int | None) -> Tensor:
        """A block's tensor as a [B, T, S, C] view, without a copy; T is 1 where frames are not known."""
        axis, sizes = {
            "b (t s) c": (1, (frames or 1, -1)),
            "(b t) s c": (0, (batch, frames or -1)),
            "(b s) t c": (0, (batch, -1)),
            "(t s) c": (0, (1, frames or 1, -1)),
        }[self.layout]
        try:
            split = residual.unflatten(axis, sizes)
        except RuntimeError:
            split = None
        if split is not None and self.layout == "(b s) t c":
            split = split.transpose(1, 2)
        if split is None or split.shape[0] != batch or split.shape[1] != (frames or split.shape[1]):
            shape = f"a block's input of shape {tuple(residual.shape)}, batch {batch}, {frames} frames"
            raise ValueError(f"BlockStack.layout: {self.layout!r} does not fit {shape}")
        return split


PARTS = ("attention", "cross_attention", "mlp")


def _tensors(place: str, value):
    """The tensors of an argument, those in lists and mappings as well, with their places."""
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, (list, tuple, Mapping)):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _tensors(f"{place}.{key}", item)


def _has(block: nn.Module, path: str) -> bool:
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True


class Located:
    """A description resolved on one model: its modules. A field that does not fit fails here, by name."""

    def __init__(self, model: nn.Module, stack: BlockStack, probe_block: int | None):
        if stack.refused is not None:
            raise ValueError(f"transformer: {type(model).__name__} cannot be cached: {stack.refused}")
        self.stack = stack
        self.lists = {path: self._list(model, "lists", path) for path in stack.lists}
        for path in stack.aside:
            self._list(model, "aside", path)
        self.others: dict[str, nn.ModuleList] = {}  # lists that are not described, outermost first
        for path, module in model.named_modules():
            inside = (*stack.lists, *stack.aside, *self.others)
            if isinstance(module, nn.ModuleList) and not any(path == k or path.startswith(f"{k}.") for k in inside):
                self.others[path] = module
        self.probe_list = stack.probe_list or stack.lists[0]
        probes = self.lists[self.probe_list]
        places = range(len(probes))[stack.probe_places or slice(None)]
        index = places[(len(places) - 1) // 2] if probe_block is None else probe_block
        if not -len(probes) <= index < len(probes):
            raise ValueError(f"probe_block: expected an index into {len(probes)} blocks, got {index}")
        self.probe_index = index % len(probes)
        probe = probes[self.probe_index]
        self.exits = [self._exit(model, stream.exit) for stream in stack.streams]
        self.probe_after = [self._module(probe, "probe_after", stream.probe_after) for stream in stack.streams]
        self.probe_before = [
            stream.probe_before and self._module(probe, "probe_before", stream.probe_before) for stream in stack.streams
        ]
        # The classes' forwards: an instance may carry one wrapped by an offloading hook.
        self.arguments = tuple(inspect.signature(type(model).forward).parameters)[1:]
        for name in ("input", "timestep"):
            if getattr(stack, name) not in self.arguments:
                raise ValueError(
                    f"BlockStack.{name}: {type(model).__name__}.forward has no argument "
                    f"{getattr(stack, name)!r}; it has {', '.join(self.arguments)}"
                )
        blocks = [block for blocks in self.lists.values() for block in blocks]
        for name, paths in stack.modules.items():
            for path in paths:
                if not any(_has(block, path) for block in blocks):
                    raise ValueError(f"BlockStack.modules: no block has the {name} module {path!r}")
        self.positions = {path: self._positions(path, blocks[0]) for path, blocks in self.lists.items()}

    def _exit(self, model: nn.Module, path: str) -> nn.Module | None:
        """The module that gets a stream; None where its last block returns it."""
        if path in self.lists:
            return None
        module = self._module(model, "exit", path)
        if isinstance(module, nn.ModuleList):
            raise ValueError(f"BlockStack.exit: expected a module that is called, or one of lists, got {path!r}")
        return module

    def _positions(self, path: str, block: nn.Module) -> dict[str, int]:
        """Places of the arguments of a list's blocks, by name."""
        parameters = list(inspect.signature(type(block).forward).parameters.values())[1:]
        positions = {p.name: i for i, p in enumerate(parameters) if p.kind is not p.VAR_POSITIONAL}
        if any(p.kind is p.VAR_POSITIONAL for p in parameters) and self.stack.hidden not in positions:
            return {name: i for i, name in enumerate(self.stack.carried)}  # a wrapper that hands all of them on
        for name in self.stack.carried:
            if name not in positions:
                field = "hidden" if name in {stream.hidden for stream in self.stack.streams} else "returns"
                raise ValueError(
                    f"BlockStack.{field}: {type(block).__name__}.forward in {path!r} has no argument {name!r}; "
                    f"it has {', '.join(positions)}"
                )
        return positions

    @classmethod
    def _list(cls, model: nn.Module, name: str, path: str) -> nn.ModuleList:
        blocks = cls._module(model, name, path)
        if not isinstance(blocks, nn.ModuleList) or not len(blocks):
            kind = type(blocks).__name__
            raise ValueError(f"BlockStack.{name}: expected {path!r} to be a filled ModuleList, got {kind}")
        return blocks

    @staticmethod
    def _module(model: nn.Module, name: str, path: str) -> nn.Module:
        try:
            return model.get_submodule(path)
        except AttributeError:
            raise ValueError(f"BlockStack.{name}: {type(model).__name__} has no module {path!r}") from None
