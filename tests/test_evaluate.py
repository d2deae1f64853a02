"""The evaluation: its measures, its count of work, its rows and what is made of them."""

import csv

import evaluate
import evaluate_methods as known
import evaluate_tables as tables
import numpy as np
import pytest
import video_metrics as metrics

from adacache_triton import AdaCacheConfig, DenseEarly, FixedSchedule

PLAIN = known.Method("fewer steps", "2", known.nothing, 2)


@pytest.fixture
def short(monkeypatch):
    """Runs of few steps."""
    for module in (evaluate, known):
        monkeypatch.setattr(module, "STEPS", 4)
    real = known.make_video
    monkeypatch.setattr(known, "make_video", lambda pipe, prompt, seed, steps: real(pipe, prompt, seed, min(steps, 4)))


@pytest.fixture
def bench(short, tmp_path):
    return evaluate.Bench("latte", tmp_path / "rows.csv")


def ours(name: str, steps) -> known.Method:
    return known.Method(name, str(len(steps)), known.ours(AdaCacheConfig(schedule=FixedSchedule(tuple(steps), 4))))


def test_measures_against_values_by_hand():
    black, gray = np.zeros((2, 8, 8, 3)), np.full((2, 8, 8, 3), 0.1)
    assert metrics.psnr(black, gray) == pytest.approx(20)
    assert metrics.psnr(gray, gray) == 80 and metrics.psnr(gray, np.full_like(gray, np.nan)) == 0
    assert metrics.ssim(gray, gray) == pytest.approx(1) and metrics.gmsd(gray, gray) == 0
    one_frame = black.copy()
    one_frame[1] = 0.1
    assert metrics.flicker(black, gray) == 0 and metrics.flicker(black, one_frame) == pytest.approx(100)


def test_gmsd_of_an_edge_that_is_gone():
    edge = np.zeros((1, 4, 8, 3))
    edge[..., 4:, :] = 1
    # The Prewitt filter sees a gradient of 1 in the two columns beside the edge, a quarter of the picture.
    low = metrics.GMSD_C / (1 + metrics.GMSD_C)
    assert metrics.gmsd(edge, np.zeros_like(edge)) == pytest.approx((1 - low) * np.sqrt(0.25 * 0.75))


def test_work_is_counted_in_block_stacks(bench):
    _, _, whole, _ = bench.make("drift", 0, known.Method("", "", known.nothing, 4))
    for method, own in ((PLAIN, []), (ours("ours", (1, 3)), [1, 3]), (ours("ours", (1, 2, 3, 4)), [1, 2, 3, 4])):
        _, seconds, work, steps = bench.make("drift", 0, method)
        assert work * 4 == whole * (len(own) or 2) and seconds > 0 and steps == own


def test_rows_are_kept_and_not_run_again(bench, monkeypatch):
    monkeypatch.setattr(type(bench.pipe), "CLASSES", ("still",) * 3)
    bench.run([PLAIN, ours("ours", (1, 3))], range(2), float("inf"))
    rows = list(csv.DictReader(bench.path.open()))
    order = [(row["seed"], row["class"], row["method"]) for row in rows]
    assert order == [(seed, "still", name) for seed in "01" for name in ("fewer steps", "ours")]
    assert rows == bench.rows and rows[1]["schedule"] == "1 3" and float(rows[1]["computed"]) == 2
    again = evaluate.Bench("latte", bench.path)
    monkeypatch.setattr(again, "make", None)  # nothing is made
    again.run([PLAIN, ours("ours", (1, 3))], range(2), float("inf"))
    again.run([ours("late", (1, 2))], range(2), 0.0)
    assert list(csv.DictReader(bench.path.open())) == rows


def test_what_fails_gets_one_row_and_leaves_nothing(bench, monkeypatch):
    monkeypatch.setattr(type(bench.pipe), "CLASSES", ("still", "drift", "drift"))

    def broken(pipe):
        pipe.transformer.proj_out.weight.data.zero_()
        raise ValueError("cannot\nat all")

    bench.run([known.Method("diffusers broken", "1", broken), PLAIN], range(1), float("inf"))
    errors = [row for row in bench.rows if row["error"]]
    assert [(row["error"], row["computed"]) for row in errors] == [("ValueError: cannot", "")]
    assert len(bench.rows) == 1 + 2


def test_controls_deal_schedules_of_other_classes():
    rows = [
        {"class": label, "seed": str(seed), "schedule": f"1 {10 * (i + 1)} {10 * (i + 1) + seed}"}
        for seed in (5, 6)
        for i, label in enumerate("cab")
    ]
    mean, dealt = known.controls(rows, "rule", "x")
    assert (mean.name, dealt.name, mean.setting) == ("rule: mean schedule", "rule: schedules dealt", "x")
    seen = []

    class Pipe:
        pass

    def watched(config):
        return lambda pipe: seen.append((pipe.video, config.schedule.steps))

    real, known.ours = known.ours, watched
    try:
        for label in "abc":
            for seed in (5, 6):
                pipe = Pipe()
                pipe.video = label, seed
                dealt.put(pipe)
    finally:
        known.ours = real
    own = {(row["class"], int(row["seed"])): row["schedule"] for row in rows}
    given = [" ".join(map(str, steps)) for _, steps in seen]
    assert sorted(given) == sorted(own.values())
    for (video, steps), text in zip(seen, given):
        assert steps[0] == 1 and all(own[video[0], seed] != text for seed in (5, 6))


@pytest.mark.parametrize("model", ["latte", "wan"])
def test_methods_are_distinct_and_span_the_speed_ups(model):
    methods = known.methods(model)
    keys = [(m.name, m.setting) for m in methods]
    assert len(set(keys)) == len(keys) > 60
    assert {m.name for m in methods if m.name.startswith(known.PEERS)} >= {
        "diffusers FirstBlockCache", "diffusers TaylorSeer", "diffusers MagCache", "diffusers SeaCache",
        "diffusers PAB", "diffusers FasterCache", "cache-dit DBCache", "cache-dit DBCache + TaylorSeer",
    }  # fmt: skip
    assert all(len(DenseEarly(50 / n).for_run(50)) == n for n in known.COUNTS)


@pytest.mark.parametrize("model", ["latte", "wan"])
def test_every_peer_runs_or_gets_its_error_row(model, short, tmp_path, monkeypatch):
    bench = evaluate.Bench(model, tmp_path / "rows.csv")
    one_each = {m.name: m for m in known.peers(model)}
    if not evaluate.find_spec("cache_dit"):
        one_each = {name: m for name, m in one_each.items() if not name.startswith("cache-dit")}
    label = bench.pipe.CLASSES[2]
    monkeypatch.setattr(type(bench.pipe), "CLASSES", (label,) * 3)
    bench.run(list(one_each.values()), range(1), float("inf"))  # it checks the uncached video again at the end
    assert [row["method"] for row in bench.rows] == list(one_each)
    for row in bench.rows:
        assert bool(row["error"]) != bool(row["computed"])
    if model == "wan":
        failed = {row["method"] for row in bench.rows if row["error"]}
        assert failed <= {"diffusers FasterCache"}


def made(method: str, setting: str, computed: float, psnrs, seconds: float = 1.0, **more) -> list[dict]:
    return [
        dict.fromkeys(evaluate.COLUMNS, "")
        | dict(method=method, setting=setting, seed=str(i), computed=str(computed), psnr=str(value), ssim="1", gmsd="0")
        | dict(seconds=str(seconds), seconds_uncached="4", flicker="0", device="cpu", torch="2", diffusers="0")
        | {"class": "drift" if i % 2 else "still"}
        | more
        for i, value in enumerate(psnrs)
    ]


def test_points_are_interpolated_and_never_extrapolated():
    rows = made("peer", "a", 25, [40, 42]) + made("peer", "b", 12.5, [30, 36])
    (curve,) = tables.curves(rows)["peer"]
    np.testing.assert_allclose(curve.x, [2, 4])
    np.testing.assert_allclose(np.sort(curve.at(2)), [40, 42])
    np.testing.assert_allclose(np.sort(curve.at(8**0.5)), [35, 39])  # half way in the logarithm
    assert curve.at(1.5) is None and curve.at(5) is None
    two = tables.curves(
        made("AdaCache official", "fast x 1", 25, [40, 40]) + made("AdaCache official", "slow x 1", 25, [41, 41])
    )["AdaCache official"]
    assert len(two) == 2 and tables.best(two, 2).mean() == 41 and tables.best(two, 3) is None


def test_intervals():
    assert tables.interval(np.full(20, 30.0)) == 0 and tables.cell(None) == ""
    values = np.random.default_rng(1).normal(40, 3, 200)
    assert tables.interval(values) == pytest.approx(1.96 * values.std() / 200**0.5, rel=0.1)
    assert tables.interval(values) == tables.interval(values)


def test_tables_of_made_rows(monkeypatch, tmp_path):
    rows = []
    for n, psnr in ((33, 60), (25, 55), (17, 50), (12, 45), (10, 40)):
        rows += made("ours, calibrated", str(n), n, [psnr, psnr + 2, psnr, psnr + 2], seconds=n / 10)
        rows += made("AdaCache official", f"fast x {n}", n, [psnr - 10, psnr - 8, psnr - 10, psnr - 8], schedule="1 2")
        rows += made("diffusers FirstBlockCache", str(n), n, [psnr - 5] * 4, seconds=n / 10)
    rows += made("diffusers SeaCache", "1", 50, [80] * 4, seconds=4)
    rows += made("AdaCache official: mean schedule", "fast x 17", 17, [41, 43, 41, 43])
    rows += made("diffusers MagCache", "1", "", [""], error="RuntimeError: shapes")
    monkeypatch.setattr(tables, "load", lambda model: rows if model == "latte" else [])
    text = tables.table("latte")
    assert {line.count("|") for line in text.splitlines()} == {7}
    assert "| ours, calibrated | 61.0 ± 1.0 |" in text
    assert "| diffusers MagCache | does not run: RuntimeError: shapes |" in text
    assert "| diffusers SeaCache | runs, but computes every step |" in text
    compared = tables.comparison("latte").splitlines()
    assert "+10.0 ± 0.0 | +10.0 ± 0.0" in next(line for line in compared if "AdaCache official" in line)
    assert "+6.0 ± 1.0" in next(line for line in compared if "same measured speed" in line)
    page = tables.page()
    assert "-1.00 ± 0.00" in page and "### Computed steps" in page
    assert tables.readme().startswith("\n**Latte**")
    tables.picture(tmp_path / "evaluate.png")
    assert (tmp_path / "evaluate.png").stat().st_size > 10000


def test_the_oracle_finds_the_list_that_scores_best():
    score = lambda config: -sum(config.schedule.steps)  # noqa: E731
    start = sum(DenseEarly(50 / 12).for_run(50))
    found = known.oracle("none", 12, score, 10)
    assert found.correct and len(found.schedule.steps) == 12 and sum(found.schedule.steps) < start
