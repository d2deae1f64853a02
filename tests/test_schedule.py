"""The decision rule against traces of the released one, and its behaviour at the edges."""

import json
import math
from pathlib import Path

import pytest
import torch
from doubles.literal import LiteralRule
from doubles.residuals import residual

from adacache_triton import AdaCacheConfig, Codebook, MotionRegularization, Schedule
from adacache_triton.kernels import residual_stats

TRACES = json.loads((Path(__file__).parent / "data/decisions.json").read_text())
by_dtype = {d: [t for t in TRACES if t["dtype"] == d] for d in ("float32", "bfloat16")}


def config_of(trace: dict) -> AdaCacheConfig:
    thresholds = [float(t) for t in trace["codebook"]][:-1]  # the released table ends with a threshold for "else"
    moreg, motion = trace["moreg"], None
    if moreg:
        names = {"strides": "frame_strides", "steps": "window"}
        motion = MotionRegularization(**{names.get(k, k): v for k, v in moreg.items()})
    return AdaCacheConfig(Codebook(thresholds, list(trace["codebook"].values())), motion)


def replay(trace: dict) -> list:
    """The records of the computed steps when our schedule, fed by our kernel's sums, decides."""
    config, old = config_of(trace), None
    schedule, shape = Schedule(config, trace["num_steps"]), trace["shape"]
    strides = config.motion.frame_strides if config.motion else ()
    for step in range(1, trace["num_steps"] + 1):
        if schedule.begin(step).computed:
            new = residual(trace, step).view(shape)
            sums = None if old is None else residual_stats(new, old, frame_strides=strides).sum(0).tolist()
            schedule.decide(sums)
            old = new
    return [s for s in schedule.steps if s.computed]


def replay_literally(trace: dict) -> LiteralRule:
    thresholds = [float(t) for t in trace["codebook"]][:-1]
    rule = LiteralRule(thresholds, list(trace["codebook"].values()), trace["moreg"], trace["num_steps"])
    for step in range(1, trace["num_steps"] + 1):
        if rule.computes(step):
            rule.decide(step, residual(trace, step), trace["shape"][2])
    return rule


def name(trace):
    return trace["name"]


@pytest.mark.parametrize("trace", by_dtype["float32"], ids=name)
def test_float32_traces_exactly(trace):
    steps = replay(trace)
    assert [(s.step, s.rate) for s in steps] == [(row["step"], row["rate"]) for row in trace["trace"]]
    for s, row in zip(steps[1:], trace["trace"][1:]):
        assert s.previous_rate == row["prev_rate"]
        assert s.distance == pytest.approx(row["distance"], rel=1e-5, abs=1e-5)
        if row["motion_scale"] is not None:
            assert s.motion_scale == pytest.approx(row["motion_scale"], rel=1e-4)


@pytest.mark.parametrize("trace", by_dtype["bfloat16"], ids=name)
def test_bfloat16_traces_but_for_the_released_rounding(trace):
    """The released rule rounds its scalars to bfloat16. Done so, literally, every rate of the trace follows;
    with sums in float32 a rate may differ, and then only because a threshold lies within that rounding."""
    literal = replay_literally(trace).trace
    assert [(row["step"], row["rate"]) for row in literal] == [(r["step"], r["rate"]) for r in trace["trace"]]
    scales = [1.0]
    for s, row, rounded in zip(replay(trace)[1:], trace["trace"][1:], literal[1:]):
        assert s.step == row["step"]
        assert s.distance == pytest.approx(row["distance"], rel=0.02)
        scales.append(s.motion_scale or 0.0)
        if s.rate != row["rate"]:
            low, high = sorted((s.regularized, rounded["seen"]))
            thresholds = config_of(trace).codebook.thresholds
            assert any(low <= t <= high or low <= bfloat16(t) <= high for t in thresholds)
            assert high - low <= rounding(s, trace["moreg"], scales[-2:])
            break  # from here on the two runs measure different steps


def bfloat16(value: float) -> float:
    return torch.tensor(value).bfloat16().item()


def rounding(s, moreg: dict | None, scales: list[float]) -> float:
    """What rounding each of a few scalars to eight significant bits can do to d * (M + |G|).

    The motion score is four roundings old when it is raised to its power, and G is a difference of two M.
    """
    bound = s.regularized * 2**-6
    if moreg:
        before, now = (scale * moreg["power"] * 2**-7 for scale in scales)
        bound += s.distance * (now + moreg["gradient_weight"] * (now + before) / s.previous_rate)
    return bound


def test_nine_bfloat16_traces_differ():
    """Otherwise the test above would never have looked at its reason."""
    differ = [t for t in by_dtype["bfloat16"] if [s.rate for s in replay(t)] != [r["rate"] for r in t["trace"]]]
    assert (len(differ), len(by_dtype["bfloat16"]), len(by_dtype["float32"])) == (9, 45, 45)


def run(schedule: Schedule, sums) -> list[int]:
    for step in range(1, schedule.num_steps + 1):
        if schedule.begin(step).computed:
            schedule.decide(None if step == 1 else sums)
    return [s.step for s in schedule.steps if s.computed]


CONFIG = AdaCacheConfig.official("open-sora-100")


def test_forced_steps():
    still = run(Schedule(CONFIG, 20), [0.0, 1.0])
    assert still == [1, 2, 14, 19, 20]
    assert run(Schedule(CONFIG, 3), [0.0, 1.0]) == [1, 2, 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_never_reused(bad):
    assert run(Schedule(CONFIG, 10), [bad, 1.0]) == list(range(1, 11))
    assert run(Schedule(CONFIG, 10), [1.0, bad]) == list(range(1, 11))
    assert run(Schedule(CONFIG, 10), [math.nan, math.nan]) == list(range(1, 11))
    assert run(Schedule(CONFIG, 10), [1.0, 0.0]) == list(range(1, 11)), "a zero residual has no relative change"
    moreg = AdaCacheConfig.official("open-sora-30-fast", moreg=True)
    assert run(Schedule(moreg, 10), [0.0, 1.0, bad, 1.0])[2:] == [8, 9, 10], "outside the window: not looked at"
    inside = Schedule(AdaCacheConfig(CONFIG.codebook, MotionRegularization((1, 10))), 10)
    assert run(inside, [0.0, 1.0, bad, 1.0]) == list(range(1, 11))


def test_a_step_without_a_measurement_is_followed_by_a_computed_one():
    schedule = Schedule(CONFIG, 10)
    assert [schedule.begin(step).computed for step in range(1, 11)] == [True] * 10


def test_motion_needs_a_pair_of_frames():
    """Videos shorter than every stride: M is 1, the distance stays."""
    config = AdaCacheConfig(CONFIG.codebook, MotionRegularization((1, 10), (1, 2)))
    schedule = Schedule(config, 10)
    schedule.begin(1)
    schedule.begin(2)
    schedule.decide([0.04, 1.0, 0.0, 0.0, 0.0, 0.0])
    assert (schedule.steps[-1].motion_scale, schedule.steps[-1].rate) == (1.0, 10)


def test_chosen_rate_divides_even_where_the_tail_cut_it_short():
    schedule = Schedule(CONFIG, 8)
    run(schedule, [0.0, 1.0])
    assert [(s.step, s.previous_rate) for s in schedule.steps if s.computed] == [(1, None), (2, 1), (7, 12), (8, 12)]


def test_misuse_is_named():
    with pytest.raises(ValueError, match="num_steps: expected at least 1, got 0"):
        Schedule(CONFIG, 0)
    schedule = Schedule(CONFIG, 9)
    schedule.begin(4)
    with pytest.raises(ValueError, match="step: expected one after 4, got 4"):
        schedule.begin(4)


def test_residuals_are_those_of_the_traces():
    """Guards the generator: a known value of a known trace."""
    trace = TRACES[0]
    first = residual(trace, 1)
    assert first.shape == (2, 24, 16) and first.dtype == torch.float32
    d = (residual(trace, 1) - residual(trace, 2)).abs().sum() / first.abs().sum()
    assert d.item() == pytest.approx(trace["trace"][1]["distance"], rel=1e-5)
