"""The protocol of the published PSLD numbers: 256-pixel images, solved with a prior trained at 512.

An option for reproducing tables, not a default: a photo is better restored at its own size. Two readings:

- measured at 512 (the authors' code): `enlarge` the clean image, degrade it at 512, restore, `reduce` the
  result to 256. "Super-resolution x8" then means from 64 to 512, and a blur of 3 pixels is one of 1.5.
- measured at 256: degrade at 256, restore with `measured_small(operator)`, which reduces before it measures.

The known pixels of the ground truth are never pasted into a result, as the authors' inpainting script does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from operators import Compose, Operator, RestoreError, SuperResolution

REFERENCE = {"method": "nearest", "stretch": True}
"""The authors' resampling, as keywords of `enlarge` (and its method of `reduce`)."""


def enlarge(image: torch.Tensor, size: int = 512, *, method: str = "bicubic", stretch: bool = False) -> torch.Tensor:
    """image (B, 3, H, W) in [-1, 1] at size x size; the overshoot of the bicubic filter is clamped.

    method: "bicubic" (antialiased, a = -0.5, as Pillow's) or "nearest" (the authors').
    stretch: first map each image's darkest value to -1 and its brightest to 1, as the authors do; the result
        is then compared with the stretched image. Raises RestoreError for an unknown method.
    """
    if stretch:
        flat = image.flatten(1)
        low, high = flat.amin(1).view(-1, 1, 1, 1), flat.amax(1).view(-1, 1, 1, 1)
        image = 2 * (image - low) / (high - low).clamp(min=1e-8) - 1
    return _resize(image, size, method).clamp(-1, 1)


def reduce(image: torch.Tensor, size: int = 256, *, method: str = "bicubic") -> torch.Tensor:
    """A result (B, 3, H, W) at size x size for the metrics; "bicubic" is antialiased, "nearest" is the authors'."""
    return _resize(image, size, method)


def measured_small(operator: Operator, factor: int = 2) -> Operator:
    """The operator of images `factor` times smaller than the one that is restored: y = A(reduced x) + n.

    The reduction is the antialiased bicubic of `operators.SuperResolution`; the noise stays the operator's.
    """
    return Compose(SuperResolution(factor), operator)


def _resize(image: torch.Tensor, size: int, method: str) -> torch.Tensor:
    if method == "nearest":
        return F.interpolate(image, size=(size, size), mode="nearest")
    if method == "bicubic":
        return F.interpolate(image, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    raise RestoreError(f"resampling {method!r} is not known; expected bicubic or nearest")
