"""Masks and blur kernels given as files."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from operators import RestoreError
from restore.images.damage import detect_damage
from restore.images.folder import filter_images
from restore.images.io import explain_errors, read_image
from restore.images.paint import find_paint


@dataclass(frozen=True)
class Mask:
    """A mask to be read from a file, or from a folder with one mask per photo name; or detected in the photo itself.

    invert, threshold: see `read_mask`. sensitivity: detect the damage in the photo `path`, see `detect_damage`.
    """

    path: Path
    invert: bool = False
    threshold: int | None = None
    sensitivity: float | None = None

    def for_photo(self, photo: Path) -> Mask:
        """Return the mask of this photo. Raises RestoreError if the folder has none of its name."""
        if self.sensitivity is not None:
            return replace(self, path=photo)
        if not self.path.is_dir():
            return self
        files = filter_images(path for path in self.path.iterdir() if path.stem == photo.stem)
        if not files:
            raise RestoreError(f"the folder of masks {self.path} has none named {photo.stem}")
        return replace(self, path=files[0])

    def read(self, size: tuple[int, int] | None = None) -> torch.Tensor:
        """Return the mask (1, 1, H, W) as `read_mask` does. Raises RestoreError also if no damage is detected."""
        if self.sensitivity is None:
            return read_mask(self.path, size, self.threshold, self.invert)
        if self._detected.min() == 1:
            raise RestoreError(f"no scratches or dust found in {self.path.name}; paint a mask or try sensitivity=1")
        return self._detected

    @functools.cached_property
    def _detected(self) -> torch.Tensor:
        # Cached: planning and restoring a photo both need it, and it takes seconds for a large photo.
        pixels = read_image(self.path).pixels
        painted = find_paint(pixels)
        return painted if painted.min() == 0 else detect_damage(pixels, self.sensitivity)


def read_mask(
    path: str | Path, size: tuple[int, int] | None = None, threshold: int | None = None, invert: bool = False
) -> torch.Tensor:
    """Read an inpainting mask (1, 1, H, W) float32: 1 (white) where the pixel is known, 0 (black) where it is missing.

    size: the photo's (height, width), which the mask must have. threshold: grey values above it (0 to 254) count as
    white; without it values other than 0 and 255 are an error. invert: white is missing in the file.
    Raises RestoreError also for a mask with colours or transparency, and if it is all white or all black.
    """
    record = read_image(path)
    pixels = (record.pixels + 1) * 127.5
    if record.alpha is not None and bool((record.alpha < 1).any()):
        raise RestoreError(f"the mask {path} has transparent parts: save it as black (missing) and white (known)")
    if not torch.equal(pixels[:, :1], pixels[:, 1:2]) or not torch.equal(pixels[:, :1], pixels[:, 2:]):
        raise RestoreError(f"the mask {path} has colours: save it as black (missing) and white (known)")
    if size is not None and record.size != tuple(size):
        expected, actual = (f"{width} x {height}" for height, width in (size, record.size))
        raise RestoreError(f"the mask {path} must have the photo's size {expected}, got {actual}")
    mask = pixels[:, :1]
    if threshold is None:
        between = ((mask > 0.5) & (mask < 254.5)).double().mean().item()
        if between:
            hint = "draw it without soft edges and save it as PNG, or give mask_threshold=127"
            raise RestoreError(f"the mask {path} must be black and white, got {between:.2%} in between; {hint}")
    mask = (mask > (127 if threshold is None else threshold)).float()
    mask = 1 - mask if invert else mask
    if mask.min() == mask.max():
        what = "white: nothing is missing" if mask.max() else "black: no pixel is known"
        raise RestoreError(f"the mask {path} is all {what}; paint what is to be restored black and the rest white")
    return mask


def read_kernel(path: str | Path) -> torch.Tensor:
    """Read a blur kernel (kh, kw) float64 from .npy, .txt, .csv or a grey picture, as operators.Blur takes it.

    The file shows what a point of light becomes, centred at (kh // 2, kw // 2), as it is measured and as published
    kernels are applied, by convolution; operators.Blur correlates, so it is turned by 180 degrees. Numbers must sum to
    one within 1e-3; the grey values of a picture, 8 or 16 bits, are divided by their sum. Raises
    RestoreError for NaN, a wrong sum, more than two dimensions and an unreadable file.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    with explain_errors(path, "kernel", "expected .npy, .txt, .csv or a grey picture"):
        if suffix == ".npy":
            values = np.lib.format.open_memmap(path, mode="r")  # a header may claim any size
        elif suffix in (".txt", ".csv"):
            text = path.read_text(encoding="utf-8").replace(",", " ").replace(";", " ")
            values = np.loadtxt(io.StringIO(text), ndmin=2)
        else:
            record = read_image(path)
            if not record.grey and not torch.equal(record.pixels[:, 0], record.pixels[:, 1]):
                raise RestoreError(f"the kernel {path} must be a grey picture, got colours")
            values = record.pixels[0, 0].double().add(1).div(2).numpy()
            if values.sum() == 0:
                raise RestoreError(f"the kernel {path} is all black")
            values = values / values.sum()
    if values.ndim != 2 or values.size == 0 or values.dtype.kind not in "fiu":
        raise RestoreError(f"the kernel {path} must be a table of numbers, got {values.dtype} of shape {values.shape}")
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise RestoreError(f"the kernel {path} must be finite, got NaN or infinite values")
    if abs(values.sum() - 1) > 1e-3:
        raise RestoreError(f"the kernel {path} must sum to 1, got {values.sum():.6g}; divide it by its sum")
    values = np.pad(values, [(0, 1 - side % 2) for side in values.shape])  # an even one keeps its centre when turned
    return torch.from_numpy(values[::-1, ::-1].copy())
