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


def find_paint(x: torch.Tensor) -> torch.Tensor:
    """Return a mask (1, 1, H, W) of a photo (1, 3, H, W) in [-1, 1]: 0 where it is painted over or missing, else 1.

    Each channel of such a pixel is 0 or 255, and next to its piece almost no pixel has nearly that colour, as pixels
    beside clipped light have; a frame is no damage. Compression and enlargement blend the edges: then nothing is found.
    """
    levels = np.rint((x[0].double().cpu().numpy() + 1) * 127.5)
    pure = ((levels == 0) | (levels == 255)).all(0)
    painted = np.zeros(pure.shape, bool)
    for colour in product((0, 255), repeat=3) if pure.any() else ():
        apart = np.abs(levels - np.reshape(colour, (3, 1, 1)))
        near = (apart.max(0) < APART) | (apart.min(0) == 0)  # noise is clipped in one channel or another
        found = _find_pieces(apart.max(0), near, pure)
        if found.mean() >= LEAST:
            painted |= found
    return torch.from_numpy(~painted).float()[None, None]


def _find_pieces(distance: np.ndarray, near: np.ndarray, pure: np.ndarray) -> np.ndarray:
    """Return where (H, W) the painted pieces are of a colour. distance: of every pixel from it; near: is it nearly it;
    pure: of any such colour."""
    labels, count = nd.label(distance == 0, EIGHT)
    # A pixel beside several pieces counts for each, through every neighbour that it has in one.
    beside, blended, total, squares = np.zeros((4, count + 1))
    padded, others = np.pad(labels, 1), ~pure
    for row, column in product(range(3), repeat=2):
        at = padded[row : row + pure.shape[0], column : column + pure.shape[1]][others]
        for sums, values in ((beside, None), (blended, near), (total, distance), (squares, distance**2)):
            sums += np.bincount(at, None if values is None else values[others], minlength=count + 1)
    area = np.bincount(labels.ravel(), minlength=count + 1)
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
