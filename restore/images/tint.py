"""A photo of one hue stays so: a grey scan stored as RGB, a sepia print."""

from __future__ import annotations

import torch
import torch.nn.functional as F

TYPICAL, LARGEST = 0.03, 0.08  # on [-1, 1]: how far blocks of a photo without colours may be off its one hue


def estimate_tint(x: torch.Tensor) -> torch.Tensor | None:
    """The tint of a photo without colours of its own (1, 3, H, W): (5, 3); None for a colour photo.

    Rows 0 to 3: what each channel differs from their mean, as a cubic of it; 4: the mean's range, repeated. A photo has
    one hue where the means of its blocks, so that noise and compression do not count, follow that cubic: 0.03 root mean
    square, 0.08 at the farthest 0.1 %. A single coloured thing, however small, is colour.
    """
    blocks = F.avg_pool2d(x.double(), max(1, min(8, min(x.shape[-2:]) // 16)))[0].flatten(1)
    brightness = blocks.mean(0)
    powers = torch.stack([brightness**power for power in range(4)], 1)
    offsets = (blocks - brightness).T
    tint = torch.linalg.lstsq(powers, offsets, driver="gelsd").solution
    off = (powers @ tint - offsets).abs().amax(1)
    if off.square().mean().sqrt() > TYPICAL or off.quantile(0.999) > LARGEST:
        return None
    low, high = brightness.aminmax()
    return torch.cat([tint, torch.stack([low, high, high])[None]])


def apply_tint(images: torch.Tensor, tint: torch.Tensor) -> torch.Tensor:
    """Images (..., 3, H, W) with the brightness they have and the colours of `tint`, see `one_hue`."""
    brightness = images.double().mean(-3, keepdim=True)
    inside = brightness.clamp(float(tint[4, 0]), float(tint[4, 1]))
    offset = sum(inside**power * tint[power].to(images.device)[:, None, None] for power in range(4))
    return (brightness + offset).to(images.dtype)
