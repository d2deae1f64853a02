"""An interface double of Open-Sora 1.2's STDiT3: its block lists, arguments and token layout, at any size.

Spatial and temporal blocks in turn on x [B, T*S, C], frame-major; adaptive layer norm from the timestep,
self-attention within a frame or along time, cross-attention to the text, an MLP. Frames that are given, those not in
`x_mask`, are modulated and gated as at timestep 0. Texts of several lengths are packed into one row.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, y: Tensor | None = None, mask=None) -> Tensor:
        if mask is not None:  # y [1, sum of lengths, C]
            return torch.cat([self.forward(a, b) for a, b in zip(x.split(1), y.split(mask, dim=1))])
        split = lambda z: z.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        k, v = self.kv(x if y is None else y).chunk(2, -1)
        return self.proj(scaled_dot_product_attention(split(self.q(x)), split(k), split(v)).transpose(1, 2).flatten(2))


class STDiT3Block(nn.Module):
    def __init__(self, width: int, heads: int, temporal: bool):
        super().__init__()
        self.temporal = temporal
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, heads)
        self.cross_attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def modulation(self, t: Tensor) -> list[Tensor]:
        return (self.scale_shift_table + t.unflatten(1, (6, -1))).split(1, dim=1)

    def attention_residual(self, x: Tensor, t: Tensor, T: int, S: int, x_mask=None, t0=None) -> Tensor:
        now, given = self.modulation(t), None if x_mask is None else self.modulation(t0)
        h = select(x_mask, T, lambda m: self.norm1(x) * (1 + m[1]) + m[0], now, given).unflatten(1, (T, S))
        if self.temporal:
            h = self.attn(h.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, S)).transpose(1, 2)
        else:
            h = self.attn(h.flatten(0, 1)).unflatten(0, (-1, T))
        h = h.flatten(1, 2)
        return select(x_mask, T, lambda m: m[2] * h, now, given)

    def mlp_residual(self, x: Tensor, t: Tensor, T: int | None = None, x_mask=None, t0=None) -> Tensor:
        now, given = self.modulation(t), None if x_mask is None else self.modulation(t0)
        h = self.mlp(select(x_mask, T, lambda m: self.norm2(x) * (1 + m[4]) + m[3], now, given))
        return select(x_mask, T, lambda m: m[5] * h, now, given)

    def rest_residual(self, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        cross = self.cross_attn(x, y, None)
        return cross + self.mlp_residual(x + cross, t)

    def forward(self, x, y, t, mask=None, x_mask=None, t0=None, T=None, S=None):
        x = x + self.attention_residual(x, t, T, S, x_mask, t0)
        x = x + self.cross_attn(x, y, mask)
        return x + self.mlp_residual(x, t, T, x_mask, t0)


def select(x_mask: Tensor | None, T: int | None, modulate, now, given) -> Tensor:
    """[B, T*S, C] modulated as now, but those frames that are not in `x_mask` [B, T] as given ones."""
    if x_mask is None:
        return modulate(now)
    noisy, clean = (modulate(m).unflatten(1, (T, -1)) for m in (now, given))
    return torch.where(x_mask[:, :, None, None], noisy, clean).flatten(1, 2)


class FinalLayer(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)

    def forward(self, x, t, x_mask=None, t0=None, T=None, S=None):
        now, given = (
            None if s is None else (self.scale_shift_table[None] + s[:, None]).chunk(2, dim=1) for s in (t, t0)
        )
        return self.linear(select(x_mask, T, lambda m: self.norm(x) * (1 + m[1]) + m[0], now, given))


class STDiT3(nn.Module):
    """x [B, C, T, H, W], timestep [B], y [B, tokens, width] -> [B, C, T, H, W]."""

    def __init__(self, depth: int = 3, width: int = 32, heads: int = 4, channels: int = 4):
        super().__init__()
        self.patch_size, self.channels = (1, 2, 2), channels
        self.x_embedder = nn.Linear(channels * 4, width)
        self.t_embedder = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.spatial_blocks = nn.ModuleList(STDiT3Block(width, heads, False) for _ in range(depth))
        self.temporal_blocks = nn.ModuleList(STDiT3Block(width, heads, True) for _ in range(depth))
        self.final_layer = FinalLayer(width, channels * 4)

    def forward(self, x, timestep, y, mask=None, x_mask=None, fps=None, height=None, width=None, **kwargs):
        B, C, T, H, W = x.shape
        h, w = H // 2, W // 2
        x = x.view(B, C, T, h, 2, w, 2).permute(0, 2, 3, 5, 1, 4, 6).reshape(B, T * h * w, C * 4)
        x = self.x_embedder(x)
        t, t0 = self.embed(timestep), None
        t6, t06 = self.t_block(t), None
        if x_mask is not None:
            t0 = self.embed(torch.zeros_like(timestep))
            t06 = self.t_block(t0)
        lengths = None
        if mask is not None:  # [B, tokens]
            y, lengths = y[mask != 0].unsqueeze(0), mask.sum(dim=1).tolist()
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks):
            x = spatial(x, y, t6, lengths, x_mask, t06, T, h * w)
            x = temporal(x, y, t6, lengths, x_mask, t06, T, h * w)
        x = self.final_layer(x, t, x_mask, t0, T, h * w)
        x = x.view(B, T, h, w, C, 2, 2).permute(0, 4, 1, 2, 5, 3, 6)
        return x.reshape(B, C, T, H, W)

    def embed(self, timestep: Tensor) -> Tensor:
        frequencies = 2 ** torch.arange(8, device=timestep.device) * (timestep[:, None] / 1000)
        return self.t_embedder(
            torch.cat([frequencies.sin(), frequencies.cos()], dim=1).to(self.t_block[1].weight.dtype)
        )
