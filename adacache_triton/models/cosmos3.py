"""Cosmos 3 (diffusers): a language model's layers, in which one stream understands and the other generates."""

from ..stack import BlockStack
from . import register

register(
    "Cosmos3OmniTransformer",
    BlockStack(
        lists=("layers",),
        exit="norm_moe_gen",
        probe_after="post_attention_layernorm_moe_gen",
        layout="(t s) c",
        frames=lambda model, arguments: arguments["vision_token_shapes"][0][0],
        input="vision_tokens",
        timestep="vision_timesteps",
        hidden="gen_seq",
        returns=("und_seq", "gen_seq"),
        modules={"attention": ("self_attn",), "mlp": ("mlp", "mlp_moe_gen")},
    ),
)
