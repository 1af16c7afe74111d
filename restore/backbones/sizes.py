"""Any image size for a backbone trained at one: padding to its multiple, windows beyond its resolution.

Up to the trained resolution the network runs at the image's own size. Beyond it the noise is
predicted on overlapping windows of the trained size and blended with weights that sum to one, as in
MultiDiffusion (Bar-Tal et al. 2023); the iterate itself is never cut, so there are no seams.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from restore.backbones.base import Backbone, Prediction


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


class Sized:
    """A backbone for images of exactly height x width: what a sampler sees as its prior.

    The protocol is the backbone's, and `shape` is that of one x, (C, h, w). In pixels x has the image's
    size; a latent is the smallest whose sides the network divides and whose image covers height x width:
    `decode` crops that image, `encode` extends its argument to it by reflection. So a sampler and an
    operator that know only the true size work unchanged, and no pixel of the photo is resampled.

    overlap: fraction of a window shared with its neighbour. max_windows: windows per network call
    (images of the batch times windows); it bounds the memory. checkpointing: keep no activations
    of the windows for the backward pass and compute them again there.
    evaluations: predictions made, weak passes included (the NFE of a run).
    """

    def __init__(
        self,
        backbone: Backbone,
        height: int,
        width: int,
        *,
        overlap: float = 0.5,
        max_windows: int = 16,
        checkpointing: bool = False,
    ) -> None:
        self.inner, self.height, self.width = backbone, height, width
        self.overlap, self.max_windows, self.checkpointing = overlap, max_windows, checkpointing
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
        """Whether a strong pass may leave what it computed to the weak one: checkpointing keeps nothing of windows."""
        return not self.checkpointing or self.cuts(*self.shape[1:])[2:] == ([0], [0])

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Image (B, 3, height, width) of x_0 (B, *shape)."""
        return self.inner.decode(z)[..., : self.height, : self.width]

    def encode(self, image: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """x_0 of an image (B, 3, height, width); see Backbone."""
        _, h, w = self.shape
        return self.inner.encode(_pad(image, h * self.downscale, w * self.downscale), noise)

    def predict(self, x_t: torch.Tensor, t: float, condition: Any = None) -> Prediction:
        """x_t (B, C, h, w), also of other sizes than `shape`; the prediction has x_t's size."""
        self.evaluations += 1
        height, width = x_t.shape[-2:]
        x = _pad(x_t, _up(height, self.multiple), _up(width, self.multiple))
        if max(x.shape[-2:]) <= max(self.resolution, self.multiple):
            found = self.inner.predict(x, t, condition)
        else:
            found = self._windows(x, t, condition)
        crop = (..., slice(0, height), slice(0, width))
        return Prediction(*(None if part is None else part[crop] for part in (found.eps, found.variance, found.x0)))

    def assembled(self, maps: Sequence[torch.Tensor], x_t: torch.Tensor) -> torch.Tensor:
        """One map (B, C, h, w) of x_t's size out of what was seen in the network's calls of one `predict` at x_t.

        maps: (images of a call, C, any size) of each call, in order; enlarged to the call's input by nearest neighbour
        and, where that is a window, blended like the predictions.
        """
        height, width = (_up(side, self.multiple) for side in x_t.shape[-2:])
        if max(height, width) <= max(self.resolution, self.multiple):
            canvas = F.interpolate(maps[0], (height, width))
        else:
            side_y, side_x, tops, lefts = self.cuts(height, width)
            weights_y, weights_x = blend_weights(tops, side_y, height), blend_weights(lefts, side_x, width)
            places = [(i, j) for i in range(len(tops)) for j in range(len(lefts))]
            pieces = F.interpolate(torch.cat(list(maps)), (side_y, side_x)).split(len(x_t))
            canvas = maps[0].new_zeros(*pieces[0].shape[:2], height, width)
            for (i, j), piece in zip(places, pieces, strict=True):
                weight = (weights_y[i][:, None] * weights_x[j][None, :]).to(canvas)
                canvas[..., tops[i] : tops[i] + side_y, lefts[j] : lefts[j] + side_x] += piece * weight
        return canvas[..., : x_t.shape[-2], : x_t.shape[-1]]

    def cuts(self, height: int, width: int) -> tuple[int, int, list[int], list[int]]:
        """Sides of a window of an x of this size, and where windows start: (h, w, tops, lefts)."""
        height, width = _up(height, self.multiple), _up(width, self.multiple)
        if max(height, width) <= max(self.resolution, self.multiple):
            return height, width, [0], [0]
        h, w = min(self.resolution, height), min(self.resolution, width)
        tops, lefts = (window_starts(a, b, int(b * self.overlap)) for a, b in ((height, h), (width, w)))
        return h, w, tops, lefts

    def _windows(self, x: torch.Tensor, t: float, condition: Any) -> Prediction:
        height, width = x.shape[-2:]
        h, w, tops, lefts = self.cuts(height, width)
        weights_y = blend_weights(tops, h, height).to(x)
        weights_x = blend_weights(lefts, w, width).to(x)
        weights = [(row, column) for row in weights_y for column in weights_x]
        places = [(..., slice(top, top + h), slice(left, left + w)) for top in tops for left in lefts]
        per_call = max(1, self.max_windows // len(x))

        # Blended in one canvas of all outputs, so that the learned variance is blended like eps.
        chunks = [range(len(places))[first : first + per_call] for first in range(0, len(places), per_call)]
        if x.requires_grad and torch.is_grad_enabled():
            cut = iter(_Cut.apply(x, places).split([len(chunk) * len(x) for chunk in chunks]))
        else:  # only so many at a time
            cut = (torch.cat([x[places[i]] for i in chunk]) for chunk in chunks)
        canvas, kinds = None, None
        for chunk, windows in zip(chunks, cut, strict=True):
            kinds, output = self._call(windows, t, repeat_condition(condition, len(chunk)))
            for i, piece in zip(chunk, output.split(len(x)), strict=True):
                if canvas is None:
                    canvas = piece.new_zeros(*piece.shape[:2], height, width)
                canvas = _Add.apply(canvas, piece, *weights[i], places[i])
        return Prediction(**dict(zip(kinds, canvas.chunk(len(kinds), dim=1), strict=True)))

    def _call(self, windows: torch.Tensor, t: float, condition: Any) -> tuple[list[str], torch.Tensor]:
        """The names of what the network gave, and all of it in one tensor."""
        kinds: list[str] = []

        def predict(windows: torch.Tensor) -> torch.Tensor:
            out = self.inner.predict(windows, t, condition)
            kinds[:] = [name for name in ("eps", "variance", "x0") if getattr(out, name) is not None]
            return torch.cat([getattr(out, name) for name in kinds], dim=1)

        if self.checkpointing and torch.is_grad_enabled() and windows.requires_grad:
            return kinds, checkpoint(predict, windows, use_reentrant=False)
        return kinds, predict(windows)


class _Cut(torch.autograd.Function):
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


class _Add(torch.autograd.Function):
    """canvas[place] += piece * row * column, in place with a gradient too: no canvas is copied for a window."""

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


def repeat_condition(condition: Any, times: int) -> Any:
    """A condition tensor (B, ...) for `times` windows of each image; one for all, or no tensor, is passed on."""
    batched = isinstance(condition, torch.Tensor) and condition.dim() and len(condition) > 1
    return torch.cat([condition] * times) if batched else condition


def _up(side: int, multiple: int) -> int:
    return math.ceil(side / multiple) * multiple


def _pad(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Reflect on the right and at the bottom; replicate where the image is too small to reflect."""
    bottom, right = height - x.shape[-2], width - x.shape[-1]
    if bottom == right == 0:
        return x
    mode = "reflect" if bottom < x.shape[-2] and right < x.shape[-1] else "replicate"
    return F.pad(x, (0, right, 0, bottom), mode=mode)
