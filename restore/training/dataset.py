"""Images for training, held in memory; every batch is a pure function of (seed, step).

So a run can be resumed to the exact step: nothing about the data order or the augmentation has to be stored in a
checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from operators import RestoreError
from restore.images.folder import drop_companions, filter_images, read_rgb

HELD_OUT_CROPS = 2


@dataclass
class TrainingSet:
    """Images of one kind: training and held_out are uint8 (N, 3, S, S); share: its part of a batch.

    cut: smaller images are cut out of them (crops of photos, whose sharpness is part of what is learned); else they
    are reduced (faces, which fill the image).
    """

    name: str
    training: torch.Tensor
    held_out: torch.Tensor
    label: str | None = None
    share: float = 1.0
    cut: bool = False


def load_training_sets(data, seed: int) -> list[TrainingSet]:
    """Load the sets of a configuration's `data`: one folder of square images, or `sets` with keys of their own.

    Keys of a set: folder (a path or a list of them), optionally label, share, stored_size, crops (see `load_crops`;
    0: the images are square and taken whole). Raises RestoreError for missing folders, images that do not fit, and sets
    of which every image is held out.
    """
    result = []
    for name, entry in _list_sets(data).items():
        parts = split_files(_list_set_files(entry), data.held_out_every)
        if not parts[0]:
            raise RestoreError(
                f"{entry['folder']} must have images to train on, but all {len(parts[1])} of them are held out; add"
                f" images, or raise data.held_out_every={data.held_out_every}"
            )
        size, crops = entry.get("stored_size") or data.stored_size, entry.get("crops") or 0
        if crops:
            images = [load_crops(files, size, n, seed) for files, n in zip(parts, (crops, HELD_OUT_CROPS), strict=True)]
        else:
            images = [load_squares(files, size) for files in parts]
        result.append(TrainingSet(name, *images, entry.get("label"), entry.get("share") or 1.0, cut=bool(crops)))
    return result


def list_training_files(data) -> list[Path]:
    """Return the image files of all sets of a configuration's `data`. Raises RestoreError as `list_files`."""
    return [file for entry in _list_sets(data).values() for file in _list_set_files(entry)]


def list_held_out_files(data) -> list[Path]:
    """Return those of them that are never trained on. Raises RestoreError as `list_files`."""
    split = [split_files(_list_set_files(entry), data.held_out_every) for entry in _list_sets(data).values()]
    return [file for _, held_out in split for file in held_out]


def hash_split(data) -> str:
    """Return a hash of which files, by name, are trained on and which are held out. Raises as `list_files`."""
    names = [[file.name for file in _list_set_files(entry)] for entry in _list_sets(data).values()]
    return hashlib.sha256(json.dumps([names, data.held_out_every]).encode()).hexdigest()


def _list_sets(data) -> dict:
    return data.get("sets") or {"images": {"folder": data.folder}}


def _list_set_files(entry) -> list[Path]:
    folders = [entry["folder"]] if isinstance(entry["folder"], str) else entry["folder"]
    return [file for folder in folders for file in list_files(folder)]


def list_files(folder: str | Path) -> list[Path]:
    """Return the image files directly in `folder`, sorted by name. Raises RestoreError if there are none."""
    if not Path(folder).is_dir():
        raise RestoreError(f"data.folder must be a folder, but {folder} does not exist; set data.folder=PATH")
    files = drop_companions(filter_images(Path(folder).iterdir()))
    if not files:
        raise RestoreError(f"data.folder must have images, but there are none directly in {folder}")
    return files


def split_files(files: list[Path], held_out_every: int) -> tuple[list[Path], list[Path]]:
    """Split into training and held-out files: every `held_out_every`-th is held out, the first included."""
    return [f for i, f in enumerate(files) if i % held_out_every], files[::held_out_every]


def load_squares(files: list[Path], size: int) -> torch.Tensor:
    """Load square images as uint8 (N, 3, size, size); larger ones are reduced by area averaging.

    Raises RestoreError if one is smaller than `size`, or not square.
    """
    out = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    for i, (file, image) in enumerate(_open_images(files)):
        if image.size[0] != image.size[1] or image.size[0] < size:
            raise RestoreError(f"training needs square images of {size} pixels or more, got {file} of {image.size}")
        if image.size[0] != size:
            image = image.resize((size, size), Image.Resampling.BOX)
        out[i] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return out


def load_crops(files: list[Path], size: int, crops: int, seed: int) -> torch.Tensor:
    """Load square crops at random positions and scales of photos of any size, uint8 (N * crops, 3, size, size).

    The side of a crop is drawn log-uniformly between `size` and the photo's shorter side, so that nothing is enlarged;
    a photo's crops depend on the seed and its index only. Raises RestoreError if a photo is smaller than `size`.
    """
    out = torch.empty(len(files) * crops, 3, size, size, dtype=torch.uint8)
    for i, (file, image) in enumerate(_open_images(files)):
        if min(image.size) < size:
            raise RestoreError(f"crops need {size} pixels or more a side, got {file} of {image.size}")
        rng = np.random.default_rng([seed, i])
        for k in range(crops):
            side = round(size * (min(image.size) / size) ** rng.random())
            left, top = (int(rng.integers(0, whole - side + 1)) for whole in image.size)
            crop = image.crop((left, top, left + side, top + side))
            crop = crop.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0)
            out[i * crops + k] = torch.from_numpy(np.array(crop)).permute(2, 0, 1)
    return out


def _open_images(files: list[Path]) -> Iterator[tuple[Path, Image.Image]]:
    for file in files:
        yield file, Image.fromarray(read_rgb(file))


def batch_indices(n: int, batch: int, step: int, seed: int) -> torch.Tensor:
    """Return the indices of batch `step`: epochs are seeded permutations laid end to end, so no image is skipped."""
    first = step * batch
    epochs = range(first // n, (first + batch - 1) // n + 1)
    order = torch.cat([torch.randperm(n, generator=torch.Generator().manual_seed(seed + 7919 * e)) for e in epochs])
    start = first - epochs[0] * n
    return order[start : start + batch]


def divide_batch(sets: list[TrainingSet], batch: int) -> list[int]:
    """Return the number of images of each set in a batch: their shares, rounded so that the batch is full."""
    ends = np.cumsum([0.0, *(one.share for one in sets)])
    return np.diff([round(batch * end / ends[-1]) for end in ends]).tolist()


def to_float(images: torch.Tensor, size: int, cut: bool = False) -> torch.Tensor:
    """uint8 (N, 3, S, S) -> float (N, 3, size, size) in [-1, 1], by area averaging; with `cut` the middle of each."""
    if cut:
        first = (images.shape[-1] - size) // 2
        images = images[..., first : first + size, first : first + size]
    return F.interpolate(images.float() / 127.5 - 1, size=(size, size), mode="area")


def crop_randomly(x: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """Cut a square (B, C, size, size) out of x (B, C, H, W), at a random position of each image."""
    down, right = (side - size + 1 for side in x.shape[-2:])
    tops = torch.randint(down, (len(x),), generator=generator, device=x.device).tolist()
    lefts = torch.randint(right, (len(x),), generator=generator, device=x.device).tolist()
    return torch.stack([image[:, i : i + size, j : j + size] for image, i, j in zip(x, tops, lefts, strict=True)])


def augment(images: torch.Tensor, size: int, generator: torch.Generator, options, cut: bool = False) -> torch.Tensor:
    """uint8 (B, 3, S, S) -> float (B, 3, size, size) in [-1, 1]: flip, shift, scale, rotation, colour.

    The warp is done at the stored size S and reduced by area averaging, so it does not alias. With
    options.whole_pixels shifts are rounded to pixels of S, and without scale and rotation nothing is resampled.
    With `cut` nothing is ever resampled, which would blur a photo: a random crop, flip, colour.
    generator: on the device of the images.
    """
    b, device = len(images), images.device
    x = images.float() / 127.5 - 1
    flip = torch.where(torch.rand(b, generator=generator, device=device) < 0.5, -1.0, 1.0)
    if cut:
        x = crop_randomly(x, size, generator)
        x = torch.where(flip.view(b, 1, 1, 1) < 0, x.flip(-1), x)
    else:
        x = warp(x, size, flip, generator, options)
    contrast = 1 + _draw_uniform(x, generator, options.contrast, b)
    brightness = _draw_uniform(x, generator, options.brightness, b)
    tint = _draw_uniform(x, generator, options.tint, b, 3, 1, 1)
    return (x * contrast.view(b, 1, 1, 1) + brightness.view(b, 1, 1, 1) + tint).clamp(-1, 1)


def warp(x: torch.Tensor, size: int, flip: torch.Tensor, generator: torch.Generator, options) -> torch.Tensor:
    """Mirror x (B, 3, S, S) where flip (B,) is -1, rotate, scale and shift it by `options`, and reduce it to `size`."""
    bounds = (options.rotate_degrees, options.scale, options.shift, options.shift)
    angle, scale, shift_x, shift_y = (_draw_uniform(x, generator, bound, len(x)) for bound in bounds)
    angle, scale = torch.deg2rad(angle), 1 + scale
    if options.get("whole_pixels"):
        half = x.shape[-1] / 2
        shift_x, shift_y = (shift_x * half).round() / half, (shift_y * half).round() / half
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = torch.stack([cos * flip, -sin, shift_x], 1), torch.stack([sin * flip, cos, shift_y], 1)
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return F.interpolate(x, size=(size, size), mode="area")


def _draw_uniform(x: torch.Tensor, generator: torch.Generator, bound: float, *shape: int) -> torch.Tensor:
    return (2 * torch.rand(*shape, generator=generator, device=x.device) - 1) * bound
