"""The stack residual of a computed step, kept and compared with those before it, in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import reference
from ._checks import DTYPES, check_alike, check_tensor, check_written, overlap, same_view, traced
from ._ops import add_op_namespace_prefix
from ._triton import WARP, cdiv, jit, pick_backend, tl
from ._walk import FILL, THREADS, no_sums, row_sums, store_sums, store_tile
from .reuse import load_tile, three_axes

OP = "keep"
DEPTH = 3  # residuals kept at most
SUMS = 5
SPAN = 8  # tiles of a program at most: enough to make its sums' reduction small


@jit(do_not_specialize=["ratio_batch", "slots", "span"])
def _keep_kernel(
    kept_ptr, output_ptr, input_ptr, r1_ptr, r0_ptr,  # [B, rows, inner], the inner stride is 1
    ratio_ptr, partial_ptr,  # [B], [B, SUMS, slots]
    kept_batch, output_batch, input_batch, r1_batch, r0_batch,  # strides, in elements
    kept_row, output_row, input_row, r1_row, r0_row,
    ratio_batch,
    plane, slots, span,  # rows * inner, programs of a sample, tiles of a program
    INNER: tl.constexpr,  # None where a plane is one row
    SUMS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    batch = (pid // slots).to(tl.int64)
    slot = pid % slots
    first = slot * span
    last = tl.minimum(first + span, tl.cdiv(plane, BLOCK))
    kept_ptr += batch * kept_batch
    output_ptr += batch * output_batch
    input_ptr += batch * input_batch
    if r1_ptr is not None:
        r1_ptr += batch * r1_batch
    if r0_ptr is not None:
        r0_ptr += batch * r0_batch
        ratio = 1.0
        if ratio_ptr is not None:
            ratio = tl.load(ratio_ptr + batch * ratio_batch)

    slope, power, error, curvature, size = no_sums(SUMS, BLOCK // WIDTH)
    for tile in range(first, last):
        start = tl.cast(tile, tl.int64) * BLOCK
        p = start + tl.arange(0, BLOCK)  # [BLOCK] place in the plane
        x = load_tile(output_ptr, p, plane, output_row, INNER) - load_tile(input_ptr, p, plane, input_row, INNER)
        r = x.to(kept_ptr.dtype.element_ty).to(tl.float32)  # as later steps see it
        if r1_ptr is not None:
            r1 = load_tile(r1_ptr, p, plane, r1_row, INNER)
            change = r - r1
            error += row_sums(tl.abs(change), WIDTH)
        if r0_ptr is not None:  # maybe what r is written over
            before = r1 - load_tile(r0_ptr, p, plane, r0_row, INNER)
            slope += row_sums(change * before, WIDTH)
            power += row_sums(before * before, WIDTH)
            curvature += row_sums(tl.abs(change - ratio * before), WIDTH)
        size += row_sums(tl.abs(r), WIDTH)
        store_tile(kept_ptr, r, start, plane, kept_row, INNER, BLOCK, WIDTH)
    store_sums(partial_ptr + batch * SUMS * slots + slot, (slope, power, error, curvature, size), slots)


@dataclass(frozen=True)
class Launch:
    """How a call is cut into programs: `span` tiles of `block` elements each."""

    block: int
    span: int
    warps: int


def launch_for(batch: int, plane: int, reads: int, narrow: int, wide: int) -> Launch:
    """The launch for [batch, plane] elements of `reads` tensors; the bytes of the narrowest and widest dtype."""
    # One 128-bit access a thread and tensor, of a wider dtype two; where only two tensors are read, twice as much.
    # Four tensors take 64 registers: eight programs fit a multiprocessor, with 64 KB in flight.
    block = THREADS * 16 // narrow
    if narrow == wide and reads == 2:
        block *= 2
    span = batch * cdiv(plane, block) // FILL
    return Launch(block, min(max(span, 1), SPAN), THREADS // WARP)


def _launch(
    output: torch.Tensor,
    input: torch.Tensor,
    kept: torch.Tensor,
    r1: torch.Tensor | None,
    r0: torch.Tensor | None,
    ratio: torch.Tensor | None,
) -> torch.Tensor:
    views = [view for view in (kept, output, input, r1, r0) if view is not None]
    axes = three_axes(views, samples=True)
    if axes is None:
        return reference.keep(output, input, kept, r1, r0, ratio)
    (inner, _), (rows, row), (batch, step) = axes
    sizes = [view.element_size() for view in views]
    launch = launch_for(batch, rows * inner, len(views) - 1, min(sizes), max(sizes))
    slots = cdiv(rows * inner, launch.block * launch.span)
    missing = (0,) * (5 - len(views))
    partial = torch.empty(batch, SUMS, slots, dtype=torch.float32, device=output.device)
    with torch.cuda.device_of(output):
        _keep_kernel[(batch * slots,)](
            kept, output, input, r1, r0, ratio, partial,
            *step, *missing, *row, *missing, 0 if ratio is None else ratio.stride(0),
            rows * inner, slots, launch.span,
            INNER=None if rows == 1 else inner,
            SUMS=SUMS, BLOCK=launch.block, WIDTH=16 // min(sizes), num_warps=launch.warps,
        )  # fmt: skip
        return partial.sum(-1)


def keep(
    output: torch.Tensor,
    input: torch.Tensor,
    history: Sequence[torch.Tensor] = (),
    *,
    depth: int = 1,
    ratio: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """The residual of a stack of blocks, r = `output - input`, kept, and what it says about the ones before it.

    With r1 and r0 the residuals of the last two computed steps, for each sample::

        column 0    <r - r1, r1 - r0>
        column 1    <r1 - r0, r1 - r0>
        column 2    sum |r - r1|
        column 3    sum |(r - r1) - ratio (r1 - r0)|
        column 4    sum |r|

    Column 0 over column 1 is the slope, in steps of r1 - r0, that would have foretold r from r1: the weight of an
    extrapolation, fitted on line by least squares. Columns 2 and 3 are its error of order 0 and 1, which a rule on
    the curvature weighs. A column is 0 where a residual that it takes is not there or not read. What is not finite
    goes through to the sums, and column 4 shows whether r holds any.

    Args:
        output: what the blocks made, any shape of rank 1 or more, the first dimension the batch; float32, bfloat16
            or float16.
        input: what they were given, of the same shape; strides and dtype may differ. Blocks that write in place
            need a copy of it made before.
        history: what the call before returned, newest first: at most `depth` residuals of the dtype kept. None of
            them may overlap another, `output` or `input`.
        depth: residuals to keep, 1 to 3. r1 and r0 are read only if it is 2 or more.
        ratio: float32 [B] on the device, the steps from r1 to r over the steps from r0 to r1. None: 1.
        dtype: of a kept residual. None: that of `input`.
        backend: "triton", "torch" (`reference`), or None: Triton on CUDA and ROCm devices, PyTorch elsewhere.

    Returns:
        `(history, sums)`: the new history, r first, and float32 [B, 5]. r is the difference in float32, rounded
        once to the dtype kept; the sums are of that value, which later steps see. A history shorter than `depth`
        grows by a tensor laid out as `torch.empty_like(input)`; a full one has its last tensor overwritten and
        brought to the front, in the pass that reads it: buffers change places and are never copied. The history
        that went in is then used up.

    Bytes moved: `output` and `input` read once and r written once, 2 reads and 1 write, with no residual to read
    (`depth` 1, or no history); 3 and 1 with r1; 4 and 1 with r1 and r0, a third residual is not read. The partial
    sums are negligible. Views are not copied: what collapses to the batch and two axes, the inner one of
    stride 1 in all tensors, goes through the kernel (contiguous tensors, token and channel ranges); any other layout
    is left to PyTorch, in several passes.

    Deterministic: partial sums are taken in float32 in a fixed order and added in a fixed order, without
    atomics. The same call on the same device gives the same bits.

    Operator: `keep` in torch.library, for graphs; it overwrites a given tensor and returns the sums.
    """
    _check_depth(history, depth)
    _check(output, input, history, dtype, ratio)
    dtype = input.dtype if dtype is None else dtype
    kept = history[-1] if len(history) == depth else torch.empty_like(input, dtype=dtype)
    r1, r0 = (*history, None, None)[:2] if depth > 1 else (None, None)
    ratio = None if r0 is None else ratio
    if traced(output):
        sums = _op(output, input, kept, r1, r0, ratio, backend)
    else:
        _check_memory(output, input, history)
        sums = _keep(output, input, kept, r1, r0, ratio, backend)
    return (kept, *history)[:depth], sums


def _keep(output, input, kept, r1, r0, ratio, backend) -> torch.Tensor:
    if pick_backend(OP, backend, output, _keep_kernel) == "torch":
        return reference.keep(output, input, kept, r1, r0, ratio)
    return _launch(output, input, kept, r1, r0, ratio)


def _check_depth(history, depth) -> None:
    if not isinstance(depth, int) or isinstance(depth, bool):
        raise TypeError(f"{OP}: depth is {depth!r}, expected int")
    if not 1 <= depth <= DEPTH:
        raise ValueError(f"{OP}: depth is {depth}, expected 1 to {DEPTH}")
    if not isinstance(history, Sequence):
        raise TypeError(f"{OP}: history is of type {type(history).__name__}, expected a sequence of torch.Tensor")
    if len(history) > depth:
        raise ValueError(f"{OP}: history holds {len(history)}, expected at most depth = {depth}")


def _check(output, input, history, dtype, ratio) -> None:
    check_tensor(OP, "output", output)
    check_tensor(OP, "input", input)
    if output.dim() == 0:
        raise ValueError(f"{OP}: output has shape (), expected at least one dimension")
    check_alike(OP, "output", output, "input", input)
    dtype = input.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise TypeError(f"{OP}: dtype is {dtype!r}, expected float32, bfloat16 or float16")
    for i, kept in enumerate(history):
        check_tensor(OP, f"history[{i}]", kept)
        check_alike(OP, f"history[{i}]", kept, "input", input)
        if kept.dtype != dtype:
            raise TypeError(f"{OP}: history[{i}] has dtype {kept.dtype}, expected {dtype}")
    if ratio is None:
        return
    check_tensor(OP, "ratio", ratio)
    if ratio.dtype != torch.float32:
        raise TypeError(f"{OP}: ratio has dtype {ratio.dtype}, expected torch.float32")
    if ratio.shape != output.shape[:1]:
        raise ValueError(f"{OP}: ratio has shape {tuple(ratio.shape)}, expected ({output.shape[0]},)")
    if ratio.device != output.device:
        raise ValueError(f"{OP}: ratio is on {ratio.device}, output is on {output.device}; they must be equal")


def _check_memory(output, input, history) -> None:
    apart = [("output", output), ("input", input)]
    for i, kept in enumerate(history):
        check_written(OP, f"history[{i}]", kept)
        for name, other in apart:
            if overlap(kept, other):
                raise ValueError(f"{OP}: history[{i}] overlaps {name} in memory, expected separate tensors")
        apart.append((f"history[{i}]", kept))


@torch.library.custom_op(
    add_op_namespace_prefix("keep"),
    mutates_args=("kept",),
    schema="(Tensor output, Tensor input, Tensor(a!) kept, Tensor? r1, Tensor? r0, Tensor? ratio, str? backend)"
    " -> Tensor",
)
def _op(output, input, kept, r1, r0, ratio, backend):
    """The public function less its bookkeeping: r into `kept`, which may be `r0`."""
    history = [kept, *(r for r in (r1, r0) if r is not None and not same_view(r, kept))]
    _check(output, input, history, kept.dtype, ratio)
    _check_memory(output, input, history)
    return _keep(output, input, kept, r1, r0, ratio, backend)


@_op.register_fake
def _(output, input, kept, r1, r0, ratio, backend):
    history = [kept, *(r for r in (r1, r0) if r is not None)]
    _check(output, input, history, kept.dtype, ratio)
    _check_memory(output, input, history)
    return output.new_empty(output.shape[0], SUMS, dtype=torch.float32)
