"""Latent frames and tokens of a call, read from the shapes of its arguments: what the descriptions have in common."""

from __future__ import annotations

from torch import nn

JOINT = ("hidden_states", "encoder_hidden_states")
ATTENTION = {"attention": ("attn1",), "cross_attention": ("attn2",), "mlp": ("ff",)}


def axis(index: int, patch: str | None = None):
    """Frames are that axis of the input, over the transformer's temporal patch size."""

    def frames(model: nn.Module, arguments) -> int:
        size = getattr(model.config, patch) if patch else 1
        size = size[0] if isinstance(size, (tuple, list)) else size
        return arguments["hidden_states"].shape[index] // (size or 1)

    return frames


def last_tokens(time: str, height: str):
    """The video's tokens stand last, after those of a history: as many as the patches of the input."""

    def tokens(model: nn.Module, arguments) -> slice:
        config = model.config
        t, h = getattr(config, time), getattr(config, height)
        t, h, w = t if isinstance(t, (tuple, list)) else (t, h, h)
        frames, rows, columns = arguments["hidden_states"].shape[-3:]
        return slice(-(frames // t) * (rows // h) * (columns // w), None)

    return tokens
