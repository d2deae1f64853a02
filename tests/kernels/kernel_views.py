"""What the kernel tests share: the backend under test, and views of many layouts in storage that is else NaN.

The same tests judge every backend. Plain `pytest` tests PyTorch on a CPU, and Triton where there is a GPU;
`test_interpreter.py` runs them again with TRITON_INTERPRET=1, which puts Triton's kernels on the CPU.
"""

import math
import os
from contextlib import contextmanager
from functools import cache

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st

from adacache_triton.kernels import METRICS, reuse

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
BACKEND = "triton" if INTERPRETED or DEVICE == "cuda" else "torch"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("frame_major", "spatial_major", "frame_range", "token_range", "channel_range")
GUARD = 11  # odd, so that views are not aligned either


if INTERPRETED:
    # Triton patches its language anew at each call of a device function, which takes longer than the function.
    import triton.language as tl
    from triton.runtime import interpreter

    @cache
    def languages(function):
        return [module for module in (tl, tl.core) if any(value is module for value in function.__globals__.values())]

    def patch_once(function, patch=interpreter._patch_lang):
        if any(tl.core.is_builtin(language.load) for language in languages(function)):
            return patch(function)

    interpreter._patch_lang = patch_once

# The first failure as it comes: shrinking it takes minutes in the interpreter.
repeatable = settings(
    max_examples=30, derandomize=True, deadline=None, database=None, phases=[Phase.explicit, Phase.generate]
)
# Batch, frames, tokens, channels: ones, odd numbers, and more elements than the smallest block.
shapes = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.sampled_from((1, 2, 5, 8, 16)))
dtypes = st.sampled_from(DTYPES)
layouts = st.sampled_from(LAYOUTS)
metrics = st.sampled_from(tuple(METRICS))
strides = st.sampled_from([(), (1,), (2,), (1, 2), (3, 1), (1, 5), (7,)])
seeds = st.integers(0, 2**16)


def values(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE)


def guarded(values, layout="frame_major", dtype=torch.float32):
    """The values as a [B, T, S, C] view of the given layout; every other element of its storage is NaN."""
    b, t, s, c = values.shape
    held = {
        "frame_major": (b, t, s, c),
        "spatial_major": (b, s, t, c),
        "frame_range": (b, t + 2, s, c),
        "token_range": (b, t * s + 5, c),
        "channel_range": (b, t, s, c + 3),
    }[layout]
    count = torch.Size(held).numel()
    storage = torch.full((count + 2 * GUARD,), float("nan"), dtype=dtype, device=values.device)
    view = storage[GUARD : GUARD + count].view(held)
    if layout == "spatial_major":
        view = view.transpose(1, 2)
    elif layout == "frame_range":
        view = view[:, 1 : 1 + t]
    elif layout == "token_range":
        view = view[:, 3 : 3 + t * s].unflatten(1, (t, s))
    elif layout == "channel_range":
        view = view[..., 2 : 2 + c]
    return view.copy_(values)


def around(view):
    """A copy of the storage behind a view, with NaN where the view is: what a write must leave alone."""
    storage = torch.empty(0, dtype=view.dtype, device=view.device).set_(view.untyped_storage()).clone()
    storage.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(float("nan"))
    return storage


def rounded(values, dtype):
    """float32 values in a dtype, rounded as the backend under test does: to the nearest, unless it cuts bfloat16."""
    values = values.float()
    if dtype == torch.bfloat16 and cuts_bfloat16():
        values = values.view(torch.int32).bitwise_and(-(2**16)).view(torch.float32)
    return values.to(dtype)


@cache
def cuts_bfloat16():
    """Triton's interpreter (3.9) does; compilers and PyTorch round to the nearest."""
    one, more = torch.ones(1, dtype=torch.bfloat16), torch.full((1,), 3 * 2.0**-9)
    return INTERPRETED and reuse(one, more, backend=BACKEND).item() == 1


def holds(stored, values):
    """Whether a tensor holds float32 values, exactly, rounded once to its dtype."""
    return torch.equal(stored, rounded(values, stored.dtype))


def check_sums(sums, new, old=None, frame_strides=(), metric="l1"):
    """The sums of `residual_stats` against float64.

    Of n terms: a rounding each, which together walk at random, and three within a term. Errors are relative to
    the sum of magnitudes, which of all but the dot product is the sum itself.
    """
    n = new.double()
    columns = [torch.zeros_like(n)] * METRICS[metric]
    if old is not None:
        o = old.double()
        columns = {"l1": [o - n, o], "l2": [(o - n) ** 2, o**2], "cosine": [o * n, o**2, n**2]}[metric]
        columns = [column.abs() for column in columns] if metric == "l1" else columns
    for s in frame_strides:
        later, earlier = n[:, s:], n[:, : max(n.shape[1] - s, 0)]
        columns += [(later - earlier).abs(), later.abs() + earlier.abs()]
    expected = torch.stack([column.sum((1, 2, 3)) for column in columns], 1)
    magnitude = torch.stack([column.abs().sum((1, 2, 3)) for column in columns], 1)
    assert sums.shape == expected.shape and sums.dtype == torch.float32
    atol = 2**-24 * (3 + 2 * math.sqrt(new[0].numel())) * magnitude
    equal = (sums == expected) | (sums.isnan() & expected.isnan())
    assert (equal | ((sums - expected).abs() <= atol)).all(), f"{sums}\n{expected}"


@contextmanager
def poisoned():
    """Fresh memory is NaN, so that an output nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def distant(shape, strides, dtype=torch.float16):
    """A view that reaches beyond 2**31 elements, in memory of which only the view's pages are touched."""
    reach = sum(stride * (size - 1) for stride, size in zip(strides, shape, strict=True))
    assert reach >= 2**31 > max(strides)  # products overflow, not the strides themselves
    return torch.empty(reach + 1, dtype=dtype, device=DEVICE).as_strided(shape, strides)
