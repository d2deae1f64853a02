"""Whole diffusers video pipelines, tiny and untrained; no network.

Two are saved as `from_pretrained` reads them, text encoders included. The others have none: `PIPELINES["wan"].make(8)`
is a pipeline and the arguments of a call with 8 steps, prompt embeddings among them, guidance on, latents returned.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    LattePipeline,
    LatteTransformer3DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from packaging.version import Version
from tiny_models import MODELS, build
from torch import Tensor
from transformers import T5Config, T5EncoderModel, T5Tokenizer, UMT5Config, UMT5EncoderModel

WORDS = ("a", "cat", "dog", "runs", "sleeps", "on", "the", "beach")
TEXT = dict(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)


def save_latte(folder: Path) -> Path:
    """A LattePipeline for videos of 4 frames; 16 x 16 pixels are latent frames of 8 x 8."""
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    transformer = LatteTransformer3DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=TEXT["d_model"],
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=4,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
    )
    LattePipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(T5Config(vocab_size=len(tokenizer), **TEXT)),
        vae=vae,
        transformer=transformer,
        scheduler=DDIMScheduler(),
    ).save_pretrained(folder)
    return folder


def save_wan(folder: Path) -> Path:
    """A WanPipeline; 5 frames of 16 x 16 are two latent frames of 2 x 2."""
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=TEXT["d_model"],
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **TEXT)),
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)
    return folder


def _tokenizer() -> T5Tokenizer:
    """A word a piece, letters for the rest."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS]
    pieces += [(letter, -6.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


@dataclass(frozen=True)
class TinyPipeline:
    """A pipeline of diffusers, its components and the arguments of a call.

    Args:
        kind: name of the class, or its path in diffusers: some are exported only where OpenCV is installed.
        components: makes them; those left out are None where the class has no default.
        call: arguments, from the number of steps.
        since: first release of diffusers that has the class.
    """

    kind: str
    components: Callable[[], dict[str, Any]]
    call: Callable[[int], dict[str, Any]]
    since: str = "0.36"

    @property
    def available(self) -> bool:
        return Version(diffusers.__version__) >= Version(self.since)

    def make(self, steps: int) -> tuple[diffusers.DiffusionPipeline, dict[str, Any]]:
        module, _, name = f"diffusers.{self.kind}".rpartition(".")
        kind = getattr(import_module(module), name)
        required = [n for n, p in inspect.signature(kind.__init__).parameters.items() if p.default is p.empty]
        pipe = kind(**dict.fromkeys(required[1:]) | self.components())
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        common = dict(num_inference_steps=steps, generator=generator, output_type="latent")
        known = inspect.signature(kind.__call__).parameters
        return pipe, {name: value for name, value in common.items() if name in known} | self.call(steps)


def text(seed: int, tokens: int = 6, width: int = 8) -> Tensor:
    return torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed))


def prompts(tokens: int = 6, width: int = 8, masks: bool = False) -> dict[str, Tensor]:
    """Embeddings of a prompt and a negative one."""
    embeds = dict(prompt_embeds=text(1, tokens, width), negative_prompt_embeds=text(2, tokens, width))
    if masks:
        ones = torch.ones(1, tokens)
        embeds |= dict(prompt_attention_mask=ones, negative_prompt_attention_mask=ones.clone())
    return embeds


def flow(**config) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, **config)


def model(name: str, seed: int = 0, **config) -> torch.nn.Module:
    return build(MODELS[name].kind, MODELS[name].config | config, seed)


class Part(torch.nn.Module):
    """In the place of a component that a call asks for a few values, and of an encoder, for what `answer` gives."""

    def __init__(self, answer: Callable[..., Any] | None = None, **values):
        super().__init__()
        self.answer, self.dtype, self.device = answer, torch.float32, torch.device("cpu")
        for name, value in values.items():
            setattr(self, name, value)

    def forward(self, *args, **kwargs):
        return self.answer(*args, **kwargs)


class Inputs(dict):
    """What a feature extractor gives."""

    def to(self, *args, **kwargs):
        return self


class Chat(Part):
    """A chat model's tokenizer."""

    eos_token_id = 1

    def apply_chat_template(self, conversations: list, **kwargs) -> Part:
        return Part(input_ids=[len(conversations[-1]["content"]) % 7, 3, 5])

    def convert_tokens_to_ids(self, token: str) -> int:
        return len(token) % 20


class Harmless(Part):
    """Cosmos' safety checker."""

    def check_text_safety(self, prompt: str) -> bool:
        return True


class Codec(Part):
    """An autoencoder without weights: every 4th frame, every 8th pixel, the same in all channels."""

    def __init__(self, time: int = 4, space: int = 8, channels: int = 4):
        ratios = dict(temporal_compression_ratio=time, spatial_compression_ratio=space)
        config = Part(
            z_dim=channels, latent_channels=channels, latents_mean=[0.0] * channels, latents_std=[1.0] * channels,
            scale_factor_temporal=time, scale_factor_spatial=space, scaling_factor=1.0, invert_scale_latents=False,
            block_out_channels=(1,) * 4, **ratios,
        )  # fmt: skip
        mean, std = torch.zeros(channels), torch.ones(channels)
        super().__init__(
            config=config, latents_mean=mean, latents_std=std, temperal_downsample=[False, True, True], **ratios
        )
        self.strides = (1, 1, time, space, space)

    def encode(self, video: Tensor) -> Part:
        latents = video.mean(1, keepdim=True)[tuple(slice(None, None, s) for s in self.strides)]
        latents = latents.repeat(1, self.config.z_dim, 1, 1, 1)
        return Part(latent_dist=Part(mode=lambda: latents, sample=lambda generator=None: latents))

    def decode(self, latents: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        _, _, time, height, width = (n * s for n, s in zip(latents.shape, self.strides))
        size = (time - self.strides[2] + 1, height, width)
        return (torch.nn.functional.interpolate(latents[:, :3], size=size),)


def eyes(name: str = "image_processor") -> dict[str, Part]:
    """An image encoder and its processor."""
    seen = text(9, 5)
    encoder = Part(lambda **_: Part(last_hidden_state=seen, hidden_states=[seen] * 2))
    return {"image_encoder": encoder, name: Part(lambda **_: Inputs())}


def unipc() -> diffusers.UniPCMultistepScheduler:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def image(seed: int = 5) -> Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def film(frames: int, size: int = 64) -> list:
    """Frames as PIL images."""
    from PIL import Image

    return [Image.new("RGB", (size, size), (10 * i, 80, 120)) for i in range(frames)]


VIDEO = dict(height=64, width=64, num_frames=9)  # 3 latent frames of 8 x 8

PIPELINES = {
    "latte": TinyPipeline(
        "LattePipeline",
        lambda: dict(transformer=model("latte", out_channels=8), scheduler=DDIMScheduler()),
        lambda steps: dict(
            height=64, width=64, video_length=3, clean_caption=False, negative_prompt=None, **prompts()
        ),
    ),
    "wan": TinyPipeline(
        "WanPipeline",
        lambda: dict(transformer=model("wan"), scheduler=flow()),
        lambda steps: VIDEO | prompts(),
    ),
    "wan_2_2": TinyPipeline(
        "WanPipeline",
        lambda: dict(
            transformer=model("wan"), transformer_2=model("wan", seed=1), boundary_ratio=0.875, scheduler=flow()
        ),
        lambda steps: VIDEO | prompts(),
    ),
    "wan_2_2_ti2v": TinyPipeline(
        "WanPipeline",
        lambda: dict(transformer=model("wan"), expand_timesteps=True, scheduler=flow()),
        lambda steps: VIDEO | prompts(),
    ),
    "wan_i2v": TinyPipeline(
        "WanImageToVideoPipeline",
        lambda: dict(transformer=model("wan_i2v"), scheduler=flow(), vae=Codec(), **eyes()),
        lambda steps: VIDEO | dict(image=image(), **prompts(512)),
    ),
    "wan_v2v": TinyPipeline(
        "WanVideoToVideoPipeline",
        lambda: dict(transformer=model("wan"), scheduler=unipc(), vae=Codec()),
        # At strength 0.5 half of the steps are left.
        lambda steps: dict(height=64, width=64, video=film(9), strength=0.5, **prompts())
        | dict(num_inference_steps=2 * steps),
    ),
    "wan_vace": TinyPipeline(
        "WanVACEPipeline",
        lambda: dict(transformer=model("wan_vace", vace_in_channels=72), scheduler=flow(), vae=Codec()),
        lambda steps: VIDEO | prompts(),
    ),
    "wan_animate": TinyPipeline(
        "WanAnimatePipeline",
        lambda: dict(transformer=model("wan_animate"), scheduler=unipc(), vae=Codec(), **eyes()),
        # Two segments of 9 frames, one of them in common.
        lambda steps: dict(
            image=film(1)[0], pose_video=film(17), face_video=film(17, 8), height=64, width=64, guidance_scale=4.0,
            segment_frame_length=9, **prompts(512),
        ),
    ),
    "chronoedit": TinyPipeline(
        "ChronoEditPipeline",
        lambda: dict(transformer=model("chronoedit"), scheduler=unipc(), vae=Codec(), **eyes()),
        lambda steps: dict(height=64, width=64, image=image(), **prompts(512)),
    ),
    "cogvideox": TinyPipeline(
        "CogVideoXPipeline",
        lambda: dict(transformer=model("cogvideox"), scheduler=diffusers.CogVideoXDDIMScheduler()),
        lambda steps: VIDEO | prompts(),
    ),
    "cogvideox_1_5": TinyPipeline(
        "CogVideoXPipeline",
        lambda: dict(
            transformer=model("cogvideox_1_5", ofs_embed_dim=None), scheduler=diffusers.CogVideoXDPMScheduler()
        ),
        lambda steps: VIDEO | dict(num_frames=13, **prompts()),
    ),
    "consisid": TinyPipeline(
        "pipelines.consisid.pipeline_consisid.ConsisIDPipeline",
        lambda: dict(
            transformer=model("consisid", in_channels=8), scheduler=diffusers.CogVideoXDPMScheduler(),
            vae=Codec(),
        ),
        lambda steps: VIDEO | dict(
            image=image(), id_cond=text(6, 1, 4)[0].expand(2, 4), id_vit_hidden=[text(7, 3, 4).expand(2, 3, 4)] * 2,
            **prompts(),
        ),
    ),
    "allegro": TinyPipeline(
        "AllegroPipeline",
        lambda: dict(transformer=model("allegro"), scheduler=DDIMScheduler()),
        lambda steps: VIDEO | dict(
            num_frames=12, clean_caption=False, negative_prompt=None, **prompts(masks=True)
        ),
    ),
    "mochi": TinyPipeline(
        "MochiPipeline",
        lambda: dict(transformer=model("mochi"), scheduler=flow()),
        lambda steps: VIDEO | dict(num_frames=13, **prompts(width=16, masks=True)),
    ),
    "hunyuan_video": TinyPipeline(
        "HunyuanVideoPipeline",
        lambda: dict(transformer=model("hunyuan_video"), scheduler=flow()),
        lambda steps: VIDEO | dict(
            true_cfg_scale=4.0, pooled_prompt_embeds=text(3)[:, 0], negative_pooled_prompt_embeds=text(4)[:, 0],
            **prompts(masks=True),
        ),
    ),
    "hunyuan_video_i2v": TinyPipeline(
        "HunyuanVideoImageToVideoPipeline",
        lambda: dict(transformer=model("hunyuan_video_i2v"), scheduler=flow(), vae=Codec()),
        lambda steps: VIDEO | dict(
            image=film(1)[0], true_cfg_scale=4.0, pooled_prompt_embeds=text(3)[:, 0],
            negative_pooled_prompt_embeds=text(4)[:, 0], **prompts(masks=True),
        ),
    ),
    "framepack": TinyPipeline(
        "HunyuanVideoFramepackPipeline",
        lambda: dict(
            transformer=model("framepack"), scheduler=flow(use_dynamic_shifting=True), vae=Codec(),
            **eyes("feature_extractor"),
        ),
        # Two sections of 3 latent frames.
        lambda steps: VIDEO | dict(
            num_frames=18, latent_window_size=3, image=image(), true_cfg_scale=4.0,
            pooled_prompt_embeds=text(3)[:, 0], negative_pooled_prompt_embeds=text(4)[:, 0],
            **prompts(masks=True),
        ),
    ),
    "hunyuan_video_1_5": TinyPipeline(
        "HunyuanVideo15Pipeline",
        lambda: dict(
            transformer=model("hunyuan_video_1_5"), scheduler=flow(),
            vae=Codec(space=16),
            guider=diffusers.ClassifierFreeGuidance(guidance_scale=4.0),
        ),
        lambda steps: VIDEO | dict(
            prompt_embeds=text(1), prompt_embeds_mask=torch.ones(1, 6), prompt_embeds_2=text(3, 3),
            prompt_embeds_mask_2=torch.ones(1, 3), negative_prompt_embeds=text(2),
            negative_prompt_embeds_mask=torch.ones(1, 6), negative_prompt_embeds_2=text(4, 3),
            negative_prompt_embeds_mask_2=torch.ones(1, 3),
        ),
    ),
    "ltx": TinyPipeline(
        "LTXPipeline",
        lambda: dict(transformer=model("ltx"), scheduler=flow(use_dynamic_shifting=True)),
        lambda steps: dict(height=128, width=128, num_frames=17, **prompts(masks=True)),
    ),
    "skyreels_v2": TinyPipeline(
        "SkyReelsV2Pipeline",
        lambda: dict(transformer=model("skyreels_v2"), scheduler=flow()),
        lambda steps: VIDEO | prompts(),
    ),
    "skyreels_v2_df": TinyPipeline(
        "SkyReelsV2DiffusionForcingPipeline",
        lambda: dict(transformer=model("skyreels_v2_df"), scheduler=unipc()),
        lambda steps: VIDEO | dict(prompt=None, **prompts()),
    ),
    "cosmos": TinyPipeline(
        "CosmosTextToWorldPipeline",
        lambda: dict(
            transformer=model("cosmos"), safety_checker=Harmless(),
            scheduler=diffusers.EDMEulerScheduler(
                sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras", final_sigmas_type="sigma_min"
            ),
        ),
        lambda steps: VIDEO | dict(num_frames=17, **prompts()),
    ),
    "cosmos_2": TinyPipeline(
        "Cosmos2VideoToWorldPipeline",
        lambda: dict(
            transformer=model("cosmos_2"), safety_checker=Harmless(), vae=Codec(),
            scheduler=flow(use_karras_sigmas=True),
        ),
        lambda steps: VIDEO | dict(image=image(), **prompts()),
    ),
    "cosmos_2_5": TinyPipeline(
        "Cosmos2_5_PredictBasePipeline",
        lambda: dict(
            transformer=model("cosmos_2_5"), safety_checker=Harmless(), vae=Codec(), scheduler=unipc()
        ),
        lambda steps: VIDEO | prompts(width=12),
        "0.37",
    ),
    "easyanimate": TinyPipeline(
        "EasyAnimatePipeline",
        lambda: dict(
            transformer=model("easyanimate"), scheduler=flow(), vae=Codec()
        ),
        lambda steps: VIDEO | prompts(masks=True),
    ),
    "sana_video": TinyPipeline(
        "SanaVideoPipeline",
        lambda: dict(transformer=model("sana_video"), scheduler=flow()),
        lambda steps: dict(
            height=64, width=64, frames=9, use_resolution_binning=False, negative_prompt=None, **prompts(masks=True)
        ),
    ),
    "kandinsky_5": TinyPipeline(
        "Kandinsky5T2VPipeline",
        lambda: dict(transformer=model("kandinsky_5"), scheduler=flow()),
        lambda steps: VIDEO | dict(
            prompt_embeds_qwen=text(1), prompt_embeds_clip=text(3)[:, 0], negative_prompt_embeds_qwen=text(2),
            negative_prompt_embeds_clip=text(4)[:, 0], prompt_cu_seqlens=torch.tensor([0, 6]),
            negative_prompt_cu_seqlens=torch.tensor([0, 6]),
        ),
    ),
    "kandinsky_6": TinyPipeline(
        "Kandinsky6TI2VAPipeline",
        lambda: dict(
            transformer=model("kandinsky_6"), scheduler=flow(),
            audio_vae=Part(config=Part(sample_rate=160), latent_hop_length=10),
            vocoder=Part(),
        ),
        lambda steps: VIDEO | dict(
            pooled_prompt_embeds=text(3)[:, 0], negative_pooled_prompt_embeds=text(4)[:, 0], **prompts()
        ),
        "0.42",
    ),
    "helios": TinyPipeline(
        "HeliosPipeline",
        lambda: dict(transformer=model("helios"), scheduler=diffusers.HeliosScheduler(stages=1), vae=Codec()),
        # Two chunks of 3 latent frames.
        lambda steps: VIDEO | dict(
            num_frames=18, num_latent_frames_per_chunk=3, history_sizes=[4, 2, 1], **prompts()
        ),
        "0.37",
    ),
    "motif_video": TinyPipeline(
        "MotifVideoPipeline",
        lambda: dict(
            transformer=model("motif_video", image_embed_dim=None), scheduler=flow(), vae=Codec(),
            guider=diffusers.ClassifierFreeGuidance(guidance_scale=4.0),
        ),
        lambda steps: VIDEO | prompts(masks=True),
        "0.39",
    ),
    "anyflow": TinyPipeline(
        "AnyFlowPipeline",
        lambda: dict(transformer=model("anyflow"), scheduler=diffusers.FlowMapEulerDiscreteScheduler()),
        lambda steps: VIDEO | dict(guidance_scale=4.0, **prompts()),
        "0.39",
    ),
    "anyflow_far": TinyPipeline(
        "AnyFlowFARPipeline",
        lambda: dict(
            transformer=model("anyflow_far"), scheduler=diffusers.FlowMapEulerDiscreteScheduler(), vae=Codec()
        ),
        # Two chunks: 1 latent frame, then 2.
        lambda steps: VIDEO | dict(guidance_scale=4.0, chunk_partition=[1, 2], **prompts()),
        "0.39",
    ),
    "flux": TinyPipeline(
        "FluxPipeline",
        lambda: dict(
            transformer=model("flux", in_channels=16, out_channels=16), scheduler=flow(use_dynamic_shifting=True)
        ),
        lambda steps: dict(
            height=64, width=64, true_cfg_scale=4.0, pooled_prompt_embeds=text(3)[:, 0],
            negative_pooled_prompt_embeds=text(4)[:, 0], **prompts(),
        ),
    ),
    "sd3": TinyPipeline(
        "StableDiffusion3Pipeline",
        lambda: dict(transformer=model("sd3"), scheduler=flow()),
        lambda steps: dict(
            height=64, width=64, pooled_prompt_embeds=text(3)[:, 0], negative_pooled_prompt_embeds=text(4)[:, 0],
            **prompts(),
        ),
    ),
    "qwenimage": TinyPipeline(
        "QwenImagePipeline",
        lambda: dict(
            transformer=model("qwenimage", in_channels=16, out_channels=4, patch_size=2),
            scheduler=flow(use_dynamic_shifting=True),
        ),
        lambda steps: dict(
            height=64, width=64, prompt_embeds_mask=torch.ones(1, 6).long(),
            negative_prompt_embeds_mask=torch.ones(1, 6).long(), **prompts(),
        ),
    ),
    "ltx_condition": TinyPipeline(
        "LTXConditionPipeline",
        lambda: dict(transformer=model("ltx"), scheduler=flow(), vae=Codec(time=8, space=32)),
        # An image in the middle of the video: its tokens go before the video's.
        lambda steps: dict(height=128, width=128, num_frames=17, image=image(), frame_index=8, **prompts(masks=True)),
    ),
    "sana_wm": TinyPipeline(
        "SanaWMPipeline",
        lambda: dict(
            transformer=model("sana_wm", chunk_plucker_channels=48), scheduler=flow(),
            vae=Codec(time=8, space=32),
        ),
        lambda steps: dict(
            image=film(1)[0], prompt=None, c2w=np.eye(4)[None].repeat(17, 0), intrinsics=[64.0, 64.0, 32.0, 32.0],
            height=128, width=128, num_frames=17, **prompts(masks=True),
        ),
        "0.42",
    ),
    "cosmos_3": TinyPipeline(
        "Cosmos3OmniPipeline",
        lambda: dict(
            transformer=model("cosmos_3"), scheduler=unipc(), vae=Codec(), text_tokenizer=Chat(),
            safety_checker=Harmless(),
        ),
        lambda steps: VIDEO | dict(prompt="a cat", negative_prompt="a dog", enable_safety_check=False),
        "0.39",
    ),
    "helios_pyramid": TinyPipeline(
        "HeliosPyramidPipeline",
        lambda: dict(transformer=model("helios"), scheduler=diffusers.HeliosScheduler(gamma=0.3), vae=Codec()),
        # One chunk of 3 latent frames, at latent sizes 2, 4 and 8.
        lambda steps: VIDEO | dict(
            num_frames=9, num_latent_frames_per_chunk=3, history_sizes=[4, 2, 1],
            pyramid_num_inference_steps_list=[steps] * 3, **prompts(),
        ),
        "0.37",
    ),
    "ltx2": TinyPipeline(
        "LTX2Pipeline",
        lambda: dict(
            transformer=model("ltx2", audio_in_channels=128, audio_out_channels=128),
            scheduler=flow(use_dynamic_shifting=True),
            connectors=Part(lambda embeds, mask, **_: (embeds, embeds, mask)),
            vae=Codec(time=8, space=32),
            audio_vae=Part(
                mel_compression_ratio=4, temporal_compression_ratio=4, latents_mean=torch.zeros(128),
                latents_std=torch.ones(128),
                config=Part(sample_rate=16000, mel_hop_length=160, mel_bins=64, latent_channels=8),
            ),
        ),
        # Three calls a step: text guidance in one batch, without some attention, without the other modality.
        lambda steps: dict(
            height=128, width=128, num_frames=17, **prompts(masks=True)
        ) | (dict(spatio_temporal_guidance_blocks=[1]) if Version(diffusers.__version__) >= Version("0.38") else {}),
        "0.37",
    ),
}  # fmt: skip
