"""The example that adapts a model runs as it stands, and what it shows is so."""

import dataclasses
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adacache_triton import AdaCacheConfig, Codebook, apply_adacache

EXAMPLE = Path(__file__).parents[1] / "examples" / "adapt_a_model.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location(EXAMPLE.stem, EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_runs(example):
    run = subprocess.run([sys.executable, "-W", "error", EXAMPLE], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    computed = int(re.match(rf"(\d+) of {example.STEPS} steps computed", run.stdout)[1])
    reasons = re.findall(r"^ +\d+  (first|rate|reused|tail)", run.stdout, re.MULTILINE)
    assert len(reasons) == example.STEPS and reasons.count("reused") == example.STEPS - computed >= example.STEPS // 2
    change = float(re.search(r"the video changed by (\S+)", run.stdout)[1])
    assert 1e-4 < change < 0.1
    differences = re.findall(r"granularity '\w+': .* differs by (\S+)", run.stdout)
    assert len(differences) == 2 and all(float(difference) < 1e-5 for difference in differences)
    for field in example.WRONG:
        named = "layout" if field == "frames" else field  # whichever of the two is wrong, both are shown
        assert re.search(rf"^  {field}, .*: (AdaCache: )?BlockStack\.{named}: .+", run.stdout, re.MULTILINE), field


def test_it_notices_a_wrong_description_that_passes(example, monkeypatch, capsys):
    monkeypatch.setattr(example, "WRONG", {"lists": {}})
    assert example.main() == 1


@torch.no_grad()
def test_its_description_is_right(example):
    """A reused step on one input gives the full output; the probe is the video's gated attention, frame by frame."""
    model = example.Unknown().eval()
    call = torch.randn(1, 6, 4, 4, 4), torch.tensor([0.5]), torch.randn(1, 5, 8)
    middle = model.trunk["layers"][2]
    seen = {}
    hook = middle.attention.register_forward_hook(lambda _, args, output: seen.update(attention=output))
    full = model(*call)
    hook.remove()
    handle = apply_adacache(
        model,
        AdaCacheConfig(Codebook((1e6,), (3, 1)), example.CONFIG.motion, num_steps=example.STEPS),
        stack=example.STACK,
    )
    with handle.run():
        outputs = [model(*call) for _ in range(2)]
        probe = handle._cached[0].batch.sessions[0].branch.probes[0]
        outputs += [model(*call) for _ in range(2)]
    assert handle.report().computed_steps == [1, 2]
    for output in outputs:
        torch.testing.assert_close(output, full, rtol=0, atol=1e-5)
    expected = torch.cos(middle.phases[0] + 0.5) * seen["attention"][:, 5:]
    torch.testing.assert_close(probe, expected.view(1, 6, 16, -1), rtol=0, atol=1e-5)


def test_its_description_is_ten_lines(example):
    assert len([f for f in dataclasses.fields(example.STACK) if getattr(example.STACK, f.name) != f.default]) <= 10
