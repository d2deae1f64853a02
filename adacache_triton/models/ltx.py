"""LTX and LTX-2 (diffusers). The second carries audio beside video: both are looked at, both are reused."""

from ..stack import BlockStack, Stream
from . import register
from ._arguments import ATTENTION


def _frames(model, arguments) -> int | None:
    return arguments.get("num_frames")  # None where a pipeline gives coordinates and puts condition tokens in front


def _tokens(model, arguments) -> slice:
    sizes = [arguments.get(name) for name in ("num_frames", "height", "width")]
    return slice(None) if None in sizes else slice(sizes[0] * sizes[1] * sizes[2])  # condition tokens follow


register(
    "LTXVideoTransformer3DModel",
    BlockStack(
        lists=("transformer_blocks",),
        probe_after="attn2",
        frames=_frames,
        modules=ATTENTION,
        shared=("rope_interpolation_scale",),
    ),
)
register(
    "LTX2VideoTransformer3DModel",
    BlockStack(
        lists=("transformer_blocks",),
        probe_after="norm2",
        frames=_frames,
        tokens=_tokens,
        extra=(Stream("audio_hidden_states", "audio_norm_out", "audio_norm2"),),
        modules={
            "attention": ("attn1", "audio_attn1"),
            "cross_attention": ("attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn"),
            "mlp": ("ff", "audio_ff"),
        },
    ),
)
