"""CogVideoX 1.0 and 1.5, and ConsisID (diffusers): video and text side by side through one list."""

from dataclasses import replace

import torch

from ..stack import BlockStack
from . import register
from ._arguments import JOINT, axis

_COGVIDEOX = BlockStack(
    lists=("transformer_blocks",),
    exit="norm_final",
    probe_after="norm2",
    frames=axis(1, "patch_size_t"),
    returns=JOINT,
    modules={"attention": ("attn1",), "mlp": ("ff",)},
    shared=("image_rotary_emb",),
)
register("CogVideoXTransformer3DModel", _COGVIDEOX)
register(
    "ConsisIDTransformer3DModel",
    replace(
        _COGVIDEOX,
        frames=axis(1),
        entry=lambda block, output: torch.cat([block["encoder_hidden_states"], block["hidden_states"]], dim=1),
    ),
)
