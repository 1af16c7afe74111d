"""Tiny configurations of every kind of training, with images and logs, for the tests of training."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from restore.paths import configs_dir
from restore.training import load_training_config

QUICK = [
    "batch=4", "precision=fp32", "log_every=1", "held_out_every_steps=8", "samples_every_steps=24",
    "checkpoint_every_steps=2", "optimizer.warmup_steps=2", "data.held_out_every=4",
]  # fmt: skip
TINY = {
    "autoencoder": [
        "data.stored_size=32", "model.sample_size=32", "model.latent_channels=4", "model.norm_num_groups=4",
        "model.block_out_channels=[8,16]", "model.down_block_types=[DownEncoderBlock2D,DownEncoderBlock2D]",
        "model.up_block_types=[UpDecoderBlock2D,UpDecoderBlock2D]",
    ],
    "latent": [
        "data.stored_size=32", "data.copies=3", "model.sample_size=16", "model.in_channels=4", "model.out_channels=4",
        "model.block_out_channels=[16,32]", "model.down_block_types=[AttnDownBlock2D,AttnDownBlock2D]",
        "model.up_block_types=[AttnUpBlock2D,AttnUpBlock2D]", "model.attention_head_dim=8", "model.norm_num_groups=4",
    ],
    "prior-v2": [
        "model.block_out_channels=[16,32]", "model.down_block_types=[ResnetDownsampleBlock2D,AttnDownBlock2D]",
        "model.up_block_types=[AttnUpBlock2D,ResnetUpsampleBlock2D]", "model.sample_size=16", "init=null",
        "model.attention_head_dim=8", "model.norm_num_groups=4", "data.sets.faces.stored_size=32",
        "data.sets.flowers.stored_size=20", "data.sets.photos.stored_size=20", "data.sets.photos.crops=5",
    ],
}  # fmt: skip


def smooth(rng, *size):
    image = gaussian_filter(rng.normal(size=(*size, 3)), (3, 3, 0))
    return (127.5 + 127.5 * image / np.abs(image).max()).astype(np.uint8)


def write_folders(root):
    """Square faces, and photos of several sizes."""
    rng = np.random.default_rng(0)
    for name, sizes in {"faces": [(32, 32)] * 12, "photos": [(30, 44), (61, 40), (25, 25), (90, 120)]}.items():
        (root / name).mkdir()
        for i, size in enumerate(sizes):
            Image.fromarray(smooth(rng, *size)).save(root / name / f"{i:02d}.png")
    return root


def config(kind, folders, out, *settings):
    if kind == "prior-v2":
        where = [f"data.sets.{name}.folder={folders / 'photos'}" for name in ("flowers", "photos")]
        where.append(f"data.sets.faces.folder={folders / 'faces'}")
    else:
        where = [f"data.folder={folders / 'faces'}"]
    yaml = configs_dir() / "train" / f"{kind}.yaml"
    return load_training_config(yaml, [f"out={out}", *where, *QUICK, *TINY[kind], *settings])


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def falls(out, name):
    values = [row[name] for row in rows(out / "log.jsonl")]
    return np.mean(values[-6:]) < 0.9 * np.mean(values[:6])
