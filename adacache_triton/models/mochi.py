"""Mochi (diffusers): attention's output is normed on its way into the stream, so the probe is that normed residual."""

from ..stack import BlockStack
from . import register
from ._arguments import JOINT, axis

register(
    "MochiTransformer3DModel",
    BlockStack(
        lists=("transformer_blocks",),
        probe_after="norm3",
        frames=axis(2),
        returns=JOINT,
        modules={"attention": ("attn1",), "mlp": ("ff", "ff_context")},
    ),
)
