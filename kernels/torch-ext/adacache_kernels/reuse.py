"""Kept residuals added to the hidden state in place of the blocks they came from, in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import reference
from ._checks import check_alike, check_tensor, check_written, overlap, same_view, traced
from ._ops import add_op_namespace_prefix
from ._triton import WARP, cdiv, jit, pick_backend, tl
from ._walk import FILL, THREADS, store_tile, tile_offsets

OP = "reuse"
RESIDUALS = 3  # at most
Axis = tuple[int, tuple[int, ...]]  # size, stride in each of several views


@jit
def load_tile(pointer, p, plane, row, INNER: tl.constexpr):
    """Places p of a plane, in float32; INNER is None where a plane is one row."""
    return tl.load(pointer + tile_offsets(p, row, INNER), mask=p < plane, other=0.0).to(tl.float32)


@jit(do_not_specialize=["tiles", "weight_outer", "weight_step"])
def _reuse_kernel(
    out_ptr, hidden_ptr, first_ptr, second_ptr, third_ptr,  # [outer, rows, inner], the inner stride is 1
    weight_ptr,  # [outer, residuals]
    out_outer, hidden_outer, first_outer, second_outer, third_outer,  # strides, in elements
    out_row, hidden_row, first_row, second_row, third_row,
    weight_outer, weight_step,
    plane, tiles,  # rows * inner, tiles of the plane
    INNER: tl.constexpr,  # None where a plane is one row
    BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    outer = (pid // tiles).to(tl.int64)
    start = (pid % tiles).to(tl.int64) * BLOCK
    p = start + tl.arange(0, BLOCK)  # [BLOCK] place in the plane
    hidden = load_tile(hidden_ptr + outer * hidden_outer, p, plane, hidden_row, INNER)
    change = load_tile(first_ptr + outer * first_outer, p, plane, first_row, INNER)
    if weight_ptr is not None:
        weight_ptr += outer * weight_outer
        change *= tl.load(weight_ptr)
    if second_ptr is not None:
        residual = load_tile(second_ptr + outer * second_outer, p, plane, second_row, INNER)
        change += tl.load(weight_ptr + weight_step) * residual
    if third_ptr is not None:
        residual = load_tile(third_ptr + outer * third_outer, p, plane, third_row, INNER)
        change += tl.load(weight_ptr + 2 * weight_step) * residual
    store_tile(out_ptr + outer * out_outer, hidden + change, start, plane, out_row, INNER, BLOCK, WIDTH)


@dataclass(frozen=True)
class Launch:
    """How a call is cut into programs: `block` elements each."""

    block: int
    warps: int


def launch_for(elements: int, narrow: int, wide: int) -> Launch:
    """The launch for `elements` sums whose narrowest and widest dtype have that many bytes."""
    # One 128-bit access a thread and tensor, of a wider dtype two. Where dtypes are equal and programs enough to
    # fill a chip, two as well: in 32 registers with one residual and 48 with three, so that sixteen or ten
    # programs fit a multiprocessor, with more than enough in flight.
    block = THREADS * 16 // narrow
    if narrow == wide and cdiv(elements, 2 * block) >= FILL:
        block *= 2
    return Launch(block, THREADS // WARP)


def collapse(shape: Sequence[int], *strides: Sequence[int]) -> list[Axis]:
    """The fewest axes that address views of one shape alike, innermost first."""
    axes = []
    for *step, size in sorted(zip(*strides, shape, strict=True)):
        if size == 1:
            continue
        inner, inner_step = axes[-1] if axes else (0, ())
        if axes and step == [inner * stride for stride in inner_step]:
            axes[-1] = (inner * size, inner_step)
        else:
            axes.append((size, tuple(step)))
    return axes


def three_axes(views: Sequence[torch.Tensor], samples: bool, long: int = 0) -> tuple[Axis, Axis, Axis] | None:
    """Inner, rows and outer, which address all views alike; None where that takes more, or the inner stride is not 1.

    Args:
        samples: keep the first dimension as the outer axis.
        long: rows of as many elements are planes where they can be: no division, and little waste at their ends.
    """
    shape, strides = views[0].shape, [view.stride() for view in views]
    unit, still = (1, (1,) * len(views)), (1, (0,) * len(views))
    if all(view.is_contiguous() for view in views):  # the common case, with less to sort
        inner = views[0].numel() // shape[0]
        shape, strides = (shape[0], inner), [(inner, 1)] * len(views)
    if samples:
        outer = [(shape[0], tuple(stride[0] for stride in strides)) if shape[0] > 1 else still]
        axes = collapse(shape[1:], *(stride[1:] for stride in strides)) or [unit]
        axes += [still] * (2 - len(axes)) + outer
    else:
        axes = collapse(shape, *strides) or [unit]
        if len(axes) == 2 and axes[0][0] >= long:
            axes.insert(1, still)
        axes += [still] * (3 - len(axes))
    return tuple(axes) if len(axes) == 3 and axes[0][1] == unit[1] else None


def _launch(
    hidden: torch.Tensor, residuals: Sequence[torch.Tensor], weights: torch.Tensor | None, out: torch.Tensor
) -> torch.Tensor:
    views = (out, hidden, *residuals)
    sizes = [view.element_size() for view in views]
    launch = launch_for(hidden.numel(), min(sizes), max(sizes))
    per_sample = weights is not None and weights.dim() == 2
    axes = three_axes(views, per_sample, long=8 * launch.block)
    if axes is None:
        return reference.reuse(hidden, residuals, weights, out=out)
    (inner, _), (rows, row), (outer, step) = axes
    tiles = cdiv(rows * inner, launch.block)
    missing = RESIDUALS - len(residuals)
    with torch.cuda.device_of(hidden):
        _reuse_kernel[(outer * tiles,)](
            *views, *(None,) * missing, weights,
            *step, *(0,) * missing, *row, *(0,) * missing,
            weights.stride(0) if per_sample else 0, 0 if weights is None else weights.stride(-1),
            rows * inner, tiles,
            INNER=None if rows == 1 else inner,
            BLOCK=launch.block, WIDTH=16 // min(sizes), num_warps=launch.warps,
        )  # fmt: skip
    return out


def reuse(
    hidden: torch.Tensor,
    residuals: torch.Tensor | Sequence[torch.Tensor],
    weights: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """`hidden + sum_i weights[i] * residuals[i]`: a step whose blocks are skipped; kept residuals stand in for them.

    All layers share one schedule in AdaCache (Kahatapitiya et al., arXiv 2411.02397), so the sum of their
    residuals is one tensor, and adding it is all a reused step does before the final layer. An extrapolation
    from the last residuals is a weighted sum of them: with r1 and r0 kept, newest first, and r1 + c (r1 - r0)
    wanted, `reuse(hidden, (r1, r0), weights)` with weights 1 + c and -c.

    Args:
        hidden: any shape of rank 1 or more, float32, bfloat16 or float16. Where weights are per sample, its
            first dimension is the batch.
        residuals: a tensor, or a sequence of 1 to 3, of the shape of `hidden`; strides and dtypes may differ.
        weights: float32 on the device of `hidden`, [n] or per sample [B, n], n the number of residuals. None,
            for one residual alone: 1.
        out: where to write, of the shape and dtype of `hidden`: `hidden` itself (in place), or a residual, or a
            tensor that overlaps none of them. None: a new tensor, laid out as `torch.empty_like(hidden)`.
        backend: "triton", "torch" (`reference`), or None: Triton on CUDA and ROCm devices, PyTorch elsewhere.

    Returns:
        `out`: the weighted residuals are summed first, in float32 and the order given, then added to `hidden`
        and rounded once to its dtype. One residual without weights gives the bits of `torch.add`, whichever the
        backend. What is not finite is not mended: a weight that is NaN makes its sample NaN, and a weight of 0
        does not hide an infinite residual.

    Bytes moved: `hidden` and each residual read once, `out` written once; the weights are negligible. Strided
    views are not copied: what collapses to three axes or fewer, the inner one of stride 1 in all tensors (and
    the outer one the batch, if weights are per sample), goes through the kernel: contiguous and equally permuted
    tensors, token and channel ranges, a residual broadcast over leading dimensions. Any other layout is left
    to PyTorch, with float32 temporaries if there are weights.

    Deterministic: the same call on the same device gives the same bits.

    Operators: `reuse` and, with `out`, `reuse_out` in torch.library, for graphs.
    """
    residuals = (residuals,) if isinstance(residuals, torch.Tensor) else residuals
    _check(hidden, residuals, weights, out)
    if traced(hidden):
        if out is None:
            return _op(hidden, residuals, weights, backend)
        _out_op(hidden, residuals, weights, out, backend)
        return out
    _check_memory(hidden, residuals, weights, out)
    if pick_backend(OP, backend, hidden, _reuse_kernel) == "torch":
        return reference.reuse(hidden, residuals, weights, out=out)
    return _launch(hidden, residuals, weights, torch.empty_like(hidden) if out is None else out)


def _check(hidden, residuals, weights, out) -> None:
    check_tensor(OP, "hidden", hidden)
    if hidden.dim() == 0:
        raise ValueError(f"{OP}: hidden has shape (), expected at least one dimension")
    if not isinstance(residuals, Sequence):
        kind = type(residuals).__name__
        raise TypeError(f"{OP}: residuals is of type {kind}, expected torch.Tensor or a sequence of them")
    n = len(residuals)
    if not 1 <= n <= RESIDUALS:
        raise ValueError(f"{OP}: residuals holds {n}, expected 1 to {RESIDUALS} tensors")
    for i, residual in enumerate(residuals):
        check_tensor(OP, f"residuals[{i}]", residual)
        check_alike(OP, f"residuals[{i}]", residual, "hidden", hidden)
    if weights is None and n > 1:
        raise ValueError(f"{OP}: weights is None, expected a tensor, as there are {n} residuals")
    if weights is not None:
        check_tensor(OP, "weights", weights)
        if weights.dtype != torch.float32:
            raise TypeError(f"{OP}: weights has dtype {weights.dtype}, expected torch.float32")
        if weights.shape not in ((n,), (hidden.shape[0], n)):
            shape, batch = tuple(weights.shape), hidden.shape[0]
            raise ValueError(f"{OP}: weights has shape {shape}, expected ({n},) or ({batch}, {n})")
        if weights.device != hidden.device:
            raise ValueError(f"{OP}: weights is on {weights.device}, hidden is on {hidden.device}; they must be equal")
    if out is not None:
        check_tensor(OP, "out", out)
        check_alike(OP, "out", out, "hidden", hidden)
        if out.dtype != hidden.dtype:
            raise TypeError(f"{OP}: out has dtype {out.dtype}, hidden has {hidden.dtype}; they must be equal")


def _check_memory(hidden, residuals, weights, out) -> None:
    if out is None:
        return
    check_written(OP, "out", out)
    for i, tensor in enumerate((hidden, *residuals)):
        name = f"residuals[{i - 1}]" if i else "hidden"
        if overlap(out, tensor) and not same_view(out, tensor):
            raise ValueError(f"{OP}: out overlaps {name} in memory, expected {name} itself or apart from it")
    if weights is not None and overlap(out, weights):
        raise ValueError(f"{OP}: out overlaps weights in memory, expected separate tensors")


@torch.library.custom_op(
    add_op_namespace_prefix("reuse"),
    mutates_args=(),
    schema="(Tensor hidden, Tensor[] residuals, Tensor? weights, str? backend) -> Tensor",
)
def _op(hidden, residuals, weights, backend):
    return reuse(hidden, residuals, weights, backend=backend)


@_op.register_fake
def _(hidden, residuals, weights, backend):
    _check(hidden, residuals, weights, None)
    return torch.empty_like(hidden)


@torch.library.custom_op(
    add_op_namespace_prefix("reuse_out"),
    mutates_args=("out",),
    schema="(Tensor hidden, Tensor[] residuals, Tensor? weights, Tensor(a!) out, str? backend) -> ()",
)
def _out_op(hidden, residuals, weights, out, backend):
    reuse(hidden, residuals, weights, out=out, backend=backend)


@_out_op.register_fake
def _(hidden, residuals, weights, out, backend):
    _check(hidden, residuals, weights, out)
    _check_memory(hidden, residuals, weights, out)
