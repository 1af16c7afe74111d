"""What is wrong with a photo, as far as its pixels and its file tell."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from operators import RestoreError
from restore.images.blocks import (
    Compression,
    detect_compression,
    estimate_quantised_noise,
    read_compression,
)
from restore.images.damage import detect_damage
from restore.images.estimate import SMALLEST, find_blur, estimate_noise, measure_grey_share
from restore.images.io import ImageRecord, read_image
from restore.images.motion import Motion, estimate_motion
from restore.images.tint import estimate_tint

# From where on something is called wrong: sigma on [-1, 1], the quality of JPEG, the longer side in pixels.
NOISY, COMPRESSED, SMALL = 0.04, 88, 400
SENSITIVITY, CERTAIN = 0.3, 0.0  # of the search for damage: of its mask, and for believing that there is any


@dataclass(frozen=True)
class Findings:
    """What was found in a photo of `size` (H, W).

    hue: "grey", "one hue" or "colour". sigma: of the noise on [-1, 1], before the photo was compressed. blur: standard
    deviation of a Gaussian blur in pixels, 0 for none. motion: of the camera, in place of a blur. compression: if it
    shows. mask: (1, 1, H, W), 0 where there are scratches and dust.
    """

    size: tuple[int, int]
    hue: str
    sigma: float
    blur: float
    motion: Motion | None
    compression: Compression | None
    mask: torch.Tensor

    @property
    def damage(self) -> float:
        """The share of the pixels that are scratched or dusty."""
        return 1 - float(self.mask.mean())

    @property
    def noisy(self) -> bool:
        return self.sigma >= NOISY

    @property
    def small(self) -> bool:
        return max(self.size) <= SMALL


def inspect_photo(photo: str | Path | ImageRecord, sensitivity: float = SENSITIVITY) -> Findings:
    """Return what is found in a photo, a file or one that was read. sensitivity: of the search for damage.

    Raises RestoreError below 32 pixels a side.
    """
    record = photo if isinstance(photo, ImageRecord) else read_image(Path(photo))
    x, (height, width) = record.pixels, record.size
    if min(record.size) < SMALLEST:
        given = f"{record.path.name} is {width} x {height}"
        raise RestoreError(
            f"a photo must have at least {SMALLEST} pixels a side to be examined, and {given}; try task=sr4"
        )
    stated, seen = read_compression(record.path), detect_compression(x)
    found = [c for c in (stated, seen) if c is not None and c.quality < COMPRESSED]
    compression = min(found, key=lambda c: c.quality, default=None)
    sigma = estimate_noise(x) if compression is None else estimate_quantised_noise(x, compression)
    motion = estimate_motion(x, sigma)
    grey = record.grey or measure_grey_share(x) == 1
    return Findings(
        size=record.size,
        hue="grey" if grey else "colour" if estimate_tint(x) is None else "one hue",
        sigma=float(f"{sigma:.3g}"),
        blur=0.0 if motion else round(find_blur(x), 1),
        motion=motion,
        compression=compression,
        mask=detect_damage(x, sensitivity, CERTAIN),
    )
