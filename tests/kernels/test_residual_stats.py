import math
import sys
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adacache_triton.kernels import METRICS, as_frames, reference, residual_stats

from .kernel_views import (
    BACKEND,
    DEVICE,
    around,
    check_sums,
    distant,
    dtypes,
    guarded,
    holds,
    layouts,
    metrics,
    poisoned,
    repeatable,
    seeds,
    shapes,
    strides,
)
from .kernel_views import values as normal

MODULE = sys.modules["adacache_triton.kernels.residual_stats"]
# Small blocks, so that small inputs are cut into several tiles and spans.
launches = st.builds(MODULE.Launch, block=st.sampled_from([16, 32]), span=st.integers(1, 5), warps=st.just(4))


@repeatable
@given(shapes, strides, metrics, layouts, layouts, dtypes, dtypes, st.booleans(), seeds, launches)
def test_sums_match_float64(shape, frame_strides, metric, new_layout, old_layout, dtype, old_dtype, keep, seed, launch):
    new = guarded(normal(shape, seed), new_layout, dtype)
    old = guarded(normal(shape, seed + 1), old_layout, old_dtype) if keep else None
    options = dict(frame_strides=frame_strides, metric=metric, backend=BACKEND)
    with poisoned(), patch.object(MODULE, "launch_for", return_value=launch):
        sums = residual_stats(new, old, **options)
        again = residual_stats(new, old, **options)
    check_sums(sums, new, old, frame_strides, metric)
    assert torch.equal(sums, again)


@repeatable
@given(shapes, strides, metrics, layouts, layouts, dtypes, dtypes, seeds, launches)
def test_refresh_overwrites_old_and_nothing_else(
    shape, frame_strides, metric, new_layout, old_layout, dtype, old_dtype, seed, launch
):
    new = guarded(normal(shape, seed), new_layout, dtype)
    old = guarded(normal(shape, seed + 1), old_layout, old_dtype)
    new_before, old_before, outside = new.clone(), old.clone(), around(old)
    options = dict(frame_strides=frame_strides, metric=metric, refresh=True, backend=BACKEND)
    with poisoned(), patch.object(MODULE, "launch_for", return_value=launch):
        sums = residual_stats(new, old, **options)
    check_sums(sums, new_before, old_before, frame_strides, metric)
    assert torch.equal(new, new_before)
    assert holds(old, new_before)
    assert torch.equal(around(old).isnan(), outside.isnan())


@repeatable
@given(shapes, st.integers(0, 3), st.integers(0, 3), metrics, dtypes, dtypes, seeds, launches)
def test_token_ranges(shape, text_before, text_behind, metric, dtype, old_dtype, seed, launch):
    """Tokens of the video in a sequence that text surrounds: what stands around them reaches no sum."""
    batch, frames, tokens, channels = shape
    stop = text_before + frames * tokens
    sequences = torch.full((2, batch, stop + text_behind, channels), torch.nan, device=DEVICE)
    sequences[:, :, text_before:stop] = normal((2, batch, frames * tokens, channels), seed)
    new, old = (
        as_frames(sequence.to(kind), frames, start=text_before, stop=stop)
        for sequence, kind in zip(sequences, (dtype, old_dtype), strict=True)
    )
    with poisoned(), patch.object(MODULE, "launch_for", return_value=launch):
        sums = residual_stats(new, old, frame_strides=(1,), metric=metric, backend=BACKEND)
    assert new.shape == shape and sums.isfinite().all()
    check_sums(sums, new, old, (1,), metric)


def test_frames_are_a_view():
    sequence = normal((2, 3 + 4 * 5 + 1, 6), 0)
    frames = as_frames(sequence, 4, start=3, stop=23)
    assert frames._is_view() and frames._base is sequence
    assert torch.equal(frames, sequence[:, 3:23].reshape(2, 4, 5, 6))
    assert torch.equal(as_frames(sequence, 8), sequence.reshape(2, 8, 3, 6))
    assert torch.equal(as_frames(sequence, 7, start=3 + 3 * 5 - 1), sequence[:, 17:].reshape(2, 7, 1, 6))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["new", "old"])
@pytest.mark.parametrize("frame", [0, 1, 3])
def test_what_is_not_finite_reaches_the_sums(poison, place, frame):
    shape = (2, 4, 3, 5)
    tensors = {"new": normal(shape, 0), "old": normal(shape, 1)}
    tensors[place][1, frame, 2, 4] = poison
    for metric in METRICS:
        sums = residual_stats(**tensors, frame_strides=(1, 2, 3), metric=metric, backend=BACKEND)
        check_sums(sums, **tensors, frame_strides=(1, 2, 3), metric=metric)
        assert sums[0].isfinite().all() and not sums[1, 0].isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("metric", METRICS)
def test_own_launches(metric, dtype):
    """The ladder's own launch, at more than one tile."""
    new, old = guarded(normal((2, 3, 40, 48), 0), "spatial_major", dtype), guarded(normal((2, 3, 40, 48), 1))
    before = old.clone()
    with poisoned():
        sums = residual_stats(new, old, frame_strides=(1,), metric=metric, refresh=True, backend=BACKEND)
    check_sums(sums, new, before, (1,), metric)
    assert torch.equal(old, new.float())


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
    check_sums(sums, new, old_before, (1, 2))
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
        check_sums(residual_stats(new, old, backend=BACKEND), new, old)


@pytest.mark.parametrize(
    "batch, frames, plane, narrow, wide",
    [
        (2, 15, 3600 * 1152, 2, 2),
        (2, 16, 256 * 1152, 2, 4),
        (1, 16, 64, 4, 4),
        (1, 1, 2**26, 2, 2),
        (3, 7, 1000, 2, 4),
    ],
)
@pytest.mark.parametrize("columns", [2, 4, 5, 9])
def test_launches_cover_the_tensor_and_fill_a_chip(batch, frames, plane, narrow, wide, columns):
    launch = MODULE.launch_for(batch, frames, plane, narrow, wide, columns)
    tiles, spans = -(-plane // launch.block), -(-frames // launch.span)
    accesses = launch.block / MODULE.THREADS * wide / 16, launch.block / MODULE.THREADS * narrow / 16
    assert accesses in [(1, 1), (2, 1), (2, 2)]  # of 128 bits, a thread
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
    ((X, X), {"metric": "L1"}, ValueError, "metric is 'L1', expected one of 'l1', 'l2', 'cosine'"),
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


SEQUENCE = torch.zeros(2, 12, 5)
AS_FRAMES_ERRORS = [
    (([1.0], 3), {}, TypeError, "sequence is of type list, expected torch.Tensor"),
    ((X, 3), {}, ValueError, "sequence has shape (2, 3, 4, 5), expected three dimensions [B, L, C]"),
    ((SEQUENCE, 3), {"start": -1}, ValueError, "start is -1 and stop is 12, expected 0 <= start < stop <= 12"),
    ((SEQUENCE, 3), {"stop": 13}, ValueError, "start is 0 and stop is 13, expected 0 <= start < stop <= 12"),
    ((SEQUENCE, 3), {"start": 6, "stop": 6}, ValueError, "start is 6 and stop is 6, expected 0 <= start < stop <= 12"),
    (
        (SEQUENCE, 3),
        {"start": 2},
        ValueError,
        "frames is 3, expected 1 or more that divide the 10 tokens from 2 to 12",
    ),
    ((SEQUENCE, 0), {}, ValueError, "frames is 0, expected 1 or more that divide the 12 tokens from 0 to 12"),
]


@pytest.mark.parametrize("args, options, kind, message", AS_FRAMES_ERRORS, ids=[e[-1][:40] for e in AS_FRAMES_ERRORS])
def test_ranges_that_are_no_frames(args, options, kind, message):
    with pytest.raises(kind) as caught:
        as_frames(*args, **options)
    assert str(caught.value) == f"as_frames: {message}"
