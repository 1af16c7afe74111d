"""Separable linear maps M_c x M_h x M_w (channels, rows, columns): resizing, Gaussian blur, loss of colour."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

Factors = Sequence  # (channels, rows, columns): a matrix each, None for the identity


def apply(factors: Factors, x: torch.Tensor) -> torch.Tensor:
    """The Kronecker product of `factors` applied to x (B, C, H, W) -> (B, c, h, w), in x's dtype.

    Computed in the factors' dtype. Autocast is switched off: it would round the data term to half precision.
    """
    channels, rows, columns = factors
    known = [factor for factor in factors if factor is not None]
    if not known:
        return x
    with torch.autocast(x.device.type, enabled=False):
        result = x.to(known[0].dtype)
        if columns is not None:
            result = torch.matmul(result, columns.mT)
        if rows is not None:
            result = torch.matmul(rows, result)
        if channels is not None:
            result = torch.einsum("dc,bchw->bdhw", channels, result)
        return result.to(x.dtype)


def transposed(factors: Factors) -> Factors:
    return tuple(None if factor is None else factor.mT for factor in factors)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Half precision images are measured in float32: a data term rounded to 8 bits is useless."""
    return x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32


def like(x: torch.Tensor) -> torch.Tensor:
    """An empty tensor that tells `Operator._buffer` in which dtype to compute for x."""
    return torch.empty(0, dtype=compute_dtype(x), device=x.device)


def mirror(index: np.ndarray, size: int) -> np.ndarray:
    """Symmetric extension of 0..size-1, the edge repeated (MATLAB 'symmetric', numpy 'symmetric')."""
    index = np.mod(index, 2 * size)
    return np.where(index < size, index, 2 * size - 1 - index)


def reflect(index: np.ndarray, size: int) -> np.ndarray:
    """Reflection of 0..size-1 about the edge pixels' centres (torch 'reflect'); overhang below size."""
    index = np.abs(index)
    return np.where(index < size, index, 2 * (size - 1) - index)


def scatter(index: np.ndarray, weights: np.ndarray, size: int) -> torch.Tensor:
    """Matrix (outputs, size) whose row i holds weights[i, k] at column index[i, k], repeated columns added."""
    matrix = np.zeros((index.shape[0], size))
    np.add.at(matrix, (np.arange(index.shape[0])[:, None], index), weights)
    return torch.from_numpy(matrix)


def cubic(t: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = -0.5 (Keys 1981, eq. 15)."""
    t = np.abs(t)
    inner = (1.5 * t - 2.5) * t**2 + 1.0
    outer = ((-0.5 * t + 2.5) * t - 4.0) * t + 2.0
    return np.where(t <= 1, inner, np.where(t <= 2, outer, 0.0))


def downsampling_matrix(size: int, factor: int, method: str) -> torch.Tensor:
    """Antialiased 1-D downsampling of `size` samples by `factor`: (ceil(size / factor), size), rows sum to one.

    Output sample i is centred on input coordinate factor (i + 1/2) - 1/2 - overhang, where
    overhang = (factor ceil(size / factor) - size) / 2 keeps the two grids concentric if the factor
    does not divide the size. "bicubic": Keys' kernel stretched by the factor (support 4 factor), as
    MATLAB's imresize and the DPS resizer; "average": a box of width factor. Boundary: symmetric.
    """
    outputs = math.ceil(size / factor)
    overhang = (factor * outputs - size) / 2
    centre = factor * (np.arange(outputs) + 0.5) - 0.5 - overhang
    reach = 2 * factor if method == "bicubic" else factor / 2 + 0.5
    index = np.floor(centre - reach)[:, None].astype(int) + np.arange(math.ceil(2 * reach) + 2)
    distance = index - centre[:, None]
    if method == "bicubic":
        weights = cubic(distance / factor)
    else:  # length of pixel [-1/2, 1/2] + distance that lies inside the box
        weights = np.clip(factor / 2 + 0.5 - np.abs(distance), 0.0, 1.0)
    return scatter(mirror(index, size), weights / weights.sum(axis=1, keepdims=True), size)


def filter_matrix(size: int, profile: np.ndarray) -> torch.Tensor:
    """1-D cross-correlation with an odd `profile` and reflection at both ends, as a (size, size) matrix."""
    radius = len(profile) // 2
    index = reflect(np.arange(size)[:, None] + np.arange(-radius, radius + 1), size)
    return scatter(index, np.broadcast_to(profile, index.shape), size)
