"""Distance and motion sums of a residual, and the refresh of the kept one, in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import reference
from ._checks import check_alike, check_tensor, check_written, overlap
from ._triton import WARP, cdiv, jit, pick_backend, tl

THREADS = 128  # of a program
# Programs that fill a chip: eight on each of the 132 multiprocessors of an H200. With 8 KB in flight in each,
# half as many already carry the 25 KB a multiprocessor that saturate the memory.
FILL = 1024


@jit
def _row_sums(x, WIDTH: tl.constexpr):
    """Sums of WIDTH neighbours: one 128-bit access, so in one thread; accumulators shrink as much."""
    return tl.sum(tl.reshape(x, [x.shape[0] // WIDTH, WIDTH]), axis=1)


@jit(do_not_specialize=["frames", "tiles", "slots"])
def _residual_stats_kernel(
    new_ptr, old_ptr, partial_ptr,  # [B, T, S, C], [B, T, S, C], [B, 2 + 2 * strides, slots]
    new_batch, new_frame, new_token, old_batch, old_frame, old_token,  # strides, in elements
    frames, plane, tiles, slots,  # T, S * C, tiles of the plane, programs of a sample
    CHANNELS: tl.constexpr,  # C, or None where (S, C) is one contiguous axis in both tensors
    FRAME_STRIDES: tl.constexpr, HAS_OLD: tl.constexpr, REFRESH: tl.constexpr,
    BLOCK: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    # A program holds one tile of the plane and walks a span of frames. Programs of a sample: spans x tiles.
    pid = tl.program_id(0)
    batch = (pid // slots).to(tl.int64)
    slot = pid % slots
    first = slot // tiles * SPAN
    last = tl.minimum(first + SPAN, frames)

    p = (slot % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] place in the plane
    inside = p < plane
    new_tile = p  # [BLOCK] offset in a frame
    old_tile = p
    if CHANNELS is not None:
        new_tile = p // CHANNELS * new_token + p % CHANNELS
        old_tile = p // CHANNELS * old_token + p % CHANNELS
    new_ptr += batch * new_batch
    old_ptr += batch * old_batch
    new_frame = tl.cast(new_frame, tl.int64)  # a frame's offset may pass 2**31
    old_frame = tl.cast(old_frame, tl.int64)

    zero = tl.zeros([BLOCK // WIDTH], tl.float32)
    change = zero
    kept = zero
    motion = ()
    scale = ()
    for _ in tl.static_range(len(FRAME_STRIDES)):
        motion += (zero,)
        scale += (zero,)

    # Masks are bounds on p and never joined by `&`, which Triton 3.9's interpreter turns into integers.
    some = p < tl.where(first > 0, plane, 0)
    before = tl.load(new_ptr + (first - 1) * new_frame + new_tile, mask=some, other=0.0)
    for t in range(first, last):
        loaded = tl.load(new_ptr + t * new_frame + new_tile, mask=inside, other=0.0)
        x = loaded.to(tl.float32)
        if HAS_OLD:
            y = tl.load(old_ptr + t * old_frame + old_tile, mask=inside, other=0.0).to(tl.float32)
            change += _row_sums(tl.abs(y - x), WIDTH)
            kept += _row_sums(tl.abs(y), WIDTH)
        if REFRESH:
            tl.store(old_ptr + t * old_frame + old_tile, x.to(old_ptr.dtype.element_ty), mask=inside)
        magnitude = _row_sums(tl.abs(x), WIDTH)
        motion_so_far = motion
        scale_so_far = scale
        motion = ()
        scale = ()
        for i in tl.static_range(len(FRAME_STRIDES)):
            s = FRAME_STRIDES[i]
            if s == 1:
                earlier = before  # kept as loaded: half the registers of float32
            else:
                some = p < tl.where(t >= s, plane, 0)
                earlier = tl.load(new_ptr + (t - s) * new_frame + new_tile, mask=some, other=0.0)
            # Selected, not multiplied: a frame in no pair must not bring 0 * inf into the sum.
            moved = tl.where(t >= s, _row_sums(tl.abs(x - earlier.to(tl.float32)), WIDTH), 0.0)
            motion += (motion_so_far[i] + moved,)
            pairs = tl.where(t >= s, magnitude, 0.0) + tl.where(t + s < frames, magnitude, 0.0)
            scale += (scale_so_far[i] + pairs,)
        before = loaded

    out = partial_ptr + batch * (2 + 2 * len(FRAME_STRIDES)) * slots + slot
    tl.store(out, tl.sum(change))
    tl.store(out + slots, tl.sum(kept))
    for i in tl.static_range(len(FRAME_STRIDES)):
        tl.store(out + (2 + 2 * i) * slots, tl.sum(motion[i]))
        tl.store(out + (3 + 2 * i) * slots, tl.sum(scale[i]))


@dataclass(frozen=True)
class Launch:
    """How a call is cut into programs. `block` x `span` elements of each tensor go through one program."""

    block: int  # elements of a frame, a power of two
    span: int  # frames walked; each cut between spans reads one frame of `new` twice
    warps: int


def launch_for(batch: int, frames: int, plane: int, itemsize: int) -> Launch:
    """The launch for [batch, frames, plane] elements, of which the wider dtype has `itemsize` bytes."""
    # 32 bytes a thread and tensor, two 128-bit accesses in flight, take 64 registers on sm_90: eight programs
    # fit a multiprocessor. 64 bytes take 93, and five fit.
    block = THREADS * 32 // itemsize
    # Fewer tiles than fill a chip: first one access a thread, which costs no traffic ...
    if batch * cdiv(plane, block) < FILL:
        block //= 2
    # ... then shorter spans. Their cuts read a frame again, but a tensor this small stays in the L2 cache.
    spans = min(frames, cdiv(FILL, batch * cdiv(plane, block)))
    return Launch(block, cdiv(frames, spans), THREADS // WARP)


def _launch(new: torch.Tensor, old: torch.Tensor | None, frame_strides: tuple, refresh: bool) -> torch.Tensor:
    batch, frames, tokens, channels = new.shape
    kept = new if old is None else old
    flat = tokens == 1 or new.stride(2) == kept.stride(2) == channels
    plane = tokens * channels
    itemsize = max(new.element_size(), kept.element_size())
    launch = launch_for(batch, frames, plane, itemsize)
    tiles = cdiv(plane, launch.block)
    slots = tiles * cdiv(frames, launch.span)
    partial = torch.empty(batch, 2 + 2 * len(frame_strides), slots, dtype=torch.float32, device=new.device)
    with torch.cuda.device_of(new):
        _residual_stats_kernel[(batch * slots,)](
            new, kept, partial,
            *_outer_strides(new), *_outer_strides(kept),
            frames, plane, tiles, slots,
            CHANNELS=None if flat else channels,
            FRAME_STRIDES=frame_strides, HAS_OLD=old is not None, REFRESH=refresh,
            BLOCK=launch.block, SPAN=launch.span, WIDTH=16 // itemsize, num_warps=launch.warps,
        )  # fmt: skip
        return partial.sum(-1)


def _outer_strides(view: torch.Tensor) -> list[int]:
    """Strides of B, T and S; 0 for a size of 1, where an odd one would only forbid 128-bit accesses."""
    return [stride if size > 1 else 0 for stride, size in zip(view.stride()[:3], view.shape[:3], strict=True)]


def residual_stats(
    new: torch.Tensor,
    old: torch.Tensor | None = None,
    *,
    frame_strides: Sequence[int] = (),
    refresh: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """The sums behind the caching decision: how a residual differs from the kept one, and between its frames.

    For each sample, with n = `new` and o = `old` as [T, S, C] and s running over `frame_strides`::

        column 0          sum |o - n|
        column 1          sum |o|
        column 2 + 2 i    sum |n[s:] - n[:-s]|
        column 3 + 2 i    sum |n[s:]| + sum |n[:-s]|

    The distance of AdaCache is column 0 over column 1, its motion score column 2 + 2 i over column 3 + 2 i
    (Kahatapitiya et al., arXiv 2411.02397; the paper has no denominators, both are the released code's).

    Args:
        new: [B, T, S, C] view: batch, frames, tokens of a frame, channels. Any strides of B, T and S, so that
            frame-major and spatial-major layouts and token ranges need no copy; the stride of C is 1.
            float32, bfloat16 or float16.
        old: the kept residual, of the same shape; strides and dtype may differ. None: columns 0 and 1 are 0.
        frame_strides: distances s >= 1 between frames, for the motion score. One of T or more has no pair of
            frames: its columns are 0.
        refresh: overwrite `old` with `new`, in the dtype of `old`; the sums are of the values it had before.
            `old` must then overlap neither itself nor `new`.
        backend: "triton", "torch" (`reference`), or None: Triton on CUDA and ROCm devices, PyTorch elsewhere.

    Returns:
        float32 [B, 2 + 2 * len(frame_strides)]. NaN and infinity go through to the sums.

    Bytes moved: `new` and `old` read once, `old` written once if refreshed; the partial sums are negligible.
    Frame stride 1 is free, as the frame before stays in registers; any other reads `new` again s frames back,
    where it is still in cache. Inputs too small to fill a chip are also cut between frames; each cut reads
    one frame of `new` again.

    Deterministic: partial sums are taken in float32 in a fixed order and added in a fixed order, without
    atomics. The same call on the same device gives the same bits.
    """
    op = "residual_stats"
    _check_view(op, "new", new)
    if old is not None:
        _check_view(op, "old", old)
        check_alike(op, "new", new, "old", old)
    if not isinstance(frame_strides, Sequence) or isinstance(frame_strides, str):
        raise TypeError(f"{op}: frame_strides is {frame_strides!r}, expected a sequence of int")
    for s in frame_strides:
        if not isinstance(s, int) or isinstance(s, bool):
            raise TypeError(f"{op}: frame_strides holds {s!r}, expected int")
        if s < 1:
            raise ValueError(f"{op}: frame_strides holds {s}, expected 1 or more")
    if refresh:
        if old is None:
            raise ValueError(f"{op}: refresh is True and old is None, expected a tensor to overwrite")
        check_written(op, "old", old)
        if overlap(new, old):
            raise ValueError(f"{op}: old is refreshed and overlaps new in memory, expected separate tensors")
    if pick_backend(op, backend, new, _residual_stats_kernel) == "torch":
        return reference.residual_stats(new, old, frame_strides=frame_strides, refresh=refresh)
    return _launch(new, old, tuple(frame_strides), refresh)


def _check_view(op: str, name: str, view: torch.Tensor) -> None:
    check_tensor(op, name, view)
    if view.dim() != 4:
        raise ValueError(f"{op}: {name} has shape {tuple(view.shape)}, expected four dimensions [B, T, S, C]")
    if view.shape[3] > 1 and view.stride(3) != 1:
        raise ValueError(f"{op}: {name} has strides {view.stride()}, expected 1 for the last (channels)")
