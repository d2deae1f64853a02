import math
import sys
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adacache_triton.kernels import reference, residual_stats

from .kernel_views import (
    BACKEND,
    DEVICE,
    around,
    distant,
    dtypes,
    guarded,
    holds,
    layouts,
    poisoned,
    repeatable,
    seeds,
    shapes,
)
from .kernel_views import values as normal

MODULE = sys.modules["adacache_triton.kernels.residual_stats"]
strides = st.sampled_from([(), (1,), (2,), (1, 2), (3, 1), (1, 5), (7,)])
# Small blocks, so that small inputs are cut into several tiles and spans.
launches = st.builds(MODULE.Launch, block=st.sampled_from([16, 32]), span=st.integers(1, 5), warps=st.just(4))


def golden(new, old=None, frame_strides=()):
    n = new.double()
    o = torch.zeros_like(n) if old is None else old.double()
    columns = [(o - n).abs() if old is not None else o, o.abs()]
    for s in frame_strides:
        later, earlier = n[:, s:], n[:, : max(n.shape[1] - s, 0)]
        columns += [(later - earlier).abs(), later.abs() + earlier.abs()]
    return torch.stack([column.sum((1, 2, 3)) for column in columns], 1)


def check(sums, new, old, frame_strides):
    """Sums of n positive terms: a rounding each, which together walk at random, and two within a term."""
    rtol = 2**-24 * (2 + 2 * math.sqrt(new[0].numel()))
    expected = golden(new, old, frame_strides)
    assert sums.shape == (new.shape[0], 2 + 2 * len(frame_strides)) and sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), expected, rtol=rtol, atol=0, equal_nan=True)


@repeatable
@given(shapes, strides, layouts, layouts, dtypes, dtypes, st.booleans(), seeds, launches)
def test_sums_match_float64(shape, frame_strides, new_layout, old_layout, dtype, old_dtype, keep, seed, launch):
    new = guarded(normal(shape, seed), new_layout, dtype)
    old = guarded(normal(shape, seed + 1), old_layout, old_dtype) if keep else None
    with poisoned(), patch.object(MODULE, "launch_for", return_value=launch):
        sums = residual_stats(new, old, frame_strides=frame_strides, backend=BACKEND)
        again = residual_stats(new, old, frame_strides=frame_strides, backend=BACKEND)
    check(sums, new, old, frame_strides)
    assert torch.equal(sums, again)


@repeatable
@given(shapes, strides, layouts, layouts, dtypes, dtypes, seeds, launches)
def test_refresh_overwrites_old_and_nothing_else(
    shape, frame_strides, new_layout, old_layout, dtype, old_dtype, seed, launch
):
    new = guarded(normal(shape, seed), new_layout, dtype)
    old = guarded(normal(shape, seed + 1), old_layout, old_dtype)
    new_before, old_before, outside = new.clone(), old.clone(), around(old)
    with poisoned(), patch.object(MODULE, "launch_for", return_value=launch):
        sums = residual_stats(new, old, frame_strides=frame_strides, refresh=True, backend=BACKEND)
    check(sums, new_before, old_before, frame_strides)
    assert torch.equal(new, new_before)
    assert holds(old, new_before)
    assert torch.equal(around(old).isnan(), outside.isnan())


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["new", "old"])
@pytest.mark.parametrize("frame", [0, 1, 3])
def test_what_is_not_finite_reaches_the_sums(poison, place, frame):
    shape = (2, 4, 3, 5)
    tensors = {"new": normal(shape, 0), "old": normal(shape, 1)}
    tensors[place][1, frame, 2, 4] = poison
    sums = residual_stats(tensors["new"], tensors["old"], frame_strides=(1, 2, 3), backend=BACKEND)
    check(sums, tensors["new"], tensors["old"], (1, 2, 3))
    assert sums[0].isfinite().all() and not sums[1, 0].isfinite()


def test_own_launches():
    """The ladder's own launch, at more than one tile."""
    new, old = guarded(normal((2, 3, 40, 48), 0), "spatial_major"), guarded(normal((2, 3, 40, 48), 1))
    with poisoned():
        check(residual_stats(new, old, frame_strides=(1,), backend=BACKEND), new, old, (1,))


@pytest.mark.parametrize("axis", ["batch", "frame", "token"])
def test_offsets_beyond_int32(axis):
    shape, far = {"batch": (3, 1, 2, 8), "frame": (1, 3, 2, 8), "token": (1, 2, 3, 8)}[axis], 2**30
    inner = {"batch": (far, 16, 8, 1), "frame": (far, far, 8, 1), "token": (far, 8, far, 1)}[axis]
    try:
        new, old = distant(shape, inner), distant(shape, inner)
    except RuntimeError as error:
        pytest.skip(f"cannot reserve 8 GiB of untouched memory: {error}")
    new.copy_(normal(shape, 0))
    old.copy_(normal(shape, 1))
    old_before = old.clone()
    sums = residual_stats(new, old, frame_strides=(1, 2), refresh=True, backend=BACKEND)
    check(sums, new, old_before, (1, 2))
    assert torch.equal(new, old)


@pytest.mark.skipif(DEVICE != "cpu", reason="about CPU tensors")
def test_a_cpu_runs_the_reference():
    new, old = normal((2, 3, 4, 5), 0), normal((2, 3, 4, 5), 1)
    expected = reference.residual_stats(new, old, frame_strides=(1, 2))
    assert torch.equal(residual_stats(new, old, frame_strides=[1, 2]), expected)
    assert torch.equal(residual_stats(new, old, frame_strides=(1, 2), backend="torch"), expected)


def test_old_may_require_grad_without_grad_mode():
    new, old = normal((1, 2, 3, 4), 0), normal((1, 2, 3, 4), 1).requires_grad_()
    with torch.no_grad():
        check(residual_stats(new, old, backend=BACKEND), new, old, ())


@pytest.mark.parametrize(
    "batch, frames, plane, itemsize",
    [(2, 15, 3600 * 1152, 2), (2, 16, 256 * 1152, 2), (1, 16, 64, 4), (1, 1, 2**26, 2), (3, 7, 1000, 4)],
)
def test_launches_cover_the_tensor_and_fill_a_chip(batch, frames, plane, itemsize):
    launch = MODULE.launch_for(batch, frames, plane, itemsize)
    tiles, spans = -(-plane // launch.block), -(-frames // launch.span)
    assert launch.block in (4096 // itemsize, 2048 // itemsize)
    assert 1 <= launch.span <= frames
    assert launch.span == 1 or batch * tiles * spans >= MODULE.FILL / 2  # spans are whole frames, so not quite FILL
    assert launch.span == frames or batch * tiles < MODULE.FILL  # no cut where tiles alone fill the chip


X = torch.zeros(2, 3, 4, 5)
ERRORS = [
    (([1.0],), {}, TypeError, "new is of type list, expected torch.Tensor"),
    ((X.long(),), {}, TypeError, "new has dtype torch.int64, expected float32, bfloat16 or float16"),
    ((X, X.double()), {}, TypeError, "old has dtype torch.float64, expected float32, bfloat16 or float16"),
    ((X[:0],), {}, ValueError, "new has shape (0, 3, 4, 5), expected at least one element"),
    ((X[0],), {}, ValueError, "new has shape (3, 4, 5), expected four dimensions [B, T, S, C]"),
    ((X, X[:, 1:]), {}, ValueError, "new has shape (2, 3, 4, 5), old has (2, 2, 4, 5); they must be equal"),
    ((X, X.to("meta")), {}, ValueError, "new is on cpu, old is on meta; they must be equal"),
    (
        (X, X.transpose(2, 3).contiguous().transpose(2, 3)),
        {},
        ValueError,
        "old has strides (60, 20, 1, 4), expected 1 for the last (channels)",
    ),
    (
        (X.clone().requires_grad_(),),
        {},
        ValueError,
        "new requires grad and has no backward here, expected torch.no_grad()",
    ),
    ((X,), {"frame_strides": 1}, TypeError, "frame_strides is 1, expected a sequence of int"),
    ((X,), {"frame_strides": (1.0,)}, TypeError, "frame_strides holds 1.0, expected int"),
    ((X,), {"frame_strides": (True,)}, TypeError, "frame_strides holds True, expected int"),
    ((X,), {"frame_strides": (1, 0)}, ValueError, "frame_strides holds 0, expected 1 or more"),
    ((X,), {"refresh": True}, ValueError, "refresh is True and old is None, expected a tensor to overwrite"),
    (
        (X, X[:, :1].expand(-1, 3, -1, -1)),
        {"refresh": True},
        ValueError,
        "old has strides (60, 0, 5, 1) and is written, expected elements that do not overlap",
    ),
    (
        (X, X.as_strided((2, 3, 4, 5), (60, 19, 5, 1))),
        {"refresh": True},
        ValueError,
        "old has strides (60, 19, 5, 1) and is written, expected elements that do not overlap",
    ),
    (
        (X, X),
        {"refresh": True},
        ValueError,
        "old is refreshed and overlaps new in memory, expected separate tensors",
    ),
    ((X,), {"backend": "cuda"}, ValueError, "backend is 'cuda', expected None, 'torch' or 'triton'"),
]


@pytest.mark.parametrize("args, options, kind, message", ERRORS, ids=[error[-1][:40] for error in ERRORS])
def test_errors_say_what_was_expected_and_what_came(args, options, kind, message):
    with pytest.raises(kind) as caught:
        residual_stats(*args, **options)
    assert str(caught.value) == f"residual_stats: {message}"
