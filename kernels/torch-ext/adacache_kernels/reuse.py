"""A kept residual added to the hidden state in place of the blocks it came from, in one pass over memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import reference
from ._checks import check_alike, check_tensor, check_written, overlap, same_view
from ._triton import WARP, cdiv, jit, pick_backend, tl

THREADS = 128  # of a program
FILL = 1024  # programs that fill a chip: eight on each of the 132 multiprocessors of an H200


@jit(do_not_specialize=["tiles"])
def _reuse_kernel(
    out_ptr, hidden_ptr, residual_ptr,  # [outer, rows, inner], the inner stride is 1
    out_outer, out_row, hidden_outer, hidden_row, residual_outer, residual_row,  # strides, in elements
    plane, tiles,  # rows * inner, tiles of the plane
    INNER: tl.constexpr,  # None where a plane is one row
    BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    outer = (pid // tiles).to(tl.int64)
    p = (pid % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] place in the plane
    inside = p < plane
    out_ptr += outer * out_outer
    hidden_ptr += outer * hidden_outer
    residual_ptr += outer * residual_outer
    if INNER is None:
        out_tile = out_ptr + p
        hidden_tile = hidden_ptr + p
        residual_tile = residual_ptr + p
    else:
        out_tile = out_ptr + p // INNER * out_row + p % INNER
        hidden_tile = hidden_ptr + p // INNER * hidden_row + p % INNER
        residual_tile = residual_ptr + p // INNER * residual_row + p % INNER
    hidden = tl.load(hidden_tile, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_tile, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_tile, (hidden + residual).to(out_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Launch:
    """How a call is cut into programs: `block` elements each."""

    block: int
    warps: int


def launch_for(elements: int, itemsize: int) -> Launch:
    """The launch for `elements` sums whose wider dtype has `itemsize` bytes."""
    # 32 bytes a thread and tensor: four 128-bit loads in flight in few enough registers for every warp slot.
    block = THREADS * 32 // itemsize
    # Fewer programs than fill a chip: one access a thread and tensor, and twice the programs.
    if cdiv(elements, block) < FILL:
        block //= 2
    return Launch(block, THREADS // WARP)


def _collapse(*views: torch.Tensor) -> list[tuple[int, tuple[int, ...]]]:
    """The fewest axes that address all views alike, innermost first: (size, its stride in every view)."""
    axes = []
    for *strides, size in sorted(zip(*(view.stride() for view in views), views[0].shape, strict=True)):
        if size == 1:
            continue
        inner, inner_strides = axes[-1] if axes else (0, ())
        if axes and strides == [inner * stride for stride in inner_strides]:
            axes[-1] = (inner * size, inner_strides)
        else:
            axes.append((size, tuple(strides)))
    return axes


def _launch(hidden: torch.Tensor, residual: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    still = (0, 0, 0)
    axes = _collapse(out, hidden, residual) or [(1, (1, 1, 1))]
    if len(axes) > 3 or axes[0][1] != (1, 1, 1):
        return reference.reuse(hidden, residual, out=out)
    launch = launch_for(hidden.numel(), max(hidden.element_size(), residual.element_size()))
    if len(axes) == 2 and axes[0][0] >= 8 * launch.block:
        axes.insert(1, (1, still))  # long rows are planes: no division, and little waste at their ends
    (inner, _), (rows, row), (outer, step) = axes + [(1, still)] * (3 - len(axes))
    tiles = cdiv(rows * inner, launch.block)
    with torch.cuda.device_of(hidden):
        _reuse_kernel[(outer * tiles,)](
            out, hidden, residual,
            step[0], row[0], step[1], row[1], step[2], row[2],
            rows * inner, tiles,
            INNER=None if rows == 1 else inner,
            BLOCK=launch.block, num_warps=launch.warps,
        )  # fmt: skip
    return out


def reuse(
    hidden: torch.Tensor,
    residual: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """`hidden + residual`: a step whose blocks are skipped and whose kept residual stands in for them.

    All layers share one schedule in AdaCache (Kahatapitiya et al., arXiv 2411.02397), so the sum of their
    residuals is one tensor, and adding it is all a reused step does before the final layer.

    Args:
        hidden: any shape of rank 1 or more, float32, bfloat16 or float16.
        residual: the same shape; strides and dtype may differ.
        out: where to write, of the shape and dtype of `hidden`: `hidden` itself (in place), or a tensor that
            overlaps neither input. None: a new tensor, laid out as `torch.empty_like(hidden)`.
        backend: "triton", "torch" (`reference`), or None: Triton on CUDA and ROCm devices, PyTorch elsewhere.

    Returns:
        `out`: the sum taken in float32, rounded once to the dtype of `hidden`, whichever the backend.

    Bytes moved: `hidden` and `residual` read once, `out` written once. Strided views are not copied: what
    collapses to three axes or fewer, the inner one of stride 1 in all tensors, goes through the kernel
    (contiguous and equally permuted tensors, token and channel ranges, a residual broadcast over leading
    dimensions). Any other layout is added by `torch.add`, also without a copy.
    """
    op = "reuse"
    for name, tensor in (("hidden", hidden), ("residual", residual)):
        check_tensor(op, name, tensor)
    if hidden.dim() == 0:
        raise ValueError(f"{op}: hidden has shape (), expected at least one dimension")
    check_alike(op, "hidden", hidden, "residual", residual)
    if out is not None:
        check_tensor(op, "out", out)
        check_alike(op, "out", out, "hidden", hidden)
        if out.dtype != hidden.dtype:
            raise TypeError(f"{op}: out has dtype {out.dtype}, hidden has {hidden.dtype}; they must be equal")
        check_written(op, "out", out)
        for name, tensor in (("hidden", hidden), ("residual", residual)):
            if overlap(out, tensor) and not same_view(out, tensor):
                raise ValueError(f"{op}: out overlaps {name} in memory, expected {name} itself or apart from it")
    if pick_backend(op, backend, hidden, _reuse_kernel) == "torch":
        return reference.reuse(hidden, residual, out=out)
    return _launch(hidden, residual, torch.empty_like(hidden) if out is None else out)
