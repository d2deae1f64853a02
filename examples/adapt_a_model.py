"""A video transformer that the package does not know, described in ten lines and cached.

    python examples/adapt_a_model.py

The model is small and random; its names and its layout are its own. Text and video are one stream: the text's tokens
first, then the video's, frame by frame. The head gets the video's alone.
"""

import dataclasses
import sys
import warnings

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from adacache_triton import AdaCacheConfig, BlockStack, Codebook, MotionRegularization, apply_adacache

FRAMES, HEIGHT, WIDTH, CHANNELS, TEXT, HEADS, STEPS = 6, 4, 4, 48, 5, 4, 20


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.out(scaled_dot_product_attention(4 * q, 4 * k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(CHANNELS, 2 * CHANNELS), nn.GELU(), nn.Linear(2 * CHANNELS, CHANNELS))
        self.phases = nn.Parameter(6 * torch.rand(2, CHANNELS))

    def forward(self, z: Tensor, time: Tensor) -> Tensor:
        gates = torch.cos(self.phases + time[:, None, None])[:, :, None]  # [B, 2, 1, C]
        z = z + gates[:, 0] * self.attention(self.attention_norm(z))
        return z + gates[:, 1] * self.mlp(self.mlp_norm(z))


class Unknown(nn.Module):
    """latents [B, T, H, W, 4], sigma [B], prompt [B, L, 8] -> velocity as the latents."""

    def __init__(self):
        super().__init__()
        self.patches, self.words = nn.Linear(4, CHANNELS), nn.Linear(8, CHANNELS)
        self.trunk = nn.ModuleDict({"layers": nn.ModuleList(Layer() for _ in range(5))})
        self.head = nn.Sequential(nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, 4))

    def forward(self, latents: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        z = torch.cat([self.words(prompt), self.patches(latents).flatten(1, 3)], dim=1)
        for layer in self.trunk["layers"]:
            z = layer(z, sigma)
        return self.head(z[:, prompt.shape[1] :]).view_as(latents)


STACK = BlockStack(
    lists=("trunk.layers",),
    hidden="z",  # what its blocks call the stream
    exit="head",  # gets the stream after the last block
    entry=lambda layer, output: layer["z"][:, -output.shape[1] :],  # before the first, as the head would get it
    probe_after="mlp_norm",  # gets the stream right after attention
    input="latents",
    timestep="sigma",
    frames=lambda model, call: call["latents"].shape[1],
    tokens=lambda model, call: slice(call["prompt"].shape[1], None),  # motion is the video's
    modules={"attention": ("attention",), "mlp": ("mlp",)},  # for granularity "module"
)
WRONG = {
    "lists": dict(lists=("layers",)),
    "hidden": dict(hidden="x"),
    "exit": dict(exit="patches"),
    "entry": dict(entry=None),
    "probe_after": dict(probe_after="norm2"),
    "timestep": dict(timestep="t"),
    "frames": dict(frames=lambda model, call: call["latents"].shape[2] + 1),
}
CONFIG = AdaCacheConfig(
    Codebook((0.1, 0.15, 0.2, 0.3), (5, 4, 3, 2, 1)),
    MotionRegularization(window=(3, 17), scale=0.7, power=2),
    num_steps=STEPS,
)


@torch.no_grad()
def generate(model: nn.Module, steps: int = STEPS) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    video = torch.randn(1, FRAMES, HEIGHT, WIDTH, 4, generator=draw)
    prompt = torch.randn(1, TEXT, 8, generator=draw)
    for step in range(steps):
        u = step / (STEPS - 1)
        sigma = 1 - (4 * (u - 0.5) ** 3 + 0.5)  # from 1 to 0, fast at both ends
        video = video - model(video, torch.tensor([sigma]), prompt) / STEPS
    return video


def main() -> int:
    torch.manual_seed(0)
    model = Unknown().eval()
    plain = generate(model)

    handle = apply_adacache(model, CONFIG, stack=STACK)
    cached = generate(model)
    print(handle.report())
    print(f"the video changed by {(cached - plain).norm() / plain.norm():.1e}\n")
    handle.remove()

    for granularity in ("block", "module"):
        handle = apply_adacache(model, dataclasses.replace(CONFIG, granularity=granularity), stack=STACK)
        difference = (generate(model) - cached).abs().max()
        print(f"granularity {granularity!r}: {handle.report().kept_bytes:,} bytes kept, differs by {difference:.0e}")
        handle.remove()

    print("\nWhat a wrong description says:")
    said = {field: complaint(model, dataclasses.replace(STACK, **change)) for field, change in WRONG.items()}
    for field, (when, message) in said.items():
        print(f"  {field}, {when}: {message}")
    return 0 if all(message for _, message in said.values()) else 1


def complaint(model: nn.Module, stack: BlockStack) -> tuple[str, str]:
    """When a description is found wrong, and what is said then."""
    try:
        handle = apply_adacache(model, CONFIG, stack=stack)
    except ValueError as error:
        return "when it is applied", str(error)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            generate(model, steps=4)
        except ValueError as error:
            return "at the first forward", str(error)
        finally:
            handle.remove()
    return "as a warning, and all is computed", "".join(str(each.message) for each in warned)


if __name__ == "__main__":
    sys.exit(main())
