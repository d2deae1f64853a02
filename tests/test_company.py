"""The cache beside all that may be done to a pipeline: offloading, casting, LoRA, other caches, copies, threads."""

import copy
import pickle
import threading
from collections import OrderedDict
from dataclasses import replace
from functools import cache, partial

import accelerate
import diffusers
import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import apply_first_block_cache, apply_group_offloading
from packaging.version import Version
from tiny_models import MODELS, sample
from tiny_pipelines import PIPELINES
from torch import nn

from adacache_triton import AdaCacheConfig, Codebook, apply_adacache
from adacache_triton.config import GRANULARITIES
from adacache_triton.hooks import DROPPING

STEPS = 8
CONFIG = AdaCacheConfig(Codebook((1e6,), (3, 1)))  # every comparison gives rate 3
COMPUTED, REUSED = [1, 2, 5, 7, 8], [3, 4, 6]
KINDS = [*(("wan", granularity) for granularity in GRANULARITIES), ("latte", "stack")]
EVERY_STEP = AdaCacheConfig(Codebook((1e-9,), (1, 1)))
CPU = torch.device("cpu")


def made(name: str = "wan"):
    return PIPELINES[name].make(STEPS)[0]


def video(pipe, name: str = "wan", seed: int = 0, **arguments) -> torch.Tensor:
    call = PIPELINES[name].call(STEPS) | dict(num_inference_steps=STEPS, output_type="latent") | arguments
    return sample(pipe(generator=torch.Generator().manual_seed(seed), **call))


def after(step: int, do):
    """A pipeline's callback that does something at the end of a step, counted from 1."""

    def callback(pipe, index, timestep, kwargs):
        if index + 1 == step:
            do()
        return {}

    return callback


def tree(model: nn.Module) -> dict:
    """All that a module tree holds: modules, attributes, hooks."""

    def held(value):
        return {k: id(v) for k, v in value.items()} if isinstance(value, (dict, OrderedDict)) else id(value)

    return {
        name: (type(module), id(module), {key: held(value) for key, value in vars(module).items()})
        for name, module in model.named_modules()
    }


# Offloading, casting, quantisation. On one device nothing moves, but all hooks are there.


class Quantized(nn.Module):
    """A linear layer of 8-bit weights, as libraries put them in the place of a model's own."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("weight", (linear.weight.detach() / self.scale).round().to(torch.int8))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


def replace_linears(model: nn.Module, kind: type) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "blocks." in name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, kind(module))


def offload_sequentially(pipe) -> None:
    # As `enable_sequential_cpu_offload`, which takes no CPU for an accelerator.
    accelerate.cpu_offload(pipe.transformer, CPU, offload_buffers=True)


def offload_groups(pipe, **kind) -> None:
    if Version(diffusers.__version__) < Version("0.42") and not torch.accelerator.is_available():
        pytest.skip("diffusers before 0.42 offloads groups only where there is an accelerator")
    apply_group_offloading(pipe.transformer, onload_device=CPU, offload_device=CPU, **kind)


COMPANY = {
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential offload": offload_sequentially,
    "group offload": partial(offload_groups, offload_type="block_level", num_blocks_per_group=2),
    "leaf offload": partial(offload_groups, offload_type="leaf_level"),
    "layerwise casting": lambda pipe: pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
    "quantised": lambda pipe: replace_linears(pipe.transformer, Quantized),
}
APPROXIMATE = ("layerwise casting", "quantised")


@cache
def alone(name: str, granularity: str) -> torch.Tensor:
    """The cached video of a pipeline with nothing else done to it."""
    pipe = made(name)
    apply_adacache(pipe, replace(CONFIG, granularity=granularity))
    return video(pipe, name)


def joined(model: nn.Module) -> bool:
    """Whether any of that is on a model."""
    modules = list(model.modules())
    hooked = any(hasattr(m, "_hf_hook") or (hasattr(m, "_diffusers_hook") and m._diffusers_hook.hooks) for m in modules)
    return hooked or any(isinstance(m, Quantized) for m in modules)


@pytest.mark.parametrize("company", COMPANY)
@pytest.mark.parametrize(("name", "granularity"), KINDS)
def test_company_before_and_after(name, company, granularity):
    config, pipe = replace(CONFIG, granularity=granularity), made(name)
    COMPANY[company](pipe)
    plain = video(pipe, name)
    handle = apply_adacache(pipe, config)
    cached = video(pipe, name)
    assert torch.equal(video(pipe, name), cached) and handle.report().computed_steps == COMPUTED
    assert torch.equal(cached, alone(name, granularity)) or company in APPROXIMATE
    assert not torch.equal(cached, plain)
    handle.remove()
    assert torch.equal(video(pipe, name), plain)
    apply_adacache(pipe, replace(EVERY_STEP, granularity=granularity))
    assert torch.equal(video(pipe, name), plain) and joined(pipe.transformer)

    pipe = made(name)
    handle = apply_adacache(pipe, config)
    COMPANY[company](pipe)
    assert torch.equal(video(pipe, name), cached) and torch.equal(video(pipe, name), cached)
    assert handle.report().computed_steps == COMPUTED
    handle.remove()
    assert torch.equal(video(pipe, name), plain) and joined(pipe.transformer)


@pytest.mark.parametrize("name", ["wan", "latte"])
def test_offloading_that_ends_while_cached(name):
    pipe = made(name)
    handle = apply_adacache(pipe, CONFIG)
    pipe.enable_model_cpu_offload(device="cpu")
    video(pipe, name)
    pipe.remove_all_hooks()
    assert not joined(pipe.transformer)
    assert torch.equal(video(pipe, name), alone(name, "stack")) and handle.report().computed_steps == COMPUTED


# LoRA and other changes of weights.


class Lora(nn.Module):
    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.base_layer, generator = linear, torch.Generator().manual_seed(0)
        down, up = (2, linear.in_features), (linear.out_features, 2)
        self.down, self.up = (nn.Parameter(torch.randn(shape, generator=generator)) for shape in (down, up))

    def forward(self, x):
        return self.base_layer(x) + x @ self.down.T @ self.up.T


def load_lora(model: nn.Module, *args, **kwargs) -> None:
    replace_linears(model, Lora)


def unload_lora(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, Lora):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base_layer)


@pytest.fixture
def lora(monkeypatch):
    """The two methods that diffusers' pipelines call, without PEFT, which they need."""
    kind = type(made().transformer)
    monkeypatch.setattr(kind, "load_lora_adapter", load_lora)
    monkeypatch.setattr(kind, "unload_lora", unload_lora)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_lora_between_runs(lora, granularity):
    config = replace(CONFIG, granularity=granularity)
    pipe, with_lora = made(), made()
    load_lora(with_lora.transformer)
    apply_adacache(with_lora, config)
    handle = apply_adacache(pipe, config)
    without = video(pipe)
    pipe.transformer.load_lora_adapter({})
    loaded = video(pipe)
    assert torch.equal(loaded, video(with_lora)) and not torch.equal(loaded, without)
    pipe.transformer.unload_lora()
    assert torch.equal(video(pipe), without) and handle.report().computed_steps == COMPUTED
    handle.remove()
    assert not set(DROPPING) & set(vars(pipe.transformer))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_lora_in_the_middle_of_a_run(lora, granularity):
    """The step after the change was to be reused; it is computed, and so is one to compare with it."""
    pipe, kept = made(), []
    handle = apply_adacache(pipe, replace(CONFIG, granularity=granularity))
    model = pipe.transformer
    for change in (partial(model.load_lora_adapter, {}), model.unload_lora):

        def changed(change=change):
            change()
            kept.extend(handle._cached[0].batch.sessions[0].branches)

        video(pipe, callback_on_step_end=after(3, changed))
        reasons = [step.reason for step in handle.report().steps]
        assert reasons == ["first", "rate", "reused", "restart", "rate", "reused", "tail", "tail"] and not kept
    assert torch.equal(video(pipe), alone("wan", granularity))


@pytest.mark.parametrize("method", DROPPING)
def test_whatever_changes_weights_drops_what_is_kept(monkeypatch, method):
    pipe = made()
    kind, called = type(pipe.transformer), []
    monkeypatch.setattr(kind, method, lambda self: called.append(self))
    handle = apply_adacache(pipe, CONFIG)
    video(pipe, callback_on_step_end=after(3, getattr(pipe.transformer, method)))
    assert [step.reason for step in handle.report().steps][2:5] == ["reused", "restart", "rate"]
    assert called[0] is pipe.transformer


def test_lora_with_peft():
    peft = pytest.importorskip("peft")
    pipe = made()
    handle, model = apply_adacache(pipe, CONFIG), pipe.transformer
    torch.manual_seed(0)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "proj_out"], init_lora_weights=False))
    adapted = video(pipe)
    assert not torch.equal(adapted, alone("wan", "stack")) and handle.report().computed_steps == COMPUTED
    for change in (model.disable_lora, model.enable_lora, partial(model.set_adapters, "default", 0.5)):
        video(pipe, callback_on_step_end=after(3, change))
        assert [step.reason for step in handle.report().steps][3:5] == ["restart", "rate"]
    model.set_adapters("default", 1.0)
    assert torch.equal(video(pipe), adapted)
    model.unload_lora()
    assert torch.equal(video(pipe), alone("wan", "stack"))


def test_weights_changed_by_hand():
    """Nobody tells the cache: a new run starts anew, and within one `reset` is the user's."""
    pipe, changed = made(), made()

    @torch.no_grad()
    def change(transformer):
        for parameter in transformer.blocks.parameters():
            parameter.mul_(1.1)

    change(changed.transformer)
    apply_adacache(changed, CONFIG)
    handle = apply_adacache(pipe, CONFIG)
    video(pipe)
    change(pipe.transformer)
    assert torch.equal(video(pipe), video(changed))
    video(pipe, callback_on_step_end=after(3, handle.reset))
    assert handle.report().steps[0].step == 4 and handle.report().steps[0].reason == "first"


# Other caches.


def pyramid(pipe) -> PyramidAttentionBroadcastConfig:
    return PyramidAttentionBroadcastConfig(2, current_timestep_callback=lambda: 500)


@pytest.mark.parametrize("config", [lambda _: FirstBlockCacheConfig(threshold=0.1), pyramid], ids=["fbc", "pab"])
def test_another_cache_before_and_after(config):
    pipe = made()
    config, model, plain = config(pipe), pipe.transformer, video(pipe)
    model.enable_cache(config)
    kind = type(config).__name__
    before = tree(model)
    with pytest.raises(ValueError, match=f"^transformer: expected no other cache on WanTransf.*, got {kind}; disable"):
        apply_adacache(pipe, CONFIG)
    assert tree(model) == before
    model.disable_cache()

    handle = apply_adacache(pipe, CONFIG)
    with pytest.raises(ValueError, match=f"^enable_cache: WanTransf.* is cached by AdaCache; remove.* before {kind}$"):
        model.enable_cache(config)
    assert not model.is_cache_enabled
    assert torch.equal(video(pipe), alone("wan", "stack")) and handle.report().computed_steps == COMPUTED
    handle.remove()
    assert torch.equal(video(pipe), plain)
    model.enable_cache(config)
    assert model.is_cache_enabled and "enable_cache" not in vars(model)


def test_another_cache_without_its_configuration():
    pipe = made()
    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="^transformer: expected no other cache on WanTransf.*, got FBCHeadBlockHook"):
        apply_adacache(pipe, CONFIG)


# Applying and removing.


def test_applying_and_removing_twice():
    pipe = made()
    plain, before = video(pipe), tree(pipe.transformer)
    first = apply_adacache(pipe, CONFIG)
    for again in (pipe, pipe.transformer, made_of(pipe)):
        with pytest.raises(ValueError, match="is cached already; remove.. that handle first"):
            apply_adacache(again, replace(CONFIG, num_steps=STEPS if again is pipe.transformer else None))
    assert torch.equal(video(pipe), alone("wan", "stack"))
    first.remove()
    second = apply_adacache(pipe, CONFIG)
    first.remove()  # not the second
    assert torch.equal(video(pipe), alone("wan", "stack")) and second.report().computed_steps == COMPUTED
    second.remove()
    second.remove()
    assert tree(pipe.transformer) == before and torch.equal(video(pipe), plain)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", [name for name, tiny in MODELS.items() if tiny.available])
@torch.no_grad()
def test_the_module_tree_is_itself_between_forwards_and_after(name, granularity):
    tiny = MODELS[name]
    model = tiny.model()
    model(**tiny.inputs())  # some models keep their own tables
    before, state = tree(model), {k: v.clone() for k, v in model.state_dict().items()}
    names = [(n, type(m), id(m)) for n, m in model.named_modules()]
    try:
        handle = apply_adacache(model, replace(CONFIG, num_steps=STEPS, granularity=granularity))
    except (ValueError, TypeError):
        assert tree(model) == before, "what is refused leaves nothing"
        return
    with handle.run():
        for _ in range(3):
            model(**tiny.inputs())
            assert [(n, type(m), id(m)) for n, m in model.named_modules()] == names
    assert handle.report().computed_steps == [1, 2]
    assert list(model.state_dict()) == list(state)
    handle.remove()
    assert tree(model) == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


# Copies.


@pytest.mark.parametrize("when", ["before a run", "within", "after"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
@pytest.mark.parametrize(("name", "granularity"), KINDS)
def test_copies_are_uncached_and_independent(name, duplicate, granularity, when):
    pipe, copies, plain = made(name), [], video(made(name), name)
    handle = apply_adacache(pipe, replace(CONFIG, granularity=granularity))
    if when == "before a run":
        copies.append(duplicate(pipe.transformer))
    elif when == "within":  # after a reused step
        video(pipe, name, callback_on_step_end=after(3, lambda: copies.append(duplicate(pipe.transformer))))
    assert torch.equal(video(pipe, name), alone(name, granularity))
    if when == "after":
        copies.append(duplicate(pipe.transformer))

    other = made(name)
    other.transformer = copies[0]
    before = {n: type(m) for n, m in other.transformer.named_modules()}
    assert before == {n: type(m) for n, m in pipe.transformer.named_modules()}
    assert torch.equal(video(other, name), plain)
    theirs = apply_adacache(other, CONFIG)
    assert torch.equal(video(other, name), alone(name, "stack"))
    assert torch.equal(video(pipe, name), alone(name, granularity))
    theirs.remove()
    assert torch.equal(video(other, name), plain)
    assert handle.report().computed_steps == COMPUTED


def test_a_copied_pipeline(tmp_path):
    pipe, plain = made(), video(made())
    apply_adacache(pipe, CONFIG)
    video(pipe)
    for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert other.transformer is not pipe.transformer and torch.equal(video(other), plain)
    pipe.transformer.save_pretrained(tmp_path)
    loaded = made()
    loaded.transformer = type(pipe.transformer).from_pretrained(tmp_path)
    assert torch.equal(video(loaded), plain) and torch.equal(video(pipe), alone("wan", "stack"))


# Pipelines that share a transformer.


def made_of(pipe):
    """Another pipeline of the same parts, with a scheduler of its own."""
    other = type(pipe)(**pipe.components | {"scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config)})
    other.set_progress_bar_config(disable=True)
    return other


class Stopped(Exception):
    pass


def stop():
    raise Stopped


# Pipelines with names for guidance, without, and one that does not show its timestep.
SHARED = ["wan", "latte", "sana_video"]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", SHARED)
def test_another_pipeline_after_an_aborted_run(name, granularity):
    """It is not cached, and reuses nothing of what the first one left."""
    pipe = made(name)
    other = made_of(pipe)
    plain = video(other, name, seed=1)
    apply_adacache(pipe, replace(CONFIG, granularity=granularity))
    for step in (*range(1, STEPS), None):
        if step is None:
            video(pipe, name)
        else:
            with pytest.raises(Stopped):
                video(pipe, name, callback_on_step_end=after(step, stop))
        assert torch.equal(video(other, name, seed=1), plain)
    assert torch.equal(video(pipe, name), alone(name, granularity))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", SHARED)
def test_another_pipeline_in_the_middle_of_a_run(name, granularity):
    """A callback makes another video with the same transformer. Its end drops what is kept, as diffusers' caches do."""
    pipe = made(name)
    other = made_of(pipe)
    plain, videos = video(other, name, seed=1), []
    handle = apply_adacache(pipe, replace(CONFIG, granularity=granularity))
    for step in range(1, STEPS):
        call = partial(video, other, name, seed=1)
        interrupted = video(pipe, name, callback_on_step_end=after(step, lambda call=call: videos.append(call())))
        assert torch.equal(videos[-1], plain) and len(handle.report().steps) == STEPS
        if name != "sana_video":  # which tells neither its steps nor its end: there more is computed
            drop = pipe.transformer._reset_stateful_cache
            assert torch.equal(interrupted, video(pipe, name, callback_on_step_end=after(step, drop)))


def test_both_pipelines_share_the_scheduler_too():
    """Then the other one's run is followed as well, though the first was aborted and still shows its timestep."""
    pipe = made()
    other = type(pipe)(**pipe.components)
    other.set_progress_bar_config(disable=True)
    handle = apply_adacache(pipe, CONFIG)
    with pytest.raises(Stopped):
        video(pipe, callback_on_step_end=after(4, stop))
    assert torch.equal(video(other), alone("wan", "stack")) and handle.report().computed_steps == COMPUTED


def test_one_transformer_cached_for_one_pipeline_then_for_another():
    pipe = made()
    other = made_of(pipe)
    for each in (pipe, other, pipe):
        handle = apply_adacache(each, CONFIG)
        assert torch.equal(video(each), alone("wan", "stack"))
        handle.remove()
    assert not {"step", "set_timesteps"} & {*vars(pipe.scheduler), *vars(other.scheduler)}


def test_a_name_does_not_hide_another_text():
    """Two videos in one loop, both with the context that pipelines call cond."""
    tiny, ran = MODELS["wan"], []
    model = tiny.model()
    apply_adacache(model, replace(CONFIG, num_steps=STEPS))
    texts = [tiny.inputs(seed)["encoder_hidden_states"] for seed in (0, 1)]
    model.blocks[0].register_forward_hook(lambda *_: ran.append(step))
    with torch.no_grad():
        for step, which in enumerate((0, 0, 1, 0, 0, 0), start=1):
            with model.cache_context("cond"):
                model(**tiny.inputs(timestep=900 - step) | {"encoder_hidden_states": texts[which]})
    assert ran == [1, 2, 3, 4, 5]


# Threads.


def in_thread(do) -> threading.Thread:
    thread = threading.Thread(target=do, daemon=True)
    thread.start()
    return thread


def test_two_pipelines_in_two_threads():
    pipes, videos = [made("wan"), made("latte")], {}
    handles = [apply_adacache(pipe, CONFIG) for pipe in pipes]

    def make(pipe, name):
        videos[name] = [video(pipe, name) for _ in range(3)]

    threads = [in_thread(partial(make, *each)) for each in zip(pipes, ("wan", "latte"))]
    for thread in threads:
        thread.join()
    assert all(torch.equal(v, alone(name, "stack")) for name in videos for v in videos[name]) and len(videos) == 2
    assert all(handle.report().computed_steps == COMPUTED for handle in handles)


@pytest.mark.parametrize("step", [2, 3], ids=["computed", "reused"])
def test_two_threads_in_one_transformer_are_refused(step):
    """The second is, clearly; the first goes on as if nothing had happened."""
    pipe, inside, go, videos = made(), threading.Event(), threading.Event(), []
    apply_adacache(pipe, CONFIG)

    def wait(*_):
        if len(pipe.transformer._adacache_handle.report().steps) == step:
            inside.set()
            assert go.wait(60)

    hook = pipe.transformer.condition_embedder.register_forward_hook(wait)
    thread = in_thread(lambda: videos.append(video(pipe)))
    assert inside.wait(60)
    with pytest.raises(RuntimeError, match="cached WanTransformer3DModel is called by two threads at a time"):
        video(made_of(pipe))
    go.set()
    thread.join()
    hook.remove()
    assert torch.equal(videos[0], alone("wan", "stack")) and torch.equal(video(pipe), videos[0])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_was_killed_inside_a_forward():
    pipe = made()
    apply_adacache(pipe, CONFIG)
    video(pipe)
    before = tree(pipe.transformer)

    def die(*_):
        raise SystemExit

    hook = pipe.transformer.proj_out.register_forward_pre_hook(die)
    in_thread(lambda: video(pipe)).join()
    hook.remove()
    assert torch.equal(video(pipe), alone("wan", "stack")) and tree(pipe.transformer) == before


@pytest.mark.parametrize("turns", ["0101010101010101", "0010010110101101", "0001110000111101"])
@torch.no_grad()
def test_two_threads_that_take_turns_reuse_nothing_of_each_other(turns):
    """Two denoising loops with the same text through one bare transformer, a lock around each call."""
    tiny, outputs = MODELS["wan"], {}
    model = tiny.model()
    plain = {(who, i): sample(model(**turn(who, i))) for who in (0, 1) for i in range(8)}
    text = turn(0, 0)["encoder_hidden_states"]
    apply_adacache(model, replace(CONFIG, num_steps=STEPS))
    turn_of, changed, at = list(map(int, turns)), threading.Condition(), []

    def loop(who):
        torch.set_grad_enabled(False)
        for i in range(8):
            with changed:
                assert changed.wait_for(lambda: turn_of[len(at)] == who, 60)
                outputs[who, i] = sample(model(**turn(who, i) | {"encoder_hidden_states": text}))
                at.append(who)
                changed.notify_all()

    for thread in [in_thread(partial(loop, who)) for who in (0, 1)]:
        thread.join()
    others = [i for i in range(1, 16) if turn_of[i] != turn_of[i - 1]]
    for position in range(16):
        key = (turn_of[position], turn_of[:position].count(turn_of[position]))
        # Two steps after a change of turns, and the first two of all, are computed.
        if position < 2 or position in others or position - 1 in others:
            assert torch.equal(outputs[key], plain[key])


def turn(who: int, i: int) -> dict:
    tiny = MODELS["wan"].inputs(seed=0, timestep=900 - 100 * i)
    return tiny | {"hidden_states": MODELS["wan"].inputs(seed=who)["hidden_states"]}


@torch.no_grad()
def test_a_forward_of_another_thread_is_none_of_a_pipelines_run():
    pipe, outputs = made(), []
    model, call = pipe.transformer, MODELS["wan"].inputs()

    def forward():
        with torch.no_grad():
            outputs.append(sample(model(**call)))

    forward()
    handle = apply_adacache(pipe, CONFIG)
    pipe.scheduler.set_timesteps(STEPS)
    for step, t in enumerate(pipe.scheduler.timesteps, start=1):
        if step == 3:
            in_thread(forward).join()
        model(**call | {"timestep": t.expand(1)})
        pipe.scheduler.step(call["hidden_states"], t, call["hidden_states"])
    assert torch.equal(*outputs) and handle.report().computed_steps == [3, 4, 7, 8]


# Exceptions.


@pytest.mark.parametrize(("name", "granularity"), [*KINDS, ("hunyuan_video", "stack")])
def test_an_exception_inside_a_block(name, granularity):
    pipe = made(name)
    handle = apply_adacache(pipe, replace(CONFIG, granularity=granularity))
    expected, before = video(pipe, name), tree(pipe.transformer)

    class Broken(Exception):
        pass

    for path in handle._cached[0].hook.stack.lists:
        blocks = pipe.transformer.get_submodule(path)
        for block in (blocks[0], blocks[-1]):
            for step in (1, 5):

                def fail(*_, step=step):
                    if handle.current.step == step:
                        raise Broken

                hook = block.register_forward_hook(fail)
                with pytest.raises(Broken):
                    video(pipe, name)
                hook.remove()
                assert tree(pipe.transformer) == before, path
                assert torch.equal(video(pipe, name), expected)


def test_an_exit_that_goes_away_between_two_steps():
    """The user puts another module in its place: a reused step, which has no blocks, must not go unnoticed."""
    tiny = MODELS["wan"]
    model = tiny.model()
    handle = apply_adacache(model, replace(CONFIG, num_steps=STEPS))
    with torch.no_grad(), handle.run():
        for _ in range(2):
            model(**tiny.inputs())
        model.norm_out = copy.deepcopy(model.norm_out)
        with pytest.raises(RuntimeError, match="BlockStack.exit: 'norm_out' did not run after the blocks of a reused"):
            model(**tiny.inputs())
    assert len(model.blocks) == 3
