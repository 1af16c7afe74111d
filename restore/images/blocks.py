"""Traces of JPEG in pixels: which steps their coefficients were rounded to, and the noise that was there before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.fft
import scipy.special
import torch

SIDE = 8  # pixels; side of the blocks of JPEG
LARGEST = 1024  # pixels; of larger photos the centre is examined
LUMA = (0.299, 0.587, 0.114)
# Of the power of slow coefficients that exceeds the noise's: what the fast ones have of texture, in smooth blocks.
TEXTURE = 0.5
FOUND = 0.45  # smallest periodicity (0 none, 1 perfect) of coefficients that were quantised
# Annex K of ITU-T T.81: luminance at quality 50, row by row.
TABLE = """
    16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62
    18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"""
TABLE = np.array(TABLE.split(), float).reshape(SIDE, SIDE)


@dataclass(frozen=True)
class Compression:
    """How a photo was compressed. quality: 1 to 100, of the Independent JPEG Group's scale. luma: quantisation steps
    (8, 8) of grey values 0 to 255, row by row. offset: (y, x) of the first whole block."""

    quality: int
    luma: tuple[tuple[float, ...], ...]
    offset: tuple[int, int] = (0, 0)


def scale_table(quality: int, table: np.ndarray = TABLE) -> np.ndarray:
    """Return the quantisation steps (8, 8) of a quality from 1 to 100, as the Independent JPEG Group's library does."""
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    return np.clip(np.floor((table * scale + 50) / 100), 1, 255)


def find_quality(steps: Sequence[float], cut: Sequence[int]) -> Compression:
    """Return the compression of a file's steps of brightness, 64 in rows, whose first block was cut by (y, x)."""
    table = np.array(steps, float).reshape(SIDE, SIDE)
    quality = min(range(1, 101), key=lambda quality: float(np.abs(scale_table(quality) - table).sum()))
    return Compression(quality, tuple(map(tuple, table.tolist())), (-cut[0] % SIDE, -cut[1] % SIDE))


def detect_compression(x: torch.Tensor) -> Compression | None:
    """Return the strongest compression whose traces are in the pixels of a photo (1, 3, H, W); None without any.

    The discrete cosine coefficients of the brightness are multiples of the quantisation steps, up to rounding, on the
    grid of blocks on which the photo was compressed (Fan & de Queiroz 2003). The periodicity mean(cos(2 pi c / q)) of
    the coefficients that are not zero is compared for the standard tables of all qualities.
    """
    height, width = x.shape[-2:]
    if min(height, width) < 4 * SIDE:
        return None
    grey = np.tensordot(LUMA, x[0].double().numpy(), 1) * 127.5 + 127.5
    top, left = (max(0, side - LARGEST) // (2 * SIDE) * SIDE for side in grey.shape)
    grey = grey[top : top + LARGEST, left : left + LARGEST]
    offset = _find_grid(grey)
    coefficients = cosine_transform(grey, offset)
    tried = [(quality, _measure_periodicity(coefficients, scale_table(quality))) for quality in range(5, 93)]
    found = [(quality, fit) for quality, fit in tried if fit > FOUND]
    if not found:
        return None
    best = max(fit for _, fit in found)
    quality = min(quality for quality, fit in found if fit > best - 0.05)
    return Compression(quality, tuple(map(tuple, scale_table(quality).tolist())), offset)


def cosine_transform(grey: np.ndarray, offset: tuple[int, int] = (0, 0)) -> np.ndarray:
    """Return the coefficients (n, 8, 8) of the whole blocks of a picture (H, W), orthonormal."""
    grey = grey[offset[0] :, offset[1] :]
    rows, columns = (side // SIDE for side in grey.shape)
    blocks = grey[: rows * SIDE, : columns * SIDE].reshape(rows, SIDE, columns, SIDE).swapaxes(1, 2)
    return scipy.fft.dctn(blocks.reshape(-1, SIDE, SIDE), axes=(1, 2), norm="ortho")


def _find_grid(grey: np.ndarray) -> tuple[int, int]:
    """Return (y, x) of the first block: where second differences across a border are largest beside others."""
    offsets = []
    for plane in (grey, grey.T):
        step = np.abs(np.diff(plane, axis=0))
        jump = np.maximum(step[1:-1] - (step[:-2] + step[2:]) / 2, 0).clip(max=20).mean(1)  # at rows 1|2, 2|3, ...
        at = [jump[phase::SIDE].mean() for phase in range(SIDE)]
        offsets.append((int(np.argmax(at)) + 2) % SIDE)
    return offsets[0], offsets[1]


def _measure_periodicity(coefficients: np.ndarray, steps: np.ndarray) -> float:
    """How near the coefficients are to multiples of the steps, those of most evidence: 0 to 1 and 0 if too few."""
    fits, weights = [], []
    for v, u in ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (2, 1), (1, 2), (2, 2), (0, 3), (3, 0)):
        if steps[v, u] < 3:  # rounding to 8 bits hides it
            continue
        values = coefficients[:, v, u]
        values = values[np.abs(values) > steps[v, u] / 2]
        if len(values) >= 10:
            fits.append(np.cos(2 * np.pi * values / steps[v, u]).mean())
            weights.append(min(len(values), 500))
    return float(np.average(fits, weights=weights)) if sum(weights) >= 100 else 0.0


def estimate_quantised_noise(x: torch.Tensor, compression: Compression) -> float:
    """Return the standard deviation, on [-1, 1] per channel, of white noise in a photo before it was compressed.

    In the smooth blocks a coefficient of noise alone, of deviation s, is not rounded to zero with probability
    erfc(q / (2 sqrt(2) s)); s is that for which as many are not as were found. Where the slowest coefficients have more
    power than such noise, the blocks show texture, whose share of the fast ones' is taken off.
    """
    grey = np.tensordot(LUMA, x[0].double().numpy(), 1) * 127.5 + 127.5
    coefficients = np.abs(cosine_transform(grey, compression.offset))
    steps = np.array(compression.luma)
    frequency = np.add.outer(np.arange(SIDE), np.arange(SIDE))
    slow, fast = (frequency > 0) & (frequency <= 2), (frequency >= 4) & (frequency <= 8)
    energy = (coefficients[:, slow] ** 2).sum(1)
    order = np.argsort(energy)[: max(8, len(energy) // 7)]
    smooth, slowest = coefficients[order], float(energy[order].mean()) / slow.sum()
    kept = float((smooth[:, fast] > steps[fast] / 2).sum(1).mean())
    low, high = 0.1, 128.0
    for _ in range(30):
        middle = math.sqrt(low * high)
        expected = float(scipy.special.erfc(steps[fast] / (2 * math.sqrt(2) * middle)).sum())
        low, high = (middle, high) if expected < kept else (low, middle)
    if kept * len(smooth) < 10:
        return 0.0
    variance = max(low**2 - TEXTURE * max(slowest - low**2, 0.0), 0.0)
    return math.sqrt(variance) / math.hypot(*LUMA) / 127.5
