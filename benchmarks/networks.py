"""Configurations of the networks that are measured with random weights, which cost the same as trained ones."""

from __future__ import annotations

from typing import Any

# The network of DPS's FFHQ checkpoint, in diffusers' form.
FFHQ = {
    "sample_size": 256,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "layers_per_block": 1,
    "down_block_types": ["ResnetDownsampleBlock2D"] * 4 + ["AttnDownBlock2D", "ResnetDownsampleBlock2D"],
    "up_block_types": ["ResnetUpsampleBlock2D", "AttnUpBlock2D"] + ["ResnetUpsampleBlock2D"] * 4,
    "attention_head_dim": 64,
    "norm_num_groups": 32,
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_eps": 1e-5,
}
SD15_UNET = {"sample_size": 64, "cross_attention_dim": 768}  # otherwise UNet2DConditionModel's defaults
SD15_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
# The same kinds of blocks, which a CPU runs in milliseconds.
TINY: dict[str, dict[str, Any]] = {
    "ffhq": FFHQ
    | {
        "sample_size": 16,
        "block_out_channels": [8, 16],
        "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    },
    "unet": {
        "sample_size": 8,
        "cross_attention_dim": 8,
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    },
    "vae": {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "sample_size": 16,
    },
}
