"""The operations as PyTorch's graphs see them: opcheck, fullgraph compilation, fake and meta tensors."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from adacache_triton.kernels import (
    Motion,
    Rule,
    decide,
    gated_residual,
    initial_state,
    keep,
    relative_distance,
    residual_stats,
    reuse,
)

from .kernel_views import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="graphs run PyTorch's backend here")
OPS = torch.ops.adacache_kernels
RULE = Rule(20, (0.1, 0.3), (4, 2, 1), motion=Motion((2, 18), scale=0.5, power=2))


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stats(**options):
    return lambda new, old: residual_stats(new, old, frame_strides=(1,), **options)


def kept(output, input, r1, r0):
    history, sums = keep(output, input, (r1, r0), depth=2)
    return *history, sums


def decided(sums, state):
    decide(sums, state, RULE)
    return state


X = (2, 3, 5, 8)
# Name: the call, and the shapes of its tensors.
CALLS = {
    "residual_stats": (stats(), (X, X)),
    "residual_stats, l2": (stats(metric="l2"), (X, X)),
    "residual_stats, refresh": (stats(refresh=True), (X, X)),
    "gated_residual": (lambda *t: gated_residual(*t, frame_strides=(1,)), (X, X, (2, 1, 1, 8), X)),
    "gated_residual, not measured": (lambda *t: gated_residual(*t, measure=False)[0], (X, X, (2, 3, 1, 8), X)),
    "gated_residual, in place": (lambda h, *t: gated_residual(h, *t, out=h), (X, X, (2, 3, 5, 8), X)),
    "reuse": (reuse, (X, X)),
    "reuse, in place": (lambda hidden, residual: reuse(hidden, residual, out=hidden), (X, X)),
    "reuse, weighted": (lambda h, a, b, w: reuse(h, (a, b), w), (X, X, X, (2, 2))),
    "keep, first": (lambda output, input: keep(output, input), (X, X)),
    "keep, two older": (kept, (X, X, X, X)),
    "relative_distance": (relative_distance, (X, X)),
    "relative_distance, refresh": (lambda new, old: relative_distance(new, old, refresh=True), (X, X)),
    "decide": (decided, ((2, 4), (1, 4))),
}
each = pytest.mark.parametrize("name", CALLS)


def tensors(name, seed=0):
    call, shapes = CALLS[name]
    made = [randn(*shape, seed=seed + i) for i, shape in enumerate(shapes)]
    if name == "decide":
        made = [made[0].abs(), initial_state() + torch.tensor([[4.0, 1.0, 0.0, 0.0]])]
    return call, made


def flat(result):
    return list(torch.utils._pytree.tree_flatten(result)[0])


@each
@torch.no_grad()
def test_fullgraph_and_no_recompile(name):
    torch._dynamo.reset()
    call, _ = tensors(name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            _, expected = tensors(name, seed)
            _, got = tensors(name, seed)
            results = zip(flat(call(*expected)), flat(compiled(*got)), strict=True)
            assert all(torch.equal(a, b) for a, b in results if a is not None)
            assert all(torch.equal(a, b) for a, b in zip(expected, got)), "the same arguments were written"
    assert counter.frame_count == 1


@each
@pytest.mark.parametrize("kind", ["meta", "fake"])
@torch.no_grad()
def test_shapes_and_dtypes_without_memory(name, kind):
    call, real = tensors(name)
    expected = flat(call(*[t.clone() for t in real]))
    if kind == "meta":
        got = flat(call(*[t.to("meta") for t in real]))
    else:
        with FakeTensorMode() as mode:
            got = flat(call(*[mode.from_tensor(t) for t in real]))
    described = lambda results: [(x.shape, x.dtype, x.stride()) for x in results if x is not None]  # noqa: E731
    assert described(got) == described(expected)


X4, GATE, KEPT = randn(*X, seed=7), randn(2, 1, 1, 8, seed=8), randn(*X, seed=9)
RULE_ARGUMENTS = (20, [0.1, 0.3], [4, 2, 1], None, 12, "l1", [2, 18], [0.5, 2.0, 1.0, 10.0], None)


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("residual_stats", (X4, randn(*X), [1, 2], "cosine", None)),
        ("residual_stats", (X4.bfloat16(), None, [1], "l1", None)),
        ("residual_stats_refresh", (X4, randn(*X), [1], "l1", None)),
        ("reuse", (X4, [randn(*X)], None, None)),
        ("reuse", (X4, [randn(*X), randn(*X, seed=1)], randn(2, 2), None)),
        ("reuse_out", (X4, [randn(*X)], None, torch.empty(X), None)),
        ("relative_distance", (X4, randn(*X), "l1", False, None)),
        ("relative_distance_refresh", (X4, randn(*X), "l1", True, None)),
        ("decide", (randn(2, 4).abs(), initial_state(), *RULE_ARGUMENTS)),
        ("gated_residual", (X4, randn(*X), GATE, randn(*X), True, [1], "l1", None)),
        ("gated_residual", (X4.bfloat16(), randn(*X).bfloat16(), None, randn(*X), False, [], "l1", None)),
        ("gated_residual_out", (X4, randn(*X), GATE, randn(*X), torch.empty(X), True, [1], "l1", None)),
        ("keep", (X4, randn(*X), torch.empty(X), None, None, None, None)),
        ("keep", (X4, randn(*X), KEPT, randn(*X), KEPT, randn(2), None)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@torch.no_grad()
def test_opcheck(op, arguments):
    torch.library.opcheck(getattr(OPS, op).default, arguments)


def test_every_operator_is_checked():
    [cases] = test_opcheck.pytestmark
    found = torch._C._dispatch_get_all_op_names()
    names = {name.split("::")[1].split(".")[0] for name in found if name.startswith("adacache_kernels::")}
    assert names == {op for op, _ in cases.args[1]}
