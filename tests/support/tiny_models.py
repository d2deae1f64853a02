"""Every video transformer of diffusers, and three image ones, tiny and untrained, with inputs for a forward.

    tiny = MODELS["wan"]
    model = tiny.model()
    for timestep in (900.0, 800.0):
        video = sample(model(**tiny.inputs(seed=0, timestep=timestep)))

Inputs of one seed differ only in their timestep. Weights that a model starts at zero are drawn at random, for
otherwise its blocks, or its output, would do nothing. No network.

A video has 3 latent frames after patching; a few, whose classes ask for it, have 2 or 4. Those that write a KV cache
have a second entry, `..._writes`, with the inputs of the forward that does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from packaging.version import Version
from torch import Tensor, nn

Noise = Callable[..., Tensor]  # normal, of a shape
Full = Callable[..., Tensor]  # the timestep, in a shape


@dataclass(frozen=True)
class Tiny:
    """A model's class and arguments, and the arguments of its forward.

    Args:
        kind: name of the class in diffusers.
        config: arguments of the class; at least 3 blocks a list.
        arguments: from noise(*shape), drawn in the order of the calls, and t(*shape), the timestep everywhere.
        since: first release of diffusers that takes them.
        prepare: what else a new model needs.
    """

    kind: str
    config: Mapping[str, Any]
    arguments: Callable[[Noise, Full], dict[str, Any]]
    since: str = "0.36"
    prepare: Callable[[nn.Module], None] | None = None

    @property
    def available(self) -> bool:
        return Version(diffusers.__version__) >= Version(self.since)

    def model(self, seed: int = 0) -> nn.Module:
        model = build(self.kind, self.config, seed)
        if self.prepare is not None:
            self.prepare(model)
        return model

    def inputs(self, seed: int = 0, timestep: float = 500.0) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        return self.arguments(
            lambda *shape: torch.randn(shape, generator=generator),
            lambda *shape: torch.full(shape, float(timestep)),
        )


def build(kind: str, config: Mapping[str, Any], seed: int = 0) -> nn.Module:
    """A model of that class in evaluation mode, without a weight that is all zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(diffusers, kind)(**config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.2)
    return model


def sample(output) -> Tensor:
    """The video, or image, of what a model or a pipeline returns."""
    while not isinstance(output, Tensor):
        # Framepack lists the video as it was after each section.
        output = output[-1] if isinstance(output, list) else output[0]
    return output


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


def angles(phase: Tensor) -> tuple[Tensor, Tensor]:
    """A rotary embedding."""
    return phase.cos(), phase.sin()


HEADS = dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=3)
CROSS = HEADS | dict(text_dim=8, freq_dim=16, ffn_dim=32)
WAN = CROSS | dict(rope_max_seq_len=32)
JOINT = HEADS | dict(
    attention_head_dim=10, num_single_layers=3, patch_size=2, text_embed_dim=8, rope_axes_dim=(2, 4, 4)
)
HUNYUAN = JOINT | dict(num_refiner_layers=1, pooled_projection_dim=8)
COGVIDEOX = HEADS | dict(
    attention_head_dim=8, time_embed_dim=8, text_embed_dim=8, sample_width=8, sample_height=8, sample_frames=9,
    max_text_seq_length=6,
)  # fmt: skip
COSMOS = HEADS | dict(text_embed_dim=8, adaln_lora_dim=4, max_size=(4, 8, 8), concat_padding_mask=False)
LTX2 = HEADS | dict(
    attention_head_dim=8, cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4,
    audio_num_attention_heads=2, audio_attention_head_dim=4, audio_cross_attention_dim=8, caption_channels=8,
)  # fmt: skip
ANIMATE2 = dict(text_len=6, in_dim=8, dim=32, ffn_dim=32, freq_dim=16, text_dim=8, out_dim=4, num_heads=2, num_layers=3)


def hunyuan_text(noise: Noise, t: Full) -> dict[str, Any]:
    return dict(
        timestep=t(2), encoder_hidden_states=noise(2, 6, 8), encoder_attention_mask=ones(2, 6),
        pooled_projections=noise(2, 8), guidance=ones(2) * 6000,
    )  # fmt: skip


def ltx2_inputs(noise: Noise, t: Full) -> dict[str, Any]:
    return dict(
        hidden_states=noise(2, 48, 4), audio_hidden_states=noise(2, 5, 4), encoder_hidden_states=noise(2, 6, 8),
        audio_encoder_hidden_states=noise(2, 6, 8), timestep=t(2), sigma=t(2), encoder_attention_mask=ones(2, 6),
        audio_encoder_attention_mask=ones(2, 6), num_frames=3, height=4, width=4, audio_num_frames=5,
    )  # fmt: skip


def far_inputs(noise: Noise, t: Full, writes: bool) -> dict[str, Any]:
    """The second of two chunks of 2 frames: denoised after the cached first, or written to the cache with it."""
    frames = 4 if writes else 2
    cache = [dict(compressed_cache=noise(2, 1, 2, 16, 12), full_cache=noise(2, 1, 2, 64, 12)) for _ in range(3)]
    return dict(
        hidden_states=noise(1, frames, 4, 8, 8), timestep=t(1, frames), r_timestep=t(1, frames) - 50,
        encoder_hidden_states=noise(1, 6, 8), chunk_partition=[2, 2], kv_cache=cache,
        kv_cache_flag=dict(is_cache_step=writes, num_cached_chunks=1),
    )  # fmt: skip


def animate2_inputs(noise: Noise, t: Full, mode: str) -> dict[str, Any]:
    """A segment of 2 latent frames after a reference of 1: the reference's pass, or a denoising step after it."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    grid, frames = torch.tensor([[1, 4, 4]]), 1 if mode == "extract" else 2
    cache = WanAnimate2KVCache(3)
    for layer in cache.layer_caches:
        layer.store(noise(1, 16, 2, 16), noise(1, 16, 2, 16))
    return dict(
        hidden_states=[noise(4, frames, 8, 8)], timestep=t(1), encoder_hidden_states=[noise(6, 8)],
        condition_latents=[noise(4, frames, 8, 8)], kv_cache=cache, kv_cache_mode=mode, seq_len=16 * frames,
        offset_grid_sizes=grid, reference_grid_sizes=grid, origin_len=1, origin_area=[64, 64],
        encoder_hidden_states_image=noise(1, 5, 1280),
    )  # fmt: skip


def uncompiled_mask(model: nn.Module) -> None:
    """The attention's mask for `animate2_inputs`, which the model would compile for half a minute."""
    with torch.compiler.set_stance("force_eager"):
        model.block_masks[1, 16] = model.create_mask(1, 16, "cpu")


def refiner_inputs(noise: Noise, t: Full) -> dict[str, Any]:
    from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache

    cache = SanaWMRefinerKVCache(3)
    for layer in cache.layer_caches:
        layer.store_history(noise(1, 16, 16), noise(1, 16, 16))
    return dict(
        hidden_states=noise(1, 48, 4), encoder_hidden_states=noise(1, 6, 8), timestep=t(1, 48),
        video_rotary_emb=angles(noise(1, 48, 16)), kv_cache=cache, kv_cache_mode="inject",
    )  # fmt: skip


MODELS = {
    "latte": Tiny(
        "LatteTransformer3DModel",
        HEADS | dict(
            sample_size=8, patch_size=2, caption_channels=8, cross_attention_dim=24, attention_bias=True,
            activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
            norm_elementwise_affine=False, norm_eps=1e-6, video_length=3,
        ),
        lambda noise, t: dict(
            hidden_states=noise(2, 4, 3, 8, 8), encoder_hidden_states=noise(2, 5, 8), timestep=t(2)
        ),
    ),
    "cogvideox": Tiny(
        "CogVideoXTransformer3DModel",
        COGVIDEOX,
        lambda noise, t: dict(
            hidden_states=noise(2, 3, 4, 8, 8), encoder_hidden_states=noise(2, 6, 8), timestep=t(2)
        ),
    ),
    "cogvideox_1_5": Tiny(
        "CogVideoXTransformer3DModel",
        COGVIDEOX | dict(
            attention_head_dim=16, patch_size_t=2, use_rotary_positional_embeddings=True, ofs_embed_dim=8,
            patch_bias=False,
        ),
        lambda noise, t: dict(
            hidden_states=noise(2, 4, 4, 8, 8), encoder_hidden_states=noise(2, 6, 8), timestep=t(2), ofs=ones(1) * 2,
            image_rotary_emb=angles(noise(32, 16)),
        ),
    ),
    "consisid": Tiny(
        "ConsisIDTransformer3DModel",
        COGVIDEOX | dict(
            is_train_face=True, cross_attn_interval=2, cross_attn_dim_head=4, cross_attn_num_heads=2, LFE_id_dim=4,
            LFE_vit_dim=4, LFE_depth=2, LFE_dim_head=4, LFE_num_heads=2, LFE_num_id_token=2, LFE_num_querie=2,
            LFE_output_dim=10, LFE_ff_mult=1, LFE_num_scale=2, num_layers=4,
        ),
        lambda noise, t: dict(
            hidden_states=noise(2, 3, 4, 8, 8), encoder_hidden_states=noise(2, 6, 8), timestep=t(2),
            id_cond=noise(2, 4), id_vit_hidden=[noise(2, 3, 4), noise(2, 3, 4)],
        ),
    ),
    "allegro": Tiny(
        "AllegroTransformer3DModel",
        HEADS | dict(cross_attention_dim=24, sample_width=8, sample_height=8, sample_frames=3, caption_channels=8),
        lambda noise, t: dict(
            hidden_states=noise(2, 4, 3, 8, 8), encoder_hidden_states=noise(2, 6, 8), timestep=t(2),
            encoder_attention_mask=ones(2, 6),
        ),
    ),
    "mochi": Tiny(
        "MochiTransformer3DModel",
        HEADS | dict(
            patch_size=2, attention_head_dim=8, pooled_projection_dim=16, text_embed_dim=16, time_embed_dim=4
        ),
        lambda noise, t: dict(
            hidden_states=noise(2, 4, 3, 8, 8), encoder_hidden_states=noise(2, 6, 16), timestep=t(2),
            encoder_attention_mask=ones(2, 6).bool(),
        ),
    ),
    "hunyuan_video": Tiny(
        "HunyuanVideoTransformer3DModel",
        HUNYUAN,
        lambda noise, t: dict(hidden_states=noise(2, 4, 3, 8, 8), **hunyuan_text(noise, t)),
    ),
    "hunyuan_video_i2v": Tiny(
        "HunyuanVideoTransformer3DModel",
        HUNYUAN | dict(image_condition_type="token_replace"),
        lambda noise, t: dict(hidden_states=noise(2, 4, 3, 8, 8), **hunyuan_text(noise, t)),
    ),
    "framepack": Tiny(
        "HunyuanVideoFramepackTransformer3DModel",
        HUNYUAN | dict(has_image_proj=True, image_proj_dim=8, has_clean_x_embedder=True),
        lambda noise, t: dict(
            hidden_states=noise(2, 4, 3, 8, 8), image_embeds=noise(2, 5, 8), indices_latents=torch.arange(7, 10),
            latents_clean=noise(2, 4, 1, 8, 8), indices_latents_clean=torch.arange(6, 7),
            latents_history_2x=noise(2, 4, 2, 8, 8), indices_latents_history_2x=torch.arange(4, 6),
            latents_history_4x=noise(2, 4, 4, 8, 8), indices_latents_history_4x=torch.arange(4),
            **hunyuan_text(noise, t),
        ),
    ),
    "hunyuan_video_1_5": Tiny(
        "HunyuanVideo15Transformer3DModel",
        HEADS | dict(
            attention_head_dim=10, in_channels=9, num_refiner_layers=1, text_embed_dim=8, text_embed_2_dim=8,
            image_embed_dim=8, rope_axes_dim=(2, 4, 4),
        ),
        lambda noise, t: dict(
            hidden_states=noise(2, 9, 3, 4, 4), timestep=t(2), encoder_hidden_states=noise(2, 6, 8),
            encoder_attention_mask=ones(2, 6), encoder_hidden_states_2=noise(2, 3, 8),
            encoder_attention_mask_2=ones(2, 3), image_embeds=torch.zeros(2, 5, 8),
        ),
    ),
    "ltx": Tiny(
        "LTXVideoTransformer3DModel",
        HEADS | dict(attention_head_dim=8, cross_attention_dim=16, caption_channels=8),
        lambda noise, t: dict(
            hidden_states=noise(2, 48, 4), encoder_hidden_states=noise(2, 6, 8), timestep=t(2),
            encoder_attention_mask=ones(2, 6), num_frames=3, height=4, width=4,
        ),
    ),
    "ltx2": Tiny("LTX2VideoTransformer3DModel", LTX2, ltx2_inputs, "0.37"),
    "ltx2_3": Tiny(
        "LTX2VideoTransformer3DModel",
        LTX2 | dict(
            gated_attn=True, cross_attn_mod=True, audio_gated_attn=True, audio_cross_attn_mod=True, rope_type="split",
            use_prompt_embeddings=False, perturbed_attn=True, caption_channels=16,
        ),
        lambda noise, t: ltx2_inputs(noise, t) | dict(
            encoder_hidden_states=noise(2, 6, 16), use_cross_timestep=True
        ),
        "0.38",
    ),
    "wan": Tiny(
        "WanTransformer3DModel",
        WAN,
        lambda noise, t: dict(
            hidden_states=noise(1, 4, 3, 8, 8), encoder_hidden_states=noise(1, 6, 8), timestep=t(1)
        ),
    ),
    "wan_i2v": Tiny(
        "WanTransformer3DModel",
        WAN | dict(in_channels=12, image_dim=8, added_kv_proj_dim=24),
        # The image tokens are told from the text by a text length of 512, fixed in the attention.
        lambda noise, t: dict(
            hidden_states=noise(1, 12, 3, 8, 8), encoder_hidden_states=noise(1, 512, 8), timestep=t(1),
            encoder_hidden_states_image=noise(1, 5, 8),
        ),
    ),
    "wan_2_2_ti2v": Tiny(
        "WanTransformer3DModel",
        WAN,
        lambda noise, t: dict(
            hidden_states=noise(1, 4, 3, 8, 8), encoder_hidden_states=noise(1, 6, 8), timestep=t(1, 48)
        ),
    ),
    "wan_vace": Tiny(
        "WanVACETransformer3DModel",
        WAN | dict(vace_layers=[0, 1, 2], vace_in_channels=6, num_layers=4),
        lambda noise, t: dict(
            hidden_states=noise(1, 4, 3, 8, 8), encoder_hidden_states=noise(1, 6, 8), timestep=t(1),
            control_hidden_states=noise(1, 6, 3, 8, 8), control_hidden_states_scale=ones(3),
        ),
    ),
    "wan_animate": Tiny(
        "WanAnimateTransformer3DModel",
        WAN | dict(
            in_channels=12, latent_channels=4, image_dim=8, added_kv_proj_dim=24, motion_encoder_size=8,
            motion_encoder_channel_sizes={"4": 4, "8": 4}, motion_style_dim=4, motion_dim=4, motion_encoder_dim=8,
            face_encoder_hidden_dim=8, face_encoder_num_heads=2, inject_face_latents_blocks=2, num_layers=4,
        ),
        lambda noise, t: dict(
            hidden_states=noise(1, 12, 4, 8, 8), encoder_hidden_states=noise(1, 512, 8), timestep=t(1),
            encoder_hidden_states_image=noise(1, 5, 8), pose_hidden_states=noise(1, 4, 3, 8, 8),
            face_pixel_values=noise(1, 3, 9, 8, 8),
        ),
    ),
    "chronoedit": Tiny(
        "ChronoEditTransformer3DModel",
        WAN | dict(in_channels=12, image_dim=8, added_kv_proj_dim=24),
        lambda noise, t: dict(
            hidden_states=noise(1, 12, 2, 8, 8), encoder_hidden_states=noise(1, 512, 8), timestep=t(1),
            encoder_hidden_states_image=noise(1, 5, 8),
        ),
    ),
    "skyreels_v2": Tiny(
        "SkyReelsV2Transformer3DModel",
        WAN,
        lambda noise, t: dict(
            hidden_states=noise(1, 4, 3, 8, 8), encoder_hidden_states=noise(1, 6, 8), timestep=t(1)
        ),
    ),
    "skyreels_v2_df": Tiny(
        "SkyReelsV2Transformer3DModel",
        WAN | dict(inject_sample_info=True),
        # The first frame is clean, as in a continued video.
        lambda noise, t: dict(
            hidden_states=noise(1, 4, 3, 8, 8), encoder_hidden_states=noise(1, 6, 8),
            timestep=t(1, 3) * torch.tensor([0.0, 1.0, 1.0]), enable_diffusion_forcing=True, fps=[1],
        ),
    ),
    "cosmos": Tiny(
        "CosmosTransformer3DModel",
        COSMOS,
        lambda noise, t: dict(
            hidden_states=noise(1, 4, 3, 8, 8), encoder_hidden_states=noise(1, 6, 8), timestep=t(1), fps=24
        ),
    ),
    "cosmos_2": Tiny(
        "CosmosTransformer3DModel",
        COSMOS | dict(extra_pos_embed_type=None, in_channels=5),
        lambda noise, t: dict(
            hidden_states=noise(1, 4, 3, 8, 8), encoder_hidden_states=noise(1, 6, 8), timestep=t(1, 1, 3, 1, 1),
            condition_mask=ones(1, 1, 3, 8, 8), fps=16,
        ),
    ),
    "cosmos_2_5": Tiny(
        "CosmosTransformer3DModel",
        COSMOS | dict(
            extra_pos_embed_type=None, in_channels=5, use_crossattn_projection=True, crossattn_proj_in_channels=12,
            encoder_hidden_states_channels=8,
        ),
        lambda noise, t: dict(
            hidden_states=noise(1, 4, 3, 8, 8), encoder_hidden_states=noise(1, 6, 12), timestep=t(1, 1, 3, 1, 1),
            condition_mask=ones(1, 1, 3, 8, 8), fps=16,
        ),
        "0.37",
    ),
    "cosmos_3": Tiny(
        "Cosmos3OmniTransformer",
        dict(
            head_dim=12, hidden_size=24, intermediate_size=32, latent_channel=4, num_attention_heads=2,
            num_hidden_layers=3, num_key_value_heads=1, patch_latent_dim=16, vocab_size=20, rope_axes_dim=[2, 2, 2],
        ),
        # 5 text tokens, then 3 frames of 4 x 4; the first frame is given.
        lambda noise, t: dict(
            input_ids=torch.arange(5), text_indexes=torch.arange(5), position_ids=torch.arange(53).expand(3, 53),
            und_len=5, sequence_length=53, vision_tokens=[noise(1, 4, 3, 8, 8)], vision_token_shapes=[(3, 4, 4)],
            vision_sequence_indexes=torch.arange(5, 53), vision_mse_loss_indexes=torch.arange(21, 53),
            vision_timesteps=t(32), vision_noisy_frame_indexes=[torch.tensor([1, 2])],
        ),
        "0.39",
    ),
    "easyanimate": Tiny(
        "EasyAnimateTransformer3DModel",
        HEADS | dict(
            attention_head_dim=16, patch_size=2, sample_width=8, sample_height=8, mmdit_layers=2, time_embed_dim=8,
            text_embed_dim=8,
        ),
        lambda noise, t: dict(
            hidden_states=noise(2, 4, 3, 8, 8), encoder_hidden_states=noise(2, 6, 8), timestep=t(2)
        ),
    ),
    "sana_video": Tiny(
        "SanaVideoTransformer3DModel",
        HEADS | dict(
            num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=8,
            sample_size=8, rope_max_seq_len=32,
        ),
        lambda noise, t: dict(
            hidden_states=noise(2, 4, 3, 8, 8), encoder_hidden_states=noise(2, 6, 8), timestep=t(2),
            encoder_attention_mask=ones(2, 6),
        ),
    ),
    "sana_wm": Tiny(
        "SanaWMTransformer3DModel",
        dict(
            in_channels=4, num_layers=4, hidden_size=32, num_attention_heads=2, linear_head_dim=16,
            caption_channels=8, chunk_plucker_channels=6, softmax_every_n=3,
        ),
        lambda noise, t: dict(
            hidden_states=noise(2, 4, 3, 4, 4), timestep=t(2, 1, 3), encoder_hidden_states=noise(2, 1, 6, 8),
            mask=ones(2, 6), chunk_plucker=noise(2, 6, 3, 4, 4),
            camera_conditions=torch.cat(
                [torch.eye(4).flatten().expand(2, 3, 16), torch.tensor([4.0, 4.0, 2.0, 2.0]).expand(2, 3, 4)], -1
            ),
        ),
        "0.42",
    ),
    "sana_wm_refiner": Tiny("SanaWMLTX2RefinerTransformer3DModel", LTX2, refiner_inputs, "0.42"),
    "kandinsky_5": Tiny(
        "Kandinsky5Transformer3DModel",
        dict(
            in_visual_dim=4, in_text_dim=8, in_text_dim2=8, time_dim=8, out_visual_dim=4, model_dim=24, ff_dim=32,
            num_text_blocks=1, num_visual_blocks=3, axes_dims=(4, 4, 4), visual_cond=True,
        ),
        lambda noise, t: dict(
            hidden_states=noise(1, 3, 8, 8, 9), encoder_hidden_states=noise(1, 6, 8), timestep=t(1),
            pooled_projections=noise(1, 8), visual_rope_pos=[torch.arange(3), torch.arange(4), torch.arange(4)],
            text_rope_pos=torch.arange(6),
        ),
    ),
    "kandinsky_6": Tiny(
        "Kandinsky6Transformer3DModel",
        dict(
            in_visual_dim=4, out_visual_dim=4, in_text_dim=8, in_text_dim2=8, time_dim=8, model_dim=24, ff_dim=32,
            num_text_blocks=1, num_visual_blocks=3, axes_dims=(4, 4, 4), in_audio_dim=4, out_audio_dim=4,
            model_dim_a=16, axes_dims_a=(4, 2, 2), cross_gates=True, fix_modulation=True,
        ),
        lambda noise, t: dict(
            hidden_states=noise(1, 3, 8, 8, 9), encoder_hidden_states=noise(1, 6, 8), timestep=t(1),
            pooled_projections=noise(1, 8), audio_hidden_states=noise(1, 5, 4),
        ),
        "0.42",
    ),
    "kandinsky_6_sr": Tiny(
        "Kandinsky6SRTransformer3DModel",
        dict(
            in_visual_dim=4, out_visual_dim=4, time_dim=8, model_dim=32, ff_dim=32, num_visual_blocks=3,
            axes_dims=(4, 6, 6), nabla_window=(3, 3, 3),
        ),
        lambda noise, t: dict(hidden_states=noise(1, 2, 8, 8, 9), timestep=t(1)),
        "0.42",
    ),
    "helios": Tiny(
        "HeliosTransformer3DModel",
        CROSS | dict(rope_dim=(4, 4, 4)),
        lambda noise, t: dict(
            hidden_states=noise(1, 4, 3, 8, 8), timestep=t(1), encoder_hidden_states=noise(1, 6, 8),
            indices_hidden_states=torch.arange(7, 10)[None], indices_latents_history_short=torch.arange(6, 7)[None],
            indices_latents_history_mid=torch.arange(4, 6)[None], indices_latents_history_long=torch.arange(4)[None],
            latents_history_short=noise(1, 4, 1, 8, 8), latents_history_mid=noise(1, 4, 2, 8, 8),
            latents_history_long=noise(1, 4, 4, 8, 8),
        ),
        "0.37",
    ),
    "motif_video": Tiny(
        "MotifVideoTransformer3DModel",
        JOINT | dict(
            in_channels=9, num_decoder_layers=1, image_embed_dim=8, enable_text_cross_attention_dual=True,
            enable_text_cross_attention_single=True,
        ),
        lambda noise, t: dict(
            hidden_states=noise(1, 9, 3, 8, 8), timestep=t(1), encoder_hidden_states=noise(1, 6, 8),
            encoder_attention_mask=ones(1, 6), image_embeds=noise(1, 4, 8),
        ),
        "0.39",
    ),
    "anyflow": Tiny(
        "AnyFlowTransformer3DModel",
        WAN,
        lambda noise, t: dict(
            hidden_states=noise(2, 3, 4, 8, 8), timestep=t(2, 3), r_timestep=t(2, 3) - 50,
            encoder_hidden_states=noise(2, 6, 8),
        ),
        "0.39",
    ),
    "anyflow_far": Tiny(
        "AnyFlowFARTransformer3DModel", WAN, lambda noise, t: far_inputs(noise, t, writes=False), "0.39"
    ),
    "anyflow_far_writes": Tiny(
        "AnyFlowFARTransformer3DModel", WAN, lambda noise, t: far_inputs(noise, t, writes=True), "0.39"
    ),
    "wan_animate_2": Tiny(
        "WanAnimate2Transformer3DModel", ANIMATE2, lambda noise, t: animate2_inputs(noise, t, "cached"), "0.40",
        uncompiled_mask,
    ),
    "wan_animate_2_writes": Tiny(
        "WanAnimate2Transformer3DModel", ANIMATE2, lambda noise, t: animate2_inputs(noise, t, "extract"), "0.40"
    ),
    "minimax_h3": Tiny(
        "MiniMaxH3Transformer3DModel",
        dict(
            num_attention_heads=2, attention_head_dim=16, hidden_size=24, num_layers=3, num_refiner_layers=1,
            ffn_dim=32, in_channels=4, audio_in_channels=4, text_dim=8, freq_dim=16, time_embed_hidden_dim=16,
            time_embed_dim=8, rope_freq_dim=2,
        ),
        # 6 text rows, 5 audio rows, then 3 frames of 4 x 4.
        lambda noise, t: dict(
            hidden_states=noise(1, 48, 16), audio_hidden_states=noise(1, 5, 4), encoder_hidden_states=noise(1, 6, 8),
            timestep=torch.cat([torch.zeros(1), t(1) / 1000]),
            timestep_indices=torch.tensor([0] * 6 + [1] * 53), token_tags=torch.tensor([1] * 6 + [2] * 5 + [0] * 48),
            position_ids=torch.cat(
                [
                    torch.arange(11)[:, None].expand(11, 3),
                    11 + torch.cartesian_prod(*(torch.arange(n) for n in (3, 4, 4))),
                ]
            ),
            video_indices=torch.arange(11, 59), audio_indices=torch.arange(6, 11), text_indices=torch.arange(6),
        ),
        "0.40",
    ),
    "flux": Tiny(
        "FluxTransformer2DModel",
        HEADS | dict(
            num_single_layers=3, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 4),
            guidance_embeds=True,
        ),
        lambda noise, t: dict(
            hidden_states=noise(1, 16, 4), encoder_hidden_states=noise(1, 6, 8), pooled_projections=noise(1, 8),
            timestep=t(1) / 1000, img_ids=torch.cartesian_prod(*(torch.arange(n) for n in (1, 4, 4))).float(),
            txt_ids=torch.zeros(6, 3), guidance=ones(1) * 3.5,
        ),
    ),
    "sd3": Tiny(
        "SD3Transformer2DModel",
        HEADS | dict(
            sample_size=8, joint_attention_dim=8, caption_projection_dim=24, pooled_projection_dim=8,
            pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
        ),
        lambda noise, t: dict(
            hidden_states=noise(2, 4, 8, 8), encoder_hidden_states=noise(2, 6, 8), pooled_projections=noise(2, 8),
            timestep=t(2),
        ),
    ),
    "qwenimage": Tiny(
        "QwenImageTransformer2DModel",
        HEADS | dict(patch_size=1, joint_attention_dim=8, axes_dims_rope=(4, 4, 4)),
        lambda noise, t: dict(
            hidden_states=noise(1, 16, 4), encoder_hidden_states=noise(1, 6, 8),
            encoder_hidden_states_mask=ones(1, 6).long(), timestep=t(1) / 1000, img_shapes=[[(1, 4, 4)]],
        ),
        "0.37",
    ),
}  # fmt: skip
