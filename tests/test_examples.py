"""The examples run as they stand, and notice when what they show is not so."""

import contextlib
import importlib.util
import io
import itertools
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from doubles import xfuser
from ranks import World
from tiny_models import sample
from tiny_pipelines import PIPELINES
from torch._dynamo.utils import counters

from adacache_triton import AdaCacheConfig, AdaCacheHandle, Codebook, MotionRegularization, apply_adacache

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_swap_backend():
    run = subprocess.run([sys.executable, EXAMPLES / "swap_backend.py"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "\nthe same decisions; the videos differ by 0.0e+00" in run.stdout
    rows = [line.replace("->", "").split() for line in run.stdout.splitlines() if "->" in line]
    assert [rows[0], rows[-1][0]] == [["1", "nan", "1", "nan", "1"], "30"]
    rates = [(int(theirs), int(ours)) for _, _, theirs, _, ours in rows]
    assert len(set(rates)) >= 4, "one rate would show little"
    assert all(theirs == ours for theirs, ours in rates)


def test_swap_backend_notices_another_decision(capsys):
    example = load("swap_backend")
    with patch.object(example, "residual_distance", lambda kept, new, rate: (kept - new).norm(p=1)):
        assert example.main() == 1
    assert "DIFFERENT decisions" in capsys.readouterr().out


def test_serve(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", "serve --requests 3 --batch 2 --steps 12 14 --check".split())
    assert load("serve").main() == 0
    titles, *videos, total, difference = capsys.readouterr().out.splitlines()
    assert titles.split() == ["video", "steps", "guidance", "arrived", "started", "done", "computed"]
    steps, _, arrived, started, done, computed = zip(*(map(float, line.split()[1:]) for line in videos))
    assert started[1] == arrived[1] < done[0] and arrived[2] < started[2] == min(done[:2]), "two at a time"
    assert sum(computed) < sum(steps)
    assert f"for {2 * sum(computed):.0f} samples; without a cache, for {2 * sum(steps):.0f}" in total
    assert float(difference.split()[-1]) < 1e-4


def test_serve_notices_another_video(capsys, monkeypatch):
    """Two videos take turns with what is kept for them."""
    monkeypatch.setattr("sys.argv", "serve --requests 2 --batch 2 --steps 9 9 --check".split())
    example, step, turn = load("serve"), AdaCacheHandle.step, itertools.cycle((1, -1))
    example.CONFIG = AdaCacheConfig(Codebook((1e6,), (3, 1)))
    with patch.object(AdaCacheHandle, "step", lambda self, sessions: step(self, sessions[:: next(turn)])):
        assert example.main() == 1
    assert "the videos differ from those made alone by " in capsys.readouterr().out


def test_cuda_graphs(capsys):
    torch._dynamo.reset()
    counters.clear()
    assert load("cuda_graphs").main() == 0
    printed = capsys.readouterr().out
    assert printed.count("compiled the same") == printed.count("  2 graphs so far") == 2
    if not torch.cuda.is_available():
        assert printed.count("the videos differ by 0.0e+00") == 2


XFUSER = ("xfuser", "xfuser.config", "xfuser.core", "xfuser.core.distributed", "xfuser.runner")
WAN = AdaCacheConfig(Codebook((0.07, 0.1, 0.16), (4, 3, 2, 1)), MotionRegularization((3, 14), scale=0.2, power=2))


def under_xdit() -> tuple:
    """On a rank: what the example prints, its video, and what is said of one whose tokens are padded."""
    with patch.dict(sys.modules, dict.fromkeys(XFUSER, xfuser)), io.StringIO() as printed:
        example = load("xdit")
        arguments = "xdit --model Wan2.1-T2V --ulysses_degree 2 --num_inference_steps 16".split()
        with (
            patch.object(example, "CONFIG", WAN),
            patch.object(sys, "argv", arguments),
            contextlib.redirect_stdout(printed),
        ):
            assert example.main() == 0
        video = sample(xfuser.xFuserModelRunner.saved.pop())
        runner = xfuser.xFuserModelRunner({"num_inference_steps": 16})
        runner.initialize({})
        runner.call |= dict(height=48, width=48)  # 27 tokens
        example.cache(runner.model.pipe, WAN)
        try:
            runner.run({})
        except ValueError as error:
            return printed.getvalue(), video, str(error)


def timeless(report: str) -> str:
    """A printed report without what was timed: the end of its first line, and of each step's."""
    return re.sub(r"(, [^,\n]* s saved.*| +[\d.e+-]+)$", "", report, flags=re.MULTILINE)


def test_xdit():
    """Two ranks make, and print, what one does with diffusers' own transformer. The package itself is a double."""
    pipeline, call = PIPELINES["wan"].make(16)
    handle = apply_adacache(pipeline, WAN)
    video, report = sample(pipeline(**call)), handle.report()
    with World(2) as world:
        outcomes = world.run(under_xdit)
    kept = f"{report.kept_bytes:,} bytes", f"{report.kept_bytes // 2:,} bytes"
    assert [timeless(printed) for printed, _, _ in outcomes] == [timeless(f"{report}\n".replace(*kept)), ""]
    assert len(report.computed_steps) < 14 and len({s.motion_scale for s in report.steps}) > 3
    for _, shared, padded in outcomes:
        assert (shared - video).abs().max() < 1e-6
        assert padded == "BlockStack.frames: expected a divisor of the 28 tokens of all ranks, got 3"
