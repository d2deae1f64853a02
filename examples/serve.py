"""A small server: videos that arrive and leave between denoising steps, batched together and cached one by one.

    python examples/serve.py --requests 8 --batch 4 --check

Each request is a class of the embedded model, with its own seed, number of steps and guidance. Up to `--batch` videos
are denoised at a time; a session holds what is kept for one of them, so each follows the schedule that it would have
alone, whatever its neighbours do. `--check` makes every video again by itself and compares.
"""

import argparse
import random
import sys
from dataclasses import dataclass, replace

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from adacache_triton import AdaCacheConfig, AdaCacheHandle, apply_adacache
from adacache_triton.testbed.pipeline import EmbeddedPipeline
from adacache_triton.testbed.videos import CLASSES, to_pixels

CONFIG = AdaCacheConfig.preset("embedded")


@dataclass
class Video:
    """A request, and what is made of it. Times are counted in steps of the server."""

    name: str
    seed: int
    steps: int
    guidance: float
    arrived: int
    started: int = 0
    done: int = 0

    def start(self, pipe: EmbeddedPipeline, handle: AdaCacheHandle, now: int) -> None:
        self.started, self.session = now, handle.session(self.steps)
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
        self.scheduler.set_timesteps(self.steps, device=pipe.device)
        self.latents = pipe.prepare_latents(1, torch.Generator().manual_seed(self.seed), pipe.device)
        self.caption = torch.zeros(1, 1, pipe.transformer.config.caption_channels, device=pipe.device)
        self.caption[..., CLASSES.index(self.name)] = 1

    @property
    def time(self) -> torch.Tensor:
        return self.scheduler.timesteps[self.session.step - 1].unsqueeze(0)

    def advance(self, uncond: torch.Tensor, cond: torch.Tensor) -> None:
        velocity = uncond + self.guidance * (cond - uncond)
        self.latents = self.scheduler.step(velocity, self.time, self.latents, return_dict=False)[0]


@torch.no_grad()
def denoise(model: torch.nn.Module, handle: AdaCacheHandle, videos: list[Video]) -> None:
    """One step of each video, with both halves of guidance in the batch: [uncond.., cond..]."""
    with handle.step([video.session for video in videos]):
        rows = zip(*((video.latents, video.time, video.caption) for video in videos))
        latents, times, captions = (torch.cat(2 * each) for each in rows)
        captions[: len(videos)] = 0
        halves = model(latents, times, captions, return_dict=False)[0].chunk(2)
    for video, uncond, cond in zip(videos, *(half.split(1) for half in halves)):
        video.advance(uncond, cond)


def serve(pipe: EmbeddedPipeline, requests: list[Video], batch: int) -> None:
    """First come, first served."""
    handle = apply_adacache(pipe.transformer, replace(CONFIG, per_video=True))
    waiting, active, now = list(requests), [], 0
    while waiting or active:
        while waiting and waiting[0].arrived <= now and len(active) < batch:
            active.append(waiting.pop(0))
            active[-1].start(pipe, handle, now)
        if active:
            denoise(pipe.transformer, handle, active)
        now += 1
        for video in [video for video in active if video.session.over]:
            active.remove(video)
            video.done = now
    handle.remove()


def difference(pipe: EmbeddedPipeline, video: Video) -> float:
    """The largest, of pixels in [0, 1], from the video that the pipeline generates by itself under the same cache."""
    handle, generator = apply_adacache(pipe, CONFIG), torch.Generator().manual_seed(video.seed)
    alone = pipe(video.name, video.steps, video.guidance, generator).frames
    handle.remove()
    return (to_pixels(video.latents).permute(0, 2, 3, 4, 1).cpu() - torch.from_numpy(alone)).abs().max().item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=6)
    parser.add_argument("--batch", type=int, default=3, help="videos at a time")
    parser.add_argument("--steps", type=int, nargs=2, default=(12, 24), help="fewest and most of a request")
    parser.add_argument("--check", action="store_true", help="compare every video with itself generated alone")
    options = parser.parse_args()

    pipe, draw, videos = EmbeddedPipeline.load(), random.Random(0), []
    for seed in range(options.requests):
        steps, guidance = draw.randint(*options.steps), round(draw.uniform(1.5, 3), 1)
        videos.append(Video(CLASSES[seed % len(CLASSES)], seed, steps, guidance, arrived=4 * seed))
    serve(pipe, videos, options.batch)

    print("video    steps  guidance  arrived  started  done  computed")
    ran, asked = 0, 2 * sum(video.steps for video in videos)
    for v in videos:
        computed = len(v.session.report().computed_steps)
        print(f"{v.name:8}{v.steps:6}{v.guidance:10}{v.arrived:9}{v.started:9}{v.done:6}{computed:10}")
        ran += 2 * computed
    print(f"the blocks ran for {ran} samples; without a cache, for {asked}: {1 - ran / asked:.0%} saved")
    if not options.check:
        return 0
    largest = max(difference(pipe, video) for video in videos)
    print(f"the videos differ from those made alone by {largest:.0e}")
    return 0 if largest < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
