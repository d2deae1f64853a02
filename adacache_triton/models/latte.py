"""Latte (diffusers): spatial and temporal blocks in turn, re-laid out by the model between them."""

from ..stack import BlockStack
from . import register

register(
    "LatteTransformer3DModel",
    BlockStack(
        lists=("transformer_blocks", "temporal_transformer_blocks"),
        exit="norm_out",
        probe_list="temporal_transformer_blocks",
        probe_after="norm2",
        layout="(b s) t c",
        frames=lambda model, arguments: arguments["hidden_states"].shape[2],
    ),
)
