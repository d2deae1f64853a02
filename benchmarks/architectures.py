"""The paper's models and five of diffusers at full size, without weights, and the runs that are timed.

A row is a model, a video and the steps that are computed. Each has a small copy, for machines without a GPU.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adacache_triton import AdaCacheConfig, Schedule

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests/support"))
from doubles import open_sora_plan, stdit3  # noqa: E402

Noise = Callable[..., Tensor]  # normal, of a shape
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Video:
    """What goes into a transformer: latents of frames x height x width, and tokens of text."""

    frames: int
    height: int
    width: int
    text: int


@dataclass(frozen=True, eq=False)
class Architecture:
    """A transformer without weights.

    Args:
        model, kind: its name, and that of its class.
        make: the class, called with `config`.
        config: at full size.
        small: what is different in the small copy.
        latents: shape of one sample's, from the configuration and a video.
        condition: the forward's other arguments, likewise; `noise` draws them, so many samples of each.
        depths: of `config`, how many blocks its lists have.
        shrunk: the video of the small copy.
    """

    model: str
    kind: str
    make: Callable[..., nn.Module]
    config: Mapping[str, Any]
    small: Mapping[str, Any]
    latents: Callable[[Mapping[str, Any], Video], Shape]
    condition: Callable[[Mapping[str, Any], Video, int, Noise], dict[str, Any]]
    depths: tuple[str, ...] = ("num_layers",)
    shrunk: Video = field(default=Video(3, 8, 8, 6))

    def build(self, device, dtype: torch.dtype, **changed) -> nn.Module:
        """Random weights, made where they are used. What diffusers keeps in float32 stays so."""
        with torch.device(device):
            model = self.make(**{**self.config, **changed}).eval().requires_grad_(False)
        if not hasattr(model, "_keep_in_fp32_modules"):
            return model.to(dtype)
        for name, parameter in model.named_parameters():
            if not any(part in name.split(".") for part in model._keep_in_fp32_modules or ()):
                parameter.data = parameter.data.to(dtype)
        return model


def diffusers_class(kind: str) -> Callable[..., nn.Module]:
    def make(**config):
        import diffusers

        return getattr(diffusers, kind)(**config)

    return make


class LatteT2V(open_sora_plan.LatteT2V):
    """Without masks, which no token of a full video needs and fused attention does not take."""

    def arguments(self, *shape):
        masks, in_space, in_time = super().arguments(*shape)
        return [None] * len(masks), in_space, in_time


def channels_first(channels: str) -> Callable[[Mapping, Video], Shape]:
    return lambda config, v: (config[channels], v.frames, v.height, v.width)


STDIT3 = Architecture(
    "Open-Sora 1.2", "STDiT3", stdit3.STDiT3,
    config=dict(depth=28, width=1152, heads=16, channels=4),
    small=dict(depth=3, width=32, heads=4),
    latents=channels_first("channels"),
    condition=lambda config, v, samples, noise: dict(y=noise(samples, v.text, config["width"])),
    depths=("depth",),
)  # fmt: skip
LATTE_T2V = Architecture(
    "Open-Sora-Plan 1.1", "LatteT2V", LatteT2V,
    config=dict(num_layers=28, width=1152, heads=16, channels=4, frames=17),
    small=dict(num_layers=3, width=32, heads=2, frames=3),
    latents=channels_first("channels"),
    condition=lambda config, v, samples, noise: dict(encoder_hidden_states=noise(samples, v.text, 8)),
)  # fmt: skip
LATTE = Architecture(
    "Latte", "LatteTransformer3DModel", diffusers_class("LatteTransformer3DModel"),
    config=dict(
        num_attention_heads=16, attention_head_dim=72, num_layers=28, in_channels=4, out_channels=8, patch_size=2,
        sample_size=64, video_length=16, cross_attention_dim=1152, caption_channels=4096, attention_bias=True,
        activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6,
    ),
    small=dict(
        num_attention_heads=2, attention_head_dim=12, num_layers=3, sample_size=8, video_length=3,
        cross_attention_dim=24, caption_channels=8,
    ),
    latents=channels_first("in_channels"),
    condition=lambda config, v, samples, noise: dict(
        encoder_hidden_states=noise(samples, v.text, config["caption_channels"])
    ),
)  # fmt: skip
COGVIDEOX = Architecture(
    "CogVideoX 2B", "CogVideoXTransformer3DModel", diffusers_class("CogVideoXTransformer3DModel"),
    config=dict(
        num_attention_heads=30, attention_head_dim=64, num_layers=30, in_channels=16, out_channels=16,
        time_embed_dim=512, text_embed_dim=4096, sample_width=90, sample_height=60, sample_frames=49, patch_size=2,
        max_text_seq_length=226,
    ),
    small=dict(
        num_attention_heads=2, attention_head_dim=8, num_layers=3, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=8, sample_width=8, sample_height=8, sample_frames=9, max_text_seq_length=6,
    ),
    latents=lambda config, v: (v.frames, config["in_channels"], v.height, v.width),
    condition=lambda config, v, samples, noise: dict(
        encoder_hidden_states=noise(samples, v.text, config["text_embed_dim"])
    ),
)  # fmt: skip
WAN = Architecture(
    "Wan 2.1 1.3B", "WanTransformer3DModel", diffusers_class("WanTransformer3DModel"),
    config=dict(
        num_attention_heads=12, attention_head_dim=128, num_layers=30, ffn_dim=8960, in_channels=16, out_channels=16,
        text_dim=4096, freq_dim=256, patch_size=(1, 2, 2),
    ),
    small=dict(
        num_attention_heads=2, attention_head_dim=12, num_layers=3, ffn_dim=32, in_channels=4, out_channels=4,
        text_dim=8, freq_dim=16, rope_max_seq_len=32,
    ),
    latents=channels_first("in_channels"),
    condition=lambda config, v, samples, noise: dict(encoder_hidden_states=noise(samples, v.text, config["text_dim"])),
)  # fmt: skip
LTX = Architecture(
    "LTX-Video 2B", "LTXVideoTransformer3DModel", diffusers_class("LTXVideoTransformer3DModel"),
    config=dict(
        num_attention_heads=32, attention_head_dim=64, num_layers=28, in_channels=128, out_channels=128,
        cross_attention_dim=2048, caption_channels=4096,
    ),
    small=dict(
        num_attention_heads=2, attention_head_dim=8, num_layers=3, in_channels=4, out_channels=4,
        cross_attention_dim=16, caption_channels=8,
    ),
    latents=lambda config, v: (v.frames * v.height * v.width, config["in_channels"]),
    condition=lambda config, v, samples, noise: dict(
        encoder_hidden_states=noise(samples, v.text, config["caption_channels"]),
        encoder_attention_mask=torch.ones_like(noise(samples, v.text)),
        num_frames=v.frames, height=v.height, width=v.width, rope_interpolation_scale=(8 / 25, 32.0, 32.0),
    ),
    shrunk=Video(3, 4, 4, 6),
)  # fmt: skip
HUNYUAN = Architecture(
    "HunyuanVideo", "HunyuanVideoTransformer3DModel", diffusers_class("HunyuanVideoTransformer3DModel"),
    config=dict(
        num_attention_heads=24, attention_head_dim=128, num_layers=20, num_single_layers=40, num_refiner_layers=2,
        in_channels=16, out_channels=16, patch_size=2, patch_size_t=1, text_embed_dim=4096, pooled_projection_dim=768,
        rope_axes_dim=(16, 56, 56), guidance_embeds=True,
    ),
    small=dict(
        num_attention_heads=2, attention_head_dim=10, num_layers=3, num_single_layers=3, num_refiner_layers=1,
        in_channels=4, out_channels=4, text_embed_dim=8, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    ),
    latents=channels_first("in_channels"),
    condition=lambda config, v, samples, noise: dict(
        encoder_hidden_states=noise(samples, v.text, config["text_embed_dim"]),
        encoder_attention_mask=torch.ones_like(noise(samples, v.text)),
        pooled_projections=noise(samples, config["pooled_projection_dim"]),
        guidance=torch.full_like(noise(samples), 6000.0),
    ),
    depths=("num_layers", "num_single_layers"),
)  # fmt: skip


def typical(preset: str, num_steps: int, computed: int) -> tuple[int, ...]:
    """The computed steps of a video on which an official codebook computes so many.

    Its residual turns by an angle of speed * (4 (u - 1/2)^3 + 1/2), u from 0 to 1 over the run: fast at both ends and
    slowly in the middle, as in the released rule's recorded traces. Between two steps it changes, relative to its L1
    norm, by twice the sine of half the angle between them. The speed is the least at which the count is reached.
    """
    for tenths in range(1, 1000):
        steps = turning(AdaCacheConfig.official(preset), num_steps, tenths / 10)
        if len(steps) == computed:
            return steps
    raise ValueError(f"computed: expected a count that {preset} comes to in {num_steps} steps, got {computed}")


def turning(config: AdaCacheConfig, num_steps: int, speed: float) -> tuple[int, ...]:
    """Likewise, at a speed, in radians over the run."""
    schedule, angle = Schedule(config, num_steps), None
    for step in range(1, num_steps + 1):
        if schedule.begin(step).computed:
            before, angle = angle, speed * (4 * ((step - 1) / (num_steps - 1) - 0.5) ** 3 + 0.5)
            schedule.decide(None if before is None else [2 * abs(math.sin((angle - before) / 2)), 1.0])
    return tuple(step.step for step in schedule.steps if step.computed)


@dataclass(frozen=True)
class Row:
    """A run: which model, on what, how guided, in how many steps, of which some are computed.

    Args:
        branches: guidance branches: 2 of classifier-free guidance, 1 of a distilled model.
        calls: of the transformer in a step: 2 where the branches come one by one, else 1.
        schedule: the computed steps.
        source: where they are from.
        preset: whose decision is paid for.
    """

    name: str
    architecture: Architecture
    size: str
    video: Video
    branches: int
    calls: int
    steps: int
    schedule: tuple[int, ...]
    source: str
    preset: str

    @property
    def samples(self) -> int:
        """Of a call."""
        return self.branches // self.calls

    @property
    def title(self) -> str:
        return f"{self.architecture.model}, {self.size}, {self.steps} steps"

    @property
    def ideal(self) -> float:
        """The speed-up if only computed steps took time."""
        return self.steps / len(self.schedule)

    @cached_property
    def config(self) -> AdaCacheConfig:
        """That decides, with MoReg, which costs most; what it decides is the schedule's."""
        return AdaCacheConfig.official(self.preset, moreg=True)


TRACES = json.loads((ROOT / "tests/data/decisions.json").read_text())  # of the released rule, on made residuals
TRACE_100, TRACE_30 = "100-fast-speed6.0-motion0.7-moreg1-float32", "30-fast-speed6.0-motion0.7-moreg1-bfloat16"
FAST_30 = "open-sora-30-fast"


def recorded(name: str, published: str) -> dict:
    (trace,) = (trace["trace"] for trace in TRACES if trace["name"] == name)
    schedule = tuple(row["step"] for row in trace)
    return dict(schedule=schedule, source=f"{name}, a trace of the released rule; {published}")


LATTE_STEPS = dict(
    steps=50, schedule=typical(FAST_30, 50, 18), preset=FAST_30,
    source="typical('open-sora-30-fast', 50, 18); Latte's codebook is not published, its 2.74x are at most 18.2 steps",
)  # fmt: skip
OTHERS = LATTE_STEPS | dict(source="as Latte's row; nothing is published for this model")
ROWS = (
    Row(
        "open-sora-720p", STDIT3, "720p, 51 frames", Video(15, 90, 160, 300), branches=2, calls=1, steps=100,
        preset="open-sora-100", **recorded(TRACE_100, "the published 4.7x of a pipeline are at most 21.3 steps"),
    ),
    Row(
        "open-sora-480p", STDIT3, "480p, 51 frames", Video(15, 60, 106, 300), branches=2, calls=1, steps=30,
        preset=FAST_30, **recorded(TRACE_30, "the published 2.24x of a pipeline are at most 13.4 steps"),
    ),
    Row(
        "open-sora-plan", LATTE_T2V, "512 x 512, 65 frames", Video(17, 64, 64, 300), branches=2, calls=1, steps=150,
        schedule=typical("open-sora-100", 150, 40), preset="open-sora-100",
        source="typical('open-sora-100', 150, 40); its codebook is not published, its 3.70x are at most 40.5 steps",
    ),
    Row(
        "latte", LATTE, "512 x 512, 16 frames", Video(16, 64, 64, 120), branches=2, calls=1, **LATTE_STEPS
    ),
    Row(
        "wan-1.3b", WAN, "480 x 832, 81 frames", Video(21, 60, 104, 512), branches=2, calls=2, **OTHERS
    ),
    Row(
        "cogvideox-2b", COGVIDEOX, "480 x 720, 49 frames", Video(13, 60, 90, 226), branches=2, calls=1, **OTHERS
    ),
    Row(
        "ltx", LTX, "512 x 704, 161 frames", Video(21, 16, 22, 128), branches=2, calls=1, **OTHERS
    ),
    Row(
        "hunyuan-720p", HUNYUAN, "720 x 1280, 129 frames", Video(33, 90, 160, 256), branches=1, calls=1, **OTHERS
    ),
)  # fmt: skip
BY_NAME = {row.name: row for row in ROWS}
