"""Targets: the maps that perturbed attention uses in place of the network's own.

A target is a function of one `AttentionRecord` that returns the attention output under the perturbed map, of q's shape
(with v's width). The caller does the rest: the output is linear in the map, so (1 − u) A + u A' is a lerp of outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F

from operators import RestoreError
from operators.naming import lookup
from operators.ranges import NonNegative, Positive, Range, enforce_ranges
from restore.backbones.transfer import send
from restore.guidance.options import construct, parse_spec

Rate = Annotated[float, Range(0, below=1)]
Taps = Annotated[int, Range(1, odd=True)]
Draw = Callable[[str, tuple[int, ...]], torch.Tensor]


@dataclass(frozen=True)
class AttentionRecord:
    """What one attention layer is about to compute: softmax(scale · q kᵀ + mask) v.

    q, k, v: (B, heads, tokens, d) after the module's own norms and rotary embedding.
    mask: additive or boolean, broadcastable to (B, heads, queries, keys), or None.
    scale: the factor on q kᵀ; None: 1/sqrt(d).
    draw: draw(kind, shape) gives fp32 noise, kind "uniform" on [0, 1) or "normal".
    grid: (h, w), rows and columns of the image tokens, which are in row-major order; None if unknown.
    image: which tokens are the image's if text tokens attend with them (joint attention); None: all of them.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None = None
    scale: float | None = None
    draw: Draw | None = None
    grid: tuple[int, int] | None = None
    image: slice | None = None

    def logits(self, q: torch.Tensor | None = None) -> torch.Tensor:
        """Return the map before the softmax, (B, heads, queries, keys), in fp32 (fp64 if q is); q: other queries."""
        q = self.q if q is None else q
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        raw = (_wide(q) * scale) @ _wide(self.k).transpose(-2, -1)
        if self.mask is None:
            return raw
        if self.mask.dtype == torch.bool:
            return raw.masked_fill(~self.mask, -math.inf)
        return raw + self.mask.to(raw.dtype)

    def map(self) -> torch.Tensor:
        """Return A = softmax(logits), (B, heads, queries, keys)."""
        return F.softmax(self.logits(), dim=-1)

    def under(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the output under the map `weights`, in v's precision."""
        return (weights @ self.v.to(weights.dtype)).to(self.v.dtype)


@dataclass(frozen=True)
class LinearRecord(AttentionRecord):
    """What a layer of linear attention (Sana) is about to compute: the map relu(q) relu(k)ᵀ with rows of sum one (or
    uniform, if they are zero), whose logarithm takes the place of the logits."""

    def logits(self, q: torch.Tensor | None = None) -> torch.Tensor:
        weights = _wide(self.q if q is None else q).relu() @ _wide(self.k).relu().transpose(-2, -1)
        total = weights.sum(dim=-1, keepdim=True)
        return torch.where(total > 0, weights / total, 1.0).log()


Target = Callable[[AttentionRecord], torch.Tensor]


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def index_tokens(heads: Sequence[int] | None, tokens: slice | None) -> tuple:
    """Return the index of these heads and tokens in (B, heads, tokens, ...); None: all of them."""
    return tuple(slice(None) if part is None else part for part in (None, heads and list(heads), tokens))


def identity(a: AttentionRecord) -> torch.Tensor:
    """A' = I: every token attends only to itself (PAG, Ahn et al. 2024, eq. 13)."""
    queries, keys = a.q.shape[-2], a.k.shape[-2]
    if queries != keys:
        raise RestoreError(f"target identity needs as many queries as keys, got {queries} queries and {keys} keys")
    return a.v


def uniform(a: AttentionRecord) -> torch.Tensor:
    """A' = 1/N: every token sees the mean value (of the keys the mask lets it see)."""
    if a.mask is not None:
        return a.under(F.softmax(a.logits(torch.zeros_like(a.q)), dim=-1))
    return a.v.mean(dim=-2, keepdim=True).expand(*a.q.shape[:-1], a.v.shape[-1])


def zero(a: AttentionRecord) -> torch.Tensor:
    """A' = 0: nothing is attended to (of cross-attention: PAG, App. E.2, somewhat similar to CFG)."""
    return a.v.new_zeros(*a.q.shape[:-1], a.v.shape[-1])


def mean_query(a: AttentionRecord) -> torch.Tensor:
    """A' of the mean query: SEG (Hong 2024) at infinite blur."""
    mean = a.q.mean(dim=-2, keepdim=True)
    if a.mask is not None and a.mask.shape[-2] > 1:
        mean = mean.expand_as(a.q)
    out = a.under(F.softmax(a.logits(mean), dim=-1))
    return out.expand(*a.q.shape[:-1], a.v.shape[-1])


@enforce_ranges
def seg(sigma: Annotated[float, Range(above=0, high=math.inf)] = math.inf) -> Target:
    """A' of queries blurred on the grid of image tokens (SEG, Hong 2024).

    sigma: of the Gaussian blur, in tokens, reflected at the border; infinite: mean_query. The kernel reaches 3 sigma,
        at most half the grid's side, as in the authors' code. Queries of text tokens are unchanged.
    """
    if sigma == math.inf:
        return mean_query
    from kornia.filters import gaussian_blur2d  # half a second, which only this target takes

    taps = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2

    def target(a: AttentionRecord) -> torch.Tensor:
        if a.grid is None:
            raise RestoreError("target seg needs the grid of image tokens, unknown in this layer; try mean_query")
        rows = slice(None) if a.image is None else a.image
        q = _wide(a.q).clone()
        image = q[..., rows, :].transpose(-2, -1).unflatten(-1, a.grid)
        size = tuple(min(taps, side | 1) for side in a.grid)
        blurred = gaussian_blur2d(image.flatten(0, 1), size, (sigma, sigma), "reflect").view(image.shape)
        q[..., rows, :] = blurred.flatten(-2).transpose(-2, -1)
        return a.under(F.softmax(a.logits(q), dim=-1))

    return target


def maximum(a: AttentionRecord) -> torch.Tensor:
    """A' one-hot at the row's largest entry."""
    best = a.logits().argmax(dim=-1, keepdim=True)
    return a.v.gather(-2, best.expand(*best.shape[:-1], a.v.shape[-1]))


@enforce_ranges
def temperature(tau: Positive = 2.0) -> Target:
    """A' = softmax(log A / tau): tau < 1 sharpens, tau > 1 flattens."""

    def target(a: AttentionRecord) -> torch.Tensor:
        return a.under(F.softmax(a.logits() / tau, dim=-1))

    return target


@enforce_ranges
def random_mask(rate: Rate = 0.25, diagonal: bool = True) -> Target:
    """A with a share `rate` of its entries masked before the softmax, which re-normalises the rows (PAG, Table 9).

    diagonal=False masks off-diagonal entries only. A row without any entry left keeps that of its largest draw.
    """

    def target(a: AttentionRecord) -> torch.Tensor:
        raw = a.logits()
        uniform_draw = send(a.draw("uniform", tuple(raw.shape)), raw.device)
        masked = uniform_draw < rate
        if diagonal:
            masked &= uniform_draw < uniform_draw.amax(dim=-1, keepdim=True)
        else:
            masked &= ~torch.eye(*raw.shape[-2:], dtype=torch.bool, device=raw.device)
        return a.under(F.softmax(raw.masked_fill(masked, -math.inf), dim=-1))

    return target


@enforce_ranges
def random_drop(rate: Rate = 0.25) -> Target:
    """A with a share `rate` of its entries set to zero after the softmax, the rows not re-normalised."""

    def target(a: AttentionRecord) -> torch.Tensor:
        weights = a.map()
        return a.under(weights * (send(a.draw("uniform", tuple(weights.shape)), weights.device) >= rate))

    return target


@enforce_ranges
def noise(sigma: NonNegative = 0.1) -> Target:
    """A' = A + sigma·N(0, 1), not re-normalised (PAG, Table 9)."""

    def target(a: AttentionRecord) -> torch.Tensor:
        weights = a.map()
        return a.under(weights + sigma * send(a.draw("normal", tuple(weights.shape)), weights.device, weights.dtype))

    return target


@enforce_ranges
def blur(kernel: Taps = 5, sigma: Positive = 1.0) -> Target:
    """Gaussian blur of the (queries × keys) matrix itself, reflected at its border (PAG, Table 9)."""

    def target(a: AttentionRecord) -> torch.Tensor:
        from kornia.filters import gaussian_blur2d  # half a second, which only this target takes

        return a.under(gaussian_blur2d(a.map(), (kernel, kernel), (sigma, sigma), "reflect"))

    return target


@enforce_ranges
def average(kernel: Taps = 3) -> Target:
    """Box blur of the (queries × keys) matrix itself, zeros beyond its border counted in the mean."""

    def target(a: AttentionRecord) -> torch.Tensor:
        weights = a.map()
        pooled = F.avg_pool2d(weights.flatten(0, 1).unsqueeze(1), kernel, stride=1, padding=kernel // 2)
        return a.under(pooled.view(weights.shape))

    return target


class SeededDraw:
    """A Draw that depends only on seed, time and the number of draws before; images of a batch share it.

    at(place): the draws of one layer, numbered in order when a place draws for the first time. Later calls of the
    network at this time, for other windows of a large image, get the same draws, so the number of windows in a call,
    which the memory decides, changes nothing.
    """

    def __init__(self, seed: int, t: float) -> None:
        self.seed, self.t = seed, t
        self.numbers: dict[tuple, int] = {}
        self.draw = self.at(None)

    def __call__(self, kind: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self.draw(kind, shape)

    def at(self, place: Hashable) -> Draw:
        own = count()

        def draw(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
            number = self.numbers.setdefault((place, next(own)), len(self.numbers))
            # A whole time enters as it is, any other, and one below 0, with the bits of its floating-point value.
            whole, bits = abs(int(self.t)), int(np.float64(self.t).view(np.uint64))
            time = [whole] if self.t == whole else [whole, bits]
            state = np.random.SeedSequence([self.seed, *time, number]).generate_state(1, np.uint64)[0]
            generator = torch.Generator().manual_seed(int(state) >> 1)
            sample = torch.rand if kind == "uniform" else torch.randn
            return sample(shape[1:], generator=generator).expand(shape)

        return draw


_FAMILIES = (seg, temperature, random_mask, random_drop, noise, blur, average)
TARGET_FAMILIES: dict[str, Callable[..., Target]] = {family.__name__: family for family in _FAMILIES}  # with options
TARGETS: dict[str, Target] = {
    "identity": identity,
    "uniform": uniform,
    "zero": zero,
    "mean_query": mean_query,
    "max": maximum,
    "random_mask_off_diagonal": random_mask(diagonal=False),
    **{name: family() for name, family in TARGET_FAMILIES.items()},
}


def find_target(target: str | Mapping[str, Any] | Target) -> Target:
    """Return a target by its name in TARGETS (the paper's parameters), {name: options} of TARGET_FAMILIES,
    "module:function", or the function itself. Raises RestoreError for an unknown name or option."""
    if isinstance(target, Mapping):
        name, options = parse_spec(target, "target")
        return construct(lookup(name, TARGET_FAMILIES, "target with options"), options, f"target {name}")
    return target if callable(target) else lookup(target, TARGETS, "target")
