"""The epilogue of an attention or MLP branch: its gated residual added, kept and measured, in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import reference
from ._checks import METRICS, check_alike, check_metric, check_written, overlap, same_view, traced
from ._ops import add_op_namespace_prefix
from ._triton import WARP, cdiv, jit, pick_backend, tl
from ._walk import (
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

OP = "gated_residual"


@jit
def _gated(branch, gate):
    """The product as PyTorch takes it: in float32, and rounded where both have one dtype."""
    product = gate.to(tl.float32) * branch.to(tl.float32)
    if gate.dtype == branch.dtype:
        return product.to(branch.dtype)
    else:
        return product


@jit
def _residual(t, mask, branch, gate, GATE_MOVES: tl.constexpr):
    """r of frame t [BLOCK]; `branch` and `gate` are pointer, stride of a frame, offsets in it, the gate's tile."""
    loaded = tl.load(branch[0] + t * branch[1] + branch[2], mask=mask, other=0.0)
    if gate[0] is None:
        return loaded
    elif GATE_MOVES:
        return _gated(loaded, tl.load(gate[0] + t * gate[1] + gate[2], mask=mask, other=0.0))
    else:
        return _gated(loaded, gate[3])


@jit(do_not_specialize=["frames", "tiles", "slots"])
def _gated_residual_kernel(
    out_ptr, hidden_ptr, branch_ptr, kept_ptr, gate_ptr,  # [B, T, S, C]; the gate's B, T, S may be 1
    partial_ptr,  # [DISTANCES + 2 * strides, programs], or None
    out_batch, out_frame, out_token, hidden_batch, hidden_frame, hidden_token,  # strides, in elements
    branch_batch, branch_frame, branch_token, kept_batch, kept_frame, kept_token,
    gate_batch, gate_frame, gate_token,
    frames, plane, tiles, slots,  # T, S * C, tiles of the plane, programs of a sample
    CHANNELS: tl.constexpr,  # C, or None where (S, C) is one contiguous axis in all but the gate
    GATE_CHANNELS: tl.constexpr,  # the same of the gate
    GATE_MOVES: tl.constexpr,  # from frame to frame
    METRIC: tl.constexpr, DISTANCES: tl.constexpr,  # and its number of columns
    FRAME_STRIDES: tl.constexpr,
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
    hidden_tile = tile_offsets(p, hidden_token, CHANNELS)  # [BLOCK] offset in a frame
    kept_tile = tile_offsets(p, kept_token, CHANNELS)
    out_ptr += batch * out_batch
    hidden_ptr += batch * hidden_batch
    kept_ptr += batch * kept_batch
    out_frame = tl.cast(out_frame, tl.int64)  # a frame's offset may pass 2**31
    hidden_frame = tl.cast(hidden_frame, tl.int64)
    kept_frame = tl.cast(kept_frame, tl.int64)
    branch_ptr += batch * branch_batch
    branch = (branch_ptr, tl.cast(branch_frame, tl.int64), tile_offsets(p, branch_token, CHANNELS))
    gate = (None,)
    if gate_ptr is not None:
        gate_ptr += batch * gate_batch
        gate_tile = tile_offsets(p, gate_token, GATE_CHANNELS)
        gate = (gate_ptr, tl.cast(gate_frame, tl.int64), gate_tile)
        if not GATE_MOVES:
            gate += (tl.load(gate_ptr + gate_tile, mask=inside, other=0.0),)

    distance = no_sums(DISTANCES, BLOCK // WIDTH)
    motion = no_sums(2 * len(FRAME_STRIDES), BLOCK // WIDTH)
    # Masks are bounds on p and never joined by `&`, which Triton 3.9's interpreter turns into integers.
    if partial_ptr is not None:
        before = _residual(first - 1, p < tl.where(first > 0, plane, 0), branch, gate, GATE_MOVES)
    for t in range(first, last):
        hidden = tl.load(hidden_ptr + t * hidden_frame + hidden_tile, mask=inside, other=0.0).to(tl.float32)
        residual = _residual(t, inside, branch, gate, GATE_MOVES)
        if partial_ptr is not None:
            kept = tl.load(kept_ptr + t * kept_frame + kept_tile, mask=inside, other=0.0)
        x = residual.to(tl.float32)
        # Written before the sums are taken, so that `hidden` does not hold registers meanwhile.
        store_tile(out_ptr + t * out_frame, hidden + x, start, plane, out_token, CHANNELS, BLOCK, WIDTH)
        if partial_ptr is not None:
            distance = add_distance(distance, x, kept.to(tl.float32), METRIC, WIDTH)
            earlier = ()
            for i in tl.static_range(len(FRAME_STRIDES)):
                if FRAME_STRIDES[i] == 1:
                    earlier += (before,)  # not yet in float32, which takes twice the registers of bfloat16
                else:
                    s = FRAME_STRIDES[i]
                    some = p < tl.where(t >= s, plane, 0)
                    earlier += (_residual(t - s, some, branch, gate, GATE_MOVES),)
            motion = add_motion(motion, x, earlier, t, frames, FRAME_STRIDES, WIDTH)
            before = residual
        store_tile(kept_ptr + t * kept_frame, x, start, plane, kept_token, CHANNELS, BLOCK, WIDTH)
    if partial_ptr is not None:
        store_sums(partial_ptr + pid, distance + motion, tl.num_programs(0))


def launch_for(batch: int, frames: int, plane: int, narrow: int) -> Launch:
    """The launch for [batch, frames, plane] elements, of `narrow` bytes in the narrowest tensor."""
    # One 128-bit access a thread of the narrowest tensor. Loads of three tensors are in flight, and at one frame
    # stride 64 registers hold them: eight programs fit a multiprocessor. Two accesses would take half as many more.
    block = THREADS * 16 // narrow
    return Launch(block, span_for(batch, frames, cdiv(plane, block)), THREADS // WARP)


def _launch(hidden, branch, gate, kept, measure, frame_strides, metric, out):
    batch, frames, tokens, channels = hidden.shape
    plane = tokens * channels
    gate_strides, gate_channels, gate_moves = [0, 0, 0], None, False
    if gate is not None:
        gate_strides = outer_strides(gate)
        gate_channels = None if tokens == 1 or gate_strides[2] == channels else channels
        gate_moves = gate_strides[1] != 0
    views = (out, hidden, branch, kept)
    flat = tokens == 1 or all(view.stride(2) == channels for view in views)
    narrow = min(tensor.element_size() for tensor in (*views, gate) if tensor is not None)
    launch = launch_for(batch, frames, plane, narrow)
    tiles = cdiv(plane, launch.block)
    slots = tiles * cdiv(frames, launch.span)
    partial = None
    if measure:
        columns = METRICS[metric] + 2 * len(frame_strides)
        partial = torch.empty(columns, batch, slots, dtype=torch.float32, device=hidden.device)
    with torch.cuda.device_of(hidden):
        _gated_residual_kernel[(batch * slots,)](
            out, hidden, branch, kept, gate, partial,
            *(stride for view in views for stride in outer_strides(view)), *gate_strides,
            frames, plane, tiles, slots,
            CHANNELS=None if flat else channels,
            GATE_CHANNELS=gate_channels, GATE_MOVES=gate_moves,
            METRIC=metric, DISTANCES=METRICS[metric], FRAME_STRIDES=frame_strides,
            BLOCK=launch.block, SPAN=launch.span, WIDTH=16 // narrow, num_warps=launch.warps,
            enable_fp_fusion=False,  # product and sum are rounded one by one, as PyTorch rounds them
        )  # fmt: skip
        return partial.transpose(0, 1).sum(-1) if measure else None


def gated_residual(
    hidden: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    kept: torch.Tensor,
    *,
    measure: bool = True,
    frame_strides: Sequence[int] = (),
    metric: str = "l1",
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What stands behind the attention or MLP of a block, and the caching decision with it::

        r = gate * branch
        sums = residual_stats(r, kept)
        out = hidden + r
        kept = r

    Numbers are those of eager PyTorch under its type promotion: r is the float32 product, rounded once where
    gate and branch have one dtype and left in float32 where they differ; out is the float32 sum, rounded once
    to the dtype of `hidden`. So `out` equals `hidden + gate * branch` bit for bit, and in Wan, whose gate is
    float32, `(hidden.float() + branch * gate).type_as(hidden)`. Its twin on a reused step is
    `reuse(hidden, kept)`. The decision is AdaCache's (Kahatapitiya et al., arXiv 2411.02397); this is the place
    where its released code measures residuals.

    Args:
        hidden: [B, T, S, C] view: batch, frames, tokens of a frame, channels. Any strides of B, T and S; the
            stride of C is 1. float32, bfloat16 or float16.
        branch: output of the attention or MLP, of the same shape; strides and dtype may differ.
        gate: [B, T, S, C], with 1 for any of B, T and S: a gate per sample, per frame or per token. Strides as
            above, any dtype of the three. None: r is `branch`.
        kept: the residual of the last computed step, of the shape of `hidden`; overwritten with r in its own
            dtype. It must overlap neither itself nor another tensor.
        measure: take the sums. Without them `kept` is not read.
        frame_strides, metric: of the sums, as in `residual_stats`.
        out: where to write, of the shape and dtype of `hidden`: `hidden` itself (in place), or a tensor that
            overlaps no other. None: a new tensor, laid out as `torch.empty_like(hidden)`.
        backend: "triton", "torch" (`reference`), or None: Triton on CUDA and ROCm devices, PyTorch elsewhere.

    Returns:
        `out`, and the sums as `residual_stats` gives them for r against `kept` before the call: float32
        [B, M + 2 * len(frame_strides)]; None where they are not measured.

    Bytes moved: `hidden`, `branch` and, where it is measured, `kept` read once, `out` and `kept` written once.
    A gate per sample or per token is read once and one per frame stays in cache. Frame stride 1 is free; any
    other reads branch and gate again s frames back, where they are still in cache. Inputs too small to fill a
    chip are also cut between frames; each cut reads one frame of the branch again where it is measured.

    Deterministic: partial sums are taken in float32 in a fixed order and added in a fixed order, without
    atomics. The same call on the same device gives the same bits.

    Operators: `gated_residual` and, with `out`, `gated_residual_out` in torch.library, for graphs; sums that are
    not measured are an empty tensor there.
    """
    _check(hidden, branch, gate, kept, frame_strides, metric, out)
    if traced(hidden):
        options = measure, frame_strides, metric, backend
        if out is None:
            out, sums = _op(hidden, branch, gate, kept, *options)
        else:
            sums = _out_op(hidden, branch, gate, kept, out, *options)
        return out, sums if measure else None
    out = torch.empty_like(hidden) if out is None else out
    if pick_backend(OP, backend, hidden, _gated_residual_kernel) == "torch":
        options = dict(measure=measure, frame_strides=frame_strides, metric=metric)
        return reference.gated_residual(hidden, branch, gate, kept, **options, out=out)
    return out, _launch(hidden, branch, gate, kept, measure, tuple(frame_strides), metric, out)


def _check(hidden, branch, gate, kept, frame_strides, metric, out) -> None:
    check_view(OP, "hidden", hidden)
    for name, view in (("branch", branch), ("kept", kept)):
        check_view(OP, name, view)
        check_alike(OP, name, view, "hidden", hidden)
    if gate is not None:
        check_view(OP, "gate", gate)
        full, sizes = tuple(hidden.shape), tuple(gate.shape)
        if sizes[3] != full[3] or any(size not in (1, whole) for size, whole in zip(sizes, full, strict=True)):
            raise ValueError(
                f"{OP}: gate has shape {sizes}, hidden has {full}; they must be equal, "
                "or the gate 1 in any dimension but the last"
            )
        if gate.device != hidden.device:
            raise ValueError(f"{OP}: gate is on {gate.device}, hidden is on {hidden.device}; they must be equal")
    check_frame_strides(OP, frame_strides)
    check_metric(OP, metric)
    check_written(OP, "kept", kept)
    apart = {"branch": branch} if gate is None else {"branch": branch, "gate": gate}
    for name, tensor in {"hidden": hidden, **apart}.items():
        if overlap(kept, tensor):
            raise ValueError(f"{OP}: kept is overwritten and overlaps {name} in memory, expected separate tensors")
    if out is None:
        return
    if out is not hidden:  # of which all this is known
        check_view(OP, "out", out)
        check_alike(OP, "out", out, "hidden", hidden)
        if out.dtype != hidden.dtype:
            raise TypeError(f"{OP}: out has dtype {out.dtype}, hidden has {hidden.dtype}; they must be equal")
        if overlap(out, hidden) and not same_view(out, hidden):
            raise ValueError(f"{OP}: out overlaps hidden in memory, expected hidden itself or apart from it")
        apart["kept"] = kept
    check_written(OP, "out", out)
    for name, tensor in apart.items():
        if overlap(out, tensor):
            raise ValueError(f"{OP}: out overlaps {name} in memory, expected separate tensors")


def _empty_sums(hidden, measure, frame_strides, metric) -> torch.Tensor:
    """What has the shape of the sums; without elements where none are taken, as operators cannot return None."""
    columns = METRICS[metric] + 2 * len(frame_strides) if measure else 0
    return hidden.new_empty(hidden.shape[0], columns, dtype=torch.float32)


@torch.library.custom_op(
    add_op_namespace_prefix(OP),
    mutates_args=("kept",),
    schema="(Tensor hidden, Tensor branch, Tensor? gate, Tensor(a!) kept, bool measure, int[] frame_strides, "
    "str metric, str? backend) -> (Tensor, Tensor)",
)
def _op(hidden, branch, gate, kept, measure, frame_strides, metric, backend):
    options = dict(measure=measure, frame_strides=frame_strides, metric=metric, backend=backend)
    out, sums = gated_residual(hidden, branch, gate, kept, **options)
    return out, sums if measure else _empty_sums(hidden, measure, frame_strides, metric)


@_op.register_fake
def _(hidden, branch, gate, kept, measure, frame_strides, metric, backend):
    return torch.empty_like(hidden), _empty_sums(hidden, measure, frame_strides, metric)


@torch.library.custom_op(
    add_op_namespace_prefix(f"{OP}_out"),
    mutates_args=("kept", "out"),
    schema="(Tensor hidden, Tensor branch, Tensor? gate, Tensor(a!) kept, Tensor(b!) out, bool measure, "
    "int[] frame_strides, str metric, str? backend) -> Tensor",
)
def _out_op(hidden, branch, gate, kept, out, measure, frame_strides, metric, backend):
    options = dict(measure=measure, frame_strides=frame_strides, metric=metric, backend=backend)
    _, sums = gated_residual(hidden, branch, gate, kept, **options, out=out)
    return sums if measure else _empty_sums(hidden, measure, frame_strides, metric)


@_out_op.register_fake
def _(hidden, branch, gate, kept, out, measure, frame_strides, metric, backend):
    return _empty_sums(hidden, measure, frame_strides, metric)
