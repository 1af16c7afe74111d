"""Separable linear maps: one matrix per axis, for resizing, Gaussian blur and the loss of colour."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch


class Kronecker(NamedTuple):
    """The map of images (B, C, H, W) given by a matrix per axis; None is the identity."""

    channels: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, C, H, W) to (B, c, h, w), in the matrices' dtype; the result has x's dtype.

        Autocast is switched off: it would round the data term to half precision.
        """
        matrix = next((matrix for matrix in self if matrix is not None), None)
        if matrix is None:
            return x
        with torch.autocast(x.device.type, enabled=False):
            result = x.to(matrix.dtype)
            if self.columns is not None:
                result = torch.matmul(result, self.columns.mT)
            if self.rows is not None:
                result = torch.matmul(self.rows, result)
            if self.channels is not None:
                result = torch.einsum("dc,bchw->bdhw", self.channels, result)
            return result.to(x.dtype)

    def each(self, function: Callable) -> Kronecker:
        """Return the Kronecker product of function(matrix), the identity kept."""
        return Kronecker(*(None if matrix is None else function(matrix) for matrix in self))

    @property
    def mT(self) -> Kronecker:
        return self.each(lambda matrix: matrix.mT)

    def to(self, target) -> Kronecker:
        return self.each(lambda matrix: matrix.to(target))


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype to compute in: float32 for half precision, as a data term rounded to 8 bits is useless."""
    return x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32


def downsampling_matrix(size: int, factor: int, method: str) -> torch.Tensor:
    """Antialiased 1-D downsampling of `size` samples by `factor`: (ceil(size / factor), size), rows sum to one.

    The two grids are concentric, also if the factor does not divide the size. "bicubic": Keys' kernel stretched by the
    factor (support 4 factor), as MATLAB's imresize and the DPS resizer; "average": a box. Boundary: symmetric.
    """
    outputs = math.ceil(size / factor)
    overhang = (factor * outputs - size) / 2
    centre = factor * (np.arange(outputs) + 0.5) - 0.5 - overhang
    reach = 2 * factor if method == "bicubic" else factor / 2 + 0.5
    index = np.floor(centre - reach)[:, None].astype(int) + np.arange(math.ceil(2 * reach) + 2)
    distance = index - centre[:, None]
    if method == "bicubic":
        t = np.abs(distance / factor)  # Keys' cubic convolution kernel with a = -0.5 (Keys 1981, eq. 15)
        inner = (1.5 * t - 2.5) * t**2 + 1.0
        outer = ((-0.5 * t + 2.5) * t - 4.0) * t + 2.0
        weights = np.where(t <= 1, inner, np.where(t <= 2, outer, 0.0))
    else:  # length of pixel [-1/2, 1/2] + distance that lies inside the box
        weights = np.clip(factor / 2 + 0.5 - np.abs(distance), 0.0, 1.0)
    margin = int(max(-index.min(), index.max() + 1 - size))
    source = np.pad(np.arange(size), margin, mode="symmetric")[index + margin]
    return _scatter(source, weights / weights.sum(axis=1, keepdims=True), size)


def filter_matrix(size: int, profile: np.ndarray, ends: str = "reflect") -> torch.Tensor:
    """1-D cross-correlation of `size` samples with an odd `profile`, as a matrix: (size, size) with reflection at both
    ends, (size - len(profile) + 1, size) if they are "cut"."""
    source = np.arange(size)
    if ends == "reflect":
        source = np.pad(source, len(profile) // 2, mode="reflect")
    source = np.lib.stride_tricks.sliding_window_view(source, len(profile))
    return _scatter(source, np.broadcast_to(profile, source.shape), size)


def _scatter(source: np.ndarray, weights: np.ndarray, size: int) -> torch.Tensor:
    """Matrix (outputs, size) whose row i adds weights[i, k] at column source[i, k]."""
    matrix = np.zeros((len(source), size))
    np.add.at(matrix, (np.arange(len(source))[:, None], source), weights)
    return torch.from_numpy(matrix)
