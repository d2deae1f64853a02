"""Distances and motion scores from the kernels' sums, as tensors: nothing is read by the host.

`relative_distance` is the change that TeaCache and first-block caches compare with their threshold.
"""

from __future__ import annotations

import torch

from ._checks import METRICS, check_alike, check_metric, check_tensor, check_written, overlap, traced
from ._ops import add_op_namespace_prefix
from .residual_stats import residual_stats
from .reuse import collapse

OP = "relative_distance"


def distance(sums: torch.Tensor, metric: str = "l1") -> torch.Tensor:
    """How far a residual is from the kept one, relative to it, from the sums of `residual_stats`.

    With o the kept residual and n the new one::

        "l1"        sum |o - n| / sum |o|
        "l2"        sqrt(sum (o - n)^2 / sum o^2)
        "cosine"    1 - sum o n / sqrt(sum o^2  sum n^2)

    "l1" is AdaCache's (Kahatapitiya et al., arXiv 2411.02397), before it is divided by the rate; the paper's
    ablation has all three. Sums of several samples are added first where one decision is taken for all.

    Args:
        sums: [..., columns], the distance columns of the metric first.
        metric: the one the sums were taken for.

    Returns:
        [...], the dtype of `sums`. Infinity where a sum is not finite or a denominator is 0: what cannot be
        compared never reads as near.
    """
    _check_sums("distance", sums, metric)
    if metric == "cosine":
        dot, old, new = sums[..., 0], sums[..., 1], sums[..., 2]
        norms = old.sqrt() * new.sqrt()  # their product might overflow
        return _ratio(norms - dot, norms).clamp(min=0)  # after it: an infinite dot is no small distance
    ratio = _ratio(sums[..., 0], sums[..., 1])
    return ratio.sqrt() if metric == "l2" else ratio


def motion(sums: torch.Tensor, metric: str = "l1") -> torch.Tensor:
    """The motion score of a residual: its relative change between frames, from the sums of `residual_stats`.

    The mean over the frame strides s of sum|n[s:] - n[:-s]| / (sum|n[s:]| + sum|n[:-s]|), as AdaCache's released
    code takes it. Strides whose denominator is 0, as they have no pair of frames, do not count.

    Args:
        sums: [..., columns], two columns for each frame stride after the distance columns of the metric.
        metric: the one the sums were taken for; the score does not depend on it.

    Returns:
        [...], the dtype of `sums`. NaN where no stride counts, infinity where a sum is not finite.
    """
    _check_sums("motion", sums, metric)
    change, size = sums[..., METRICS[metric] :: 2], sums[..., METRICS[metric] + 1 :: 2]
    counts = size != 0
    return torch.where(counts, _ratio(change, size), 0).sum(-1) / counts.sum(-1)


def relative_distance(
    new: torch.Tensor,
    old: torch.Tensor,
    *,
    metric: str = "l1",
    refresh: bool = False,
    per_sample: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """The relative change of a tensor, mean|new - old| / mean|old|, in one pass over both.

    So TeaCache (Liu et al., arXiv 2411.19108) compares the modulated input of the first block from step to step,
    and ParaAttention's and diffusers' first-block caches its residual::

        skip = relative_distance(residual, previous) < threshold

    Args:
        new, old: the same shape of rank 1 or more, the first dimension the batch; strides and dtypes may differ.
            float32, bfloat16 or float16.
        metric: "l1", or "l2" or "cosine" as in `distance`.
        refresh: overwrite `old` with `new`, in the dtype of `old`; the distance is to what it held before. `old`
            must then overlap neither itself nor `new`.
        per_sample: one distance a sample, not one for the batch.
        backend: "triton", "torch" (`reference`), or None: Triton on CUDA and ROCm devices, PyTorch elsewhere.

    Returns:
        float32, 0-d or [B], on the device: nothing waits for it until the host looks at it. Infinity where the
        tensors are not finite or `old` is 0. Sums are taken in float32 whatever the dtypes.

    Bytes moved: `new` and `old` read once, `old` written once if refreshed. Views that collapse to the batch and
    three axes, the inner one of stride 1 in both, are not copied; others are.

    Deterministic, as `residual_stats` is.
    """
    _check(new, old, metric)
    if traced(new):
        op = _refresh_op if refresh else _op
        return op(new, old, metric, per_sample, backend)
    if refresh:
        _check_refresh(new, old)
    if new.dim() == 1 and not per_sample:
        new, old = new[None], old[None]
    views = _frames(new, old)
    if views is None:
        views = [tensor.contiguous().view(tensor.shape[0], 1, 1, -1) for tensor in (new, old)]
        sums = residual_stats(*views, metric=metric, backend=backend)
        if refresh:
            old.copy_(new)
    else:
        sums = residual_stats(*views, metric=metric, refresh=refresh, backend=backend)
    return distance(sums if per_sample else sums.sum(0), metric)


def _check(new, old, metric) -> None:
    check_tensor(OP, "new", new)
    check_tensor(OP, "old", old)
    if new.dim() == 0:
        raise ValueError(f"{OP}: new has shape (), expected at least one dimension")
    check_alike(OP, "new", new, "old", old)
    check_metric(OP, metric)


def _check_refresh(new, old) -> None:
    check_written(OP, "old", old)
    if overlap(new, old):
        raise ValueError(f"{OP}: old is refreshed and overlaps new in memory, expected separate tensors")


def _frames(new: torch.Tensor, old: torch.Tensor) -> list[torch.Tensor] | None:
    """Both as [B, T, S, C] views that pair the same elements; None where that takes a copy."""
    axes = collapse(new.shape[1:], new.stride()[1:], old.stride()[1:]) or [(1, (1, 1))]
    if len(axes) > 3 or axes[0][1] != (1, 1):
        return None
    if len(axes) == 1 and axes[0][0] % 256 == 0:
        # As 16 frames: a program walks them, and reduces its sums once. Frames of whole 128-bit accesses.
        size = axes[0][0] // 16
        axes = [(size, (1, 1)), (1, (size, size)), (16, (size, size))]
    axes = [(1, (0, 0))] * (3 - len(axes)) + axes[::-1]
    shape = (new.shape[0], *(size for size, _ in axes))
    return [
        tensor.as_strided(shape, (tensor.stride(0), *(strides[i] for _, strides in axes)))
        for i, tensor in enumerate((new, old))
    ]


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """Infinity unless both are finite and the ratio exists: x - x is 0, or NaN of what is not finite."""
    checked = numerator / denominator + (numerator - numerator) + (denominator - denominator)
    return checked.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)


def _check_sums(op: str, sums: torch.Tensor, metric: str) -> None:
    check_metric(op, metric)
    if not isinstance(sums, torch.Tensor):
        raise TypeError(f"{op}: sums is of type {type(sums).__name__}, expected torch.Tensor")
    if not sums.is_floating_point():
        raise TypeError(f"{op}: sums has dtype {sums.dtype}, expected a floating one")
    columns = sums.shape[-1] if sums.dim() else 0
    if columns < METRICS[metric] or (columns - METRICS[metric]) % 2:
        raise ValueError(
            f"{op}: sums has shape {tuple(sums.shape)}, expected {METRICS[metric]} columns for metric {metric!r} "
            "and two for each frame stride"
        )


@torch.library.custom_op(
    add_op_namespace_prefix("relative_distance"),
    mutates_args=(),
    schema="(Tensor new, Tensor old, str metric, bool per_sample, str? backend) -> Tensor",
)
def _op(new, old, metric, per_sample, backend):
    return relative_distance(new, old, metric=metric, per_sample=per_sample, backend=backend)


@_op.register_fake
def _(new, old, metric, per_sample, backend):
    _check(new, old, metric)
    return new.new_empty(new.shape[:per_sample], dtype=torch.float32)


@torch.library.custom_op(
    add_op_namespace_prefix("relative_distance_refresh"),
    mutates_args=("old",),
    schema="(Tensor new, Tensor(a!) old, str metric, bool per_sample, str? backend) -> Tensor",
)
def _refresh_op(new, old, metric, per_sample, backend):
    return relative_distance(new, old, metric=metric, refresh=True, per_sample=per_sample, backend=backend)


@_refresh_op.register_fake
def _(new, old, metric, per_sample, backend):
    _check(new, old, metric)
    _check_refresh(new, old)
    return new.new_empty(new.shape[:per_sample], dtype=torch.float32)
