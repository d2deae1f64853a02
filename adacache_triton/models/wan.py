"""Wan 2.1 (diffusers): one list of full 3D attention blocks; two calls a step under guidance."""

from ..stack import BlockStack
from . import register

register(
    "WanTransformer3DModel",
    BlockStack(
        lists=("blocks",),
        exit="norm_out",
        probe_list="blocks",
        probe_after="norm2",
        layout="b (t s) c",
        frames=lambda model, arguments: arguments["hidden_states"].shape[2] // model.config.patch_size[0],
    ),
)
