"""The kernels' operations in plain PyTorch: the golden of the tests, and what runs where Triton does not.

Arguments are as in the public functions of the same names, which check them; here they are taken as good.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import metrics
from ._checks import METRICS


def residual_stats(
    new: torch.Tensor,
    old: torch.Tensor | None = None,
    *,
    frame_strides: Sequence[int] = (),
    metric: str = "l1",
    refresh: bool = False,
) -> torch.Tensor:
    """Sums of `adacache_triton.kernels.residual_stats`, a frame at a time.

    Sums are taken in float32 by `torch.sum`, which adds pairwise. No temporary is larger than one frame of
    the batch in float32.
    """
    batch, frames = new.shape[:2]
    distances = METRICS[metric]
    sums = torch.zeros(batch, distances + 2 * len(frame_strides), dtype=torch.float32, device=new.device)
    motion = sums[:, distances:]
    for t in range(frames):
        x = new[:, t].float()
        if old is not None:
            y = old[:, t].float()
            sums[:, :distances] += _distance(x, y, metric)
        magnitude = _absolute(x) if frame_strides else None
        for i, s in enumerate(frame_strides):
            if t >= s:
                motion[:, 2 * i] += _absolute(x - new[:, t - s].float())
            pairs = (t >= s) + (t + s < frames)  # the pairs this frame belongs to: 0, 1 or 2
            if pairs:
                motion[:, 2 * i + 1] += pairs * magnitude
    if refresh:
        old.copy_(new)
    return sums


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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`hidden + gate * branch` in the dtype of hidden, the product kept, and its sums against the one kept before."""
    residual = branch if gate is None else gate * branch
    sums = residual_stats(residual, kept, frame_strides=frame_strides, metric=metric) if measure else None
    kept.copy_(residual)
    return torch.add(hidden, residual, out=torch.empty_like(hidden) if out is None else out), sums


def reuse(
    hidden: torch.Tensor,
    residuals: Sequence[torch.Tensor],
    weights: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`hidden + sum_i weights[i] * residuals[i]` in the dtype of hidden.

    `torch.add` takes mixed dtypes to float32, and its half-precision sums are float32 sums rounded once.
    """
    change = residuals[0]
    if weights is not None:
        scales = weights.reshape(-1, *(1,) * (hidden.dim() - 1), len(residuals))  # [B or 1, 1, ..., n]
        change = scales[..., 0] * residuals[0].float()
        for i in range(1, len(residuals)):
            change += scales[..., i] * residuals[i].float()
    return torch.add(hidden, change, out=torch.empty_like(hidden) if out is None else out)


def keep(
    output: torch.Tensor,
    input: torch.Tensor,
    kept: torch.Tensor,
    r1: torch.Tensor | None = None,
    r0: torch.Tensor | None = None,
    ratio: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write `output - input` into `kept`, which may be `r0`, and return the sums of `adacache_triton.kernels.keep`.

    Sums are taken in float32 by `torch.sum`, which adds pairwise. No temporary is larger than one sample in float32.
    """
    sums = torch.zeros(output.shape[0], 5, dtype=torch.float32, device=output.device)
    for b, row in enumerate(sums):
        r = (output[b].float() - input[b].float()).to(kept.dtype).float()  # as later steps see it
        if r1 is not None:
            change = r - r1[b].float()
            row[2] = change.abs().sum()
        if r0 is not None:
            before = r1[b].float() - r0[b].float()
            row[0] = (change * before).sum()
            row[1] = before.square().sum()
            row[3] = (change - (before if ratio is None else ratio[b] * before)).abs().sum()
        row[4] = r.abs().sum()
        kept[b] = r
    return sums


def decide(sums: torch.Tensor, state: torch.Tensor, rule) -> None:
    """State of `adacache_triton.kernels.decide`, by the same operations in the same order."""
    step, previous_rate, previous_scale, _ = state.unbind(1)
    sums = sum(sums.unflatten(0, (-1, len(state))))  # the branches of a video, in their order
    distance = metrics.distance(sums, rule.metric) / previous_rate

    motion, motion_scale = rule.motion, previous_scale
    if motion is not None:
        score = metrics.motion(sums, rule.metric)  # NaN where no stride has a pair of frames
        inside = (step >= motion.window[0]) & (step <= motion.window[1]) & ~score.isnan()
        motion_scale = (_power(score / motion.scale, motion.power) / motion.divisor).where(inside, 1)
        gradient = motion.gradient_weight * (motion_scale - previous_scale) / previous_rate
        distance = distance * (motion_scale + gradient.abs())

    compared = step > 1
    distance = distance.where(compared, torch.nan)
    if rule.budget is None:
        rate = torch.full_like(distance, rule.rates[-1])
        for threshold, k in zip(rule.thresholds[::-1], rule.rates[-2::-1]):
            rate = rate.where(distance >= threshold, k)
    else:
        budget = torch.full_like(distance, rule.budget)  # PyTorch divides a number by multiplying with a reciprocal
        rate = (budget / distance).floor().clamp(1, rule.max_rate)
    rate = rate.where(distance.isfinite(), 1)
    following = torch.minimum(step + rate, (step + 1).clamp(min=rule.num_steps - 1))
    state.copy_(torch.stack([following, rate, motion_scale.where(compared, previous_scale), distance], 1))


def _distance(x: torch.Tensor, y: torch.Tensor, metric: str) -> torch.Tensor:
    """Distance sums of a frame, x new and y old: two [B, S, C] -> [B, METRICS[metric]]."""
    if metric == "l1":
        terms = (y - x).abs(), y.abs()
    elif metric == "l2":
        terms = (y - x).square(), y.square()
    else:
        terms = y * x, y.square(), x.square()
    return torch.stack([term.sum((1, 2)) for term in terms], 1)


def _absolute(frame: torch.Tensor) -> torch.Tensor:
    return frame.abs().sum((1, 2))  # [B, S, C] -> [B]


def _power(x: torch.Tensor, power: float) -> torch.Tensor:
    """x ** power: the whole part by squaring, as the kernel does."""
    whole = int(power)
    result = x ** (power - whole)
    for bit in range(whole.bit_length()):
        if whole >> bit & 1:
            result = result * x
        x = x * x
    return result
