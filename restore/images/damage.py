"""Detection of thin scratches, hairs and dust, as a mask for a person to correct.

All constants were fitted to damage drawn over the photos of docs/photo.md and to the undamaged photos.
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

Box = tuple[slice, ...]
Piece = tuple[Box, np.ndarray]  # a box in the photo and a boolean array of its size

EIGHT = np.ones((3, 3))  # neighbours, including diagonal ones
SIDE = 1024  # pixels; photos with a longer shorter side are reduced first
WIDEST = 0.022  # of the shorter side: largest width of a scratch
LINE, SPECK = 0.06, 0.04  # of the shorter side: shortest line, longest speck
FEW = 2  # specks that may be lights: in an eye, on china
BELIEVED = 7.2  # score of a structure that is damage
# Score for a line that ends within the photo, shorter than so much of its shorter side, as few edges of things do.
ENDING, WHOLE = 0.5, 0.9
AGREE = 0.4  # difference in colour, on [-1, 1], of the core of damage from that of damage that is certain
GROWTH, SAME = 0.05, 0.08  # largest share of the photo a stain may cover; colour difference within one, on [-1, 1]


def detect_damage(x: torch.Tensor, sensitivity: float = 0.5, certain: float = 1.0) -> torch.Tensor:
    """Return a mask (1, 1, H, W): 0 where the photo looks damaged, 1 elsewhere.

    x: one photo, (1 or 3, H, W) or (1, 1 or 3, H, W) in [-1, 1]. sensitivity: 0 (only the most obvious damage) to 1
    (more damage, more false alarms). certain: no damage is returned unless, with this sensitivity, a line
    would be, or more than FEW specks; then with it only what has the colour of what is certain.

    Structures brighter, or darker, than their surroundings in all channels and thinner than 2.2 % of the shorter side
    (a top-hat transform) are scored by their contrast to the detail around them, the rarity of their brightness, the
    similarity of their two sides and their lack of colour. They count as lines if they continue along one of 24
    directions, or as specks. Stains of the same colour that touch a line are added.
    Raises RestoreError below 32 pixels a side, for several photos and for a sensitivity outside [0, 1].
    """
    sensitivity = require_number(sensitivity, "sensitivity", low=0.0, high=1.0)
    x = x[None] if x.ndim == 3 else x
    if len(x) != 1 or min(x.shape[-2:]) < 32:
        raise RestoreError(f"damage is detected in one photo of at least 32 pixels a side, got {tuple(x.shape)}")
    x = convert_channels(x.detach().float().cpu(), 3).clamp(-1, 1)
    size, factor = x.shape[-2:], -(-min(x.shape[-2:]) // SIDE)
    small = F.avg_pool2d(x, factor, ceil_mode=True)[0].numpy()
    colour = small.max(0) - small.min(0)
    found, lines, specks = [], [], []
    for sign in (1, -1):
        extreme = F.max_pool2d(sign * x, factor, ceil_mode=True)  # keeps lines thinner than the factor
        for box, piece, score in _find_pieces(extreme[0].amin(0).numpy(), colour, 3 * (0.5 - sensitivity)):
            length = np.hypot(*piece.shape) / min(colour.shape)
            score += ENDING * (LINE <= length < WHOLE)
            (lines if length >= LINE else specks).append(score)
            core = np.quantile(small[(slice(None), *box)][:, piece], 0.5 + 0.4 * sign, axis=1)
            found.append((box, piece, core, score))
    if certain < 1:
        found = _keep_believed(found, max([*lines, *sorted(specks)[:-FEW]], default=-np.inf), 3 * (0.5 - certain))
    damaged = np.zeros(colour.shape, bool)
    for box, piece, *_ in found:
        damaged[box] |= piece
    if not damaged.any():
        return torch.ones(1, 1, *size, dtype=torch.float32)
    margin = 2 if min(damaged.shape) >= 200 else 1  # compression and scanning smear the edges
    damaged = nd.binary_dilation(_add_stains(small, damaged), EIGHT, iterations=margin)
    missing = torch.from_numpy(damaged).float()[None, None]
    return 1 - F.interpolate(missing, scale_factor=factor, mode="nearest")[..., : size[0], : size[1]]


def _keep_believed(found: list[tuple], best: float, certain: float) -> list[tuple]:
    """Return the structures that have the colour of a certain one; none if the best score is not certain. found: box,
    piece, colour of its core, score."""
    sure = [colour for *_, colour, score in found if score > certain] if best > certain else []
    return [each for each in found if any(np.abs(each[2] - colour).max() < AGREE for colour in sure)]


def _find_pieces(plane: np.ndarray, colour: np.ndarray, strictness: float) -> Iterator[tuple[Box, np.ndarray, float]]:
    """Yield the bright, thin, conspicuous structures in `plane` (H, W) and their scores above `strictness`; colour:
    max - min of the channels."""
    shorter = min(plane.shape)
    width = max(5, round(WIDEST * shorter) // 2 * 2 + 1)
    plane = nd.gaussian_filter(plane, 0.7)
    opened = nd.maximum_filter(nd.minimum_filter(plane, width), width)  # the brighter side of a thin line
    contrast, unlike = plane - opened, opened - nd.minimum_filter(plane, width + 2)
    step = max(1, shorter // 128)
    usual = nd.uniform_filter(nd.percentile_filter(contrast[step // 2 :: step, step // 2 :: step], 75, 17), 9)
    usual = F.interpolate(torch.from_numpy(usual)[None, None], plane.shape, mode="bilinear")[0, 0].numpy()
    rarity = contrast / (1.5 * usual + 0.02)
    rank = 1 - np.searchsorted(np.sort(plane, axis=None), plane) / plane.size  # fraction of the photo that is brighter
    evidence = 2.3 * np.log(np.maximum(rarity, 1e-3)) - 0.9 * np.log(rank + 0.01)
    evidence -= 0.6 * np.log(unlike / np.maximum(contrast, 1e-3) + 0.02)
    evidence = np.where(contrast > 0.06, evidence, 0).clip(0, 10)
    along = _average_along_lines(nd.maximum_filter(evidence, 3), max(9, int(LINE * shorter) // 2 * 2 + 1))
    rows, columns = (np.minimum(np.arange(side), np.arange(side)[::-1]) < width for side in plane.shape)
    border = rows[:, None] | columns
    for box, piece in _label_pieces((evidence > 3) & (along > 3.5)):
        length = np.hypot(*piece.shape)
        if length < LINE * shorter or border[box][piece].mean() > 0.7:
            continue
        score = 0.65 * np.quantile(along[box][piece], 0.3) - 1.45 * np.log(piece.sum() / length**2)
        score += np.log(np.median(contrast[box][piece])) - 4 * _core_median(colour, contrast, box, piece)
        if score - BELIEVED > strictness:
            yield box, piece, score - BELIEVED
    for box, piece in _label_pieces((rarity > 3) & (contrast > 0.1)):
        area, length = piece.sum(), np.hypot(*piece.shape)
        if area < 3 or length > SPECK * shorter or area < 0.2 * length**2:
            continue
        score = np.quantile(evidence[box][piece], 0.7) - 3 * _core_median(colour, contrast, box, piece)
        if score - BELIEVED > strictness:
            yield box, piece, score - BELIEVED


def _label_pieces(where: np.ndarray) -> Iterator[Piece]:
    """Yield the connected pieces of a boolean (H, W), each within its box."""
    labels, _ = nd.label(where, EIGHT)
    for label, box in enumerate(nd.find_objects(labels), 1):
        yield box, labels[box] == label


def _core_median(values: np.ndarray, contrast: np.ndarray, box: Box, piece: np.ndarray) -> float:
    """Return the median of `values` where the piece has most contrast, without its soft edges."""
    strength = contrast[box][piece]
    return float(np.median(values[box][piece][strength > 0.5 * np.quantile(strength, 0.8)]))


def _average_along_lines(evidence: np.ndarray, length: int, directions: int = 24) -> np.ndarray:
    """Return (H, W): the largest mean along a straight line of `length` (odd) pixels through each pixel."""
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


def _add_stains(photo: np.ndarray, damaged: np.ndarray) -> np.ndarray:
    """Return the damage with the stains of the same colour that it touches; photo: (3, H, W)."""
    result = damaged.copy()
    for box, piece in _label_pieces(damaged):
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
        if np.quantile(difference[around], 0.2) > 3 * SAME:  # not if it fades into its surroundings
            result |= stain
    return result
