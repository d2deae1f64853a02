"""Forecasts of the stack residual: weights against their formulas, and the videos that they lead to."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import Loop

from adacache_triton import AdaCacheConfig, Codebook, DenseEarly, FixedSchedule, apply_adacache
from adacache_triton.forecast import DAMPED, STEEPEST, History, parabola
from adacache_triton.testbed.pipeline import EmbeddedPipeline

LISTED = AdaCacheConfig(schedule=FixedSchedule((1, 2, 3, 5, 8, 12), 14))


def stored(forecast: str, values: dict[int, torch.Tensor]) -> History:
    """A history of residuals by step, each the difference of an output and an input."""
    history = History(forecast)
    for step, residual in values.items():
        entry = torch.randn(residual.shape, generator=torch.Generator().manual_seed(step))
        history.store(entry.double().add(residual).float(), entry, step)
    return history


def forecast(history: History, step: int) -> torch.Tensor:
    history.aim(step)
    if history.weights is None:
        return history.kept[0]
    weights = history.weights.expand(len(history.kept[0]), -1)
    return sum(weights[:, i].view(-1, 1, 1) * kept for i, kept in enumerate(history.kept))


def test_none_keeps_one_and_adds_it_as_it_is():
    r = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    history = stored("none", {1: r, 2: 2 * r})
    assert len(history.kept) == 1
    torch.testing.assert_close(forecast(history, 5), 2 * r)


def test_a_line_is_foretold_exactly_once_its_slope_is_fitted():
    base, slope = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(1)).unbind()
    history = stored("fitted", {step: base + step * slope for step in (1, 2, 4)})
    for step in (5, 6, 9):
        torch.testing.assert_close(forecast(history, step), base + step * slope, rtol=1e-4, atol=1e-4)


def test_the_slope_is_least_squares_for_each_sample_and_clipped():
    r = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(2)).double()  # step, sample
    r[2, 1] = r[1, 1] + 0.4 * 3 * (r[1, 1] - r[0, 1])  # right was 0.4 of the slope
    r[2, 2] = r[1, 2] + 9 * 3 * (r[1, 2] - r[0, 2])
    r[2, 3] = r[1, 3] - (r[1, 3] - r[0, 3])
    history = stored("fitted", dict(zip((2, 3, 6), r)))
    history.aim(8)
    change, before = r[2] - r[1], r[1] - r[0]
    right = ((change * before).sum((1, 2)) / before.square().sum((1, 2)) / 3).clamp(0, STEEPEST)
    assert right[1] == pytest.approx(0.4) and right[2] == STEEPEST and right[3] == 0
    ahead = right * (8 - 6) / (6 - 3)
    torch.testing.assert_close(history.weights, torch.stack([1 + ahead, -ahead], 1).float(), rtol=1e-3, atol=1e-3)


def test_before_a_slope_is_fitted_it_is_damped_and_where_nothing_changes_it_is_none():
    r = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(3))
    history = stored("fitted", {1: r, 2: 2 * r})
    history.aim(3)
    torch.testing.assert_close(history.weights, torch.tensor([[1 + DAMPED, -DAMPED]]))
    entry = torch.zeros(1, 3, 4)
    for step in (3, 4, 5):
        history.store(entry + r, entry, step)
    assert torch.equal(forecast(history, 9), r)


@given(st.lists(st.integers(1, 60), min_size=3, max_size=3, unique=True), st.integers(1, 90))
def test_a_parabola_is_foretold_exactly(places, x):
    values = [2.0 - 0.3 * n + 0.02 * n * n for n in places]
    wanted = 2.0 - 0.3 * x + 0.02 * x * x
    got = sum(w * v for w, v in zip(parabola(x, places), values))
    assert got == pytest.approx(wanted, rel=1e-6, abs=1e-6 * max(map(abs, parabola(x, places))))


def test_quadratic_is_the_mean_of_line_and_parabola():
    base, slope, bend = torch.randn(3, 1, 3, 4, generator=torch.Generator().manual_seed(4)).unbind()
    at = {step: base + step * slope + step**2 * bend for step in (1, 2, 4, 6)}
    history = stored("quadratic", {step: at[step] for step in (1, 2, 4)})
    line = at[4] + (at[4] - at[2]) / 2 * 2
    torch.testing.assert_close(forecast(history, 6), (line + at[6]) / 2, rtol=1e-4, atol=1e-4)


def test_what_is_not_finite_shows():
    history = History("fitted")
    x = torch.zeros(1, 2, 3)
    assert history.store(x + 1, x, 1).isfinite()
    assert not history.store(x + float("inf"), x, 2).isfinite()


def run(pipe, config: AdaCacheConfig | None, prompts=("spin",), steps=14) -> tuple[np.ndarray, object]:
    handle = apply_adacache(pipe, config) if config else None
    frames = pipe(list(prompts), steps, generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))])
    if handle:
        handle.remove()
    return frames.frames, handle and handle.report()


@pytest.fixture(scope="module")
def pipe():
    return EmbeddedPipeline.load()


def test_fidelity_grows_and_memory_with_it(pipe):
    exact, _ = run(pipe, None, ("spin", "drift"), 40)
    errors, kept = [], []
    for name in ("none", "fitted", "quadratic"):
        config = AdaCacheConfig(schedule=DenseEarly(2.5), forecast=name)
        frames, report = run(pipe, config, ("spin", "drift"), 40)
        errors.append(float(((frames - exact) ** 2).mean()))
        kept.append(report.kept_bytes)
    assert errors[1] < errors[0] / 2 and errors[2] < errors[0] / 2
    assert kept[1] == 2 * kept[0] and kept[2] == 3 * kept[0]


@pytest.mark.parametrize("name", ("fitted", "quadratic"))
def test_each_video_its_own_as_if_it_were_alone(pipe, name):
    config = AdaCacheConfig(Codebook((0.05, 0.09, 0.2), (4, 3, 2, 1)), forecast=name, correct=True, per_video=True)
    together, report = run(pipe, config, ("still", "texture", "spin"))
    assert len({tuple(video.computed_steps) for video in report.videos}) > 1
    for i, prompt in enumerate(("still", "texture", "spin")):
        handle = apply_adacache(pipe, config)
        alone = pipe(prompt, 14, generator=torch.Generator().manual_seed(i)).frames
        handle.remove()
        assert handle.report().computed_steps == report.videos[i].computed_steps
        np.testing.assert_allclose(alone[0], together[i], atol=2e-5)


@pytest.mark.parametrize("name", ("latte", "wan"))
@pytest.mark.parametrize("calls", (1, 2))
def test_one_batch_and_two_calls_give_the_same(name, calls):
    config = dataclasses.replace(LISTED, forecast="fitted", correct=True)
    loop = Loop(name, calls, config, "cpu")
    video = loop(14)
    assert loop.handle.report().computed_steps == list(LISTED.schedule.steps)
    torch.testing.assert_close(video, Loop(name, 3 - calls, config, "cpu")(14), rtol=1e-4, atol=1e-4)


def test_a_break_begins_a_new_history(pipe):
    handle = apply_adacache(pipe, dataclasses.replace(LISTED, forecast="quadratic"))

    def break_once(module, args, output, calls=[]):  # noqa: B006
        calls.append(1)
        return output * float("nan") if len(calls) == 2 else output

    hook = pipe.transformer.transformer_blocks[-1].register_forward_hook(break_once)
    pipe("spin", 14, generator=torch.Generator().manual_seed(0))
    hook.remove()
    handle.remove()
    assert handle.report().computed_steps[:4] == [1, 2, 3, 4]


def test_only_the_stack_has_forecasts():
    with pytest.raises(ValueError, match="forecast: expected 'none' with granularity 'block', got 'fitted'"):
        dataclasses.replace(LISTED, forecast="fitted", granularity="block")
    with pytest.raises(ValueError, match="forecast: expected one of none, fitted, quadratic, got 'cubic'"):
        dataclasses.replace(LISTED, forecast="cubic")
    with pytest.raises(TypeError, match="correct: expected True or False, got 1"):
        dataclasses.replace(LISTED, correct=1)


@given(st.integers(1, 200), st.floats(1, 50), st.floats(0, 1), st.floats(1, 20))
def test_dense_early_has_the_wanted_number_at_growing_gaps(num_steps, speedup, warmup, growth):
    steps = DenseEarly(speedup, warmup, growth).for_run(num_steps)
    assert len(steps) == min(max(3, int(num_steps / speedup + 0.5)), num_steps)
    assert steps[0] == 1 and all(a < b for a, b in zip(steps, steps[1:])) and steps[-1] <= num_steps
    gaps = np.diff(steps)
    assert all(gaps[: min(2, len(gaps))] == 1)
    assert all(b >= a for a, b in zip(gaps, gaps[1:-1])), "but for the last one, as the end is dense again"


def test_dense_early_checks_its_numbers_and_goes_to_json_and_back():
    for kwargs, message in (
        (dict(speedup=0.5), "speedup: expected a finite number >= 1, got 0.5"),
        (dict(speedup=2, warmup=1.5), "warmup: expected a share of at most 1, got 1.5"),
        (dict(speedup=2, growth=0), "growth: expected a finite number >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            DenseEarly(**kwargs)
    config = AdaCacheConfig.for_speedup(2.5)
    assert AdaCacheConfig.from_json(config.to_json()) == config
    assert AdaCacheConfig.from_json(LISTED.to_json()) == LISTED


def test_the_default_is_dense_early_forecast_and_corrected(pipe):
    handle = apply_adacache(pipe)
    pipe("spin", 20, generator=torch.Generator().manual_seed(0))
    handle.remove()
    assert handle.config == AdaCacheConfig.for_speedup(2.5) and handle.config.correct
    assert handle.report().computed_steps == list(DenseEarly(2.5).for_run(20))
