"""Sana Video and Sana WM (diffusers): linear attention; the MLP convolves in time."""

from ..stack import BlockStack
from . import register
from ._arguments import ATTENTION, axis

register(
    "SanaVideoTransformer3DModel",
    BlockStack(lists=("transformer_blocks",), probe_after="attn2", frames=axis(2, "patch_size"), modules=ATTENTION),
)
register(
    "SanaWMTransformer3DModel",
    BlockStack(
        lists=("blocks",),
        exit="final_layer",
        probe_after="cross_attn",  # what a camera adds is measured with attention
        attention_alone=False,
        frames=axis(2, "patch_size"),
        hidden="x",
        modules={"attention": ("attn",), "cross_attention": ("cross_attn",), "mlp": ("mlp",)},
    ),
)
register(
    "SanaWMLTX2RefinerTransformer3DModel",
    BlockStack(refused="its blocks read and write a KV cache on every step"),
)
