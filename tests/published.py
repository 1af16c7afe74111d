"""Tiny text-to-image models of random weights in the layout of the published folders: the same files, an index that
names every component, safety checker and feature extractor included, weights in shards, and `variant` files."""

from __future__ import annotations

import json
from pathlib import Path

import tiny_flow
import tiny_sd
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

CHECKER = {
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
}
NO_EXTRAS = {"image_encoder": [None, None], "feature_extractor": [None, None]}
# What each published model_index.json has beside the parts that a pipeline samples with.
EXTRA = {
    "sd-1.5": {**CHECKER, "requires_safety_checker": True},
    "sdxl": {"force_zeros_for_empty_prompt": True, **NO_EXTRAS},
    "sd3": NO_EXTRAS,
    "sd3.5": NO_EXTRAS,
    "flux-dev": NO_EXTRAS,
    "flux-schnell": {},
}
KINDS = tuple(EXTRA)
SHARDED = {"flux-dev": ("transformer", "text_encoder_2"), "flux-schnell": ("transformer", "text_encoder_2"),
           "sd3": ("text_encoder_3",), "sd3.5": ("text_encoder_3",)}  # fmt: skip
SIZES = {"sd3": 32, "sd3.5": 32, "flux-dev": 32, "flux-schnell": 32}  # pixels; others have their U-Net's


def sdxl_pipeline(folder: Path) -> StableDiffusionXLPipeline:
    tokenizer = tiny_sd.tiny_tokenizer(folder)
    unet = tiny_sd.tiny_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=16 + 8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 8,
    )
    return StableDiffusionXLPipeline(
        vae=tiny_sd.tiny_vae(),
        text_encoder=tiny_flow.clip(16, 31, False),
        text_encoder_2=tiny_flow.clip(8, 32, True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler.from_config(tiny_sd.SCHEDULER),
        add_watermarker=False,
    )


def pipeline(kind: str, folder: Path):
    """The pipeline in memory; `folder` receives the tokenizer's files."""
    build = {
        "sd-1.5": tiny_sd.tiny_pipeline,
        "sdxl": sdxl_pipeline,
        "sd3": tiny_flow.sd3_pipeline,
        "sd3.5": lambda where: tiny_flow.sd3_pipeline(where, dual=True),
        "flux-dev": lambda where: tiny_flow.flux_pipeline(where, guidance=True),
        "flux-schnell": tiny_flow.flux_pipeline,
    }
    return build[kind](folder)


def save(kind: str, folder: Path, variant: str | None = None) -> Path:
    """Write the folder. What the index names and no sampler needs is not there, as after a pull of the zoo's files."""
    pipe = pipeline(kind, folder.with_name(folder.name + "-tokenizer"))
    for name, part in pipe.components.items():
        if part is None:
            continue
        options = {} if variant is None or "tokenizer" in name or name == "scheduler" else {"variant": variant}
        if name in SHARDED.get(kind, ()):
            options["max_shard_size"] = "20KB"
        part.save_pretrained(folder / name, **options)
        shards = list((folder / name).glob("*-of-*.safetensors"))
        assert bool(shards) == (name in SHARDED.get(kind, ())), (name, shards)
    index = {name: value for name, value in pipe.config.items() if name not in ("_name_or_path", "add_watermarker")}
    text = json.dumps({"_class_name": type(pipe).__name__, "_diffusers_version": "0.6.0", **index, **EXTRA[kind]})
    (folder / "model_index.json").write_text(text)
    return folder
