"""Schedules as data: a list of computed steps, kept to whatever the video does."""

import dataclasses

import pytest
import torch
from tiny_pipelines import PIPELINES

from adacache_triton import AdaCacheConfig, Codebook, FixedSchedule, MotionRegularization, apply_adacache
from adacache_triton.testbed.pipeline import EmbeddedPipeline

STEPS = 8
LISTED = FixedSchedule((1, 2, 5), STEPS)
CONFIG = AdaCacheConfig(schedule=LISTED)


@pytest.fixture(scope="module")
def pipe():
    return EmbeddedPipeline.load()


@pytest.fixture
def cached(pipe):
    handles = []

    def apply(config=CONFIG, **kwargs):
        handles.append(apply_adacache(pipe, config, **kwargs))
        return handles[-1]

    yield apply
    for handle in handles:
        handle.remove()


def run(pipe, prompt="still", **kwargs) -> torch.Tensor:
    return pipe(prompt, STEPS, generator=torch.Generator().manual_seed(0), **kwargs).frames


def test_it_is_kept_to(pipe, cached):
    handle = cached()
    run(pipe)
    report = handle.report()
    assert report.computed_steps == list(LISTED.steps)
    assert [s.reason for s in report.steps] == ["first", "listed", *["reused"] * 2, "listed", *["reused"] * 3]
    assert not any(s.distance for s in report.steps)


def test_it_gives_the_video_of_a_codebook_with_the_same_steps(pipe, cached):
    handle = cached(AdaCacheConfig(Codebook((1e6,), (3, 1))))
    frames = run(pipe)
    computed = handle.report().computed_steps
    handle.remove()
    cached(AdaCacheConfig(schedule=FixedSchedule(tuple(computed), STEPS)))
    assert (run(pipe) == frames).all()


def test_nothing_is_measured_and_no_probe_kept(pipe, cached, monkeypatch):
    handle = cached(AdaCacheConfig(Codebook((1e6,), (3, 1))))
    run(pipe)
    with_probe = handle.report().kept_bytes
    handle.remove()
    monkeypatch.setattr("adacache_triton.batch.residual_stats", None)
    handle = cached()
    run(pipe)
    assert 2 * handle.report().kept_bytes == with_probe


def test_what_is_not_finite_is_not_reused(pipe, cached):
    handle = cached()

    def break_third(module, args, output, calls=[]):  # noqa: B006
        calls.append(1)
        return output * float("nan") if len(calls) == 2 else output

    hook = pipe.transformer.transformer_blocks[-1].register_forward_hook(break_third)
    run(pipe)
    hook.remove()
    assert handle.report().computed_steps[:3] == [1, 2, 3] and handle.report().steps[2].reason == "restart"


def test_another_number_of_steps_is_refused(pipe, cached):
    cached(AdaCacheConfig(schedule=FixedSchedule((1, 4), 9)))
    with pytest.raises(ValueError, match="config.schedule.num_steps: expected 8, the steps of the run, got 9"):
        run(pipe)


@pytest.mark.filterwarnings("ignore")
def test_two_transformers_share_a_list():
    """The second one's first step is computed, listed or not: it keeps nothing yet."""
    pipe, arguments = PIPELINES["wan_2_2"].make(STEPS)
    pipe.set_progress_bar_config(disable=True)
    handle = apply_adacache(pipe, AdaCacheConfig(schedule=FixedSchedule((1, 2, 7), STEPS)))
    pipe(**arguments)
    records = handle.report().steps
    assert [s.step for s in records if s.computed] == [1, 2, 4, 7] and records[3].reason == "first"


def test_a_serving_loop(pipe):
    handle = apply_adacache(pipe.transformer, dataclasses.replace(CONFIG, per_video=True))
    try:
        assert handle.session(STEPS).schedule.config.schedule is LISTED
        with pytest.raises(ValueError, match="config.schedule.num_steps: expected 9"):
            handle.session(9)
    finally:
        handle.remove()


def test_json():
    assert AdaCacheConfig.from_json(CONFIG.to_json()) == CONFIG


@pytest.mark.parametrize(
    "arguments, message",
    [
        (((), 8), r"steps: expected 1 as the first, got \(\)"),
        (((2, 3), 8), r"steps: expected 1 as the first, got \(2, 3\)"),
        (((1, 3, 3), 8), "steps: expected ascending values, got 3 after 3"),
        (((1, 9), 8), "num_steps: expected an integer >= 9, got 8"),
    ],
)
def test_bad_lists(arguments, message):
    with pytest.raises(ValueError, match=message):
        FixedSchedule(*arguments)


def test_a_codebook_or_a_list():
    with pytest.raises(ValueError, match="codebook: expected None with a schedule"):
        AdaCacheConfig(Codebook((0.1,), (2, 1)), schedule=LISTED)
    with pytest.raises(ValueError, match="motion: expected None with a schedule"):
        AdaCacheConfig(motion=MotionRegularization((1, 2)), schedule=LISTED)
    with pytest.raises(TypeError, match="codebook: expected a Codebook, got None"):
        AdaCacheConfig()
    with pytest.raises(TypeError, match="schedule: expected a FixedSchedule, a DenseEarly or None"):
        AdaCacheConfig(schedule=(1, 2))
