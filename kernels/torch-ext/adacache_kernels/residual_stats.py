"""Distance and motion sums of a residual, and the refresh of the kept one, in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import reference
from ._checks import METRICS, check_alike, check_metric, check_written, overlap, traced
from ._ops import add_op_namespace_prefix
from ._triton import WARP, cdiv, jit, pick_backend, tl
from ._walk import (
    FILL,
    THREADS,
    Launch,
    add_distance,
    add_motion,
    check_frame_strides,
    check_view,
    no_sums,
    outer_strides,
    span_for,
    store_sums,
    store_tile,
    tile_offsets,
)

OP = "residual_stats"


@jit(do_not_specialize=["frames", "tiles", "slots"])
def _residual_stats_kernel(
    new_ptr, old_ptr, partial_ptr,  # [B, T, S, C], [B, T, S, C], [DISTANCES + 2 * strides, programs]
    new_batch, new_frame, new_token, old_batch, old_frame, old_token,  # strides, in elements
    frames, plane, tiles, slots,  # T, S * C, tiles of the plane, programs of a sample
    CHANNELS: tl.constexpr,  # C, or None where (S, C) is one contiguous axis in both tensors
    METRIC: tl.constexpr, DISTANCES: tl.constexpr,  # and its number of columns
    FRAME_STRIDES: tl.constexpr, HAS_OLD: tl.constexpr, REFRESH: tl.constexpr,
    BLOCK: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    # A program holds one tile of the plane and walks a span of frames. Programs of a sample: spans x tiles.
    pid = tl.program_id(0)
    batch = (pid // slots).to(tl.int64)
    slot = pid % slots
    first = slot // tiles * SPAN
    last = tl.minimum(first + SPAN, frames)

    start = (slot % tiles).to(tl.int64) * BLOCK
    p = start + tl.arange(0, BLOCK)  # [BLOCK] place in the plane
    inside = p < plane
    new_tile = tile_offsets(p, new_token, CHANNELS)  # [BLOCK] offset in a frame
    old_tile = tile_offsets(p, old_token, CHANNELS)
    new_ptr += batch * new_batch
    old_ptr += batch * old_batch
    new_frame = tl.cast(new_frame, tl.int64)  # a frame's offset may pass 2**31
    old_frame = tl.cast(old_frame, tl.int64)

    distance = no_sums(DISTANCES, BLOCK // WIDTH)
    motion = no_sums(2 * len(FRAME_STRIDES), BLOCK // WIDTH)
    # Masks are bounds on p and never joined by `&`, which Triton 3.9's interpreter turns into integers.
    some = p < tl.where(first > 0, plane, 0)
    before = tl.load(new_ptr + (first - 1) * new_frame + new_tile, mask=some, other=0.0)
    for t in range(first, last):
        loaded = tl.load(new_ptr + t * new_frame + new_tile, mask=inside, other=0.0)
        x = loaded.to(tl.float32)
        if HAS_OLD:
            y = tl.load(old_ptr + t * old_frame + old_tile, mask=inside, other=0.0).to(tl.float32)
            distance = add_distance(distance, x, y, METRIC, WIDTH)
        if REFRESH:
            store_tile(old_ptr + t * old_frame, x, start, plane, old_token, CHANNELS, BLOCK, WIDTH)
        earlier = ()
        for i in tl.static_range(len(FRAME_STRIDES)):
            if FRAME_STRIDES[i] == 1:
                earlier += (before,)  # kept as loaded: half the registers of float32
            else:
                s = FRAME_STRIDES[i]
                some = p < tl.where(t >= s, plane, 0)
                earlier += (tl.load(new_ptr + (t - s) * new_frame + new_tile, mask=some, other=0.0),)
        motion = add_motion(motion, x, earlier, t, frames, FRAME_STRIDES, WIDTH)
        before = loaded
    store_sums(partial_ptr + pid, distance + motion, tl.num_programs(0))


def launch_for(batch: int, frames: int, plane: int, narrow: int, wide: int, columns: int) -> Launch:
    """The launch for [batch, frames, plane] elements, of `narrow` bytes in one tensor and `wide` in the other."""
    # 32 bytes a thread and tensor, two 128-bit accesses in flight, take 64 registers on sm_90: eight programs
    # fit a multiprocessor. With 64 bytes they take 93, and with 32 bytes and more than four sums up to 82.
    block = THREADS * 32 // wide
    # Fewer tiles than fill a chip: first one access a thread, which costs no traffic, then shorter spans.
    if columns > 4 or batch * cdiv(plane, block) < FILL:
        block = THREADS * 16 // narrow
    return Launch(block, span_for(batch, frames, cdiv(plane, block)), THREADS // WARP)


def _launch(
    new: torch.Tensor, old: torch.Tensor | None, frame_strides: tuple, metric: str, refresh: bool
) -> torch.Tensor:
    batch, frames, tokens, channels = new.shape
    kept = new if old is None else old
    flat = tokens == 1 or new.stride(2) == kept.stride(2) == channels
    plane = tokens * channels
    narrow, wide = sorted((new.element_size(), kept.element_size()))
    columns = METRICS[metric] + 2 * len(frame_strides)
    launch = launch_for(batch, frames, plane, narrow, wide, columns)
    tiles = cdiv(plane, launch.block)
    slots = tiles * cdiv(frames, launch.span)
    partial = torch.empty(columns, batch, slots, dtype=torch.float32, device=new.device)
    with torch.cuda.device_of(new):
        _residual_stats_kernel[(batch * slots,)](
            new, kept, partial,
            *outer_strides(new), *outer_strides(kept),
            frames, plane, tiles, slots,
            CHANNELS=None if flat else channels,
            METRIC=metric, DISTANCES=METRICS[metric],
            FRAME_STRIDES=frame_strides, HAS_OLD=old is not None, REFRESH=refresh,
            BLOCK=launch.block, SPAN=launch.span, WIDTH=16 // narrow, num_warps=launch.warps,
        )  # fmt: skip
        return partial.transpose(0, 1).sum(-1)


def residual_stats(
    new: torch.Tensor,
    old: torch.Tensor | None = None,
    *,
    frame_strides: Sequence[int] = (),
    metric: str = "l1",
    refresh: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """The sums behind the caching decision: how a residual differs from the kept one, and between its frames.

    For each sample, with n = `new` and o = `old` as [T, S, C]: first the M columns of the distance, ::

        metric "l1"         sum |o - n|, sum |o|
        metric "l2"         sum (o - n)^2, sum o^2
        metric "cosine"     sum o n, sum o^2, sum n^2

    and then, for the i-th of `frame_strides`, s, those of the motion::

        column M + 2 i      sum |n[s:] - n[:-s]|
        column M + 2 i + 1  sum |n[s:]| + sum |n[:-s]|

    AdaCache's distance is the first column of "l1" over the second, its motion score column M + 2 i over the
    next one (Kahatapitiya et al., arXiv 2411.02397, whose ablation has the three metrics; the paper has no
    denominators, both are the released code's).

    Args:
        new: [B, T, S, C] view: batch, frames, tokens of a frame, channels. Any strides of B, T and S, so that
            frame-major and spatial-major layouts and token ranges (`as_frames`) need no copy; the stride of C
            is 1. float32, bfloat16 or float16.
        old: the kept residual, of the same shape; strides and dtype may differ. None: the distance columns
            are 0.
        frame_strides: distances s >= 1 between frames, for the motion score. One of T or more has no pair of
            frames: its columns are 0.
        metric: "l1", "l2" or "cosine".
        refresh: overwrite `old` with `new`, in the dtype of `old`; the sums are of the values it had before.
            `old` must then overlap neither itself nor `new`.
        backend: "triton", "torch" (`reference`), or None: Triton on CUDA and ROCm devices, PyTorch elsewhere.

    Returns:
        float32 [B, M + 2 * len(frame_strides)], with M = 2, 2, 3. NaN and infinity go through to the sums.

    Bytes moved: `new` and `old` read once, `old` written once if refreshed; the partial sums are negligible.
    Frame stride 1 is free, as the frame before stays in registers; any other reads `new` again s frames back,
    where it is still in cache. Inputs too small to fill a chip are also cut between frames; each cut reads
    one frame of `new` again.

    Deterministic: partial sums are taken in float32 in a fixed order and added in a fixed order, without
    atomics. The same call on the same device gives the same bits.

    Operators: `residual_stats` and, with `refresh`, `residual_stats_refresh` in torch.library, for graphs.
    """
    _check(new, old, frame_strides, metric, refresh)
    if traced(new):
        op = _refresh_op if refresh else _op
        return op(new, old, frame_strides, metric, backend)
    if pick_backend(OP, backend, new, _residual_stats_kernel) == "torch":
        return reference.residual_stats(new, old, frame_strides=frame_strides, metric=metric, refresh=refresh)
    return _launch(new, old, tuple(frame_strides), metric, refresh)


def _check(new, old, frame_strides, metric, refresh) -> None:
    check_view(OP, "new", new)
    if old is not None:
        check_view(OP, "old", old)
        check_alike(OP, "new", new, "old", old)
    check_frame_strides(OP, frame_strides)
    check_metric(OP, metric)
    if refresh:
        if old is None:
            raise ValueError(f"{OP}: refresh is True and old is None, expected a tensor to overwrite")
        check_written(OP, "old", old)
        if overlap(new, old):
            raise ValueError(f"{OP}: old is refreshed and overlaps new in memory, expected separate tensors")


@torch.library.custom_op(
    add_op_namespace_prefix(OP),
    mutates_args=(),
    schema="(Tensor new, Tensor? old, int[] frame_strides, str metric, str? backend) -> Tensor",
)
def _op(new, old, frame_strides, metric, backend):
    return residual_stats(new, old, frame_strides=frame_strides, metric=metric, backend=backend)


@torch.library.custom_op(
    add_op_namespace_prefix(f"{OP}_refresh"),
    mutates_args=("old",),
    schema="(Tensor new, Tensor(a!) old, int[] frame_strides, str metric, str? backend) -> Tensor",
)
def _refresh_op(new, old, frame_strides, metric, backend):
    return residual_stats(new, old, frame_strides=frame_strides, metric=metric, refresh=True, backend=backend)


@_op.register_fake
@_refresh_op.register_fake
def _(new, old, frame_strides, metric, backend):
    return new.new_empty(new.shape[0], METRICS[metric] + 2 * len(frame_strides), dtype=torch.float32)


def as_frames(sequence: torch.Tensor, frames: int, *, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Tokens `start` to `stop` of a frame-major sequence [B, L, C] as frames [B, T, S, C]: a view, never a copy.

    For sequences that hold more than the video: text in front of it or behind it, frames of history. Frames
    come one after another, T = `frames` of S = (stop - start) / T tokens each; stop None is L. Where tokens of
    one place come one after another (spatial-major), it is `as_frames(sequence, S).transpose(1, 2)`.
    """
    op = "as_frames"
    if not isinstance(sequence, torch.Tensor):
        raise TypeError(f"{op}: sequence is of type {type(sequence).__name__}, expected torch.Tensor")
    if sequence.dim() != 3:
        raise ValueError(f"{op}: sequence has shape {tuple(sequence.shape)}, expected three dimensions [B, L, C]")
    length = sequence.shape[1]
    stop = length if stop is None else stop
    if not 0 <= start < stop <= length:
        raise ValueError(f"{op}: start is {start} and stop is {stop}, expected 0 <= start < stop <= {length}")
    if frames < 1 or (stop - start) % frames:
        raise ValueError(
            f"{op}: frames is {frames}, expected 1 or more that divide the {stop - start} tokens from {start} to {stop}"
        )
    return sequence[:, start:stop].unflatten(1, (frames, -1))
