"""The photo as the page shows it, and what was done to it there: turned, cropped, painted over."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F

from operators import RestoreError
from restore.app.page.request import PAINT_FIRST
from restore.images import compression, damage
from restore.images import io as images
from restore.images.folder import read_image_size
from restore.images.io import ImageRecord
from restore.images.masks import read_mask

LARGEST_PHOTO = 64_000_000  # pixels
LONGEST, SMALLEST = 1400, 384  # pixels of the longer side on the page; smaller pictures are enlarged
FULL_SPREAD = 0.2  # standard deviation on [-1, 1] that is drawn in full colour
ORANGE = (255, 120, 0)
PAINT = (224, 36, 94, 255)
_PNG = "data:image/png;base64,"


@dataclass(frozen=True)
class Edits:
    """turns: quarter turns clockwise. crop: (left, top, right, bottom) as fractions of the turned photo. mask: (h, w),
    True where the cropped photo was painted over, at any scale; None if nothing was."""

    turns: int = 0
    crop: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    mask: np.ndarray | None = None

    @property
    def change_photo(self) -> bool:
        return bool(self.turns) or self.crop != (0, 0, 1, 1)


def read_photo(path: str | Path) -> ImageRecord:
    """Read an uploaded photo. Raises RestoreError, before it is decoded, for more than LARGEST_PHOTO pixels."""
    try:
        height, width = read_image_size(Path(path))
    except RestoreError as error:
        if isinstance(error.__cause__, PIL.Image.DecompressionBombError):
            raise RestoreError(f"the photo has far more than {LARGEST_PHOTO / 1e6:.0f} million pixels") from None
        raise
    if height * width > LARGEST_PHOTO:
        raise RestoreError(
            f"the photo must have at most {LARGEST_PHOTO / 1e6:.0f} million pixels, got {width} x {height}"
        )
    return images.read_image(path)


def parse_edits(text: str | None) -> Edits:
    """Return the edits that the browser sent as JSON. Raises RestoreError for anything else."""
    if not text:
        return Edits()
    try:
        sent = json.loads(text)
        turns, crop = int(sent["turns"]) % 4, tuple(float(share) for share in sent["crop"])
        left, top, right, bottom = crop
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError
        return Edits(turns, crop, None if sent.get("mask") is None else _decode_paint(sent["mask"]))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError, binascii.Error, OSError):
        raise RestoreError("the changes to the photo cannot be read: choose the photo again") from None


def apply_edits(record: ImageRecord, edits: Edits) -> ImageRecord:
    """Return the photo turned and cropped."""

    left, top, right, bottom = _find_box(record.size, edits)

    def cut(x: torch.Tensor) -> torch.Tensor:
        return torch.rot90(x, -edits.turns, (-2, -1))[..., top:bottom, left:right].contiguous()

    alpha = None if record.alpha is None else cut(record.alpha)
    return dataclasses.replace(record, pixels=cut(record.pixels), alpha=alpha)


def _find_box(size: tuple[int, int], edits: Edits) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the crop, in pixels of the turned photo; size: (H, W) before it was turned."""
    h, w = size if edits.turns % 2 == 0 else size[::-1]
    left, top, right, bottom = (round(share * side) for share, side in zip(edits.crop, (w, h, w, h), strict=True))
    return left, top, max(right, left + 1), max(bottom, top + 1)


def read_compression(record: ImageRecord, edits: Edits) -> dict[str, Any] | None:
    """Return what the photo's file says of its JPEG compression, for the photo as it was turned and cropped; None if it
    is no JPEG, or cannot be said of the turned one."""
    found, (left, top, *_) = compression.read_compression(record.path), _find_box(record.size, edits)
    return found and compression.follow_edits(found, record.size, edits.turns, (top, left))


def write_mask(path: Path, missing: np.ndarray, size: tuple[int, int]) -> Path:
    """Write a mask of `size` (H, W): white known, black missing. Raises RestoreError if nothing is missing."""
    if not missing.any():
        raise RestoreError(PAINT_FIRST)
    picture = PIL.Image.fromarray(np.where(missing, 0, 255).astype(np.uint8))
    picture.resize((size[1], size[0]), PIL.Image.Resampling.NEAREST).save(path)
    return path


def propose_mask(pixels: torch.Tensor, sensitivity: float) -> np.ndarray:
    """Return where scratches and dust may be in (1, 3, H, W): (H, W), True there. Raises RestoreError if nowhere."""
    missing = (damage.detect_damage(pixels, sensitivity)[0, 0] < 0.5).numpy()
    if not missing.any():
        raise RestoreError("no scratches and no dust were found: raise the sensitivity, or paint over the damage")
    return missing


def read_missing(path: str | Path) -> np.ndarray:
    """Read an uploaded mask, white known: (H, W), True where something is missing. Raises RestoreError."""
    read_photo(path)
    return (read_mask(path, threshold=127)[0, 0] < 0.5).numpy()


def draw_paint(missing: np.ndarray) -> str:
    """Return the browser's layer of paint as JSON: {"mask": data URL}."""
    layer = np.zeros((*missing.shape, 4), np.uint8)
    layer[missing] = PAINT
    return json.dumps({"mask": to_data_url(PIL.Image.fromarray(layer))})


def render(pixels: torch.Tensor, longest: int = LONGEST, smallest: int = 0) -> PIL.Image.Image:
    """Return (1 or 3, H, W), or a batch of one, as a picture; see `limit_size`."""
    pixels = limit_size(pixels[None] if pixels.ndim == 3 else pixels, longest, smallest)
    return images.to_pil(pixels.expand(-1, 3, -1, -1))


def limit_size(pixels: torch.Tensor, longest: int = LONGEST, smallest: int = 0) -> torch.Tensor:
    """Resize (1, C, H, W) so that its longer side has from `smallest` to `longest` pixels."""
    longer = max(pixels.shape[-2:])
    scale = longest / longer if longer > longest else max(1.0, smallest / longer)
    size = tuple(max(1, round(side * scale)) for side in pixels.shape[-2:])
    return pixels if scale == 1 else F.interpolate(pixels, size, mode="bicubic", antialias=True)


def to_data_url(picture: PIL.Image.Image) -> str:
    """Return a picture as a data URL: PNG if it is small or has alpha, else JPEG."""
    content, png = io.BytesIO(), picture.mode == "RGBA" or max(picture.size) <= 512
    picture.save(content, "PNG" if png else "JPEG", quality=90)
    return (_PNG if png else "data:image/jpeg;base64,") + base64.b64encode(content.getvalue()).decode()


def draw_spread(result: torch.Tensor, spread: torch.Tensor) -> PIL.Image.Image:
    """Return the result (1, 3, H, W) in pale grey, orange where the samples differ; spread: (1, 1, H, W)."""
    share = (spread / FULL_SPREAD).clamp(0, 1)
    base = (result.mean(1, keepdim=True) * 0.6 + 0.3).clamp(-1, 1)
    orange = torch.tensor(ORANGE).view(1, 3, 1, 1) / 127.5 - 1
    return render(base * (1 - share) + orange * share, smallest=SMALLEST)


def _decode_paint(text: Any) -> np.ndarray:
    if not isinstance(text, str) or not text.startswith(_PNG):
        raise ValueError
    with PIL.Image.open(io.BytesIO(base64.b64decode(text[len(_PNG) :], validate=True)), formats=["PNG"]) as picture:
        if max(picture.size) > LONGEST + 2:
            raise ValueError
        return np.asarray(picture.convert("RGBA"))[:, :, 3] > 127
