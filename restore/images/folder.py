"""Folders of images: which files they hold, by which name, with which pixels and which hash."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from operators import RestoreError
from restore.images import io

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
# Files that live beside images without being meant as one; any other file in an image folder is reported.
SIDECAR_SUFFIXES = (".json", ".jsonl", ".csv", ".txt", ".md", ".yaml", ".yml", ".log", ".html")


def list_images(folder: str | os.PathLike) -> tuple[dict[str, Path], list[str]]:
    """All images below `folder` by id, sorted, and the names of other files found there.

    Raises RestoreError for a missing or empty folder and for two files that would share an id.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RestoreError(f"{folder} is not a folder; give the folder that holds the images")
    found: dict[str, Path] = {}
    ignored = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        relative = path.relative_to(folder)
        if any(part.startswith(".") for part in relative.parts):
            continue
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            if path.suffix.lower() not in SIDECAR_SUFFIXES:
                ignored.append(relative.as_posix())
            continue
        key = relative.with_suffix("").as_posix()
        if key in found:
            raise RestoreError(f"{found[key].name} and {path.name} in {path.parent} share the name {key}; remove one")
        found[key] = path
    if not found:
        raise RestoreError(f"{folder} holds no image ({', '.join(IMAGE_SUFFIXES)}); give a folder with images")
    return found, ignored


def to_file_name(image_id: str) -> str:
    """The id as one file stem: folders become "__", so that a results folder stays flat."""
    return image_id.replace("/", "__")


def read_rgb(path: str | os.PathLike) -> np.ndarray:
    """A file as uint8 RGB (H, W, 3), upright, 16 bits rounded to 8. Raises RestoreError where it does not decode."""
    return io.to_uint8(io.read_image(path).pixels[0])


def read_image_size(path: Path) -> tuple[int, int]:
    """(height, width) of a file as displayed, from its header."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except (OSError, SyntaxError, ValueError) as error:
        raise RestoreError(f"{path} cannot be read as an image; replace or remove it") from error
    return (width, height) if turned else (height, width)


def crop_centre(pixels: np.ndarray, size: int | None) -> np.ndarray:
    """uint8 (H, W, 3) to (size, size, 3): shorter side by antialiased bicubic, then centre crop."""
    height, width = pixels.shape[:2]
    if size is None or (height, width) == (size, size):
        return pixels
    scale = size / min(height, width)
    new = (max(size, round(width * scale)), max(size, round(height * scale)))
    resized = np.asarray(Image.fromarray(pixels).resize(new, Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return resized[top : top + size, left : left + size]
