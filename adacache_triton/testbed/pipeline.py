"""The embedded models as diffusers pipelines: captions in, videos out."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, LatteTransformer3DModel, WanTransformer3DModel
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from . import scenes, videos
from .videos import NUM_FRAMES, SIZE, to_pixels

WEIGHTS = Path(__file__).parent / "weights"


class EmbeddedOutput(BaseOutput):
    """frames: pixels in [0, 1], a float32 array [B, T, H, W, 3]."""

    frames: object


class EmbeddedPipeline(DiffusionPipeline):
    """A small Latte, trained on procedural videos (see `weights/latte/MODEL_CARD.md`), with its sampler.

    Rectified flow in pixel space, classifier-free guidance in one batch [uncond, cond].
    """

    NAME, TRANSFORMER = "latte", LatteTransformer3DModel
    CLASSES = videos.CLASSES
    channels = "caption_channels"  # of a caption, in the transformer's configuration

    def __init__(self, transformer, scheduler: FlowMatchEulerDiscreteScheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self._place: dict = {}  # of the loop, for caches that ask; they ask for the timestep, too
        self._current_timestep = None

    @property
    def current_timestep(self):
        return self._current_timestep

    @classmethod
    def load(cls, dtype: torch.dtype = torch.float32) -> EmbeddedPipeline:
        """From the package's own files; no network."""
        folder = WEIGHTS / cls.NAME
        transformer = cls.TRANSFORMER.from_pretrained(folder / "transformer", torch_dtype=dtype)
        return cls(transformer.eval(), FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"))

    def prepare_latents(self, count: int, generator, device: torch.device) -> Tensor:
        """Noise, [count, C, T, H, W]."""
        shape = (count, self.transformer.config.in_channels, NUM_FRAMES, SIZE, SIZE)
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

    @staticmethod
    def words(prompt: str) -> list[int]:
        """The word numbers of a caption, here the class alone."""
        if prompt not in videos.CLASSES:
            raise ValueError(f"prompt: the embedded model knows {', '.join(videos.CLASSES)}, got {prompt!r}")
        return [videos.CLASSES.index(prompt)]

    @classmethod
    def examples(cls) -> list[str]:
        """A caption of each class."""
        return list(cls.CLASSES)

    def velocity(self, latents: Tensor, t: Tensor, captions: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Unconditional and conditional velocity, in one call of the transformer."""
        batch = torch.cat([latents, latents])
        return self.call("cond_uncond", batch, t, captions[1]).chunk(2)

    def call(self, context: str, latents: Tensor, t: Tensor, captions: Tensor) -> Tensor:
        """One call of the transformer, named as diffusers' pipelines name theirs."""
        model = self.transformer
        with self._context(model, context):
            return model(latents.to(model.dtype), t.expand(len(latents)), captions, return_dict=False)[0].float()

    def _context(self, model, name: str):
        """As Wan's pipeline has it: newer releases of diffusers also take where the loop is."""
        named = getattr(model, "cache_context", None)
        if named is None:
            return nullcontext()
        more = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(named).parameters.values())
        return named(name, **self._place) if more else named(name)

    def captions(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Conditional captions [B, L, C], and those of a whole batch [uncond, cond]."""
        model = self.transformer
        words = torch.tensor([self.words(prompt) for prompt in prompts])
        cond = torch.nn.functional.one_hot(words, model.config[self.channels]).to(model.device, model.dtype)
        return cond, torch.cat([torch.zeros_like(cond), cond])

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_inference_steps: int = 50,
        guidance_scale: float = 2.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> EmbeddedOutput:
        """Denoise one video for each caption in `prompt`. The generator, or one a video, lives on the CPU."""
        captions = self.captions([prompt] if isinstance(prompt, str) else prompt)
        device = self.transformer.device
        latents = self.prepare_latents(len(captions[0]), generator, device)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        self._num_timesteps = len(self.scheduler.timesteps)
        sigmas = self.scheduler.sigmas.tolist()
        for i, t in enumerate(self.scheduler.timesteps):
            self._current_timestep = t
            self._place = dict(step_index=i, sigma=sigmas[i], num_inference_steps=num_inference_steps)
            uncond, cond = self.velocity(latents, t, captions)
            latents = self.scheduler.step(uncond + guidance_scale * (cond - uncond), t, latents, return_dict=False)[0]
        self._current_timestep = None
        self.maybe_free_model_hooks()  # ends the run for every cache that counts its steps
        frames = to_pixels(latents).permute(0, 2, 3, 4, 1)
        return EmbeddedOutput(frames=frames.float().cpu().numpy())


class EmbeddedWanPipeline(EmbeddedPipeline):
    """A small Wan, trained on procedural scenes (see `weights/wan/MODEL_CARD.md`), with its sampler.

    Captions of three words, as in "swarm red navy"; guidance as Wan's own pipeline has it, a call for each branch.
    """

    NAME, TRANSFORMER = "wan", WanTransformer3DModel
    CLASSES = scenes.CLASSES
    channels = "text_dim"
    words = staticmethod(scenes.parse)

    @classmethod
    def examples(cls) -> list[str]:
        """A caption of each class, colours in turn."""
        colours = zip(cls.CLASSES, scenes.SUBJECTS * 2, scenes.GROUNDS * 2)
        return [" ".join(words) for words in colours]

    def velocity(self, latents: Tensor, t: Tensor, captions: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Unconditional and conditional velocity, in two calls of the transformer."""
        cond, both = captions
        conditional = self.call("cond", latents, t, cond)
        return self.call("uncond", latents, t, both[: len(cond)]), conditional


EMBEDDED = {pipeline.NAME: pipeline for pipeline in (EmbeddedPipeline, EmbeddedWanPipeline)}
