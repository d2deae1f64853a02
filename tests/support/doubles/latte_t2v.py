"""An interface double of Latte's own LatteT2V: its block lists, arguments and token layout, at any size.

A spatial and a temporal block in turn. Frames lie in the batch for the one, tokens for the other, and the model lays
them out anew between blocks; the first temporal one finds an embedding of the frames added. Blocks are called with
positions only.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Linear(width, width)

    def turn(self, x: Tensor, position: Tensor | None) -> Tensor:
        return x

    def forward(
        self, hidden_states, encoder_hidden_states=None, attention_mask=None, position_q=None, position_k=None
    ) -> Tensor:
        split = lambda z: z.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q = self.turn(split(self.to_q(hidden_states)), position_q)
        k, v = self.turn(split(self.to_k(source)), position_k), split(self.to_v(source))
        mask = None if attention_mask is None else attention_mask[:, None]  # [batch, heads, queries, keys]
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out(mixed.transpose(1, 2).flatten(2))


class BasicTransformerBlock(nn.Module):
    """A spatial block: the second attention sees the text. No norm stands before that one."""

    attention, text = Attention, True

    def __init__(self, width: int, heads: int):
        super().__init__()
        norm = lambda: nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)  # noqa: E731
        self.norm1, self.attn1 = norm(), self.attention(width, heads)
        if self.text:
            self.norm2, self.attn2 = norm(), self.attention(width, heads)
        else:
            self.norm3 = norm()
        self.ff = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def modulation(self, timestep: Tensor) -> tuple[Tensor, ...]:
        return (self.scale_shift_table[None] + timestep.reshape(len(timestep), 6, -1)).chunk(6, dim=1)

    def attention_residual(self, x: Tensor, timestep: Tensor, **attention) -> Tensor:
        shift, scale, gate, *_ = self.modulation(timestep)
        return gate * self.attn1(self.norm1(x) * (1 + scale) + shift, **attention)

    def cross_residual(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        return self.attn2(x, encoder_hidden_states=text, attention_mask=mask)

    def mlp_residual(self, x: Tensor, timestep: Tensor) -> Tensor:
        *_, shift, scale, gate = self.modulation(timestep)
        norm = self.norm2 if self.text else self.norm3
        return gate * self.ff(norm(x) * (1 + scale) + shift)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        timestep=None,
        cross_attention_kwargs=None,
        class_labels=None,
    ):
        hidden_states = self.attention_residual(hidden_states, timestep, attention_mask=attention_mask) + hidden_states
        if self.text:
            cross = self.cross_residual(hidden_states, encoder_hidden_states, encoder_attention_mask)
            hidden_states = cross + hidden_states
        return self.mlp_residual(hidden_states, timestep) + hidden_states


class BasicTransformerBlock_(BasicTransformerBlock):
    """A temporal block: one attention, and the norm before the MLP is called the third."""

    text = False


class LatteT2V(nn.Module):
    """hidden_states [B, C, F, H, W], timestep [B], encoder_hidden_states [B, L, D] -> [B, C', F, H, W]."""

    spatial, temporal = BasicTransformerBlock, BasicTransformerBlock_

    def __init__(self, num_layers: int = 3, width: int = 24, heads: int = 2, channels: int = 4, frames: int = 5):
        super().__init__()
        self.patch_size, self.out_channels = 2, 2 * channels
        self.pos_embed = nn.Conv2d(channels, width, 2, 2)
        self.adaln_single = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.adaln_linear = nn.Linear(width, 6 * width)
        self.caption_projection = nn.Linear(8, width)
        self.transformer_blocks = nn.ModuleList(self.spatial(width, heads) for _ in range(num_layers))
        self.temporal_transformer_blocks = nn.ModuleList(self.temporal(width, heads) for _ in range(num_layers))
        self.norm_out = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.proj_out = nn.Linear(width, 4 * self.out_channels)
        self.register_buffer("temp_pos_embed", torch.randn(1, frames, width), persistent=False)

    def arguments(self, batch: int, frames: int, height: int, width: int, attention_mask: Tensor | None):
        """What else the blocks get: each spatial block's mask, and what follows the class labels."""
        return [attention_mask] * len(self.transformer_blocks), (), ()

    def forward(
        self,
        hidden_states,
        timestep=None,
        encoder_hidden_states=None,
        added_cond_kwargs=None,
        class_labels=None,
        cross_attention_kwargs=None,
        attention_mask=None,
        encoder_attention_mask=None,
        use_image_num=0,
        enable_temporal_attentions=True,
        return_dict=True,
    ):
        batch, _, frames, height, width = hidden_states.shape
        h, w = height // self.patch_size, width // self.patch_size
        x = self.pos_embed(hidden_states.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)  # [B * F, S, D]
        frequencies = 2 ** torch.arange(8, device=timestep.device) * (timestep[:, None] / 1000)
        embedded = self.adaln_single(torch.cat([frequencies.sin(), frequencies.cos()], dim=1).to(x.dtype))
        modulation = self.adaln_linear(nn.functional.silu(embedded))
        of_frames, of_tokens = (modulation.repeat_interleave(n, dim=0) for n in (frames, h * w))
        text = self.caption_projection(encoder_hidden_states).repeat_interleave(frames, dim=0)
        if encoder_attention_mask is not None:
            bias = (1 - encoder_attention_mask.to(x.dtype)) * -10000
            encoder_attention_mask = bias.unsqueeze(1).repeat_interleave(frames, dim=0)
        masks, in_space, in_time = self.arguments(batch, frames, h, w, attention_mask)
        for i, (spatial, temporal) in enumerate(zip(self.transformer_blocks, self.temporal_transformer_blocks)):
            x = spatial(
                x, masks[i], text, encoder_attention_mask, of_frames, cross_attention_kwargs, class_labels, *in_space
            )
            if enable_temporal_attentions:
                x = x.unflatten(0, (batch, frames)).transpose(1, 2).flatten(0, 1)  # [B * S, F, D]
                if i == 0 and frames > 1:
                    x = x + self.temp_pos_embed
                x = temporal(x, None, None, None, of_tokens, cross_attention_kwargs, class_labels, *in_time)
                x = x.unflatten(0, (batch, h * w)).transpose(1, 2).flatten(0, 1)
        shift, scale = (self.scale_shift_table + embedded.repeat_interleave(frames, dim=0)[:, None]).chunk(2, dim=1)
        x = self.proj_out(self.norm_out(x) * (1 + scale) + shift)
        x = x.view(batch, frames, h, w, 2, 2, self.out_channels).permute(0, 6, 1, 2, 4, 3, 5)
        return (x.reshape(batch, self.out_channels, frames, height, width),)
