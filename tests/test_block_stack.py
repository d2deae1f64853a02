"""Descriptions of models: a wrong one fails when it is applied, and says which field; a new one needs no edit."""

import dataclasses

import pytest
import torch
from doubles.stdit3 import STDiT3

from adacache_triton import AdaCacheConfig, Codebook, apply_adacache
from adacache_triton.models import register, stack_of

CONFIG = AdaCacheConfig(Codebook((1e6,), (3, 1)), num_steps=6)
STACK = stack_of(STDiT3())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lists": ("spatial", "temporal_blocks")}, "BlockStack.lists: STDiT3 has no module 'spatial'"),
        ({"lists": ("x_embedder", "temporal_blocks")}, "BlockStack.lists: expected 'x_embedder' to be a filled"),
        ({"exit": "norm_out"}, "BlockStack.exit: STDiT3 has no module 'norm_out'"),
        ({"lists": ("spatial_blocks",), "probe_list": None}, "BlockStack.exit: expected a module that is called, or"),
        ({"probe_after": "norm9"}, "BlockStack.probe_after: STDiT3Block has no module 'norm9'"),
        ({"input": "hidden_states"}, "BlockStack.input: STDiT3.forward has no argument 'hidden_states'; it has x, "),
        ({"timestep": "t"}, "BlockStack.timestep: STDiT3.forward has no argument 't'; it has x, timestep"),
    ],
)
def test_a_wrong_field_is_named_and_nothing_is_applied(change, message):
    model = STDiT3()
    with pytest.raises(ValueError) as error:
        apply_adacache(model, CONFIG, stack=dataclasses.replace(STACK, **change))
    assert str(error.value).startswith(message)
    assert not hasattr(model, "_adacache_handle") and not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lists": ["spatial_blocks"]}, "BlockStack.lists: expected a tuple of attribute paths, got ['spati"),
        ({"returns": ("x", "y")}, "BlockStack.exit: expected a module, as blocks return ('x', 'y'), got 'temporal_bl"),
        ({"probe_list": "blocks"}, "BlockStack.probe_list: expected one of ('spatial_blocks', 'temporal_blocks'), got"),
        (
            {"layout": "b t s c"},
            "BlockStack.layout: expected one of ('b (t s) c', '(b t) s c', '(b s) t c', '(t s) c'), got",
        ),
    ],
)
def test_a_description_that_contradicts_itself(change, message):
    with pytest.raises((TypeError, ValueError)) as error:
        dataclasses.replace(STACK, **change)
    assert str(error.value).startswith(message)


@torch.no_grad()
def run(stack) -> tuple[list, torch.Tensor, torch.Tensor]:
    """A run on one input: the reasons of its steps, and the outputs of a computed and of a reused one."""
    torch.manual_seed(0)
    model, x, y = STDiT3(), torch.randn(1, 4, 2, 4, 4), torch.randn(1, 3, 32)
    handle = apply_adacache(model, CONFIG, stack=stack)
    with handle.run():
        outputs = [model(x, torch.tensor([500]), y) for _ in range(4)]
    return [s.reason for s in handle.report().steps], outputs[1], outputs[3]


def test_neither_the_order_of_the_lists_matters_nor_where_the_stream_is_taken():
    for change in ({}, {"lists": STACK.lists[::-1]}, {"exit": "final_layer"}):
        reasons, computed, reused = run(dataclasses.replace(STACK, **change))
        assert reasons == ["first", "rate", "reused", "reused"]
        torch.testing.assert_close(reused, computed, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exit": "x_embedder"}, "BlockStack.exit: 'x_embedder' did not run after the blocks, nothing is cached"),
        (
            {"probe_after": "cross_attn", "probe_list": "temporal_blocks", "exit": "t_block"},
            "BlockStack.exit: 't_block'",
        ),
    ],
)
def test_what_only_a_run_can_show_is_said_once_and_nothing_is_reused(change, message):
    with pytest.warns(UserWarning) as warned:
        reasons, _, _ = run(dataclasses.replace(STACK, **change))
    assert len(warned) == 1 and str(warned[0].message).startswith(f"AdaCache: {message}")
    assert "reused" not in reasons


def test_views_share_memory_and_put_frames_first():
    B, T, S, C = 2, 3, 4, 5
    truth = torch.arange(B * T * S * C).view(B, T, S, C)
    forms = {
        "b (t s) c": truth.flatten(1, 2),
        "(b t) s c": truth.flatten(0, 1),
        "(b s) t c": truth.transpose(1, 2).flatten(0, 1),
    }
    for layout, form in forms.items():
        view = dataclasses.replace(STACK, layout=layout).view(form, B, T)
        assert torch.equal(view, truth) and view.data_ptr() == form.data_ptr()
    with pytest.raises(ValueError, match="does not fit a block's input of shape"):
        STACK.view(forms["b (t s) c"], B, 5)
    with pytest.raises(ValueError, match="does not fit a block's input of shape"):
        dataclasses.replace(STACK, layout="(b s) t c").view(forms["b (t s) c"], B, T)


def test_a_model_from_outside(monkeypatch):
    monkeypatch.setattr("adacache_triton.models._STACKS", {})

    class Mine(STDiT3):
        pass

    with pytest.raises(TypeError, match="transformer: expected a known class .* or a BlockStack .*, got Mine"):
        stack_of(Mine())
    register("STDiT3", STACK)
    assert stack_of(Mine()) is STACK, "by the name of a base"
    handle = apply_adacache(Mine(), CONFIG, stack=STACK)
    handle.remove()


class TwoLoops(STDiT3):
    """Runs its temporal blocks after all spatial ones: a list left out of the description would run on its own."""

    def forward(self, x, timestep, y):
        B, C, T, H, W = x.shape
        h = self.x_embedder(x.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).permute(0, 2, 3, 5, 1, 4, 6).flatten(4))
        h, S = h.flatten(1, 3), h[0, 0].numel() // h.shape[-1]
        t = self.t_embedder(timestep[:, None] / torch.arange(1, 17))
        for blocks in (self.spatial_blocks, self.temporal_blocks):
            for block in blocks:
                h = block(h, y, self.t_block(t), T=T, S=S)
        return self.final_layer(h, t)


@pytest.mark.parametrize("granularity", ["stack", "block"])
def test_a_list_left_out_is_found_on_the_first_reused_step(granularity):
    """With the whole stack skipped it would be an error; where blocks are cached one by one it is a choice."""
    torch.manual_seed(0)
    model, x, y = TwoLoops(), torch.randn(1, 4, 2, 4, 4), torch.randn(1, 3, 32)
    stack = dataclasses.replace(STACK, lists=("spatial_blocks",), probe_list=None, exit="final_layer")
    handle = apply_adacache(model, dataclasses.replace(CONFIG, granularity=granularity), stack=stack)
    with torch.no_grad(), handle.run():
        outputs = [model(x, torch.tensor([500]), y) for _ in range(2)]
        if granularity == "stack":
            with pytest.raises(ValueError, match="BlockStack.lists: expected 'temporal_blocks' among them: its blocks"):
                model(x, torch.tensor([500]), y)
        else:
            torch.testing.assert_close(model(x, torch.tensor([500]), y), outputs[1], rtol=1e-5, atol=1e-5)
