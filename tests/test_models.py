"""Every transformer that has a description, tiny and untrained, under the cache at every granularity."""

import pytest
import torch
from doubles.outputs import tensors
from tiny_models import MODELS

from adacache_triton import AdaCacheConfig, Codebook, MotionRegularization, apply_adacache
from adacache_triton.config import GRANULARITIES
from adacache_triton.models import described, stack_of

STEPS = 7
CODEBOOK = Codebook((1e6,), (3, 1))  # every comparison gives rate 3
COMPUTED = [1, 2, 5, 6, 7]
AVAILABLE = {name: tiny for name, tiny in MODELS.items() if tiny.available}
STACKS = {name: described(tiny.kind) for name, tiny in AVAILABLE.items()}
CACHED = [name for name, stack in STACKS.items() if stack.refused is None]
REFUSED = [name for name, stack in STACKS.items() if stack.refused is not None]
# What keeps the output of a module ungated, where the block does something else with it than to gate and add it.
UNGATED = {"mochi", "hunyuan_video_i2v", "wan_vace", "sana_wm"}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def models():
    made = {}
    yield lambda name: made.get(name) or made.setdefault(name, AVAILABLE[name].model())


def config(granularity="stack", rates=(3, 1), motion=None, **kwargs) -> AdaCacheConfig:
    threshold = 1e6 if rates[0] > 1 else 1e-9
    return AdaCacheConfig(Codebook((threshold,), rates), motion, STEPS, granularity=granularity, **kwargs)


@torch.no_grad()
def run(model, name, timesteps, handle=None) -> list[list[torch.Tensor]]:
    """The outputs of forwards at those timesteps, on one input."""
    call = lambda t: tensors(model(**AVAILABLE[name].inputs(0, t)))  # noqa: E731
    if handle is None:
        return [call(t) for t in timesteps]
    with handle.run():
        return [call(t) for t in timesteps]


def difference(a, b) -> float:
    return max((x.double() - y.double()).abs().max().item() for x, y in zip(a, b, strict=True))


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", CACHED)
def test_cached_forwards(models, name, granularity):
    """Skipped output is full output when nothing changed; computed output is the plain model's; nothing is left."""
    model = models(name)
    before = [(n, type(m), sorted(vars(m))) for n, m in model.named_modules()]
    times = [900 - 100 * step for step in range(STEPS)]
    plain = run(model, name, times)

    handle = apply_adacache(model, config(granularity))
    same = run(model, name, [900] * 4, handle)
    assert handle.report().computed_steps == [1, 2]
    assert max(difference(outputs, plain[0]) for outputs in same) <= 1e-5
    changed = run(model, name, times, handle)
    assert handle.report().computed_steps == COMPUTED
    assert all(equal(changed[step - 1], plain[step - 1]) for step in COMPUTED), "bit for bit"
    assert difference(changed[2], plain[2]) > 1e-4, "a reused step is seen"
    handle.remove()

    handle = apply_adacache(model, config(granularity, (1, 1)))
    assert all(equal(a, b) for a, b in zip(run(model, name, times, handle), plain)), "every step computed"
    handle.remove()
    assert all(equal(a, b) for a, b in zip(run(model, name, times), plain))
    assert [(n, type(m), sorted(vars(m))) for n, m in model.named_modules()] == before


@pytest.mark.parametrize("name", CACHED)
def test_all_granularities_give_one_video(models, name):
    """One schedule, the same outputs: what is kept apart adds up to what is kept whole."""
    model, outputs, kept = models(name), {}, {}
    # At one timestep, so that what a model does outside its blocks and modules is the same on every step.
    inputs = [AVAILABLE[name].inputs(seed, 500) for seed in (0, 1)]
    for granularity in GRANULARITIES:
        handle = apply_adacache(model, config(granularity))
        with torch.no_grad(), handle.run():
            outputs[granularity] = [tensors(model(**inputs[step > 1])) for step in range(4)]
        kept[granularity] = handle.report().kept_bytes
        handle.remove()
    for granularity in ("block", "module"):
        if name not in UNGATED:
            for a, b in zip(outputs["stack"], outputs[granularity]):
                assert difference(a, b) <= 1e-5, granularity
    assert kept["stack"] < kept["block"] < kept["module"]


@pytest.mark.parametrize("name", CACHED)
def test_the_probe_is_the_gated_attention(models, name):
    """It vanishes with the attention's output, and (but for a norm or a camera in between) doubles with it."""
    model, stack = models(name), STACKS[name]
    if name in {"sana_wm", "motif_video"}:
        pytest.skip("what a camera, or text cross-attention, adds is measured with the attention")
    handle = apply_adacache(model, config())
    hook, batch = handle._cached[0].hook, handle._cached[0].batch
    block = model.get_submodule(hook.probe[0])[hook.probe[1]]

    def probed(factor):
        scaled = lambda module, args, out: _scaled(out, factor)  # noqa: E731
        modules = dict(block.named_modules())
        attention = [modules[path] for path in stack.modules["attention"] if path in modules]
        parts = [module.register_forward_hook(scaled) for module in attention]
        handle.reset()
        run(model, name, [500], None)
        for part in parts:
            part.remove()
        return list(batch.sessions[0].branch.probes.values())

    once, never, twice = probed(1), probed(0), probed(2)
    assert len(once) == len(stack.streams)
    for r, zero, double in zip(once, never, twice):
        assert r.abs().max() > 1e-3 and not zero.any()
        if name != "mochi":
            torch.testing.assert_close(double, 2 * r, rtol=1e-4, atol=1e-5)
    handle.remove()


def _scaled(output, factor):
    return tuple(_scaled(x, factor) for x in output) if isinstance(output, tuple) else output * factor


@pytest.mark.parametrize("name", CACHED)
def test_frames_are_frames(models, name):
    """A change of one latent frame of the input changes, before the first block, that frame's tokens alone."""
    model, stack = models(name), STACKS[name]
    motion = MotionRegularization((1, STEPS))
    if stack.frames is None:
        with pytest.raises(ValueError, match="config.motion: expected None for .*, whose tokens do not lie in frames"):
            apply_adacache(model, config(motion=motion))
        return
    handle = apply_adacache(model, config(motion=motion))
    hook = handle._cached[0].hook
    entries, real = [], hook.enter

    def enter(key, args, kwargs):
        entries.append(hook.argument(key[0], stack.hidden, args, kwargs)) if not entries else None
        real(key, args, kwargs)

    hook.enter = enter
    call = AVAILABLE[name].inputs(0, 500)
    found = []
    for change in (False, True):
        call = AVAILABLE[name].inputs(0, 500)
        latents = call[stack.input]
        latents = latents[0] if isinstance(latents, list) else latents
        if change:
            frames = hook._frames
            axis = FRAME_AXIS.get(name, 2)
            width = latents.shape[axis] // frames
            latents.narrow(axis, width, width).add_(1.0)  # the second frame
        entries.clear()
        handle.reset()
        with torch.no_grad():
            model(**call)
        layout = "(b t) s c" if stack.layout == "(b s) t c" else stack.layout
        tokens = entries[0] if hook._tokens is None else entries[0][:, hook._tokens]
        batch, frames = len(latents), hook._frames
        if layout == "(b t) s c":
            found.append(tokens.unflatten(0, (batch, frames)))
        elif layout == "(t s) c":
            found.append(tokens.unflatten(0, (1, frames, -1)))
        else:
            found.append(tokens.unflatten(1, (frames, -1)))
    handle.remove()
    moved = (found[1] - found[0]).abs().amax(dim=(0, 2, 3))
    assert moved[1] > 1e-4, "the second frame"
    assert not moved[0] and not moved[2:].any(), "and no other"


FRAME_AXIS = {
    "cogvideox": 1, "cogvideox_1_5": 1, "consisid": 1, "kandinsky_5": 1, "kandinsky_6": 1, "kandinsky_6_sr": 1,
    "anyflow": 1, "ltx": 1, "ltx2": 1, "ltx2_3": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_write_a_cache_of_their_own_are_refused(models, name):
    with pytest.raises(ValueError, match=f"{AVAILABLE[name].kind} cannot be cached: its blocks .*KV cache"):
        apply_adacache(models(name), config())


def test_a_config_can_cache_attention_only_or_recompute_the_mlp_more_often(models):
    model, ran = models("wan"), []
    parts = {"attention": "attn1", "cross_attention": "attn2", "mlp": "ffn"}
    hooks = [
        getattr(model.blocks[0], path).register_forward_hook(lambda *_, part=part: ran[-1].append(part))
        for part, path in parts.items()
    ]
    patterns = {}
    for modules in (None, {"attention": None}, {"attention": None, "cross_attention": None, "mlp": 1}):
        handle = apply_adacache(model, config("module", (4, 1), modules=modules))
        ran.clear()
        with torch.no_grad(), handle.run():
            for step in range(STEPS):
                ran.append([])
                model(**AVAILABLE["wan"].inputs(0, 900 - step))
        patterns[str(modules)] = [["".join(p[0] for p in parts) for parts in ran][i] for i in range(STEPS)]
        handle.remove()
    for hook in hooks:
        hook.remove()
    every, rate = "acm", [True, True, False, False, False, True, True]  # rate 4 at step 2, then the tail
    assert list(patterns.values()) == [
        [every if computed else "" for computed in rate],
        [every if computed else "cm" for computed in rate],
        ["acm", "acm", "", "m", "", "acm", "acm"],
    ]


def test_modules_that_a_model_has_not_are_named(models):
    with pytest.raises(ValueError, match="config.modules: CogVideoX.* has attention, mlp, got 'cross_attention'"):
        apply_adacache(models("cogvideox"), config("module", modules={"cross_attention": None}))


def test_every_registered_class_of_diffusers_is_tested():
    import diffusers

    from adacache_triton.models import registered

    tested = {tiny.kind for tiny in MODELS.values()}
    assert {name for name in registered() if hasattr(diffusers, name)} <= tested
    assert stack_of(AVAILABLE["wan"].model()) is STACKS["wan"]
