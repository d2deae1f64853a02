"""What only a CUDA device can show: kernels. These run by themselves wherever there is one."""

import pytest
import torch
from doubles.stdit3 import STDiT3
from waiting import no_waiting

from adacache_triton import AdaCacheConfig, Codebook, MotionRegularization, apply_adacache
from adacache_triton.kernels import (
    Motion,
    Rule,
    decide,
    gated_residual,
    initial_state,
    keep,
    reference,
    relative_distance,
    residual_stats,
    reuse,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
SHAPES = [(2, 15, 400, 1152), (1, 3, 7, 5), (3, 1, 33, 64), (2, 16, 1024, 1152)]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
CODEBOOK = Rule(30, (0.08, 0.16, 0.24, 0.32, 0.40), (6, 5, 4, 3, 2, 1), motion=Motion((4, 26)))


def normal(shape, dtype=FP32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def check_sums(sums, new, old, frame_strides):
    """The sums of `residual_stats` against float64."""
    n, o = new.double(), old.double()
    expected = [(o - n).abs(), o.abs()]
    for s in frame_strides:
        later, earlier = n[:, s:], n[:, : max(n.shape[1] - s, 0)]
        expected += [(later - earlier).abs(), later.abs() + earlier.abs()]
    expected = torch.stack([column.sum((1, 2, 3)) for column in expected], 1)
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["frame-major", "spatial-major"])
def test_sums_against_float64(shape, dtype, layout):
    B, T, S, C = shape
    new, old = normal(shape, dtype), normal(shape, dtype)
    if layout == "spatial-major":
        new, old = (x.view(B, S, T, C).transpose(1, 2) for x in (new, old))
    kept, before = old.clone(), old.clone()
    got = residual_stats(new, old, frame_strides=(1, 2), refresh=True)
    check_sums(got, new, before, (1, 2))
    assert torch.equal(old, new)
    assert torch.equal(got, residual_stats(new, kept, frame_strides=(1, 2))), "the same bits again"


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_reuse_is_one_rounded_sum(dtype):
    hidden, residual = normal((2, 1000, 1152), dtype), normal((2, 1000, 1152), dtype)
    assert torch.equal(reuse(hidden, residual).cpu(), reference.reuse(hidden.cpu(), (residual.cpu(),)))
    assert reuse(hidden.float(), residual).dtype == torch.float32


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per", [None, "sample", "frame", "token"])
@pytest.mark.parametrize("dtypes", [(BF16, BF16, BF16), (BF16, BF16, FP32), (FP32, BF16, BF16), (FP16, FP16, FP16)])
def test_gated_residual_has_the_bits_of_pytorch(dtypes, per, shape):
    hidden, branch, gate, kept = (normal(shape, dtype) for dtype in (*dtypes, BF16))
    gate = {None: None, "sample": gate[:, :1, :1], "frame": gate[:, :, :1], "token": gate}[per]
    residual, before = branch if gate is None else gate * branch, kept.clone()
    expected = (hidden + residual).to(hidden.dtype)
    out, sums = gated_residual(hidden, branch, gate, kept, frame_strides=(1, 2))
    assert torch.equal(out, expected)
    assert torch.equal(kept, residual.to(BF16))
    check_sums(sums, residual, before, (1, 2))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("per_sample", [False, True])
def test_weighted_residuals_against_float64(per_sample, count, dtype):
    hidden, *residuals = (normal((2, 1000, 1152), dtype) for _ in range(1 + count))
    weights = normal((2, count) if per_sample else (count,))
    scales = weights.double().view(-1, 1, 1, count)
    terms = [hidden.double(), *(scales[..., i] * r.double() for i, r in enumerate(residuals))]
    out = reuse(hidden, residuals, weights).double()
    # Half a unit in the last place of the result, and a few float32 roundings on the way to it.
    unit = torch.finfo(dtype).eps * out.abs().clamp(min=torch.finfo(dtype).smallest_normal)
    bound = unit / 2 + 4 * 2**-24 * sum(term.abs() for term in terms)
    assert ((out - sum(terms)).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_kept_residuals_against_float64(depth, dtype):
    shape, ratio = (2, 900, 1152), torch.tensor([0.5, 3.0], device=DEVICE)
    history, exact = (), []
    for _ in range(depth + 2):
        output, input = normal(shape, dtype), normal(shape, dtype)
        buffers = [r.data_ptr() for r in history]
        history, sums = keep(output, input, history, depth=depth, ratio=ratio)
        exact = [(output.float() - input.float()).to(dtype).double(), *exact][:3]
        assert len(history) == min(depth, len(buffers) + 1)
        assert all(torch.equal(kept.double(), r) for kept, r in zip(history, exact))
        assert len(buffers) < depth or history[0].data_ptr() == buffers[-1], "buffers change places"
        r, r1, r0 = (exact + 3 * [None])[:3]
        terms = [torch.zeros_like(r)] * 4 + [r.abs()]
        if depth > 1 and r1 is not None:
            terms[2] = (r - r1).abs()
        if depth > 1 and r0 is not None and len(buffers) > 1:
            change, before = r - r1, r1 - r0
            terms[:2] = change * before, before.square()
            terms[3] = (change - ratio.double()[:, None, None] * before).abs()
        expected = torch.stack([term.sum((1, 2)) for term in terms], 1)
        size = torch.stack([term.abs().sum((1, 2)) for term in terms], 1)
        assert ((sums - expected).abs() <= 1e-5 * size).all()


def test_relative_distance_against_float64():
    new, old = normal((2, 1000, 1152), BF16), normal((2, 1000, 1152), BF16)
    expected = (new.double() - old.double()).abs().mean() / old.double().abs().mean()
    torch.testing.assert_close(relative_distance(new, old).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("videos", [1, 2, 4])
@pytest.mark.parametrize("rule", [CODEBOOK, Rule(30, budget=0.4, metric="l2")], ids=["codebook", "budget"])
def test_decisions_are_those_of_the_cpu(rule, videos):
    state = initial_state(videos, DEVICE)
    on_cpu = state.cpu()
    for _ in range(12):
        sums = torch.rand(4, 4, device=DEVICE) + torch.tensor([0.0, 2.0, 0.0, 1.0], device=DEVICE)
        decide(sums, state, rule)
        reference.decide(sums.cpu(), on_cpu, rule)
        torch.testing.assert_close(state.cpu(), on_cpu, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("videos", [1, 2])
def test_a_computed_step_is_captured_and_replayed(videos):
    """One graph for all computed steps: sums, refresh and decision, on inputs that change in place."""
    new, kept = normal((2, 15, 100, 1152), BF16), normal((2, 15, 100, 1152), BF16)
    state = initial_state(videos, DEVICE)
    eager_kept, eager_state = kept.clone(), state.clone()

    def computed_step(kept, state):
        decide(residual_stats(new, kept, frame_strides=(1,), refresh=True), state, CODEBOOK)

    computed_step(kept.clone(), state.clone())  # a graph can hold no compilation
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        computed_step(kept, state)
    steps = []
    for _ in range(8):
        new += 0.1 * torch.randn_like(new)
        graph.replay()
        computed_step(eager_kept, eager_state)
        assert torch.equal(kept, new) and torch.equal(eager_kept, new)
        torch.testing.assert_close(state, eager_state, rtol=0, atol=0, equal_nan=True)
        steps.append(state[0, 0].item())
    assert steps == sorted(set(steps)), "every replay is a later step"


def test_nothing_waits_for_the_device():
    new, old = normal((2, 4, 100, 64), BF16), normal((2, 4, 100, 64), BF16)
    state, weights = initial_state(2, DEVICE), normal((2, 2))

    def step(history):
        out, sums = gated_residual(new, old, None, history[0], frame_strides=(1,))
        decide(sums, state, CODEBOOK)
        history, _ = keep(out, new, history, depth=2, ratio=weights[:, 0])
        return reuse(out, history, weights), residual_stats(new, old), relative_distance(new, old)

    history = new.clone(), old.clone()
    step(history)  # compiles
    with no_waiting():
        step(history)
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        new.sum().item()


@torch.no_grad()
def test_a_cached_run_is_that_of_the_cpu():
    torch.manual_seed(3)
    model, x, y = STDiT3().eval(), torch.randn(2, 4, 5, 8, 8), torch.randn(2, 6, 32)
    config = AdaCacheConfig(Codebook((0.06, 0.09), (4, 2, 1)), MotionRegularization((3, 27)), num_steps=30)
    outputs = {}
    for device in ("cpu", "cuda"):
        model.to(device)
        handle, z = apply_adacache(model, config), x.to(device)
        with handle.run():
            for step in range(30):
                timestep = torch.full((2,), 1000 - 30 * step, device=device)
                z = z - model(z, timestep, y.to(device)) / 30
            outputs[device] = (z.cpu(), handle.report().computed_steps)
        handle.remove()
    torch.testing.assert_close(outputs["cuda"][0], outputs["cpu"][0], rtol=1e-3, atol=1e-3)
    assert outputs["cuda"][1] == outputs["cpu"][1]
