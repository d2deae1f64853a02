"""The operations as models call them, and the bytes that each call moves.

One list for the tests, the tables and the benchmarks. Whoever binds a case says what a tensor is: random values on
a GPU, or nothing but a shape.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from adacache_triton.kernels import (
    Motion,
    Rule,
    as_frames,
    decide,
    gated_residual,
    keep,
    relative_distance,
    residual_stats,
    reuse,
)

BANDWIDTH = 4.8e12  # bytes/s of an H200, by its data sheet
BF16, FP32 = torch.bfloat16, torch.float32

# [B, T, S, C] of the residuals. Open-Sora and Latte have both guidance branches in the batch.
SHAPES = {
    "Open-Sora 480p": (2, 15, 1590, 1152),  # 2 s
    "Open-Sora 720p": (2, 15, 3600, 1152),  # 2 s
    "Latte 512": (2, 16, 1024, 1152),
    "Latte 256": (2, 16, 256, 1152),  # too few tokens to fill a chip
    "Wan 14B 720p": (1, 21, 3600, 5120),
    "HunyuanVideo 720p": (1, 33, 3600, 3072),
}
MODELS = tuple(SHAPES)
RULE = Rule(100, (0.03, 0.05, 0.07, 0.09, 0.11), (12, 10, 8, 6, 4, 3), motion=Motion((10, 90)))

Make = Callable[..., torch.Tensor]  # make(*shape, dtype=...), a tensor


@dataclass(frozen=True)
class Case:
    """A call at the shape of a model; `bind(make)` gives it with its tensors."""

    operation: str
    model: str
    what: str  # tells it from the other cases of the operation; empty for the plain one
    bind: Callable[[Make], partial]

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.operation, self.model, self.what)))


def frame_major(make: Make, shape, dtype=BF16) -> torch.Tensor:
    return make(*shape, dtype=dtype)


def spatial_major(make: Make, shape, dtype=BF16) -> torch.Tensor:
    """As in the temporal blocks of Latte and Open-Sora, which run on [B * S, T, C]."""
    b, t, s, c = shape
    return make(b, s, t, c, dtype=dtype).transpose(1, 2)


def beside_text(make: Make, shape, dtype=BF16) -> torch.Tensor:
    """The video tokens of a sequence that ends with 256 tokens of text, as in HunyuanVideo."""
    b, t, s, c = shape
    return as_frames(make(b, t * s + 256, c, dtype=dtype), t, stop=t * s)


def stats(model, what="", new=frame_major, old=frame_major, dtypes=(BF16, BF16), **options) -> Case:
    def bind(make):
        tensors = new(make, SHAPES[model], dtypes[0]), old and old(make, SHAPES[model], dtypes[1])
        return partial(residual_stats, *tensors, **{"frame_strides": (1,), "refresh": old is not None} | options)

    return Case("residual_stats", model, what, bind)


GATES = {
    "sample": lambda b, t, s, c: (b, 1, 1, c),
    "frame": lambda b, t, s, c: (b, t, 1, c),
    "token": lambda b, t, s, c: (b, t, s, c),
}


def gated(model, what="", per="sample", layout=frame_major, dtypes=(BF16, BF16), in_place=False, **options) -> Case:
    """`dtypes` are of the stream (hidden, branch) and of the gate; the residual is kept in that of the branch."""
    if model.startswith("Wan"):
        dtypes = (dtypes[0], FP32)  # its modulation is float32

    def bind(make):
        shape = SHAPES[model]
        hidden, branch = (layout(make, shape, dtype) for dtype in (dtypes[0], BF16))
        gate = per and make(*GATES[per](*shape), dtype=dtypes[1])
        chosen = {"frame_strides": (1,), "out": hidden if in_place else None} | options
        return partial(gated_residual, hidden, branch, gate, frame_major(make, shape), **chosen)

    return Case("gated_residual", model, what, bind)


def reused(model, what="", count=1, weights=None, layout=frame_major, dtypes=(BF16, BF16), **options) -> Case:
    def bind(make):
        hidden = layout(make, SHAPES[model], dtypes[0])
        residuals = tuple(frame_major(make, SHAPES[model], dtypes[1]) for _ in range(count))
        return partial(reuse, hidden, residuals, weights and make(*weights, dtype=FP32), **options)

    return Case("reuse", model, what, bind)


def kept(model, what="", history=0, depth=1, ratio=False, layout=frame_major, dtypes=(BF16, BF16)) -> Case:
    def bind(make):
        shape = SHAPES[model]
        output, input = (layout(make, shape, dtypes[0]) for _ in range(2))
        before = tuple(frame_major(make, shape, dtypes[1]) for _ in range(history))
        steps = make(shape[0], dtype=FP32) if ratio else None
        return partial(keep, output, input, before, depth=depth, ratio=steps, dtype=dtypes[1])

    return Case("keep", model, what, bind)


def compared(model, what="", **options) -> Case:
    def bind(make):
        b, t, s, c = SHAPES[model]
        return partial(relative_distance, *(make(b, t * s, c, dtype=BF16) for _ in range(2)), **options)

    return Case("relative_distance", model, what, bind)


def decided(model, what="", videos=1, rule=RULE, columns=4) -> Case:
    def bind(make):
        return partial(decide, make(SHAPES[model][0], columns, dtype=FP32), make(videos, 4, dtype=FP32), rule)

    return Case("decide", model, what, bind)


def whole(model) -> Case:
    def bind(make):
        tensors = (make(*SHAPES[model], dtype=BF16) for _ in range(2))
        return partial(decision, *tensors, make(1, 4, dtype=FP32), RULE)

    return Case("decision", model, "", bind)


def decision(new, old, state, rule) -> None:
    """All that AdaCache does at a computed step beside the model's own work."""
    decide(residual_stats(new, old, frame_strides=(1,), refresh=True), state, rule)


def plain(model) -> list[Case]:
    """Each operation once, and what extrapolation needs."""
    return [
        stats(model),
        gated(model),
        reused(model),
        reused(model, "two, weights per sample", 2, (SHAPES[model][0], 2)),
        kept(model, history=1),
        kept(model, "depth 2", 2, 2, True),
        compared(model),
    ]


def timed(*models) -> list[Case]:
    """What the benchmarks run."""
    return [case for model in models for case in plain(model)] + [decided(models[0]), *map(whole, models)]


CASES = [
    *(case for model in MODELS for case in plain(model)),
    stats("Open-Sora 720p", "spatial-major", new=spatial_major, old=spatial_major),
    stats("Latte 512", "spatial-major", new=spatial_major, old=spatial_major),
    stats("Latte 512", "spatial-major, kept frame-major", new=spatial_major),
    stats("HunyuanVideo 720p", "beside text", new=beside_text),
    stats("Open-Sora 720p", "no motion", frame_strides=()),
    stats("Open-Sora 720p", "no refresh", refresh=False),
    stats("Open-Sora 720p", "first step", old=None),
    stats("Open-Sora 720p", "strides 1 and 2", frame_strides=(1, 2)),
    stats("Open-Sora 720p", "l2", metric="l2"),
    stats("Open-Sora 720p", "cosine", metric="cosine"),
    stats("Open-Sora 720p", "float32", dtypes=(FP32, FP32)),
    stats("Open-Sora 720p", "float32, kept bfloat16", dtypes=(FP32, BF16)),
    stats("Open-Sora 720p", "kept float32", dtypes=(BF16, FP32)),
    gated("HunyuanVideo 720p", "beside text", layout=beside_text),
    gated("Latte 512", "spatial-major, kept frame-major", layout=spatial_major),
    gated("Open-Sora 720p", "in place", in_place=True),
    gated("Open-Sora 720p", "not measured", measure=False),
    gated("Open-Sora 720p", "no gate", per=None),
    gated("Open-Sora 720p", "gate per frame", per="frame"),
    gated("Open-Sora 720p", "strides 1 and 2", frame_strides=(1, 2)),
    gated("Open-Sora 720p", "float32 hidden", dtypes=(FP32, BF16)),
    gated("Wan 14B 720p", "gate per token", per="token"),
    gated("Wan 14B 720p", "float32 hidden", dtypes=(FP32, FP32)),
    reused("HunyuanVideo 720p", "beside text", layout=beside_text),
    reused("Open-Sora 720p", "weighted", weights=(1,)),
    reused("Open-Sora 720p", "three, weights per sample", 3, (2, 3)),
    reused("Open-Sora 720p", "float32", dtypes=(FP32, FP32)),
    reused("Wan 14B 720p", "kept float32", dtypes=(BF16, FP32)),
    reused("Wan 14B 720p", "float32, two kept bfloat16", 2, (2,), dtypes=(FP32, BF16)),
    kept("Open-Sora 720p", "first, nothing compared"),
    kept("HunyuanVideo 720p", "beside text", history=1, layout=beside_text),
    kept("Open-Sora 720p", "depth 3", 3, 3, True),
    kept("Open-Sora 720p", "depth 2, float32", 2, 2, dtypes=(FP32, FP32)),
    kept("Open-Sora 720p", "depth 2, kept float32", 2, 2, dtypes=(BF16, FP32)),
    kept("Wan 14B 720p", "depth 2, float32, kept bfloat16", 2, 2, dtypes=(FP32, BF16)),
    compared("Open-Sora 720p", "refresh", refresh=True),
    decided("Open-Sora 720p"),
    decided("Open-Sora 720p", "per sample", videos=2),
]


@dataclass(frozen=True)
class Moved:
    """Bytes that a call reads of one tensor and writes to it; `size` is what the tensor holds."""

    size: int
    read: int = 0
    written: int = 0

    @property
    def floor(self) -> int:
        """What has to come from memory at least: what is read again can come from a cache."""
        return min(self.read, self.size) + min(self.written, self.size)


def traffic(call: partial, span: int | None = None) -> dict[str, Moved]:
    """What the kernels of a call move, by argument, each tensor in its own dtype.

    Partial sums are not in it: a float a column and program, written once and read once.

    Args:
        span: frames that one program walks, in the operations that walk over frames; None is all.
    """
    bound = inspect.signature(call.func).bind(*call.args, **call.keywords)
    bound.apply_defaults()
    return TRAFFIC[call.func.__name__](**bound.arguments, span=span)


def bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _residual_stats(new, old, frame_strides, refresh, span, **_):
    frames = new.shape[1]
    moved = {"new": Moved(bytes_of(new), bytes_of(new) * (frames + _again(frames, frame_strides, span)) // frames)}
    if old is not None:
        moved["old"] = Moved(bytes_of(old), bytes_of(old), bytes_of(old) if refresh else 0)
    return moved


def _again(frames: int, frame_strides, span: int | None) -> int:
    """Frames read once more: stride 1 keeps them in registers, but for the one before each cut between spans."""
    return sum(max(frames - s, 0) for s in frame_strides if s > 1) + (_spans(frames, span) - 1)


def _spans(frames: int, span: int | None) -> int:
    return -(-frames // span) if span else 1


def _gated_residual(hidden, branch, gate, kept, measure, frame_strides, out, span, **_):
    frames = hidden.shape[1]
    walked = frames + (_again(frames, frame_strides, span) if measure else 0)
    moved = {
        "branch": Moved(bytes_of(branch), bytes_of(branch) * walked // frames),
        "kept": Moved(bytes_of(kept), bytes_of(kept) if measure else 0, bytes_of(kept)),
    }
    if gate is not None:  # one that is not of a frame stays in registers, one that is of no token in a cache
        times = walked if gate.shape[1] > 1 else _spans(frames, span)
        moved["gate"] = Moved(bytes_of(gate), hidden.numel() // frames * times * gate.element_size())
    return moved | _into(hidden, out)


def _reuse(hidden, residuals, weights, out, **_):
    residuals = (residuals,) if isinstance(residuals, torch.Tensor) else residuals
    moved = {f"residuals[{i}]": Moved(bytes_of(r), bytes_of(r)) for i, r in enumerate(residuals)}
    return moved | _into(hidden, out)


def _into(hidden, out) -> dict[str, Moved]:
    """`hidden` read, and written in place or to another tensor."""
    size = bytes_of(hidden)
    if out is hidden:
        return {"hidden": Moved(size, size, size)}
    return {"hidden": Moved(size, size), "out": Moved(size, 0, size)}


def _keep(output, input, history, depth, ratio, dtype, **_):
    moved = {"output": Moved(bytes_of(output), bytes_of(output)), "input": Moved(bytes_of(input), bytes_of(input))}
    size = input.numel() * dtype.itemsize
    read = len(history[:2]) if depth > 1 else 0  # a third residual is overwritten unread
    moved |= {f"history[{i}]": Moved(size, size if i < read else 0) for i in range(len(history))}
    last = f"history[{depth - 1}]" if len(history) == depth else "kept"
    return moved | {last: Moved(size, moved[last].read if last in moved else 0, size)}


def _relative_distance(new, old, refresh, **_):
    return _residual_stats(new, old, (), refresh, None)


def _decision(new, old, **_):
    return _residual_stats(new, old, (1,), True, None)


def _decide(sums, state, **_):
    size = bytes_of(state)  # the last of its four columns is written only
    return {"sums": Moved(bytes_of(sums), bytes_of(sums)), "state": Moved(size, size * 3 // 4, size)}


TRAFFIC = {
    "residual_stats": _residual_stats,
    "gated_residual": _gated_residual,
    "reuse": _reuse,
    "keep": _keep,
    "relative_distance": _relative_distance,
    "decide": _decide,
    "decision": _decision,
}


def tensors_of(call: partial) -> list[torch.Tensor]:
    values = [value if isinstance(value, tuple) else (value,) for value in (*call.args, *call.keywords.values())]
    return [item for value in values for item in value if isinstance(item, torch.Tensor)]
