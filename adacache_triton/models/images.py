"""Image transformers (diffusers): FLUX, Stable Diffusion 3 and Qwen-Image. They have no frames, and no MoReg."""

from dataclasses import replace

from ..stack import BlockStack
from . import register

_JOINT = BlockStack(
    lists=("transformer_blocks",),
    probe_after="norm2",
    returns=("encoder_hidden_states", "hidden_states"),
    modules={"attention": ("attn",), "mlp": ("ff", "ff_context")},
)
# Stable Diffusion 3.5 has a second attention in some blocks, which is measured with the first.
register(
    "SD3Transformer2DModel",
    replace(_JOINT, attention_alone=False, modules=_JOINT.modules | {"attention": ("attn", "attn2")}),
)
register(
    "FluxTransformer2DModel",
    BlockStack(
        lists=("transformer_blocks", "single_transformer_blocks"),
        probe_after="norm2",
        returns=_JOINT.returns,
        modules={"attention": ("attn",), "mlp": ("ff", "ff_context", "proj_out")},
        shared=("img_ids", "txt_ids"),
    ),
)
register(
    "QwenImageTransformer2DModel",
    BlockStack(
        lists=("transformer_blocks",),
        probe_after="img_norm2",
        returns=_JOINT.returns,
        modules={"attention": ("attn",), "mlp": ("img_mlp", "txt_mlp")},
        listed=("img_shapes",),
    ),
)
