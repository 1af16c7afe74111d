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
from restore.app.page.tasks import noise
from restore.images import damage
from restore.images import io as images
from restore.images.folder import image_size
from restore.images.io import ImageRecord
from restore.images.masks import read_mask

LARGEST_PHOTO = 64_000_000  # pixels
SHOWN, SMALL = 1400, 384  # pixels of the longer side: on the page at most; what is smaller is shown enlarged
CERTAIN = 0.2  # standard deviation on [-1, 1] that is shown in full colour
ORANGE = (255, 120, 0)
_PNG = "data:image/png;base64,"


@dataclass(frozen=True)
class Edits:
    """turns: quarter turns clockwise. crop: (left, top, right, bottom) in shares of the turned photo. mask: what was
    painted over, an array (h, w) that is True there, of the cropped photo at any scale; None where nothing was."""

    turns: int = 0
    crop: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    mask: np.ndarray | None = None

    @property
    def none(self) -> bool:
        return not self.turns and self.crop == (0, 0, 1, 1)


@dataclass(frozen=True)
class Look:
    """What a photo is seen to be. size: (H, W). preview: address of the picture for the browser. noise: sigma_y."""

    size: tuple[int, int]
    preview: str
    noise: float


def read(path: str | Path) -> ImageRecord:
    """A photo of somebody else's. Raises RestoreError, before it is read, for more than LARGEST_PHOTO pixels."""
    try:
        height, width = image_size(Path(path))
    except PIL.Image.DecompressionBombError:
        raise RestoreError(f"the photo has far more than {LARGEST_PHOTO / 1e6:.0f} million pixels") from None
    if height * width > LARGEST_PHOTO:
        raise RestoreError(
            f"the photo has {width} x {height} pixels, at most {LARGEST_PHOTO / 1e6:.0f} million go here"
        )
    return images.read_image(path)


def look(path: str | Path) -> Look:
    """Raises RestoreError for what is no photo."""
    record = read(path)
    return Look(record.size, address(shown(record.pixels)), noise(record.pixels))


def parse(text: str | None) -> Edits:
    """What the browser says was done to the photo. Raises RestoreError for anything else."""
    if not text:
        return Edits()
    try:
        said = json.loads(text)
        turns, crop = int(said["turns"]) % 4, tuple(float(share) for share in said["crop"])
        left, top, right, bottom = crop
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError
        return Edits(turns, crop, None if said.get("mask") is None else _painted(said["mask"]))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError, binascii.Error, OSError):
        raise RestoreError("what was done to the photo is not readable: choose the photo again") from None


def edited(record: ImageRecord, edits: Edits) -> ImageRecord:
    """The photo as it was turned and cropped."""

    def cut(x: torch.Tensor) -> torch.Tensor:
        x = torch.rot90(x, -edits.turns, (-2, -1))
        h, w = x.shape[-2:]
        left, top, right, bottom = (round(share * side) for share, side in zip(edits.crop, (w, h, w, h), strict=True))
        return x[..., top : max(bottom, top + 1), left : max(right, left + 1)].contiguous()

    alpha = None if record.alpha is None else cut(record.alpha)
    return dataclasses.replace(record, pixels=cut(record.pixels), alpha=alpha)


def write_mask(path: Path, missing: np.ndarray, size: tuple[int, int]) -> Path:
    """A mask as a file: white known, black missing, of `size` (H, W). Raises RestoreError where nothing is missing."""
    if not missing.any():
        raise RestoreError("paint over what is damaged first, or let scratches and dust be proposed")
    picture = PIL.Image.fromarray(np.where(missing, 0, 255).astype(np.uint8))
    picture.resize((size[1], size[0]), PIL.Image.Resampling.NEAREST).save(path)
    return path


def proposed(pixels: torch.Tensor, sensitivity: float) -> np.ndarray:
    """Where scratches and dust may be, (H, W), True there. Raises RestoreError where none is found."""
    missing = (damage.damage_mask(pixels, sensitivity)[0, 0] < 0.5).numpy()
    if not missing.any():
        raise RestoreError("no scratch and no dust was found: look more keenly, or say by hand what is damaged")
    return missing


def brush(missing: np.ndarray) -> str:
    """For the browser's layer of paint: {"mask": address}."""
    layer = np.zeros((*missing.shape, 4), np.uint8)
    layer[missing] = (224, 36, 94, 255)
    return json.dumps({"mask": address(PIL.Image.fromarray(layer))})


def uploaded(path: str | Path) -> np.ndarray:
    """A mask that was uploaded, white known, (H, W), True where it is missing. Raises RestoreError."""
    read(path)
    return (read_mask(path, threshold=127)[0, 0] < 0.5).numpy()


def shown(pixels: torch.Tensor, longest: int = SHOWN, smallest: int = 0) -> PIL.Image.Image:
    """(1 or 3, H, W) or with a batch of one, for the eye: reduced to `longest`, enlarged to `smallest`."""
    pixels = limited(pixels[None] if pixels.ndim == 3 else pixels, longest, smallest)
    return images.to_pil(pixels.expand(-1, 3, -1, -1))


def limited(pixels: torch.Tensor, longest: int = SHOWN, smallest: int = 0) -> torch.Tensor:
    """(1, C, H, W), its longer side from `smallest` to `longest` pixels."""
    h, w = pixels.shape[-2:]
    scale = min(1.0, longest / max(h, w))
    scale = max(scale, smallest / max(h, w)) if scale == 1 else scale
    size = (max(1, round(h * scale)), max(1, round(w * scale)))
    return pixels if scale == 1 else F.interpolate(pixels, size, mode="bicubic", antialias=True)


def address(picture: PIL.Image.Image) -> str:
    """A picture as an address that holds it: a PNG where it is small or has alpha, else a JPEG."""
    held = io.BytesIO()
    small = picture.mode == "RGBA" or max(picture.size) <= 512
    picture.save(held, *(("PNG",) if small else ("JPEG",)), **({} if small else {"quality": 90}))
    text = base64.b64encode(held.getvalue()).decode()
    return f"{_PNG}{text}" if small else f"data:image/jpeg;base64,{text}"


def guessed(result: torch.Tensor, spread: torch.Tensor) -> PIL.Image.Image:
    """The result (1, 3, H, W) in pale grey; orange where the samples differ, full at CERTAIN. spread: (1, 1, H, W)."""
    share = (spread / CERTAIN).clamp(0, 1)
    base = (result.mean(1, keepdim=True) * 0.6 + 0.3).clamp(-1, 1)
    orange = torch.tensor(ORANGE).view(1, 3, 1, 1) / 127.5 - 1
    return shown(base * (1 - share) + orange * share, smallest=SMALL)


def _painted(text: Any) -> np.ndarray:
    if not isinstance(text, str) or not text.startswith(_PNG):
        raise ValueError
    with PIL.Image.open(io.BytesIO(base64.b64decode(text[len(_PNG) :], validate=True)), formats=["PNG"]) as picture:
        if max(picture.size) > SHOWN + 2:
            raise ValueError
        return np.asarray(picture.convert("RGBA"))[:, :, 3] > 127
