"""Any image size for a backbone trained at one: padding to its multiple, windows beyond its resolution.

Up to the trained resolution the network runs at the image's own size. Beyond it the noise is
predicted on overlapping windows of the trained size and blended with weights that sum to one, as in
MultiDiffusion (Bar-Tal et al. 2023); the iterate itself is never cut, so there are no seams.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from restore.backbones.base import Prediction


def window_starts(length: int, window: int, overlap: int) -> list[int]:
    """Evenly spaced starts of windows that cover [0, length) and overlap by at least `overlap`."""
    if length <= window:
        return [0]
    n = math.ceil((length - overlap) / (window - overlap))
    return [round(i * (length - window) / (n - 1)) for i in range(n)]


def blend_weights(starts: list[int], window: int, length: int) -> torch.Tensor:
    """(n, window): a raised-cosine weight per window and position, summing to one over the windows."""
    positions = (torch.arange(window) + 0.5) / window
    bump = 0.5 - 0.5 * torch.cos(2 * math.pi * positions) + 1e-3
    total = torch.zeros(length)
    for start in starts:
        total[start : start + window] += bump
    return torch.stack([bump / total[start : start + window] for start in starts])


class AnySize:
    """A backbone with the same protocol as the one it wraps, for x of any height and width.

    overlap: fraction of a window shared with its neighbour. max_windows: windows per network call
    (images of the batch times windows); it bounds the memory. checkpointing: keep no activations
    of the windows for the backward pass and compute them again there.
    """

    def __init__(self, inner, overlap: float = 0.5, max_windows: int = 16, checkpointing: bool = False) -> None:
        self.inner, self.overlap, self.max_windows, self.checkpointing = inner, overlap, max_windows, checkpointing
        self.network, self.alphas_cumprod, self.attention = inner.network, inner.alphas_cumprod, inner.attention
        self.channels, self.resolution = inner.channels, inner.resolution
        self.null_condition, self.multiple = inner.null_condition, 1
        self.evaluations = 0  # predictions made, weak passes included: the NFE of a run

    def padded(self, size: int) -> int:
        """`size` rounded up to a multiple of the network's."""
        return math.ceil(size / self.inner.multiple) * self.inner.multiple

    def predict(self, x_t: torch.Tensor, t: int, condition: Any = None) -> Prediction:
        """x_t (B, C, H, W) of any size; the prediction has x_t's size."""
        self.evaluations += 1
        height, width = x_t.shape[-2:]
        x = _pad(x_t, self.padded(height), self.padded(width))
        if max(x.shape[-2:]) <= max(self.resolution, self.inner.multiple):
            prediction = self.inner.predict(x, t, condition)
        else:
            prediction = self._windows(x, t, condition)
        variance = prediction.variance
        crop = (..., slice(0, height), slice(0, width))
        return Prediction(prediction.eps[crop], None if variance is None else variance[crop])

    def _windows(self, x: torch.Tensor, t: int, condition: Any) -> Prediction:
        height, width = x.shape[-2:]
        side_y, side_x = min(self.resolution, height), min(self.resolution, width)
        tops = window_starts(height, side_y, int(side_y * self.overlap))
        lefts = window_starts(width, side_x, int(side_x * self.overlap))
        weights_y = blend_weights(tops, side_y, height).to(x)
        weights_x = blend_weights(lefts, side_x, width).to(x)
        places = [(i, j) for i in range(len(tops)) for j in range(len(lefts))]
        per_call = max(1, self.max_windows // len(x))

        # Blended in one canvas of both outputs, so that the learned variance is blended like eps.
        canvas = None
        for first in range(0, len(places), per_call):
            chunk = places[first : first + per_call]
            cut = [x[..., tops[i] : tops[i] + side_y, lefts[j] : lefts[j] + side_x] for i, j in chunk]
            output = self._call(torch.cat(cut), t, repeat_condition(condition, len(chunk)))
            for (i, j), piece in zip(chunk, output.split(len(x)), strict=True):
                weight = weights_y[i][:, None] * weights_x[j][None, :]
                top, left = tops[i], lefts[j]
                place = (left, width - left - side_x, top, height - top - side_y)
                piece = F.pad(piece * weight, place)
                canvas = piece if canvas is None else canvas + piece
        if canvas.shape[1] == 2 * self.channels:
            return Prediction(canvas[:, : self.channels], canvas[:, self.channels :])
        return Prediction(canvas)

    def _call(self, windows: torch.Tensor, t: int, condition: Any) -> torch.Tensor:
        def predict(windows: torch.Tensor) -> torch.Tensor:
            out = self.inner.predict(windows, t, condition)
            return out.eps if out.variance is None else torch.cat([out.eps, out.variance], dim=1)

        if self.checkpointing and torch.is_grad_enabled() and windows.requires_grad:
            return checkpoint(predict, windows, use_reentrant=False)
        return predict(windows)


def repeat_condition(condition: Any, times: int) -> Any:
    """A condition tensor (B, ...) for `times` windows of each image; other conditions are passed on."""
    return torch.cat([condition] * times) if isinstance(condition, torch.Tensor) and condition.dim() else condition


def _pad(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Reflect on the right and at the bottom; replicate where the image is too small to reflect."""
    bottom, right = height - x.shape[-2], width - x.shape[-1]
    if bottom == right == 0:
        return x
    mode = "reflect" if bottom < x.shape[-2] and right < x.shape[-1] else "replicate"
    return F.pad(x, (0, right, 0, bottom), mode=mode)
