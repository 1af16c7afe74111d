"""Thin scratches, hairs and dust proposed as a mask, for a person to correct.

The rule's constants were chosen on damage drawn over the photos of docs/photo.md and on the same photos undamaged.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import scipy.fft
import scipy.ndimage as nd
import torch
import torch.nn.functional as F

from operators import RestoreError
from operators.validate import require_number
from restore.images.io import convert_channels

EIGHT = np.ones((3, 3))  # neighbours, the diagonal ones too
SIDE = 1024  # pixels of the shorter side beyond which a photo is looked at reduced
WIDEST = 0.022  # of the shorter side: wider things are no scratches
LINE, SPECK = 0.06, 0.04  # of the shorter side: shortest line, longest speck
GROWTH, SAME = 0.05, 0.08  # largest share of the photo a stain may cover; colour difference within one, on [-1, 1]


def detect_damage(x: torch.Tensor, sensitivity: float = 0.5) -> torch.Tensor:
    """A proposal (1, 1, H, W), 1 where the photo is to be kept, 0 where it looks damaged; all 1 where nothing does.

    x: one photo, (1 or 3, H, W) or (1, 1 or 3, H, W) in [-1, 1]. sensitivity: 0 (only the most obvious) to 1 (more
    found, more false alarms). What is brighter in all channels, or darker in all, than its surroundings and thinner
    than 2.2 % of the shorter side (a top-hat transform) counts by how far it stands out from the detail that is usual
    around it, how rare its brightness is in the photo, how alike its two sides are (a thing's contour has different
    ones) and how colourless it is. Of this come lines, where it goes on along one of 24 directions, and specks. Stains
    of its own colour that a line runs into are added. Raises RestoreError below 32 pixels a side, for several photos
    and for a sensitivity outside [0, 1].
    """
    sensitivity = require_number(sensitivity, "sensitivity", low=0.0, high=1.0)
    x = x[None] if x.ndim == 3 else x
    if len(x) != 1 or min(x.shape[-2:]) < 32:
        raise RestoreError(f"damage is looked for in one photo of 32 pixels a side or more, not {tuple(x.shape)}")
    x = convert_channels(x.detach().float().cpu(), 3).clamp(-1, 1)
    size, factor = x.shape[-2:], -(-min(x.shape[-2:]) // SIDE)
    small = F.avg_pool2d(x, factor, ceil_mode=True)[0].numpy()
    colour = small.max(0) - small.min(0)
    damaged = np.zeros(colour.shape, bool)
    for sign in (1, -1):  # bright, then dark
        extreme = F.max_pool2d(sign * x, factor, ceil_mode=True)  # a hair's width survives the reduction
        for box, piece in _pieces(extreme[0].amin(0).numpy(), colour, 3 * (0.5 - sensitivity)):
            damaged[box] |= piece
    if not damaged.any():
        return torch.ones(1, 1, *size)
    margin = 2 if min(damaged.shape) >= 200 else 1  # compression and scanning smear the edges
    damaged = nd.binary_dilation(_grown(small, damaged), EIGHT, iterations=margin)
    missing = torch.from_numpy(damaged).float()[None, None]
    return 1 - F.interpolate(missing, scale_factor=factor, mode="nearest")[..., : size[0], : size[1]]


def _pieces(plane: np.ndarray, colour: np.ndarray, strictness: float) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """(box, boolean piece) of what is bright, thin and out of place in `plane` (H, W); colour: max - min of channels.

    The weights of the two scores were fitted to drawn damage against the photos it was drawn on."""
    shorter = min(plane.shape)
    width = max(5, round(WIDEST * shorter) // 2 * 2 + 1)
    plane = nd.gaussian_filter(plane, 0.7)
    opened = nd.maximum_filter(nd.minimum_filter(plane, width), width)  # of a thin line's two sides the brighter
    contrast, unlike = plane - opened, opened - nd.minimum_filter(plane, width + 2)
    step = max(1, shorter // 128)
    usual = nd.uniform_filter(nd.percentile_filter(contrast[step // 2 :: step, step // 2 :: step], 75, 17), 9)
    usual = F.interpolate(torch.from_numpy(usual)[None, None], plane.shape, mode="bilinear")[0, 0].numpy()
    rarity = contrast / (1.5 * usual + 0.02)
    rank = 1 - np.searchsorted(np.sort(plane, axis=None), plane) / plane.size  # share of the photo that is brighter
    evidence = 2.3 * np.log(np.maximum(rarity, 1e-3)) - 0.9 * np.log(rank + 0.01)
    evidence -= 0.6 * np.log(unlike / np.maximum(contrast, 1e-3) + 0.02)
    evidence = np.where(contrast > 0.06, evidence, 0).clip(0, 10)
    along = _along_lines(nd.maximum_filter(evidence, 3), max(9, int(LINE * shorter) // 2 * 2 + 1))
    rows, columns = (np.minimum(np.arange(side), np.arange(side)[::-1]) < width for side in plane.shape)
    border = rows[:, None] | columns
    for box, piece in _labelled((evidence > 3) & (along > 3.5)):
        length = np.hypot(*piece.shape)
        if length < LINE * shorter or border[box][piece].mean() > 0.7:
            continue
        score = 0.65 * np.quantile(along[box][piece], 0.3) - 1.45 * np.log(piece.sum() / length**2)
        score += np.log(np.median(contrast[box][piece])) - 4 * _core(colour, contrast, box, piece)
        if score > 7.2 + strictness:
            yield box, piece
    for box, piece in _labelled((rarity > 3) & (contrast > 0.1)):
        area, length = piece.sum(), np.hypot(*piece.shape)
        if area < 3 or length > SPECK * shorter or area < 0.2 * length**2:
            continue
        score = np.quantile(evidence[box][piece], 0.7) - 3 * _core(colour, contrast, box, piece)
        if score > 7.2 + strictness:
            yield box, piece


def _labelled(where: np.ndarray) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """Connected pieces of a boolean (H, W), each within its box."""
    labels, _ = nd.label(where, EIGHT)
    for label, box in enumerate(nd.find_objects(labels), 1):
        yield box, labels[box] == label


def _core(values: np.ndarray, contrast: np.ndarray, box: tuple[slice, ...], piece: np.ndarray) -> float:
    """The median of `values` where the piece stands out most: not in its soft edges."""
    strength = contrast[box][piece]
    return float(np.median(values[box][piece][strength > 0.5 * np.quantile(strength, 0.8)]))


def _along_lines(evidence: np.ndarray, length: int, directions: int = 24) -> np.ndarray:
    """(H, W): the largest of the means along straight lines of `length` (odd) pixels through each pixel."""
    reach = length // 2
    across = np.arange(length) - reach
    padded = np.pad(evidence, reach, mode="reflect")
    shape = [scipy.fft.next_fast_len(side, True) for side in padded.shape]
    spectrum, best = scipy.fft.rfft2(padded, shape), None
    for angle in np.pi * np.arange(directions) / directions:
        off = np.abs(across[:, None] * np.cos(angle) - across * np.sin(angle))
        on = np.abs(across[:, None] * np.sin(angle) + across * np.cos(angle)) <= length / 2
        line = np.clip(1 - off, 0, 1) * on
        mean = scipy.fft.irfft2(spectrum * scipy.fft.rfft2((line / line.sum()).astype(np.float32), shape), shape)
        mean = mean[2 * reach : padded.shape[0], 2 * reach : padded.shape[1]]
        best = mean if best is None else np.maximum(best, mean)
    return best


def _grown(photo: np.ndarray, damaged: np.ndarray) -> np.ndarray:
    """The damage with the stains of its own colour that it touches; photo: (3, H, W)."""
    grown = damaged.copy()
    for box, piece in _labelled(damaged):
        if np.hypot(*piece.shape) < 0.1 * min(damaged.shape):
            continue
        colour = np.median(photo[(slice(None), *box)][:, piece], axis=1)
        difference = np.abs(photo - colour[:, None, None]).max(0)
        alike, _ = nd.label(difference < SAME)
        touched = np.unique(alike[box][piece])
        stain = np.isin(alike, touched[touched > 0])
        around = nd.binary_dilation(stain, EIGHT, iterations=3) & ~nd.binary_dilation(stain, EIGHT)
        if (stain & ~damaged).sum() > GROWTH * damaged.size or not around.any():
            continue
        if np.quantile(difference[around], 0.2) > 3 * SAME:  # else it fades into a part of the picture
            grown |= stain
    return grown
