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
import torch.distributed as dist
from torch import Tensor, nn

from .batch import Batch, Part
from .distributed import group_of, sequence_group
from .granularity import GRANULARITIES
from .session import Branch, Call, Mode
from .split import join, take
from .stack import Located, Stream
from .standins import ended
from .stopwatch import mark
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
    transformer is uncached: the hooks that came along have no batch.
    """

    batch: Batch | None = None
    mode = Mode.PLAIN
    _open: threading.Thread | None = None  # that is inside a forward
    _begun = False  # whether one is; what a graph may ask
    _exchanged: tuple = ()

    def __init__(self, root: nn.Module, located: Located, batch: Batch):
        """`root` is what is called: the transformer, or what `torch.compile` made of it."""
        model = getattr(root, "_orig_mod", root)
        self._root, self._model = weakref.ref(root), weakref.ref(model)
        self.stack, self.batch = located.stack, batch
        self.probe = (located.probe_list, located.probe_index)
        self._arguments, self._positions = located.arguments, located.positions
        self._granularity = GRANULARITIES[batch.config.granularity]
        self._frames, self._tokens = None, None
        self._sequence: dist.ProcessGroup | None = None  # ranks that hold runs of the tokens, where motion is measured
        self._waiting: list[Part] = []  # of a batch that was split, until the first of its parts is through
        self._next: Part | None = None  # of them, about to run
        self._inner = False  # whether such a part runs
        self._reused = False  # whether any part of any forward did
        self._call: Call | None = None  # that was split
        self._name: str | None = None  # of the guidance branch
        self.warned: set[str] = set()
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
        if batch.config.granularity == "stack":
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
            root.register_forward_pre_hook(self.begin, with_kwargs=True, prepend=True),
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
        self.batch = None  # what somebody has wrapped of ours does nothing from now on

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
        self.batch.drop()

    def _clear(self) -> None:
        """Nothing of a forward is left, and the model's own modules are back."""
        for parent, name, module in reversed(self._exchanged):
            parent._modules[name] = module
        self._exchanged = ()
        self.mode = Mode.PLAIN
        streams = len(self.stack.streams) if self.batch is not None else 0
        self._entry: tuple | None = None  # the first block's list and arguments
        self._before: list[Tensor | None] = [None] * streams  # in the probed block, attention to come
        self._exits: list[Tensor | None] = [None] * streams  # inputs of the exits
        # In a graph, to be observed after it. What it returns may lie in memory that its next run writes to, as with
        # CUDA graphs, so of that copies are kept.
        self._measured: list[tuple[int, Tensor]] = []
        self.kept: dict[Hashable, Any] = {}  # residuals of blocks
        self.check: Tensor | float = 0.0  # finite as long as all that is kept one by one is

    def _abort(self) -> None:
        self._open, self._waiting, self._next, self._call = None, [], None, None
        self._clear()
        self.batch.part = None
        self.batch.forget()
        self.batch.clock.abort()

    def leave(self) -> None:
        """A step was left, maybe from inside a forward."""
        if self._open is threading.current_thread():
            self._abort()

    @property
    def branch(self) -> Branch:
        return self.batch.branch

    def begin(self, root: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before the transformer's forward: find out what this call does, and exchange the lists for it.

        Where the videos of a batch do not all do the same, the call goes on with those of the first part.
        """
        if torch.compiler.is_compiling():
            _refuse_to_be_traced()
        if self.batch is None:
            return None
        if self._next is not None and self._open is threading.current_thread():
            part, self._next, self._begun = self._next, None, True
            self._exchange(root, part, kwargs)
            return None
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
            return None
        call = self.stack.call(dict(zip(self._arguments, args)) | kwargs, self._name)
        if call.dtype == torch.float64:
            self._warn("the model runs in float64, nothing is cached; expected float32, bfloat16 or float16")
            return None
        parts = self.batch.begin(call, single=self._one_by_one(root))
        if self.batch.doubted:
            self._warn(
                "the calls of a step cannot be told apart, so they are computed; where every step makes as many, in "
                "one order, say so by calls_per_step"
            )
        if not parts:
            return None
        if len(parts) == 1:
            self._exchange(root, parts[0], call.arguments)
            return None
        if self._root_handles:  # others' hooks see each part once: begin comes before them, end after
            root._forward_hooks.move_to_end(self._root_handles[1].id)
        self._call, (first, *self._waiting) = call, parts
        arguments = self._rows_of(call, first)
        self._exchange(root, first, arguments)
        return (), arguments

    def _rows_of(self, call: Call, part: Part) -> dict[str, Any]:
        stack = self.stack
        return take(call.arguments, part.rows, call.batch, stack.shared, (stack.input, *stack.listed), part.videos)

    def _one_by_one(self, root: nn.Module) -> bool:
        """Whether each video needs a part of its own: what modules keep is of one, and a graph of one batch size."""
        config, model = self.batch.config, self._model()
        if not config.per_video or config.granularity != "stack":
            return config.per_video
        blocks = (block for path in self.stack.lists for block in model.get_submodule(path))
        return root is not model or any(m._compiled_call_impl is not None for m in (model, *blocks))

    def _compiled(self, root: nn.Module) -> bool:
        return root is not self._model() or any(m._compiled_call_impl is not None for m in root.modules())

    def _exchange(self, root: nn.Module, part: Part, arguments) -> None:
        """Put the stand-ins for a part's forward into the model."""
        model, stack = self._model(), self.stack
        self.batch.part, mode = part, part.mode
        if mode is Mode.COMPUTE:
            # Once found it stays: blocks that FSDP2 has gathered do not tell any more.
            self.batch.group = self.batch.group or group_of(model, self._first_blocks(model), self.batch.given)
            self._frames = self._count_frames(model, arguments)
            self._sequence = None
            if self._frames is not None and self.batch.group is not None:
                probed = model.get_submodule(self.probe[0])[self.probe[1]]
                self._sequence = sequence_group(model, probed, stack.sequence_shards, self.batch.given)
            self._tokens = stack.tokens(model, arguments) if stack.tokens else None
        latents = arguments[stack.input]
        self.mode, self._device = mode, (latents if isinstance(latents, Tensor) else latents[0]).device
        self._began = mark(self._device)
        if mode is Mode.COMPUTE and (self._watching or self.batch.config.granularity == "module"):
            if self._compiled(root):
                if self.batch.config.granularity == "module":
                    raise RuntimeError("config.granularity: 'module' is not for torch.compile; use 'block' or 'stack'")
                self._unwatch()  # a graph would hold these hooks, and another would be made without them
        for path in (*stack.lists, *stack.aside):
            parent, _, name = path.rpartition(".")
            parent = model.get_submodule(parent)
            blocks = self._granularity.exchange(self, path, parent._modules[name])
            self.exchange(parent, name, ended(blocks, self, path) if path == stack.exit else blocks)

    def _first_blocks(self, model: nn.Module) -> list[nn.Module]:
        """One of each list; blocks of a list are of a kind."""
        return [model.get_submodule(path)[0] for path in self.stack.lists]

    def _count_frames(self, model: nn.Module, arguments) -> int | None:
        """Latent frames, where motion is measured."""
        if self.batch.config.motion is None:
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
        if key == self.probe and self.batch.config.schedule is None:
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
        if torch.compiler.is_compiling():
            self._measured.append((stream, (after - before).to(before.dtype)))
            return
        after, before = (self.batch.part.split(self._view(stream, x)) for x in (after, before))
        self._observe([self._unit((a - b).to(b.dtype), stream) for a, b in zip(after, before)], stream)

    def _observe(self, residuals: list[Tensor], stream: int) -> None:
        sharded = (self._sequence, self._frames) if self._sequence and stream == 0 else None
        self.batch.observe(residuals, stream, sharded)

    def _unit(self, residual: Tensor, stream: int) -> Tensor:
        """The residual with unit stride in its last dimension.

        A stream that began as a convolution's output keeps its layout, channel by channel. Sums over a frame do not
        care which of its two axes is called channels; over a run of tokens they do.
        """
        if residual.stride(-1) == 1:
            return residual
        if residual.stride(-2) == 1 and (self._sequence is None or stream):
            return residual.transpose(-1, -2)
        return residual.contiguous()

    def _view(self, stream: int, x: Tensor) -> Tensor:
        """A stream in the probed block as [B, T, S, C]."""
        if stream:
            return x.flatten(1, -2).unsqueeze(1)
        frames = None if self._sequence else self._frames
        return self.stack.view(x, len(self.batch.part.rows), frames)

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
        if dict(self.batch.config.modules or ()).get("attention") is not None:
            return None  # it is computed between the steps that are compared, too
        if not probed or self._before[0] is None or self._tokens is not None or self._sequence is not None:
            return None
        return functools.partial(self._view, 0)

    def probed(self, residual: Tensor, sums: Tensor | None) -> None:
        """The probed attention was measured where it was added."""
        self._before[0] = None
        self.batch.observed(residual, sums)

    def _leave(self, stream: int, module: nn.Module | None, args: tuple, kwargs: dict) -> tuple | None:
        if self.mode is not Mode.PLAIN and not args:
            exit = self.stack.streams[stream].exit
            raise ValueError(f"BlockStack.exit: expected {exit!r} to get the stream by position, got {list(kwargs)}")
        if not self._begun and self.batch is not None:
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

    def left(self, output: Tensor) -> Tensor:
        """The stream behind the last block, where no module gets it."""
        changed = self._leave(0, None, (output,), {})
        return output if changed is None else changed[0][0]

    def _first(self, stream: int, args: tuple, kwargs: dict) -> Tensor:
        return args[0] if args else kwargs[self.stack.streams[stream].hidden]

    def _flows(self, stream: Stream) -> bool:
        """Whether a stream takes part in this forward: the audio of a model that can do without may be None."""
        if self.mode is Mode.REUSE:
            return stream is self.stack.streams[0] or stream.exit in self.batch.part.sessions[0].branch.residuals
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

    def end(self, root: nn.Module, args: tuple, output):
        """After the transformer's forward: keep what it computed. `output` is None where it raised.

        Where the batch was split, the transformer runs for the other parts, and all outputs are returned as one.
        """
        if self._open is not threading.current_thread():
            return None  # it is a copy's, or the call of a second thread, which was refused
        self._begun = False
        missing = [s.exit for s, x in zip(self.stack.streams, self._exits) if x is None and self._flows(s)]
        if output is None:
            self._abort()
        elif self.mode is not Mode.PLAIN and missing:
            message, reused = f"BlockStack.exit: {missing[0]!r} did not run after the blocks", self.mode is Mode.REUSE
            several = bool(self._waiting) or self._inner
            self._abort()
            if reused:
                raise RuntimeError(f"AdaCache: {message} of a reused step, as it did of a computed one")
            if several:
                raise RuntimeError(f"AdaCache: {message} of a part of the batch")
            self._warn(f"{message}, nothing is cached")
        if output is not None and self.mode is not Mode.PLAIN:
            now, sessions = mark(self._device), self.batch.part.sessions
            for session in sessions:
                session.stopwatch.called(session.step, self._began, now, len(sessions))
        if output is not None and self.mode is Mode.COMPUTE:
            for stream, residual in self._measured:
                view = self._unit(self._view(stream, residual), stream)
                self._observe([x.clone() for x in self.batch.part.split(view)], stream)
            residuals, checks = self._granularity.residuals(self)
            sessions, streams = self.batch.part.sessions, sum(map(self._flows, self.stack.streams))
            self._clear()
            self.batch.keep(residuals, checks, streams)
            unseen = any(len(each.branch.probes) < streams and not each.over for each in sessions)
            if unseen and self.batch.config.schedule is None:
                self._warn(
                    f"BlockStack.probe_after: {self.stack.probe_after!r} did not run in the probed block, "
                    "so every step is computed"
                )
        self._reused = self._reused or self.mode is Mode.REUSE
        if self.mode is Mode.REUSE:
            for session in self.batch.part.sessions:
                if session.over:
                    session.branch.clear()
        self._clear()
        if self._inner:
            return None  # the other parts are still to come
        joined = self._run_waiting(root, output) if self._waiting else None
        self._open = self.batch.part = None
        if self._reused and self._watching:
            self._check_lists()
        return joined

    def _run_waiting(self, root: nn.Module, output):
        """The transformer's call for each of the other parts; the outputs of all as that of one call."""
        call, self._call = self._call, None
        parts, self._waiting = self._waiting, []
        outputs, rows = [output], [self.batch.part.rows]
        self._inner = True
        try:
            for self._next in parts:
                rows.append(self._next.rows)
                outputs.append(root(**self._rows_of(call, self._next)))
        finally:
            self._inner, self._next = False, None
        listed = not isinstance(call.arguments[self.stack.input], Tensor)
        return join(outputs, rows, call.batch, listed=listed)

    def _warn(self, message: str) -> None:
        if message not in self.warned:
            self.warned.add(message)
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
        root, output, joined = self._root(), None, None
        try:
            args, kwargs = self._hook.begin(root, args, kwargs) or (args, kwargs)
            output = self.__wrapped__(*args, **kwargs)
        finally:
            joined = self._hook.end(root, args, output)
        return output if joined is None else joined

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
