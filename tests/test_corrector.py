"""Correction of the latents: against the recursion written out, on runs that are right, and left alone elsewhere."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from adacache_triton import AdaCacheConfig, DenseEarly, FixedSchedule, apply_adacache
from adacache_triton.corrector import Correction
from adacache_triton.testbed.pipeline import EmbeddedPipeline

STEPS = 12
CONFIG = AdaCacheConfig(schedule=FixedSchedule((1, 2, 3, 6, 10), STEPS), forecast="fitted", correct=True)
LEVELS = [1.0, 0.9, 0.7, 0.6, 0.35, 0.2, 0.0]


def values(*shape: int, seed: int = 0) -> list[torch.Tensor]:
    return list(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def test_it_is_the_recursion_written_out():
    velocities, samples = values(6, 2, 3), values(6, 2, 3, seed=1)
    track, computed = Correction(), [True, False, False, True, False, True]
    changes = [
        track(v, x, (LEVELS[i], LEVELS[i + 1]), i + 1, c)
        for i, (v, x, c) in enumerate(zip(velocities, samples, computed))
    ]
    clean = [x - s * v for x, s, v in zip(samples, LEVELS, velocities)]
    for b, c in ((0, 3), (3, 5)):
        d = torch.zeros(2, 3, dtype=torch.float64)
        for m in range(b + 1, c):
            q = LEVELS[m + 1] / LEVELS[m]
            line = clean[b] + (m - b) / (c - b) * (clean[c] - clean[b])
            d = q * d + (1 - q) * (line - clean[m])
        torch.testing.assert_close(changes[c].double(), LEVELS[c + 1] / LEVELS[c] * d, rtol=1e-5, atol=1e-5)
    assert [change is None for change in changes] == [True, True, True, False, True, False]
    assert (changes[5] == 0).all(), "behind the last step nothing of an error is left"


def test_nothing_is_corrected_where_the_forecast_lay_on_the_line():
    track, (start, slope, x) = Correction(), values(3, 4)
    for i in range(6):
        clean = start + i * slope
        change = track((x - clean) / LEVELS[i], x, (LEVELS[i], LEVELS[i + 1]), i + 1, i in (0, 4))
        assert change is None or change.abs().max() < 1e-5


def test_a_gap_in_the_steps_or_another_shape_begins_anew():
    def after(changes, step):
        track = Correction()
        for i in range(3):
            track(torch.ones(4), torch.ones(4), (LEVELS[i], LEVELS[i + 1]), i + 1, i == 0)
        return track(*changes, (LEVELS[3], LEVELS[4]), step, True)

    same = torch.ones(4), torch.ones(4)
    assert after(same, 4) is not None
    assert after(same, 5) is None and after(same, 1) is None
    assert after((torch.ones(5), torch.ones(5)), 4) is None


@pytest.fixture(scope="module")
def pipe():
    return EmbeddedPipeline.load()


def run(pipe, config=None, prompt="spin", steps=STEPS) -> np.ndarray:
    handle = apply_adacache(pipe, config) if config else None
    frames = pipe(prompt, steps, generator=torch.Generator().manual_seed(3)).frames
    if handle:
        handle.remove()
    return frames


def error(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a - b) ** 2).mean())


def test_it_brings_the_video_nearer(pipe):
    exact = run(pipe, steps=40)
    for forecast in ("none", "fitted"):
        plain = AdaCacheConfig(schedule=DenseEarly(2.5), forecast=forecast)
        corrected = dataclasses.replace(plain, correct=True)
        assert error(run(pipe, corrected, steps=40), exact) < error(run(pipe, plain, steps=40), exact) / 1.5
    assert (run(pipe, steps=40) == exact).all(), "nothing is left behind"
    assert "step" not in vars(pipe.scheduler) and "set_timesteps" not in vars(pipe.scheduler)


def test_where_all_is_computed_nothing_changes(pipe):
    every = dataclasses.replace(CONFIG, schedule=FixedSchedule(tuple(range(1, STEPS + 1)), STEPS))
    assert (run(pipe, every) == run(pipe)).all()


def test_an_aborted_run_leaves_nothing(pipe):
    clean = run(pipe, CONFIG)
    handle = apply_adacache(pipe, CONFIG)

    def stop(module, args, output, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    hook = pipe.transformer.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        pipe("still", STEPS, generator=torch.Generator().manual_seed(9))
    hook.remove()
    again = pipe("spin", STEPS, generator=torch.Generator().manual_seed(3)).frames
    handle.remove()
    assert (again == clean).all()


@pytest.mark.parametrize("changes", (dict(stochastic_sampling=True), dict(invert_sigmas=True)))
def test_other_samplers_are_left_alone(pipe, changes):
    own = pipe.scheduler
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(own.config, **changes)

    def frames(config):
        torch.manual_seed(0)
        return run(pipe, config)

    try:
        assert (frames(CONFIG) == frames(dataclasses.replace(CONFIG, correct=False))).all()
    finally:
        pipe.scheduler = own
