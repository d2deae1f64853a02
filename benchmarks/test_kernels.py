"""Kernel runs under pytest-benchmark: `pytest benchmarks --benchmark-only`.

On a GPU the real shapes, Triton beside eager and compiled PyTorch; on a CPU small ones, PyTorch alone. Each
row carries the bytes of one pass, so that bytes over time can be held against the device's bandwidth.
"""

import pytest
import torch

from adacache_triton.kernels import residual_stats, reuse

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# [B, T, S, C] of the residuals that the paper's models keep, guidance in the batch.
SHAPES = {
    "open-sora-720p-2s": (2, 15, 3600, 1152),
    "open-sora-480p-2s": (2, 15, 1590, 1152),
    "latte-512": (2, 16, 1024, 1152),
}
if not CUDA:
    SHAPES = {"tiny": (2, 8, 36, 128)}


def eager(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """The released code's expressions for distance and motion, and the refresh of the kept residual."""
    distance = (old - new).norm(p=1) / old.norm(p=1)
    later, earlier = new[:, 1:], new[:, :-1]
    motion = (later - earlier).norm(p=1) / (later.norm(p=1) + earlier.norm(p=1))
    old.copy_(new)
    return torch.stack([distance, motion])


def fused(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    return residual_stats(new, old, frame_strides=(1,), refresh=True)


BACKENDS = {"adacache-triton": fused, "eager": eager}
if CUDA:
    BACKENDS["torch.compile"] = torch.compile(eager)


def timed(benchmark, call, moved: int):
    """Time `call` to the end of its work on the device."""

    def run():
        call()
        if CUDA:
            torch.cuda.synchronize()

    run()  # compile
    benchmark.extra_info |= {"device": torch.cuda.get_device_name() if CUDA else "cpu", "bytes": moved}
    benchmark(run)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_distance_motion_refresh(benchmark, shape, backend):
    new, old = (torch.randn(SHAPES[shape], device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    timed(benchmark, lambda: BACKENDS[backend](new, old), 3 * new.numel() * new.element_size())


@pytest.mark.parametrize("backend", ["adacache-triton", "eager"])
@pytest.mark.parametrize("shape", SHAPES)
def test_reuse(benchmark, shape, backend):
    hidden, residual = (torch.randn(SHAPES[shape], device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    call = reuse if backend == "adacache-triton" else torch.add
    timed(benchmark, lambda: call(hidden, residual), 3 * hidden.numel() * hidden.element_size())
