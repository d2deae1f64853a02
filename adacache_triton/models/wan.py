"""Wan 2.1 and 2.2 and the models built on its blocks (diffusers): one list of full 3D attention blocks."""

from dataclasses import replace

from ..stack import BlockStack
from . import register
from ._arguments import axis, last_tokens

_WAN = BlockStack(
    lists=("blocks",),
    exit="norm_out",
    probe_after="norm2",
    frames=axis(2, "patch_size"),
    modules={"attention": ("attn1",), "cross_attention": ("attn2",), "mlp": ("ffn",)},
)
register("WanTransformer3DModel", _WAN)
# The control blocks run before the others, and what they hint at is added between those.
register("WanVACETransformer3DModel", replace(_WAN, aside=("vace_blocks",), shared=("control_hidden_states_scale",)))
register("WanAnimateTransformer3DModel", _WAN)  # face adapters between blocks
register("ChronoEditTransformer3DModel", _WAN)
register("SkyReelsV2Transformer3DModel", replace(_WAN, listed=("fps",)))
register("AnyFlowTransformer3DModel", replace(_WAN, frames=axis(1)))
register("HeliosTransformer3DModel", replace(_WAN, tokens=last_tokens("patch_size", "patch_size")))

_WRITES = BlockStack(refused="its blocks write a KV cache on the steps that they run, which a skipped step would miss")
register("AnyFlowFARTransformer3DModel", _WRITES)
register("WanAnimate2Transformer3DModel", _WRITES)
