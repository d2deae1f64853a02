import sys
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adacache_triton.kernels import reference, reuse

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

MODULE = sys.modules["adacache_triton.kernels.reuse"]
launches = st.builds(MODULE.Launch, block=st.sampled_from([16, 32]), warps=st.just(4))


def golden(hidden, residual):
    """The sum, exact in float64 and rounded to float32, which the dtype of `hidden` may round once more."""
    return (hidden.double() + residual.double()).float()


@repeatable
@given(shapes, layouts, layouts, layouts, dtypes, dtypes, seeds, launches)
def test_sums_are_exact(shape, hidden_layout, residual_layout, out_layout, dtype, residual_dtype, seed, launch):
    hidden = guarded(normal(shape, seed), hidden_layout, dtype)
    residual = guarded(normal(shape, seed + 1), residual_layout, residual_dtype)
    out = guarded(torch.full(shape, torch.nan, device=DEVICE), out_layout, dtype)
    expected, outside = golden(hidden, residual), around(hidden)
    with poisoned(), patch.object(MODULE, "launch_for", return_value=launch):
        fresh = reuse(hidden, residual, backend=BACKEND)
        assert reuse(hidden, residual, out=out, backend=BACKEND) is out
        assert holds(fresh, expected) and fresh.dtype == dtype
        assert holds(out, expected)
        assert around(out).isnan().all()
        assert reuse(hidden, residual, out=hidden, backend=BACKEND) is hidden
    assert holds(hidden, expected)
    assert torch.equal(around(hidden).isnan(), outside.isnan())


@pytest.mark.parametrize("shape", [(1,), (777,), (3, 5), (1, 1, 1), (2, 3, 1, 5, 7)])
def test_any_rank(shape):
    hidden, residual = normal(shape, 0), normal(shape, 1)
    with poisoned():
        assert holds(reuse(hidden, residual, backend=BACKEND), golden(hidden, residual))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.permute(3, 1, 0, 2),  # no axis of stride 1 in front of the others: axes are sorted first
        lambda x: x[..., ::2],  # no axis of stride 1 at all
        lambda x: x[:, ::2, 1:3, :3],  # four axes
        lambda x: x[:1].expand(5, -1, -1, -1),
        lambda x: x[..., :1].expand(-1, -1, -1, 9),
    ],
)
def test_any_layout_of_the_residual(view):
    residual = view(normal((2, 4, 3, 6), 1))
    hidden = normal(residual.shape, 0)
    with poisoned():
        assert holds(reuse(hidden, residual, backend=BACKEND), golden(hidden, residual))


def test_permuted_alike_is_one_axis():
    views = [normal((2, 3, 4, 5), seed).permute(2, 0, 3, 1) for seed in range(3)]
    assert MODULE._collapse(*views) == [(120, (1, 1, 1))]
    ranges = [view[:, 1:3] for view in views[0].permute(1, 3, 0, 2).split(1)]
    assert MODULE._collapse(*ranges) == [(40, (1, 1))]


def test_long_rows_need_no_division():
    hidden, residual = normal((2, 150), 0)[:, :130], normal((2, 130), 1)
    with poisoned(), patch.object(MODULE, "launch_for", return_value=MODULE.Launch(16, 4)):
        assert holds(reuse(hidden, residual, backend=BACKEND), golden(hidden, residual))


def test_what_is_not_finite_stays():
    hidden = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, 65504.0], device=DEVICE).half()
    residual = torch.tensor([1.0, 1.0, torch.inf, torch.nan, 65504.0], device=DEVICE)
    expected = golden(hidden, residual).half()
    torch.testing.assert_close(reuse(hidden, residual, backend=BACKEND), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape, strides", [((3, 8), (2**30, 1)), ((3, 2, 8), (2**30, 16, 1))])
def test_offsets_beyond_int32(shape, strides):
    try:
        hidden, residual = distant(shape, strides), distant(shape, strides)
    except RuntimeError as error:
        pytest.skip(f"cannot reserve 8 GiB of untouched memory: {error}")
    hidden.copy_(normal(shape, 0))
    residual.copy_(normal(shape, 1))
    expected = golden(hidden, residual)
    assert holds(reuse(hidden, residual, out=hidden, backend=BACKEND), expected)


@pytest.mark.skipif(DEVICE != "cpu", reason="about CPU tensors")
def test_a_cpu_runs_the_reference():
    hidden, residual = normal((3, 5), 0), normal((3, 5), 1)
    assert torch.equal(reuse(hidden, residual), reference.reuse(hidden, residual))


X = torch.zeros(4, 6)
ERRORS = [
    ((1.0, X), {}, TypeError, "hidden is of type float, expected torch.Tensor"),
    ((X, X.int()), {}, TypeError, "residual has dtype torch.int32, expected float32, bfloat16 or float16"),
    ((X[:, :0], X), {}, ValueError, "hidden has shape (4, 0), expected at least one element"),
    ((X[0, 0], X[0, 0]), {}, ValueError, "hidden has shape (), expected at least one dimension"),
    ((X, X[0]), {}, ValueError, "hidden has shape (4, 6), residual has (6,); they must be equal"),
    ((X, X.to("meta")), {}, ValueError, "hidden is on cpu, residual is on meta; they must be equal"),
    (
        (X, X.clone().requires_grad_()),
        {},
        ValueError,
        "residual requires grad and has no backward here, expected torch.no_grad()",
    ),
    (
        (X, X),
        {"out": torch.zeros(6)},
        ValueError,
        "out has shape (6,), hidden has (4, 6); they must be equal",
    ),
    ((X, X), {"out": X.to("meta")}, ValueError, "out is on meta, hidden is on cpu; they must be equal"),
    (
        (X, X),
        {"out": X.half()},
        TypeError,
        "out has dtype torch.float16, hidden has torch.float32; they must be equal",
    ),
    (
        (X, X),
        {"out": torch.zeros(6).expand(4, 6)},
        ValueError,
        "out has strides (0, 1) and is written, expected elements that do not overlap",
    ),
    (
        (X[:3], X.clone()[:3]),
        {"out": X[1:]},
        ValueError,
        "out overlaps hidden in memory, expected hidden itself or apart from it",
    ),
    (
        (X.clone()[:3], X[:3]),
        {"out": X[1:]},
        ValueError,
        "out overlaps residual in memory, expected residual itself or apart from it",
    ),
    ((X, X), {"backend": "gpu"}, ValueError, "backend is 'gpu', expected None, 'torch' or 'triton'"),
]


@pytest.mark.parametrize("args, options, kind, message", ERRORS, ids=[error[-1][:40] for error in ERRORS])
def test_errors_say_what_was_expected_and_what_came(args, options, kind, message):
    with pytest.raises(kind) as caught:
        reuse(*args, **options)
    assert str(caught.value) == f"reuse: {message}"
