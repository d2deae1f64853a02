"""Kandinsky 5, and Kandinsky 6 with audio beside the video (diffusers)."""

from ..stack import BlockStack, Stream
from . import register
from ._arguments import axis


def _entry(block, output):
    from diffusers.models.transformers.transformer_kandinsky import fractal_unflatten

    sparse = block["sparse_params"]
    return fractal_unflatten(block["visual_embed"], output.shape[:-1], block_mask=bool(sparse and sparse["to_fractal"]))


register(
    "Kandinsky5Transformer3DModel",
    BlockStack(
        lists=("visual_transformer_blocks",),
        exit="out_layer",
        probe_after="cross_attention_norm",
        frames=axis(1, "patch_size"),  # sparse attention reorders tokens within a frame only
        hidden="visual_embed",
        entry=_entry,
        modules={"attention": ("self_attention",), "cross_attention": ("cross_attention",), "mlp": ("feed_forward",)},
        shared=("visual_rope_pos", "text_rope_pos"),
    ),
)
_AUDIO = Stream("aud", "audio_out_layer", "audio_dec_block.cross_attention_norm")
register(
    "Kandinsky6Transformer3DModel",
    BlockStack(
        lists=("visual_transformer_blocks",),
        exit="out_layer",
        probe_after="video_dec_block.cross_attention_norm",
        frames=axis(1, "patch_size"),
        hidden="vis",
        entry=lambda block, output: block["vis"].reshape(output.shape),
        extra=(_AUDIO,),
        modules={
            "attention": ("video_dec_block.self_attention", "audio_dec_block.self_attention"),
            "cross_attention": (
                "video_dec_block.cross_attention", "audio_dec_block.cross_attention",
                "va_cross_attention", "av_cross_attention",
            ),
            "mlp": ("video_dec_block.feed_forward", "audio_dec_block.feed_forward"),
        },
        shared=("visual_rope_pos",),
    ),
)  # fmt: skip


def _windows_merged(block, output):
    from diffusers.models.transformers.transformer_kandinsky6_sr import _local_merge

    tokens = block["hidden_states"]  # windows of 8 x 8 patches of a frame, one after the other
    windows = tokens.reshape(tokens.shape[0], -1, 64, tokens.shape[-1])
    return _local_merge(windows, output.shape[1:4], (1, 8, 8), dim=1)


register(
    "Kandinsky6SRTransformer3DModel",
    BlockStack(
        lists=("visual_transformer_blocks",),
        exit="out_layer",
        probe_after="feed_forward_norm",
        frames=axis(1, "patch_size"),
        entry=_windows_merged,
        modules={"attention": ("self_attention",), "mlp": ("feed_forward",)},
    ),
)
