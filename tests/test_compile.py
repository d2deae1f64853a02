"""`torch.compile` and the cache: at most one more graph, no break, no recompilation, the video of the eager model."""

import copy
import pickle
from functools import cache

import pytest
import torch
from tiny_models import MODELS, build, sample
from tiny_pipelines import PIPELINES
from torch import nn

from adacache_triton import AdaCacheConfig, Codebook, FixedSchedule, MotionRegularization, apply_adacache

STEPS = 12
# Rates that change from step to step, and from run to run.
CONFIG = AdaCacheConfig(Codebook((0.02, 0.05, 0.1, 0.2), (5, 4, 3, 3, 2)), num_steps=STEPS)
# One model a class, where the class compiles in one graph without the cache: not HunyuanVideo 1.5, which asks its
# input whether it is all zero, nor the second WanAnimate.
NAMES = {tiny.kind: name for name, tiny in reversed(MODELS.items()) if tiny.available}
LEFT_OUT = ("HunyuanVideo15Transformer3DModel", "WanAnimate2Transformer3DModel")
REFUSED = ("AnyFlowFARTransformer3DModel", "SanaWMLTX2RefinerTransformer3DModel")
WHOLE = [name for kind, name in reversed(NAMES.items()) if kind not in LEFT_OUT + REFUSED]


class Counting:
    """A compiler that leaves each graph as it is."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


class Frugal(Counting):
    """One whose graphs return tensors in memory that the next of them to run writes to, as CUDA graphs do."""

    def __init__(self):
        super().__init__()
        self.memory = []

    def __call__(self, graph, example_inputs):
        run, own = super().__call__(graph, example_inputs), []

        def frugal(*args):
            outputs = run(*args)
            for tensor in self.memory:
                tensor.fill_(torch.nan)
            if not own:
                own.extend(torch.empty_like(output) for output in outputs)
                self.memory.extend(tensor for tensor in own if tensor.is_floating_point())
            return [tensor.copy_(output).detach() for tensor, output in zip(own, outputs)]

        return frugal


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small(name: str) -> nn.Module:
    """Two blocks a list where that is possible: each block is traced."""
    tiny = MODELS[name]
    if name == "wan_vace":  # has a control block at each of its layers
        return tiny.model()
    lists = ("num_layers", "num_single_layers", "num_visual_blocks", "num_hidden_layers")
    return build(tiny.kind, tiny.config | {key: 2 for key in lists if key in tiny.config})


@torch.no_grad()
def denoise(model, name: str, handle) -> list[torch.Tensor]:
    """Two runs, of large and of small steps."""
    outputs = []
    for size in (70, 7):
        with handle.run():
            outputs += [sample(model(**MODELS[name].inputs(0, 900 - size * step))).clone() for step in range(STEPS)]
        assert {step.reason for step in handle.report().steps} >= {"rate", "reused"}
    return outputs


def same(a: list, b: list) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def eager(model, name: str, config=CONFIG) -> tuple:
    """What the cached model gives without compilation, and what it did."""
    handle = apply_adacache(model, config)
    outputs = denoise(model, name, handle)
    handle.remove()
    return outputs, handle.report()


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_model_is_two_graphs(name):
    """Nothing that one of them returned is read after the other one ran."""
    model, compiler = small(name), Frugal()
    expected, report = eager(model, name)
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    handle = apply_adacache(compiled, CONFIG)
    assert same(denoise(compiled, name, handle), expected)
    assert compiler.graphs == 2 and handle.report() == report


@pytest.mark.parametrize("forecast", ("fitted", "quadratic"))
@pytest.mark.parametrize("name", ("latte", "wan"))
def test_a_forecast_is_two_graphs_as_well(name, forecast):
    model, compiler, videos = small(name), Frugal(), []
    listed = AdaCacheConfig(schedule=FixedSchedule((1, 2, 3, 6, 9), STEPS), forecast=forecast)
    for root in (model, torch.compile(model, backend=compiler, fullgraph=True)):
        handle = apply_adacache(root, listed)
        with torch.no_grad(), handle.run():
            steps = range(STEPS)
            videos.append([sample(root(**MODELS[name].inputs(0, 900 - 70 * step))).clone() for step in steps])
        handle.remove()
    assert compiler.graphs == 2 and same(*videos)


def compile_whole(model, compiler):
    return torch.compile(model, backend=compiler, fullgraph=True)


def compile_in_place(model, compiler):
    model.compile(backend=compiler, fullgraph=True)
    return model


def compile_blocks(model, compiler):
    """As `compile_repeated_blocks`, which not every class allows."""
    for blocks in model.children():
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                block.compile(backend=compiler, fullgraph=True)
    return model


HOW = [compile_whole, compile_in_place, compile_blocks]


@cache
def blocks_alone(name: str) -> int:
    """The graphs of a model compiled block by block, without the cache."""
    model, compiler = small(name), Counting()
    with torch.no_grad():
        compile_blocks(model, compiler)(**MODELS[name].inputs())
    return compiler.graphs


@pytest.mark.parametrize("granularity", ["stack", "block"])
@pytest.mark.parametrize("order", ["compiled first", "cached first"])
@pytest.mark.parametrize("how", HOW[1:])
@pytest.mark.parametrize("name", ["wan", "latte", "hunyuan_video"])
def test_in_place_and_block_by_block(name, how, order, granularity):
    config = AdaCacheConfig(CONFIG.codebook, MotionRegularization((1, STEPS)), STEPS, granularity=granularity)
    graphs = 2 if how is compile_in_place else blocks_alone(name)
    model, compiler = small(name), Frugal() if how is compile_in_place else Counting()
    expected, report = eager(model, name, config)

    if order == "compiled first":
        how(model, compiler)
    handle = apply_adacache(model, config)
    if order == "cached first":
        how(model, compiler)
    assert same(denoise(model, name, handle), expected) and handle.report() == report
    assert compiler.graphs == graphs


@pytest.mark.parametrize("how", HOW)
def test_removal_leaves_a_compiled_model(how):
    model, compiler, inputs = small("wan"), Counting(), MODELS["wan"].inputs()
    with torch.no_grad():
        plain = sample(model(**inputs))
    root = how(model, compiler)
    called = root._compiled_call_impl
    handle = apply_adacache(root, CONFIG)
    denoise(root, "wan", handle)
    handle.remove()
    assert root._compiled_call_impl is called
    assert not {"compile", "cache_context", "_adacache_handle"} & set(vars(model)), "what PyTorch leaves is its own"
    graphs = compiler.graphs
    with torch.no_grad():
        assert torch.equal(sample(root(**inputs)), plain) and compiler.graphs <= graphs + 1
        if how is compile_in_place:
            assert compiler.graphs == graphs + 1, "it runs compiled"


def test_a_cached_model_given_to_torch_compile_says_what_to_do():
    model = small("wan")
    handle = apply_adacache(model, CONFIG)
    compiled = torch.compile(model, backend=Counting())
    with torch.no_grad(), pytest.raises(RuntimeError, match="was cached and then given to torch.compile; call torch.c"):
        compiled(**MODELS["wan"].inputs())
    handle.remove()
    with torch.no_grad():
        compiled(**MODELS["wan"].inputs())


@pytest.mark.parametrize("order", ["compiled first", "cached first"])
@pytest.mark.parametrize("how", HOW)
def test_modules_are_refused(how, order):
    model, compiler = small("wan"), Counting()
    root = how(model, compiler) if order == "compiled first" else model
    handle = apply_adacache(root, AdaCacheConfig(CONFIG.codebook, num_steps=STEPS, granularity="module"))
    if order == "cached first" and how is compile_whole:
        pytest.skip("refused whatever the granularity")
    if order == "cached first":
        how(model, compiler)
    with torch.no_grad(), pytest.raises(RuntimeError, match="^config.granularity: 'module' is not for torch.compile"):
        root(**MODELS["wan"].inputs())
    handle.remove()
    with torch.no_grad():
        root(**MODELS["wan"].inputs())
    assert compiler.graphs == 1


@pytest.mark.parametrize("how", HOW)
def test_a_pipeline_with_a_compiled_transformer(how):
    config, steps = AdaCacheConfig(CONFIG.codebook), 8
    pipe, call = PIPELINES["wan"].make(steps)
    handle = apply_adacache(pipe, config)
    expected, report = sample(pipe(**call)), handle.report()
    # accelerate's own hooks are no fullgraph in a compiled root.
    for offloaded in (False, True) if how is compile_blocks else (False,):
        compiler = Counting()
        pipe, call = PIPELINES["wan"].make(steps)
        pipe.transformer = how(pipe.transformer, compiler)
        if offloaded:
            pipe.enable_model_cpu_offload(device="cpu")
        handle = apply_adacache(pipe, config)
        video = sample(pipe(**call))
        assert torch.equal(video, expected) and handle.report() == report
        assert offloaded or compiler.graphs == (1 if how is compile_blocks else 2)
        torch._dynamo.reset()


def test_a_copy_of_a_model_compiled_in_place():
    model, inputs = small("wan"), MODELS["wan"].inputs()
    with torch.no_grad():
        plain = sample(model(**inputs))
        compile_in_place(model, Counting())
        handle = apply_adacache(model, CONFIG)
        denoise(model, "wan", handle)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            for _ in range(4):
                assert torch.equal(sample(copied(**inputs)), plain)
    assert len(handle.report().steps) == STEPS
