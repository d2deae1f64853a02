"""The paper's models as their own repositories call them: the shipped descriptions, on interface doubles."""

import copy
import dataclasses
import gc
import math
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from doubles import latte_class, latte_t2v, open_sora_plan, stdit3
from doubles.literal import LiteralRule
from torch import Tensor, nn

from adacache_triton import AdaCacheConfig, Codebook, MotionRegularization, apply_adacache
from adacache_triton.models import stack_of

STEPS = 12
CONFIG = AdaCacheConfig(Codebook((1e6,), (3, 1)), num_steps=STEPS)  # every comparison gives rate 3
SCHEDULE = ["first", "rate", *["reused", "reused", "rate"] * 2, "reused", "reused", "rate", "tail"]
GRANULARITIES = ("stack", "block", "module")
TEXT, LENGTHS = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([6, 4])
MASK = (torch.arange(6) < LENGTHS[:, None]).long()
WIDE_TEXT = TEXT.repeat(1, 1, 4)
GIVEN = torch.ones(2, 5, dtype=torch.bool)
GIVEN[:, 0] = False  # the first frame
CLASSES = torch.tensor([3, 10])


@dataclasses.dataclass(frozen=True)
class Paper:
    """A double; `call(model, x, t)` as its sampler does, on latents x of `shape` with T frames of S tokens."""

    model: type
    call: Callable[[nn.Module, Tensor, Tensor], Tensor]
    shape: tuple[int, ...]
    grid: tuple[int, int]  # T, S
    probed: str
    attention: str  # of the probed block
    gate: Callable[[nn.Module, tuple], Tensor]  # of that block and its arguments, broadcastable to [B, T, S, C]


def call_t2v(model, x, t, **more):
    sizes = {"resolution": None, "aspect_ratio": None}
    output = model(
        x, encoder_hidden_states=TEXT, timestep=t, added_cond_kwargs=sizes, enable_temporal_attentions=True,
        return_dict=False, **more,
    )[0]  # fmt: skip
    return output.chunk(2, dim=1)[0]


def call_stdit3(model, x, t, **more):
    sizes = {name: torch.tensor([24.0]) for name in ("fps", "height", "width")}
    return model(x, t, y=WIDE_TEXT, mask=MASK, **sizes, **more)


def gate_t2v(block, args):
    return block.modulation(args[4])[2].unflatten(0, (2, -1)).transpose(1, 2)


def gate_stdit3(block, args):
    _, _, t, _, x_mask, t0, *_ = args
    gate = block.modulation(t)[2].unsqueeze(1)
    return gate if x_mask is None else torch.where(x_mask[:, :, None, None], gate, block.modulation(t0)[2].unsqueeze(1))


def gate_class(block, args):
    return block.adaLN_modulation(args[1]).chunk(6, dim=1)[2].view(2, -1, 1, 24).transpose(1, 2)


T2V = ((2, 4, 5, 8, 8), (5, 16), "temporal_transformer_blocks.1", "attn1", gate_t2v)
STDIT3 = ((2, 4, 5, 8, 8), (5, 16), "temporal_blocks.1", "attn", gate_stdit3)
PAPER = {
    "latte": Paper(latte_t2v.LatteT2V, call_t2v, *T2V),
    "open-sora-plan": Paper(
        open_sora_plan.LatteT2V, lambda model, x, t: call_t2v(model, x, t, encoder_attention_mask=MASK), *T2V
    ),
    "latte-class": Paper(
        latte_class.Latte,
        lambda model, x, t: model.forward_with_cfg(x, t, y=CLASSES, cfg_scale=4.0).chunk(2, dim=2)[0],
        (2, 5, 4, 8, 8),
        (5, 16),
        "blocks.3",
        "attn",
        gate_class,
    ),
    "open-sora": Paper(stdit3.STDiT3, call_stdit3, *STDIT3),
    # As in image to video: a new mask at every step.
    "open-sora given": Paper(
        stdit3.STDiT3, lambda model, x, t: call_stdit3(model, x, t, x_mask=GIVEN.clone()), *STDIT3
    ),
}


@pytest.fixture(params=PAPER)
def paper(request):
    return PAPER[request.param]


@pytest.fixture
def model(paper):
    torch.manual_seed(3)
    return paper.model().eval()


def latents(paper) -> Tensor:
    return torch.randn(1, *paper.shape[1:], generator=torch.Generator().manual_seed(2)).repeat(2, 1, 1, 1, 1)


@torch.no_grad()
def denoise(paper, model, num_steps: int = STEPS) -> list[Tensor]:
    """The outputs of a loop in which each step's input depends on the last one's output."""
    x, outputs = latents(paper), []
    for step in range(num_steps):
        outputs.append(paper.call(model, x, torch.full((2,), 1000 * (1 - step / num_steps))))
        x = x - 0.1 * outputs[-1]
    return outputs


def same(a: list, b: list) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def reasons(handle) -> list[str]:
    return [step.reason for step in handle.report().steps]


def test_they_are_found_by_the_names_that_their_repositories_give_them(paper, model):
    assert stack_of(model) is stack_of(type(paper.model.__name__, (nn.Module,), {})())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@torch.no_grad()
def test_a_reused_step_on_the_same_input_gives_the_full_output(paper, model, granularity):
    handle = apply_adacache(model, dataclasses.replace(CONFIG, granularity=granularity))
    with handle.run():
        outputs = [paper.call(model, latents(paper), torch.full((2,), 500)) for _ in range(4)]
    assert reasons(handle) == ["first", "rate", "reused", "reused"]
    assert same(outputs[:1], outputs[1:2])
    for reused in outputs[2:]:
        torch.testing.assert_close(reused, outputs[0], rtol=0, atol=1e-5)


@torch.no_grad()
def residuals_by_hand(paper, model, times: tuple[float, ...]) -> list[Tensor]:
    """Gate times attention in the probed block of the plain model, [B, T, S, C]."""
    block, seen, found = model.get_submodule(paper.probed), {}, []
    (frames, tokens), hooks = paper.grid, [
        block.register_forward_pre_hook(lambda _, args: seen.update(gate=paper.gate(block, args))),
        getattr(block, paper.attention).register_forward_hook(lambda _, args, output: seen.update(attention=output)),
    ]  # fmt: skip
    for t in times:
        paper.call(model, latents(paper), torch.full((2,), t))
        attention = seen["attention"].view(2, tokens, frames, -1).transpose(1, 2)  # temporal: [B * S, T, C]
        found.append((seen["gate"] * attention).contiguous())
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("granularity", GRANULARITIES)
@torch.no_grad()
def test_the_probe_is_the_gated_attention_of_the_middle_temporal_block_frame_by_frame(paper, model, granularity):
    times, (frames, tokens) = (900.0, 700.0), paper.grid
    old, new = residuals_by_hand(paper, model, times)
    config = dataclasses.replace(CONFIG, granularity=granularity, motion=MotionRegularization((1, STEPS), (1, 2)))
    handle = apply_adacache(model, config)
    with handle.run():
        for t, expected in zip(times, (old, new)):
            paper.call(model, latents(paper), torch.full((2,), t))
            kept = handle._cached[0].batch.sessions[0].branch.probes[0]
            assert kept.shape == (2, frames, tokens, old.shape[-1])
            torch.testing.assert_close(kept, expected, rtol=0, atol=1e-5)
        _, step = handle.report().steps

    old, new = (r.flatten(1, 2).double() for r in (old, new))  # [B, T * S, C], frame-major
    scores = []
    for stride in (1, 2):
        later, earlier = new[:, stride * tokens :], new[:, : -stride * tokens]
        scores.append(((later - earlier).abs().sum() / (later.abs().sum() + earlier.abs().sum())).item())
    assert step.motion == pytest.approx(sum(scores) / 2, rel=1e-4)
    assert step.distance == pytest.approx(((new - old).abs().sum() / old.abs().sum()).item(), rel=1e-4)
    assert scores[0] != scores[1] and min(step.motion, step.distance) > 0.01, "something to measure"


@torch.no_grad()
def test_a_full_run_step_by_step(paper, model):
    ran = []
    stack = stack_of(model)
    blocks = [block for path in stack.lists for block in model.get_submodule(path)]
    for block in blocks:
        block.register_forward_hook(lambda *_: ran.append(1))
    handle = apply_adacache(model, CONFIG)
    for _ in range(2):
        counts, x = [], latents(paper)
        for step in range(STEPS):
            ran.clear()
            paper.call(model, x, torch.full((2,), 1000 * (1 - step / STEPS)))
            counts.append(len(ran))
        assert reasons(handle) == SCHEDULE
        assert counts == [0 if reason == "reused" else len(blocks) for reason in SCHEDULE]


def test_all_granularities_give_the_same_video(paper, model):
    plain, videos = denoise(paper, model), {}
    for granularity in GRANULARITIES:
        handle = apply_adacache(model, dataclasses.replace(CONFIG, granularity=granularity))
        videos[granularity] = torch.stack(denoise(paper, model))
        assert reasons(handle) == SCHEDULE
        handle.remove()
    assert (videos["stack"] - torch.stack(plain)).abs().max() > 1e-3, "reuse must be visible"
    for granularity in GRANULARITIES[1:]:
        torch.testing.assert_close(videos[granularity], videos["stack"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_all_computed_is_the_plain_model_bit_for_bit_and_nothing_stays_behind(paper, model, granularity):
    def traces():
        return {name: {k: len(v) if "hooks" in k else id(v) for k, v in vars(m).items()} for name, m in tree()}

    def tree():
        return list(model.named_modules())

    plain, before, modules = denoise(paper, model), traces(), tree()
    config = AdaCacheConfig(Codebook((1e-9,), (1, 1)), MotionRegularization((1, STEPS)), STEPS, granularity=granularity)
    handle = apply_adacache(model, config)
    assert same(denoise(paper, model), plain)
    assert handle.report().computed_steps == list(range(1, STEPS + 1))
    handle.remove()
    assert traces() == before and tree() == modules
    handle = apply_adacache(model, dataclasses.replace(CONFIG, granularity=granularity))
    assert not same(denoise(paper, model), plain)
    handle.remove()
    assert traces() == before and same(denoise(paper, model), plain)


class VideoGenPipeline:
    """The loop of Latte's and Open-Sora-Plan's pipelines of this name: guidance in one batch, the negative first."""

    def __init__(self, paper, transformer, scheduler):
        self.paper, self.transformer, self.scheduler = paper, transformer, scheduler

    @torch.no_grad()
    def __call__(self, num_inference_steps: int) -> Tensor:
        self.scheduler.set_timesteps(num_inference_steps)
        x = latents(self.paper)[:1]
        for t in self.scheduler.timesteps:
            batch = self.scheduler.scale_model_input(torch.cat([x] * 2), t)
            negative, positive = self.paper.call(self.transformer, batch, t.expand(2)).chunk(2)
            x = self.scheduler.step(negative + 4 * (positive - negative), t, x, return_dict=False)[0]
        return x


@pytest.mark.parametrize("name", ["latte", "open-sora-plan"])
@pytest.mark.parametrize("scheduler", [DDIMScheduler(), PNDMScheduler(skip_prk_steps=True)], ids=["ddim", "pndm"])
def test_their_pipelines(name, scheduler):
    paper = PAPER[name]
    pipeline = VideoGenPipeline(paper, paper.model().eval(), copy.deepcopy(scheduler))
    plain = pipeline(STEPS)
    calls = len(pipeline.scheduler.timesteps)  # PNDM takes its second timestep twice
    handle = apply_adacache(pipeline, dataclasses.replace(CONFIG, num_steps=None))
    for _ in range(2):
        video = pipeline(STEPS)
        planned = (["first", "rate"] + ["reused", "reused", "rate"] * 4)[: calls - 1]
        planned[-1] = "tail" if planned[-1] == "reused" else planned[-1]
        assert reasons(handle) == [*planned, "tail"]
    assert (video - plain).abs().max() > 1e-3
    handle.remove()
    assert torch.equal(pipeline(STEPS), plain)


class LiteralLatte:
    """Per-block caching of a LatteT2V as the released code does it: two kept residuals in each of its blocks."""

    def __init__(self, model, rule: LiteralRule, probed: nn.Module, grid: tuple[int, int]):
        self.model, self.rule, self.probed, self.grid = model, rule, probed, grid

    def run(self, step: int, call) -> Tensor:
        blocks = [*self.model.transformer_blocks, *self.model.temporal_transformer_blocks]
        for block in blocks:
            block.forward = self._forward(block, step, self.rule.computes(step))
        try:
            return call()
        finally:
            for block in blocks:
                del block.forward

    def _forward(self, block, step: int, computes: bool):
        def forward(x, mask, text, text_mask, timestep, *_):
            if computes:
                attention = block.attention_residual(x, timestep, attention_mask=mask)
                cross = block.cross_residual(x + attention, text, text_mask) if block.text else 0
                block.kept = attention, cross + block.mlp_residual(x + attention + cross, timestep)
                if block is self.probed:
                    frames, tokens = self.grid
                    frame_major = attention.view(2, tokens, frames, -1).transpose(1, 2).flatten(1, 2)
                    self.rule.decide(step, frame_major, tokens)
            return x + block.kept[0] + block.kept[1]

        return forward


@pytest.mark.parametrize("moreg", [False, True], ids=["plain", "moreg"])
@torch.no_grad()
def test_stack_caching_of_latte_equals_the_released_way(moreg):
    paper, num_steps, thresholds, rates = PAPER["latte"], 30, (0.06, 0.09, 0.13, 0.17, 0.22), (6, 5, 4, 3, 2, 1)
    torch.manual_seed(3)
    model = paper.model().eval()
    motion = MotionRegularization((3, 27), (1, 2), scale=0.1, power=2, gradient_weight=2) if moreg else None
    literal_moreg = motion and {
        "strides": motion.frame_strides, "steps": motion.window, "scale": motion.scale, "power": motion.power,
        "divisor": motion.divisor, "gradient_weight": motion.gradient_weight,
    }  # fmt: skip

    def run(forward) -> Tensor:
        x = latents(paper)
        for step in range(1, num_steps + 1):
            t = torch.full((2,), 1000 * (1 - (step - 1) / num_steps))
            x = x - forward(step, lambda x=x, t=t: paper.call(model, x, t)) / num_steps
        return x

    rule = LiteralRule(list(thresholds), list(rates), literal_moreg, num_steps)
    expected = run(LiteralLatte(model, rule, model.get_submodule(paper.probed), paper.grid).run)
    handle = apply_adacache(model, AdaCacheConfig(Codebook(thresholds, rates), motion, num_steps))
    got = run(lambda step, call: call())
    steps = [s for s in handle.report().steps if s.computed]
    assert [(s.step, s.rate) for s in steps] == [(row["step"], row["rate"]) for row in rule.trace]
    assert len({s.rate for s in steps}) >= 3, "a schedule worth comparing"
    assert (got - expected).abs().max() <= 1e-5
    handle.remove()
    assert (run(lambda step, call: call()) - got).abs().max() > 1e-4, "reuse must be visible"


CLASS = PAPER["latte-class"]


@pytest.mark.parametrize("call", [CLASS.call, lambda model, x, t: model(x, t, y=CLASSES).chunk(2, dim=2)[0]])
def test_the_class_conditional_model_is_cached_however_it_is_called(call):
    paper, model = dataclasses.replace(CLASS, call=call), CLASS.model().eval()
    for compiled in (False, True):  # in place, which the method for guidance does not know of
        handle = apply_adacache(model, CONFIG)
        if compiled:
            model.compile(backend="eager")
        if not compiled or call is not CLASS.call:
            denoise(paper, model)
            assert reasons(handle) == SCHEDULE
        handle.remove()
    assert "forward" not in vars(model)


def test_a_copy_of_the_class_conditional_model_is_uncached_and_it_is_freed_at_once():
    model = CLASS.model().eval()
    plain = denoise(CLASS, model)
    apply_adacache(model, CONFIG)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(denoise(CLASS, copied), plain)
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_removed_beneath_a_wrapper_that_came_later():
    """As offloading puts one around `forward`, and takes it off when it likes."""
    model = CLASS.model().eval()
    plain = denoise(CLASS, model)
    handle = apply_adacache(model, CONFIG)
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    assert not same(denoise(CLASS, model), plain)
    assert reasons(handle) == SCHEDULE
    handle.remove()
    assert same(denoise(CLASS, model), plain) and reasons(handle) == SCHEDULE
    model.forward = inner
    assert same(denoise(CLASS, model), plain)
    handle = apply_adacache(model, CONFIG)
    denoise(CLASS, model)
    assert reasons(handle) == SCHEDULE


def test_a_forward_past_the_hooks_is_said():
    model = CLASS.model().eval()
    handle = apply_adacache(model, CONFIG, stack=dataclasses.replace(stack_of(model), direct=False))
    with pytest.warns(UserWarning, match=r"BlockStack.direct: Latte.forward was called past PyTorch's hooks") as said:
        denoise(CLASS, model)
    assert len(said) == 1 and handle.report().steps == ()


def test_without_temporal_attention_every_step_is_computed():
    """An argument of LatteT2V; the probed block does not run then."""
    paper = PAPER["latte"]
    model = paper.model().eval()
    handle = apply_adacache(model, CONFIG)
    with pytest.warns(UserWarning, match="BlockStack.probe_after: 'norm3' did not run"), torch.no_grad():
        for step in range(5):
            model(latents(paper), torch.full((2,), 900 - step), TEXT, enable_temporal_attentions=False)
    assert not any(reason == "reused" for reason in reasons(handle))
    assert all(step.distance is None or math.isnan(step.distance) for step in handle.report().steps)
