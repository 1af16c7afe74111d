"""Tiny random-weight SD3, FLUX and DiT models, built with diffusers' and transformers' own classes."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)
from tiny_sd import clip_config, seeded, tiny_text_encoder, tiny_tokenizer, tiny_unet, tiny_vae
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

WIDTH, HEADS, TEXT, POOLED = 32, 4, 32, 24
SHIFTED = {"shift": 3.0}
DYNAMIC = {"use_dynamic_shifting": True}


def lively(build, seed: int):
    """A model whose layers that start at zero do not, so that nothing passes for want of an effect."""

    def made():
        model = build()
        for parameter in model.parameters():
            if parameter.ndim > 1 or not parameter.any():
                torch.nn.init.normal_(parameter, std=0.15)
        return model

    return seeded(made, seed)


def tiny_sd3(dual: bool = False, **changes) -> SD3Transformer2DModel:
    """dual: as Stable Diffusion 3.5, a second attention in the first block, normalised queries and keys."""
    own = {"dual_attention_layers": (0,), "qk_norm": "rms_norm"} if dual else {}
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "num_layers": 2,
        "attention_head_dim": WIDTH // HEADS,
        "num_attention_heads": HEADS,
        "joint_attention_dim": TEXT,
        "caption_projection_dim": WIDTH,
        "pooled_projection_dim": POOLED,
        "out_channels": 4,
        "pos_embed_max_size": 12,
    }
    return lively(lambda: SD3Transformer2DModel(**{**config, **own, **changes}), 10)


def tiny_flux(guidance: bool = False, **changes) -> FluxTransformer2DModel:
    config = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": HEADS,
        "joint_attention_dim": TEXT,
        "pooled_projection_dim": POOLED,
        "guidance_embeds": guidance,
        "axes_dims_rope": (2, 2, 4),
    }
    return lively(lambda: FluxTransformer2DModel(**{**config, **changes}), 11)


def tiny_dit(**changes) -> DiTTransformer2DModel:
    config = {
        "num_attention_heads": HEADS,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "sample_size": 8,
        "num_embeds_ada_norm": 10,
    }
    return lively(lambda: DiTTransformer2DModel(**{**config, **changes}), 12)


def tiny_tae(**changes) -> AutoencoderTiny:
    """A tiny autoencoder with the downscaling (4) of tiny_sd.tiny_vae."""
    config = {
        "encoder_block_out_channels": (8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8),
        "num_encoder_blocks": (1, 1, 1),
        "num_decoder_blocks": (1, 1, 1),
        "latent_channels": 4,
    }
    return lively(lambda: AutoencoderTiny(**{**config, **changes}), 13)


def shifted_vae():
    return tiny_vae(scaling_factor=1.5, shift_factor=0.06)


def clip(width: int, seed: int, projection: bool):
    config = clip_config(width, intermediate_size=24, projection_dim=width)
    return seeded(lambda: (CLIPTextModelWithProjection if projection else CLIPTextModel)(config), seed)


def t5():
    config = T5Config(
        vocab_size=32, d_model=TEXT, d_kv=8, d_ff=24, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return seeded(lambda: T5EncoderModel(config), 20)


def t5_tokenizer() -> T5TokenizerFast:
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((letter, -1.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"),
    ]
    made = Tokenizer(models.Unigram(pieces, unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(
        tokenizer_object=made, model_max_length=16, extra_ids=0, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def sd3_pipeline(folder: Path, dual: bool = False, with_t5: bool = True, **parts) -> StableDiffusion3Pipeline:
    tokenizer = tiny_tokenizer(folder)
    made = {
        "transformer": tiny_sd3(dual),
        "vae": shifted_vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(**SHIFTED),
        "text_encoder": clip(16, 21, True),
        "tokenizer": tokenizer,
        "text_encoder_2": clip(8, 22, True),
        "tokenizer_2": tokenizer,
        "text_encoder_3": t5() if with_t5 else None,
        "tokenizer_3": t5_tokenizer() if with_t5 else None,
    }
    return StableDiffusion3Pipeline(**{**made, **parts})


def flux_pipeline(folder: Path, guidance: bool = False, **parts) -> FluxPipeline:
    made = {
        "transformer": tiny_flux(guidance),
        "vae": shifted_vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(**DYNAMIC),
        "text_encoder": clip(POOLED, 23, False),
        "tokenizer": tiny_tokenizer(folder),
        "text_encoder_2": t5(),
        "tokenizer_2": t5_tokenizer(),
    }
    return FluxPipeline(**{**made, **parts})


def dit_pipeline() -> DiTPipeline:
    scheduler = DDIMScheduler(beta_start=0.0001, beta_end=0.02, clip_sample=False)
    return DiTPipeline(tiny_dit(), tiny_vae(), scheduler)


SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def sdxl_pipeline(folder: Path, cls=StableDiffusionXLPipeline, **more):
    """A tiny SDXL: two transformer layers to a block, two text encoders, sizes as further conditions."""
    unet = tiny_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8,
        cross_attention_dim=16 + 8,
    )
    tokenizer = tiny_tokenizer(folder)
    return cls(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(),
        text_encoder_2=clip(8, 22, True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**SDXL),
        add_watermarker=False,
        **more,
    )


def save_folder(kind: str, folder: Path, **options) -> Path:
    """A diffusers folder of "sd3", "flux" or "dit" as the loaders expect it."""
    made = {"sd3": sd3_pipeline, "flux": flux_pipeline, "dit": lambda _: dit_pipeline()}[kind]
    made(folder / "tokenizer-source", **options).save_pretrained(folder)
    return folder
