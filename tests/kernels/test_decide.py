import json
import math
import sys
from pathlib import Path

import pytest
import torch
from doubles.residuals import residual
from hypothesis import given
from hypothesis import strategies as st

from adacache_triton import AdaCacheConfig, Codebook, MotionRegularization, Schedule
from adacache_triton.kernels import Motion, Rule, decide, initial_state, reference, residual_stats

from .kernel_views import BACKEND, DEVICE, repeatable, seeds

MODULE = sys.modules["adacache_triton.kernels.decide"]
TRACES = json.loads((Path(__file__).parents[1] / "data/decisions.json").read_text())
CODEBOOK = dict(thresholds=(0.03, 0.05, 0.07, 0.09, 0.11), rates=(12, 10, 8, 6, 4, 3))
NAN, INF = math.nan, math.inf


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float32, device=DEVICE)


def same(a, b):
    torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=0, equal_nan=True)


def decided(sums, state, rule):
    """The state after the decision: a repeat gives the same bits, and so does PyTorch, but for its roots and powers."""
    outcomes = []
    for backend in (BACKEND, BACKEND, "torch"):
        outcomes.append(state.clone())
        decide(sums, outcomes[-1], rule, backend=backend)
    same(outcomes[0], outcomes[1])
    if DEVICE == "cpu" and rule.metric == "l1" and (rule.motion is None or rule.motion.power % 1 == 0):
        same(outcomes[0], outcomes[2])
    return outcomes[0]


@pytest.mark.parametrize("trace", [t for t in TRACES if t["dtype"] == "float32"], ids=lambda trace: trace["name"])
def test_a_run_of_the_released_code(trace):
    """A whole run, in which nothing but the state says which steps are computed."""
    moreg, motion, strides = trace["moreg"], None, ()
    if moreg:
        names = ("scale", "power", "divisor", "gradient_weight")
        motion, strides = Motion(moreg["steps"], **{name: moreg[name] for name in names}), tuple(moreg["strides"])
    thresholds = [float(t) for t in trace["codebook"]][:-1]  # the released table ends with a threshold for "else"
    rule = Rule(trace["num_steps"], thresholds, list(trace["codebook"].values()), motion=motion)
    state, old, rows = initial_state(1, DEVICE), None, []
    for step in range(1, trace["num_steps"] + 1):
        if state[0, 0] == step:
            new, previous = residual(trace, step).view(trace["shape"]).to(DEVICE), state[0, 1].item()
            sums = residual_stats(new, old, frame_strides=strides)
            decide(sums, state, rule, backend=BACKEND)
            rows.append((step, previous, *state[0, 1:].tolist()))
            old = new
    assert [(step, rate) for step, _, rate, *_ in rows] == [(row["step"], row["rate"]) for row in trace["trace"]]
    for (_, previous, _, scale, distance), row in zip(rows[1:], trace["trace"][1:]):
        assert previous == row["prev_rate"]
        if moreg:
            assert scale == pytest.approx(row["motion_scale"], rel=1e-4)
        else:
            assert distance == pytest.approx(row["distance"], rel=1e-5, abs=1e-5)
    assert math.isnan(rows[0][-1]) and state[0, 0] == trace["num_steps"] + 1


finite = st.floats(2**-10, 2**10, width=32)
sizes = finite | st.sampled_from([0.0, 1.0, NAN, INF])
factors = st.floats(0, 1, width=32) | st.sampled_from([0.0, 0.04, 0.1, 1.0, NAN])
pairs = st.tuples(factors, sizes).map(lambda pair: [pair[0] * pair[1], pair[1]])  # a change and what it is relative to


@st.composite
def configs(draw):
    thresholds = sorted(draw(st.sets(st.floats(0.01, 0.9), max_size=4)))
    rates = draw(st.lists(st.integers(1, 9), min_size=len(thresholds) + 1, max_size=len(thresholds) + 1))
    motion = None
    if draw(st.booleans()):
        window = sorted(draw(st.tuples(st.integers(1, 12), st.integers(1, 12))))
        strides = tuple(range(1, draw(st.integers(1, 3)) + 1))
        numbers = (st.floats(0.1, 2), st.sampled_from([0, 1, 2, 2.5, 8]), st.floats(0.5, 2), st.floats(0, 20))
        motion = MotionRegularization(window, strides, *(draw(each) for each in numbers))
    return AdaCacheConfig(Codebook(thresholds, rates), motion)


def rule_of(config: AdaCacheConfig, num_steps: int) -> Rule:
    m = config.motion
    motion = Motion(m.window, m.scale, m.power, m.divisor, m.gradient_weight) if m else None
    return Rule(num_steps, config.codebook.thresholds, config.codebook.rates, motion=motion)


def rounding(record, previous_scale: float, weight: float) -> float:
    """What float32 may change in a regularised distance: G is a difference of two M, each of a power of up to 8."""
    scale = record.motion_scale or 0.0
    return 1e-5 * record.distance * (1 + scale + weight * (scale + previous_scale) / record.previous_rate)


@repeatable
@given(configs(), st.integers(3, 14), st.integers(1, 3), st.integers(1, 2), st.data())
def test_each_video_runs_as_its_schedule(config, num_steps, videos, branches, data):
    """Steps, rates, M and distance of whole runs, one schedule a video; [cond.., uncond..] where there are branches."""
    rule, state = rule_of(config, num_steps), initial_state(videos, DEVICE)
    schedules = {video: Schedule(config, num_steps) for video in range(videos)}
    measured = len(config.motion.frame_strides) if config.motion else 0
    strides = measured or data.draw(st.integers(0, 1))
    row = st.lists(pairs, min_size=1 + strides, max_size=1 + strides).map(lambda each: sum(each, []))
    while schedules:
        sums = tensor(data.draw(st.lists(row, min_size=videos * branches, max_size=videos * branches)))
        before, state = state, decided(sums, state, rule)
        joint = sums.view(branches, videos, -1).sum(0)
        for video, schedule in list(schedules.items()):
            step, last = int(before[video, 0]), schedule.steps[-1].step if schedule.steps else 0
            for skipped in range(last + 1, step):
                assert not schedule.begin(skipped).computed
            record, previous_scale = schedule.begin(step), before[video, 2].item()
            assert record.computed
            schedule.decide(joint[video, : 2 + 2 * measured].tolist() if step > 1 else None)
            following, rate, scale, distance = state[video].tolist()
            if step == num_steps:
                assert following == num_steps + 1
                del schedules[video]
            if step == 1:
                assert (following, rate, scale) == (2, 1, 1) and math.isnan(distance)
                continue
            if record.motion_scale is not None and math.isfinite(record.motion_scale):
                assert scale == pytest.approx(record.motion_scale, rel=1e-5, abs=1e-30)
            if not math.isfinite(record.regularized):
                assert rate == 1 and not math.isfinite(distance)
                continue
            off = rounding(record, previous_scale, config.motion.gradient_weight if config.motion else 0)
            assert abs(distance - record.regularized) <= off
            if all(abs(record.regularized - threshold) > off for threshold in config.codebook.thresholds):
                assert rate == record.rate
            else:  # a tie within rounding: from here on the two run apart
                schedules.pop(video, None)


def test_forced_steps_and_the_end_of_a_run():
    state, rule, steps = initial_state(1, DEVICE), Rule(20, **CODEBOOK), []
    for _ in range(6):
        steps.append(int(state[0, 0]))
        decide(tensor([[0.0, 1.0]]), state, rule, backend=BACKEND)
    assert steps == [1, 2, 14, 19, 20, 21]


def test_a_distance_on_a_threshold_takes_the_rate_above_it():
    state = decided(tensor([[0.5, 1.0], [0.25, 1.0]]), tensor([[5, 1, 1, NAN]] * 2), Rule(20, (0.25, 0.5), (4, 3, 2)))
    assert state[:, 1].tolist() == [2, 3]


def test_the_first_step_looks_at_nothing():
    """What is kept from the run before, in a captured graph say, is neither compared nor remembered."""
    rule = Rule(20, **CODEBOOK, motion=Motion((1, 20)))
    state = decided(tensor([[0.0, 1.0, 5.0, 1.0], [NAN, INF, NAN, 0.0]]), initial_state(2, DEVICE), rule)
    same(state, tensor([[2, 1, 1, NAN]] * 2))


@pytest.mark.parametrize("broken", [[NAN, 1], [-INF, 1], [INF, INF], [1, INF], [1, NAN], [0, 0], [1, 0]])
@pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
def test_what_is_not_finite_is_never_reused(metric, broken):
    good = {"l1": [0.0, 1.0], "l2": [0.0, 1.0], "cosine": [1.0, 1.0, 1.0]}[metric]
    rules = [Rule(50, (0.5,), (9, 5), metric=metric), Rule(50, budget=1, metric=metric)]
    bad = [*broken, 1.0][: len(good)]
    for rule in rules:
        state = decided(tensor([good, bad]), tensor([[5, 3, 1, NAN]] * 2), rule)
        assert state[:, 1].tolist() == [9 if rule.budget is None else 12, 1]
        assert state[0, 3] == 0 and not state[1, 3].isfinite()
        if not all(map(math.isfinite, bad)):
            joint = decided(tensor([good, bad]), tensor([[5, 3, 1, NAN]]), rule)
            assert joint[0, 0] == 6, "one broken sample breaks the decision that it is part of"
    if metric == "cosine":
        assert decided(tensor([[1, 1, INF]]), tensor([[5, 3, 1, NAN]]), rules[0])[0, 1] == 1


@pytest.mark.parametrize("motion_sums", [[NAN, 1.0], [INF, 1.0], [1.0, INF], [1.0, NAN]])
def test_broken_motion_counts_inside_the_window_only(motion_sums):
    rule = Rule(50, (0.5,), (9, 5), motion=Motion((5, 6)))
    state = decided(tensor([[0.1, 1.0, *motion_sums]] * 2), tensor([[5, 1, 1, NAN], [7, 1, 1, NAN]]), rule)
    assert state[:, 1].tolist() == [1, 9]
    after = decided(tensor([[0.1, 1.0, 0.385, 1.0]] * 2), state, rule)
    assert after[:, 1].tolist() == [1, 9], "M of the last comparison is not finite, so the gradient is not"
    assert decided(tensor([[0.1, 1.0, 0.385, 1.0]] * 2), after, rule)[:, 1].tolist() == [9, 9]


def test_strides_without_pairs_are_left_out():
    rule, state = Rule(50, (0.5,), (9, 5), motion=Motion((1, 50), power=1)), tensor([[5, 1, 1, NAN]] * 3)
    rows = [[0.0, 1.0, 0.77, 1.0, 0.0, 0.0], [0.0, 1.0, 0.77, 1.0, 0.385, 1.0], [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]]
    assert decided(tensor(rows), state, rule)[:, 2].tolist() == pytest.approx([2.0, 1.5, 1.0])


@pytest.mark.parametrize("power, accuracy", [(8, 1e-6), (1, 1e-6), (2, 1e-6), (13, 2e-6), (2.5, 1e-5), (0.3, 1e-5)])
def test_accuracy_of_the_motion_scale(power, accuracy):
    """Over all motion scores, still to restless, and more videos than one program decides on."""
    motion = torch.linspace(0, 1, 101).float()
    sums = torch.stack([motion * 0, motion * 0 + 1, motion, motion * 0 + 1], 1).to(DEVICE)
    state = decided(sums, tensor([[5, 1, 1, NAN]] * 101), Rule(50, **CODEBOOK, motion=Motion((1, 50), power=power)))
    expected = (motion.double() / 0.385) ** power
    torch.testing.assert_close(state[:, 2].double().cpu(), expected, rtol=accuracy, atol=1e-30)


@pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
@pytest.mark.parametrize("rate", [1.0, 3.0])
def test_distances(metric, rate):
    new, old = (torch.randn(3, 2, 4, 8, device=DEVICE, generator=generator(seed)) for seed in (0, 1))
    new = old + 0.3 * new
    n, o = new.double(), old.double()
    each = (1, 2, 3)
    distance = {
        "l1": (o - n).abs().sum(each) / o.abs().sum(each),
        "l2": ((o - n).square().sum(each) / o.square().sum(each)).sqrt(),
        "cosine": 1 - (o * n).sum(each) / (o.square().sum(each) * n.square().sum(each)).sqrt(),
    }[metric]
    sums = residual_stats(new, old, metric=metric)
    state = decided(sums, tensor([[5, rate, 1, NAN]] * 3), Rule(50, **CODEBOOK, metric=metric))
    torch.testing.assert_close(state[:, 3].double(), distance / rate, rtol=1e-5, atol=1e-6)


def generator(seed):
    return torch.Generator(DEVICE).manual_seed(seed)


@repeatable
@given(st.floats(2**-10, 8, width=32), st.integers(1, 20), st.floats(0, 8, width=32), st.sampled_from([1, 3]))
def test_budget(budget, max_rate, change, previous_rate):
    rule = Rule(50, budget=budget, max_rate=max_rate)
    state = decided(tensor([[change, 1.0]]), tensor([[5, previous_rate, 1, NAN]]), rule)
    per_step = change / previous_rate
    candidates = {budget / d if d else INF for d in (per_step * (1 - 1e-6), per_step, per_step * (1 + 1e-6))}
    assert state[0, 1].item() in {max(1, min(max_rate, math.floor(min(c, 100)))) for c in candidates}


@pytest.mark.parametrize("numbers", [dict(budget=0.3), CODEBOOK], ids=["budget", "codebook"])
def test_a_cosine_above_one_by_rounding_is_no_change(numbers):
    state = decided(tensor([[1.0000001, 1, 1]]), tensor([[5, 1, 1, NAN]]), Rule(50, **numbers, metric="cosine"))
    same(state, tensor([[17, 12, 1, 0]]))


@repeatable
@given(st.integers(1, 5), st.integers(1, 3), seeds)
def test_views_and_guards(videos, branches, seed):
    """Sums of any strides; nothing is written but the state."""
    samples = videos * branches
    values = torch.rand(samples, 4, device=DEVICE, generator=generator(seed))
    rule = Rule(50, **CODEBOOK, motion=Motion((1, 50)))
    expected = decided(values, tensor([[5, 2, 1, NAN]] * videos), rule)
    held = torch.full((6, 2 * samples + 3), NAN, device=DEVICE)
    view = held[1:5, 1 : 1 + 2 * samples : 2].T
    storage = torch.full((videos + 2, 4), -7.0, device=DEVICE)
    state = storage[1:-1]
    state.copy_(tensor([[5, 2, 1, NAN]] * videos))
    decide(view.copy_(values), state, rule, backend=BACKEND)
    same(state, expected)
    assert storage[0].eq(-7).all() and storage[-1].eq(-7).all()
    same(view, values)


def test_the_reference_reads_nothing():
    """A meta tensor has no value that a host could read."""
    for rule in (Rule(50, **CODEBOOK, motion=Motion((1, 50))), Rule(50, budget=1)):
        reference.decide(torch.empty(4, 6, device="meta"), torch.empty(2, 4, device="meta"), rule)


RULES = [Rule(20, **CODEBOOK), Rule(20, budget=0.5, metric="cosine", motion=Motion((2, 9), power=2.5))]


@pytest.mark.parametrize("rule", RULES, ids=["codebook", "budget"])
def test_compiled_without_breaks_and_recompiles(rule):
    columns = MODULE.METRICS[rule.metric] + 2

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(sums, state):
        decide(sums * 1, state, rule, backend=BACKEND)
        return state[:, 0] + 0

    state, expected = initial_state(2, DEVICE), initial_state(2, DEVICE)
    for i in range(6):
        sums = torch.rand(4, columns, device=DEVICE, generator=generator(i))
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            following = step(sums, state)
        decide(sums, expected, rule, backend=BACKEND)
        same(state, expected)
        same(following, expected[:, 0])


@pytest.mark.parametrize("rule", RULES, ids=["codebook", "budget"])
def test_operator(rule):
    sums = torch.rand(4, MODULE.METRICS[rule.metric] + 2, device=DEVICE)
    window, motion = ([2, 9], [0.385, 2.5, 1.0, 10.0]) if rule.motion else ([], [])
    numbers = (rule.num_steps, rule.thresholds, rule.rates, rule.budget, rule.max_rate, rule.metric, window, motion)
    torch.library.opcheck(MODULE._op, (sums, initial_state(2, DEVICE), *numbers, BACKEND))
    meta = initial_state(2, "meta")
    assert decide(sums.to("meta"), meta, rule) is None
    with pytest.raises(ValueError, match="decide: state has shape"):
        decide(sums.to("meta"), initial_state(3, "meta"), rule)


SUMS, STATE, RULE = torch.ones(4, 4), initial_state(2), Rule(20, **CODEBOOK)
MOREG, COSINE = Rule(20, **CODEBOOK, motion=Motion((1, 9))), Rule(20, **CODEBOOK, metric="cosine")
ERRORS = [
    ((SUMS, STATE, "l1"), {}, TypeError, "rule is of type str, expected Rule"),
    (([1.0], STATE, RULE), {}, TypeError, "sums is of type list, expected torch.Tensor"),
    ((SUMS.half(), STATE, RULE), {}, TypeError, "sums has dtype torch.float16, expected float32"),
    ((SUMS, STATE.double(), RULE), {}, TypeError, "state has dtype torch.float64, expected float32"),
    ((SUMS[0], STATE, RULE), {}, ValueError, "sums has shape (4,), expected two dimensions"),
    (
        (SUMS, STATE, COSINE),
        {},
        ValueError,
        "sums has 4 columns, expected 3 for 'cosine' and 2 for each frame stride, of which at least 0",
    ),
    (
        (SUMS[:, :2], STATE, MOREG),
        {},
        ValueError,
        "sums has 2 columns, expected 2 for 'l1' and 2 for each frame stride, of which at least 1",
    ),
    (
        (SUMS[:3], STATE, RULE),
        {},
        ValueError,
        "state has shape (2, 4), expected (V, 4) with V a divisor of 3 samples",
    ),
    (
        (SUMS, STATE[:, :3], RULE),
        {},
        ValueError,
        "state has shape (2, 3), expected (V, 4) with V a divisor of 4 samples",
    ),
    ((SUMS, STATE.to("meta"), RULE), {}, ValueError, "state is on meta, sums is on cpu; they must be equal"),
    ((SUMS, STATE.T.contiguous().T, RULE), {}, ValueError, "state has strides (1, 2), expected (4, 1)"),
    ((SUMS, STATE, RULE), {"backend": "gpu"}, ValueError, "backend is 'gpu', expected None, 'torch' or 'triton'"),
]


@pytest.mark.parametrize("args, options, kind, message", ERRORS, ids=[error[-1][:40] for error in ERRORS])
def test_errors_say_what_was_expected_and_what_came(args, options, kind, message):
    with pytest.raises(kind) as caught:
        decide(*args, **options)
    assert str(caught.value).startswith(f"decide: {message}")


MADE = [
    (lambda: Rule(2, **CODEBOOK), ValueError, "Rule: num_steps is 2, expected an integer >= 3"),
    (lambda: Rule(9.5, **CODEBOOK), TypeError, "Rule: num_steps is 9.5, expected an integer >= 3"),
    (lambda: Rule(9, 0.1, (2, 1)), TypeError, "Rule: thresholds is 0.1, expected a tuple"),
    (lambda: Rule(9, (0.2, 0.1), (3, 2, 1)), ValueError, "Rule: thresholds holds 0.1 after 0.2, expected ascending"),
    (lambda: Rule(9, (NAN,), (2, 1)), ValueError, "Rule: thresholds is nan, expected a finite number > 0"),
    (lambda: Rule(9, (0.1,), (2, 0)), ValueError, "Rule: rates is 0, expected an integer >= 1"),
    (lambda: Rule(9, (0.1,), (2,)), ValueError, "Rule: rates has 1 values, expected 2 (one a threshold, one for"),
    (lambda: Rule(9), ValueError, "Rule: rates has 0 values, expected 1 (one a threshold, one for larger distances), "),
    (lambda: Rule(9, (), (2,), budget=1), ValueError, "Rule: budget is 1 beside a codebook, expected one of the two"),
    (lambda: Rule(9, budget=0), ValueError, "Rule: budget is 0, expected a finite number > 0"),
    (lambda: Rule(9, budget=1e39), ValueError, "Rule: budget is 1e+39, expected a finite number > 0"),
    (lambda: Rule(9, budget=1, max_rate=True), TypeError, "Rule: max_rate is True, expected an integer >= 1"),
    (lambda: Rule(9, budget=1, metric="l3"), ValueError, "Rule: metric is 'l3', expected one of 'l1', 'l2', 'cosine'"),
    (lambda: Rule(9, budget=1, motion=(1, 9)), TypeError, "Rule: motion is (1, 9), expected a Motion or None"),
    (lambda: Motion((9, 1)), ValueError, "Motion: window is (9, 1), expected two steps (first, last) in order"),
    (lambda: Motion((0, 1)), ValueError, "Motion: window is 0, expected an integer >= 1"),
    (lambda: Motion(4), TypeError, "Motion: window is 4, expected a tuple"),
    (lambda: Motion((1, 9), scale=0), ValueError, "Motion: scale is 0, expected a finite number > 0"),
    (lambda: Motion((1, 9), power="8"), TypeError, "Motion: power is '8', expected a finite number >= 0"),
    (lambda: initial_state(0), ValueError, "initial_state: videos is 0, expected an integer >= 1"),
]


@pytest.mark.parametrize("make, kind, message", MADE, ids=[message for *_, message in MADE])
def test_what_cannot_be_a_rule_is_named(make, kind, message):
    with pytest.raises(kind) as caught:
        make()
    assert str(caught.value).startswith(message)


def test_a_rule_is_a_plain_value():
    lists = Rule(20, list(CODEBOOK["thresholds"]), list(CODEBOOK["rates"]))
    assert lists == RULE and hash(lists) == hash(RULE) and len({RULE, lists, MOREG}) == 2
