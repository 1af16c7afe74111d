"""The protocol of the published PSLD numbers: 256-pixel images, solved with a prior trained at 512.

An option for reproducing tables, not a default: a photo is better restored at its own size. Two readings:

- measured at 512 (the authors' code): `enlarge_image` the clean image, degrade it at 512, restore, `reduce_image` the
  result to 256. "Super-resolution x8" then means from 64 to 512, and a blur of 3 pixels is one of 1.5.
- measured at 256: degrade at 256, restore with `reduce_before(operator)`, which reduces before it measures.

The known pixels of the ground truth are never pasted into a result, as the authors' inpainting script does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from operators import Compose, Operator, RestoreError, SuperResolution
from operators.naming import check_known

METHODS = {"bicubic": {"mode": "bicubic", "antialias": True, "align_corners": False}, "nearest": {"mode": "nearest"}}
"""How images are resized, as keywords of torch's `interpolate`: bicubic is antialiased, a = -0.5, as Pillow's."""

REFERENCE = {"method": "nearest", "stretch": True}
"""The authors' resampling, as keywords of `enlarge_image` (and its method of `reduce_image`)."""


def stretch_range(image: torch.Tensor) -> torch.Tensor:
    """image (B, C, H, W) with each image's darkest value at -1 and its brightest at 1, as the authors load theirs.

    The result is then compared with the stretched image. A constant image becomes -1.
    """
    flat = image.flatten(1)
    low, high = flat.amin(1).view(-1, 1, 1, 1), flat.amax(1).view(-1, 1, 1, 1)
    return 2 * (image - low) / (high - low).clamp(min=1e-8) - 1


def enlarge_image(
    image: torch.Tensor, size: int = 512, *, method: str = "bicubic", stretch: bool = False
) -> torch.Tensor:
    """image (B, 3, H, W) in [-1, 1] at size x size; the overshoot of the bicubic filter is clamped.

    method: one of METHODS; "nearest" is the authors'. stretch: see `stretch_range`, applied first.
    Raises RestoreError for an unknown method.
    """
    if stretch:
        image = stretch_range(image)
    return _resize(image, size, method).clamp(-1, 1)


def reduce_image(image: torch.Tensor, size: int | tuple[int, int] = 256, *, method: str = "bicubic") -> torch.Tensor:
    """A result (B, 3, H, W) at size x size, or (H, W), for the metrics; method: one of METHODS."""
    return _resize(image, size, method)


def reduce_before(operator: Operator, factor: int = 2) -> Operator:
    """The operator of images `factor` times smaller than the one that is restored: y = A(reduced x) + n.

    The reduction is the antialiased bicubic of `operators.SuperResolution`; the noise stays the operator's, and
    its name, by which presets are found.
    """
    composed = Compose(SuperResolution(factor), operator)
    composed.name = operator.name
    return composed


@dataclass(frozen=True)
class Resampling:
    """Restoring at another size than the photo's: either reading of the protocol.

    side: the size, in pixels, at which the restoration runs. method: one of METHODS; stretch: the authors' min-max
    scaling of clean images. A clean photo is enlarged and then degraded; a damaged one was measured at
    its own size and is restored at a whole multiple of it.
    """

    side: int
    method: str = "bicubic"
    stretch: bool = False

    def __post_init__(self) -> None:
        if self.side < 1:
            raise RestoreError(f"solve_at={self.side} must be a number of pixels")
        check_known([self.method], METHODS, "unknown resampling")

    def prepare_truth(self, clean: torch.Tensor) -> torch.Tensor:
        return stretch_range(clean) if self.stretch else clean

    def enlarge(self, clean: torch.Tensor, name: str) -> torch.Tensor:
        if clean.shape[-1] != clean.shape[-2]:
            raise RestoreError(f"{name} is not square; solve_at={self.side} needs a square photo with degrade=True")
        return enlarge_image(clean, self.side, method=self.method)

    def enlarge_mask(self, mask: torch.Tensor) -> torch.Tensor:
        return _resize(mask, self.side, "nearest")

    def adapt_operator(self, operator, size: tuple[int, int], name: str):
        factor, rest = divmod(self.side, max(size))
        if rest or factor < 1:
            raise RestoreError(
                f"solve_at={self.side} is no multiple of the longer side of {name}'s restoration, {max(size)}"
            )
        return reduce_before(operator, factor) if factor > 1 else operator

    def reduce(self, samples: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Samples (B, K, 3, h, w) at size (H, W)."""
        small = reduce_image(samples.flatten(0, 1), size, method=self.method).clamp(-1, 1)
        return small.view(*samples.shape[:2], *small.shape[1:])


def select_resampling(side: int | None, method: str | None, reference: bool) -> Resampling | None:
    """What solve_at, resample and reference ask for; with `reference` the authors' method and stretching."""
    if side is None:
        if method is not None:
            raise RestoreError(f"resample={method} needs solve_at=: nothing is resampled without it")
        return None
    chosen = dict(REFERENCE) if reference else {}
    return Resampling(side, **chosen | ({} if method is None else {"method": method}))


def _resize(image: torch.Tensor, size: int | tuple[int, int], method: str) -> torch.Tensor:
    check_known([method], METHODS, "unknown resampling")
    return F.interpolate(image, size=size, **METHODS[method])
