"""The functions against the expressions that wrappers hold today, and against the package's own decision rule."""

import json
import math
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from doubles.residuals import residual
from hypothesis import given, settings
from hypothesis import strategies as st

from adacache_triton import AdaCacheConfig, Codebook
from adacache_triton.functional import (
    cache_rate,
    motion_gradient,
    motion_scale,
    motion_score,
    regularize,
    residual_distance,
)

TRACES = json.loads((Path(__file__).parent / "data/decisions.json").read_text())
OFFICIAL = {0.03: 12, 0.05: 10, 0.07: 8, 0.09: 6, 0.11: 4, 1.0: 3}
repeatable = settings(max_examples=30, derandomize=True, deadline=None, database=None)


def literal_distance(cached, new, rate):
    return (cached - new).norm(p=1) / cached.norm(p=1) / rate


def literal_motion(r, tokens, strides):
    scores = []
    for s in strides:
        later, earlier = r[:, s * tokens :], r[:, : -s * tokens]
        scores.append((later - earlier).norm(p=1) / (later.norm(p=1) + earlier.norm(p=1)))
    return sum(scores) / len(scores)


@repeatable
@given(st.tuples(*map(st.integers, (1, 3, 1, 1), (3, 6, 7, 9))), st.integers(1, 12), st.integers(0, 99))
def test_as_the_expressions_in_wrappers(shape, rate, seed):
    generator = torch.Generator().manual_seed(seed)
    batch, frames, tokens, channels = shape
    cached, new = torch.randn(2, batch, frames * tokens, channels, generator=generator)
    got = residual_distance(cached, new, rate)
    torch.testing.assert_close(got, literal_distance(cached.double(), new.double(), rate).float(), rtol=1e-5, atol=0)
    assert got.shape == () and torch.equal(residual_distance(cached, new, torch.tensor(rate)), got)
    for strides in ((1,), (2, 1)):
        got = motion_score(new, tokens, strides)
        torch.testing.assert_close(got, literal_motion(new.double(), tokens, strides).float(), rtol=1e-5, atol=0)
        assert got.shape == ()


@pytest.mark.parametrize("trace", [t for t in TRACES if t["dtype"] == "float32"][::3], ids=lambda trace: trace["name"])
def test_a_wrapper_made_of_them_runs_as_the_released_code(trace):
    """Released codebooks as they are: thresholds to rates, the last for every larger distance."""
    codebook = {float(t): k for t, k in trace["codebook"].items()}
    moreg, tokens, steps = trace["moreg"], trace["shape"][2], trace["num_steps"]
    cached, rate, computed, scale, rows = None, 1, 0, 1.0, []
    for step in range(1, steps + 1):
        if step not in (1, steps - 1, steps) and step != computed + rate:
            continue
        new = residual(trace, step)
        if cached is not None:
            distance, before = residual_distance(cached, new, rate), scale
            if moreg:
                scale = 1.0
                if moreg["steps"][0] <= step <= moreg["steps"][1]:
                    score = motion_score(new, tokens, moreg["strides"])
                    scale = motion_scale(score, moreg["scale"], moreg["power"], moreg["divisor"])
                gradient = motion_gradient(scale, before, rate, moreg["gradient_weight"])
                distance = regularize(distance, scale, gradient)
            rate = cache_rate(distance, codebook)
        cached, computed = new, step
        rows.append((step, rate))
    assert rows == [(row["step"], row["rate"]) for row in trace["trace"]]


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 6, 4), (2, 3, 4, 5), (2, 3, 2, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_residuals_of_any_rank_and_dtype(shape, dtype):
    cached, new = torch.randn(2, *shape).to(dtype)
    expected = literal_distance(cached.double(), new.double(), 2)
    assert residual_distance(cached, new, 2).item() == pytest.approx(expected.item(), rel=1e-5)


def test_views():
    """Token and channel ranges and transposed layouts count what they show and nothing else."""
    cached, new = torch.randn(2, 2, 12, 8)
    for view in (lambda x: x[:, 3:9], lambda x: x[..., 1:7], lambda x: x.transpose(1, 2), lambda x: x[:, ::2, ::2]):
        expected = literal_distance(view(cached), view(new), 1)
        torch.testing.assert_close(residual_distance(view(cached), view(new)), expected)
    held = torch.full((2, 14, 10), math.nan)
    held[:, 1:13, 1:9] = new
    assert torch.equal(motion_score(held[:, 1:13, 1:9], 3), motion_score(new, 3))


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_metrics_of_the_ablation(metric):
    cached, new = torch.randn(2, 2, 12, 8)
    c, n = cached.double(), new.double()
    expected = {"l2": (c - n).norm() / c.norm(), "cosine": 1 - (c * n).sum() / c.norm() / n.norm()}[metric]
    assert residual_distance(cached, new, 3, metric=metric).item() == pytest.approx(expected.item() / 3, rel=1e-5)


def test_what_is_not_finite_is_computed():
    x = torch.ones(1, 6, 4)
    for bad in (math.nan, math.inf):
        broken = x.clone()
        broken[0, 3, 2] = bad
        for distance in (residual_distance(x, broken), residual_distance(broken, x), motion_score(broken, 2)):
            assert cache_rate(distance, OFFICIAL) == 1
    assert cache_rate(residual_distance(0 * x, x), OFFICIAL) == 1
    assert cache_rate(motion_score(x, 6), OFFICIAL) == 1, "one frame has no motion to speak of"
    assert cache_rate(residual_distance(x, x), OFFICIAL) == 12


@pytest.mark.parametrize("distance, rate", [(0, 12), (0.03, 10), (0.05, 8), (0.1, 4), (0.11, 3), (7, 3), (math.inf, 1)])
def test_rates(distance, rate):
    codebook = AdaCacheConfig.official("open-sora-100").codebook
    *pairs, last = OFFICIAL.items()
    for one in (distance, torch.tensor(distance, dtype=torch.float64), torch.tensor([distance], dtype=torch.float64)):
        for book in (codebook, OFFICIAL, dict([*pairs, (0, 3)]), dict([*pairs, (math.inf, 3)])):
            got = cache_rate(one, book)
            assert got == rate and type(got) is int
    assert cache_rate(math.nan, {math.inf: 4}) == 1 and cache_rate(0.5, {math.inf: 4}) == 4


def test_numbers_stay_numbers():
    scale = motion_scale(0.77, 0.385, 2, 4)
    assert scale == 1.0 and type(scale) is float
    gradient = motion_gradient(scale, 0.5, 2)
    assert gradient == 2.5 and type(gradient) is float
    assert regularize(0.1, scale, -gradient) == pytest.approx(0.35)
    tensors = [torch.tensor(x) for x in (0.77, 0.5, 0.1)]
    assert torch.equal(motion_scale(tensors[0], 0.385, 2, 4), torch.tensor(1.0))
    assert torch.equal(motion_gradient(1.0, tensors[1], torch.tensor(2)), torch.tensor(2.5))
    torch.testing.assert_close(regularize(tensors[2], 1.0, torch.tensor(-2.5)), torch.tensor(0.35))
    assert motion_scale(1e9, 1e-30) == math.inf


def test_the_backend_is_that_of_the_argument_or_the_environment(monkeypatch):
    x = torch.ones(1, 6, 4)
    with pytest.raises(ValueError, match="backend is 'triton' and the tensors are on cpu"):
        residual_distance(x, x, backend="triton")
    monkeypatch.setenv("ADACACHE_BACKEND", "triton")
    for call in (lambda **backend: residual_distance(x, x, **backend), lambda **backend: motion_score(x, 2, **backend)):
        with pytest.raises(ValueError, match="backend is 'triton' and the tensors are on cpu"):
            call()
        assert call(backend="torch") == 0


def test_only_the_rate_is_read():
    """Everything up to it goes through on tensors that have no values."""
    x = torch.empty(2, 6, 4, device="meta")
    distance, scale = residual_distance(x, x, 2), motion_scale(motion_score(x, 2))
    with patch.object(torch.Tensor, "item", side_effect=AssertionError("read")):
        assert regularize(distance, scale, motion_gradient(scale, scale, 2)).shape == ()


X = torch.ones(2, 6, 4)
ERRORS = [
    (lambda: residual_distance(1.0, X), TypeError, "residual_distance: cached is of type float, expected torch.Tensor"),
    (
        lambda: residual_distance(X, X[:1]),
        ValueError,
        "residual_distance: new has shape (1, 6, 4), cached has (2, 6, 4); they must be equal",
    ),
    (lambda: residual_distance(X, X, 0), ValueError, "prev_rate: expected a finite number >= 1, got 0"),
    (lambda: residual_distance(X, X, metric="l3"), ValueError, "relative_distance: metric is 'l3', expected one of"),
    (lambda: motion_score(X, 4), ValueError, "motion_score: residual has shape (2, 6, 4), expected [B, T * 4, C]"),
    (lambda: motion_score(X[0], 2), ValueError, "motion_score: residual has shape (6, 4), expected [B, T * 2, C]"),
    (lambda: motion_score(X, 2.0), TypeError, "tokens_per_frame: expected an integer >= 1, got 2.0"),
    (lambda: motion_score(X, 2, 1), TypeError, "strides: expected a list, got 1"),
    (lambda: motion_score(X, 2, ()), ValueError, "strides: expected at least one, got ()"),
    (lambda: motion_score(X, 2, (0,)), ValueError, "strides: expected an integer >= 1, got 0"),
    (
        lambda: motion_score(X.mT.contiguous().mT, 2),
        ValueError,
        "motion_score: residual has strides (24, 1, 6), expected 1 for the last (channels)",
    ),
    (lambda: motion_scale(0.5, scale=0), ValueError, "scale: expected a finite number > 0, got 0"),
    (lambda: motion_gradient(1, 1, 0), ValueError, "previous_rate: expected a finite number >= 1, got 0"),
    (lambda: cache_rate(X, OFFICIAL), ValueError, "distance: expected a number or a tensor of one element, got (2, 6"),
    (lambda: cache_rate(0.1, [0.1]), TypeError, "codebook: expected a Codebook or a mapping of thresholds to rates"),
    (lambda: cache_rate(0.1, {}), ValueError, "rates: expected 1 values (one a threshold, one for larger distances)"),
    (lambda: cache_rate(0.1, {0.2: 3, 0.1: 2, 1.0: 1}), ValueError, "thresholds: expected ascending values, got 0.1"),
]


@pytest.mark.parametrize("call, kind, message", ERRORS, ids=[message[:50] for *_, message in ERRORS])
def test_errors_say_what_was_expected_and_what_came(call, kind, message):
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value).startswith(message)


def test_a_codebook_is_taken_as_it_is():
    assert cache_rate(0.1, Codebook((0.2,), (7, 1))) == 7
