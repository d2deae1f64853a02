"""What a reused step costs the host: `pytest benchmarks/test_step_cost.py --benchmark-only`.

A tiny transformer with many blocks, beside itself with its block lists emptied by hand: what is left of that are the
model's own embedders and head, and the difference is what the cache takes, adding the residual included. The two run
in turn, so that a busy machine slows both. Rows have the median of the differences as `beyond_us`.
"""

from __future__ import annotations

import copy
import time

import numpy as np
import pytest
import torch
from tiny_models import MODELS, build
from torch import nn

from adacache_triton import AdaCacheConfig, Codebook, apply_adacache

ROUNDS = 1000
CONFIG = AdaCacheConfig(Codebook((1e9,), (2 * ROUNDS, 1)), num_steps=4 * ROUNDS)  # computes twice, then reuses
WIDTH = dict(num_attention_heads=1, attention_head_dim=8)
# 40 blocks of width 8; Latte's are pairs.
DEEP = {
    "wan": WIDTH | dict(num_layers=40, ffn_dim=8),
    "latte": WIDTH | dict(num_layers=20, cross_attention_dim=8),
}


@pytest.mark.parametrize("name", DEEP)
@torch.no_grad()
def test_reused_step(benchmark, name):
    tiny = MODELS[name]
    model = build(tiny.kind, tiny.config | DEEP[name])
    emptied, call, seconds = copy.deepcopy(model), tiny.inputs(), []
    for path, blocks in emptied.named_children():
        if isinstance(blocks, nn.ModuleList):
            setattr(emptied, path, nn.ModuleList())

    def without():
        start = time.perf_counter()
        emptied(**call)
        seconds.append(time.perf_counter() - start)

    handle = apply_adacache(model, CONFIG)
    with handle.run():
        for _ in range(3):
            model(**call)
        benchmark.pedantic(model, kwargs=call, setup=without, rounds=ROUNDS, warmup_rounds=20)
    assert handle.report().computed_steps == [1, 2]
    if benchmark.stats is None:  # --benchmark-disable
        return
    reused = np.array(benchmark.stats.stats.data)
    beyond = np.median(reused - seconds[-ROUNDS:])
    benchmark.extra_info |= {"emptied_us": 1e6 * np.median(seconds), "beyond_us": 1e6 * float(beyond)}
