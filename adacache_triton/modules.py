"""Granularity `module`: attention, cross-attention and MLP each keep what they add to the hidden state.

A block does `hidden + gate * attention(...)` in its own code. What a cached module returns there is a tensor that
waits: it notes its gate, and when it meets the hidden state, gate, sum, kept residual and, in the probed block,
the distance are taken in one pass (`kernels.gated_residual`). On a reused step the module does not run, and what
it returns stands for its kept residual until it is added.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .kernels import gated_residual, reuse
from .session import Mode
from .stack import Stream
from .standins import StandIn, Tap, replaced


@dataclass(eq=False)
class Output:
    """One output of a module: what it added, each time that it or a slice of it was added to something.

    Where the block does anything else with it (a norm, say), the output itself is kept instead.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    residuals: list[Tensor] = field(default_factory=list)
    plain: Tensor | None = None


@dataclass(eq=False)
class Kept:
    """The outputs of a module when it last ran; None for what was no tensor. `reuses` in a row since then."""

    outputs: list[Output | None]
    single: bool
    reuses: int = 0

    def tensors(self) -> list[Tensor]:
        some = [output for output in self.outputs if output is not None]
        return [t for output in some for t in (*output.residuals, output.plain) if t is not None]


class Modules:
    """A residual for each module; blocks run, but of them only what is not cached."""

    @staticmethod
    def exchange(hook, path: str, blocks: nn.ModuleList) -> nn.ModuleList:
        if path in hook.stack.aside:
            return blocks
        cached = dict(hook.batch.config.modules or dict.fromkeys(hook.stack.modules))
        for i, block in enumerate(blocks):
            for name, limit in cached.items():
                for module in hook.stack.modules.get(name, ()):
                    parent, _, child = module.rpartition(".")
                    try:
                        parent = block.get_submodule(parent)
                    except AttributeError:
                        continue  # blocks of another list have other modules
                    while child not in parent._modules and isinstance(getattr(parent, child, None), nn.Module):
                        (parent,) = parent.children()  # of a wrapper, such as FSDP1's, that hands all else on
                    if parent._modules.get(child) is not None:
                        part = Part(parent._modules[child], hook, (path, i, module))
                        part.__dict__.update(limit=limit, calls=0)
                        hook.exchange(parent, child, part)
        if hook.mode is Mode.REUSE:
            return blocks
        tapped = {0, hook.probe[1]} if path == hook.probe[0] else {0}
        return replaced(blocks, {i: Tap(blocks[i], hook, (path, i)) for i in tapped})

    @staticmethod
    def leave(hook, stream: Stream, hidden: Tensor) -> Tensor:
        return hidden

    @staticmethod
    def residuals(hook) -> tuple[list[dict], list[Tensor]]:
        exits = sum(output.sum(dtype=torch.float32) for _, _, output in hook.passed())
        return [hook.branch.residuals], [hook.check + exits]


class Part(StandIn):
    """In the place of a module of a block."""

    def forward(self, *args, **kwargs):
        residuals = self.hook.branch.residuals
        key = (*self.key, self.calls)  # a block may call a module twice
        self.__dict__["calls"] += 1
        kept = residuals.get(key)
        if self.hook.mode is Mode.REUSE and kept is not None and (self.limit is None or kept.reuses < self.limit):
            kept.reuses += 1
            return self._form(kept.single, [self._replay(key, output) for output in kept.outputs])
        result = self.module(*args, **kwargs)
        if not isinstance(result, (Tensor, tuple, list)):
            path, index, module = self.key
            got = f"{module!r} of block {index} in {path!r} returned a {type(result).__name__}"
            raise TypeError(f"BlockStack.modules: expected modules that return tensors, but {got}")
        results = [result] if isinstance(result, Tensor) else list(result)
        outputs = [Output(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else None for x in results]
        # On a reused step a module computes beside what is compared at the next computed one: into new buffers.
        overwritten = kept is not None and self.hook.mode is Mode.COMPUTE
        before = kept.outputs if overwritten else [None] * len(outputs)
        residuals[key] = Kept(outputs, isinstance(result, Tensor))
        waiting = [
            x if output is None else Waiting.of(x, Computing(self.hook, key, output, old, x))
            for x, output, old in zip(results, outputs, before)
        ]
        return self._form(isinstance(result, Tensor), waiting)

    def _replay(self, key: tuple, output: Output | None) -> Tensor | None:
        if output is None or output.plain is not None:
            return output and output.plain.clone()  # a block may write into it
        nothing = torch.empty((), dtype=output.dtype, device=output.device).expand(output.shape)
        return Waiting.of(nothing, Replaying(key, output))

    @staticmethod
    def _form(single: bool, outputs: list):
        return outputs[0] if single else tuple(outputs)


@dataclass(eq=False)
class Computing:
    """Where a computed output meets the hidden state."""

    hook: object
    key: tuple
    output: Output
    old: Output | None
    result: Tensor

    def add(self, branch: Tensor, gate: Tensor | None, hidden: Tensor, in_place: bool, first: bool) -> Tensor | None:
        """hidden + gate * branch, and the residual kept; None where shapes differ. `first`: the branch stood first."""
        if hidden.shape != branch.shape:
            return None
        dtype = branch.dtype if gate is None else torch.promote_types(gate.dtype, branch.dtype)
        tensors = (hidden, branch) if gate is None else (hidden, branch, gate)
        if (
            hidden.dim() != 3
            or torch.promote_types(hidden.dtype, dtype) != hidden.dtype
            or any(t.stride(-1) != 1 for t in tensors)
        ):
            residual = branch.clone() if gate is None else gate * branch
            self._keep(residual)
            if in_place:
                return hidden.add_(residual)
            return residual + hidden if first else hidden + residual  # whose layout the sum takes over
        hook, place = self.hook, len(self.output.residuals)
        kept = self.old.residuals[place] if self.old is not None and place < len(self.old.residuals) else None
        fits = kept is not None and kept.shape == branch.shape and kept.dtype == branch.dtype
        kept = kept if fits else torch.empty_like(branch, memory_format=torch.contiguous_format)
        view = hook.probed_view(self.key, place) if branch.shape == self.output.shape else None
        measured = 0 in hook.branch.probes
        if measured and not fits:
            view = None  # what was kept is elsewhere: it is compared after the sum
        as_frames = view or (lambda x: x.unsqueeze(1))
        out = hidden if in_place else torch.empty_like(hidden)
        _, sums = gated_residual(
            as_frames(hidden),
            as_frames(branch),
            None if gate is None else as_frames(gate.expand(hidden.shape)),
            as_frames(kept),
            measure=measured and view is not None,
            frame_strides=hook.batch.frame_strides,
            metric=hook.batch.config.metric,
            out=as_frames(out),
        )
        self._keep(kept)
        if view is not None:
            hook.probed(view(kept), sums)
        return out

    def _keep(self, residual: Tensor) -> None:
        self.output.residuals.append(residual)
        if residual.dtype == torch.float16:  # it may overflow where the stream, in a wider dtype, does not
            self.hook.check = self.hook.check + residual.sum(dtype=torch.float32)

    def gated(self, branch: Tensor, gate: Tensor | None) -> Tensor:
        """What will be added, where the gate's product is looked at from another side before."""
        return branch if gate is None else gate * branch

    choose = staticmethod(torch.where)

    def settle(self) -> None:
        """Something else than a sum is about to be done with it: keep the output as it is now."""
        if self.output.plain is None:
            self.output.plain = self.result.clone()
            self.output.residuals.clear()


@dataclass(eq=False)
class Replaying:
    """Where the kept residual of an output meets the hidden state."""

    key: tuple
    output: Output
    place: int = 0

    def add(self, branch: Tensor, gate: Tensor | None, hidden: Tensor, in_place: bool, first: bool) -> Tensor:
        self.place += 1
        if self.place > len(self.output.residuals):
            self.settle()
        residual = self.output.residuals[self.place - 1]
        if in_place:
            return reuse(hidden, residual, out=hidden)
        return reuse(hidden.to(torch.promote_types(hidden.dtype, residual.dtype)), residual)

    def gated(self, branch: Tensor, gate: Tensor | None) -> Tensor:
        return branch  # it only has a shape

    def choose(self, condition: Tensor, branch: Tensor, other: Tensor) -> Tensor:
        return branch

    def settle(self) -> None:
        path, index, module, _ = self.key
        raise RuntimeError(
            f"AdaCache: block {index} of {path!r} uses the output of {module!r} otherwise on a reused step than it "
            "did on a computed one; use granularity 'block' or 'stack'"
        )


_ADDS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, operator.add}
_ADDS_IN_PLACE = {Tensor.add_, Tensor.__iadd__}
_GATES = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, operator.mul}
_CHOICES = {torch.where}
_VIEWS = {
    Tensor.__getitem__, Tensor.unsqueeze, Tensor.squeeze, Tensor.view, Tensor.reshape, Tensor.flatten,
    Tensor.unflatten, Tensor.transpose, Tensor.permute, Tensor.chunk, Tensor.split, Tensor.contiguous,
    Tensor.to, Tensor.float, Tensor.type_as,
    torch.unsqueeze, torch.squeeze, torch.reshape, torch.flatten, torch.unflatten, torch.transpose, torch.permute,
    torch.chunk, torch.split,
}  # fmt: skip
_FACTS = {
    Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.ndim.__get__, Tensor.layout.__get__,
    Tensor.requires_grad.__get__, Tensor.is_cuda.__get__, Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride,
    Tensor.is_floating_point, torch.is_floating_point, Tensor.is_complex, torch.is_complex, Tensor.__len__,
}  # fmt: skip


class Waiting(Tensor):
    """An output of a cached module until it is added to the hidden state. Views of it wait as well."""

    @classmethod
    def of(cls, data: Tensor, site, gate: Tensor | None = None) -> Waiting:
        waiting = data.as_subclass(cls)
        waiting.site, waiting.gate = site, gate
        return waiting

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _FACTS:
                return func(*args, **kwargs)
            first, *rest = args
            one = sum(isinstance(x, Waiting) for x in args) == 1
            if one and len(rest) == 1 and not kwargs:
                waiting, other = (first, rest[0]) if isinstance(first, Waiting) else (rest[0], first)
                if isinstance(other, Tensor):
                    if func in _GATES and waiting.gate is None and _broadcasts(other, waiting):
                        return cls.of(waiting.as_subclass(Tensor), waiting.site, other)
                    in_place = func in _ADDS_IN_PLACE
                    if func in _ADDS or (in_place and waiting is not first):
                        added = waiting.site.add(
                            waiting.as_subclass(Tensor), waiting.gate, other, in_place, waiting is first
                        )
                        if added is not None:
                            return added
            if func in _CHOICES and len(rest) == 2 and not kwargs and _alike(first, *rest):
                chosen = [first, *(x.site.gated(x.as_subclass(Tensor), x.gate) for x in rest)]
                return cls.of(rest[0].site.choose(*chosen), rest[0].site)
            if func in _VIEWS and one and isinstance(first, Waiting):
                if func is Tensor.contiguous and isinstance(first.site, Replaying):
                    return first
                result = func(first.site.gated(first.as_subclass(Tensor), first.gate), *rest, **kwargs)
                again = [cls.of(x, first.site) for x in (result if isinstance(result, (tuple, list)) else [result])]
                return type(result)(again) if isinstance(result, (tuple, list)) else again[0]
            args, kwargs = torch.utils._pytree.tree_map_only(Waiting, _settled, (args, kwargs))
            return func(*args, **kwargs)


def _broadcasts(gate: Tensor, branch: Tensor) -> bool:
    """Whether a gate's shape goes into the branch's, channel by channel."""
    sizes = zip(reversed(gate.shape), reversed(branch.shape))
    return (
        gate.dim() > 0
        and gate.dim() <= branch.dim()
        and all(g in (1, b) for g, b in sizes)
        and (gate.shape[-1] == branch.shape[-1])
    )


def _alike(condition: Tensor, branch, other) -> bool:
    """Whether both are one output, gated in two ways, and the condition only chooses between them."""
    return (
        all(isinstance(x, Waiting) for x in (branch, other))
        and branch.site is other.site
        and branch.shape == other.shape == torch.broadcast_shapes(condition.shape, branch.shape)
    )


def _settled(waiting: Waiting) -> Tensor:
    waiting.site.settle()
    data = waiting.as_subclass(Tensor)
    return data if waiting.gate is None else waiting.gate * data
