"""Whole diffusers pipelines, tiny and untrained, under the cache: which steps run their blocks, and what comes out."""

import diffusers
import pytest
import torch
from doubles.outputs import tensors
from tiny_pipelines import PIPELINES

from adacache_triton import AdaCacheConfig, Codebook, apply_adacache
from adacache_triton.models import stack_of

STEPS = 8
CONFIG = AdaCacheConfig(Codebook((1e6,), (3, 1)))  # every comparison gives rate 3
COMPUTED = [1, 2, 5, 7, 8]
EVERY = AdaCacheConfig(Codebook((1e-9,), (1, 1)))
NAMES = [name for name, tiny in PIPELINES.items() if tiny.available]
REFUSED = [name for name in NAMES if name == "anyflow_far"]
CACHED = [name for name in NAMES if name not in REFUSED]
# Denoising loops in one call: sections, segments, chunks and stages.
LOOPS = {"framepack": 2, "wan_animate": 2, "helios": 2, "helios_pyramid": 3}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def pipeline(request):
    """A pipeline, and a function that runs it."""
    tiny = PIPELINES[request.param]
    pipe, _ = tiny.make(STEPS)
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)

    def run():
        return tensors(pipe(**tiny.make(STEPS)[1]))

    return request.param, pipe, run


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("pipeline", CACHED, indirect=True, ids=CACHED)
def test_a_pipeline_under_the_cache(pipeline):
    name, pipe, run = pipeline
    plain = run()
    handle = apply_adacache(pipe, EVERY)
    assert equal(run(), plain), "every step computed is the plain video, bit for bit"
    handle.remove()

    handle = apply_adacache(pipe, CONFIG)
    ran, hooks = [], []
    for part in ("transformer", "transformer_2"):
        model = getattr(pipe, part, None)
        if model is not None:
            block = model.get_submodule(stack_of(model).lists[0])[0]
            hooks.append(block.register_forward_hook(lambda *_: ran.append(handle.current.step)))
    first, report = run(), handle.report()
    # Wan 2.2: each transformer has its own run, of 3 and of 5 steps here.
    expected = [1, 2, 3, 4, 5, 7, 8] if name == "wan_2_2" else COMPUTED
    assert report.num_steps == STEPS and report.computed_steps == expected
    calls = len(ran) // (LOOPS.get(name, 1) * len(expected))
    assert ran == [step for step in expected for _ in range(calls)] * LOOPS.get(name, 1), "blocks ran when it says"
    assert not equal(first, plain) and all(x.isfinite().all() for x in first)
    assert equal(run(), first), "and the next run is the same again"
    for hook in hooks:
        hook.remove()
    handle.remove()
    assert equal(run(), plain)


@pytest.mark.parametrize("pipeline", ["wan", "wan_2_2", "cogvideox", "skyreels_v2_df", "framepack"], indirect=True)
@pytest.mark.parametrize("stop", [1, 4, 6])
def test_a_run_after_an_aborted_one(pipeline, stop):
    """Stopped by a scheduler that fails, in each kind of loop: the next run is as if nothing had been."""
    name, pipe, run = pipeline
    apply_adacache(pipe, CONFIG)
    expected, calls = run(), []

    def fail(module, args):
        calls.append(1)
        if len(calls) == stop:
            raise RuntimeError("stopped")

    hook = pipe.transformer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stopped"):
        run()
    hook.remove()
    assert equal(run(), expected)


@pytest.mark.parametrize("pipeline", REFUSED, indirect=True)
def test_a_pipeline_whose_blocks_write_a_cache_is_refused(pipeline):
    with pytest.raises(ValueError, match="AnyFlowFARTransformer3DModel cannot be cached: its blocks write a KV cache"):
        apply_adacache(pipeline[1], CONFIG)


@pytest.mark.parametrize("pipeline", ["wan"], indirect=True)
def test_guidance_branches_are_known_by_the_pipelines_names(pipeline):
    """Where the pipeline names them, neither the order of the calls nor the tensors matter."""
    _, pipe, run = pipeline
    handle = apply_adacache(pipe, CONFIG)
    seen = []
    batch = handle._cached[0].batch
    pipe.transformer.register_forward_hook(lambda *_: seen.append(batch.sessions[0].branch.name))
    run()
    assert seen == ["cond", "uncond"] * STEPS
    assert handle._cached[0].hook._name is None, "forgotten when the context ends"


@pytest.mark.parametrize("pipeline", ["wan_2_2"], indirect=True)
def test_each_of_two_transformers_has_its_own_run(pipeline):
    _, pipe, run = pipeline
    handle = apply_adacache(pipe, CONFIG)
    run()
    high, low = (each.batch.sessions[0].schedule for each in handle._cached)
    assert [s.step for s in high.steps] == [1, 2, 3] and [s.step for s in low.steps] == [1, 2, 3, 4, 5]
    assert [s.reason for s in low.steps] == ["first", "rate", "reused", "tail", "tail"]
    assert [s.step for s in handle.report().steps] == list(range(1, 9))
    assert handle.current.step == 8
    handle.remove()
    pipe.transformer = None  # as some checkpoints come
    pipe.register_to_config(boundary_ratio=1.0)
    handle = apply_adacache(pipe, CONFIG)
    assert len(handle._cached) == 1


@pytest.mark.parametrize("pipeline", ["skyreels_v2_df"], indirect=True)
def test_windows_of_a_longer_video_are_runs_of_their_own(pipeline):
    """Their loop steps copies of the scheduler only, and starts anew without a word to it."""
    _, pipe, _ = pipeline
    handle = apply_adacache(pipe, CONFIG)
    begun = []
    batch = handle._cached[0].batch
    pipe.transformer.register_forward_hook(lambda *_: begun.append((batch.sessions[0].schedule, handle.current.reason)))
    pipe(**PIPELINES["skyreels_v2_df"].make(STEPS)[1] | {
        "num_frames": 17, "base_num_frames": 9, "overlap_history": 5,
    })  # fmt: skip
    windows = list(dict.fromkeys(id(schedule) for schedule, _ in begun))
    assert len(windows) >= 2
    for window in windows:
        reasons = [reason for schedule, reason in begun if id(schedule) == window][::2]
        assert reasons == ["first", "rate", "reused", "reused", "rate", "reused", "tail", "tail"]


@pytest.mark.parametrize("pipeline", ["wan"], indirect=True)
def test_a_second_order_scheduler_calls_the_model_twice_a_step(pipeline):
    """What counts are the model's calls: 2 N - 1 of them, the last two of which are computed."""
    _, pipe, run = pipeline
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    handle = apply_adacache(pipe, CONFIG)
    run()
    report = handle.report()
    assert report.num_steps == 2 * STEPS - 1 and report.computed_steps == [1, 2, 5, 8, 11, 14, 15]


@pytest.mark.parametrize("pipeline", ["wan_v2v"], indirect=True)
@pytest.mark.parametrize(("strength", "steps"), [(0.5, 4), (0.9, 7)])
def test_a_run_that_starts_from_a_video(pipeline, strength, steps):
    _, pipe, _ = pipeline
    handle = apply_adacache(pipe, CONFIG)
    pipe(**PIPELINES["wan_v2v"].make(STEPS)[1] | {"num_inference_steps": STEPS, "strength": strength})
    report = handle.report()
    assert report.num_steps == steps
    assert report.computed_steps == {4: [1, 2, 3, 4], 7: [1, 2, 5, 6, 7]}[steps]
