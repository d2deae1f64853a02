"""An interface double of Open-Sora-Plan 1.1's LatteT2V.

As Latte's of that name, from which it stems; besides, it makes the attention's masks itself, for the second half of
the blocks apart, and hands each block the positions of queries and keys and the shape they lie in.
"""

import torch
from torch import Tensor

from . import latte_t2v


class Attention(latte_t2v.Attention):
    def turn(self, x: Tensor, position: Tensor | None) -> Tensor:
        """Rotary embedding of `position` [B, N, axes], each on its share of the channels."""
        if position is None:
            return x
        turned = []
        for part, place in zip(x.chunk(position.shape[-1], dim=-1), position.unbind(-1)):
            a, b = part.chunk(2, dim=-1)
            angle = place[:, None, :, None] * 0.1 ** torch.arange(a.shape[-1], device=x.device)
            cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
            turned += [a * cos - b * sin, b * cos + a * sin]
        return torch.cat(turned, dim=-1)


class BasicTransformerBlock(latte_t2v.BasicTransformerBlock):
    attention = Attention

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        timestep=None,
        cross_attention_kwargs=None,
        class_labels=None,
        position_q=None,
        position_k=None,
        hw=None,
    ):
        x, (h, w) = hidden_states, hw
        assert x.shape[1] == h * w
        x = (
            self.attention_residual(
                x, timestep, attention_mask=attention_mask, position_q=position_q, position_k=position_k
            )
            + x
        )
        x = self.cross_residual(x, encoder_hidden_states, encoder_attention_mask) + x
        return self.mlp_residual(x, timestep) + x


class BasicTransformerBlock_(latte_t2v.BasicTransformerBlock_):
    attention = Attention

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        timestep=None,
        cross_attention_kwargs=None,
        class_labels=None,
        position_q=None,
        position_k=None,
        frame=None,
    ):
        x = hidden_states
        assert (x.shape[1],) == frame
        x = self.attention_residual(x, timestep, position_q=position_q, position_k=position_k) + x
        return self.mlp_residual(x, timestep) + x


class LatteT2V(latte_t2v.LatteT2V):
    spatial, temporal = BasicTransformerBlock, BasicTransformerBlock_

    def arguments(self, batch: int, frames: int, height: int, width: int, attention_mask: Tensor | None):
        device = self.pos_embed.weight.device
        if attention_mask is None:
            attention_mask = torch.ones(batch, frames, height, width, device=device)
        mask = (1 - attention_mask.flatten(2).flatten(0, 1).unsqueeze(1)) * -10000  # [B * F, 1, S]
        half = len(self.transformer_blocks) // 2
        compressed = mask.clone()  # as large where keys are not compressed
        masks = [compressed if i >= half else mask for i in range(len(self.transformer_blocks))]
        grid = torch.cartesian_prod(torch.arange(height, device=device), torch.arange(width, device=device))
        in_space = grid.expand(batch * frames, -1, -1)
        in_time = torch.arange(frames, device=device)[:, None].expand(batch * height * width, -1, -1)
        return masks, (in_space, in_space, (height, width)), (in_time, in_time, (frames,))
