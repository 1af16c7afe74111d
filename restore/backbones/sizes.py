"""Any image size for a backbone trained at one: padding to its multiple, windows beyond its resolution.

Up to the trained resolution the network runs at the image's own size. Beyond it the noise is predicted on overlapping
windows of the trained size and blended with weights that sum to one, as in MultiDiffusion (Bar-Tal et al. 2023); the
iterate itself is never cut, so there are no seams.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from restore.backbones.base import Backbone, Prediction


def place_windows(length: int, window: int, overlap: int) -> list[int]:
    """Return evenly spaced starts of windows that cover [0, length) and overlap by at least `overlap`."""
    if length <= window:
        return [0]
    n = math.ceil((length - overlap) / (window - overlap))
    return [round(i * (length - window) / (n - 1)) for i in range(n)]


def make_blend_weights(starts: list[int], window: int, length: int) -> torch.Tensor:
    """Return raised-cosine weights (n, window) per window and position, which sum to one over the windows."""
    positions = (torch.arange(window, dtype=torch.float32) + 0.5) / window
    bump = 0.5 - 0.5 * torch.cos(2 * math.pi * positions) + 1e-3
    total = torch.zeros(length, dtype=torch.float32)
    for start in starts:
        total[start : start + window] += bump
    return torch.stack([bump / total[start : start + window] for start in starts])


def default_overlap(backbone: Backbone) -> float:
    """Return 0.5, or 0.25 for a network without attention, every pixel of which sees about the same in each window.

    Measured with the prior of photos, noise of 25 / 255, crops of 352 x 464 of six held-out pictures: 32.74, 32.81 and
    32.71 dB and 2.9, 1.7 and 1.0 CPU seconds with 0.5, 0.25 and 0.125; steps at the windows' borders are 0.97, 0.98
    and 0.97 times as large as elsewhere. The embedded prior, with attention, noise of 0.2, crops of 160 x 160 of three:
    39.21 and 39.13 dB and 0.84 and 0.47 CPU seconds with 0.5 and 0.25.
    """
    return 0.5 if backbone.attention else 0.25


class Sized:
    """A backbone for images of exactly height x width: the prior that a sampler gets.

    `shape` is that of one x, (C, h, w). In pixels x has the image's size; a latent is the smallest whose sides the
    network divides and whose image covers height x width: `decode` crops that image, `encode` extends its argument to
    it by reflection. So samplers and operators see only the true size, and no pixel of the photo is resampled.

    overlap: fraction of a window shared with its neighbour, see `default_overlap`. max_windows: windows per network
    call (images of the batch times windows), which bounds the memory. recompute_windows: keep no activations of the
    windows for the backward pass and compute them again there.
    region: (1 or B, 1, H, W), positive where the prediction matters; windows without such a pixel are not computed, and
    eps is 0 where there is none. None: everywhere.
    evaluations: number of predictions made, including weak passes (the NFE of a run).
    """

    def __init__(
        self,
        backbone: Backbone,
        height: int,
        width: int,
        *,
        overlap: float | None = None,
        max_windows: int = 16,
        recompute_windows: bool = False,
        region: torch.Tensor | None = None,
    ) -> None:
        self.region, self.made = region, {}  # made: windows and their weights by size, on the device
        self.inner, self.height, self.width = backbone, height, width
        self.overlap = default_overlap(backbone) if overlap is None else overlap
        self.max_windows, self.recompute_windows = max_windows, recompute_windows
        self.network, self.schedule, self.attention = backbone.network, backbone.schedule, backbone.attention
        self.channels, self.resolution, self.multiple = backbone.channels, backbone.resolution, backbone.multiple
        self.downscale, self.bounded = backbone.downscale, backbone.bounded
        self.null_condition = backbone.null_condition
        self.evaluations = 0
        # In pixels `predict` pads and crops; a latent is padded once, because its border is cropped after decoding.
        step = 1 if self.downscale == 1 else self.downscale * self.multiple
        sides = (math.ceil(side / step) * step // self.downscale for side in (height, width))
        self.shape = (self.channels, *sides)
        if hasattr(backbone, "sized_schedule"):  # its noise levels depend on the number of tokens
            self.schedule = backbone.sized_schedule(*self.shape[1:])

    @property
    def share_prefix(self) -> bool:
        """Whether the weak pass may reuse outputs of the strong one: recomputed windows keep none."""
        return not self.recompute_windows or self.window_grid(*self.shape[1:])[2:] == ([0], [0])

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Return the image (B, 3, height, width) of x_0 (B, *shape)."""
        return self.inner.decode(z)[..., : self.height, : self.width]

    def encode(self, image: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Return x_0 of an image (B, 3, height, width); see Backbone."""
        _, h, w = self.shape
        return self.inner.encode(_pad(image, h * self.downscale, w * self.downscale), noise)

    def predict(self, x_t: torch.Tensor, t: float, condition: Any = None) -> Prediction:
        """Return the prediction, of the size of x_t (B, C, h, w), which may differ from `shape`."""
        self.evaluations += 1
        height, width = x_t.shape[-2:]
        x = _pad(x_t, _round_up(height, self.multiple), _round_up(width, self.multiple))
        if max(x.shape[-2:]) <= max(self.resolution, self.multiple):
            output = self.inner.predict(x, t, condition)
        else:
            output = self._predict_windows(x, t, condition)
        crop = (..., slice(0, height), slice(0, width))
        return Prediction(*(None if part is None else part[crop] for part in (output.eps, output.variance, output.x0)))

    def blend_maps(self, maps: Sequence[torch.Tensor], x_t: torch.Tensor) -> torch.Tensor:
        """Blend maps recorded in the network's calls of one `predict` at x_t to one (B, C, h, w) of x_t's size.

        maps: (images of a call, C, any size) of each call, in order; enlarged to the call's input by nearest neighbour
        and blended like the predictions of windows.
        """
        height, width = (_round_up(side, self.multiple) for side in x_t.shape[-2:])
        (h, w), places, weights = self._windows(height, width, torch.float32, x_t.device)
        pieces = F.interpolate(torch.cat(list(maps)), (h, w)).split(len(x_t))
        canvas = maps[0].new_zeros(*pieces[0].shape[:2], height, width)
        for place, (row, column), piece in zip(places, weights, pieces, strict=True):
            canvas[place] += piece * (row[:, None] * column).to(canvas.dtype)
        return canvas[..., : x_t.shape[-2], : x_t.shape[-1]]

    def window_grid(self, height: int, width: int) -> tuple[int, int, list[int], list[int]]:
        """Return the sides of a window of an x of this size, and where windows start: (h, w, tops, lefts)."""
        height, width = _round_up(height, self.multiple), _round_up(width, self.multiple)
        if max(height, width) <= max(self.resolution, self.multiple):
            return height, width, [0], [0]
        h, w = min(self.resolution, height), min(self.resolution, width)
        tops, lefts = (place_windows(a, b, int(b * self.overlap)) for a, b in ((height, h), (width, w)))
        return h, w, tops, lefts

    def _windows(
        self, height: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[tuple[int, int], list[tuple], list[tuple]]:
        """Return the sides of a window, and for each its index in x and the weights of its rows and columns, made once
        for a dtype, a device and a region."""
        key = (height, width, self.resolution, dtype, device, id(self.region))
        if key not in self.made:
            self.made[key] = self.region, self._place_windows(height, width, dtype, device)
        return self.made[key][1]

    def _place_windows(self, height: int, width: int, dtype: torch.dtype, device: torch.device):
        h, w, tops, lefts = self.window_grid(height, width)
        places = [(..., slice(top, top + h), slice(left, left + w)) for top in tops for left in lefts]
        along = (make_blend_weights(tops, h, height), make_blend_weights(lefts, w, width))
        weights = list(product(*(part.to(device, dtype) for part in along)))
        if self.region is not None and all(
            0 <= b - a < self.multiple for a, b in zip(self.region.shape[-2:], (height, width), strict=True)
        ):
            region = self.region.cpu()
            chosen = [i for i, place in enumerate(places) if (region[place] > 0).any()] or [0]
            places, weights = [places[i] for i in chosen], [weights[i] for i in chosen]
        return (h, w), places, weights

    def _predict_windows(self, x: torch.Tensor, t: float, condition: Any) -> Prediction:
        _, places, weights = self._windows(*x.shape[-2:], x.dtype, x.device)
        per_call = max(1, self.max_windows // len(x))

        # One canvas for all outputs, so that the learned variance is blended like eps.
        chunks = [range(len(places))[first : first + per_call] for first in range(0, len(places), per_call)]
        if x.requires_grad and torch.is_grad_enabled():
            inputs = iter(_CutWindows.apply(x, places).split([len(chunk) * len(x) for chunk in chunks]))
        else:  # the windows of one call at a time
            inputs = (torch.cat([x[places[i]] for i in chunk]) for chunk in chunks)
        canvas, names = None, None
        per_image = isinstance(condition, torch.Tensor) and condition.dim() and len(condition) > 1
        for chunk, windows in zip(chunks, inputs, strict=True):
            repeated = torch.cat([condition] * len(chunk)) if per_image else condition
            names, output = self._predict_chunk(windows, t, repeated)
            for i, piece in zip(chunk, output.split(len(x)), strict=True):
                if canvas is None:
                    canvas = piece.new_zeros(*piece.shape[:2], *x.shape[-2:])
                canvas = _AddWindow.apply(canvas, piece, *weights[i], places[i])
        return Prediction(**dict(zip(names, canvas.chunk(len(names), dim=1), strict=True)))

    def _predict_chunk(self, windows: torch.Tensor, t: float, condition: Any) -> tuple[list[str], torch.Tensor]:
        names: list[str] = []

        def predict(windows: torch.Tensor) -> torch.Tensor:
            out = self.inner.predict(windows, t, condition)
            names[:] = [name for name in ("eps", "variance", "x0") if getattr(out, name) is not None]
            return torch.cat([getattr(out, name) for name in names], dim=1)

        if self.recompute_windows and torch.is_grad_enabled() and windows.requires_grad:
            return names, checkpoint(predict, windows, use_reentrant=False)
        return names, predict(windows)


class _CutWindows(torch.autograd.Function):
    """The windows of x at `places`, along the batch. Indexing would make an image of zeros for each in the backward."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, places: list[tuple]) -> torch.Tensor:
        ctx.shape, ctx.places = x.shape, places
        return torch.cat([x[place] for place in places])

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        whole = grad.new_zeros(ctx.shape)
        for place, piece in zip(ctx.places, grad.split(ctx.shape[0]), strict=True):
            whole[place] += piece
        return whole, None


class _AddWindow(torch.autograd.Function):
    """canvas[place] += piece * row * column, in place even with a gradient, so the canvas is not copied per window."""

    @staticmethod
    def forward(ctx, canvas: torch.Tensor, piece: torch.Tensor, row: torch.Tensor, column: torch.Tensor, place: tuple):
        ctx.mark_dirty(canvas)
        ctx.place = place
        ctx.save_for_backward(row, column)
        canvas[place] += piece * (row[:, None] * column)
        return canvas

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        row, column = ctx.saved_tensors
        return grad, grad[ctx.place] * (row[:, None] * column), None, None, None


def _round_up(side: int, multiple: int) -> int:
    return math.ceil(side / multiple) * multiple


def _pad(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Reflect on the right and at the bottom; replicate if the image is too small to reflect."""
    bottom, right = height - x.shape[-2], width - x.shape[-1]
    if bottom == right == 0:
        return x
    mode = "reflect" if bottom < x.shape[-2] and right < x.shape[-1] else "replicate"
    return F.pad(x, (0, right, 0, bottom), mode=mode)
