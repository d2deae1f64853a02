"""diffusers' Latte under the cache: what a reused step is, what is kept, and what can never go wrong."""

import functools
import gc
import math
import weakref

import pytest
import torch
from diffusers import LatteTransformer3DModel

from adacache_triton import AdaCacheConfig, Codebook, MotionRegularization, apply_adacache, granularity

STEPS = 12
CONFIG = AdaCacheConfig(Codebook((1e6,), (3, 1)), num_steps=STEPS)  # every comparison gives rate 3
REUSED = [3, 4, 6, 7, 9, 10]


TINY = dict(
    sample_size=8, num_layers=3, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=8,
    in_channels=4, cross_attention_dim=24, out_channels=4, attention_bias=True, activation_fn="gelu-approximate",
    num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
    video_length=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LatteTransformer3DModel(**TINY).eval()


@pytest.fixture
def cached(model):
    """Applies a configuration; whatever a test does, the model is clean afterwards."""
    handles = []

    def apply(config=CONFIG, **kwargs):
        handles.append(apply_adacache(model, config, **kwargs))
        return handles[-1]

    yield apply
    for handle in handles:
        handle.remove()


def inputs(*args, **kwargs) -> dict:
    """The same tensors for the same arguments: a run may be denoised in several parts."""
    return dict(drawn(*args, **kwargs))


@functools.cache
def drawn(seed: int = 0, batch: int = 2, size: int = 8) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, 4, size, size, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 5, 8, generator=generator),
    }


@torch.no_grad()
def denoise(model, steps=range(1, STEPS + 1), seed: int = 0, **kwargs) -> list[torch.Tensor]:
    """The outputs of a short loop in which each step's input depends on the last one's output."""
    call, outputs = inputs(seed, **kwargs), []
    for step in steps:
        timestep = torch.full((len(call["hidden_states"]),), 1000 - 50 * step)
        outputs.append(model(timestep=timestep, return_dict=False, **call)[0])
        call["hidden_states"] = call["hidden_states"] - 0.1 * outputs[-1]
    return outputs


def same(a: list, b: list) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_computing_every_step_is_the_plain_model_bit_for_bit(model, cached):
    plain = denoise(model)
    cached(AdaCacheConfig(Codebook((1e-9,), (1, 1)), MotionRegularization((1, STEPS)), STEPS))
    assert same(denoise(model), plain)


def test_remove_leaves_no_trace(model, cached):
    plain, before = denoise(model), {n: set(vars(m)) for n, m in model.named_modules()}
    hooks_before = [sum(len(v) for k, v in vars(m).items() if "hooks" in k) for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    handle = cached()
    assert not same(denoise(model), plain)
    handle.remove()
    handle.remove()
    assert same(denoise(model), plain)
    assert {n: set(vars(m)) for n, m in model.named_modules()} == before
    assert [sum(len(v) for k, v in vars(m).items() if "hooks" in k) for m in model.modules()] == hooks_before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert handle.report().computed_steps == [s for s in range(1, STEPS + 1) if s not in REUSED]


def test_a_reused_step_on_the_same_input_gives_the_full_output(model, cached):
    """Nothing changed but the step: stack residual plus entry is the stack's output, to rounding."""
    handle = cached()
    call, outputs = inputs(), []
    with torch.no_grad():
        for step in range(1, STEPS + 1):
            # The embedders see one timestep throughout; the clock is told that it is the next.
            outputs.append(model(timestep=torch.tensor([500, 500]), return_dict=False, **call)[0])
            pretend_last_timestep(model, 1000 - step)
    assert not set(REUSED) & set(handle.report().computed_steps)
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=0, atol=1e-5)


def pretend_last_timestep(model, value: float) -> None:
    """Let the next forward count as the next step although its timestep repeats."""
    clock = model._adacache_handle._cached[0].clock
    clock._value, clock._direction = value, -1.0


def test_a_reused_step_runs_no_block_and_adds_one_tensor(model, cached, monkeypatch):
    blocks, adds, ran = [], [], []
    cached()
    for block in (*model.transformer_blocks, *model.temporal_transformer_blocks):
        blocks.append(block.register_forward_hook(lambda *_: ran.append(1)))
    real = granularity.reuse
    monkeypatch.setattr(granularity, "reuse", lambda hidden, *rest: adds.append(rest) or real(hidden, *rest))
    counts = []
    call = inputs()
    with torch.no_grad():
        for step in range(1, STEPS + 1):
            ran.clear(), adds.clear()
            model(timestep=torch.tensor([1000 - step] * 2), **call)
            counts.append((len(ran), len(adds)))
    for hook in blocks:
        hook.remove()
    assert counts == [(0, 1) if step in REUSED else (6, 0) for step in range(1, STEPS + 1)]


@pytest.mark.usefixtures("_new_objects_only")
def test_kept_memory_is_one_stack_and_one_probe_residual_a_branch(model, cached):
    one = 2 * 4 * 16 * 24 * 4  # B x T x S x C float32
    handle = cached()
    denoise(model, range(1, 5))
    assert len(handle._cached[0].batch.sessions[0].branches) == 1 and handle.report().kept_bytes == 2 * one
    assert live(one // 4) == 2
    denoise(model)
    assert live(one // 4) == 0, "nothing is kept after the last step"
    denoise(model, range(1, 5))
    handle.remove()
    assert live(one // 4) == 0

    handle = cached(calls_per_step=2)
    with torch.no_grad():
        for step in range(1, 4):
            for seed in (0, 1):
                model(timestep=torch.tensor([1000 - step] * 2), **inputs(seed))
    assert len(handle._cached[0].batch.sessions[0].branches) == 2
    assert handle.report().kept_bytes == 4 * one and live(one // 4) == 4


@pytest.fixture
def _new_objects_only():
    """What was there before does not count, nor is it searched."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def live(numel: int) -> int:
    """Tensors of a size that anybody holds."""
    gc.collect()
    found = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.numel() == numel]
    return len({x.data_ptr() for x in found})


def test_the_stack_residual_is_freed_before_the_blocks_run(model, cached):
    handle, seen = cached(), []
    hook = model.transformer_blocks[0].register_forward_hook(
        lambda *_: seen.append(not handle._cached[0].batch.sessions[0].branch.residuals)
    )
    denoise(model)
    hook.remove()
    assert len(seen) == STEPS - len(REUSED) and all(seen)


def test_a_dropped_model_is_freed_at_once():
    model = LatteTransformer3DModel(**TINY)
    apply_adacache(model, CONFIG)
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_two_guidance_calls_decide_together(model, cached):
    """Cond and uncond as two calls take the decision that they take as one batch."""
    config = AdaCacheConfig(Codebook((0.01, 0.02, 0.04), (4, 3, 2, 1)), MotionRegularization((2, 10)), STEPS)
    handle = cached(config)
    denoise(model)
    joint = handle.report().steps
    handle.remove()

    handle, call = cached(config, calls_per_step=2), inputs()
    with torch.no_grad():
        for step in range(1, STEPS + 1):
            t = torch.tensor([1000 - 50 * step])
            halves = [{k: v[i : i + 1] for k, v in call.items()} for i in range(2)]
            out = torch.cat([model(timestep=t, return_dict=False, **half)[0] for half in halves])
            call["hidden_states"] = call["hidden_states"] - 0.1 * out
    for a, b in zip(handle.report().steps, joint, strict=True):
        assert (a.step, a.reason, a.rate) == (b.step, b.reason, b.rate)
        if a.distance is not None:
            assert a.regularized == pytest.approx(b.regularized, rel=1e-3)
    assert {s.reason for s in joint} >= {"rate", "reused"}


def test_exception_in_the_middle_then_a_new_run(model, cached):
    handle = cached()
    expected = denoise(model)
    for stop in (1, 2, 5, 7):
        handle.reset()
        denoise(model, range(1, stop))

        def fail(*_):
            raise RuntimeError("out of memory")

        hook = model.norm_out.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            denoise(model, range(stop, stop + 1))
        hook.remove()
        assert [len(x) for x in (model.transformer_blocks, model.temporal_transformer_blocks)] == [3, 3]
        assert same(denoise(model), expected)


@pytest.mark.parametrize("stop", range(2, STEPS + 2))
def test_aborted_outside_the_model_then_a_new_run(model, cached, stop):
    """The loop was left between two forwards; only the timesteps tell that a new run began."""
    handle = cached()
    expected = denoise(model, seed=1)
    denoise(model, range(1, stop), seed=0)
    assert same(denoise(model, seed=1), expected)
    assert len(handle.report().steps) == STEPS


def test_a_run_inside_the_context_reads_no_timestep_and_ends_with_it(model, cached, monkeypatch):
    handle = cached()
    expected = denoise(model)
    monkeypatch.setattr("adacache_triton.clock._scalar", lambda t: pytest.fail("the timestep was read"))
    for _ in range(2):
        with pytest.raises(KeyError), handle.run():
            denoise(model, range(1, 6), seed=3)
            raise KeyError
        with handle.run():
            assert same(denoise(model), expected)
            with pytest.raises(RuntimeError, match="run: expected no run in progress"), handle.run():
                pass
        assert handle.report().steps[-1].distance is not None, "the last decision is in the records"


def test_exception_before_the_exit_of_a_reused_step(model, cached):
    """The blocks are back at once, and going on with the same loop reuses nothing of before."""
    handle = cached()
    denoise(model, range(1, 3))

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = model.pos_embed.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        denoise(model, [3])
    hook.remove()
    assert type(model.transformer_blocks) is torch.nn.ModuleList and len(list(model.transformer_blocks)) == 3
    denoise(model, [4, 5])
    assert [s.reason for s in handle.report().steps] == ["first", "rate"]


@pytest.mark.parametrize("inside", [True, False], ids=["in a forward", "between two calls"])
def test_a_run_of_two_calls_a_step_after_one_that_ended_in_its_first_step(model, cached, inside):
    config = AdaCacheConfig(Codebook((0.02, 0.04), (4, 2, 1)), num_steps=STEPS)
    handle = cached(config, calls_per_step=2)

    def run():
        with torch.no_grad():
            return [
                model(timestep=torch.tensor([1000 - 50 * step] * 2), return_dict=False, **inputs(seed))[0]
                for step in range(1, STEPS + 1)
                for seed in (0, 1)
            ]

    expected, records = run(), handle.report().steps
    if inside:
        hook = model.norm_out.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            denoise(model, [1])
        hook.remove()
        got = run()
    else:
        with pytest.raises(KeyError), handle.run():  # what only `run` can tell
            denoise(model, [1])
            raise KeyError
        with handle.run():
            got = run()
    assert same(got, expected) and handle.report().steps == records


def test_interrupt_inside_a_reused_step_is_mended(model, cached):
    handle = cached()
    expected = denoise(model)
    denoise(model, range(1, 3))

    def interrupt(*_):
        raise KeyboardInterrupt

    names = set(model.state_dict())
    hook = model.pos_embed.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        denoise(model, [3])
    hook.remove()
    assert set(model.state_dict()) == names and sum(1 for _ in model.parameters()) > 100
    assert same(denoise(model), expected)
    denoise(model, range(1, 3))
    hook = model.pos_embed.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        denoise(model, [3])
    hook.remove()
    handle.remove()
    assert type(model.transformer_blocks) is torch.nn.ModuleList


def test_changed_shape_is_computed(model, cached):
    handle = cached()
    with torch.no_grad():
        for step, batch in enumerate((2, 2, 3, 3, 2, 2), start=1):
            model(timestep=torch.tensor([1000 - step] * batch), **inputs(batch=batch))
    # Steps 3 and 5 would have been reused; after a change two steps are computed, as at the start.
    assert [s.reason for s in handle.report().steps] == ["first", "rate", "restart", "rate", "restart", "rate"]


def test_changed_dtype_is_computed(model, cached):
    handle = cached()
    denoise(model, range(1, 4))
    model.bfloat16()
    call = {k: v.bfloat16() for k, v in inputs().items()}
    with torch.no_grad():
        model(timestep=torch.tensor([700, 700]), **call)
    model.float()
    assert [s.reason for s in handle.report().steps] == ["first", "rate", "reused", "restart"]


@pytest.mark.parametrize("where", ["probe", "last block", "stream"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_values_are_never_followed_by_a_reused_step(model, cached, where, bad):
    handle = cached()
    block = {"probe": model.temporal_transformer_blocks[1], "last block": model.temporal_transformer_blocks[2]}
    module = block.get(where, model.transformer_blocks[0])

    def spoil(_, args, output):
        output = output.clone()
        output[0, 0, 0] = bad
        return output

    # Attention of the probe itself, or the output of a block before or after it.
    target = module.attn1 if where == "probe" else module
    denoise(model, range(1, 5))
    hook = target.register_forward_hook(spoil)
    denoise(model, [5])
    hook.remove()
    denoise(model, range(6, 10))
    steps = handle.report().steps
    assert [s.computed for s in steps[:6]] == [True, True, False, False, True, True]
    assert not math.isfinite(steps[4].distance) and steps[4].rate == 1


def test_a_broken_branch_that_measured_nothing_is_seen_too(model, cached):
    """Two calls a step; the second changes its text, so that it has nothing to compare with, and breaks."""
    handle, call = cached(calls_per_step=2), inputs()
    other = inputs() | {"encoder_hidden_states": torch.full((2, 7, 8), math.nan)}
    with torch.no_grad():
        for step in range(1, 9):
            for second in (False, True):
                model(timestep=torch.tensor([1000 - step] * 2), **(other if second and step >= 5 else call))
    assert [s.computed for s in handle.report().steps] == [True, True, False, False, True, True, True, True]


def test_float64_passes_uncached_with_a_warning(model, cached):
    handle = cached()
    model.double()
    try:
        with torch.no_grad(), pytest.warns(UserWarning, match="the model runs in float64, nothing is cached"):
            model(timestep=torch.tensor([900, 900]), **{k: v.double() for k, v in inputs().items()})
    finally:
        model.float()
    assert handle.report().steps == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(model, cached, dtype):
    model.to(dtype)
    try:
        call = {k: v.to(dtype) for k, v in inputs().items()}
        plain, handle = None, cached(AdaCacheConfig(CONFIG.codebook, MotionRegularization((1, STEPS)), STEPS))
        for step in range(1, 6):
            with torch.no_grad():
                output = model(timestep=torch.tensor([1000 - step] * 2), return_dict=False, **call)[0]
            if step == 5:
                handle.remove()
                with torch.no_grad():
                    plain = model(timestep=torch.tensor([1000 - step] * 2), return_dict=False, **call)[0]
            elif step == 4:
                kept = handle._cached[0].batch.sessions[0].branch
                assert kept.residuals["norm_out"].kept[0].dtype == kept.probes[0].dtype == dtype
        assert output.dtype == dtype and torch.isfinite(output).all()
        torch.testing.assert_close(output, plain, rtol=0.1, atol=0.05)
        assert any(not s.computed for s in handle.report().steps)
    finally:
        model.float()


def test_the_middle_block_is_probed():
    """Number 13 of 28, counted from 0."""
    for layers, probed in ((4, 1), (5, 2), (1, 0)):
        model = LatteTransformer3DModel(**TINY | {"num_layers": layers})
        handle = apply_adacache(model, CONFIG)
        hooked = [bool(block.norm2._forward_pre_hooks) for block in model.temporal_transformer_blocks]
        assert hooked == [i == probed for i in range(layers)]
        handle.remove()


def test_gradients_pass_uncached_with_a_warning(model, cached):
    cached()
    call, t = inputs(), torch.tensor([900, 900])
    with pytest.warns(UserWarning, match="gradients are enabled"):
        first = model(timestep=t, **call).sample
    for _ in range(4):
        assert torch.equal(model(timestep=t, **call).sample, first)
    assert first.requires_grad


@pytest.mark.parametrize("calls", [1, 2])
def test_the_host_reads_once_a_computed_step_and_never_at_a_reused_one(model, cached, monkeypatch, calls):
    handle, reads = cached(calls_per_step=calls), []
    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "cpu", "numpy"):
        real = getattr(torch.Tensor, name)

        def read(self, *args, _real=real, _name=name, **kwargs):
            reads.append(_name)
            return _real(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, read)
    counts, call = [], inputs()
    with torch.no_grad(), handle.run():
        for step in range(1, STEPS + 1):
            reads.clear()
            for _ in range(calls):
                model(timestep=torch.tensor([1000 - step] * 2), **call)
            counts.append(list(reads))
    # A decision is sent to the host at the computed step and waited for when the next step begins.
    after = [step for step in range(3, STEPS + 1) if step - 1 not in REUSED]
    assert counts == [["tolist"] * 2 * calls if step in after else [] for step in range(1, STEPS + 1)]
