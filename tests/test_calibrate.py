"""Calibration: the search, what it keeps, how that is loaded, and the warning where it is used elsewhere."""

import dataclasses
import json
import time
import warnings

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from adacache_triton import AdaCacheConfig, FixedSchedule, apply_adacache
from adacache_triton.calibrate import BEST, CalibratedPoint, Calibration, calibrate, psnr_of, resized, search, worth
from adacache_triton.cli import main
from adacache_triton.config import DenseEarly, MadeFor
from adacache_triton.testbed.pipeline import EmbeddedPipeline

HERE = MadeFor("LatteTransformer3DModel", 8, "FlowMatchEulerDiscreteScheduler", 20, (3, 8, 24, 24))


def point(count: int, psnr: float) -> CalibratedPoint:
    return CalibratedPoint(tuple(range(1, count + 1)), psnr, 1.0, psnr - 5, 20 / count, 20 / count - 0.1)


FOUND = Calibration(HERE, "fitted", True, (point(10, 50.0), point(5, 40.0), point(4, 33.0)))


def distance(best):
    return lambda steps: -sum(abs(a - b) for a, b in zip(steps, best))


def test_the_search_finds_its_way_and_asks_never_twice():
    best, asked = (1, 2, 4, 9, 17, 18, 30, 41), []

    def score(steps):
        asked.append(steps)
        return distance(best)(steps)

    start = DenseEarly(50 / 8).for_run(50)
    found = search(score, 50, [start], 400)
    assert found == best
    assert len(set(asked)) == len(asked) and all(steps[0] == 1 and steps[-1] <= 50 for steps in asked)
    assert search(distance(best), 50, [start], 60, seed=3) == search(distance(best), 50, [start], 60, seed=3)
    asked.clear()
    search(score, 50, [start], 7)
    assert len(asked) == 7


def test_the_search_stops_at_its_deadline_with_something():
    start = DenseEarly(5).for_run(50)
    assert search(distance(start), 50, [start], 100, deadline=time.monotonic() - 1) == start


@pytest.mark.parametrize("count", (3, 9, 10, 11, 33))
def test_a_list_of_another_size_has_its_shape(count):
    steps = resized((1, 2, 3, 5, 9, 14, 20, 27, 36, 47), 50, count)
    assert len(steps) == count and steps[0] == 1 and steps[-1] >= 47
    assert all(a < b for a, b in zip(steps, steps[1:]))


def test_a_broken_video_weighs_more_than_its_share():
    assert worth([40, 40, 40, 40]) > worth([46, 46, 46, 24])
    video = np.zeros((2, 4, 4, 3), np.float32)
    assert psnr_of(video, video) == BEST and psnr_of(video, video + 0.1) == pytest.approx(20, abs=1e-4)
    assert psnr_of(video, video * np.nan) == 0


def made_run(best: dict[int, tuple[int, ...]]):
    """Videos whose error is how far a schedule is from the best of its length."""

    def run(config, held_out):
        frames = np.full((2, 4, 4, 3), 0.5, np.float32)
        if config is None:
            return [frames] * 2, 20.0
        steps = config.schedule.steps
        error = 0.001 + 0.01 * -distance(best[len(steps)])(steps)
        return [frames + error, frames - error], float(len(steps))

    return run


def test_calibrate_finds_measures_and_keeps():
    best = {7: (1, 2, 3, 6, 9, 13, 17), 5: (1, 2, 4, 8, 15)}
    shares = []
    progress = lambda what, share: shares.append(share)  # noqa: E731
    found = calibrate(made_run(best), HERE, [3, 4], evaluations=120, on_progress=progress)
    assert [p.steps for p in found.points] == [best[7], best[5]]
    assert [p.speedup_seconds for p in found.points] == [round(20 / 7, 4), 4.0]
    assert found.points[0].psnr == pytest.approx(60, abs=0.01) and found.made_for == HERE
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1
    with pytest.raises(ValueError, match="speedups: expected at least one, got none"):
        calibrate(made_run(best), HERE, [])


def test_it_goes_to_a_file_and_back(tmp_path):
    FOUND.save(tmp_path / "latte.json")
    assert Calibration.load(tmp_path / "latte.json") == FOUND
    config = AdaCacheConfig.for_speedup(2, tmp_path / "latte.json")
    assert config == FOUND.for_speedup(2) and config.schedule.made_for == HERE
    assert AdaCacheConfig.from_json(config.to_json()) == config
    data = json.loads(FOUND.to_json())
    for change, message in (
        ({"points": []}, "points: expected at least one, got none"),
        ({"speed": 1}, "Calibration: unknown field 'speed'"),
        ({"made_for": {"transformer": "Wan"}}, "MadeFor: field 'blocks' is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            Calibration.from_json(json.dumps(data | change))
    with pytest.raises(ValueError, match="Calibration: not valid JSON"):
        Calibration.from_json("{")
    with pytest.raises(TypeError, match="calibration: expected a Calibration or the path of its file, got 3"):
        AdaCacheConfig.for_speedup(2, 3)


def test_a_point_is_chosen_by_speed_or_quality():
    assert FOUND.for_speedup(2.1).schedule.steps == FOUND.points[0].steps
    assert FOUND.for_speedup(4.1).forecast == "fitted" and FOUND.for_speedup(4.1).correct
    with pytest.raises(ValueError, match=r"speedup: expected one within 10 % of those calibrated \(2.00, 4.00, 5.00\)"):
        FOUND.for_speedup(3)
    assert AdaCacheConfig.for_quality(39, FOUND).schedule.steps == FOUND.points[1].steps
    with pytest.raises(ValueError, match="psnr: expected at most 49.0 dB, which the calibration reached, got 49.5"):
        FOUND.for_quality(49.5)


@pytest.fixture(scope="module")
def pipe():
    return EmbeddedPipeline.load()


def messages(pipe, made_for: MadeFor) -> list[str]:
    config = AdaCacheConfig(schedule=FixedSchedule((1, 2, 3, 10), made_for.num_steps, made_for))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        handle = apply_adacache(pipe, config)
        try:
            for _ in range(2):
                pipe("still", 20, generator=torch.Generator().manual_seed(0))
        finally:
            handle.remove()
    return [str(w.message) for w in seen if "calibrated elsewhere" in str(w.message)]


def test_it_warns_where_it_is_used_elsewhere(pipe):
    assert not messages(pipe, HERE)
    (message,) = messages(pipe, dataclasses.replace(HERE, transformer="Wan", blocks=6))
    assert "transformer LatteTransformer3DModel instead of Wan, blocks 8 instead of 6" in message
    assert "adacache-triton calibrate" in message
    (message, *_) = messages(pipe, dataclasses.replace(HERE, scheduler="UniPC"))
    assert f"scheduler {FlowMatchEulerDiscreteScheduler.__name__} instead of UniPC" in message
    (message,) = messages(pipe, dataclasses.replace(HERE, latents=(3, 8, 32, 32)))
    assert "latents (3, 8, 24, 24) instead of (3, 8, 32, 32)" in message
    with pytest.raises(ValueError, match="config.schedule.num_steps: expected 20, the steps of the run, got 30"):
        messages(pipe, dataclasses.replace(HERE, num_steps=30))


def test_the_command(pipe, tmp_path, capsys):
    out = tmp_path / "latte.json"
    options = "--steps 6 --speedup 1.5 2 --evaluations 1 --prompt still drift --batch 2 --device cpu"
    assert main(["calibrate", *options.split(), "--out", str(out)]) == 0
    found = Calibration.load(out)
    assert [len(p.steps) for p in found.points] == [4, 3]
    assert found.made_for.prompts == ("still", "drift") and found.made_for.latents == (3, 8, 24, 24)
    printed = capsys.readouterr().out
    assert "AdaCacheConfig.for_speedup" in printed and "4 of 6" in printed
    assert not messages(pipe, dataclasses.replace(found.made_for, num_steps=20))
    for arguments, message in (
        (["--prompt", "cat"], "--prompt: the embedded model knows"),
        (["--speedup", "0.5"], "--speedup: expected a finite number >= 1, got 0.5"),
        (["--model", "nowhere"], "--model: expected a pipeline's folder or a Hub id"),
        (["--out", str(tmp_path)], "--out: expected a file to write"),
    ):
        assert main(["calibrate", *arguments]) == 2
        assert message in capsys.readouterr().err
