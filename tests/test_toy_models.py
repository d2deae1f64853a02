"""What a block of somebody else's may do with the output of a cached module, and what a description must get right."""

import dataclasses

import pytest
import torch
from torch import nn

from adacache_triton import AdaCacheConfig, BlockStack, Codebook, apply_adacache

STEPS = 9
WIDTH = 16


class Block(nn.Module):
    """`use` is what it does with its attention: from the stream h, the output a and the gate g to the new stream."""

    def __init__(self, use):
        super().__init__()
        self.use, self.norm, self.after = use, nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states, gate):
        h = self.use(hidden_states, self.attn(self.norm(hidden_states)), gate)
        return h + self.mlp(self.after(h))


class Toy(nn.Module):
    def __init__(self, use=lambda h, a, g: h + g * a, wrap=lambda block, *args: block(*args)):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.norm_out = nn.ModuleList(Block(use) for _ in range(3)), nn.LayerNorm(WIDTH)
        self.wrap = wrap

    def forward(self, hidden_states, timestep):
        h = hidden_states
        for block in self.blocks:
            h = self.wrap(block, h, torch.ones(len(h), 1, WIDTH) * 0.5)
        return self.norm_out(h)


STACK = BlockStack(lists=("blocks",), probe_after="after", modules={"attention": ("attn",), "mlp": ("mlp",)})
X = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(1))


def config(**kwargs) -> AdaCacheConfig:
    return AdaCacheConfig(Codebook((1e6,), (3, 1)), num_steps=STEPS, **kwargs)


@torch.no_grad()
def run(model, settings, stack=STACK, inputs=lambda step: X):
    handle = apply_adacache(model, settings, stack=stack)
    with handle.run():
        outputs = [model(inputs(step).clone(), torch.tensor([500])) for step in range(1, STEPS + 1)]
    handle.remove()
    return outputs, handle.report()


def times_in_place(h, a, g):
    a *= g
    return h + a


def sum_in_place(h, a, g):
    a += h
    return a


def emptied_afterwards(h, a, g):
    h = h + a
    a.zero_()
    return h


def relu_in_place(h, a, g):
    return h + torch.relu_(a)


def added_twice(h, a, g):
    return h + a * g + a


def sliced(h, a, g):
    return h + torch.cat([g * a[:, :2], a[:, 2:]], dim=1)


def halves(h, a, g):
    first, second = a.chunk(2, dim=1)
    return torch.cat([h[:, :3] + g * first, h[:, 3:] + second], dim=1)


def stream_in_place(h, a, g):
    h = h.clone()
    h += g * a
    return h


def weighted(h, a, g):
    return torch.add(h, a, alpha=0.5)


def normed(h, a, g):
    return h + nn.functional.layer_norm(a, (WIDTH,)) * g


USES = [times_in_place, sum_in_place, emptied_afterwards, relu_in_place, added_twice, sliced, halves]
USES += [stream_in_place, weighted, normed, lambda h, a, g: a * g + h, lambda h, a, g: g * a]


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_whatever_a_block_does_with_a_cached_output(use):
    """Computed steps are exact and, as nothing changes from step to step, so are reused ones."""
    model = Toy(use)
    with torch.no_grad():
        plain = model(X.clone(), None)
    outputs, report = run(model, config(granularity="module"))
    assert {s.reason for s in report.steps} >= {"reused", "rate"}
    for step, output in zip(report.steps, outputs):
        if step.computed:
            assert torch.equal(output, plain)
        else:
            torch.testing.assert_close(output, plain, rtol=0, atol=1e-5)


def test_a_cap_on_attention_does_not_change_what_is_compared():
    """Attention that is computed between the compared steps as well leaves the kept probe alone."""
    noise = torch.randn(X.shape, generator=torch.Generator().manual_seed(2))
    changing = lambda step: X + 0.1 * step * noise  # noqa: E731
    free = run(Toy(), config(granularity="module"), inputs=changing)[1]
    capped = run(Toy(), config(granularity="module", modules={"attention": 1, "mlp": None}), inputs=changing)[1]
    assert [s.distance is None for s in free.steps] == [s.distance is None for s in capped.steps]
    compared = next(s for s in capped.steps if s.distance and s.step > 3)
    before = Toy()
    probes = {}
    hook = before.blocks[1].after.register_forward_pre_hook(lambda m, args: probes.update(after=args[0]))
    start = before.blocks[1].register_forward_pre_hook(lambda m, args: probes.update(before=args[0]))
    residuals = {}
    with torch.no_grad():
        for step in (2, compared.step):
            probes.clear()
            before(changing(step), None)
            residuals[step] = probes["after"] - probes["before"]
    hook.remove(), start.remove()
    old, new = residuals[2], residuals[compared.step]
    expected = ((old - new).abs().sum() / old.abs().sum()).item() / compared.previous_rate
    assert compared.distance == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("granularity", ["block", "module"])
def test_half_precision_that_overflows_is_never_reused(granularity):
    """A residual kept in float16 may be infinite where the stream, in a wider dtype, is not."""
    wide = lambda h, a, g: h + (g.float() * 4e4) * a.half()  # noqa: E731
    model = Toy(wide)
    outputs, report = run(model, config(granularity=granularity))
    assert all(torch.isfinite(output).all() for output in outputs)
    if granularity == "module":
        kept = run(Toy(lambda h, a, g: h + 1e38 * (1e38 * g) * a), config(granularity="module"))[1]
        assert "reused" not in {s.reason for s in kept.steps}, "not finite at all"


@pytest.mark.parametrize("wrap", [lambda b, *a: b(*a), lambda b, *a: b(*a)[0]], ids=["tensor", "tuple"])
def test_a_block_that_returns_something_else_is_named(wrap):
    model = Toy(wrap=wrap)
    if wrap(lambda *a: (1,)) == 1:
        real = Block.forward

        class Wrapped(Block):
            def forward(self, hidden_states, gate):
                return (real(self, hidden_states, gate),)

        for block in model.blocks:
            block.__class__ = Wrapped
        with pytest.raises(ValueError, match=r"BlockStack.returns: expected \('hidden_states',\) from blocks.0, got 1"):
            run(model, config(granularity="block"))
    else:
        assert "reused" in {s.reason for s in run(model, config(granularity="block"))[1].steps}


def test_descriptions_that_do_not_fit_are_named():
    wrong = dataclasses.replace(STACK, modules={"attention": ("atn",)})
    with pytest.raises(ValueError, match="BlockStack.modules: no block has the attention module 'atn'"):
        apply_adacache(Toy(), config(granularity="module"), stack=wrong)

    class Named(Toy):
        def forward(self, hidden_states, timestep):
            for block in self.blocks:
                hidden_states = block(hidden_states, torch.ones(2, 1, WIDTH))
            return self.norm_out(input=hidden_states)

    with pytest.raises(ValueError, match=r"BlockStack.exit: expected 'norm_out' to get the stream by position, got \["):
        run(Named(), config())

    class Dicts(nn.Linear):
        def forward(self, x):
            return {"out": super().forward(x)}

    model = Toy(lambda h, a, g: h + a["out"])
    for block in model.blocks:
        block.attn = Dicts(WIDTH, WIDTH)
    with pytest.raises(TypeError, match="BlockStack.modules: expected modules that return tensors, but 'attn' of"):
        run(model, config(granularity="module"))


def test_a_forgotten_number_of_calls_a_step_is_said():
    model = Toy()
    handle = apply_adacache(model, config(), stack=STACK)
    with torch.no_grad(), pytest.warns(UserWarning, match="timestep repeats, so nothing is reused; .* calls_per_step"):
        for step in range(4):
            for _ in range(2):
                model(X, torch.tensor([900 - step]))
    handle.remove()
