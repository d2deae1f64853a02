"""Cosmos 1, 2 and 2.5 (diffusers): a block adds position embeddings before its attention, which is no residual."""

from ..stack import BlockStack
from . import register
from ._arguments import ATTENTION, axis

register(
    "CosmosTransformer3DModel",
    BlockStack(
        lists=("transformer_blocks",),
        probe_before="norm1",
        probe_after="norm2",
        frames=axis(2, "patch_size"),
        modules=ATTENTION,
    ),
)
