"""EasyAnimate (diffusers)."""

from ..stack import BlockStack
from . import register
from ._arguments import JOINT, axis

register(
    "EasyAnimateTransformer3DModel",
    BlockStack(
        lists=("transformer_blocks",),
        exit="norm_final",
        probe_after="norm2",
        frames=axis(2),
        returns=JOINT,
        modules={"attention": ("attn1",), "mlp": ("ff", "txt_ff")},
    ),
)
