import math
import sys
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adacache_triton.kernels import keep, reference

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

MODULE = sys.modules["adacache_triton.kernels.keep"]
# Small blocks, so that small inputs are cut into several tiles and programs.
launches = st.builds(MODULE.Launch, block=st.sampled_from([32, 64]), span=st.integers(1, 3), warps=st.just(4))
RATIO_SEED = 77


def holds(stored, values):
    """Exactly, rounded once: as the backend rounds, or to the nearest where a layout is left to PyTorch."""
    return torch.equal(stored, rounded(values, stored.dtype)) or torch.equal(stored, values.to(stored.dtype))


def ratios(batch):
    """Positive ratios of step gaps, a view with a stride, in storage that is else NaN."""
    held = torch.full((batch, 3), torch.nan, device=DEVICE)
    held[:, 1] = 0.25 + normal((batch,), RATIO_SEED).abs()
    return held[:, 1]


def golden(r, history, ratio=None):
    """The terms of each column, float64 [B, 5, elements], and what bounds the rounding of each."""
    r, *older = (tensor.double().reshape(len(r), -1) for tensor in (r, *history[:2]))
    none = torch.zeros_like(r)
    change = r - older[0] if older else none
    before = older[0] - older[1] if len(older) == 2 else none
    scaled = before if ratio is None else ratio.double()[:, None] * before
    error = change - scaled if len(older) == 2 else none
    terms = [change * before, before * before, change.abs(), error.abs(), r.abs()]
    sizes = [(change * before).abs(), before * before, change.abs(), change.abs() + 2 * scaled.abs(), r.abs()]
    return torch.stack(terms, 1), torch.stack(sizes, 1)


def check(sums, r, history, ratio=None):
    """Sums of n terms: a rounding each, which together walk at random, and a few within a term."""
    terms, sizes = golden(r, history, ratio)
    bound = 2**-24 * (4 + 2 * math.sqrt(terms.shape[-1])) * sizes.sum(-1)
    assert sums.shape == (r.shape[0], 5) and sums.dtype == torch.float32
    assert ((sums.double() - terms.sum(-1)).abs() <= bound).all()


def residual(output, input):
    """Exact in float64 and rounded to float32, which the dtype kept may round once more."""
    return (output.double() - input.double()).float()


@st.composite
def calls(draw):
    """Arguments of `keep`: views of many layouts, in storage that is else NaN."""
    shape, seed, depth = draw(shapes), draw(seeds), draw(st.integers(1, 3))
    output = guarded(normal(shape, seed), draw(layouts), draw(dtypes))
    input = guarded(normal(shape, seed + 1), draw(layouts), draw(dtypes))
    dtype = draw(dtypes)
    history = [guarded(normal(shape, seed + 2 + i), draw(layouts), dtype) for i in range(draw(st.integers(0, depth)))]
    ratio = ratios(shape[0]) if draw(st.booleans()) else None
    return output, input, tuple(history), dict(depth=depth, dtype=dtype, ratio=ratio)


@repeatable
@given(calls(), launches)
def test_the_residual_and_its_sums(call, launch):
    output, input, history, options = call
    depth, before = options["depth"], [kept.clone() for kept in history]
    grows = len(history) < depth
    outside = None if grows else around(history[-1])
    unread = [] if grows or depth == 2 else [history[-1]]  # overwritten, never read
    for kept in unread:
        kept.fill_(torch.nan)
    given = output.clone(), input.clone()
    with poisoned(), patch.object(MODULE, "launch_for", return_value=launch):
        new, sums = keep(output, input, history, backend=BACKEND, **options)
    assert holds(new[0], residual(output, input)) and new[0].dtype == options["dtype"]
    check(sums, new[0], before if depth > 1 else (), options["ratio"])
    assert torch.equal(output, given[0]) and torch.equal(input, given[1])
    # The same tensors, one place further; the last one is the first now, or a new one is.
    assert len(new) == min(len(history) + 1, depth)
    assert all(a is b for a, b in zip(new[1:], history, strict=False))
    assert all(torch.equal(a, b) for a, b in zip(new[1:], before, strict=False))
    if grows:
        assert not any(new[0] is kept for kept in history)
    else:
        assert new[0] is history[-1]
        assert torch.equal(around(new[0]).isnan(), outside.isnan())
    r = new[0].clone()
    for kept, values in zip(history, before, strict=True):
        kept.copy_(values)
    with patch.object(MODULE, "launch_for", return_value=launch):
        again, same = keep(output, input, history, backend=BACKEND, **options)
    assert torch.equal(again[0], r) and torch.equal(same, sums)  # bit by bit


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_buffers_change_places(depth):
    """A run of steps: as many buffers as residuals kept, each of which holds what its step left there."""
    history, steps = (), []
    for step in range(7):
        output, input = normal((2, 3, 8), 2 * step), normal((2, 3, 8), 2 * step + 1)
        older = [kept.clone() for kept in history]
        history, sums = keep(output, input, history, depth=depth, backend=BACKEND)
        steps.insert(0, (output, input))
        check(sums, history[0], older if depth > 1 else ())
        for kept, (output, input) in zip(history, steps, strict=False):
            assert torch.equal(kept, output - input)
        if step < depth:
            first = {kept.data_ptr() for kept in history}
    assert len(history) == len(first) == depth and {kept.data_ptr() for kept in history} == first


def test_the_slope_is_the_one_that_would_have_foretold_the_residual():
    r0, step = normal((3, 4, 8), 0), normal((3, 4, 8), 1)
    slope = torch.tensor([0.5, 1.0, -2.0], device=DEVICE)
    r1 = r0 + step
    output, input = r1 + slope[:, None, None] * step, torch.zeros_like(r0)
    _, sums = keep(output, input, (r1, r0), depth=2, ratio=slope, backend=BACKEND)
    torch.testing.assert_close(sums[:, 0] / sums[:, 1], slope, rtol=1e-5, atol=0)
    assert (sums[:, 3] < 1e-5 * sums[:, 2]).all()  # nothing is left of the change once the slope is known


def test_sums_are_of_what_is_kept():
    output, input = torch.full((1, 8), 1 + 2**-10, device=DEVICE), torch.zeros(1, 8, device=DEVICE)
    (kept,), sums = keep(output, input, dtype=torch.bfloat16, backend=BACKEND)
    assert kept.eq(1).all() and sums[0, 4] == 8


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["output", "input", "r1", "r0"])
def test_what_is_not_finite_reaches_the_sums(poison, place):
    tensors = {name: normal((2, 4, 8), i) for i, name in enumerate(("output", "input", "r1", "r0"))}
    tensors[place][1, 2, 3] = poison
    history = tensors["r1"], tensors["r0"]
    _, sums = keep(tensors["output"], tensors["input"], history, depth=2, backend=BACKEND)
    assert sums[0].isfinite().all()
    columns = {"r1": [0, 1, 2, 3], "r0": [0, 1, 3]}.get(place, [0, 2, 3, 4])
    assert not sums[1, columns].isfinite().any()
    assert sums[1, [i for i in range(5) if i not in columns]].isfinite().all()


def test_what_the_dtype_cannot_hold_shows():
    output = torch.full((1, 8), 1e6, device=DEVICE)
    (kept,), sums = keep(output, torch.zeros_like(output), dtype=torch.float16, backend=BACKEND)
    assert kept.isinf().all() and sums[0, 4].isinf()


@pytest.mark.parametrize("shape", [(3,), (3, 1), (1, 777), (2, 3, 1, 5, 7)])
def test_any_rank(shape):
    output, input, r1, r0 = (normal(shape, seed) for seed in range(4))
    before = r1.clone(), r0.clone()
    with poisoned():
        (r, _), sums = keep(output, input, (r1, r0), depth=2, backend=BACKEND)
    assert holds(r, residual(output, input))
    check(sums, r, before)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.permute(3, 1, 0, 2),  # the stride of 1 is the batch's
        lambda x: x[..., ::2],  # no axis of stride 1
        lambda x: x[:, ::2, 1:3, :3],  # four axes
        lambda x: x[:, :, :1].expand(-1, -1, 4, -1),
    ],
)
def test_any_layout_of_the_output(view):
    output = view(normal((2, 4, 3, 6), 0))
    input, r1, r0 = (normal(output.shape, seed) for seed in (1, 2, 3))
    before = r1.clone(), r0.clone()
    with poisoned():
        (r, _), sums = keep(output, input, (r1, r0), depth=2, backend=BACKEND)
    assert holds(r, residual(output, input))
    check(sums, r, before)


def test_own_launches():
    """The ladder's own launch, at more than one tile."""
    for dtype in (torch.bfloat16, torch.float32):
        output, input, r1, r0 = (guarded(normal((2, 3, 40, 48), seed), dtype=dtype) for seed in range(4))
        before = r1.clone(), r0.clone()
        with poisoned():
            (r, _), sums = keep(output, input, (r1, r0), depth=2, backend=BACKEND)
        check(sums, r, before)


@pytest.mark.parametrize("axis", ["batch", "token"])
def test_offsets_beyond_int32(axis):
    shape, strides = {"batch": ((3, 2, 8), (2**30, 8, 1)), "token": ((2, 3, 8), (8, 2**30, 1))}[axis]
    try:
        output, input, r1, r0 = (distant(shape, strides) for _ in range(4))
    except RuntimeError as error:
        pytest.skip(f"cannot reserve 16 GiB of untouched memory: {error}")
    for seed, tensor in enumerate((output, input, r1, r0)):
        tensor.copy_(normal(shape, seed))
    before = r1.clone(), r0.clone()
    (r, _), sums = keep(output, input, (r1, r0), depth=2, backend=BACKEND)
    assert r is r0 and holds(r, residual(output, input))
    check(sums, r, before)


@pytest.mark.skipif(DEVICE != "cpu", reason="about CPU tensors")
def test_a_cpu_runs_the_reference():
    output, input, r1, r0 = (normal((3, 5, 8), seed) for seed in range(4))
    ratio, kept = ratios(3), r0.clone()
    expected = reference.keep(output, input, kept, r1, kept, ratio)
    (r, _), sums = keep(output, input, (r1, r0), depth=2, ratio=ratio)
    assert torch.equal(r, kept) and torch.equal(sums, expected)


@pytest.mark.parametrize(
    "batch, plane, reads, narrow, wide",
    [(1, 75600 * 5120, 4, 2, 2), (2, 54000 * 1152, 2, 2, 2), (1, 64, 3, 4, 4), (3, 2**20, 4, 2, 4)],
)
def test_launches_fill_a_chip(batch, plane, reads, narrow, wide):
    launch = MODULE.launch_for(batch, plane, reads, narrow, wide)
    tiles = -(-plane // launch.block)
    assert launch.block in (MODULE.THREADS * 16 // narrow, MODULE.THREADS * 32 // narrow)
    assert 1 <= launch.span <= MODULE.SPAN
    assert launch.span == 1 or batch * tiles // launch.span >= MODULE.FILL


X = torch.zeros(4, 6)
Y = torch.zeros(4, 6)
KEPT = tuple(torch.zeros(4, 6) for _ in range(3))
ERRORS = [
    (([1.0], X), {}, TypeError, "output is of type list, expected torch.Tensor"),
    ((X, X.double()), {}, TypeError, "input has dtype torch.float64, expected float32, bfloat16 or float16"),
    ((X[:0], X[:0]), {}, ValueError, "output has shape (0, 6), expected at least one element"),
    ((X[0, 0], X[0, 0]), {}, ValueError, "output has shape (), expected at least one dimension"),
    ((X, X[1:]), {}, ValueError, "output has shape (4, 6), input has (3, 6); they must be equal"),
    ((X, X.to("meta")), {}, ValueError, "output is on cpu, input is on meta; they must be equal"),
    (
        (X.clone().requires_grad_(), Y),
        {},
        ValueError,
        "output requires grad and has no backward here, expected torch.no_grad()",
    ),
    ((X, Y), {"depth": 0}, ValueError, "depth is 0, expected 1 to 3"),
    ((X, Y), {"depth": 4}, ValueError, "depth is 4, expected 1 to 3"),
    ((X, Y), {"depth": 1.0}, TypeError, "depth is 1.0, expected int"),
    ((X, Y), {"depth": True}, TypeError, "depth is True, expected int"),
    ((X, Y, KEPT[0]), {}, TypeError, "history is of type Tensor, expected a sequence of torch.Tensor"),
    ((X, Y, KEPT[:2]), {}, ValueError, "history holds 2, expected at most depth = 1"),
    ((X, Y, (None,)), {}, TypeError, "history[0] is of type NoneType, expected torch.Tensor"),
    ((X, Y, (KEPT[0][0],)), {}, ValueError, "history[0] has shape (6,), input has (4, 6); they must be equal"),
    ((X, Y, (KEPT[0].half(),)), {}, TypeError, "history[0] has dtype torch.float16, expected torch.float32"),
    (
        (X, Y, (KEPT[0],)),
        {"dtype": torch.bfloat16},
        TypeError,
        "history[0] has dtype torch.float32, expected torch.bfloat16",
    ),
    ((X, Y), {"dtype": torch.int8}, TypeError, "dtype is torch.int8, expected float32, bfloat16 or float16"),
    (
        (X, Y, (torch.zeros(6).expand(4, 6),)),
        {},
        ValueError,
        "history[0] has strides (0, 1) and is written, expected elements that do not overlap",
    ),
    ((X, Y, (X,)), {}, ValueError, "history[0] overlaps output in memory, expected separate tensors"),
    ((X, Y, (KEPT[0], Y)), {"depth": 3}, ValueError, "history[1] overlaps input in memory, expected separate tensors"),
    (
        (X, Y, (KEPT[0], KEPT[0])),
        {"depth": 2},
        ValueError,
        "history[1] overlaps history[0] in memory, expected separate tensors",
    ),
    ((X, Y), {"ratio": 2.0}, TypeError, "ratio is of type float, expected torch.Tensor"),
    ((X, Y), {"ratio": torch.ones(4).half()}, TypeError, "ratio has dtype torch.float16, expected torch.float32"),
    ((X, Y), {"ratio": torch.ones(3)}, ValueError, "ratio has shape (3,), expected (4,)"),
    ((X, Y), {"ratio": torch.ones(4).to("meta")}, ValueError, "ratio is on meta, output is on cpu; they must be equal"),
    ((X, Y), {"backend": "cuda"}, ValueError, "backend is 'cuda', expected None, 'torch' or 'triton'"),
]


@pytest.mark.parametrize("args, options, kind, message", ERRORS, ids=[error[-1][:40] for error in ERRORS])
def test_errors_say_what_was_expected_and_what_came(args, options, kind, message):
    with pytest.raises(kind) as caught:
        keep(*args, **options)
    assert str(caught.value) == f"keep: {message}"
