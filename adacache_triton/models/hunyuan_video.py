"""HunyuanVideo, FramePack, HunyuanVideo 1.5 and MotifVideo (diffusers): dual-stream, then single-stream blocks.

A single-stream block has no attention residual of its own, so a dual one is probed.
"""

from dataclasses import replace

from ..stack import BlockStack
from . import register
from ._arguments import JOINT, axis, last_tokens

_HUNYUAN = BlockStack(
    lists=("transformer_blocks", "single_transformer_blocks"),
    probe_after="norm2",
    frames=axis(2, "patch_size_t"),
    returns=JOINT,
    modules={"attention": ("attn",), "mlp": ("ff", "ff_context", "proj_out")},
)
register("HunyuanVideoTransformer3DModel", _HUNYUAN)
register(
    "HunyuanVideoFramepackTransformer3DModel",
    replace(
        _HUNYUAN,
        tokens=last_tokens("patch_size_t", "patch_size"),
        entry=lambda block, output: block["hidden_states"][:, -output.shape[1] :],
        shared=(
            "indices_latents", "indices_latents_clean", "indices_latents_history_2x", "indices_latents_history_4x",
        ),
    ),
)  # fmt: skip
_DUAL = {"attention": ("attn",), "mlp": ("ff", "ff_context")}
register("HunyuanVideo15Transformer3DModel", replace(_HUNYUAN, lists=("transformer_blocks",), modules=_DUAL))
# Text cross-attention, where its blocks have it, is measured with attention: no module gets the stream in between.
register(
    "MotifVideoTransformer3DModel",
    replace(_HUNYUAN, attention_alone=False, modules=_HUNYUAN.modules | {"cross_attention": ("cross_attn",)}),
)
