"""Tiny random-weight Stable Diffusion models, built with diffusers' and transformers' own classes.

`save_folder` writes a complete diffusers folder that the real loading code reads; `save_single_file` the
same weights in the original (LDM) layout.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (16, 16, 32),
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 8, 16),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 32,
}


def seeded(build, seed: int):
    """A module in eval mode whose weights depend on nothing but the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


def tiny_unet(seed: int = 0, **changes) -> UNet2DConditionModel:
    return seeded(lambda: UNet2DConditionModel(**{**UNET, **changes}), seed)


def tiny_vae(seed: int = 1, **changes) -> AutoencoderKL:
    return seeded(lambda: AutoencoderKL(**{**VAE, **changes}), seed)


def tiny_controlnet(seed: int = 2) -> ControlNetModel:
    def build():
        net = ControlNetModel.from_unet(
            tiny_unet(), conditioning_channels=3, conditioning_embedding_out_channels=(4, 8, 8)
        )
        for parameter in net.parameters():
            # Its output layers start at zero, which would make every test of it pass.
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
        return net

    return seeded(build, seed)


def clip_config(width: int, **changes) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=VOCABULARY["<|startoftext|>"],
        eos_token_id=VOCABULARY["<|endoftext|>"],
        pad_token_id=VOCABULARY["<|endoftext|>"],
        **changes,
    )


def tiny_text_encoder(seed: int = 3, width: int = 16) -> CLIPTextModel:
    return seeded(lambda: CLIPTextModel(clip_config(width, intermediate_size=32)), seed)


LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = {
    token: i for i, token in enumerate([*LETTERS, *(c + "</w>" for c in LETTERS), "<|startoftext|>", "<|endoftext|>"])
}


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer that knows letters and no merges, read from files as a real one is."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(VOCABULARY))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 12, "pad_token": "<|endoftext|>"})
    )
    return CLIPTokenizer.from_pretrained(folder)


def tiny_pipeline(folder: Path, unet: UNet2DConditionModel | None = None, **scheduler) -> StableDiffusionPipeline:
    """A text-to-image pipeline; `folder` receives the tokenizer's files."""
    return StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(),
        tokenizer=tiny_tokenizer(folder),
        unet=unet or tiny_unet(),
        scheduler=DDIMScheduler(**{**SCHEDULER, **scheduler}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_folder(folder: Path, **scheduler) -> Path:
    """A diffusers folder as `StableDiffusion.load` expects it."""
    tiny_pipeline(folder / "tokenizer-source", **scheduler).save_pretrained(folder)
    return folder


def save_single_file(path: Path, folder: Path, **more) -> Path:
    """The model in `folder` as one file under the names of the original code."""
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    state = {f"model.diffusion_model.{k}": v for k, v in ldm_unet(pipe.unet).items()}
    state |= {f"first_stage_model.{k}": v for k, v in ldm_vae(pipe.vae).items()}
    for k, v in pipe.text_encoder.state_dict().items():
        state["cond_stage_model.transformer." + (k if k.startswith("text_model.") else f"text_model.{k}")] = v
    state = {k: v.contiguous().clone() for k, v in state.items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, **more}, path)
    return path


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def ldm_unet(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    levels, per = len(unet.config.block_out_channels), unet.config.layers_per_block
    prefix = {
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    for i in range(levels):
        for j in range(per):
            n = 1 + i * (per + 1) + j
            prefix[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{n}.0"
            prefix[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{n}.1"
        prefix[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{(i + 1) * (per + 1)}.0.op"
        attention = hasattr(unet.up_blocks[i], "attentions")
        for j in range(per + 1):
            n = i * (per + 1) + j
            prefix[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{n}.0"
            prefix[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{n}.1"
        prefix[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{n}.{2 if attention else 1}"
    return {_renamed(k, prefix, RESNET): v for k, v in unet.state_dict().items()}


def ldm_vae(vae: AutoencoderKL) -> dict[str, torch.Tensor]:
    levels = len(vae.config.block_out_channels)
    prefix = {}
    for side in ("encoder", "decoder"):
        prefix |= {
            f"{side}.conv_norm_out": f"{side}.norm_out",
            f"{side}.mid_block.resnets.0": f"{side}.mid.block_1",
            f"{side}.mid_block.resnets.1": f"{side}.mid.block_2",
            f"{side}.mid_block.attentions.0": f"{side}.mid.attn_1",
        }
    for i in range(levels):
        for j in range(vae.config.layers_per_block + 1):
            prefix[f"encoder.down_blocks.{i}.resnets.{j}"] = f"encoder.down.{i}.block.{j}"
            prefix[f"decoder.up_blocks.{i}.resnets.{j}"] = f"decoder.up.{levels - 1 - i}.block.{j}"
        prefix[f"encoder.down_blocks.{i}.downsamplers.0"] = f"encoder.down.{i}.downsample"
        prefix[f"decoder.up_blocks.{i}.upsamplers.0"] = f"decoder.up.{levels - 1 - i}.upsample"
    state = {_renamed(k, prefix, {"conv_shortcut": "nin_shortcut"}): v for k, v in vae.state_dict().items()}
    names = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    out = {}
    for k, v in state.items():
        match = re.match(r"(.*mid\.attn_1)\.(.*)\.(weight|bias)$", k)
        if match:
            k = f"{match[1]}.{names[match[2]]}.{match[3]}"
            v = v[..., None, None] if v.ndim == 2 else v  # 1x1 convolutions there, linear layers here
        out[k] = v
    return out


def _renamed(key: str, prefix: dict[str, str], resnet: dict[str, str]) -> str:
    for old in sorted(prefix, key=len, reverse=True):
        if key.startswith(old + "."):
            rest = key[len(old) + 1 :]
            part = rest.split(".", 1)[0]
            if ".resnets." in old and part in resnet:
                rest = rest.replace(part, resnet[part], 1)
            return f"{prefix[old]}.{rest}"
    return key
