"""Triton where it is installed, and the choice of the backend.

This is the one place that knows whether Triton is there. Without it `jit` leaves a kernel a plain function,
so that the files import (annotations stay strings), and `pick_backend` lets nobody call it.
"""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec

import torch

# The kernels index tuples of constants, which Triton learnt with 3.4 (torch 2.8).
HAS_TRITON = find_spec("triton") is not None
if HAS_TRITON:
    import triton

    HAS_TRITON = tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 4)
WARP = 64 if torch.version.hip else 32  # threads

if HAS_TRITON:
    import triton.language as tl
    from triton import jit
else:
    tl = None

    def jit(fn=None, **options):
        return jit if fn is None else fn


def cdiv(a: int, b: int) -> int:
    """On the host; Triton's own costs 2.5 us there."""
    return -(-a // b)


def pick_backend(op: str, backend: str | None, tensor: torch.Tensor, kernel) -> str:
    """What was asked for; when nothing was, "triton" on a CUDA or ROCm device and "torch" elsewhere.

    The environment variable ADACACHE_BACKEND asks where no argument does. A device without a Triton that can
    compile the kernels gets "torch", with a warning.
    """
    if backend not in (None, "torch", "triton"):
        raise ValueError(f"{op}: backend is {backend!r}, expected None, 'torch' or 'triton'")
    if backend is None:
        backend = os.environ.get("ADACACHE_BACKEND") or None
        if backend not in (None, "torch", "triton"):
            raise ValueError(f"{op}: ADACACHE_BACKEND is {backend!r}, expected 'torch' or 'triton'")
    if backend == "torch" or (backend is None and not tensor.is_cuda):
        return "torch"
    if not HAS_TRITON:
        missing = f"{op}: Triton 3.4 or newer is not installed"
        if backend == "triton":
            raise ValueError(f"{missing}; install it or pass backend='torch'")
        warnings.warn(f"{missing}: plain PyTorch runs on {tensor.device}, in several passes", stacklevel=3)
        return "torch"
    interpreted = type(kernel).__name__ == "InterpretedFunction"  # TRITON_INTERPRET=1 was set at import
    if not tensor.is_cuda and not (interpreted and tensor.device.type == "cpu"):
        raise ValueError(
            f"{op}: backend is 'triton' and the tensors are on {tensor.device}, "
            "expected a CUDA or ROCm device (or a CPU with TRITON_INTERPRET=1 set before the import)"
        )
    return "triton"
