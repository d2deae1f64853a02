"""A literal AdaCache wrapper in plain PyTorch, and the three lines that hand its measurements to adacache_triton.

    python examples/swap_backend.py

`AdaCache` decides as the released code does (Kahatapitiya et al., arXiv 2411.02397; AdaCache-DiT/AdaCache): every block
keeps its two residuals, and how much the middle block's attention residual changed says for how many steps all of them
are reused. `Swapped` is the same wrapper, measured by `adacache_triton.functional`. Both generate a video from the same
noise with a small random transformer, on the GPU if there is one, and must compute the same steps.
"""

import sys
from math import nan

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from adacache_triton.functional import cache_rate, motion_score, residual_distance

FRAMES, TOKENS, CHANNELS, HEADS, BLOCKS, STEPS = 8, 16, 64, 4, 6, 30
CODEBOOK = {0.08: 6, 0.16: 5, 0.24: 4, 0.32: 3, 0.40: 2, 1.00: 1}  # released for 30 steps
MOREG_STEPS, STRIDES, SCALE, POWER, GRADIENT = (4, 26), (1,), 0.385, 8, 10  # motion regularisation


class Block(nn.Module):
    """Attention and MLP, whose gates turn with the time."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.up, self.down = nn.Linear(CHANNELS, 2 * CHANNELS), nn.Linear(2 * CHANNELS, CHANNELS)
        self.phases = nn.Parameter(6 * torch.rand(2, CHANNELS))

    def attention(self, x: Tensor, time: float) -> Tensor:
        q, k, v = self.qkv(layer_norm(x, x.shape[-1:])).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        # Sharpened, so that places differ although the weights are random.
        mixed = scaled_dot_product_attention(4 * q, 4 * k, v).transpose(1, 2).flatten(2)
        return torch.cos(self.phases[0] + time) * self.out(mixed)

    def mlp(self, x: Tensor, time: float) -> Tensor:
        return torch.cos(self.phases[1] + time) * self.down(self.up(layer_norm(x, x.shape[-1:])).relu())


class AdaCache:
    """The wrapper as it is written today. Each `if` on a distance waits for the device."""

    def __init__(self, blocks: nn.ModuleList):
        self.blocks, self.kept = blocks, [None] * len(blocks)
        self.computed, self.rate, self.motion_scale = 0, 1, 1.0
        self.trace = []  # step, distance, rate

    def __call__(self, x: Tensor, step: int, time: float) -> Tensor:
        computes = step in (1, STEPS - 1, STEPS) or step == self.computed + self.rate
        for i, block in enumerate(self.blocks):
            if computes:
                attention = block.attention(x, time)
                if i == len(self.blocks) // 2:
                    self.decide(step, self.kept[i], attention)
                self.kept[i] = attention, block.mlp(x + attention, time)
            attention, mlp = self.kept[i]
            x = x + attention + mlp
        return x

    def decide(self, step: int, kept: tuple | None, new: Tensor) -> None:
        self.computed, distance = step, nan
        if kept is not None:
            distance, scale = self.distance(kept[0], new), 1.0
            if MOREG_STEPS[0] <= step <= MOREG_STEPS[1]:
                scale = (self.motion(new) / SCALE) ** POWER
            gradient = GRADIENT * (scale - self.motion_scale) / self.rate
            distance, self.motion_scale = distance * (scale + abs(gradient)), scale
            self.rate = self.next_rate(distance)
        self.trace.append((step, float(distance), self.rate))

    def distance(self, kept: Tensor, new: Tensor) -> Tensor:
        return (kept - new).norm(p=1) / kept.norm(p=1) / self.rate

    def motion(self, new: Tensor) -> Tensor:
        scores = []
        for stride in STRIDES:
            later, earlier = new[:, stride * TOKENS :], new[:, : -stride * TOKENS]
            scores.append((later - earlier).norm(p=1) / (later.norm(p=1) + earlier.norm(p=1)))
        return sum(scores) / len(scores)

    def next_rate(self, distance: Tensor) -> int:
        for threshold, rate in CODEBOOK.items():
            if distance < threshold:
                return rate
        return rate


class Swapped(AdaCache):
    """The swap."""

    def distance(self, kept: Tensor, new: Tensor) -> Tensor:
        return residual_distance(kept, new, self.rate)

    def motion(self, new: Tensor) -> Tensor:
        return motion_score(new, TOKENS, STRIDES)

    def next_rate(self, distance: Tensor) -> int:
        return cache_rate(distance, CODEBOOK)


@torch.no_grad()
def generate(cache: AdaCache, noise: Tensor) -> Tensor:
    x = noise
    for step in range(1, STEPS + 1):
        u = (step - 1) / (STEPS - 1)
        time = 2 * (4 * (u - 0.5) ** 3 + 0.5)  # fast at both ends
        x = x + (cache(x, step, time) - x) / STEPS
    return x


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block() for _ in range(BLOCKS)).to(device)
    still, moving = torch.randn(1, TOKENS, CHANNELS), torch.randn(FRAMES, TOKENS, CHANNELS)
    noise = (still + 0.5 * moving).flatten(0, 1).unsqueeze(0).to(device)  # [1, frames * tokens, channels]

    plain, swapped = AdaCache(blocks), Swapped(blocks)
    videos = [generate(cache, noise) for cache in (plain, swapped)]

    print(f"distance and rate of every computed step, on {device}\nstep    plain PyTorch       adacache_triton")
    for (step, *theirs), (step_too, *ours) in zip(plain.trace, swapped.trace):
        same = "" if (step, theirs[1]) == (step_too, ours[1]) else f"    differs, at step {step_too}"
        print(f"{step:4}{theirs[0]:11.5f} -> {theirs[1]}{ours[0]:15.5f} -> {ours[1]}{same}")
    decisions, decisions_too = ([(step, rate) for step, _, rate in cache.trace] for cache in (plain, swapped))
    same = decisions == decisions_too
    difference = (videos[0] - videos[1]).abs().max().item()
    print(f"{'the same' if same else 'DIFFERENT'} decisions; the videos differ by {difference:.1e}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
