"""Images for training, held in memory; every batch is a pure function of (seed, step).

That is what makes a run resumable to the exact step: nothing about the data order or the
augmentation has to be stored in a checkpoint.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from operators import RestoreError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def list_images(folder: str | Path) -> list[Path]:
    """Image files directly in `folder`, sorted by name. Raises RestoreError when there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise RestoreError(f"training folder {folder} does not exist; set data.folder=PATH")
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    if not files:
        raise RestoreError(f"no image files ({', '.join(sorted(SUFFIXES))}) in {folder}")
    return files


def split(files: list[Path], held_out_every: int) -> tuple[list[Path], list[Path]]:
    """(training, held-out): every `held_out_every`-th file by name is held out, the first included."""
    held_out = files[::held_out_every]
    return [f for i, f in enumerate(files) if i % held_out_every], held_out


def load(files: list[Path], size: int) -> torch.Tensor:
    """uint8 tensor (N, 3, size, size); images must be square, larger ones are reduced by area averaging."""
    out = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    for i, file in enumerate(files):
        try:
            with Image.open(file) as image:
                image = image.convert("RGB")
        except OSError as error:
            raise RestoreError(f"{file} cannot be read as an image: {error}") from error
        if image.size[0] != image.size[1] or image.size[0] < size:
            raise RestoreError(
                f"{file} is {image.size[0]}x{image.size[1]}; training needs square images of {size} or more"
            )
        if image.size[0] != size:
            image = image.resize((size, size), Image.Resampling.BOX)
        out[i] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return out


def batch_indices(n: int, batch: int, step: int, seed: int) -> torch.Tensor:
    """Indices of batch `step`: epochs are seeded permutations laid end to end, so no image is skipped."""
    first = step * batch
    epochs = range(first // n, (first + batch - 1) // n + 1)
    order = torch.cat([torch.randperm(n, generator=torch.Generator().manual_seed(seed + 7919 * e)) for e in epochs])
    start = first - epochs[0] * n
    return order[start : start + batch]


def augment(images: torch.Tensor, size: int, generator: torch.Generator, options) -> torch.Tensor:
    """uint8 (B, 3, S, S) -> float (B, 3, size, size) in [-1, 1]: flip, shift, scale, rotation, colour.

    The warp is done at the stored size S and reduced by area averaging, so it does not alias.
    """
    b = len(images)

    def uniform(bound: float) -> torch.Tensor:
        return (2 * torch.rand(b, generator=generator) - 1) * bound

    x = images.float() / 127.5 - 1
    flip = torch.where(torch.rand(b, generator=generator) < 0.5, -1.0, 1.0)
    angle, scale = torch.deg2rad(uniform(options.rotate_degrees)), 1 + uniform(options.scale)
    shift_x, shift_y = uniform(options.shift), uniform(options.shift)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    row_x = torch.stack([cos * flip, -sin, shift_x], 1)
    row_y = torch.stack([sin * flip, cos, shift_y], 1)
    grid = F.affine_grid(torch.stack([row_x, row_y], 1), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    x = F.interpolate(x, size=(size, size), mode="area")
    contrast, brightness = 1 + uniform(options.contrast), uniform(options.brightness)
    tint = (2 * torch.rand(b, 3, 1, 1, generator=generator) - 1) * options.tint
    return (x * contrast.view(b, 1, 1, 1) + brightness.view(b, 1, 1, 1) + tint).clamp(-1, 1)
