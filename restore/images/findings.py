"""What is wrong with a photo, as far as its pixels and its file tell."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import operators
from operators import RestoreError
from restore.images.blocks import SIDE, Compression, detect_compression, estimate_quantised_noise, find_quality
from restore.images.compression import read_compression
from restore.images.damage import detect_damage
from restore.images.estimate import BLURRED, SMALLEST, estimate_noise, find_blur, measure_grey_share
from restore.images.io import ImageRecord, read_image
from restore.images.motion import Motion, estimate_motion
from restore.images.paint import find_paint
from restore.images.softness import measure_softness
from restore.images.spectrum import measure_detail
from restore.images.tint import estimate_tint

# From where on something is called wrong: sigma on [-1, 1], the quality of JPEG, the longer side in pixels.
NOISY, COMPRESSED, SMALL = 0.03, 88, 400
# Pixels times nats, of a blur: sharp pieces of held-out photos with noise of 10 to 50 have less than 4.4.
EVIDENCE = 4.5
SHARP = 1.5  # times the noise's: power of the finest detail of a photo that is not blurred, whatever its edges say
SENSITIVITY, CERTAIN = 0.5, -0.2  # of the search for damage: of its mask, and for believing that there is any


@dataclass(frozen=True)
class Findings:
    """What was found in a photo of `size` (H, W).

    hue: "grey", "one hue" or "colour". sigma: of the noise on [-1, 1], before the photo was compressed. blur: standard
    deviation of a Gaussian blur in pixels, 0 for none. motion: of the camera, in place of a blur. quality: of the JPEG
    compression, 100 if it does not show; jpeg: the options of operators.JPEG then. mask: (1, 1, H, W), 0 where there
    are scratches and dust, or pixels that are missing (`paint`): then nobody looked for blur and motion.
    """

    size: tuple[int, int]
    hue: str
    sigma: float
    blur: float
    motion: Motion | None
    quality: int
    jpeg: dict[str, Any] | None
    mask: torch.Tensor
    painted: bool = False

    @property
    def damage(self) -> float:
        """The share of the pixels that are scratched, dusty, missing or painted over."""
        return 1 - float(self.mask.mean())

    def describe_damage(self) -> str:
        kind = "missing or painted over" if self.painted else "scratches or dust"
        return f"{kind} on {self.damage:.1%}"

    @property
    def noisy(self) -> bool:
        return self.sigma >= NOISY

    @property
    def small(self) -> bool:
        return max(self.size) <= SMALL


def inspect_photo(
    photo: str | Path | ImageRecord, sensitivity: float = SENSITIVITY, compression: dict[str, Any] | None = None
) -> Findings:
    """Return what is found in a photo, a file or one that was read. sensitivity: of the search for damage. compression:
    as `read_compression` returns it, where the file does not say it.

    Raises RestoreError below 32 pixels a side.
    """
    record = photo if isinstance(photo, ImageRecord) else read_image(Path(photo))
    x, (height, width) = record.pixels, record.size
    if min(record.size) < SMALLEST:
        raise RestoreError(
            f"a photo must have at least {SMALLEST} pixels a side to be examined, got {record.path.name} of "
            f"{width} x {height}; try task=sr4"
        )
    known = find_paint(x)
    painted = bool(known.min() == 0)
    seen, jpeg = _find_compression(record, compression or read_compression(record.path))
    if seen is None:
        sigma = estimate_noise(x, known[0, 0] if painted else None)
    else:
        sigma = estimate_quantised_noise(x, seen)
    motion = None if painted else estimate_motion(x, sigma)
    if motion and seen and _is_blocks(motion):
        motion = None
    grey = record.grey or measure_grey_share(x) == 1
    return Findings(
        size=record.size,
        hue="grey" if grey else "colour" if estimate_tint(x) is None else "one hue",
        sigma=float(f"{sigma:.3g}"),
        blur=0.0 if motion or painted else _find_blur(x, sigma, seen is not None),
        motion=motion,
        quality=100 if seen is None else seen.quality,
        jpeg=jpeg,
        mask=known if painted else detect_damage(x, sensitivity, CERTAIN),
        painted=painted,
    )


def _find_blur(x: torch.Tensor, sigma: float, compressed: bool) -> float:
    """Return the blur of a photo: by its spectrum, or, where JPEG has cut that, by its edges; 0 of a sharp one, and
    where detail is left that a blur takes."""
    if min(x.shape[-2:]) < 2 * SMALLEST:
        return 0.0
    if compressed:
        return round(find_blur(x), 1)
    found = measure_softness(x, sigma)
    blurred = found.std >= BLURRED and found.std * found.evidence > EVIDENCE
    return round(found.std, 2) if blurred and measure_detail(x, sigma) <= SHARP else 0.0


def _is_blocks(motion: Motion) -> bool:
    """Whether it is what the blocks of JPEG leave: zeros at an eighth of a cycle per pixel, along rows or columns."""
    return abs(motion.length - SIDE) < 1 and abs((motion.angle + 45) % 90 - 45) < 3


def _find_compression(
    record: ImageRecord, options: dict[str, Any] | None
) -> tuple[Compression | None, dict[str, Any] | None]:
    """The compression that shows most, the file's own or one whose traces are in the pixels, and its options."""
    seen = detect_compression(record.pixels)
    own = None if options is None else find_quality(options["tables"][0], options["offset"])
    if own is not None and own.quality < COMPRESSED and (seen is None or own.quality <= seen.quality + 3):
        seen = own
    elif seen is not None and seen.quality < COMPRESSED:
        cut = [-side % operators.jpeg.SIDE for side in seen.offset]
        options = {"quality": seen.quality, "offset": cut}
    else:
        return None, None
    loss = operators.JPEG(**options).noise.estimate_loss(record.pixels)
    return seen, {**options, "loss": max(float(f"{loss:.3g}"), 1e-3)}
