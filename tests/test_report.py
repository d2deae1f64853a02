"""The report: as text, JSON and picture, and drawn again by the command."""

import json

import pytest
import torch
from matplotlib.image import imread

from adacache_triton import AdaCacheConfig, Codebook, FixedSchedule, Report, Step, apply_adacache
from adacache_triton.cli import main
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
    assert min(computed) > max(reused)
    assert report.time_saved == pytest.approx(len(reused) * (sorted(computed)[len(computed) // 2] - 0), rel=0.6)
    assert report.config == MEASURED.to_dict()


def test_as_text(report):
    text = str(report).splitlines()
    assert text[0].startswith(f"{len(report.computed_steps)} of 12 steps computed") and text[0].endswith("s saved")
    assert [i for i, mark in enumerate(text[1], 1) if mark == "#"] == report.computed_steps
    assert len(text) == 15 and "first" in text[3] and "tail" in text[-1]


def test_json_and_back(pipe, report):
    for each in (report, report_of(pipe, AdaCacheConfig(MEASURED.codebook, per_video=True), ("still", "spin"))):
        again = Report.from_json(each.to_json())
        assert again.to_dict() == json.loads(each.to_json()) and str(again) == str(each)
        assert again.computed_steps == each.computed_steps
    steps = (Step(1, "first"), Step(2, "restart", distance=float("nan"), cause="not finite"))
    again = Report.from_json(Report(2, steps, 0).to_json())
    assert again.steps[1].distance != again.steps[1].distance and "restart: not finite" in str(again)
    assert again.time_saved is None


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ("{", "report: expected JSON"),
        ("[]", "report: expected an object with named fields, got list"),
        ('{"num_steps": 3}', "report: expected the field 'kept_bytes', got num_steps"),
        (
            '{"num_steps": 3, "kept_bytes": 0, "granularity": "stack", "steps": [{"step": 1, "reason": "luck"}]}',
            r"steps\[0\]: expected the record of a step",
        ),
    ),
)
def test_what_is_no_report_is_said(text, message):
    with pytest.raises(ValueError, match=message):
        Report.from_json(text)


def test_why_a_step_was_restarted(pipe):
    def broken(module, args, output, calls=[]):  # noqa: B006
        calls.append(1)
        return output * float("nan") if len(calls) == 2 else output

    hook = pipe.transformer.transformer_blocks[-1].register_forward_hook(broken)
    report = report_of(pipe, AdaCacheConfig(schedule=FixedSchedule((1, 2, 8), 12)))
    hook.remove()
    assert (report.steps[2].reason, report.steps[2].cause) == ("restart", "not finite")
    assert [s.reason for s in report_of(pipe, AdaCacheConfig.for_speedup(2)).steps][:4] == [
        "first", "warm-up", "warm-up", "warm-up",
    ]  # fmt: skip


def test_the_command_prints_and_draws_it_again(report, tmp_path, capsys):
    file, picture = tmp_path / "report.json", tmp_path / "report.png"
    file.write_text(report.to_json())
    assert main(["report", str(file), "--out", str(picture)]) == 0
    assert capsys.readouterr().out == f"{report}\n{picture}\n"
    height, width, _ = imread(picture).shape
    assert width == 1000 and height > 400
    assert main(["report", str(tmp_path / "none.json")]) == 2
    assert "FILE: expected a report as Report.to_json writes it" in capsys.readouterr().err
    assert main(["report", str(file), "--out", str(tmp_path / "report.xyz")]) == 2
    assert "--out: expected a picture to write" in capsys.readouterr().err


def test_pictures_of_several_videos_and_of_nothing(pipe, tmp_path):
    several = report_of(pipe, AdaCacheConfig(MEASURED.codebook, per_video=True), ("still", "spin", "texture"))
    several.save_picture(tmp_path / "several.png")
    Report(0, (), 0).save_picture(tmp_path / "nothing.svg")
    assert imread(tmp_path / "several.png").shape[1] == 1000 and (tmp_path / "nothing.svg").stat().st_size > 1000
