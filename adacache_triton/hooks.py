"""The skip decision inside a transformer's forward: what decides, around it, and what measures, inside.

The hooks are PyTorch's own: offloading, which replaces `forward`, leaves them alone, and removal leaves no trace.
For the duration of a forward the block lists are exchanged for others (see `granularity.py`), so the model's own
code runs, and on a reused step finds little to do.

Under `torch.compile` all that decides stays outside the graph, which sees one of two kinds of lists and takes
tensors in and out: one more graph, no break.
"""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .granularity import GRANULARITIES
from .session import Mode, Session
from .stack import Located, Stream
from .watched import Watched

# Methods of diffusers' models after which what is kept is of other weights, or of a run that is over.
DROPPING = (
    "_reset_stateful_cache", "load_state_dict", "load_lora_adapter", "unload_lora", "fuse_lora", "unfuse_lora",
    "enable_lora", "disable_lora", "set_adapters", "set_adapter", "add_adapter", "enable_adapters",
    "disable_adapters", "delete_adapters",
)  # fmt: skip


class StackHook:
    """Caches one transformer. Everything it puts on the model goes away with `remove`.

    It holds no module, so that dropping the last reference to a model frees it at once. A copy or a pickle of the
    transformer is uncached: the hooks that came along have no session.
    """

    session: Session | None = None
    mode = Mode.PLAIN
    _open: threading.Thread | None = None  # that is inside a forward
    _begun = False  # whether one is; what a graph may ask
    _exchanged: tuple = ()

    def __init__(self, root: nn.Module, located: Located, session: Session):
        """`root` is what is called: the transformer, or what `torch.compile` made of it."""
        model = getattr(root, "_orig_mod", root)
        self._root, self._model = weakref.ref(root), weakref.ref(model)
        self.stack, self.session = located.stack, session
        self.probe = (located.probe_list, located.probe_index)
        self._arguments, self._positions = located.arguments, located.positions
        self._granularity = GRANULARITIES[session.config.granularity]
        self._batch, self._frames, self._tokens = 0, None, None
        self._name: str | None = None  # of the guidance branch
        self._warned: set[str] = set()
        self._clear()
        self._handles, self._root_handles = [], []
        for i in range(len(self.stack.streams)):
            places = [(located.probe_before[i], self._approach), (located.probe_after[i], self._measure)]
            for module, hook in [*places, (located.exits[i], self._leave)]:
                if module is not None:
                    hook = functools.partial(hook, i)
                    self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        self._seen: dict[Mode, set[str]] = {Mode.COMPUTE: set(), Mode.REUSE: set()}
        self._watching = []
        if session.config.granularity == "stack":
            self._watching = [
                block.register_forward_pre_hook(functools.partial(self._see, path))
                for path, blocks in located.others.items()
                for block in blocks
            ]
        self._take_root()
        tells = {"compile": self._take_root, "cache_context": self._named, "enable_cache": self._refuse}
        tells |= dict.fromkeys(DROPPING, self._drop)
        self._tells = {method: tell for method, tell in tells.items() if hasattr(model, method)}
        for method, tell in self._tells.items():
            Watched.on(model, method, tell)

    def __reduce__(self):
        return object.__new__, (StackHook,)

    def _take_root(self, *_, **__) -> None:
        """Hold the beginning and the end of the root's calls: outside its graph where it is compiled in place."""
        self._leave_root()
        root = self._root()
        if root._compiled_call_impl is not None:
            Around.put(root, "_compiled_call_impl", self)
            return
        if self.stack.direct and root is self._model():
            Around.put(root, "forward", self)
            return
        self._root_handles = [
            root.register_forward_pre_hook(self.begin, with_kwargs=True),
            root.register_forward_hook(self.end, always_call=True),
        ]

    def _leave_root(self) -> None:
        for handle in self._root_handles:
            handle.remove()
        self._root_handles = []
        if self._root() is not None:
            Around.take_away(self._root())

    def remove(self) -> None:
        self._clear()
        for handle in (*self._handles, *self._watching):
            handle.remove()
        self._leave_root()
        model = self._model()
        if model is not None:
            for method, tell in self._tells.items():
                Watched.off(model, method, tell)
        self.session = None  # what somebody has wrapped of ours does nothing from now on

    @contextmanager
    def _named(self, context, name: str, *args, **kwargs):
        """The transformer's own context, which also tells the name of the guidance branch."""
        self._name = name
        try:
            with context:
                yield
        finally:
            self._name = None

    def _refuse(self, _, config) -> None:
        model, kind = self._model(), type(config).__name__
        model.disable_cache()
        raise ValueError(f"enable_cache: {type(model).__name__} is cached by AdaCache; remove() it before {kind}")

    def _drop(self, *_, **__) -> None:
        self.session.drop()

    def _clear(self) -> None:
        """Nothing of a forward is left, and the model's own modules are back."""
        for parent, name, module in reversed(self._exchanged):
            parent._modules[name] = module
        self._exchanged = ()
        self.mode = Mode.PLAIN
        streams = len(self.stack.streams) if self.session is not None else 0
        self._entry: tuple | None = None  # the first block's list and arguments
        self._before: list[Tensor | None] = [None] * streams  # in the probed block, attention to come
        self._exits: list[Tensor | None] = [None] * streams  # inputs of the exits
        # In a graph, to be observed after it. What it returns may lie in memory that its next run writes to, as with
        # CUDA graphs, so of that copies are kept.
        self._measured: list[tuple[int, Tensor]] = []
        self.kept: dict[Hashable, Any] = {}  # residuals of blocks
        self.check: Tensor | float = 0.0  # finite as long as all that is kept one by one is

    def _abort(self) -> None:
        self._open = None
        self._clear()
        self.session.forget()
        self.session.clock.abort()

    def begin(self, root: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before the transformer's forward: find out what this call does, and exchange the lists for it."""
        if torch.compiler.is_compiling():
            _refuse_to_be_traced()
        if self.session is None:
            return
        if self._open is not None:
            if self._open is not threading.current_thread() and self._open.is_alive():
                raise RuntimeError(
                    f"AdaCache: a cached {type(self._model()).__name__} is called by two threads at a time; "
                    "let one wait for the other, or give each its own"
                )
            self._abort()  # the last forward was interrupted: no hook runs then
        self._open, self._begun = threading.current_thread(), True
        if torch.is_grad_enabled():
            # A kept residual would hold on to its graph, and a reused one has none.
            self._warn("gradients are enabled, nothing is cached; use torch.no_grad()")
            return
        model, stack = self._model(), self.stack
        call = stack.call(dict(zip(self._arguments, args)) | kwargs, self._name)
        latents = call.arguments[stack.input]
        latents = latents[0] if isinstance(latents, (list, tuple)) else latents  # a list of videos
        if latents.dtype == torch.float64:
            self._warn("the model runs in float64, nothing is cached; expected float32, bfloat16 or float16")
            return
        mode = self.session.begin(call)
        if mode is Mode.COMPUTE:
            self._batch = 1 if stack.layout == "(t s) c" else latents.shape[0]
            self._frames = self._count_frames(model, call.arguments)
            self._tokens = stack.tokens(model, call.arguments) if stack.tokens else None
        if self.session.doubted:
            self._warn(
                "the calls of a step cannot be told apart, so they are computed; where every step makes as many, in "
                "one order, say so by calls_per_step"
            )
        self.mode = mode
        if mode is Mode.COMPUTE and (self._watching or self.session.config.granularity == "module"):
            if root is not model or any(m._compiled_call_impl is not None for m in model.modules()):
                if self.session.config.granularity == "module":
                    raise RuntimeError("config.granularity: 'module' is not for torch.compile; use 'block' or 'stack'")
                self._unwatch()  # a graph would hold these hooks, and another would be made without them
        if mode is not Mode.PLAIN:
            for path in (*stack.lists, *stack.aside):
                parent, _, name = path.rpartition(".")
                parent = model.get_submodule(parent)
                self.exchange(parent, name, self._granularity.exchange(self, path, parent._modules[name]))

    def _count_frames(self, model: nn.Module, arguments) -> int | None:
        """Latent frames, where motion is measured."""
        if self.session.config.motion is None:
            return None
        frames = self.stack.frames(model, arguments)
        if frames is None:
            raise ValueError(
                f"config.motion: expected None for this call of {type(model).__name__}, whose tokens do not lie in "
                "frames: motion cannot be measured"
            )
        return frames

    def exchange(self, parent: nn.Module, name: str, module: nn.Module) -> None:
        """Put a stand-in into the model until the end of this forward."""
        self._exchanged += ((parent, name, parent._modules[name]),)
        parent._modules[name] = module

    def argument(self, path: str, name: str, args: tuple, kwargs: dict) -> Tensor:
        """An argument of a block in the list at `path`, by position or by name."""
        return kwargs[name] if name in kwargs else args[self._positions[path][name]]

    def enter(self, key: tuple[str, int], args: tuple, kwargs: dict) -> None:
        """A block at (list, index) is about to run on a computed step."""
        if self._entry is None:
            self._entry = (key[0], args, kwargs)
        if key == self.probe:
            # In place: behind flex attention, a graph loses what is set on an object.
            self._before[:] = [self.argument(key[0], s.hidden, args, kwargs) for s in self.stack.streams]

    def _approach(self, stream: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.mode is Mode.COMPUTE and self._before[stream] is not None:
            self._before[stream] = self._first(stream, args, kwargs)

    def _measure(self, stream: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.mode is not Mode.COMPUTE or self._before[stream] is None:
            return
        before, self._before[stream] = self._before[stream], None
        after = self._first(stream, args, kwargs)
        if self._tokens is not None and stream == 0:
            before = before[:, self._tokens]
            after = after[:, self._tokens] if after.shape[1] > before.shape[1] else after
        residual = (after - before).to(before.dtype)
        if torch.compiler.is_compiling():
            self._measured.append((stream, residual))
        else:
            self._observe(stream, residual)

    def _observe(self, stream: int, residual: Tensor) -> None:
        if stream:
            view = residual.flatten(1, -2).unsqueeze(1)
        else:
            view = self.stack.view(residual, self._batch, self._frames)
        if view.stride(-1) != 1:
            # A stream that began as a convolution's output keeps its layout, channel by channel. Sums over a frame
            # do not care which of its two axes is called channels.
            view = view.transpose(-1, -2) if view.stride(-2) == 1 else view.contiguous()
        self.session.observe(view, stream)

    def _see(self, path: str, module: nn.Module, args: tuple) -> None:
        """A block of a list that is not described runs. Until a step has been reused, that is noted."""
        inside = self.mode is Mode.COMPUTE and self._entry is not None and self._exits[0] is None
        if (inside or self.mode is Mode.REUSE) and not torch.compiler.is_compiling():
            self._seen[self.mode].add(path)

    def _check_lists(self) -> None:
        """After the first reused step: what runs inside the stack on a computed step must not run on this one."""
        self._unwatch()
        missed = sorted(self._seen[Mode.COMPUTE] & self._seen[Mode.REUSE])
        if missed:
            raise ValueError(
                f"BlockStack.lists: expected {missed[0]!r} among them: its blocks run inside the stack, and would run "
                "on a reused step as well"
            )

    def _unwatch(self) -> None:
        for handle in self._watching:
            handle.remove()
        self._watching = []

    def probed_view(self, key: tuple, place: int):
        """How to see the output of a module as frames where it is the probed attention, else None."""
        attention = self.stack.modules.get("attention", ())[:1]
        probed = key == (*self.probe, *attention, 0) and place == 0 and self.stack.attention_alone
        if dict(self.session.config.modules or ()).get("attention") is not None:
            return None  # it is computed between the steps that are compared, too
        if not probed or self._before[0] is None or self._tokens is not None:
            return None
        return lambda x: self.stack.view(x, self._batch, self._frames)

    def probed(self, residual: Tensor, sums: Tensor | None) -> None:
        """The probed attention was measured where it was added."""
        self._before[0] = None
        self.session.observed(residual, sums)

    def _leave(self, stream: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        if self.mode is not Mode.PLAIN and not args:
            exit = self.stack.streams[stream].exit
            raise ValueError(f"BlockStack.exit: expected {exit!r} to get the stream by position, got {list(kwargs)}")
        if not self._begun and self.session is not None:
            self._warn(
                f"BlockStack.direct: {type(self._model()).__name__}.forward was called past PyTorch's hooks, nothing "
                "is cached; expected True, or a call of the model itself"
            )
        if self.mode is Mode.REUSE and self._exits[stream] is None:
            self._exits[stream] = args[0]
            return (self._granularity.leave(self, self.stack.streams[stream], args[0]), *args[1:]), kwargs
        if self.mode is Mode.COMPUTE and self._entry is not None and self._exits[stream] is None:
            self._exits[stream] = args[0]
        return None

    def _first(self, stream: int, args: tuple, kwargs: dict) -> Tensor:
        return args[0] if args else kwargs[self.stack.streams[stream].hidden]

    def _flows(self, stream: Stream) -> bool:
        """Whether a stream takes part in this forward: the audio of a model that can do without may be None."""
        if self.mode is Mode.REUSE:
            return stream is self.stack.streams[0] or stream.exit in self.session.branch.residuals
        return self._entry is None or self.argument(self._entry[0], stream.hidden, *self._entry[1:]) is not None

    @property
    def in_graph(self) -> bool:
        """Whether the whole forward was a graph's."""
        return bool(self._measured)

    def passed(self) -> Iterator[tuple[Stream, Tensor, Tensor]]:
        """Each stream before its first block, as its exit would get it, and at its exit."""
        path, args, kwargs = self._entry
        for stream, output in zip(self.stack.streams, self._exits):
            if output is None:
                continue
            if stream.entry is None:
                entry = self.argument(path, stream.hidden, args, kwargs)
            else:
                names = self._positions[path]
                arguments = {
                    n: self.argument(path, n, args, kwargs) for n in names if n in kwargs or names[n] < len(args)
                }
                entry = stream.entry(arguments, output)
            if entry.shape != output.shape:
                raise ValueError(
                    f"BlockStack.entry: {stream.exit!r} gets shape {tuple(output.shape)}, "
                    f"the stack's input has {tuple(entry.shape)}; they must be equal"
                )
            yield stream, entry, output

    def end(self, root: nn.Module, args: tuple, output) -> None:
        """After the transformer's forward: keep what it computed. `output` is None where it raised."""
        if self._open is not threading.current_thread():
            return  # it is a copy's, or the call of a second thread, which was refused
        self._begun = False
        missing = [s.exit for s, x in zip(self.stack.streams, self._exits) if x is None and self._flows(s)]
        if output is None:
            self._abort()
        elif self.mode is not Mode.PLAIN and missing:
            message, reused = f"BlockStack.exit: {missing[0]!r} did not run after the blocks", self.mode is Mode.REUSE
            self._abort()
            if reused:
                raise RuntimeError(f"AdaCache: {message} of a reused step, as it did of a computed one")
            self._warn(f"{message}, nothing is cached")
        elif self.mode is Mode.COMPUTE:
            for stream, residual in self._measured:
                self._observe(stream, residual.clone())
            residuals, check = self._granularity.residuals(self)
            session, streams = self.session, sum(map(self._flows, self.stack.streams))
            self._clear()
            session.keep(residuals, check, streams)
            if len(session.branch.probes) < streams and not session.over:
                self._warn(
                    f"BlockStack.probe_after: {self.stack.probe_after!r} did not run in the probed block, "
                    "so every step is computed"
                )
        reused = self.mode is Mode.REUSE
        self._open = None
        self._clear()
        if reused and self._watching:
            self._check_lists()

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"AdaCache: {message}", stacklevel=4)


@torch.compiler.assume_constant_result  # it runs while a graph is made: what a graph raises only breaks it
def _refuse_to_be_traced() -> None:
    raise RuntimeError(
        "AdaCache: a transformer was cached and then given to torch.compile; call torch.compile first, "
        "or compile it in place with transformer.compile()"
    )


class Around:
    """In the place of a transformer's forward, or of its compiled call: with beginning and end around it."""

    def __init__(self, root: nn.Module, name: str, hook: StackHook):
        self.own = vars(root).get(name)
        self._root, self._name, self._hook = weakref.ref(root), name, hook

    @property
    def __wrapped__(self):  # pipelines inspect the signature
        return self.own or getattr(type(self._root()), self._name).__get__(self._root())

    def __call__(self, *args, **kwargs):
        root, output = self._root(), None
        try:
            self._hook.begin(root, args, kwargs)
            output = self.__wrapped__(*args, **kwargs)
        finally:
            self._hook.end(root, args, output)
        return output

    def __reduce__(self):
        # Copying and pickling reach the root first, so this is the plain forward of the root's copy.
        return getattr, (self._root(), self._name)

    @staticmethod
    def put(root: nn.Module, name: str, hook: StackHook) -> None:
        vars(root)[name] = Around(root, name, hook)

    @staticmethod
    def take_away(root: nn.Module) -> None:
        for name in ("_compiled_call_impl", "forward"):
            around = vars(root).get(name)
            if isinstance(around, Around):
                vars(root).pop(name)
                if around.own is not None:
                    vars(root)[name] = around.own
