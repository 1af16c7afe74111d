"""What happens to photos in `benchmarks.photo`: each damage makes, of a piece of a photo, the file a user would have.

A damage is done as the world does it: a blur and a reduction see what lies beyond the file's border, noise is clipped
and rounded to 8 bits, JPEG is compressed by Pillow.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.ndimage
from PIL import Image, ImageDraw

from operators import kernels

MARGIN = 24  # pixels of the photo around a piece, which blurs and reductions see; a multiple of every factor


@dataclass(frozen=True)
class Piece:
    """A square of a photo at its own resolution, truth (S, S, 3) uint8, and what is around it in canvas
    (S + 2 MARGIN, S + 2 MARGIN, 3), on 0..255."""

    name: str
    photo: str
    canvas: np.ndarray

    @property
    def truth(self) -> np.ndarray:
        return self.canvas[MARGIN:-MARGIN, MARGIN:-MARGIN].astype(np.uint8)


@dataclass(frozen=True)
class Damaged:
    """A damaged piece. content: the file, in the format of `suffix`. known: (S, S) bool, what is not missing.
    kernel: of the blur. sigma: of the noise that was added, on 0..255."""

    content: bytes
    suffix: str = ".png"
    known: np.ndarray | None = None
    kernel: np.ndarray | None = None
    sigma: float = 0.0
    factor: int = 1

    @property
    def pixels(self) -> np.ndarray:
        """What the file shows, (h, w, 3) uint8."""
        return np.array(Image.open(io.BytesIO(self.content)).convert("RGB"))


@dataclass(frozen=True)
class Damage:
    """apply: (piece, generator) -> Damaged. kind: the damages that one list of alternatives is for. task, settings: how
    a user has it restored, as load_task takes them; mask and kernel are given as files."""

    kind: str
    task: str
    apply: Callable[[Piece, np.random.Generator], Damaged]
    settings: dict[str, Any] = field(default_factory=dict)

    def of(self, piece: Piece, seed: int) -> Damaged:
        """Return the damaged piece; its noise, scratches and holes depend on the piece's name and the seed only."""
        return self.apply(piece, np.random.default_rng([seed, zlib.crc32(piece.name.encode())]))


def cut_pieces(photos: Sequence[Path], pieces: int, size: int, seed: int = 0) -> list[Piece]:
    """Return `pieces` squares of `size` pixels of every photo, at places drawn from its name and the seed.

    Photos that are too small for one are left out.
    """
    found = []
    for path in photos:
        with Image.open(path) as opened:
            pixels = np.array(opened.convert("RGB"), dtype=np.float64)
        room = np.array(pixels.shape[:2]) - (size + 2 * MARGIN)
        if room.min() < 0:
            continue
        random = np.random.default_rng([seed, zlib.crc32(path.stem.encode())])
        for k in range(pieces):
            top, left = random.integers(0, room + 1)
            canvas = pixels[top : top + size + 2 * MARGIN, left : left + size + 2 * MARGIN]
            found.append(Piece(f"{path.stem}-{k}", path.stem, canvas))
    return found


def add_noise(image: np.ndarray, sigma: float, random: np.random.Generator) -> bytes:
    """Return the PNG of an image (h, w, 3) on 0..255 with white noise, clipped and rounded to 8 bits."""
    return _encode(image + sigma * random.standard_normal(image.shape))


def _encode(image: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    pixels = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(stream, **{"format": "PNG"} | options)
    return stream.getvalue()


def _noise(sigma: float) -> Damage:
    def apply(piece: Piece, random: np.random.Generator) -> Damaged:
        return Damaged(add_noise(piece.truth.astype(float), sigma, random), sigma=sigma)

    return Damage("noise", "denoise", apply)


def _blur(kernel: Callable[[Piece], np.ndarray], sigma: float, task: str, **settings: Any) -> Damage:
    def apply(piece: Piece, random: np.random.Generator) -> Damaged:
        psf = kernel(piece)
        blurred = np.stack([scipy.ndimage.convolve(piece.canvas[..., c], psf, mode="mirror") for c in range(3)], axis=2)
        seen = blurred[MARGIN:-MARGIN, MARGIN:-MARGIN]
        return Damaged(add_noise(seen, sigma, random), kernel=psf, sigma=sigma)

    return Damage("blur", task, apply, settings)


def _reduction(factor: int, sigma: float) -> Damage:
    def apply(piece: Piece, random: np.random.Generator) -> Damaged:
        side = len(piece.canvas) // factor
        bands = [Image.fromarray(piece.canvas[..., c].astype(np.float32)) for c in range(3)]
        small = np.stack([np.array(band.resize((side, side), Image.Resampling.BICUBIC)) for band in bands], axis=2)
        margin = MARGIN // factor
        return Damaged(add_noise(small[margin:-margin, margin:-margin], sigma, random), sigma=sigma, factor=factor)

    return Damage("reduction", f"sr{factor}", apply)


def _missing(draw: Callable[[int, np.random.Generator], np.ndarray]) -> Damage:
    """draw: (side, generator) -> (S, S) bool, the known pixels; the missing ones are white in the file."""

    def apply(piece: Piece, random: np.random.Generator) -> Damaged:
        known = draw(len(piece.truth), random)
        return Damaged(_encode(np.where(known[..., None], piece.truth, 255)), known=known)

    return Damage("missing", "inpaint", apply)


def draw_scratches(side: int, random: np.random.Generator) -> np.ndarray:
    """Return the known pixels beside five crooked lines of one to three pixels across the picture."""
    canvas = Image.new("L", (side, side), 255)
    for _ in range(5):
        start, end = random.uniform(0, side, (2, 2))
        bend = (start + end) / 2 + random.normal(0, side / 12, 2)
        points = [tuple(point) for point in (start, bend, end)]
        ImageDraw.Draw(canvas).line(points, fill=0, width=int(random.integers(1, 4)), joint="curve")
    return np.array(canvas) > 0


def draw_hole(side: int, random: np.random.Generator) -> np.ndarray:
    """Return the known pixels around a square of 40 pixels (a third of a smaller side), away from the border."""
    hole, known = min(40, side // 3), np.ones((side, side), dtype=bool)
    top, left = random.integers(hole // 4, side - hole - hole // 4 + 1, 2)
    known[top : top + hole, left : left + hole] = False
    return known


def _jpeg(quality: int) -> Damage:
    def apply(piece: Piece, random: np.random.Generator) -> Damaged:
        return Damaged(_encode(piece.truth, format="JPEG", quality=quality), suffix=".jpg")

    return Damage("jpeg", "jpeg", apply)


def _gaussian(piece: Piece) -> np.ndarray:
    return kernels.gaussian_kernel(15, 1.5).numpy()


def _shaken(piece: Piece) -> np.ndarray:
    """The path of a hand that shakes (Boracchi & Foi 2012), another one for every piece."""
    return kernels.motion_kernel(15, 0.5, zlib.crc32(piece.name.encode())).numpy()


DAMAGES = {
    "noise 15": _noise(15),
    "noise 25": _noise(25),
    "noise 50": _noise(50),
    "blur 1.5, noise 2": _blur(_gaussian, 2, "gaussian-blur", std=1.5),
    "blur 1.5, noise 5": _blur(_gaussian, 5, "gaussian-blur", std=1.5),
    "motion blur, noise 2": _blur(_shaken, 2, "blur"),
    "half size": _reduction(2, 0),
    "half size, noise 5": _reduction(2, 5),
    "quarter size": _reduction(4, 0),
    "scratches": _missing(draw_scratches),
    "hole of 40": _missing(draw_hole),
    "half of the pixels": _missing(lambda side, random: random.random((side, side)) < 0.5),
    "JPEG 10": _jpeg(10),
    "JPEG 20": _jpeg(20),
    "JPEG 40": _jpeg(40),
}
