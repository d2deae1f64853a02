"""What the operations that walk over frames share: views, launches, and the sums of a walk inside a kernel.

A program holds one tile of the plane (S, C), goes from frame to frame, and keeps what it needs of the frame
before in registers. The functions marked `jit` run inside kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ._checks import check_tensor
from ._triton import cdiv, jit, tl

THREADS = 128  # of a program
# Programs that fill a chip: eight on each of the 132 multiprocessors of an H200. With 8 KB in flight in each,
# half as many already carry the 25 KB a multiprocessor that saturate the memory.
FILL = 1024


@jit
def tile_offsets(p, token, CHANNELS: tl.constexpr):
    """Offsets in a frame of places p of the plane; CHANNELS is None where (S, C) is one contiguous axis."""
    if CHANNELS is None:
        return p
    else:
        return p // CHANNELS * token + p % CHANNELS


@jit
def store_tile(
    pointer, x, start, plane, token, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Write the tile x [BLOCK] whose first place in the plane is `start`, in the dtype of the pointer.

    A thread holds WIDTH neighbours, 128 bits of the narrowest tensor. Of a wider dtype these are two 128-bit
    accesses, and unless they are written apart the compiler trades elements between threads through shared memory.
    """
    dtype: tl.constexpr = pointer.dtype.element_ty
    if dtype.primitive_bitwidth * WIDTH <= 128:
        p = start + tl.arange(0, BLOCK)
        tl.store(pointer + tile_offsets(p, token, CHANNELS), x.to(dtype), mask=p < plane)
    else:
        HALF: tl.constexpr = WIDTH // 2
        p = start + tl.arange(0, BLOCK // WIDTH)[:, None] * WIDTH + tl.arange(0, HALF)[None, :]
        low, high = tl.split(tl.permute(tl.reshape(x, [BLOCK // WIDTH, 2, HALF]), [0, 2, 1]))
        tl.store(pointer + tile_offsets(p, token, CHANNELS), low.to(dtype), mask=p < plane)
        tl.store(pointer + tile_offsets(p + HALF, token, CHANNELS), high.to(dtype), mask=p + HALF < plane)


@jit
def no_sums(COUNT: tl.constexpr, SIZE: tl.constexpr):
    """COUNT accumulators of SIZE elements."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums += (tl.zeros([SIZE], tl.float32),)
    return sums


@jit
def row_sums(x, WIDTH: tl.constexpr):
    """Sums of WIDTH neighbours: one access, so in one thread; accumulators shrink as much."""
    return tl.sum(tl.reshape(x, [x.shape[0] // WIDTH, WIDTH]), axis=1)


@jit
def add_distance(sums, x, y, METRIC: tl.constexpr, WIDTH: tl.constexpr):
    """`sums` and the distance sums of one tile: x is new, y is old, both float32."""
    if METRIC == "l1":
        return (sums[0] + row_sums(tl.abs(y - x), WIDTH), sums[1] + row_sums(tl.abs(y), WIDTH))
    elif METRIC == "l2":
        return (sums[0] + row_sums((y - x) * (y - x), WIDTH), sums[1] + row_sums(y * y, WIDTH))
    else:
        dot = sums[0] + row_sums(y * x, WIDTH)
        return (dot, sums[1] + row_sums(y * y, WIDTH), sums[2] + row_sums(x * x, WIDTH))


@jit
def add_motion(sums, x, earlier, t, frames, FRAME_STRIDES: tl.constexpr, WIDTH: tl.constexpr):
    """`sums` and the motion sums of frame t: x is its tile, `earlier` the tile s frames back for each stride s."""
    magnitude = row_sums(tl.abs(x), WIDTH)
    total = ()
    for i in tl.static_range(len(FRAME_STRIDES)):
        s = FRAME_STRIDES[i]
        # Selected, not multiplied: a frame in no pair must not bring 0 * inf into the sum.
        moved = tl.where(t >= s, row_sums(tl.abs(x - earlier[i].to(tl.float32)), WIDTH), 0.0)
        pairs = tl.where(t >= s, magnitude, 0.0) + tl.where(t + s < frames, magnitude, 0.0)
        total += (sums[2 * i] + moved, sums[2 * i + 1] + pairs)
    return total


@jit
def store_sums(pointer, sums, slots):
    """One float a column, `slots` apart."""
    for i in tl.static_range(len(sums)):
        tl.store(pointer + i * slots, tl.sum(sums[i]))


@dataclass(frozen=True)
class Launch:
    """How a call is cut into programs. `block` x `span` elements of each tensor go through one program."""

    block: int  # elements of a frame, a power of two
    span: int  # frames walked; each cut between spans reads one frame of the residual twice
    warps: int


def span_for(batch: int, frames: int, tiles: int) -> int:
    """Frames a program walks: all of them where tiles alone fill a chip, else as few as fill it.

    A cut between spans reads a frame again, but a tensor this small stays in the L2 cache.
    """
    return cdiv(frames, min(frames, cdiv(FILL, batch * tiles)))


def outer_strides(view: torch.Tensor) -> list[int]:
    """Strides of B, T and S; 0 for a size of 1, where an odd one would only forbid 128-bit accesses."""
    (b, t, s, _), (batch, frame, token, _) = view.shape, view.stride()
    return [batch if b > 1 else 0, frame if t > 1 else 0, token if s > 1 else 0]


def check_view(op: str, name: str, view: torch.Tensor) -> None:
    check_tensor(op, name, view)
    if view.dim() != 4:
        raise ValueError(f"{op}: {name} has shape {tuple(view.shape)}, expected four dimensions [B, T, S, C]")
    if view.shape[3] > 1 and view.stride(3) != 1:
        raise ValueError(f"{op}: {name} has strides {view.stride()}, expected 1 for the last (channels)")


def check_frame_strides(op: str, frame_strides: Sequence[int]) -> None:
    if not isinstance(frame_strides, Sequence) or isinstance(frame_strides, str):
        raise TypeError(f"{op}: frame_strides is {frame_strides!r}, expected a sequence of int")
    for s in frame_strides:
        if not isinstance(s, int) or isinstance(s, bool):
            raise TypeError(f"{op}: frame_strides holds {s!r}, expected int")
        if s < 1:
            raise ValueError(f"{op}: frame_strides holds {s}, expected 1 or more")
