"""Latte's class-conditional model (its own repository): one list, spatial blocks at even places, temporal at odd."""

from ..stack import BlockStack
from . import register

register(
    "Latte",
    BlockStack(
        lists=("blocks",),
        exit="final_layer",
        probe_after="norm2",
        probe_places=slice(1, None, 2),  # the temporal ones
        layout="(b s) t c",
        frames=lambda model, arguments: arguments["x"].shape[1],
        input="x",
        timestep="t",
        hidden="x",
        modules={"attention": ("attn",), "mlp": ("mlp",)},
        direct=True,  # samplers get the method `forward_with_cfg`, or `forward`
    ),
)
