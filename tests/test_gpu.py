"""What only a CUDA device can show. These run by themselves wherever there is one."""

import pytest
import torch
from doubles.stdit3 import STDiT3

from adacache_triton import AdaCacheConfig, Codebook, MotionRegularization, apply_adacache
from adacache_triton.kernels import reference, residual_stats, reuse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = [(2, 15, 400, 1152), (1, 3, 7, 5), (3, 1, 33, 64), (2, 16, 1024, 1152)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["frame-major", "spatial-major"])
def test_sums_against_float64(shape, dtype, layout):
    B, T, S, C = shape
    new, old = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(2))
    if layout == "spatial-major":
        new, old = (x.view(B, S, T, C).transpose(1, 2) for x in (new, old))
    n, o = new.cpu().double(), old.cpu().double()
    expected = [(o - n).abs().sum((1, 2, 3)), o.abs().sum((1, 2, 3))]
    for s in (1, 2):
        later, earlier = n[:, s:], n[:, : max(T - s, 0)]
        expected += [(later - earlier).abs().sum((1, 2, 3)), (later.abs() + earlier.abs()).sum((1, 2, 3))]
    expected = torch.stack(expected, 1)
    kept = old.clone()
    got = residual_stats(new, old, frame_strides=(1, 2), refresh=True)
    torch.testing.assert_close(got.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(old, new)
    assert torch.equal(got, residual_stats(new, kept, frame_strides=(1, 2))), "the same bits again"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reuse_is_one_rounded_sum(dtype):
    hidden, residual = (torch.randn(2, 1000, 1152, device="cuda", dtype=dtype) for _ in range(2))
    assert torch.equal(reuse(hidden, residual).cpu(), reference.reuse(hidden.cpu(), residual.cpu()))
    assert reuse(hidden.float(), residual).dtype == torch.float32


@torch.no_grad()
def test_a_cached_run_is_that_of_the_cpu():
    torch.manual_seed(3)
    model, x, y = STDiT3().eval(), torch.randn(2, 4, 5, 8, 8), torch.randn(2, 6, 32)
    config = AdaCacheConfig(Codebook((0.06, 0.09), (4, 2, 1)), MotionRegularization((3, 27)), num_steps=30)
    outputs = {}
    for device in ("cpu", "cuda"):
        model.to(device)
        handle, z = apply_adacache(model, config), x.to(device)
        with handle.run():
            for step in range(30):
                timestep = torch.full((2,), 1000 - 30 * step, device=device)
                z = z - model(z, timestep, y.to(device)) / 30
            outputs[device] = (z.cpu(), handle.report().computed_steps)
        handle.remove()
    torch.testing.assert_close(outputs["cuda"][0], outputs["cpu"][0], rtol=1e-3, atol=1e-3)
    assert outputs["cuda"][1] == outputs["cpu"][1]


@torch.no_grad()
def test_a_reused_step_never_waits_for_the_device():
    model = STDiT3().eval().cuda()
    x, y = torch.randn(2, 4, 5, 8, 8, device="cuda"), torch.randn(2, 6, 32, device="cuda")
    timesteps = [torch.full((2,), 1000 - 30 * step, device="cuda") for step in range(12)]
    handle = apply_adacache(model, AdaCacheConfig(Codebook((1e6,), (4, 1)), num_steps=12))
    with handle.run():
        for step, timestep in enumerate(timesteps, start=1):
            # After steps 2 and 6 the rate is 4.
            torch.cuda.set_sync_debug_mode("error" if step in (3, 4, 5, 7, 8, 9) else "default")
            try:
                model(x, timestep, y)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    handle.remove()
    assert handle.report().computed_steps == [1, 2, 6, 10, 11, 12]
