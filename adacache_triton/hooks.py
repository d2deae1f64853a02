"""The skip decision inside a transformer's forward, at the granularity of its whole block stack.

All layers share one schedule, so one residual, that of the stack, replays them all (see `stack.py`). The hooks
are PyTorch's own: offloading, which replaces `forward`, leaves them alone, and removal leaves no trace.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from .kernels import reuse
from .session import Mode, Session
from .stack import Located


class StackHook:
    """Caches one transformer. Everything it puts on the model goes away with `remove`.

    A copy or a pickle of the transformer is uncached: the hooks that came along have no session.
    """

    session: Session | None = None
    _mode = Mode.PLAIN
    _bypassed: list[tuple[nn.Module, str, nn.ModuleList]] = []

    def __init__(self, model: nn.Module, located: Located, session: Session):
        self.located, self.stack, self.session = located, located.stack, session
        self._bypassed = []
        self._entry: Tensor | None = None  # the stack's input
        self._probed: Tensor | None = None  # the probe block's input
        self._batch = self._frames = 0
        self._warned = False
        at = dict(with_kwargs=True)
        self._handles = [
            model.register_forward_pre_hook(self._begin, **at),
            located.entry.register_forward_pre_hook(self._enter, **at),
            located.probe_block.register_forward_pre_hook(self._approach, **at),
            located.probe_after.register_forward_pre_hook(self._measure, **at),
            located.exit.register_forward_pre_hook(self._leave, **at),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def __reduce__(self):
        return object.__new__, (StackHook,)

    def remove(self) -> None:
        self._restore()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self._restore()  # an interrupt inside a reused forward runs no hook
        self._mode = Mode.PLAIN
        if self.session is None:
            return
        if torch.is_grad_enabled():
            # A kept residual would hold on to its graph, and a reused one has none.
            if not self._warned:
                self._warned = True
                warnings.warn("AdaCache: gradients are enabled, nothing is cached; use torch.no_grad()", stacklevel=3)
            return
        arguments = self.located.arguments(model, args, kwargs)
        self._mode = self.session.begin(arguments)
        if self._mode is Mode.REUSE:
            for parent, name, _ in self.located.lists:
                self._bypassed.append((parent, name, getattr(parent, name)))
                setattr(parent, name, nn.ModuleList())
        elif self._mode is Mode.COMPUTE:
            self._batch = arguments[self.stack.input].shape[0]
            self._frames = self.stack.frames(model, arguments)

    def _enter(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._mode is Mode.COMPUTE:
            self._entry = self._stream(args, kwargs)

    def _approach(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._mode is Mode.COMPUTE:
            self._probed = self._stream(args, kwargs)

    def _measure(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._mode is Mode.COMPUTE and self._probed is not None:
            residual = (self._stream(args, kwargs) - self._probed).to(self._probed.dtype)
            self._probed = None
            self.session.observe(self.stack.view(residual, self._batch, self._frames))

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        if self._mode is Mode.REUSE:
            self._restore()
            self._mode = Mode.PLAIN
            return (reuse(args[0], self.session.branch.stack_residual), *args[1:]), kwargs
        if self._mode is Mode.COMPUTE and self._entry is not None:
            self.session.keep((args[0] - self._entry).to(self._entry.dtype))
            self._entry, self._mode = None, Mode.PLAIN
        return None

    def _end(self, model: nn.Module, args: tuple, output) -> None:
        if self._mode is not Mode.PLAIN:  # the exit was not reached: the forward raised
            self._restore()
            self._mode = Mode.PLAIN
            self._entry = self._probed = None
            self.session.forget()

    def _restore(self) -> None:
        while self._bypassed:
            setattr(*self._bypassed.pop())

    def _stream(self, args: tuple, kwargs: dict) -> Tensor:
        return args[0] if args else kwargs[self.stack.hidden]
