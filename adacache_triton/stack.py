"""The description of a model's block stack: all that caching needs to know about a model, as data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .session import Call

LAYOUTS = ("b (t s) c", "(b t) s c", "(b s) t c")


@dataclass(frozen=True)
class BlockStack:
    """Where a transformer's blocks are, what to measure and how its tokens lie.

    A computed step measures the probe's attention residual, the stream right after the attention was added
    minus the block's input, and keeps the stack residual, the input of `exit` minus that of the first block.
    A reused step runs with the lists empty and adds the stack residual to the input of `exit`.

    Args:
        lists: attribute paths of all block lists of the stack. What lies between their blocks is skipped with them.
        exit: path of the module whose first argument is the output of the stack.
        probe_list: the list, one of `lists`, whose middle block is measured.
        probe_after: path, inside a block, of the module whose first argument is the stream after attention.
        layout: of a block's input: `b (t s) c` frame-major tokens, `(b t) s c` frames in the batch, or
            `(b s) t c` tokens in the batch.
        frames: number of latent frames T after patching, from the model and the arguments of its forward.
        input: name of the forward's argument whose first dimension is the batch.
        timestep: name of the forward's timestep argument.
        hidden: name of the argument of a block, and of `probe_after`, that holds the stream, where it is passed by
            keyword. `exit` gets it by position.
    """

    lists: tuple[str, ...]
    exit: str
    probe_list: str
    probe_after: str
    layout: str
    frames: Callable[[nn.Module, Mapping[str, Any]], int]
    input: str = "hidden_states"
    timestep: str = "timestep"
    hidden: str = "hidden_states"

    def __post_init__(self):
        if not isinstance(self.lists, tuple) or not self.lists:
            raise TypeError(f"BlockStack.lists: expected a tuple of attribute paths, got {self.lists!r}")
        if self.probe_list not in self.lists:
            raise ValueError(f"BlockStack.probe_list: expected one of {self.lists}, got {self.probe_list!r}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"BlockStack.layout: expected one of {LAYOUTS}, got {self.layout!r}")

    def call(self, arguments: Mapping[str, Any]) -> Call:
        """A forward's arguments, told apart: what identifies the video, what the guidance branch."""
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        plain = {n: v for n, v in arguments.items() if isinstance(v, (bool, int, float, str)) and n != self.timestep}
        signature = (
            *((name, t.shape, t.dtype, t.device) for name, t in tensors.items()),
            *plain.items(),
        )
        changing = (self.input, self.timestep)
        return Call(arguments, signature, tuple(t for name, t in tensors.items() if name not in changing))

    def view(self, residual: Tensor, batch: int, frames: int) -> Tensor:
        """A block's tensor as a [B, T, S, C] view, without a copy."""
        axis, sizes = {
            "b (t s) c": (1, (frames, -1)),
            "(b t) s c": (0, (batch, frames)),
            "(b s) t c": (0, (batch, -1)),
        }[self.layout]
        try:
            split = residual.unflatten(axis, sizes)
        except RuntimeError:
            shape = f"a block's input of shape {tuple(residual.shape)}, batch {batch}, {frames} frames"
            raise ValueError(f"BlockStack.layout: {self.layout!r} does not fit {shape}") from None
        split = split.transpose(1, 2) if self.layout == "(b s) t c" else split
        if split.shape[:2] != (batch, frames):
            shape = f"a block's input of shape {tuple(residual.shape)}, batch {batch}, {frames} frames"
            raise ValueError(f"BlockStack.layout: {self.layout!r} does not fit {shape}")
        return split


class Located:
    """A description resolved on one model: its modules. A field that does not fit fails here, by name."""

    def __init__(self, model: nn.Module, stack: BlockStack, probe_block: int | None):
        self.stack = stack
        self.lists = [self._module(model, "lists", path) for path in stack.lists]
        for path, blocks in zip(stack.lists, self.lists):
            if not isinstance(blocks, nn.ModuleList) or not len(blocks):
                kind = type(blocks).__name__
                raise ValueError(f"BlockStack.lists: expected {path!r} to be a filled ModuleList, got {kind}")
        probes = self.lists[stack.lists.index(stack.probe_list)]
        index = (len(probes) - 1) // 2 if probe_block is None else probe_block
        if not -len(probes) <= index < len(probes):
            raise ValueError(f"probe_block: expected an index into {len(probes)} blocks, got {index}")
        self.exit = self._module(model, "exit", stack.exit)
        self.probe_block = probes[index]
        self.probe_after = self._module(self.probe_block, "probe_after", stack.probe_after)
        # The class's forward: an instance may carry one wrapped by an offloading hook.
        self.signature = inspect.signature(type(model).forward)
        for field in ("input", "timestep"):
            if getattr(stack, field) not in self.signature.parameters:
                names = ", ".join(list(self.signature.parameters)[1:])
                raise ValueError(
                    f"BlockStack.{field}: {type(model).__name__}.forward has no argument "
                    f"{getattr(stack, field)!r}; it has {names}"
                )

    @staticmethod
    def _module(model: nn.Module, field: str, path: str) -> nn.Module:
        try:
            return model.get_submodule(path)
        except AttributeError:
            raise ValueError(f"BlockStack.{field}: {type(model).__name__} has no module {path!r}") from None
