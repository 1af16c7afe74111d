"""A tiny ADM with attention in two blocks, for tests of compiled passes."""

from __future__ import annotations

import torch
from diffusers import UNet2DModel

from restore.backbones.adm import ADM


def tiny_adm(dtype=None, **options):
    """options: keywords of UNet2DModel; with any of them, class 3 is the null class."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=16,
        out_channels=6,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
        **options,
    )
    return ADM(network, lean=False, dtype=dtype, null_class=3 if options else None)
