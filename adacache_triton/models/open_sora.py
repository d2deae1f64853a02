"""Open-Sora 1.2 (its own repository): spatial and temporal blocks in turn, tokens frame-major throughout."""

from ..stack import BlockStack
from . import register

register(
    "STDiT3",
    BlockStack(
        lists=("spatial_blocks", "temporal_blocks"),
        exit="temporal_blocks",  # in between, sequence parallelism gathers the tokens
        probe_list="temporal_blocks",
        probe_after="cross_attn",
        # Frames are padded up to the patch before they are embedded.
        frames=lambda model, arguments: -(-arguments["x"].shape[2] // model.patch_size[0]),
        input="x",
        hidden="x",
        modules={"attention": ("attn",), "cross_attention": ("cross_attn",), "mlp": ("mlp",)},
    ),
)
