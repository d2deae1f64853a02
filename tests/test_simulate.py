"""The serving simulator against queueing theory, traces worked out by hand, and a real loop with given step times."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import simulate
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LatteTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from simulate import POLICIES, Cost, Costs, Link, Loop, Video, assumed, fitted, poisson, together

from adacache_triton import AdaCacheConfig, Codebook, Schedule
from adacache_triton.testbed.pipeline import EmbeddedPipeline
from adacache_triton.testbed.videos import SIZE

repeatable = settings(max_examples=30, derandomize=True, deadline=None, database=None)
COSTS = Costs("", "", compute=Cost(2.0, 8.0), reuse=Cost(0.5, 0.25), decide=Cost(0.125, 0.0625))
LINKED = replace(COSTS, link=Link(exchanges=6, exchanged=900.0, alpha=0.01, bandwidth=300.0, ranks=8))
CODEBOOK = Codebook((0.1, 0.2, 0.4), (5, 3, 2, 1))


def union(videos):
    return {step for video in videos for step in video.computed}


def serve(videos, arrivals, policy, costs=COSTS, joint=union, **where):
    return simulate.simulate(videos, arrivals, policy, costs, joint=joint, **where)


numbers = st.floats(0, 20)
videos = st.integers(1, 7).flatmap(
    lambda n: st.sets(st.integers(1, n), max_size=n).map(lambda steps: Video(n, sorted({1} | steps)))
)
same_length = st.sets(st.integers(1, 6)).map(lambda steps: Video(6, sorted({1} | steps)))
traces = st.lists(st.tuples(same_length, st.sampled_from([0.0, 1.0, 3.5, 20.0]) | st.floats(0, 60)), min_size=1)
prices = st.tuples(numbers, numbers).map(lambda pair: Cost(*pair))
all_costs = st.builds(Costs, st.just(""), st.just(""), prices, prices, prices, st.just(LINKED.link))


@repeatable
@given(traces, st.sampled_from(POLICIES), all_costs, st.integers(1, 4), st.integers(1, 3), st.sampled_from((1, 2, 8)))
def test_every_request_is_served_by_its_schedule(trace, policy, costs, limit, replicas, ranks):
    requests, arrivals = zip(*trace)
    served = serve(requests, arrivals, policy, costs, limit=limit, replicas=replicas, ranks=ranks)
    least = min(costs.compute(1, 8), costs.reuse(1, 8))
    for video, arrival, finish, computed in zip(requests, arrivals, served.finishes, served.computed):
        assert finish >= arrival + video.num_steps * least - 1e-9
        if policy == "joint":
            assert set(video.computed) <= set(computed) <= union(requests)
        else:
            assert computed == (list(range(1, 7)) if policy == "no cache" else video.computed)
    assert served == serve(requests, arrivals, policy, costs, limit=limit, replicas=replicas, ranks=ranks)


@repeatable
@given(videos, st.floats(0, 100), st.sampled_from(POLICIES), st.sampled_from((1, 2, 4)))
def test_one_request_takes_the_closed_form(video, arrival, policy, ranks):
    served = serve([video], [arrival], policy, LINKED, ranks=ranks)
    steps, computed = video.num_steps, len(video.computed)
    compute, decide = 2 + 8 / ranks, 0.125 + 0.0625 / ranks
    if ranks > 1:
        compute += 6 * 0.01 + 900 * (ranks - 1) / ranks**2 / 300
        decide += 2 * (0.01 + 64 / 300)
    seconds = steps * compute
    if policy != "no cache":
        seconds = computed * (compute + decide) + (steps - computed) * (0.5 + 0.25 / ranks)
    assert served.finishes[0] - arrival == pytest.approx(seconds)
    assert served.summary["throughput"] == pytest.approx(1 / seconds)


@repeatable
@given(traces, st.sampled_from(POLICIES), all_costs, st.integers(1, 3))
def test_one_at_a_time_no_request_waits_longer_for_more_gpus(trace, policy, costs, replicas):
    """True in one queue of servers without batches; a batch that forms by chance may be worth waiting for."""
    requests, arrivals = zip(*trace)
    free = replace(costs, link=replace(costs.link, alpha=0.0, bandwidth=math.inf))
    fewer = serve(requests, arrivals, policy, free, limit=1, replicas=replicas).finishes
    for more in (dict(replicas=replicas + 1), dict(replicas=replicas, ranks=2)):
        finishes = serve(requests, arrivals, policy, free, limit=1, **more).finishes
        assert all(a <= b * (1 + 1e-12) for a, b in zip(finishes, fewer))


@repeatable
@given(st.integers(1, 40), same_length, st.sampled_from(POLICIES), st.integers(1, 4), all_costs)
def test_a_backlog_is_served_faster_by_more_replicas(count, video, policy, limit, costs):
    def seconds(count, **where):
        return max(serve([video] * count, [0.0] * count, policy, costs, limit=limit, **where).finishes)

    by_replicas = [seconds(count, replicas=n) for n in (1, 2, 3, 4)]
    assert all(b <= a * (1 + 1e-12) for a, b in zip(by_replicas, by_replicas[1:]))
    assert seconds(4 * limit, replicas=4) == pytest.approx(seconds(limit))


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_the_wait_is_that_of_queueing_theory(load):
    """Poisson arrivals, one server, equal service times: Pollaczek and Khinchine's mean wait."""
    seconds, count = 10.0, 20_000
    arrivals = poisson(load / seconds, count, seed=3)
    latency = serve([Video(1, [1])] * count, arrivals, "no cache", limit=1).summary["latency_mean"]
    assert latency == pytest.approx(seconds * (1 + load / (2 * (1 - load))), rel=0.04)


def test_static_batches_wait_and_continuous_ones_do_not():
    """Two videos of three steps, the second computed in the first step only; it comes while the first runs."""
    lively, still = Video(3, [1, 2, 3]), Video(3, [1])
    compute, pair, reuse = 10.1875, 18.25, 0.75  # with a decision; two videos in one forward
    arrivals = [0.0, 1.0]
    assert serve([lively, still], arrivals, "no cache").finishes == [30, 60]
    assert serve([lively, still], arrivals, "joint").finishes == [3 * compute, 4 * compute + 2 * reuse]
    assert serve([lively, still], arrivals, "per video").finishes == [3 * compute, 4 * compute + 2 * reuse]
    second = compute + pair  # both compute
    third = second + compute + reuse  # a forward each
    assert serve([lively, still], arrivals, "continuous").finishes == [third, third + reuse]
    together = [0.0, 0.0]
    assert serve([lively, still], together, "joint").finishes == [3 * pair] * 2
    assert serve([lively, still], together, "per video").finishes == [pair + 2 * (compute + reuse)] * 2


def test_requests_go_to_the_emptiest_server_up_to_the_limit():
    video, arrivals = Video(1, [1]), [0.0] * 7
    served = serve([video] * 7, arrivals, "no cache", limit=2, replicas=3)
    assert sorted(served.finishes) == [18] * 6 + [28]
    served = serve([video] * 4, arrivals[:4], "no cache", limit=4, replicas=3)
    assert sorted(served.finishes) == [10, 10, 18, 18]


def test_percentiles_and_throughput():
    served = simulate.Served([1.0, 2.0, 3.0], [3.0, 6.0, 11.0], [[1], [1, 2], [1, 2, 3]])
    expected = {"throughput": 0.3, "latency_mean": 14 / 3, "latency_p50": 4, "latency_p95": 7.6, "computed": 2}
    assert served.summary == pytest.approx(expected)


def alone(codebook: Codebook, distances: list[float]) -> Video:
    """The run of a video whose distance at each step is given, by the decision rule itself."""
    schedule = Schedule(AdaCacheConfig(codebook), len(distances))
    for step, distance in enumerate(distances, 1):
        if schedule.begin(step).computed:
            rate = schedule.steps[-2].rate if step == 2 else None
            last = [s.rate for s in schedule.steps[:-1] if s.computed]
            schedule.decide((distance * (rate or last[-1]), 1.0) if last else None)
    records = [record for record in schedule.steps if record.computed]
    return Video(len(distances), [r.step for r in records], [r.regularized for r in records])


distances = st.lists(st.floats(0.01, 0.6), min_size=4, max_size=20)


@repeatable
@given(distances, st.integers(1, 3))
def test_equal_videos_decide_together_as_alone(seen, count):
    video = alone(CODEBOOK, seen)
    assert together([video] * count, CODEBOOK) == video.computed


def test_a_lively_video_keeps_a_still_one_computing():
    still, lively = alone(CODEBOOK, [0.05] * 20), alone(CODEBOOK, [0.5] * 20)
    assert still.computed == [1, 2, 7, 12, 17, 19, 20] and len(lively.computed) == 20
    assert together([still, lively], CODEBOOK) == [1, 2, *range(4, 19, 2), 19, 20]  # of the mean, 0.275
    with pytest.raises(ValueError, match=r"videos: expected equally many steps to decide together, got \[3, 20\]"):
        together([still, Video(3, [1, 2, 3], [None, 1.0, 1.0])], CODEBOOK)


def test_arrivals_are_repeatable():
    assert poisson(2.0, 50, seed=1) == poisson(2.0, 50, seed=1) != poisson(2.0, 50, seed=2)
    arrivals = poisson(4.0, 20_000)
    assert arrivals == sorted(arrivals) and arrivals[-1] == pytest.approx(5000, rel=0.03)


@repeatable
@given(st.floats(0, 10), st.floats(0, 10))
def test_a_line_is_fitted_exactly(base, slope):
    fit = Cost.fit([(n, base + slope * n) for n in (1, 2, 4)])
    assert [fit(n) for n in (1, 3, 8)] == pytest.approx([base + slope * n for n in (1, 3, 8)], abs=1e-9)
    assert fit(0) == 0


def test_rows_become_costs():
    rows = [("compute", n, 3.0 * n - 1 + noise) for n in (1, 2, 4) for noise in (-0.5, 0, 40)]
    rows += [("reuse", n, 1.0 / n) for n in (1, 2, 4)]  # cheaper with more videos: noise
    rows += [("decide", n, -0.1) for n in (1, 2, 4)]
    costs = fitted(rows, "name", "source")
    assert costs.compute(1) == pytest.approx(2) and costs.compute(4) == pytest.approx(11)
    assert costs.reuse.slope == 0 < costs.reuse.base < 1 and costs.decide(4) == 0
    assert Costs.from_dict(json.loads(json.dumps(simulate.asdict(costs)))) == costs
    assert Costs.from_dict(json.loads(json.dumps(simulate.asdict(LINKED)))) == LINKED


def test_the_assumed_costs_are_what_their_source_says():
    costs = assumed()
    assert all(part in costs.source for part in ("not measured", "13.0 PFLOP", "10.8 GB", "9.3 GB", "248 GB"))
    assert costs.compute(1) == pytest.approx(13.0e15 / 445e12, rel=5e-3)
    assert costs.link.exchanges == 320 and costs.link.exchanged == 320 * 2 * 75_600 * 5120
    # The Ulysses exchange of 8 ranks: each sends 7/8 of its eighth.
    communication = costs.step(1, 0, ranks=8, cached=False) - costs.compute(1, 8)
    assert communication == pytest.approx(320 * (20e-6 + 2 * 75_600 * 5120 * 7 / 64 / 360e9))


def test_mistakes_are_named():
    video = Video(2, [1, 2])
    for message, change in {
        "policy: expected one of no cache, joint, per video, continuous, got 'best'": dict(policy="best"),
        "arrivals: expected one for each of 1 videos, got 2": dict(arrivals=[0.0, 1.0]),
        "limit: expected at least 1, got 0": dict(limit=0),
        "replicas: expected at least 1, got 0": dict(replicas=0),
        "ranks: expected at most 1, got 2": dict(ranks=2),
    }.items():
        with pytest.raises(ValueError, match=message):
            serve(**dict(videos=[video], arrivals=[0.0], policy="joint") | change)
    with pytest.raises(ValueError, match="ranks: expected at most 8, got 16"):
        LINKED.step(1, 0, ranks=16)
    with pytest.raises(ValueError, match="link: expected None where a cost has a base below 0"):
        replace(LINKED, compute=Cost(-1.0, 2.0))
    for base, slope in ((-2.0, 1.0), (1.0, -0.5), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="Cost: expected slope >= 0 and base"):
            Cost(base, slope)


@pytest.fixture(scope="module")
def pipe():
    """The embedded model's class, small and random."""
    torch.manual_seed(0)
    width = dict(num_attention_heads=1, attention_head_dim=8, cross_attention_dim=8, norm_type="ada_norm_single")
    size = dict(in_channels=3, out_channels=3, caption_channels=8, sample_size=SIZE, patch_size=12, video_length=8)
    model = LatteTransformer3DModel(num_layers=1, **width, **size)
    return EmbeddedPipeline(model.eval(), FlowMatchEulerDiscreteScheduler())


class Timed(Loop):
    """The real loop; its steps take what the costs say."""

    def step(self, batch, handle=None):
        super().step(batch, handle)
        if handle is None:
            return COSTS.step(len(batch), 0, cached=False)
        if batch[0].session is None:
            return COSTS.step(len(batch), 0) if handle.current.computed else COSTS.step(0, len(batch))
        computing = sum(request.session.schedule.steps[-1].computed for request in batch)
        return COSTS.step(computing, len(batch) - computing)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_real_loop_serves_as_the_simulator_says(pipe, policy):
    loop = Timed(pipe, 12)
    _, runs = loop.serve([0.0] * 7, "continuous", Codebook((), (1,)), 1)
    distances = [distance for video in runs for distance in video.distances[1:]]
    codebook = Codebook(tuple(np.quantile(distances, [0.3, 0.6])), (3, 2, 1))
    _, videos = loop.serve([0.0] * 7, "continuous", codebook, 1)
    assert len({tuple(video.computed) for video in videos}) >= 3, "else no batch is split"
    for arrivals in ([0.0] * 7, [0.0, 1.0, 2.0, 50.0, 51.0, 400.0, 401.0], poisson(0.02, 7)):
        served, runs = loop.serve(arrivals, policy, codebook, 3)
        decided = dict(zip(map(id, videos), served.computed))  # by the real batches
        expected = serve(videos, arrivals, policy, joint=lambda batch, by=decided: by[id(batch[0])], limit=3)
        assert served.computed == expected.computed and served.finishes == pytest.approx(expected.finishes)
        assert len(runs) == (0 if policy == "no cache" else 7)


def test_check_and_sweep(pipe, tmp_path):
    kept, rows = simulate.check(pipe, requests=3, rounds=1, num_steps=6, limit=2, load=2.0)
    assert [(row["trace"], row["policy"]) for row in rows] == [
        (trace, policy) for trace in ("all at once", "load 2.0") for policy in POLICIES
    ]
    for row in rows:
        assert all(float(value) > 0 for key, value in row.items() if key.startswith("latency") and "error" not in key)
        error = float(row["throughput_predicted"]) / float(row["throughput"]) - 1
        assert float(row["throughput_error"].rstrip("%")) / 100 == pytest.approx(error, abs=2e-3)
        assert row["policy"] == "joint" or row["computed"] == row["computed_predicted"]
    kept = json.loads(json.dumps(kept, allow_nan=False))
    rows = simulate.sweep(kept, limit=2, loads=[0.5], seed=0, gpus=(1, 2))
    assert len(rows) == (2 + 3) * 2 * 6  # arrangements, traces, policies and limits
    assert {(row["gpus"], row["replicas"], row["ranks"]) for row in rows} == {(1, 1, 1), (2, 2, 1), (2, 1, 2)}
    simulate.write(tmp_path / "rows.csv", rows)
    with (tmp_path / "rows.csv").open() as file:
        assert [row["policy"] for row in csv.DictReader(file)] == [row["policy"] for row in rows]
    lines = simulate.overview(rows).splitlines()
    assert len(lines) == 1 + 5 * 2 and all(len(line) == len(lines[0]) for line in lines)
    # The cache's share is the schedules', whatever the number of GPUs.
    full = [row for row in rows if (row["costs"], row["trace"], row["limit"]) == (assumed().name, "all at once", 1)]
    gain = [float(b["throughput"]) / float(a["throughput"]) for a, b in zip(full[::2], full[1::2])]
    computed = np.mean([len(video["computed"]) for video in kept["videos"]])
    assert gain == pytest.approx([6 / computed] * 3, rel=0.1)
