"""What only a CUDA device can show: steps that never wait for it, and that are CUDA graphs. Needs diffusers."""

from collections import Counter

import pytest
import torch
from loops import Loop, small
from tiny_models import MODELS, sample
from torch._dynamo.utils import counters
from waiting import no_waiting

from adacache_triton import AdaCacheConfig, Codebook, DenseEarly, MotionRegularization, apply_adacache, batch
from adacache_triton.readback import Readback

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"


class AtOnce(Readback):
    """The host waits for the device, and reads, wherever numbers are sent."""

    late = False

    def __init__(self, *args):
        super().__init__(*args)
        torch.cuda.synchronize()
        self.row(0)


STEPS = 12
# Here Wan's two videos differ in their schedules.
MOREG = MotionRegularization((1, STEPS), (1, 2), scale=0.5, power=1, gradient_weight=1)
RATES = Codebook((0.05, 0.12), (3, 2, 1))
LOOPS = [
    ("latte", 1, False, "stack"),
    ("latte", 1, True, "stack"),
    ("latte", 2, False, "module"),
    ("wan", 1, True, "block"),
    ("wan", 2, False, "stack"),
    ("wan", 2, True, "stack"),
    ("wan", 2, True, "module"),
]


@pytest.mark.parametrize("name, calls, per_video, granularity", LOOPS)
def test_no_step_waits_for_the_device(name, calls, per_video, granularity, monkeypatch):
    """And all is as if every step did: transformer, guidance and the scheduler's step."""
    config = AdaCacheConfig(RATES, MOREG, granularity=granularity, per_video=per_video)
    loop = Loop(name, calls, config, DEVICE)
    loop(STEPS)  # compiles
    video, report = loop(STEPS, around=no_waiting), loop.handle.report()
    videos = report.videos or [report]
    assert {step.reason for each in videos for step in each.steps} >= {"rate", "reused"}
    assert name != "wan" or len({tuple(each.computed_steps) for each in videos}) == len(videos), "the batch was split"

    monkeypatch.setattr(batch, "Readback", AtOnce)
    loop = Loop(name, calls, config, DEVICE)
    assert torch.equal(loop(STEPS), video) and loop.handle.report() == report


@pytest.mark.parametrize("forecast", ("fitted", "quadratic"))
@pytest.mark.parametrize("name, calls, per_video", [("latte", 1, True), ("wan", 2, False)])
def test_no_step_waits_with_a_forecast_and_corrected_latents(name, calls, per_video, forecast):
    """And the video is the processor's."""
    config = AdaCacheConfig(schedule=DenseEarly(2), forecast=forecast, correct=True, per_video=per_video)
    loop = Loop(name, calls, config, DEVICE)
    loop(STEPS)  # compiles
    video = loop(STEPS, around=no_waiting)
    assert len(loop.handle.report().computed_steps) == STEPS // 2
    torch.testing.assert_close(video.cpu(), Loop(name, calls, config, "cpu")(STEPS), rtol=1e-3, atol=1e-3)


@pytest.fixture
def graphs(monkeypatch):
    """How many CUDA graphs were captured, and replayed."""
    counts = Counter()

    def count(name: str, method):
        def counted(*args):
            counts[name] += 1
            return method(*args)

        monkeypatch.setattr(torch.cuda.CUDAGraph, name, counted)

    for name in ("capture_end", "replay"):
        count(name, getattr(torch.cuda.CUDAGraph, name))
    torch._dynamo.reset()
    counters.clear()
    yield counts
    torch._dynamo.reset()


@torch.no_grad()
def denoise(model, name: str, handle, size: float, around=no_waiting) -> list[torch.Tensor]:
    """What the steps of a run return; their rates depend on the `size` of a step."""
    call = {key: value.to(DEVICE) for key, value in MODELS[name].inputs().items()}
    start = call.pop("timestep")
    timesteps = [torch.full_like(start, 900 - size * step) for step in range(STEPS)]
    with handle.run(), around():
        return [sample(model(timestep=timestep, **call)).clone() for timestep in timesteps]


def compile_whole(model, **options):
    model.compile(fullgraph=True, **options)


def compile_blocks(model, **options):
    model.compile_repeated_blocks(fullgraph=True, **options)


COMPILED = {
    "cudagraphs": (compile_whole, {"backend": "cudagraphs"}),
    "reduce-overhead": (compile_whole, {"mode": "reduce-overhead"}),
    "blocks": (compile_blocks, {}),
}


@pytest.mark.parametrize("name, how", [("wan", how) for how in COMPILED] + [("latte", "cudagraphs")])
def test_a_compiled_model_follows_the_rates(name, how, graphs):
    """Whole, it is two CUDA graphs, captured in the first run and replayed in the second, whatever the rates."""
    config = AdaCacheConfig(Codebook((0.02, 0.05, 0.1, 0.2), (5, 4, 3, 3, 2)), num_steps=STEPS)
    model, _ = small(name, DEVICE)
    handle, expected = apply_adacache(model, config), []
    for size in (70, 1):
        expected.append((denoise(model, name, handle, size, torch.no_grad), handle.report()))
    handle.remove()
    assert expected[0][1].computed_steps != expected[1][1].computed_steps, "other rates"

    compile, options = COMPILED[how]
    compile(model, **options)
    handle = apply_adacache(model, config)
    made = []
    for size, (outputs, report), around in zip((70, 1), expected, (torch.no_grad, no_waiting)):
        before = graphs.copy()
        torch.testing.assert_close(denoise(model, name, handle, size, around), outputs, rtol=1e-3, atol=1e-3)
        assert handle.report().computed_steps == report.computed_steps
        made.append((counters["stats"]["unique_graphs"], graphs["capture_end"]))
    assert made[0] == made[1], "nothing is compiled or captured in the second run"
    if compile is compile_whole:
        assert made[0][0] == 2 <= made[0][1] <= 3  # a third capture holds only the graphs' memory
        assert graphs["replay"] - before["replay"] == STEPS and not counters["inductor"]["cudagraph_skips"]
