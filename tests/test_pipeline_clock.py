"""Runs told by a pipeline's scheduler: generations, steps and guidance calls, without reading a timestep."""

import copy
import inspect
import pickle
import types

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanTransformer3DModel

from adacache_triton import AdaCacheConfig, Codebook, MotionRegularization, apply_adacache

CONFIG = AdaCacheConfig(Codebook((1e6,), (3, 1)))  # every comparison gives rate 3
STEPS = 10
COMPUTED = [1, 2, 5, 8, 9, 10]


class Loop:
    """A pipeline reduced to what the clock sees: a transformer, a scheduler, two guidance calls a step."""

    def __init__(self, transformer, scheduler):
        self.transformer, self.scheduler = transformer, scheduler

    @torch.no_grad()
    def __call__(self, num_steps: int = STEPS, seed: int = 0, skip: int = 0, stop: int | None = None):
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randn(1, 4, 4, 8, 8, generator=generator)
        texts = torch.randn(2, 6, 16, generator=generator).split(1)  # held, as pipelines hold their embeddings
        self.scheduler.set_timesteps(num_steps)
        timesteps = self.scheduler.timesteps[skip:]  # as image-to-video with a strength does
        self._num_timesteps = len(timesteps)
        for i, t in enumerate(timesteps):
            if i == stop:
                raise RuntimeError("stopped by a callback")
            cond, uncond = (
                self.transformer(latents, t.expand(1), encoder_hidden_states=text, return_dict=False)[0]
                for text in texts
            )
            latents = self.scheduler.step(uncond + 4 * (cond - uncond), t, latents, return_dict=False)[0]
        return latents


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=256, ffn_dim=32, num_layers=3, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval()  # fmt: skip


@pytest.fixture
def pipe(transformer):
    loop = Loop(transformer, FlowMatchEulerDiscreteScheduler())
    yield loop
    if handle := getattr(transformer, "_adacache_handle", None):
        handle.remove()


def test_a_run_with_two_calls_a_step(pipe):
    plain = pipe()
    handle = apply_adacache(pipe, CONFIG)
    cached = pipe()
    report = handle.report()
    assert report.computed_steps == COMPUTED and report.num_steps == STEPS
    assert report.kept_bytes == 2 * 2 * (4 * 16 * 24 * 4), "a stack and a probe residual for each of two calls"
    assert not torch.equal(cached, plain) and torch.isfinite(cached).all()
    handle.remove()
    assert torch.equal(pipe(), plain)


def test_all_computed_is_the_plain_video_bit_for_bit(pipe):
    plain = pipe()
    apply_adacache(pipe, AdaCacheConfig(Codebook((1e-9,), (1, 1)), MotionRegularization((1, 9))))
    assert torch.equal(pipe(), plain)


@pytest.mark.parametrize("stop", range(STEPS))
def test_a_run_after_an_aborted_one(pipe, stop):
    apply_adacache(pipe, CONFIG)
    expected = pipe(seed=1)
    with pytest.raises(RuntimeError, match="stopped"):
        pipe(seed=0, stop=stop)
    assert torch.equal(pipe(seed=1), expected)


def test_another_step_count_and_a_shortened_run(pipe):
    handle = apply_adacache(pipe, CONFIG)
    pipe(6)
    assert handle.report().computed_steps == [1, 2, 5, 6]
    pipe(STEPS, skip=4)
    assert handle.report().num_steps == 6 and handle.report().computed_steps == [1, 2, 5, 6]
    pipe()
    assert handle.report().computed_steps == COMPUTED


def test_runs_of_fewer_than_three_steps_are_left_alone(pipe):
    plain = pipe(2)
    handle = apply_adacache(pipe, CONFIG)
    assert torch.equal(pipe(2), plain)
    assert handle.report().steps == ()


def test_another_scheduler_put_in_later(pipe):
    handle, first = apply_adacache(pipe, CONFIG), pipe.scheduler
    pipe()
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe()
    assert handle.report().computed_steps == COMPUTED
    assert not {"step", "set_timesteps"} & set(vars(first))
    handle.remove()
    assert not {"step", "set_timesteps"} & set(vars(pipe.scheduler))


def test_the_scheduler_is_itself_while_watched_and_after(pipe):
    scheduler = pipe.scheduler
    before = {name: inspect.signature(getattr(scheduler, name)).parameters for name in ("step", "set_timesteps")}
    handle = apply_adacache(pipe, CONFIG)
    for name, parameters in before.items():
        assert set(inspect.signature(getattr(scheduler, name)).parameters) >= set(parameters)
    copied = copy.deepcopy(scheduler)
    assert isinstance(copied.step, types.MethodType) and copied.step.__self__ is copied
    generation = handle._cached[0].clock._generation
    copied.set_timesteps(4)
    assert handle._cached[0].clock._generation == generation, "a copy's steps are not this run's"
    assert scheduler.timesteps.shape != copied.timesteps.shape
    handle.remove()
    assert not {"step", "set_timesteps"} & set(vars(scheduler))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_copy_is_uncached_and_independent(pipe, duplicate):
    plain = pipe()
    handle = apply_adacache(pipe, CONFIG)
    cached = pipe()
    copied = duplicate(pipe)
    assert torch.equal(copied(), plain) and torch.equal(pipe(), cached)
    other = apply_adacache(copied, AdaCacheConfig(Codebook((1e6,), (2, 1))))
    copied()
    assert torch.equal(pipe(), cached)
    assert handle.report().computed_steps == COMPUTED and other.report().computed_steps == [1, 2, 4, 6, 8, 9, 10]


def test_no_timestep_is_read(pipe, monkeypatch):
    apply_adacache(pipe, CONFIG)
    monkeypatch.setattr("adacache_triton.clock._scalar", lambda t: pytest.fail("the timestep was read"))
    pipe()


def test_calls_outside_a_run_are_plain(pipe, transformer):
    handle = apply_adacache(pipe, CONFIG)
    pipe()
    call = dict(hidden_states=torch.randn(1, 4, 4, 8, 8), timestep=torch.tensor([500]), return_dict=False)
    text = torch.randn(1, 6, 16)
    with torch.no_grad():
        outside = [transformer(encoder_hidden_states=text, **call)[0] for _ in range(5)]
        handle.remove()
        assert all(torch.equal(x, transformer(encoder_hidden_states=text, **call)[0]) for x in outside)


def test_a_loop_that_never_steps_is_computed_and_keeps_little(pipe, transformer):
    """Calls that no `scheduler.step` separates could be guidance branches: nothing is reused on a guess."""
    handle = apply_adacache(pipe, CONFIG)
    pipe.scheduler.set_timesteps(STEPS)
    call = dict(hidden_states=torch.randn(1, 4, 4, 8, 8), encoder_hidden_states=torch.randn(1, 6, 16))
    with torch.no_grad():
        for t in pipe.scheduler.timesteps.repeat(3):
            transformer(timestep=t.expand(1), **call)
    assert handle.report().computed_steps == [1]
    assert len(handle._cached[0].batch.sessions[0].branches) == 8


def test_a_branch_that_sat_out_steps_is_computed_when_it_returns(pipe, transformer):
    """Guidance only at some steps: the returning half has no residual of the step that the other one reuses."""
    handle = apply_adacache(pipe, CONFIG)
    latents, texts, ran = torch.randn(1, 4, 4, 8, 8), torch.randn(2, 6, 16).split(1), []
    hook = transformer.blocks[0].register_forward_hook(lambda *_: ran.append(step))
    pipe.scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        for step, t in enumerate(pipe.scheduler.timesteps, start=1):
            for text in texts[: 1 if step in (5, 6) else 2]:
                out = transformer(latents, t.expand(1), encoder_hidden_states=text, return_dict=False)[0]
            latents = pipe.scheduler.step(out, t, latents, return_dict=False)[0]
    hook.remove()
    # 5 is computed by one call; at 7 it reuses, and the other call, back again, computes.
    assert [ran.count(step) for step in range(1, STEPS + 1)] == [2, 2, 0, 0, 1, 0, 1, 2, 2, 2]
    steps = handle.report().steps
    assert [s.reason for s in steps][4:8] == ["rate", "reused", "restart", "rate"]
    assert [s.distance is None for s in steps[6:9]] == [True, False, False], "the restart compares with nothing"
    assert [s.previous_rate for s in steps[7:9]] == [1, 3]


@pytest.mark.parametrize(
    ("calls", "blocks"),
    [
        # Guidance left out at steps 3 to 5: the one call that remains is the second of the others.
        ({3: "c", 4: "c", 5: "c"}, [2, 2, 0, 0, 1]),
        # Guidance by a perturbed pass over the same text takes the place of guidance by the empty text: from then
        # on nothing tells the two passes apart, so they are computed.
        ({3: "cp", 4: "cp", 5: "cp"}, [2, 2, 1, 2, 2]),
    ],
    ids=["unguided", "perturbed"],
)
def test_branches_are_told_apart_by_what_conditions_them(pipe, transformer, calls, blocks):
    """Which residual a call reuses follows from the text that the pipeline holds, not from counting calls."""
    handle = apply_adacache(pipe, CONFIG)
    latents, texts, ran = torch.randn(1, 4, 4, 8, 8), {"u": torch.randn(1, 6, 16), "c": torch.randn(1, 6, 16)}, []
    texts["p"] = texts["c"]
    kept = {}
    hook = transformer.blocks[0].register_forward_hook(lambda *_: ran.append(step))
    pipe.scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        for step, t in enumerate(pipe.scheduler.timesteps, start=1):
            for name in calls.get(step, "uc"):
                before = len(ran)
                transformer(latents, t.expand(1), encoder_hidden_states=texts[name], return_dict=False)
                residual = handle._cached[0].batch.sessions[0].branch.residuals.get("norm_out")
                if len(ran) > before:
                    kept[name] = residual
                else:
                    assert residual is kept[name], f"step {step}: {name} reused another branch's residual"
            pipe.scheduler.step(latents, t, latents)
    hook.remove()
    assert [ran.count(step) for step in range(1, 6)] == blocks


def test_two_cached_pipelines_that_share_a_scheduler(pipe):
    torch.manual_seed(1)
    other = Loop(type(pipe.transformer).from_config(pipe.transformer.config).eval(), pipe.scheduler)
    handles = [apply_adacache(p, CONFIG) for p in (pipe, other)]
    for _ in range(2):
        for p, handle in zip((pipe, other), handles):
            p()
            assert handle.report().computed_steps == COMPUTED
    handles[0].remove()
    other()
    assert handles[1].report().computed_steps == COMPUTED
    handles[1].remove()
    assert not {"step", "set_timesteps"} & set(vars(pipe.scheduler))


def test_a_scheduler_that_somebody_else_wrapped(pipe):
    scheduler, called = pipe.scheduler, []
    plain = scheduler.step

    def mine(*args, **kwargs):
        called.append(1)
        return plain(*args, **kwargs)

    scheduler.step = mine
    handle = apply_adacache(pipe, CONFIG)
    pipe()
    handle.remove()
    assert len(called) == STEPS and scheduler.step is mine


def test_another_pipeline_runs_the_same_parts(pipe):
    """Nobody notes the length of its shortened run where the cached pipeline would; the scheduler knows it."""
    handle = apply_adacache(pipe, CONFIG)
    pipe()
    other = Loop(pipe.transformer, pipe.scheduler)
    begin = pipe.scheduler.set_timesteps

    def shortened(n):
        begin(n)
        pipe.scheduler.set_begin_index(4)

    handle.remove()
    pipe.scheduler.set_timesteps = shortened
    handle = apply_adacache(pipe, CONFIG)
    other(STEPS, skip=4)
    assert handle.report().num_steps == 6 and handle.report().computed_steps == [1, 2, 5, 6]
    handle.remove()
    del pipe.scheduler.set_timesteps


def test_reset_in_the_middle_keeps_the_tail(pipe, transformer):
    handle = apply_adacache(pipe, CONFIG)
    pipe.scheduler.set_timesteps(STEPS)
    latents, text = torch.randn(1, 4, 4, 8, 8), torch.randn(1, 6, 16)
    with torch.no_grad():
        for step, t in enumerate(pipe.scheduler.timesteps, start=1):
            if step == 4:
                handle.reset()
            transformer(latents, t.expand(1), encoder_hidden_states=text, return_dict=False)
            pipe.scheduler.step(latents, t, latents)
    assert handle.report().computed_steps == [4, 5, 8, 9, 10]


@torch.no_grad()
def test_half_precision_with_a_float32_exit(transformer):
    """Wan hands its last layer float32; what is kept has the dtype of the stream."""
    half = copy.deepcopy(transformer).to(torch.bfloat16)
    handle = apply_adacache(half, AdaCacheConfig(CONFIG.codebook, num_steps=STEPS))
    latents, text = torch.randn(1, 4, 4, 8, 8).bfloat16(), torch.randn(1, 6, 16).bfloat16()
    with handle.run():
        outputs = []
        for _ in range(4):
            outputs.append(half(latents, torch.tensor([500]), encoder_hidden_states=text, return_dict=False)[0])
        branch = handle._cached[0].batch.sessions[0].branch
        assert {branch.residuals["norm_out"].kept[0].dtype, branch.probes[0].dtype, outputs[-1].dtype} == {
            torch.bfloat16
        }
    assert handle.report().computed_steps == [1, 2]
    torch.testing.assert_close(outputs[3], outputs[0], rtol=0.02, atol=0.02)


def refused(*args, **kwargs) -> str:
    with pytest.raises((TypeError, ValueError)) as error:
        apply_adacache(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_arguments_are_named_and_leave_nothing(pipe, transformer):
    before = set(vars(transformer))
    assert refused(pipe, "fast").startswith("config: expected an AdaCacheConfig or None, got 'fast'")
    assert refused(object(), CONFIG).startswith("pipeline_or_transformer: expected a transformer, or a pipeline")
    assert refused(torch.nn.Linear(1, 1), CONFIG).startswith("transformer: expected a known class (")
    assert refused(transformer, CONFIG).startswith("config.num_steps: expected the number of steps for a bare")
    bare = AdaCacheConfig(CONFIG.codebook, num_steps=STEPS)
    assert refused(transformer, bare, calls_per_step=0).startswith("calls_per_step: expected an integer >= 1, got 0")
    assert refused(pipe, bare).startswith("config.num_steps: expected None for a pipeline, which says")
    assert refused(Loop(transformer, None), CONFIG).startswith("pipeline_or_transformer: expected a transformer, or")
    far = AdaCacheConfig(CONFIG.codebook, probe_block=3)
    assert refused(pipe, far) == "probe_block: expected an index into 3 blocks, got 3"
    assert set(vars(transformer)) == before and "step" not in vars(pipe.scheduler)
    apply_adacache(pipe, CONFIG)
    assert "is cached already; remove() that handle first" in refused(pipe, CONFIG)


def test_another_cache_is_refused(pipe, transformer):
    from diffusers import FirstBlockCacheConfig

    transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    try:
        other = "transformer: expected no other cache on WanTransformer3DModel, got FirstBlockCacheConfig"
        assert refused(pipe, CONFIG).startswith(other)
    finally:
        transformer.disable_cache()
