"""Allegro (diffusers)."""

from ..stack import BlockStack
from . import register
from ._arguments import ATTENTION, axis

register(
    "AllegroTransformer3DModel",
    BlockStack(
        lists=("transformer_blocks",),
        probe_after="attn2",
        frames=axis(2),
        modules=ATTENTION,
        shared=("image_rotary_emb",),
    ),
)
