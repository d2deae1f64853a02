"""An interface double of Latte's class-conditional model: one list of blocks, spatial at even places, temporal at odd.

Blocks get the stream and the condition, nothing else. Guidance is a method of the model, which calls `forward` itself.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        return self.linear(modulate(self.norm_final(x), *self.adaLN_modulation(c).chunk(2, dim=1)))


class Latte(nn.Module):
    """x [B, F, C, H, W], t [B], y [B] class labels -> [B, F, 2 C, H, W]."""

    def __init__(self, depth: int = 6, width: int = 24, heads: int = 2, channels: int = 4, frames: int = 5):
        super().__init__()
        self.channels = channels
        self.x_embedder = nn.Conv2d(channels, width, 2, 2)
        self.t_embedder = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder = nn.Embedding(10 + 1, width)  # the last: no class
        self.temp_embed = nn.Parameter(torch.randn(1, frames, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, 4 * 2 * channels)

    def forward(self, x, t, y=None, text_embedding=None, use_fp16=False):
        batch, frames, channels, height, width = x.shape
        h, w = height // 2, width // 2
        x = self.x_embedder(x.flatten(0, 1)).flatten(2).transpose(1, 2)  # [B * F, S, D]
        frequencies = 2 ** torch.arange(8) * (t[:, None] / 1000)
        c = self.t_embedder(torch.cat([frequencies.sin(), frequencies.cos()], dim=1).to(x.dtype)) + self.y_embedder(y)
        of_frames, of_tokens = (c.repeat_interleave(n, dim=0) for n in (frames, h * w))
        for i in range(0, len(self.blocks), 2):
            spatial, temporal = self.blocks[i : i + 2]
            x = spatial(x, of_frames)
            x = x.unflatten(0, (batch, frames)).transpose(1, 2).flatten(0, 1)  # [B * S, F, D]
            if i == 0:
                x = x + self.temp_embed
            x = temporal(x, of_tokens)
            x = x.unflatten(0, (batch, h * w)).transpose(1, 2).flatten(0, 1)
        x = self.final_layer(x, of_frames).view(batch, frames, h, w, 2, 2, 2 * channels)
        return x.permute(0, 1, 6, 2, 4, 3, 5).reshape(batch, frames, 2 * channels, height, width)

    def forward_with_cfg(self, x, t, y=None, cfg_scale=7.0, use_fp16=False, text_embedding=None):
        half = x[: len(x) // 2]
        output = self.forward(torch.cat([half, half]), t, y=y, use_fp16=use_fp16, text_embedding=text_embedding)
        noise, rest = output.split([self.channels, output.shape[2] - self.channels], dim=2)
        cond, uncond = noise.chunk(2)
        return torch.cat([(uncond + cfg_scale * (cond - uncond)).repeat(2, 1, 1, 1, 1), rest], dim=2)
