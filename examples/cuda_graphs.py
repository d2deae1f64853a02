"""A computed and a reused step as one CUDA graph each, replayed as the decisions say.

    python examples/cuda_graphs.py

The embedded model makes two videos, cached, then the same two with its transformer compiled in place. `torch.compile`
sees two kinds of steps. On a GPU its mode "reduce-overhead" captures each once, in the first video; all that decides
stays outside of the graphs, so the second video replays them at its own rates. On a CPU the same graphs run uncaptured.
"""

import sys
import time

import torch
from torch._dynamo.utils import counters

from adacache_triton import AdaCacheConfig, Codebook, apply_adacache
from adacache_triton.testbed.pipeline import EmbeddedPipeline

PROMPTS, STEPS = ("still", "cross"), 16
CONFIG = AdaCacheConfig(Codebook((0.12, 0.3), (3, 2, 1)))
GPU = torch.cuda.is_available()
GRAPHS = {"mode": "reduce-overhead"} if GPU else {"backend": "eager"}


def generate(pipe, handle, prompt: str) -> tuple[torch.Tensor, list[int], float]:
    """A video, the steps that were computed, and the milliseconds that a step took."""
    start = time.perf_counter()
    video = pipe(prompt, STEPS, generator=torch.Generator().manual_seed(0)).frames
    return torch.from_numpy(video), handle.report().computed_steps, 1e3 * (time.perf_counter() - start) / STEPS


def main() -> int:
    torch.set_num_threads(1)
    pipe = EmbeddedPipeline.load().to("cuda" if GPU else "cpu")
    handle, made = apply_adacache(pipe, CONFIG), []
    plain = [generate(pipe, handle, prompt) for prompt in PROMPTS]

    pipe.transformer.compile(fullgraph=True, **GRAPHS)
    good = True
    for prompt, (expected, steps, eager_ms) in zip(PROMPTS, plain):
        video, compiled_steps, ms = generate(pipe, handle, prompt)
        made.append(counters["stats"]["unique_graphs"])
        difference = (video - expected).abs().max().item()
        print(f"{prompt}: computes {steps}, compiled {'the same' if steps == compiled_steps else compiled_steps}")
        print(f"  {made[-1]} graphs so far; {eager_ms:.0f} ms a step eager, {ms:.0f} ms compiled", end="")
        print(f"; the videos differ by {difference:.1e}")
        good = good and steps == compiled_steps and difference <= 1e-2
    return 0 if good and made == [2, 2] else 1


if __name__ == "__main__":
    sys.exit(main())
