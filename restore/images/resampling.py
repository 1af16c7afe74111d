"""Restoration at another size than the image's, as in PSLD's published numbers: 256-pixel images solved at 512.

Meant for reproducing tables: a photo is better restored at its own size. There are two readings of the protocol:

- measured at 512 (the authors' code): `enlarge_image`, degrade at 512, restore, `resize_image` to 256.
  "Super-resolution x8" then goes from 64 to 512, and a blur of 3 pixels is one of 1.5.
- measured at 256: degrade at 256 and restore with `reduce_before(operator)`, which reduces before it measures.

Known pixels of the ground truth are never pasted into a result, as the authors' inpainting script does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from operators import Compose, Operator, RestoreError, SuperResolution
from operators.naming import check_known

METHODS = {"bicubic": {"mode": "bicubic", "antialias": True, "align_corners": False}, "nearest": {"mode": "nearest"}}
"""Keywords of torch's `interpolate`; bicubic is antialiased with a = -0.5, as Pillow's."""

REFERENCE = {"method": "nearest", "stretch": True}
"""The authors' resampling, as keywords of `enlarge_image` and `Resampling`."""


def stretch_range(image: torch.Tensor) -> torch.Tensor:
    """Scale each image of (B, C, H, W) to [-1, 1] by its extrema, as the authors load theirs; a constant becomes -1."""
    flat = image.flatten(1)
    low, high = flat.amin(1).view(-1, 1, 1, 1), flat.amax(1).view(-1, 1, 1, 1)
    return 2 * (image - low) / (high - low).clamp(min=1e-8) - 1


def enlarge_image(image: torch.Tensor, size: int = 512, *, method="bicubic", stretch: bool = False) -> torch.Tensor:
    """Resize (B, 3, H, W) in [-1, 1] to size x size by `resize_image` and clamp the overshoot of the bicubic filter;
    stretch: apply `stretch_range` first."""
    return resize_image(stretch_range(image) if stretch else image, size, method=method).clamp(-1, 1)


def resize_image(image: torch.Tensor, size: int | tuple[int, int], *, method: str = "bicubic") -> torch.Tensor:
    """Resize (B, C, H, W) to size x size, or (H, W); method: one of METHODS. Raises RestoreError for another one."""
    check_known([method], METHODS, "unknown resampling")
    return F.interpolate(image, size=size, **METHODS[method])


def reduce_before(operator: Operator, factor: int = 2) -> Operator:
    """Return the operator x -> A(reduced x) for images `factor` times larger than those of `operator`, reduced by the
    antialiased bicubic of `operators.SuperResolution`; noise and name, by which presets are found, are `operator`'s."""
    composed = Compose(SuperResolution(factor), operator)
    composed.name = operator.name
    return composed


@dataclass(frozen=True)
class Resampling:
    """Restoration at another size than the photo's, in either reading of the protocol.

    side: the size in pixels at which the restoration runs, for a damaged photo a multiple of its own. method: one of
    METHODS. stretch: apply `stretch_range` to clean images.
    """

    side: int
    method: str = "bicubic"
    stretch: bool = False

    def __post_init__(self) -> None:
        if self.side < 1:
            raise RestoreError(f"solve_at must be a number of pixels, got {self.side}")
        check_known([self.method], METHODS, "unknown resampling")

    def check_square(self, size: tuple[int, int], name: str) -> None:
        """Raise RestoreError, with its file's name, if a clean photo of this size cannot be resized to `side`."""
        if size[0] != size[1]:
            raise RestoreError(f"{name} must be square for solve_at={self.side} with degrade=True")

    def enlarge(self, clean: torch.Tensor, name: str) -> torch.Tensor:
        """Resize a square clean photo to `side`. Raises RestoreError as check_square does."""
        self.check_square(tuple(clean.shape[-2:]), name)
        return enlarge_image(clean, self.side, method=self.method)

    def adapt_operator(self, operator: Operator, size: tuple[int, int], name: str) -> Operator:
        """Return the operator for images of `side`, given the size at which `operator` measures. Raises RestoreError,
        with the photo's name, unless `side` is a multiple of the longer side."""
        longer = max(size)
        factor, rest = divmod(self.side, longer)
        if rest or factor < 1:
            raise RestoreError(f"solve_at must be a multiple of {longer}, the longer side of {name}, got {self.side}")
        return reduce_before(operator, factor) if factor > 1 else operator

    def reduce(self, samples: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Resize samples (B, K, 3, h, w) to (H, W)."""
        small = resize_image(samples.flatten(0, 1), size, method=self.method).clamp(-1, 1)
        return small.view(*samples.shape[:2], *small.shape[1:])


def select_resampling(side: int | None, method: str | None, reference: bool) -> Resampling | None:
    """Return the Resampling of the options solve_at, resample and reference, None without solve_at. Raises RestoreError
    for resample without solve_at."""
    if side is None and method is not None:
        raise RestoreError(f"resample={method} needs solve_at=")
    options = (REFERENCE if reference else {}) | ({} if method is None else {"method": method})
    return None if side is None else Resampling(side, **options)
