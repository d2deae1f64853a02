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
    layouts,
    poisoned,
    repeatable,
    rounded,
    seeds,
    shapes,
)
from .kernel_views import values as normal

MODULE = sys.modules["adacache_triton.kernels.reuse"]
launches = st.builds(MODULE.Launch, block=st.sampled_from([16, 32]), warps=st.just(4))
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-7, torch.float16: 2**-11}  # bfloat16 may be cut off


def holds(stored, values):
    """Exactly, rounded once: as the backend rounds, or to the nearest where a layout is left to PyTorch."""
    return torch.equal(stored, rounded(values, stored.dtype)) or torch.equal(stored, values.to(stored.dtype))


def golden(hidden, residual):
    """The sum, exact in float64 and rounded to float32, which the dtype of `hidden` may round once more."""
    return (hidden.double() + residual.double()).float()


def scales(hidden, weights):
    """Weights [n] or [B, n] as n tensors that broadcast to the hidden state, in float64."""
    return weights.double().view(-1, *(1,) * (hidden.dim() - 1), weights.shape[-1]).unbind(-1)


def check(out, hidden, residuals, weights):
    """A rounding for each product and sum, in float32, and one to the dtype of `hidden`."""
    terms = [w * r.double() for w, r in zip(scales(hidden, weights), residuals, strict=True)]
    exact = hidden.double() + sum(terms)
    size = hidden.double().abs() + sum(term.abs() for term in terms)
    bound = 2**-24 * (1 + 2 * len(terms)) * size + ROUNDING[hidden.dtype] * exact.abs() + 2**-25
    assert out.dtype == hidden.dtype and out.shape == hidden.shape
    assert ((out.double() - exact).abs() <= bound).all()


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


@st.composite
def weighted(draw):
    """A hidden state, 1 to 3 residuals and their weights: views of many layouts, in storage that is else NaN."""
    shape, seed, count = draw(shapes), draw(seeds), draw(st.integers(1, 3))
    hidden = guarded(normal(shape, seed), draw(layouts), draw(dtypes))
    residuals = [guarded(normal(shape, seed + 1 + i), draw(layouts), draw(dtypes)) for i in range(count)]
    held = torch.full((shape[0], 2 * count + 3), torch.nan, device=DEVICE)
    weights = held[:, 1 : 1 + count] if draw(st.booleans()) else held[:, 2:-1:2]
    weights.copy_(normal(weights.shape, seed + 4))
    return hidden, residuals, weights if draw(st.booleans()) else weights[-1]


@repeatable
@given(weighted(), layouts, launches)
def test_weighted_sums_match_float64(case, out_layout, launch):
    hidden, residuals, weights = case
    out = guarded(torch.full(hidden.shape, torch.nan, device=DEVICE), out_layout, hidden.dtype)
    before, outside = hidden.clone(), around(hidden)
    with poisoned(), patch.object(MODULE, "launch_for", return_value=launch):
        fresh = reuse(hidden, residuals, weights, backend=BACKEND)
        assert reuse(hidden, residuals, weights, out=out, backend=BACKEND) is out
        assert reuse(hidden, residuals, weights, out=hidden, backend=BACKEND) is hidden
    for made in (fresh, out, hidden):
        check(made, before, residuals, weights)
    assert around(out).isnan().all()
    assert torch.equal(around(hidden).isnan(), outside.isnan())


def test_each_weight_belongs_to_its_residual_and_sample():
    hidden = torch.zeros(2, 3, 8, device=DEVICE)
    residuals = [torch.full_like(hidden, 10.0**i) for i in range(3)]
    weights = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], device=DEVICE)
    out = reuse(hidden, residuals, weights, backend=BACKEND)
    assert out[0].eq(321).all() and out[1].eq(654).all()


def test_a_residual_may_be_overwritten():
    hidden, residuals, weights = normal((2, 3, 8), 0), [normal((2, 3, 8), 1), normal((2, 3, 8), 2)], normal((2, 2), 3)
    expected = reuse(hidden, residuals, weights, backend=BACKEND)
    assert torch.equal(reuse(hidden, residuals, weights, out=residuals[1], backend=BACKEND), expected)


def test_a_weight_of_one_changes_nothing():
    hidden, residual = normal((2, 3, 8), 0).bfloat16(), normal((2, 3, 8), 1).bfloat16()
    weights = torch.ones(1, device=DEVICE)
    weighted = reuse(hidden, [residual], weights, backend=BACKEND)
    assert torch.equal(weighted, reuse(hidden, (residual,), backend=BACKEND))


@pytest.mark.parametrize("shape", [(1,), (77,), (3, 5), (1, 1, 1), (2, 3, 1, 5, 7)])
def test_any_rank(shape):
    hidden, residual = normal(shape, 0), normal(shape, 1)
    weights = normal((shape[0], 1), 2)
    with poisoned():
        assert holds(reuse(hidden, residual, backend=BACKEND), golden(hidden, residual))
        check(reuse(hidden, residual, weights, backend=BACKEND), hidden, [residual], weights)


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
    weights = normal((hidden.shape[0], 1), 2)
    with poisoned():
        assert holds(reuse(hidden, residual, backend=BACKEND), golden(hidden, residual))
        check(reuse(hidden, residual, weights, backend=BACKEND), hidden, [residual], weights)


def test_permuted_alike_is_one_axis():
    views = [normal((2, 3, 4, 5), seed).permute(2, 0, 3, 1) for seed in range(3)]
    assert MODULE.collapse(views[0].shape, *(view.stride() for view in views)) == [(120, (1, 1, 1))]
    ranges = [view[:, 1:3] for view in views[0].permute(1, 3, 0, 2).split(1)]
    assert MODULE.collapse(ranges[0].shape, *(view.stride() for view in ranges)) == [(40, (1, 1))]


def test_samples_are_the_outer_axis():
    still = (1, (0, 0))
    views = [normal((4, 3, 8), 0), normal((4, 3, 8), 1)]
    assert MODULE.three_axes(views, samples=False) == ((96, (1, 1)), still, still)
    assert MODULE.three_axes(views, samples=True) == ((24, (1, 1)), still, (4, (24, 24)))
    views[1] = normal((4, 3, 9), 1)[..., 1:]
    assert MODULE.three_axes(views, samples=True) == ((8, (1, 1)), (3, (8, 9)), (4, (24, 27)))
    assert MODULE.three_axes([view[:, :, ::2] for view in views], samples=True) is None
    odd = normal((1, 27), 0)[:, :24].unflatten(1, (3, 8))  # a stride that is not used must not spoil alignment
    assert MODULE.three_axes([odd, odd], samples=True) == ((24, (1, 1)), still, still)


def test_long_rows_need_no_division():
    hidden, residual = normal((2, 150), 0)[:, :130], normal((2, 130), 1)
    with poisoned(), patch.object(MODULE, "launch_for", return_value=MODULE.Launch(16, 4)):
        assert holds(reuse(hidden, residual, backend=BACKEND), golden(hidden, residual))


def test_what_is_not_finite_stays():
    hidden = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, 65504.0], device=DEVICE).half()
    residual = torch.tensor([1.0, 1.0, torch.inf, torch.nan, 65504.0], device=DEVICE)
    expected = golden(hidden, residual).half()
    torch.testing.assert_close(reuse(hidden, residual, backend=BACKEND), expected, rtol=0, atol=0, equal_nan=True)


def test_weights_mend_nothing():
    hidden, residuals = normal((3, 2, 8), 0), [normal((3, 2, 8), 1), normal((3, 2, 8), 2)]
    residuals[1][0] = torch.inf
    weights = torch.tensor([[1.0, 0.0], [1.0, torch.nan], [1.0, 0.0]], device=DEVICE)
    out = reuse(hidden, residuals, weights, backend=BACKEND)
    assert out[:2].isnan().all() and out[2].isfinite().all()


@pytest.mark.parametrize(
    "shape, strides", [((3, 8), (2**30, 1)), ((3, 2, 8), (2**30, 16, 1)), ((2, 3, 8), (8, 2**30, 1))]
)
def test_offsets_beyond_int32(shape, strides):
    try:
        hidden, residual = distant(shape, strides), distant(shape, strides)
    except RuntimeError as error:
        pytest.skip(f"cannot reserve 8 GiB of untouched memory: {error}")
    hidden.copy_(normal(shape, 0))
    residual.copy_(normal(shape, 1))
    before, weights = hidden.clone(), normal((shape[0], 2), 2)
    check(reuse(hidden, (residual, residual), weights, backend=BACKEND), before, (residual, residual), weights)
    assert holds(reuse(hidden, residual, out=hidden, backend=BACKEND), golden(before, residual))


@pytest.mark.skipif(DEVICE != "cpu", reason="about CPU tensors")
def test_a_cpu_runs_the_reference():
    hidden, residual, weights = normal((3, 5), 0), normal((3, 5), 1), normal((3, 1), 2)
    assert torch.equal(reuse(hidden, residual), reference.reuse(hidden, [residual]))
    assert torch.equal(reuse(hidden, residual, weights), reference.reuse(hidden, [residual], weights))


@pytest.mark.parametrize("narrow, wide", [(2, 2), (4, 4), (2, 4)])
@pytest.mark.parametrize("elements", [1, 2**20, 2**31])
def test_launches_access_whole_vectors(narrow, wide, elements):
    launch = MODULE.launch_for(elements, narrow, wide)
    vector = MODULE.THREADS * 16 // narrow  # 128 bits a thread of the narrowest dtype
    assert launch.block in (vector, 2 * vector)
    assert launch.block == vector or (narrow == wide and elements >= MODULE.FILL * launch.block - launch.block)


X = torch.zeros(4, 6)
W = torch.zeros(4, 2)
ERRORS = [
    ((1.0, X), {}, TypeError, "hidden is of type float, expected torch.Tensor"),
    ((X, 1.0), {}, TypeError, "residuals is of type float, expected torch.Tensor or a sequence of them"),
    ((X, [X, 1.0], W), {}, TypeError, "residuals[1] is of type float, expected torch.Tensor"),
    ((X, []), {}, ValueError, "residuals holds 0, expected 1 to 3 tensors"),
    ((X, [X] * 4), {}, ValueError, "residuals holds 4, expected 1 to 3 tensors"),
    ((X, X.int()), {}, TypeError, "residuals[0] has dtype torch.int32, expected float32, bfloat16 or float16"),
    ((X[:, :0], X), {}, ValueError, "hidden has shape (4, 0), expected at least one element"),
    ((X[0, 0], X[0, 0]), {}, ValueError, "hidden has shape (), expected at least one dimension"),
    ((X, X[0]), {}, ValueError, "residuals[0] has shape (6,), hidden has (4, 6); they must be equal"),
    ((X, X.to("meta")), {}, ValueError, "residuals[0] is on meta, hidden is on cpu; they must be equal"),
    (
        (X, X.clone().requires_grad_()),
        {},
        ValueError,
        "residuals[0] requires grad and has no backward here, expected torch.no_grad()",
    ),
    ((X, [X, X]), {}, ValueError, "weights is None, expected a tensor, as there are 2 residuals"),
    ((X, [X, X], [1.0, 2.0]), {}, TypeError, "weights is of type list, expected torch.Tensor"),
    ((X, [X, X], W.half()), {}, TypeError, "weights has dtype torch.float16, expected torch.float32"),
    ((X, [X, X], W[1:]), {}, ValueError, "weights has shape (3, 2), expected (2,) or (4, 2)"),
    ((X, [X, X], W.to("meta")), {}, ValueError, "weights is on meta, hidden is on cpu; they must be equal"),
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
        (X.clone()[:3], [X.clone()[:3], X[:3]], W[:3]),
        {"out": X[1:]},
        ValueError,
        "out overlaps residuals[1] in memory, expected residuals[1] itself or apart from it",
    ),
    (
        (W.clone(), [W.clone(), W.clone()], W),
        {"out": W},
        ValueError,
        "out overlaps weights in memory, expected separate tensors",
    ),
    ((X, X), {"backend": "gpu"}, ValueError, "backend is 'gpu', expected None, 'torch' or 'triton'"),
]


@pytest.mark.parametrize("args, options, kind, message", ERRORS, ids=[error[-1][:40] for error in ERRORS])
def test_errors_say_what_was_expected_and_what_came(args, options, kind, message):
    with pytest.raises(kind) as caught:
        reuse(*args, **options)
    assert str(caught.value) == f"reuse: {message}"
