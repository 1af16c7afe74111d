"""What a perturbed attention map is replaced by.

A target is a function (q, k, v, mask, scale, draw) -> (B, heads, tokens, d): the attention output under the
spoilt map. q, k, v are (B, heads, tokens, d) after the module's own norms and rotary embedding; mask is the
additive or boolean mask or None, scale the factor on q kᵀ (None: 1/sqrt(d)); draw(kind, shape) gives fp32
noise, kind "uniform" on [0, 1) or "normal". Strength and choice of heads are the caller's business: every
target is linear in the map it returns, so (1 − u) A + u A' is a lerp of the two outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from operators import RestoreError

Draw = Callable[[str, tuple[int, ...]], torch.Tensor]
Target = Callable[..., torch.Tensor]


def logits(q, k, mask, scale) -> torch.Tensor:
    """The map before the softmax, (B, heads, queries, keys), in fp32 (fp64 where q is)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    raw = (_wide(q) * scale) @ _wide(k).transpose(-2, -1)
    if mask is None:
        return raw
    return raw.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else raw + mask.to(raw.dtype)


def apply(weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The map's output, in v's precision."""
    return (weights @ v.to(weights.dtype)).to(v.dtype)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check_rate(rate: float) -> None:
    if not 0 <= rate < 1:
        raise RestoreError(f"the share of entries to drop must lie in [0, 1), not {rate}")


def identity(q, k, v, mask, scale, draw):
    """A' = I: every token attends to itself alone (PAG, Ahn et al. 2024, eq. 12)."""
    if q.shape[-2] != k.shape[-2]:
        raise RestoreError(
            f"the identity map needs self-attention, but this layer has {q.shape[-2]} queries and {k.shape[-2]} keys"
        )
    return v


def uniform(q, k, v, mask, scale, draw):
    """A' = 1/N: every token sees the mean value (of the keys the mask lets it see)."""
    if mask is not None:
        return apply(F.softmax(logits(torch.zeros_like(q), k, mask, scale), dim=-1), v)
    return v.mean(dim=-2, keepdim=True).expand(*q.shape[:-1], v.shape[-1])


def mean_query(q, k, v, mask, scale, draw):
    """Every query replaced by their mean: SEG (Hong 2024) at infinite blur."""
    mean = q.mean(dim=-2, keepdim=True)
    if mask is not None and mask.shape[-2] > 1:
        mean = mean.expand_as(q)
    out = apply(F.softmax(logits(mean, k, mask, scale), dim=-1), v)
    return out.expand(*q.shape[:-1], v.shape[-1])


def maximum(q, k, v, mask, scale, draw):
    """A' one-hot at the row's largest entry."""
    best = logits(q, k, mask, scale).argmax(dim=-1, keepdim=True)
    return v.gather(-2, best.expand(*best.shape[:-1], v.shape[-1]))


def temperature(tau: float) -> Target:
    """A' = softmax(log A / tau): tau < 1 sharpens, tau > 1 flattens."""
    if not tau > 0:
        raise RestoreError(f"temperature must be positive, not {tau}")

    def target(q, k, v, mask, scale, draw):
        return apply(F.softmax(logits(q, k, mask, scale) / tau, dim=-1), v)

    return target


def random_mask(rate: float = 0.25, diagonal: bool = True) -> Target:
    """A share `rate` of the entries set to −inf before the softmax, the rows so re-normalised (PAG, Table 9).

    diagonal=False masks off-diagonal entries only. A row left with no entry keeps that of its largest draw.
    """
    _check_rate(rate)

    def target(q, k, v, mask, scale, draw):
        raw = logits(q, k, mask, scale)
        uniform_draw = draw("uniform", tuple(raw.shape)).to(raw.device)
        masked = uniform_draw < rate
        if diagonal:
            masked &= uniform_draw < uniform_draw.amax(dim=-1, keepdim=True)
        else:
            masked &= ~torch.eye(*raw.shape[-2:], dtype=torch.bool, device=raw.device)
        return apply(F.softmax(raw.masked_fill(masked, -math.inf), dim=-1), v)

    return target


def random_drop(rate: float = 0.25) -> Target:
    """A share `rate` of the map's entries set to zero after the softmax, the rows not re-normalised."""
    _check_rate(rate)

    def target(q, k, v, mask, scale, draw):
        weights = F.softmax(logits(q, k, mask, scale), dim=-1)
        return apply(weights * (draw("uniform", tuple(weights.shape)).to(weights.device) >= rate), v)

    return target


def noise(sigma: float = 0.1) -> Target:
    """A' = A + sigma·N(0, 1), not re-normalised (PAG, Table 9)."""

    def target(q, k, v, mask, scale, draw):
        weights = F.softmax(logits(q, k, mask, scale), dim=-1)
        return apply(weights + sigma * draw("normal", tuple(weights.shape)).to(weights), v)

    return target


def blur(kernel: int = 5, sigma: float = 1.0) -> Target:
    """Gaussian blur of the (queries × keys) matrix itself, reflected at its border (PAG, Table 9)."""
    if kernel < 1 or kernel % 2 == 0 or not sigma > 0:
        raise RestoreError(f"blur needs an odd kernel and a positive sigma, not {kernel} and {sigma}")

    def target(q, k, v, mask, scale, draw):
        weights = F.softmax(logits(q, k, mask, scale), dim=-1)
        taps = torch.arange(kernel, device=q.device, dtype=weights.dtype) - kernel // 2
        taps = torch.exp(-0.5 * (taps / sigma) ** 2)
        taps = taps / taps.sum()
        flat = F.pad(weights.flatten(0, 1).unsqueeze(1), (kernel // 2,) * 4, mode="reflect")
        flat = F.conv2d(F.conv2d(flat, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))
        return apply(flat.view(weights.shape), v)

    return target


def average(kernel: int = 3) -> Target:
    """Box blur of the (queries × keys) matrix itself, zeros beyond its border counted in the mean."""
    if kernel < 1 or kernel % 2 == 0:
        raise RestoreError(f"the average needs an odd kernel, not {kernel}")

    def target(q, k, v, mask, scale, draw):
        weights = F.softmax(logits(q, k, mask, scale), dim=-1)
        pooled = F.avg_pool2d(weights.flatten(0, 1).unsqueeze(1), kernel, stride=1, padding=kernel // 2)
        return apply(pooled.view(weights.shape), v)

    return target


TARGETS: dict[str, Target] = {
    "identity": identity,
    "uniform": uniform,
    "mean_query": mean_query,
    "max": maximum,
    "temperature": temperature(2.0),
    "random_mask": random_mask(),
    "random_mask_off_diagonal": random_mask(diagonal=False),
    "random_drop": random_drop(),
    "noise": noise(),
    "blur": blur(),
    "average": average(),
}


def find(target: str | Target) -> Target:
    """A target by its name in TARGETS (the paper's parameters), or the callable itself."""
    if callable(target):
        return target
    if target not in TARGETS:
        raise RestoreError(f"unknown perturbation '{target}', expected one of {', '.join(TARGETS)} or a function")
    return TARGETS[target]
