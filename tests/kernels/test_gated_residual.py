import sys
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adacache_triton.kernels import gated_residual, reference, residual_stats, reuse
from adacache_triton.kernels._walk import FILL

from .kernel_views import (
    BACKEND,
    DEVICE,
    DTYPES,
    around,
    check_sums,
    cuts_bfloat16,
    distant,
    dtypes,
    guarded,
    holds,
    layouts,
    metrics,
    poisoned,
    repeatable,
    rounded,
    seeds,
    shapes,
    strides,
)
from .kernel_views import values as normal

MODULE = sys.modules["adacache_triton.kernels.gated_residual"]
# Small blocks, so that small inputs are cut into several tiles and spans.
launches = st.builds(MODULE.Launch, block=st.sampled_from([16, 32]), span=st.integers(1, 5), warps=st.just(4))
# Which of B, T and S a gate has: none of them, one per sample, per frame, per token, per token of any frame.
gates = st.sampled_from([None, "", "B", "BT", "T", "BTS", "BS", "S"])


def gate_for(shape, axes, seed, layout="frame_major", dtype=torch.float32):
    if axes is None:
        return None
    sizes = [size if axis in axes else 1 for axis, size in zip("BTS", shape[:3], strict=True)]
    return guarded(normal((*sizes, shape[3]), seed), layout, dtype)


def golden(hidden, branch, gate):
    """Residual and output under PyTorch's type promotion, with a backend's rounding made explicit."""
    residual = branch
    if gate is not None:
        residual = rounded(gate.float() * branch.float(), torch.promote_types(gate.dtype, branch.dtype))
    out = rounded(hidden.float() + residual.float(), hidden.dtype)
    if not cuts_bfloat16():
        eager = hidden + (branch if gate is None else gate * branch)
        assert torch.equal(out, eager.to(hidden.dtype))
    return residual, out


@repeatable
@given(
    shapes, gates, st.tuples(layouts, layouts, layouts, layouts), st.tuples(dtypes, dtypes, dtypes, dtypes),
    st.booleans(), strides, metrics, seeds, launches,
)  # fmt: skip
def test_equals_eager_bit_for_bit(
    shape, axes, layouts, dtypes, measure, frame_strides, metric, seed, launch
):  # fmt: skip
    hidden, branch, kept = (guarded(normal(shape, seed + i), layouts[i], dtypes[i]) for i in range(3))
    gate = gate_for(shape, axes, seed + 3, layouts[3], dtypes[3])
    residual, expected = golden(hidden, branch, gate)
    hidden_before, branch_before, kept_before = hidden.clone(), branch.clone(), kept.clone()
    hidden_around, kept_around = around(hidden), around(kept)
    options = dict(measure=measure, frame_strides=frame_strides, metric=metric, backend=BACKEND)

    def check(out, sums):
        assert out.dtype == hidden.dtype and torch.equal(out, expected)
        assert holds(kept, residual)
        assert torch.equal(around(kept).isnan(), kept_around.isnan())
        if measure:
            check_sums(sums, residual, kept_before, frame_strides, metric)
        else:
            assert sums is None

    with poisoned(), patch.object(MODULE, "launch_for", return_value=launch):
        out, sums = gated_residual(hidden, branch, gate, kept, **options)
        check(out, sums)
        assert torch.equal(hidden, hidden_before) and torch.equal(branch, branch_before)

        kept.copy_(kept_before)
        out = guarded(torch.full(shape, torch.nan, device=DEVICE), layouts[3], hidden.dtype)
        written, again = gated_residual(hidden, branch, gate, kept, **options, out=out)
        check(out, again)
        assert written is out and around(out).isnan().all()
        assert sums is None or torch.equal(sums, again)

        kept.copy_(kept_before)
        written, again = gated_residual(hidden, branch, gate, kept, **options, out=hidden)
        check(hidden, again)
        assert written is hidden and torch.equal(around(hidden).isnan(), hidden_around.isnan())
        assert sums is None or torch.equal(sums, again)


def test_wan():
    """Its residual stream is bfloat16, its gate float32: rounded once, after the sum."""
    hidden, branch, kept = (normal((1, 3, 4, 16), seed).bfloat16() for seed in range(3))
    gate = normal((1, 1, 1, 16), 3)
    expected = rounded(hidden.float() + branch * gate, torch.bfloat16)
    with poisoned():
        out, _ = gated_residual(hidden, branch, gate, kept, backend=BACKEND)
    assert torch.equal(out, expected)
    assert not torch.equal(out, rounded(hidden.float() + rounded(branch * gate, torch.bfloat16), torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reused_step_adds_what_the_computed_one_kept(dtype):
    hidden, branch, gate, kept = (normal((2, 3, 4, 16), seed).to(dtype) for seed in range(4))
    out, _ = gated_residual(hidden, branch, gate[:, :1, :1], kept, backend=BACKEND)
    assert torch.equal(reuse(hidden, kept, backend=BACKEND), out)


@pytest.mark.parametrize("gate_dtype", [None, *DTYPES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_launches(dtype, gate_dtype):
    """The ladder's own launch, at more than one tile."""
    shape = (2, 3, 40, 48)
    hidden, branch = guarded(normal(shape, 0), "spatial_major", dtype), guarded(normal(shape, 1), dtype=torch.bfloat16)
    kept = guarded(normal(shape, 2))
    gate = gate_dtype and gate_for(shape, "B", 3, dtype=gate_dtype)
    residual, expected = golden(hidden, branch, gate)
    before = kept.clone()
    with poisoned():
        out, sums = gated_residual(hidden, branch, gate, kept, frame_strides=(1,), backend=BACKEND)
    assert torch.equal(out, expected) and holds(kept, residual)
    check_sums(sums, residual, before, (1,))


def test_gates_may_be_expanded():
    """An expanded gate is the gate that it was expanded from, in the bits and in the sums."""
    hidden, branch, kept = (normal((2, 3, 4, 5), seed) for seed in range(3))
    gate = normal((2, 1, 1, 5), 3)
    results = []
    for view in (gate, gate.expand(2, 3, 4, 5), gate.expand(2, 3, 1, 5), gate.expand(2, 1, 4, 5)):
        fresh = kept.clone()
        results.append((*gated_residual(hidden, branch, view, fresh, frame_strides=(1, 2), backend=BACKEND), fresh))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_inputs_may_be_expanded():
    """A hidden state that is the same in each sample or frame: the output is written where it has memory of its own."""
    full = (3, 4, 2, 5)
    for sizes in [(1, 4, 2, 5), (3, 1, 2, 5), (1, 1, 1, 5)]:
        hidden, branch = normal(sizes, 0).expand(full), normal(sizes, 1).expand(full)
        out, _ = gated_residual(hidden, branch, None, normal(full, 2), backend=BACKEND)
        assert torch.equal(out, hidden + branch)


def test_unmeasured_residuals_do_not_read_what_was_kept():
    hidden, branch, kept = normal((2, 3, 4, 5), 0), normal((2, 3, 4, 5), 1), torch.full((2, 3, 4, 5), torch.nan)
    kept = kept.to(DEVICE)
    out, sums = gated_residual(hidden, branch, None, kept, measure=False, frame_strides=(1,), backend=BACKEND)
    assert sums is None and torch.equal(out, hidden + branch) and torch.equal(kept, branch)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", ["branch", "kept", "gate"])
def test_what_is_not_finite_reaches_the_sums(poison, place):
    hidden, branch, kept = (normal((2, 4, 3, 5), seed) for seed in range(3))
    tensors = {"branch": branch, "kept": kept, "gate": normal((2, 4, 3, 5), 3)}
    tensors[place][1, 1, 2, 4] = poison
    residual, before = tensors["gate"] * branch, kept.clone()
    _, sums = gated_residual(hidden, **tensors, frame_strides=(1, 3), backend=BACKEND)
    check_sums(sums, residual, before, (1, 3))
    assert sums[0].isfinite().all() and not sums[1, 0].isfinite()


@pytest.mark.parametrize("axis", ["batch", "frame", "token"])
def test_offsets_beyond_int32(axis):
    shape, far = {"batch": (3, 1, 2, 8), "frame": (1, 3, 2, 8), "token": (1, 2, 3, 8)}[axis], 2**30
    inner = {"batch": (far, 16, 8, 1), "frame": (far, far, 8, 1), "token": (far, 8, far, 1)}[axis]
    try:
        hidden, branch, gate, kept, out = (distant(shape, inner) for _ in range(5))
    except RuntimeError as error:
        pytest.skip(f"cannot reserve 20 GiB of untouched memory: {error}")
    for seed, tensor in enumerate((hidden, branch, gate, kept)):
        tensor.copy_(normal(shape, seed))
    residual, expected = golden(hidden.clone(), branch.clone(), gate.clone())
    before = kept.clone()
    _, sums = gated_residual(hidden, branch, gate, kept, frame_strides=(1, 2), out=out, backend=BACKEND)
    assert torch.equal(out, expected) and torch.equal(kept, residual)
    check_sums(sums, residual, before, (1, 2))


@pytest.mark.skipif(DEVICE != "cpu", reason="about CPU tensors")
def test_a_cpu_runs_the_reference():
    hidden, branch, gate, kept = (normal((2, 3, 4, 5), seed) for seed in range(4))
    ours, theirs = kept.clone(), kept.clone()
    out, sums = gated_residual(hidden, branch, gate, ours, frame_strides=[1, 2], metric="l2")
    expected = reference.gated_residual(hidden, branch, gate, theirs, frame_strides=(1, 2), metric="l2")
    assert torch.equal(out, expected[0]) and torch.equal(sums, expected[1]) and torch.equal(ours, theirs)
    assert torch.equal(sums, residual_stats(gate * branch, kept, frame_strides=(1, 2), metric="l2"))


@pytest.mark.parametrize(
    "batch, frames, plane", [(2, 15, 3600 * 1152), (1, 21, 3600 * 5120), (1, 16, 64), (3, 7, 1000)]
)
@pytest.mark.parametrize("narrow", [2, 4])
def test_launches_cover_the_tensor_and_fill_a_chip(batch, frames, plane, narrow):
    launch = MODULE.launch_for(batch, frames, plane, narrow)
    tiles, spans = -(-plane // launch.block), -(-frames // launch.span)
    assert launch.block * narrow == 16 * MODULE.THREADS
    assert 1 <= launch.span <= frames
    assert launch.span == 1 or batch * tiles * spans >= FILL / 2  # spans are whole frames, so not quite FILL
    assert launch.span == frames or batch * tiles < FILL  # no cut where tiles alone fill the chip


X = torch.zeros(2, 3, 4, 5)
Y, Z = X.clone(), X.clone()
ERRORS = [
    (([1.0], Y, None, Z), {}, TypeError, "hidden is of type list, expected torch.Tensor"),
    ((X, Y.long(), None, Z), {}, TypeError, "branch has dtype torch.int64, expected float32, bfloat16 or float16"),
    ((X, Y[0], None, Z), {}, ValueError, "branch has shape (3, 4, 5), expected four dimensions [B, T, S, C]"),
    ((X[:0], Y, None, Z), {}, ValueError, "hidden has shape (0, 3, 4, 5), expected at least one element"),
    (
        (X, Y[:, 1:], None, Z),
        {},
        ValueError,
        "branch has shape (2, 2, 4, 5), hidden has (2, 3, 4, 5); they must be equal",
    ),
    ((X, Y, None, Z.to("meta")), {}, ValueError, "kept is on meta, hidden is on cpu; they must be equal"),
    (
        (X, Y, None, Z.transpose(2, 3).contiguous().transpose(2, 3)),
        {},
        ValueError,
        "kept has strides (60, 20, 1, 4), expected 1 for the last (channels)",
    ),
    (
        (X, Y.clone().requires_grad_(), None, Z),
        {},
        ValueError,
        "branch requires grad and has no backward here, expected torch.no_grad()",
    ),
    ((X, Y, 1.0, Z), {}, TypeError, "gate is of type float, expected torch.Tensor"),
    ((X, Y, X[0, 0], Z), {}, ValueError, "gate has shape (4, 5), expected four dimensions [B, T, S, C]"),
    (
        (X, Y, X[:, :2], Z),
        {},
        ValueError,
        "gate has shape (2, 2, 4, 5), hidden has (2, 3, 4, 5); they must be equal, or the gate 1 in any dimension "
        "but the last",
    ),
    (
        (X, Y, X[..., :1], Z),
        {},
        ValueError,
        "gate has shape (2, 3, 4, 1), hidden has (2, 3, 4, 5); they must be equal, or the gate 1 in any dimension "
        "but the last",
    ),
    ((X, Y, X.to("meta"), Z), {}, ValueError, "gate is on meta, hidden is on cpu; they must be equal"),
    ((X, Y, None, Z), {"frame_strides": 1}, TypeError, "frame_strides is 1, expected a sequence of int"),
    ((X, Y, None, Z), {"metric": "l0"}, ValueError, "metric is 'l0', expected one of 'l1', 'l2', 'cosine'"),
    (
        (X, Y, None, Z[:, :1].expand(-1, 3, -1, -1)),
        {},
        ValueError,
        "kept has strides (60, 0, 5, 1) and is written, expected elements that do not overlap",
    ),
    ((X, Y, None, X), {}, ValueError, "kept is overwritten and overlaps hidden in memory, expected separate tensors"),
    ((X, Y, None, Y), {}, ValueError, "kept is overwritten and overlaps branch in memory, expected separate tensors"),
    ((X, Y, Z[:1], Z), {}, ValueError, "kept is overwritten and overlaps gate in memory, expected separate tensors"),
    ((X, Y, None, Z), {"out": X[0]}, ValueError, "out has shape (3, 4, 5), expected four dimensions [B, T, S, C]"),
    (
        (X, Y, None, Z),
        {"out": X.half()},
        TypeError,
        "out has dtype torch.float16, hidden has torch.float32; they must be equal",
    ),
    (
        (X, Y, None, Z),
        {"out": torch.zeros(5).expand(2, 3, 4, 5)},
        ValueError,
        "out has strides (0, 0, 0, 1) and is written, expected elements that do not overlap",
    ),
    (
        (X, Y, None, Z),
        {"out": Y},
        ValueError,
        "out overlaps branch in memory, expected separate tensors",
    ),
    (
        (X, X, None, Z),
        {"out": X},
        ValueError,
        "out overlaps branch in memory, expected separate tensors",
    ),
    ((X, Y, None, Z), {"out": Z}, ValueError, "out overlaps kept in memory, expected separate tensors"),
    (
        (X, Y, Z[:1], Z.clone()),
        {"out": Z},
        ValueError,
        "out overlaps gate in memory, expected separate tensors",
    ),
    (
        (X[:, :2], Y[:, :2], None, Z[:, :2]),
        {"out": X[:, 1:]},
        ValueError,
        "out overlaps hidden in memory, expected hidden itself or apart from it",
    ),
    ((X, Y, None, Z), {"backend": "cuda"}, ValueError, "backend is 'cuda', expected None, 'torch' or 'triton'"),
]


@pytest.mark.parametrize("args, options, kind, message", ERRORS, ids=[error[-1][:40] for error in ERRORS])
def test_errors_say_what_was_expected_and_what_came(args, options, kind, message):
    with pytest.raises(kind) as caught:
        gated_residual(*args, **options)
    assert str(caught.value) == f"gated_residual: {message}"
