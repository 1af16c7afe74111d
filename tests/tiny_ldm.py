"""Tiny random-weight latent diffusion: folders of diffusers' own LDMPipeline and files in the CompVis layout.

`ldm_autoencoder` makes the tensors of a first stage from the description of the network alone (Rombach et al. 2022,
Esser et al. 2021), `interpret_encoder` and `interpret_decoder` compute with them: neither knows diffusers.
"""

from __future__ import annotations

import sys
import types
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, LDMPipeline, UNet2DModel, VQModel
from tiny_sd import seeded

SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195, "clip_sample": False}
BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 8, 16),
    "norm_num_groups": 4,
}
AUTOENCODERS = {
    "VQModel": lambda: VQModel(**BLOCKS, latent_channels=3, num_vq_embeddings=32, vq_embed_dim=3, scaling_factor=1.0),
    "AutoencoderKL": lambda: AutoencoderKL(**BLOCKS, latent_channels=3, scaling_factor=0.4),
    "AutoencoderTiny": lambda: AutoencoderTiny(
        latent_channels=3,
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    ),
}


def tiny_unet(**changes) -> UNet2DModel:
    config = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
    }
    return seeded(lambda: UNet2DModel(**{**config, **changes}), 0)


def tiny_autoencoder(kind: str):
    vae = seeded(AUTOENCODERS[kind], 1)
    if kind == "VQModel":  # its own start is so narrow that every latent would have the same nearest entry
        vae.quantize.embedding.weight.data = torch.randn(32, 3, generator=torch.Generator().manual_seed(2))
    return vae


def save_ldm(folder: Path, kind: str = "VQModel", unet: dict | None = None, **scheduler) -> Path:
    """A folder of diffusers' LDMPipeline."""
    pipe = LDMPipeline(tiny_autoencoder(kind), tiny_unet(**(unet or {})), DDIMScheduler(**{**SCHEDULER, **scheduler}))
    pipe.save_pretrained(folder)
    return folder


def ldm_autoencoder(ch=32, mult=(1, 2), depth=2, z=3, codes: int | None = 16, attended=(False, True)) -> dict:
    """The tensors of LDM's first stage; codes: entries of the codebook, None for a KL autoencoder."""
    state, g = {}, torch.Generator().manual_seed(3)

    def conv(name, i, o, k):
        state[f"{name}.weight"] = torch.randn(o, i, k, k, generator=g) * (i * k * k) ** -0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(o, generator=g)

    def norm(name, c):
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(c, generator=g)
        state[f"{name}.bias"] = 0.1 * torch.randn(c, generator=g)

    def block(name, i, o):
        (
            norm(f"{name}.norm1", i),
            conv(f"{name}.conv1", i, o, 3),
            norm(f"{name}.norm2", o),
            conv(f"{name}.conv2", o, o, 3),
        )
        if i != o:
            conv(f"{name}.nin_shortcut", i, o, 1)

    def attention(name, c):
        norm(f"{name}.norm", c)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", c, c, 1)

    def middle(side, c):
        block(f"{side}.mid.block_1", c, c), attention(f"{side}.mid.attn_1", c), block(f"{side}.mid.block_2", c, c)

    widths, top = [ch * m for m in mult], len(mult) - 1
    conv("encoder.conv_in", 3, ch, 3)
    c = ch
    for i, width in enumerate(widths):
        for j in range(depth):
            block(f"encoder.down.{i}.block.{j}", c, width)
            c = width
            if attended[i]:
                attention(f"encoder.down.{i}.attn.{j}", c)
        if i < top:
            conv(f"encoder.down.{i}.downsample.conv", c, c, 3)
    middle("encoder", c)
    double = 1 if codes else 2
    norm("encoder.norm_out", c), conv("encoder.conv_out", c, double * z, 3)
    conv("decoder.conv_in", z, c, 3)
    middle("decoder", c)
    for i in reversed(range(len(mult))):
        for j in range(depth + 1):
            block(f"decoder.up.{i}.block.{j}", c, widths[i])
            c = widths[i]
            if attended[i]:
                attention(f"decoder.up.{i}.attn.{j}", c)
        if i > 0:
            conv(f"decoder.up.{i}.upsample.conv", c, c, 3)
    norm("decoder.norm_out", c), conv("decoder.conv_out", c, 3, 3)
    conv("quant_conv", double * z, double * z, 1), conv("post_quant_conv", z, z, 1)
    if codes:
        state["quantize.embedding.weight"] = torch.randn(codes, z, generator=g)
    return state


def _affine(s, name, h, padding=None):
    weight, bias = s[f"{name}.weight"], s[f"{name}.bias"]
    if weight.ndim == 1:
        return F.group_norm(h, 32, weight, bias, 1e-6)
    return F.conv2d(h, weight, bias, padding=weight.shape[-1] // 2 if padding is None else padding)


def _block(s, name, x):
    h = _affine(s, f"{name}.conv1", F.silu(_affine(s, f"{name}.norm1", x)))
    h = _affine(s, f"{name}.conv2", F.silu(_affine(s, f"{name}.norm2", h)))
    return h + (_affine(s, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in s else x)


def _attention(s, name, x):
    if f"{name}.q.weight" not in s:
        return x
    h = _affine(s, f"{name}.norm", x)
    q, k, v = (_affine(s, f"{name}.{part}", h).flatten(2) for part in "qkv")
    a = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(-1)
    return x + _affine(s, f"{name}.proj_out", (v @ a.transpose(1, 2)).view_as(x))


def _middle(s, side, h):
    h = _attention(s, f"{side}.mid.attn_1", _block(s, f"{side}.mid.block_1", h))
    return _block(s, f"{side}.mid.block_2", h)


def interpret_encoder(s, x, levels=2, depth=2):
    """What quant_conv gives: the latent, or the posterior's mean and log-variance."""
    h = _affine(s, "encoder.conv_in", x)
    for i in range(levels):
        for j in range(depth):
            h = _attention(s, f"encoder.down.{i}.attn.{j}", _block(s, f"encoder.down.{i}.block.{j}", h))
        if i < levels - 1:
            h = F.conv2d(
                F.pad(h, (0, 1, 0, 1)), s[f"encoder.down.{i}.downsample.conv.weight"],
                s[f"encoder.down.{i}.downsample.conv.bias"], stride=2,
            )  # fmt: skip
    h = F.silu(_affine(s, "encoder.norm_out", _middle(s, "encoder", h)))
    return _affine(s, "quant_conv", _affine(s, "encoder.conv_out", h))


def interpret_decoder(s, z, levels=2, depth=2):
    """The image; the latent is quantised first where there is a codebook."""
    if "quantize.embedding.weight" in s:
        codes = s["quantize.embedding.weight"]
        nearest = (z[:, None] - codes[None, :, :, None, None]).square().sum(2).argmin(1)
        z = codes[nearest].permute(0, 3, 1, 2)
    h = _middle(s, "decoder", _affine(s, "decoder.conv_in", _affine(s, "post_quant_conv", z)))
    for i in reversed(range(levels)):
        for j in range(depth + 1):
            h = _attention(s, f"decoder.up.{i}.attn.{j}", _block(s, f"decoder.up.{i}.block.{j}", h))
        if i > 0:
            h = _affine(s, f"decoder.up.{i}.upsample.conv", F.interpolate(h, scale_factor=2.0, mode="nearest"))
    return _affine(s, "decoder.conv_out", F.silu(_affine(s, "decoder.norm_out", h)))


@contextmanager
def trainers_callbacks(monkeypatch):
    """Within the block there is the training library's class that published checkpoints name; yields what they hold."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        for parent in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            patch.setitem(sys.modules, parent, types.ModuleType(parent))
        yield {module.ModelCheckpoint: {"best_model_score": 0.1}}
