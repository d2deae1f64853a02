"""The operations as layers, for `kernelize` of Hugging Face's kernels: without state, inference only.

A model's own layer of the same arguments gets this one's forward. Hidden states are [B, L, C], or [B, T, S, C]
where the gate differs from frame to frame; what is kept belongs to the caller.
"""

from __future__ import annotations

import torch
from torch import nn

from .gated_residual import gated_residual
from .reuse import reuse


def _one_frame(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor.unsqueeze(1) if tensor is not None and tensor.dim() == 3 else tensor


class GatedResidual(nn.Module):
    """hidden + gate * branch, and kept <- gate * branch, in one pass: see `gated_residual`."""

    can_torch_compile = True
    has_backward = False

    def forward(
        self, hidden: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor | None, kept: torch.Tensor
    ) -> torch.Tensor:
        out, _ = gated_residual(*map(_one_frame, (hidden, branch, gate, kept)), measure=False)
        return out.view(hidden.shape)


class MeasuredGatedResidual(nn.Module):
    """The same, with the L1 sums [B, 2] of how far gate * branch is from what was kept: see `residual_stats`."""

    can_torch_compile = True
    has_backward = False

    def forward(
        self, hidden: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor | None, kept: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, sums = gated_residual(*map(_one_frame, (hidden, branch, gate, kept)))
        return out.view(hidden.shape), sums


class Reuse(nn.Module):
    """hidden + kept, in one pass: see `reuse`. What stands for the other two on a reused step."""

    can_torch_compile = True
    has_backward = False

    def forward(self, hidden: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        return reuse(hidden, kept)
