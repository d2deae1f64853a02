"""The report: as text, JSON and picture, and drawn again by the command."""

import copy
import itertools
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from matplotlib.image import imread
from tiny_models import MODELS

from adacache_triton import AdaCacheConfig, Codebook, FixedSchedule, Report, Step, apply_adacache, hooks, stopwatch
from adacache_triton.cli import main
from adacache_triton.generate import Variant
from adacache_triton.testbed.pipeline import EmbeddedPipeline

MEASURED = AdaCacheConfig(Codebook((0.5,), (3, 1)))


@pytest.fixture(scope="module")
def pipe():
    return EmbeddedPipeline.load()


def report_of(pipe, config, prompts=("spin",), steps=12) -> Report:
    handle = apply_adacache(pipe, config)
    pipe(list(prompts), steps, generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))])
    handle.remove()
    return handle.report()


@pytest.fixture(scope="module")
def report(pipe):
    return report_of(pipe, MEASURED)


def test_every_step_has_its_reason_and_time(report):
    reused = [s.seconds for s in report.steps if not s.computed]
    computed = [s.seconds for s in report.steps if s.computed]
    assert len(report.steps) == 12 and reused and all(seconds > 0 for seconds in reused + computed)
    assert sum(computed) / len(computed) > sum(reused) / len(reused)
    assert report.time_saved == pytest.approx(len(reused) * (sorted(computed)[len(computed) // 2] - 0), rel=0.6)
    assert report.config == MEASURED.to_dict()


def timed(reason: str, *seconds: float | None) -> tuple[Step, ...]:
    return tuple(Step(i, reason, seconds=each) for i, each in enumerate(seconds, 1))


def test_time_saved_and_speedup():
    one = Report(5, (*timed("rate", 9.0, 4.0, 4.0), *timed("reused", 1.0, 1.0)), 0)
    assert (one.time_saved, one.speedup) == (6.0, 25 / 19), "the first step, which compiled, is not taken for one saved"
    computed = Report(2, timed("rate", 4.0, 4.0), 0)
    both = Report(5, (), 0, videos=(one, computed))
    assert (both.time_saved, both.speedup) == (6.0, 33 / 27) and "6 s saved (1.22x)" in str(both)
    for steps in ((), timed("rate", 1.0), timed("reused", 1.0), (*timed("rate", 1.0), *timed("reused", None))):
        assert Report(2, steps, 0).time_saved is None is Report(2, steps, 0).speedup
    assert timed("rate", 1.0) == timed("rate", 2.0), "two runs that did the same are equal"


@torch.no_grad()
def test_calls_of_a_step_add_up_and_parts_are_shared(monkeypatch):
    """Every mark is a second after the last one, so a call takes one."""
    clock = itertools.count()
    monkeypatch.setattr(hooks, "mark", lambda device: float(next(clock)))
    model, inputs = MODELS["wan"].model(), MODELS["wan"].inputs()
    codebook = Codebook((1e9,), (3, 1))
    handle = apply_adacache(model, AdaCacheConfig(codebook, num_steps=6), calls_per_step=2)
    for step, _ in itertools.product(range(6), range(2)):
        model(**inputs | {"timestep": torch.full_like(inputs["timestep"], 900.0 - step)})
    assert [step.seconds for step in handle.report().steps] == [2.0] * 6
    handle.remove()

    handle = apply_adacache(model, AdaCacheConfig(codebook, num_steps=9, per_video=True))
    late, early = handle.session(9), handle.session(8)
    batch = {name: torch.cat([x[:1]] * 2) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    for step in range(8):
        alone = step == 0
        with handle.step([early] if alone else [early, late]):
            model(**{n: x[:1] if alone and isinstance(x, torch.Tensor) else x for n, x in batch.items()})
    first, second = early.report().steps, late.report().steps
    for a, b in zip(first[1:], second):
        assert (a.seconds, b.seconds) == ((0.5, 0.5) if a.computed == b.computed else (1.0, 1.0))
    assert first[0].seconds == 1.0 and any(a.computed != b.computed for a, b in zip(first[1:], second))
    handle.remove()


def test_a_gpu_is_waited_for_only_when_the_report_is_asked_for(monkeypatch):
    log, now = [], itertools.count(0, 1500)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.at = next(now)
            log.append(f"event on {stream}")

        def synchronize(self):
            log.append("host waits")

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch, "cuda", SimpleNamespace(Event=Event, current_stream=lambda device: f"{device}'s"))
    watch, device = stopwatch.Stopwatch(), torch.device("cuda", 1)
    for _ in range(2):
        watch.called(3, stopwatch.mark(device), stopwatch.mark(device))
    assert log == ["event on cuda:1's"] * 4
    assert watch.seconds(3) == 3.0 and watch.seconds(4) is None and log[4:] == ["host waits"] * 2


def test_as_text(report):
    text = str(report).splitlines()
    assert text[0].startswith(f"{len(report.computed_steps)} of 12 steps computed") and " s saved (" in text[0]
    assert [i for i, mark in enumerate(text[1], 1) if mark == "#"] == report.computed_steps
    assert len(text) == 15 and "first" in text[3] and "tail" in text[-1]


def test_json_and_back(pipe, report):
    for each in (report, report_of(pipe, AdaCacheConfig(MEASURED.codebook, per_video=True), ("still", "spin"))):
        again = Report.from_json(each.to_json())
        assert again.to_dict() == json.loads(each.to_json()) and str(again) == str(each)
        assert again.computed_steps == each.computed_steps
        assert [run.name for run in again.runs] == [""] * len(each.runs) and again.config == json.loads(
            json.dumps(each.config)
        )
    steps = (Step(1, "first"), Step(2, "restart", distance=float("nan"), cause="not finite"))
    again = Report.from_json(Report(2, steps, 0).to_json())
    assert again.steps[1].distance != again.steps[1].distance and "restart: not finite" in str(again)
    assert again.time_saved is None


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ("{", "report: expected JSON, got Expecting"),
        ("[]", "report: expected an object with named fields, got list"),
        ('{"num_steps": 3}', "report: expected the field 'kept_bytes', got num_steps"),
    ),
)
def test_what_is_no_report_is_said(text, message):
    with pytest.raises(ValueError, match=message):
        Report.from_json(text)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    (
        (("num_steps",), -1, "num_steps: expected an integer >= 0, got -1"),
        (("kept_bytes",), 1.5, "kept_bytes: expected an integer >= 0, got 1.5"),
        (("steps",), {}, "steps: expected a list, got {}"),
        (("config",), [], "config: expected an object or null, got []"),
        (("videos",), [3], "videos[0]: expected an object with named fields, got int"),
        (("videos",), [{}], "report: expected the field 'videos[0].num_steps', got none"),
        (("steps", 1), None, "steps[1]: expected an object with named fields, got None"),
        (("steps", 1), {"step": 2}, "steps[1].reason: expected a field, got step"),
        (
            ("steps", 1, "reason"),
            "luck",
            "steps[1].reason: expected one of first, warm-up, listed, rate, tail, restart,",
        ),
        (("steps", 1, "reason"), [], "steps[1].reason: expected one of first, warm-up, listed, rate, tail, restart,"),
        (
            ("steps", 1, "cause"),
            "luck",
            "steps[1].cause: expected one of not finite, changed, doubt, or null, got 'luck'",
        ),
        (("steps", 1, "rate"), 0, "steps[1].rate: expected an integer >= 1 or null, got 0"),
        (("steps", 1, "distance"), "far", "steps[1].distance: expected a number or null, got 'far'"),
        (("steps", 1, "distance"), True, "steps[1].distance: expected a number or null, got True"),
        (("steps", 1, "colour"), 3, "steps[1]: expected fields of a step, got 'colour'"),
    ),
)
def test_what_is_wrong_in_a_report_is_named(report, place, value, message):
    data = json.loads(report.to_json())
    holder = data
    for name in place[:-1]:
        holder = holder[name]
    holder[place[-1]] = value
    with pytest.raises(ValueError) as error:
        Report.from_dict(data)
    assert str(error.value).startswith(message)


def test_why_a_step_was_restarted(pipe):
    def broken(module, args, output, calls=[]):  # noqa: B006
        calls.append(1)
        return output * float("nan") if len(calls) == 2 else output

    hook = pipe.transformer.transformer_blocks[-1].register_forward_hook(broken)
    report = report_of(pipe, AdaCacheConfig(schedule=FixedSchedule((1, 2, 8), 12)))
    hook.remove()
    assert (report.steps[2].reason, report.steps[2].cause) == ("restart", "not finite")
    reasons = [s.reason for s in report_of(pipe, AdaCacheConfig.for_speedup(2)).steps]
    assert reasons[:3] == ["first", "warm-up", "warm-up"] and set(reasons[3:]) <= {"warm-up", "listed", "reused"}


class Pipe:
    """A pipeline reduced to what the clock sees."""


@torch.no_grad()
def test_changed_and_in_doubt():
    model, inputs = MODELS["wan"].model(), MODELS["wan"].inputs()
    config = AdaCacheConfig(Codebook((1e9,), (3, 1)))
    handle = apply_adacache(model, AdaCacheConfig(config.codebook, num_steps=6))
    for step in range(6):
        x = inputs["hidden_states"]
        x = x[..., :-2] if step == 2 else x
        model(**inputs | {"hidden_states": x, "timestep": torch.full_like(inputs["timestep"], 900.0 - step)})
    seen = handle.report()
    assert (seen.steps[2].reason, seen.steps[2].cause) == ("restart", "changed") and "restart: changed" in str(seen)
    handle.remove()

    pipe = Pipe()
    pipe.transformer, pipe.scheduler = model, FlowMatchEulerDiscreteScheduler()
    handle = apply_adacache(pipe, config)
    pipe.scheduler.set_timesteps(6)
    latents = inputs["hidden_states"]
    with pytest.warns(UserWarning, match="cannot be told apart"):
        for t in pipe.scheduler.timesteps:
            for _ in range(2):  # nothing of a call outlives it
                out = model(**copy.deepcopy(inputs) | {"hidden_states": latents, "timestep": t.expand(len(latents))})
            latents = pipe.scheduler.step(out[0], t, latents, return_dict=False)[0]
    assert {step.cause for step in handle.report().steps} == {None, "doubt"}
    handle.remove()


def test_the_command_prints_and_draws_it_again(report, tmp_path, capsys):
    file, picture = tmp_path / "report.json", tmp_path / "report.png"
    file.write_text(report.to_json())
    assert main(["report", str(file), "--out", str(picture)]) == 0
    assert capsys.readouterr().out == f"{report}\n{picture}\n"
    height, width, _ = imread(picture).shape
    assert width == 1000 and height > 400
    assert main(["report", str(tmp_path / "none.json")]) == 2
    assert "FILE: expected a report as Report.to_json or generate writes it" in capsys.readouterr().err
    assert main(["report", str(file), "--out", str(tmp_path / "report.xyz")]) == 2
    assert "--out: expected a picture to write" in capsys.readouterr().err


def test_pictures_of_several_videos_and_of_nothing(pipe, tmp_path):
    several = report_of(pipe, AdaCacheConfig(MEASURED.codebook, per_video=True), ("still", "spin", "texture"))
    several.save_picture(tmp_path / "several.png")
    Report(0, (), 0).save_picture(tmp_path / "nothing.svg")
    assert imread(tmp_path / "several.png").shape[1] == 1000 and (tmp_path / "nothing.svg").stat().st_size > 1000


def test_the_command_draws_what_generate_wrote(report, tmp_path, capsys):
    written = {
        "configs": {"AdaCache": report.config},
        "videos": [
            {
                "prompt": f"a $cat$ that {i}",
                "variants": [Variant(name, None, 12, cache, [1.0]).to_dict() for name, cache in runs],
            }
            for i, runs in enumerate([[("uncached", None), ("AdaCache", report)]] * 2)
        ],
    }
    file, picture = tmp_path / "report.json", tmp_path / "report.png"
    file.write_text(json.dumps(written))
    assert main(["report", str(file), "--out", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"2 videos: {len(report.computed_steps)} of 12 steps computed")
    assert f"\na $cat$ that 1, AdaCache: {report}" in printed and imread(picture).shape[1] == 1000
    for bad, got in (({"videos": 3}, "TypeError"), ({"videos": []}, "videos: expected one with a cached variant")):
        file.write_text(json.dumps(written | bad))
        assert main(["report", str(file)]) == 2 and got in capsys.readouterr().err


def test_without_matplotlib(report, tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "adacache_triton.report_picture", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"^matplotlib: expected .*; pip install adacache-triton\[demo\]$"):
        report.save_picture(tmp_path / "report.png")
    (tmp_path / "report.json").write_text(report.to_json())
    assert main(["report", str(tmp_path / "report.json"), "--out", "a.png"]) == 2
    assert capsys.readouterr().err.startswith("adacache-triton: error: matplotlib: expected an installed package")
