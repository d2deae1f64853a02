"""MiniMax H3 (diffusers): text, references and video packed into one sequence, so no frames are told apart."""

from ..stack import BlockStack
from . import register

register(
    "MiniMaxH3Transformer3DModel",
    BlockStack(
        lists=("transformer_blocks",),
        probe_after="norm2",
        modules={"attention": ("attn",), "mlp": ("ff",)},
        shared=(  # the layout of the sequence and its distinct timesteps
            "timestep", "timestep_indices", "token_tags", "position_ids", "video_indices", "audio_indices",
            "text_indices",
        ),
    ),
)  # fmt: skip
