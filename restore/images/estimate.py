"""Blind estimates from a degraded photo: noise, blur, and the kernel of a path drawn by hand.

Tested on 8 Kodak photos and the three of data/photos; figures in docs/photo.md. Damage: see damage.py.
"""

from __future__ import annotations

import math

import numpy as np
import scipy.ndimage
import torch
import torch.nn.functional as F

from operators import RestoreError
from operators.kernels import LARGEST, rasterise
from operators.validate import require_integer
from restore.images.damage import detect_damage
from restore.images.io import convert_channels

__all__ = ["detect_damage", "estimate_blur", "estimate_noise", "find_blur", "measure_grey_share", "rasterise_path"]

BLOCK = 8  # pixels; side of the blocks in which noise is measured
SMALLEST = 4 * BLOCK  # pixels a side of a photo in which anything is measured
SMOOTH, FEWEST = 0.15, 6  # fraction of blocks used, those without structure, and their least number
WHITE = 0.8  # smallest ratio of fine to coarse energy of white noise; below it chroma was subsampled or denoised
CLEAR = 12  # times the noise: slopes of edges from which their blur is measured
BLURRED, SOFT = 1.1, 1.0  # pixels, of a photo that is called blurred: its blur and that of its sharper edges
MIDDLE = 1536  # pixels; blur is measured in a centre crop of this side
LIMIT = 1 - 1 / 255  # largest absolute value that is not clipped in 8 bits
_OPPONENT = ((1, 1, 1), (1, 0, -1), (1, -2, 1))  # brightness and two colour differences


def estimate_noise(x: torch.Tensor, known: torch.Tensor | None = None) -> float:
    """Return the standard deviation, on [-1, 1], of the white Gaussian noise in a photo (sigma_y).

    x: (1 or 3, H, W) or (B, 1 or 3, H, W) in [-1, 1]; a batch holds crops of one photo. known: (H, W), 0 where the
    photo shows a hole; blocks that touch one are left out.

    The estimate is the energy of the finest diagonal Haar detail (Donoho & Johnstone 1994) in the 15 % of blocks with
    least coarse detail, for colour photos also of the colour differences, which have little texture. Flat and nearly
    clipped blocks are ignored, and so is colour whose fine detail was removed (chroma subsampling of JPEG).
    Returns 0 for a flat image, and if holes leave no block. Raises RestoreError below 32 pixels a side.
    """
    x = _as_batch(x, "noise")
    holes = None if known is None else (known.reshape(1, 1, *x.shape[-2:]) < 0.5).float().expand(len(x), -1, -1, -1)
    if measure_grey_share(x) == 1:
        x = x[:, :1]
    planes = [_Blocks(plane, holes) for plane in x.split(1, 1)]
    brightest = torch.stack([block.mean.abs() for block in planes]).amax(0)
    colours = []
    if len(planes) == 3:
        matrix = F.normalize(x.new_tensor(_OPPONENT))
        opponent = torch.einsum("oc,bchw->bohw", matrix, x)
        colours = [_Blocks(plane, holes) for plane in opponent.split(1, 1)[1:]]
    sigma = 0.0
    for _ in range(3):  # which blocks are nearly clipped depends on sigma
        inside = brightest < LIMIT - min(2 * sigma, 0.6)
        sigma = math.sqrt(sum(plane.energies(inside)[0] for plane in planes) / len(planes))
        pairs = [colour.energies(inside) for colour in colours]
        if pairs and min(fine / max(coarse, 1e-12) for fine, coarse in pairs) > WHITE**2:
            sigma = min(sigma, math.sqrt(max(fine for fine, _ in pairs)))
    return sigma


class _Blocks:
    """Blocks of a plane (B, 1, H, W), flattened: mean, coarse variance, energy of the two finest levels of detail,
    which is 0 in blocks that see one of the holes (B, 1, H, W)."""

    def __init__(self, plane: torch.Tensor, holes: torch.Tensor | None = None) -> None:
        height, width = (side // (2 * BLOCK) * 2 * BLOCK for side in plane.shape[-2:])
        low = F.avg_pool2d(plane[..., :height, :width], 2)
        mean = F.avg_pool2d(low, BLOCK // 2)
        self.mean = mean.flatten()
        self.coarse = (F.avg_pool2d(low**2, BLOCK // 2) - mean**2).flatten()
        self.fine = self._energy(plane[..., :height, :width], BLOCK)
        self.next = self._energy(low, BLOCK // 2) * 4  # equal to the finest for white noise
        if holes is not None:  # a block's details reach two pixels beyond it
            seen = F.max_pool2d(F.pad(holes[..., :height, :width], (0, 2, 0, 2)), BLOCK + 2, BLOCK)
            self.fine = torch.where(seen.flatten() > 0, 0.0, self.fine)

    @staticmethod
    def _energy(plane: torch.Tensor, side: int) -> torch.Tensor:
        plane = F.pad(plane, (0, 1, 0, 1), mode="replicate")
        haar = plane.diff(dim=-1).diff(dim=-2) / 2
        return F.avg_pool2d(haar**2, side).flatten()

    def energies(self, inside: torch.Tensor) -> tuple[float, float]:
        """Return the noise variance by the two finest levels of detail, from the smooth blocks that are `inside`."""
        changing = self.fine > 0
        usable = changing & inside if int((changing & inside).sum()) >= 16 else changing
        if not usable.any():
            return 0.0, 0.0
        count = max(int(SMOOTH * int(usable.sum())), min(int(usable.sum()), FEWEST))
        smooth = self.coarse[usable].argsort()[:count]
        # 0.977: median over mean of a block's energy, chi-square of 28 degrees since neighbouring details overlap.
        return tuple(float(energy[usable][smooth].median()) / 0.977 for energy in (self.fine, self.next))


def estimate_blur(x: torch.Tensor) -> float:
    """Return the standard deviation, in pixels, of the Gaussian blur in a photo, as a starting point.

    x: as in `estimate_noise`; of a photo above 1536 pixels a side the centre is used.

    Between derivatives of Gaussians of std a and b the slope of a step blurred by s falls by R, R^2 = (s^2 + b^2) /
    (s^2 + a^2) (Zhuo & Sim 2011, Eq. 7), of which the 60th percentile over the strongest edges is taken. Photos that
    are sharp or without edges give 0 to 1; the error is about a quarter between 1.5 and 6 pixels (docs/photo.md).
    Raises RestoreError below 32 pixels a side.
    """
    return _measure_blur(x)[0]


def find_blur(x: torch.Tensor) -> float:
    """Return `estimate_blur` of a photo that is blurred, 0 of one that has sharp edges.

    The sharp edges of a photo with strong noise are found where the noise leaves them: at the finest scale at which
    there are any, whatever soft ones there are at coarser scales.
    """
    size, sharpest, clear = _measure_blur(x)
    return size if size >= BLURRED and sharpest >= SOFT and clear else 0.0


def _measure_blur(x: torch.Tensor) -> tuple[float, float, bool]:
    """Return the blur, and that of the sharper edges, in the 40th percentile, at the finest scale that has edges; and
    whether the noise leaves enough of them."""
    x = _as_batch(x, "blur")
    top, left = (max(0, (side - MIDDLE) // 2) for side in x.shape[-2:])
    x = x[..., top : top + MIDDLE, left : left + MIDDLE]
    noise = estimate_noise(x) / math.sqrt(x.shape[1] if measure_grey_share(x) < 1 else 1)
    size, sharpest, seen = 0.0, None, False
    for std in (1.0, 2.0, 4.0):  # the finest scale at which edges exceed the noise
        if min(x.shape[-2:]) < 12 * std:
            break
        pairs = [_measure_edges(plane, std, 1.5 * std, noise) for plane in x.mean(1).double().numpy()]
        fine, coarse = np.concatenate(pairs, axis=1)
        if len(fine) < 20:
            continue
        strong = fine >= np.median(fine)
        ratio = np.maximum((fine[strong] / coarse[strong]) ** 2, 1 + 1e-3)
        variances = ((1.5 * std) ** 2 - ratio * std**2) / (ratio - 1)
        size = math.sqrt(max(np.quantile(variances, 0.6), 0.0))
        sharpest = math.sqrt(max(np.quantile(variances, 0.4), 0.0)) if sharpest is None else sharpest
        seen = bool(np.median(fine[strong]) > CLEAR * noise / (math.sqrt(8 * math.pi) * std**2))
        if seen:
            break
    return size, sharpest or 0.0, seen


def _measure_edges(plane: np.ndarray, a: float, b: float, noise: float) -> np.ndarray:
    """Return slopes (2, n) at the scales a and b, where both are ridges: the edges of thin lines move with scale."""
    slopes, rows, columns, kept = [], None, None, True
    for std in (a, b):
        down, right = (scipy.ndimage.gaussian_filter(plane, std, order=axes) for axes in ((1, 0), (0, 1)))
        slope = np.hypot(down, right)
        if rows is None:
            floor = 6 * noise / (math.sqrt(8 * math.pi) * std**2)
            rows, columns = np.nonzero(slope > max(np.quantile(slope, 0.9), floor, 1e-4))
        here = slope[rows, columns]
        step = np.stack([down[rows, columns], right[rows, columns]]) / np.maximum(here, 1e-12)
        for sign in (1, -1):
            at = np.stack([rows, columns]) + sign * step
            kept = kept & (here >= scipy.ndimage.map_coordinates(slope, at, order=1, mode="nearest"))
        slopes.append(here)
    return np.stack(slopes)[:, kept]


def rasterise_path(points: torch.Tensor | np.ndarray | list, size: int | None = None) -> torch.Tensor:
    """Return the motion blur kernel (k, k) float64, with sum one, of a path drawn by hand at constant speed.

    points: (N, 2) pixels (x to the right, y down), joined by straight lines and centred by their mass: what a point of
    light in the sharp photo becomes. size: k, odd; None: the smallest that holds the path.
    Raises RestoreError if `points` is not a path or does not fit into `size`.
    """
    try:
        path = np.asarray(points, dtype=np.float64)
    except (TypeError, ValueError):
        path = np.empty(0)
    if path.ndim != 2 or path.shape[1] != 2 or not len(path) or not np.isfinite(path).all():
        raise RestoreError("a motion path must have points (N, 2): finite pixels x and y, at least one")
    along = np.concatenate([[0.0], np.hypot(*np.diff(path, axis=0).T).cumsum()])
    if along[-1] > 16 * LARGEST:
        raise RestoreError(f"a motion path must be at most {16 * LARGEST} pixels long, got {along[-1]:.0f}")
    times = np.linspace(0, along[-1], 2 + math.ceil(8 * along[-1]))  # an eighth of a pixel apart at most
    path = np.stack([np.interp(times, along, path[:, axis]) for axis in (1, 0)], axis=1)
    path -= path.mean(axis=0)
    needed = 2 * math.ceil(np.abs(path).max() - 1e-9) + 1
    size = needed if size is None else require_integer(size, "the kernel's size", needed, LARGEST)
    if size % 2 == 0 or size > LARGEST:
        raise RestoreError(f"the kernel's size must be odd and at most {LARGEST}, got {size}")
    # operators.Blur correlates, so the path is rotated by 180 degrees.
    return torch.from_numpy(rasterise(size // 2 - path, size))


def measure_grey_share(x: torch.Tensor, tolerance: float = 0.0) -> float:
    """Return the fraction of pixels whose channels differ by at most `tolerance`; 1 for images of one channel."""
    return float((x.amax(-3) - x.amin(-3) <= tolerance).double().mean())


def _as_batch(x: torch.Tensor, what: str) -> torch.Tensor:
    x = x[None] if x.ndim == 3 else x
    x = convert_channels(x.detach().float().cpu(), None if x.shape[-3] == 1 else 3)
    width, height = x.shape[-1], x.shape[-2]
    if min(width, height) < SMALLEST:
        raise RestoreError(f"{what} is measured in photos of at least {SMALLEST} pixels a side, got {width} x {height}")
    return x
