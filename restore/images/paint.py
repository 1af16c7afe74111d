"""Pixels that are missing or painted over: of one pure colour, with edges that no lens makes."""

from __future__ import annotations

from itertools import product

import numpy as np
import scipy.ndimage as nd
import torch

EIGHT = np.ones((3, 3))  # neighbours, including diagonal ones
APART = 24  # of 255; a neighbour's distance from the colour, which clipped light falls short of
BLENDED = 0.1  # largest share of neighbours that are nearer, of a painted piece
LARGE = 30  # pixels; smaller pieces are believed together or not at all
# Times the standard deviation of its neighbours: the distance of a small piece, which noise falls short of.
OUTLYING = 3
MOST, LEAST = 0.6, 1e-3  # share of the small pieces' pixels that are painted; of the photo's
THIN = 1.3  # neighbours of other colours that a pixel of a line has, up to 4 pixels wide; those of a hole have less
FRAMED = 0.5  # share of one side of the photo, from which on a piece is a frame
BAND = 1 << 20  # pixels at a time: nobody has planned yet for the memory that a large photo takes


def find_paint(x: torch.Tensor) -> torch.Tensor:
    """Return a mask (1, 1, H, W) of a photo (1, 3, H, W) in [-1, 1]: 0 where it is painted over or missing, else 1.

    Each channel of such a pixel is 0 or 255, and next to its piece almost no pixel has nearly that colour, as pixels
    beside clipped light have; a frame is no damage. Compression and enlargement blend the edges: then nothing is found.
    """
    levels = np.empty(x.shape[1:], np.uint8)
    for rows in _list_bands(levels.shape[1:]):
        band = np.rint((x[0, :, rows].double().cpu().numpy() + 1) * 127.5)
        levels[:, rows] = band.clip(0, 255)
    pure = ((levels == 0) | (levels == 255)).all(0)
    painted = np.zeros(pure.shape, bool)
    for colour in product((0, 255), repeat=3) if pure.any() else ():
        furthest, nearest = (_measure_distance(levels, colour, choose) for choose in (np.maximum, np.minimum))
        near = (furthest < APART) | (nearest == 0)  # noise is clipped in one channel or another
        found = _find_pieces(furthest, near, pure)
        if found.mean() >= LEAST:
            painted |= found
    return torch.from_numpy(~painted).float()[None, None]


def _list_bands(size: tuple[int, ...]) -> list[slice]:
    """The rows of a picture of this size (H, W), in bands of BAND pixels."""
    height, step = size[0], max(1, BAND // size[1])
    return [slice(top, min(top + step, height)) for top in range(0, height, step)]


def _measure_distance(levels: np.ndarray, colour: tuple[int, ...], choose: np.ufunc) -> np.ndarray:
    """The distance (H, W) of every pixel from a colour of 0 and 255, in the channel that is chosen; uint8 as levels."""
    distance = None
    for level, end in zip(levels, colour, strict=True):
        apart = level if end == 0 else 255 - level
        distance = apart.copy() if distance is None else choose(distance, apart, out=distance)
    return distance


def _find_pieces(distance: np.ndarray, near: np.ndarray, pure: np.ndarray) -> np.ndarray:
    """Return where (H, W) the painted pieces are of a colour. distance: of every pixel from it; near: is it nearly it;
    pure: of any such colour."""
    labels, count = nd.label(distance == 0, EIGHT)
    # A pixel beside several pieces counts for each, through every neighbour that it has in one.
    sums = np.zeros((4, count + 1))  # of whole numbers: the same in any order
    area = np.zeros(count + 1, int)
    for rows in _list_bands(pure.shape):
        area += np.bincount(labels[rows].ravel(), minlength=count + 1)
        others, above = ~pure[rows], max(rows.start - 1, 0)
        far = distance[rows][others].astype(float)
        values = (None, near[rows][others], far, far**2)
        padded = np.pad(labels[above : rows.stop + 1], ((rows.start == 0, rows.stop >= len(pure)), (1, 1)))
        for row, column in product(range(3), repeat=2):
            at = padded[row : row + others.shape[0], column : column + others.shape[1]][others]
            for k, weights in enumerate(values):
                sums[k] += np.bincount(at, weights, minlength=count + 1)
    beside, blended, total, squares = sums
    sides = (labels[0], labels[-1], labels[:, 0], labels[:, -1])
    framed = np.max([np.bincount(side, minlength=count + 1) / len(side) for side in sides], axis=0) > FRAMED
    painted = (beside > 0) & (blended <= BLENDED * beside) & ~framed
    small = (area < LARGE) & ~framed
    painted[0] = small[0] = False
    mean = total / np.maximum(beside, 1)
    outlying = mean**2 > OUTLYING**2 * (squares / np.maximum(beside, 1) - mean**2)
    # A small piece in dark or light surroundings, or in strong detail, is told by the others alone.
    painted = np.where(small, area[small & painted & outlying].sum() > MOST * area[small].sum(), painted)
    thin = beside > THIN * area
    if beside[painted].sum() > THIN * area[painted].sum():  # lines and pixels: the others, too, in the light
        painted |= thin & ~small & ~framed & (area > 0)
        painted[0] = False
    return painted[labels]
