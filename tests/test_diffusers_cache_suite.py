"""What diffusers' own tests ask of a cache, asked of this one: state, double use, hooks, inference, contexts, reset.

After the six checks of its CacheTesterMixin (tests/models/testing_utils/cache.py), for the models that these cover.
"""

import pytest
import torch
from doubles.outputs import tensors
from tiny_models import MODELS

from adacache_triton import AdaCacheConfig, Codebook, apply_adacache

COVERED = ["allegro", "cogvideox", "flux", "hunyuan_video", "latte", "ltx", "mochi", "wan"]
CONFIG = AdaCacheConfig(Codebook((1e6,), (3, 1)), num_steps=8)

pytestmark = pytest.mark.filterwarnings("ignore")
each = pytest.mark.parametrize("name", COVERED)


@torch.no_grad()
def forward(model, name, timestep=900.0, seed=0):
    return tensors(model(**MODELS[name].inputs(seed, timestep)))[0]


def hooks(model) -> int:
    return sum(len(value) for m in model.modules() for key, value in vars(m).items() if key.endswith("_hooks"))


@each
def test_enable_and_disable(name):
    model = MODELS[name].model()
    before = hooks(model)
    handle = apply_adacache(model, CONFIG)
    assert hooks(model) > before, "hooks are registered"
    handle.remove()
    assert hooks(model) == before, "and taken away"
    apply_adacache(model, CONFIG).remove()


@each
def test_enabling_twice_raises(name):
    model = MODELS[name].model()
    handle = apply_adacache(model, CONFIG)
    with pytest.raises(ValueError, match="cached already"):
        apply_adacache(model, CONFIG)
    handle.remove()


@each
def test_inference(name):
    """A reused step differs from the uncached one in values, not in shape; without the cache all is as before."""
    model = MODELS[name].model()
    times = (900.0, 700.0, 500.0)
    plain = [forward(model, name, t) for t in times]
    handle = apply_adacache(model, CONFIG)
    cached = [forward(model, name, t) for t in times]
    assert torch.equal(cached[0], plain[0]) and torch.equal(cached[1], plain[1])
    assert cached[2].shape == plain[2].shape and not torch.allclose(cached[2], plain[2], atol=1e-5)
    handle.remove()
    assert all(torch.equal(forward(model, name, t), x) for t, x in zip(times, plain))


@each
def test_contexts_are_kept_apart(name):
    """Two named branches in one run are each what they are in a run alone."""
    model = MODELS[name].model()
    times, seeds = (900.0, 700.0, 500.0, 300.0), {"cond": 0, "uncond": 1}
    alone = {}
    for context, seed in seeds.items():
        handle = apply_adacache(model, CONFIG)
        with handle.run():
            alone[context] = [forward(model, name, t, seed) for t in times]
        handle.remove()
    handle = apply_adacache(model, CONFIG, calls_per_step=2)
    with handle.run():
        for i, t in enumerate(times):
            for context in ("cond", "uncond") if i < 2 else ("uncond", "cond"):  # in any order
                with model.cache_context(context):
                    assert torch.equal(forward(model, name, t, seeds[context]), alone[context][i])
    assert handle.report().computed_steps == [1, 2]
    handle.remove()


@each
def test_reset(name):
    """diffusers' reset at the end of a pipeline's call: the next forward is computed."""
    model = MODELS[name].model()
    handle = apply_adacache(model, CONFIG)
    for t in (900.0, 700.0):
        forward(model, name, t)
    model._reset_stateful_cache()
    got = forward(model, name, 500.0)
    handle.remove()
    assert torch.equal(got, forward(model, name, 500.0))
