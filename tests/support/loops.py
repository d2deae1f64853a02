"""A pipeline reduced to its denoising loop, on any device: a transformer, a scheduler, guidance, and no more.

loop = Loop("wan", calls=2, config=config, device="cuda")
video = loop(around=context)  # which is entered for all that happens in a step
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_models import MODELS, build, sample
from torch import Tensor, nn

from adacache_triton import AdaCacheConfig, BlockStack, apply_adacache


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.attention = nn.LayerNorm(8), nn.Linear(8, 8)
        self.after, self.mlp = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, h: Tensor, gate: Tensor) -> Tensor:
        h = h + gate * self.attention(self.before(h))
        return h + gate * self.mlp(self.after(h))


class Toy(nn.Module):
    """[B, T, S, C] -> the same, in a few operations: where there are no values, each takes PyTorch a millisecond."""

    def __init__(self):
        super().__init__()
        self.blocks, self.norm_out = nn.ModuleList(Block() for _ in range(3)), nn.LayerNorm(8)

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        h, gate = hidden_states.flatten(1, 2), torch.cos(encoder_hidden_states + timestep.view(-1, 1, 1) / 500)
        for block in self.blocks:
            h = block(h, gate)
        return self.norm_out(h).view_as(hidden_states)


TOY = BlockStack(
    lists=("blocks",), hidden="h", exit="norm_out", probe_after="after", frames=lambda model, call: 3,
    modules={"attention": ("attention",), "mlp": ("mlp",)},
)  # fmt: skip
SHAPES = {"toy": ((3, 4, 8), (1, 8)), "latte": ((4, 3, 8, 8), (5, 8)), "wan": ((4, 3, 8, 8), (6, 8))}


def small(name: str, device: str) -> tuple[nn.Module, BlockStack | None]:
    """A transformer, and its description where the package has none."""
    torch.manual_seed(0)
    if name == "toy":
        return Toy().to(device), TOY
    return build(MODELS[name].kind, MODELS[name].config | {"num_layers": 2}).to(device), None


class Loop:
    """Guidance is in one batch [uncond.., cond..], or in two calls."""

    def __init__(self, name: str, calls: int, config: AdaCacheConfig, device: str):
        self.shape, self.text = SHAPES[name]
        self.calls, self.device, self.scheduler = calls, device, FlowMatchEulerDiscreteScheduler()
        self.transformer, stack = small(name, device)
        self.handle = apply_adacache(self, config, stack=stack)

    def prepare_latents(self, videos: int) -> Tensor:
        return torch.randn(videos, *self.shape).to(self.device)

    @torch.no_grad()
    def __call__(self, steps: int, videos: int = 2, around=nullcontext) -> Tensor:
        torch.manual_seed(0)
        latents, copies = self.prepare_latents(videos), 2 // self.calls
        texts = [torch.randn(copies * videos, *self.text).to(self.device) for _ in range(self.calls)]
        self.scheduler.set_timesteps(steps, device=self.device)
        self.scheduler.set_begin_index(0)  # else it asks the device which timestep is the first
        with around():
            for t in self.scheduler.timesteps:
                x = torch.cat([latents] * copies)
                outputs = [self.transformer(x, timestep=t.expand(len(x)), encoder_hidden_states=y) for y in texts]
                uncond, cond = torch.cat([sample(output) for output in outputs]).chunk(2)
                latents = self.scheduler.step(uncond + 4 * (cond - uncond), t, latents).prev_sample
        return latents
