"""The kernels' operations in plain PyTorch: the golden of the tests, and what runs where Triton does not.

Arguments are as in the public functions of the same names, which check them; here they are taken as good.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def residual_stats(
    new: torch.Tensor,
    old: torch.Tensor | None = None,
    *,
    frame_strides: Sequence[int] = (),
    refresh: bool = False,
) -> torch.Tensor:
    """Sums of `adacache_triton.kernels.residual_stats`, a frame at a time.

    Sums are taken in float32 by `torch.sum`, which adds pairwise. No temporary is larger than one frame of
    the batch in float32.
    """
    batch, frames = new.shape[:2]
    sums = torch.zeros(batch, 2 + 2 * len(frame_strides), dtype=torch.float32, device=new.device)
    for t in range(frames):
        x = new[:, t].float()
        if old is not None:
            y = old[:, t].float()
            sums[:, 0] += _absolute(y - x)
            sums[:, 1] += _absolute(y)
        magnitude = _absolute(x) if frame_strides else None
        for i, s in enumerate(frame_strides):
            if t >= s:
                sums[:, 2 + 2 * i] += _absolute(x - new[:, t - s].float())
            pairs = (t >= s) + (t + s < frames)  # the pairs this frame belongs to: 0, 1 or 2
            if pairs:
                sums[:, 3 + 2 * i] += pairs * magnitude
    if refresh:
        old.copy_(new)
    return sums


def reuse(hidden: torch.Tensor, residual: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """`hidden + residual` in the dtype of hidden.

    `torch.add` takes mixed dtypes to float32, and its half-precision sums are float32 sums rounded once.
    """
    return torch.add(hidden, residual, out=torch.empty_like(hidden) if out is None else out)


def _absolute(frame: torch.Tensor) -> torch.Tensor:
    return frame.abs().sum((1, 2))  # [B, S, C] -> [B]
