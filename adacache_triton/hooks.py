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


class Skipped(nn.ModuleList):
    """A block list of which a loop sees nothing, while parameters and state are there for everybody else."""

    def __init__(self, blocks: nn.ModuleList):
        super().__init__()
        self._modules = blocks._modules

    def __iter__(self):
        return iter(())

    def __len__(self):
        return 0


class StackHook:
    """Caches one transformer. Everything it puts on the model goes away with `remove`.

    It holds no module, so that dropping the last reference to a model frees it at once. A copy or a pickle of the
    transformer is uncached: the hooks that came along have no session.
    """

    session: Session | None = None
    _open = False  # inside a forward
    _mode = Mode.PLAIN
    _bypassed: tuple = ()

    def __init__(self, model: nn.Module, located: Located, session: Session):
        self.stack, self._signature, self.session = located.stack, located.signature, session
        self._batch = self._frames = 0
        self._warned: set[str] = set()
        self._clear()
        at = dict(with_kwargs=True)
        self._handles = [
            model.register_forward_pre_hook(self._begin, **at),
            *(blocks[0].register_forward_pre_hook(self._enter, **at) for blocks in located.lists),
            located.probe_block.register_forward_pre_hook(self._approach, **at),
            located.probe_after.register_forward_pre_hook(self._measure, **at),
            located.exit.register_forward_pre_hook(self._leave, **at),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def __reduce__(self):
        return object.__new__, (StackHook,)

    def remove(self) -> None:
        self._clear()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _clear(self) -> None:
        """Nothing of a forward is left, and the lists are back."""
        for parent, name, blocks in self._bypassed:
            setattr(parent, name, blocks)
        self._bypassed = ()
        self._mode = Mode.PLAIN
        self._entry: Tensor | None = None  # the stack's input
        self._probed: Tensor | None = None  # the probe block's input

    def _abort(self) -> None:
        self._open = False
        self._clear()
        self.session.forget()
        self.session.clock.abort()

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.session is None:
            return
        if self._open:
            self._abort()  # the last forward was interrupted: no hook runs then
        if torch.is_grad_enabled():
            # A kept residual would hold on to its graph, and a reused one has none.
            self._warn("gradients are enabled, nothing is cached; use torch.no_grad()")
            return
        call = self.stack.call(self._signature.bind_partial(model, *args, **kwargs).arguments)
        if call.arguments[self.stack.input].dtype == torch.float64:
            self._warn("the model runs in float64, nothing is cached; expected float32, bfloat16 or float16")
            return
        self._open = True
        mode = self.session.begin(call)
        if mode is Mode.REUSE:
            for path in self.stack.lists:
                parent, _, name = path.rpartition(".")
                parent = model.get_submodule(parent)
                blocks = getattr(parent, name)
                self._bypassed += ((parent, name, blocks),)
                setattr(parent, name, Skipped(blocks))
        elif mode is Mode.COMPUTE:
            self._batch = call.arguments[self.stack.input].shape[0]
            self._frames = self.stack.frames(model, call.arguments)
        self._mode = mode

    def _enter(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._mode is Mode.COMPUTE and self._entry is None:
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
            self._clear()
            return (reuse(args[0], self.session.branch.stack_residual), *args[1:]), kwargs
        if self._mode is Mode.COMPUTE and self._entry is not None:
            residual = (args[0] - self._entry).to(self._entry.dtype)
            self._clear()
            self.session.keep(residual)
            if self.session.branch.probe_residual is None and not self.session.over:
                field = f"BlockStack.probe_after: {self.stack.probe_after!r}"
                self._warn(f"{field} did not run in the probed block, so every step is computed")
        return None

    def _end(self, model: nn.Module, args: tuple, output) -> None:
        if output is None and self._open:
            self._abort()  # the forward raised
        elif self._mode is not Mode.PLAIN:
            self._warn(f"BlockStack.exit: {self.stack.exit!r} did not run after the blocks, nothing is cached")
            self._abort()
        self._open = False

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"AdaCache: {message}", stacklevel=4)

    def _stream(self, args: tuple, kwargs: dict) -> Tensor:
        return args[0] if args else kwargs[self.stack.hidden]
