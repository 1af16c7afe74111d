"""Images for training, held in memory; every batch is a pure function of (seed, step).

That is what makes a run resumable to the exact step: nothing about the data order or the
augmentation has to be stored in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from operators import RestoreError
from restore.images.folder import filter_images
from restore.images.io import READABLE_SUFFIXES

HELD_OUT_CROPS = 2


@dataclass
class ImageSet:
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


def load_sets(data, seed: int) -> list[ImageSet]:
    """The sets of a configuration's `data`: one folder of square images, or `sets` with keys of their own.

    Each set: folder (a path or a list of them), and perhaps label, share, stored_size, crops (see `load_crops`; 0: the
    images are square and taken whole). Raises RestoreError for missing folders and images that do not fit.
    """
    if data.get("sets") is None:
        training, held_out = split(list_images(data.folder), data.held_out_every)
        return [ImageSet("images", *(load(files, data.stored_size) for files in (training, held_out)))]
    found = []
    for name, own in data.sets.items():
        folders = [own.folder] if isinstance(own.folder, str) else own.folder
        training, held_out = split([file for folder in folders for file in list_images(folder)], data.held_out_every)
        size, crops = own.get("stored_size") or data.stored_size, own.get("crops") or 0
        if crops:
            images = load_crops(training, size, crops, seed), load_crops(held_out, size, HELD_OUT_CROPS, seed)
        else:
            images = load(training, size), load(held_out, size)
        found.append(ImageSet(name, *images, own.get("label"), own.get("share") or 1.0, cut=bool(crops)))
    return found


def list_images(folder: str | Path) -> list[Path]:
    """Image files directly in `folder`, sorted by name. Raises RestoreError when there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise RestoreError(f"training folder {folder} does not exist; set data.folder=PATH")
    files = filter_images(folder.iterdir())
    if not files:
        raise RestoreError(f"no image files ({' '.join(READABLE_SUFFIXES)}) in {folder}")
    return files


def split(files: list[Path], held_out_every: int) -> tuple[list[Path], list[Path]]:
    """(training, held-out): every `held_out_every`-th file by name is held out, the first included."""
    held_out = files[::held_out_every]
    return [f for i, f in enumerate(files) if i % held_out_every], held_out


def load(files: list[Path], size: int) -> torch.Tensor:
    """uint8 tensor (N, 3, size, size); images must be square, larger ones are reduced by area averaging."""
    out = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    for i, (file, image) in enumerate(_opened(files)):
        if image.size[0] != image.size[1] or image.size[0] < size:
            raise RestoreError(
                f"{file} is {image.size[0]}x{image.size[1]}; training needs square images of {size} or more"
            )
        if image.size[0] != size:
            image = image.resize((size, size), Image.Resampling.BOX)
        out[i] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return out


def load_crops(files: list[Path], size: int, crops: int, seed: int) -> torch.Tensor:
    """uint8 tensor (N · crops, 3, size, size): square crops at random places and scales of photos of any size.

    The side of a crop is drawn log-uniformly between `size` and the photo's smaller side, so that nothing is enlarged;
    a photo's crops follow from (seed, its place in the list) alone.
    """
    out = torch.empty(len(files) * crops, 3, size, size, dtype=torch.uint8)
    for i, (file, image) in enumerate(_opened(files)):
        if min(image.size) < size:
            raise RestoreError(f"{file} is {image.size[0]}x{image.size[1]}; crops need {size} pixels or more a side")
        rng = np.random.default_rng([seed, i])
        for k in range(crops):
            side = round(size * (min(image.size) / size) ** rng.random())
            left, top = (int(rng.integers(0, whole - side + 1)) for whole in image.size)
            crop = image.crop((left, top, left + side, top + side))
            crop = crop.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0)
            out[i * crops + k] = torch.from_numpy(np.array(crop)).permute(2, 0, 1)
    return out


def _opened(files: list[Path]) -> Iterable[tuple[Path, Image.Image]]:
    for file in files:
        try:
            with Image.open(file) as image:
                yield file, image.convert("RGB")
        except OSError as error:
            raise RestoreError(f"{file} cannot be read as an image: {error}") from error


def batch_indices(n: int, batch: int, step: int, seed: int) -> torch.Tensor:
    """Indices of batch `step`: epochs are seeded permutations laid end to end, so no image is skipped."""
    first = step * batch
    epochs = range(first // n, (first + batch - 1) // n + 1)
    order = torch.cat([torch.randperm(n, generator=torch.Generator().manual_seed(seed + 7919 * e)) for e in epochs])
    start = first - epochs[0] * n
    return order[start : start + batch]


def shares(sets: list[ImageSet], batch: int) -> list[int]:
    """How many of a batch come from each set: their shares, rounded so that the batch is full."""
    total = sum(one.share for one in sets)
    ends = [round(batch * sum(one.share for one in sets[: i + 1]) / total) for i in range(len(sets))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def reduced(images: torch.Tensor, size: int, cut: bool = False) -> torch.Tensor:
    """uint8 (N, 3, S, S) -> float (N, 3, size, size) in [-1, 1], by area averaging; with `cut` the middle of each."""
    if cut:
        first = (images.shape[-1] - size) // 2
        images = images[..., first : first + size, first : first + size]
    return F.interpolate(images.float() / 127.5 - 1, size=(size, size), mode="area")


def cropped(x: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """Squares of (B, C, size, size) out of x (B, C, H, W), each from a random place of its own image."""
    down, right = (side - size + 1 for side in x.shape[-2:])
    tops = torch.randint(down, (len(x),), generator=generator, device=x.device).tolist()
    lefts = torch.randint(right, (len(x),), generator=generator, device=x.device).tolist()
    return torch.stack([image[:, i : i + size, j : j + size] for image, i, j in zip(x, tops, lefts, strict=True)])


def augment(images: torch.Tensor, size: int, generator: torch.Generator, options, cut: bool = False) -> torch.Tensor:
    """uint8 (B, 3, S, S) -> float (B, 3, size, size) in [-1, 1]: flip, shift, scale, rotation, colour.

    The warp is done at the stored size S and reduced by area averaging, so it does not alias. With
    options.whole_pixels shifts are rounded to pixels of S, and without scale and rotation nothing is resampled.
    With `cut` nothing is ever resampled, which would blur a photo: a square from a random place, flip, colour.
    generator: on the device of the images.
    """
    b, device = len(images), images.device
    uniform = partial(_uniform, generator, b)
    x = images.float() / 127.5 - 1
    flip = torch.where(torch.rand(b, generator=generator, device=device) < 0.5, -1.0, 1.0)
    if cut:
        x = cropped(x, size, generator)
        x = torch.where(flip.view(b, 1, 1, 1) < 0, x.flip(-1), x)
    else:
        x = warped(x, size, flip, generator, options)
    contrast, brightness = 1 + uniform(options.contrast), uniform(options.brightness)
    tint = uniform(options.tint, 3, 1, 1)
    return (x * contrast.view(b, 1, 1, 1) + brightness.view(b, 1, 1, 1) + tint).clamp(-1, 1)


def warped(x: torch.Tensor, size: int, flip: torch.Tensor, generator: torch.Generator, options) -> torch.Tensor:
    """x (B, 3, S, S) mirrored where flip (B,) is -1, turned, scaled and shifted by `options`, then reduced to size."""
    uniform = partial(_uniform, generator, len(x))
    angle, scale = torch.deg2rad(uniform(options.rotate_degrees)), 1 + uniform(options.scale)
    shift_x, shift_y = uniform(options.shift), uniform(options.shift)
    if options.get("whole_pixels"):
        half = x.shape[-1] / 2
        shift_x, shift_y = (shift_x * half).round() / half, (shift_y * half).round() / half
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    row_x = torch.stack([cos * flip, -sin, shift_x], 1)
    row_y = torch.stack([sin * flip, cos, shift_y], 1)
    grid = F.affine_grid(torch.stack([row_x, row_y], 1), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return F.interpolate(x, size=(size, size), mode="area")


def _uniform(generator: torch.Generator, b: int, bound: float, *shape: int) -> torch.Tensor:
    return (2 * torch.rand(b, *shape, generator=generator, device=generator.device) - 1) * bound
