"""The tint of photos without colours: a grey scan stored as RGB, a sepia print."""

from __future__ import annotations

import torch
import torch.nn.functional as F

TYPICAL, LARGEST = 0.03, 0.08  # tolerated distances from the tint on [-1, 1]: root mean square and 99.9th percentile


def estimate_tint(x: torch.Tensor, known: torch.Tensor | None = None) -> torch.Tensor | None:
    """Return the tint (5, 3) of a photo (1, 3, H, W) that has one hue; None for a colour photo.

    Rows 0 to 3: the difference of each channel from the mean of the channels, as a cubic in that mean; row 4: the range
    of the mean, its upper end twice. A photo has one hue if the means of its blocks, without noise and compression,
    follow the cubic within 0.03 (root mean square) and 0.08 (99.9th percentile). known: (1, 1, H, W), 0 in holes, whose
    colour does not count.
    """
    side = max(1, min(8, min(x.shape[-2:]) // 16))
    blocks = F.avg_pool2d(x.double(), side)[0].flatten(1)
    if known is not None:
        share = F.avg_pool2d(known.double(), side)[0].flatten(1)
        blocks = (F.avg_pool2d(x.double() * known, side)[0].flatten(1) / share)[:, share[0] > 0]
    brightness = blocks.mean(0)
    powers = torch.stack([brightness**power for power in range(4)], 1)
    offsets = (blocks - brightness).T
    tint = torch.linalg.lstsq(powers, offsets, driver="gelsd").solution
    distance = (powers @ tint - offsets).abs().amax(1)
    if distance.square().mean().sqrt() > TYPICAL or distance.quantile(0.999) > LARGEST:
        return None
    low, high = brightness.aminmax()
    return torch.cat([tint, torch.stack([low, high, high])[None]])


def apply_tint(images: torch.Tensor, tint: torch.Tensor) -> torch.Tensor:
    """Return images (..., 3, H, W) with their brightness and the colours of `tint`, see `estimate_tint`."""
    brightness = images.double().mean(-3, keepdim=True)
    inside = brightness.clamp(float(tint[4, 0]), float(tint[4, 1]))
    offset = sum(inside**power * tint[power].to(images.device)[:, None, None] for power in range(4))
    return (brightness + offset).to(images.dtype)
