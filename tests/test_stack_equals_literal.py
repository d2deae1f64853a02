"""Stack caching against the released way, two kept residuals in each block: same schedule, same video."""

import pytest
import torch
from doubles.literal import LiteralCache, LiteralRule
from doubles.stdit3 import STDiT3

from adacache_triton import AdaCacheConfig, Codebook, MotionRegularization, apply_adacache

DEPTH = 3
# The thresholds of the presets, moved to where this random model's distances lie, so that every rate occurs.
THRESHOLDS = {30: (0.06, 0.09, 0.13, 0.16, 0.2), 100: (0.012, 0.02, 0.035, 0.05, 0.065)}
RATES = {30: (6, 5, 4, 3, 2, 1), 100: (12, 10, 8, 6, 4, 3)}


def denoise(forward, num_steps: int) -> torch.Tensor:
    """Rectified flow with guidance in one batch [cond, uncond], as Open-Sora samples."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, 5, 8, 8, generator=generator)
    y = torch.randn(2, 6, 32, generator=generator)
    times = torch.linspace(1000, 0, num_steps + 1)
    for step in range(1, num_steps + 1):
        timestep = times[step - 1].expand(2)
        cond, uncond = forward(step, torch.cat([x, x]), timestep, y).chunk(2)
        x = x + (uncond + 4 * (cond - uncond)) * (times[step] - times[step - 1]) / 1000
    return x


@pytest.fixture
def model():
    torch.manual_seed(3)
    return STDiT3(depth=DEPTH).eval()


@pytest.mark.parametrize("moreg", [False, True], ids=["plain", "moreg"])
@pytest.mark.parametrize("num_steps", [30, 100])
@torch.no_grad()
def test_same_schedule_and_video(model, num_steps, moreg):
    thresholds = THRESHOLDS[num_steps]
    motion = None
    if moreg:
        motion = MotionRegularization((num_steps // 10, num_steps * 9 // 10), (1, 2), scale=0.05, power=4)
    literal_moreg = motion and {
        "strides": motion.frame_strides, "steps": motion.window, "scale": motion.scale, "power": motion.power,
        "divisor": motion.divisor, "gradient_weight": motion.gradient_weight,
    }  # fmt: skip
    rule = LiteralRule(thresholds, RATES[num_steps], literal_moreg, num_steps)
    expected = denoise(LiteralCache(model, rule, probe=1), num_steps)

    config = AdaCacheConfig(Codebook(thresholds, RATES[num_steps]), motion, num_steps=num_steps)
    handle = apply_adacache(model, config)
    got = denoise(lambda step, *inputs: model(*inputs), num_steps)

    steps = [s for s in handle.report().steps if s.computed]
    assert [(s.step, s.rate) for s in steps] == [(row["step"], row["rate"]) for row in rule.trace]
    assert len({s.rate for s in steps}) >= 3, "a schedule worth comparing"
    assert num_steps / 8 < len(steps) < num_steps * 0.8
    assert (got - expected).abs().max() <= 1e-5

    handle.remove()
    uncached = denoise(lambda step, *inputs: model(*inputs), num_steps)
    assert (got - uncached).abs().max() > 1e-4, "reuse must be visible"
    literal_bytes = sum(r.numel() * 4 for b in (model.spatial_blocks, model.temporal_blocks) for m in b for r in m.kept)
    assert literal_bytes == 2 * DEPTH * handle.report().kept_bytes
