"""`torch.compile` and the cache: at most one more graph, no break, no recompilation, the video of the eager model."""

import inspect

import diffusers
import pytest
import torch
from tiny_models import MODELS, build, sample

from adacache_triton import AdaCacheConfig, Codebook, MotionRegularization, apply_adacache

STEPS = 12
CODEBOOK = Codebook((1e6,), (3, 1))  # every comparison gives rate 3
CONFIG = AdaCacheConfig(CODEBOOK, num_steps=STEPS)
COMPUTED = [1, 2, 5, 8, 11, 12]
# Their own forward does not go into one graph, or nothing of them is cached.
LEFT_OUT = {
    "hunyuan_video_1_5": "asks its input whether it is all zero",
    "wan_animate_2": "asks a tensor for a size",
}


class Counting:
    """A compiler that leaves each graph as it is."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small(name: str):
    """Two blocks a list: each is traced."""
    tiny = MODELS[name]
    fewer = {layers: 2 for layers in tiny.config if layers in ("num_layers", "num_single_layers", "num_visual_blocks")}
    return build(tiny.kind, tiny.config | fewer)
