"""Latte, and the models that took its blocks over: spatial and temporal blocks in turn, re-laid out between them."""

from dataclasses import replace

from ..stack import BlockStack
from . import register
from ._arguments import ATTENTION, axis

_LATTE = BlockStack(
    lists=("transformer_blocks", "temporal_transformer_blocks"),
    exit="norm_out",
    probe_list="temporal_transformer_blocks",
    probe_after="norm2",
    layout="(b s) t c",
    frames=axis(2),
    modules=ATTENTION,
)
register("LatteTransformer3DModel", _LATTE)
# Latte's own repository and Open-Sora-Plan 1.1: their temporal blocks name the norm before the MLP norm3.
register("LatteT2V", replace(_LATTE, probe_after="norm3"))
