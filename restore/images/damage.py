"""Thin scratches, hairs and dust proposed as a mask, for a person to correct.

The rule's constants were chosen on damage drawn over the photos of docs/photo.md and on the same photos undamaged.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import scipy.ndimage as nd
import torch
import torch.nn.functional as F

from operators import RestoreError
from operators.validate import number
from restore.images.io import with_channels

SIDE = 1024  # pixels of the shorter side beyond which a photo is looked at reduced
WIDEST = 0.022  # of the shorter side: wider things are no scratches
CONTRAST, RARITY = 0.1, 3.0  # on [-1, 1], and in units of what is usual around: below them nothing is looked at
GROWTH, SAME = 0.03, 0.08  # largest share of the photo a stain may cover; colour difference within one, on [-1, 1]


def damage_mask(x: torch.Tensor, sensitivity: float = 0.5) -> torch.Tensor:
    """A proposal (1, 1, H, W), 1 where the photo is to be kept, 0 where it looks damaged; all 1 where nothing does.

    x: one photo, (1 or 3, H, W) or (1, 1 or 3, H, W) in [-1, 1]. sensitivity: 0 (only the most obvious) to 1 (more
    found, more false alarms). What is brighter in all channels, or darker in all, than its surroundings and thinner
    than 2.2 % of the shorter side (a top-hat transform) is judged piece by piece: how far it stands out from the detail
    that is usual around it, how rare its brightness is in the photo, how alike its two sides are (a thing's contour
    has different ones), and its shape: a speck or a long line, no border. Stains of the same colour that such a line
    runs into are added. Raises RestoreError below 32 pixels a side, for several photos and another sensitivity.
    """
    sensitivity = number(sensitivity, "sensitivity", low=0.0, high=1.0)
    x = x[None] if x.ndim == 3 else x
    if len(x) != 1 or min(x.shape[-2:]) < 32:
        raise RestoreError(f"damage is looked for in one photo of 32 pixels a side or more, not {tuple(x.shape)}")
    x = with_channels(x.detach().float().cpu(), 3).clamp(-1, 1)
    size, factor = x.shape[-2:], -(-min(x.shape[-2:]) // SIDE)
    damaged = np.zeros([-(-side // factor) for side in size], bool)
    for sign in (1, -1):  # bright, then dark
        extreme = F.max_pool2d(sign * x, factor, ceil_mode=True)  # a hair's width survives the reduction
        for box, piece in _pieces(extreme.amin(1, keepdim=True), threshold=9 - 3 * sensitivity):
            damaged[box] |= piece
    if not damaged.any():
        return torch.ones(1, 1, *size)
    small = F.interpolate(x, damaged.shape, mode="area")[0].numpy() if factor > 1 else x[0].numpy()
    margin = 2 if min(damaged.shape) >= 200 else 1  # compression and scanning smear the edges
    damaged = nd.binary_dilation(_grown(small, damaged), np.ones((3, 3)), iterations=margin)
    missing = torch.from_numpy(damaged)[None, None].float()
    missing = F.interpolate(missing, scale_factor=factor, mode="nearest")[..., : size[0], : size[1]]
    return 1 - missing


def _pieces(bright: torch.Tensor, threshold: float) -> Iterator[tuple[tuple[slice, slice], np.ndarray]]:
    """(box, boolean piece) of what is bright, thin and out of place in a plane (1, 1, H, W)."""
    shorter = min(bright.shape[-2:])
    width = max(5, round(WIDEST * shorter) // 2 * 2 + 1)
    plane = nd.gaussian_filter(bright[0, 0].numpy(), 0.7)
    lowest = nd.minimum_filter(plane, width)
    opened = nd.maximum_filter(lowest, width)  # of the two sides of a thin line the brighter
    contrast, sides = plane - opened, opened - nd.minimum_filter(plane, width + 2)
    step = max(1, shorter // 128)
    usual = nd.uniform_filter(nd.percentile_filter(contrast[step // 2 :: step, step // 2 :: step], 75, 17), 9)
    usual = F.interpolate(torch.from_numpy(usual)[None, None], plane.shape, mode="bilinear")[0, 0].numpy()
    rarity = contrast / (1.5 * usual + 0.02)
    labels, _ = nd.label((rarity > RARITY) & (contrast > CONTRAST), np.ones((3, 3)))
    ordered = np.sort(plane, axis=None)
    rows, columns = (np.minimum(np.arange(side), np.arange(side)[::-1]) < width for side in plane.shape)
    for label, box in enumerate(nd.find_objects(labels), 1):
        piece = labels[box] == label
        area = int(piece.sum())
        if area < 3:
            continue
        strength = contrast[box][piece]
        typical = np.quantile(strength, 0.7)
        level = np.median(plane[box][piece][strength > 0.6 * typical])
        rank = 1 - np.searchsorted(ordered, level) / ordered.size  # share of the photo that is brighter
        unlike = np.median(sides[box][piece]) / typical
        score = 2.3 * np.log(np.quantile(rarity[box][piece], 0.7))
        score -= 0.9 * np.log(rank + 0.01) + 0.6 * np.log(unlike + 0.02)
        length = np.hypot(*piece.shape)
        at_border = (rows[box[0], None] | columns[None, box[1]])[piece].mean()
        line = length > 0.04 * shorter and area < 0.12 * length**2
        line = line and unlike < 0.5 and rank < 0.4 and at_border < 0.7 and score > threshold - 0.5
        speck = length <= 0.04 * shorter and area > 0.2 * length**2 and score > threshold
        if line or speck:
            yield box, piece


def _grown(photo: np.ndarray, damaged: np.ndarray) -> np.ndarray:
    """The damage with the stains of its own colour that it touches; photo: (3, H, W)."""
    labels, _ = nd.label(damaged, np.ones((3, 3)))
    grown = damaged.copy()
    for label, box in enumerate(nd.find_objects(labels), 1):
        piece = labels[box] == label
        if np.hypot(*piece.shape) < 0.1 * min(damaged.shape):
            continue
        colour = np.median(photo[(slice(None), *box)][:, piece], axis=1)
        alike, _ = nd.label(np.abs(photo - colour[:, None, None]).max(0) < SAME)
        touched = np.unique(alike[box][piece])
        stain = np.isin(alike, touched[touched > 0])
        if stain.sum() < GROWTH * damaged.size + piece.sum():
            grown |= stain
    return grown
