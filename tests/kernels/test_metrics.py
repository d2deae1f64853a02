import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adacache_triton.kernels import distance, motion, relative_distance, residual_stats

from .kernel_views import (
    BACKEND,
    DEVICE,
    around,
    distant,
    dtypes,
    guarded,
    layouts,
    metrics,
    poisoned,
    repeatable,
    rounded,
    seeds,
    shapes,
)
from .kernel_views import values as normal

MODULE = sys.modules["adacache_triton.kernels.metrics"]
NAN, INF = math.nan, math.inf


def golden(new, old, metric="l1", per_sample=False):
    n, o = (tensor.double().reshape(len(tensor) if per_sample else 1, -1) for tensor in (new, old))
    if metric == "l1":
        d = (o - n).abs().mean(1) / o.abs().mean(1)
    elif metric == "l2":
        d = (o - n).norm(dim=1) / o.norm(dim=1)
    else:
        d = 1 - torch.cosine_similarity(o, n, dim=1, eps=0)
    return d if per_sample else d[0]


def check(d, new, old, metric="l1", per_sample=False):
    """Two sums of n terms: a rounding each, which together walk at random, and a few besides. A cosine is near 1."""
    bound = 2**-24 * (16 + 4 * math.sqrt(new.numel()))
    expected = golden(new, old, metric, per_sample)
    assert d.shape == (new.shape[:1] if per_sample else ()) and d.dtype == torch.float32
    torch.testing.assert_close(d.double(), expected, rtol=bound, atol=bound if metric == "cosine" else 0)


@repeatable
@given(shapes, layouts, layouts, dtypes, dtypes, metrics, st.booleans(), st.booleans(), seeds)
def test_distances_match_float64(shape, new_layout, old_layout, dtype, old_dtype, metric, per_sample, refresh, seed):
    new = guarded(normal(shape, seed), new_layout, dtype)
    old = guarded(normal(shape, seed + 1), old_layout, old_dtype)
    new_before, old_before, outside = new.clone(), old.clone(), around(old)
    options = dict(metric=metric, per_sample=per_sample, refresh=refresh, backend=BACKEND)
    with poisoned():
        d = relative_distance(new, old, **options)
        left = old.clone()
        again = relative_distance(new, old.copy_(old_before), **options)
    check(d, new_before, old_before, metric, per_sample)
    assert torch.equal(d, again)
    assert torch.equal(new, new_before)
    expected = new_before if refresh else old_before
    # To the nearest where a layout takes copies.
    assert torch.equal(left, rounded(expected, old_dtype)) or torch.equal(left, expected.to(old_dtype))
    assert torch.equal(around(old).isnan(), outside.isnan())


@pytest.mark.parametrize("shape", [(1,), (77,), (3, 5), (2, 512), (1, 1, 1), (2, 3, 1, 5, 7), (2, 1, 2, 3, 2, 4)])
@pytest.mark.parametrize("per_sample", [False, True])
def test_any_rank(shape, per_sample):
    new, old = normal(shape, 0), normal(shape, 1)
    check(relative_distance(new, old, per_sample=per_sample, backend=BACKEND), new, old, "l1", per_sample)


VIEWS = {
    "contiguous": lambda x: x,
    "token range": lambda x: x[:, 1:],
    "channel range": lambda x: x[..., 2:],
    "transposed": lambda x: x.transpose(1, 3),
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_are_not_copied(view):
    new, old = view(normal((2, 4, 3, 6), 0)), view(normal((2, 4, 3, 6), 1))
    frames = MODULE._frames(new, old)
    for tensor, made in zip((new, old), frames, strict=True):
        assert made.dim() == 4 and made.stride(3) == 1
        assert made.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        assert torch.equal(made.flatten(1).sort().values, tensor.flatten(1).sort().values)
    check(relative_distance(new, old, backend=BACKEND), new, old)


@pytest.mark.parametrize(
    "view", [lambda x: x[..., ::2], lambda x: x[:, ::2, 1:3, :2, :3], lambda x: x.mT], ids=range(3)
)
def test_other_views_are_copied_and_refreshed(view):
    new, old = normal((2, 4, 3, 6, 5), 0), view(normal((2, 4, 3, 6, 5), 1))
    new, before = view(new.contiguous()).contiguous(), old.clone()
    assert MODULE._frames(new, old) is None
    with poisoned():
        check(relative_distance(new, old, refresh=True, backend=BACKEND), new, before)
    assert torch.equal(old, new)


def test_a_long_axis_is_walked_as_frames():
    new, old = normal((2, 1024), 0), normal((2, 1024), 1)
    assert [view.shape for view in MODULE._frames(new, old)] == [(2, 16, 1, 64)] * 2
    check(relative_distance(new, old, per_sample=True, backend=BACKEND), new, old, "l1", True)
    check(relative_distance(new, old, refresh=True, backend=BACKEND), new, normal((2, 1024), 1))
    assert torch.equal(new, old)


@pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("place", ["new", "old"])
def test_what_is_not_finite_is_far(place, poison, metric):
    tensors = {"new": normal((2, 3, 4), 0), "old": normal((2, 3, 4), 1)}
    tensors[place][1, 2, 3] = poison
    d = relative_distance(**tensors, metric=metric, per_sample=True, backend=BACKEND)
    assert d[0].isfinite() and d[1] == INF
    assert relative_distance(**tensors, metric=metric, backend=BACKEND) == INF


@pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
def test_nothing_is_near_to_zero(metric):
    zero = torch.zeros(2, 3, device=DEVICE)
    assert relative_distance(zero, zero, metric=metric, backend=BACKEND) == INF
    assert relative_distance(zero + 1, zero, metric=metric, backend=BACKEND) == INF


@pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
def test_a_tensor_is_near_to_itself(metric):
    new = normal((2, 300), 0)
    assert 0 <= relative_distance(new, new.clone(), metric=metric, backend=BACKEND) < 1e-6


def test_offsets_beyond_int32():
    shape, strides = (2, 3, 8), (8, 2**30, 1)
    try:
        new, old = distant(shape, strides), distant(shape, strides)
    except RuntimeError as error:
        pytest.skip(f"cannot reserve 8 GiB of untouched memory: {error}")
    new.copy_(normal(shape, 0))
    old.copy_(normal(shape, 1))
    before = old.clone()
    check(relative_distance(new, old, refresh=True, backend=BACKEND), new, before)
    assert torch.equal(old, new)


@pytest.mark.parametrize(
    "metric, sums, expected",
    [
        ("l1", [1.0, 4.0], 0.25),
        ("l1", [0.0, 4.0], 0.0),
        ("l1", [0.0, 0.0], INF),
        ("l1", [1.0, 0.0], INF),
        ("l1", [1.0, INF], INF),  # the quotient alone would be 0
        ("l1", [INF, 1.0], INF),
        ("l1", [NAN, 1.0], INF),
        ("l1", [1.0, NAN], INF),
        ("l2", [1.0, 4.0], 0.5),
        ("l2", [1.0, INF], INF),
        ("cosine", [3.0, 9.0, 4.0], 0.5),
        ("cosine", [-6.0, 9.0, 4.0], 2.0),
        ("cosine", [1.0, 1.0, 1.0 - 2**-23], 0.0),  # below 0 but for rounding
        ("cosine", [1e38, 1e38, 1e38], 0.0),  # the norms' product is beyond float32
        ("cosine", [0.0, 0.0, 4.0], INF),
        ("cosine", [0.0, 4.0, 0.0], INF),
        ("cosine", [NAN, 4.0, 4.0], INF),
        ("cosine", [0.0, INF, 4.0], INF),
    ],
)
def test_distance_of_sums(metric, sums, expected):
    more = torch.tensor([sums + [1.0, 2.0], sums + [NAN, 0.0]], device=DEVICE)  # motion columns are not looked at
    d = distance(more, metric)
    assert d.shape == (2,) and d.dtype == torch.float32
    torch.testing.assert_close(d, torch.full_like(d, expected))
    assert (d >= 0).all()
    torch.testing.assert_close(distance(more[0].double(), metric), torch.tensor(expected, device=DEVICE).double())


@pytest.mark.parametrize(
    "columns, expected",
    [
        ([1.0, 4.0], 0.25),
        ([1.0, 4.0, 3.0, 4.0], 0.5),
        ([1.0, 4.0, 0.0, 0.0], 0.25),  # a stride without a pair of frames does not count
        ([0.0, 0.0], NAN),
        ([], NAN),
        ([1.0, INF, 1.0, 4.0], INF),
        ([NAN, 4.0, 1.0, 4.0], INF),
        ([NAN, NAN, 0.0, 0.0], INF),
    ],
)
@pytest.mark.parametrize("metric, first", [("l1", 2), ("l2", 2), ("cosine", 3)])
def test_motion_of_sums(metric, first, columns, expected):
    sums = torch.tensor([[NAN] * first + columns] * 2, device=DEVICE)  # distance columns are not looked at
    m = motion(sums, metric)
    torch.testing.assert_close(m, torch.full((2,), expected, device=DEVICE), equal_nan=True)


def test_sums_of_a_residual():
    new, old = normal((2, 4, 3, 8), 0), normal((2, 4, 3, 8), 1)
    scores = []
    for s in (1, 3):
        later, earlier = new[:, s:].double(), new[:, :-s].double()
        scores.append((later - earlier).abs().sum((1, 2, 3)) / (later.abs() + earlier.abs()).sum((1, 2, 3)))
    for metric in ("l1", "l2", "cosine"):
        sums = residual_stats(new, old, frame_strides=(1, 3, 4), metric=metric, backend=BACKEND)
        check(distance(sums, metric), new, old, metric, per_sample=True)
        torch.testing.assert_close(motion(sums, metric).double(), sum(scores) / 2, rtol=1e-5, atol=0)


X = torch.zeros(4, 6)
ERRORS = [
    (relative_distance, (1.0, X), {}, TypeError, "new is of type float, expected torch.Tensor"),
    (relative_distance, (X, None), {}, TypeError, "old is of type NoneType, expected torch.Tensor"),
    (
        relative_distance,
        (X, X.int()),
        {},
        TypeError,
        "old has dtype torch.int32, expected float32, bfloat16 or float16",
    ),
    (relative_distance, (X[:0], X), {}, ValueError, "new has shape (0, 6), expected at least one element"),
    (relative_distance, (X[0, 0], X), {}, ValueError, "new has shape (), expected at least one dimension"),
    (relative_distance, (X, X[0]), {}, ValueError, "new has shape (4, 6), old has (6,); they must be equal"),
    (relative_distance, (X, X.to("meta")), {}, ValueError, "new is on cpu, old is on meta; they must be equal"),
    (relative_distance, (X, X), {"metric": "l3"}, ValueError, "metric is 'l3', expected one of 'l1', 'l2', 'cosine'"),
    (
        relative_distance,
        (X, X),
        {"refresh": True},
        ValueError,
        "old is refreshed and overlaps new in memory, expected separate tensors",
    ),
    (
        relative_distance,
        (X, torch.zeros(6).expand(4, 6)),
        {"refresh": True},
        ValueError,
        "old has strides (0, 1) and is written, expected elements that do not overlap",
    ),
    (distance, ([1.0, 2.0],), {}, TypeError, "sums is of type list, expected torch.Tensor"),
    (distance, (X, "max"), {}, ValueError, "metric is 'max', expected one of 'l1', 'l2', 'cosine'"),
    (
        distance,
        (X[0, 0],),
        {},
        ValueError,
        "sums has shape (), expected 2 columns for metric 'l1' and two for each frame stride",
    ),
    (
        motion,
        (X, "cosine"),
        {},
        ValueError,
        "sums has shape (4, 6), expected 3 columns for metric 'cosine' and two for each frame stride",
    ),
    (
        motion,
        (X[:, :1],),
        {},
        ValueError,
        "sums has shape (4, 1), expected 2 columns for metric 'l1' and two for each frame stride",
    ),
]


@pytest.mark.parametrize("call, args, options, kind, message", ERRORS, ids=[error[-1][:40] for error in ERRORS])
def test_errors_say_what_was_expected_and_what_came(call, args, options, kind, message):
    with pytest.raises(kind) as caught:
        call(*args, **options)
    assert str(caught.value) == f"{call.__name__}: {message}"
