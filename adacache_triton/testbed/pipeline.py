"""The embedded model as a diffusers pipeline: class names in, videos out."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, LatteTransformer3DModel
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .videos import CLASSES, NUM_FRAMES, SIZE, to_pixels

WEIGHTS = Path(__file__).parent / "weights"


class EmbeddedOutput(BaseOutput):
    """frames: pixels in [0, 1], a float32 array [B, T, H, W, 3]."""

    frames: object


class EmbeddedPipeline(DiffusionPipeline):
    """A small Latte, trained on procedural videos (see `weights/MODEL_CARD.md`), with its sampler.

    Rectified flow in pixel space, classifier-free guidance in one batch [uncond, cond].
    """

    def __init__(self, transformer: LatteTransformer3DModel, scheduler: FlowMatchEulerDiscreteScheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @classmethod
    def load(cls, dtype: torch.dtype = torch.float32) -> EmbeddedPipeline:
        """From the package's own files; no network."""
        transformer = LatteTransformer3DModel.from_pretrained(WEIGHTS / "transformer", torch_dtype=dtype)
        return cls(transformer.eval(), FlowMatchEulerDiscreteScheduler.from_pretrained(WEIGHTS / "scheduler"))

    def prepare_latents(self, videos: int, generator, device: torch.device) -> torch.Tensor:
        """Noise, [videos, C, T, H, W]."""
        shape = (videos, self.transformer.config.in_channels, NUM_FRAMES, SIZE, SIZE)
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_inference_steps: int = 50,
        guidance_scale: float = 2.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> EmbeddedOutput:
        """Denoise one video for each class name in `prompt`. The generator, or one a video, lives on the CPU."""
        classes = [prompt] if isinstance(prompt, str) else prompt
        for name in classes:
            if name not in CLASSES:
                raise ValueError(f"prompt: the embedded model knows {', '.join(CLASSES)}, got {name!r}")
        model, device = self.transformer, self.transformer.device
        captions = torch.zeros(2 * len(classes), 1, model.config.caption_channels)  # [uncond, cond]
        for i, name in enumerate(classes):
            captions[len(classes) + i, 0, CLASSES.index(name)] = 1
        captions = captions.to(device, model.dtype)
        latents = self.prepare_latents(len(classes), generator, device)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        self._num_timesteps = len(self.scheduler.timesteps)
        for t in self.scheduler.timesteps:
            batch = torch.cat([latents, latents]).to(model.dtype)
            velocity = model(batch, t.expand(len(batch)), captions, return_dict=False)[0].float()
            uncond, cond = velocity.chunk(2)
            velocity = uncond + guidance_scale * (cond - uncond)
            latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
        frames = to_pixels(latents).permute(0, 2, 3, 4, 1)
        return EmbeddedOutput(frames=frames.float().cpu().numpy())
