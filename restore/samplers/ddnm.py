"""Denoising diffusion null-space models (Wang et al. 2023): DDNM for noiseless measurements, DDNM+ for noisy ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import operators
from operators import RestoreError
from restore.backbones.base import Backbone, variance_preserving
from restore.guidance import estimator
from restore.samplers.steps import SIGMA_MIN, levels, report, require_finite, require_linear_gaussian


@torch.no_grad()
def ddnm(
    prior: Backbone,
    operator,
    y: torch.Tensor,
    *,
    noise: Callable[..., torch.Tensor],
    steps: int | str | Sequence[float],
    eta: float = 0.85,
    guidance=None,
    condition: Any = None,
    sigma_y: float | None = None,
    travel_length: int = 1,
    travel_repeat: int = 1,
    travel_from: str = "x_s",
    clip: bool = False,
    callback: Callable[[dict], None] | None = None,
) -> torch.Tensor:
    """Sample x_0 ~ p(x_0 | y) approximately: the range of A^T is taken from y, its complement from the prior,

        x_s = alpha_s (x0_hat - A^+ (A x0_hat - y)) + sigma_s (eta n + sqrt(1 - eta^2) eps)          (DDNM, eq. 13)

    and with sigma_y > 0 (DDNM+, eq. 17-19 and App. I), in the singular basis A = U S V^T, the correction is scaled so
    that x_s never holds more noise than sigma_s, and the noise of y counts as part of it.

    prior: a backbone of the image's size, in pixels. operator: a linear one, with an SVD if sigma_y > 0.
    y: measurement (B, ...). noise, steps, callback: as restore.samplers.dps.dps takes them, a step being one network
        evaluation; noise kinds "start", "latent" and "travel".
    eta: share of fresh noise (the authors' 0.85). guidance: the guided eps makes x0_hat and the noise.
    sigma_y: None: that of the operator's noise.
    travel_length, travel_repeat: l and r of time travel: every l steps are walked r times (Algorithm 2).
    travel_from: what is noised to travel back: x_s, or x0_hat without the correction as in the authors' code ("x0").
    clip: clamp x0_hat to [-1, 1].
    The authors' DDNM+ omits V^T before it scales eps (super-resolution, blur); this does not.
    Returns images (B, 3, H, W), not clamped. Raises RestoreError where y = A x + n is not linear and Gaussian, and
    with noise where A has no known SVD.
    """
    if travel_from not in ("x_s", "x0"):
        raise RestoreError(f"travel_from={travel_from!r} is not known; expected x_s or x0")
    sigma_y = require_linear_gaussian("ddnm", prior, operator, sigma_y)
    prior = variance_preserving(prior)
    grid = levels(prior.schedule, steps)
    order = travels(len(grid) - 1, travel_length, travel_repeat)
    svd = operators.svd(operator, prior.shape, y.dtype, y.device) if sigma_y else None
    y_bar = svd.U_adjoint(y) / svd.singular.where(svd.singular > 0, 1.0) if sigma_y else None
    x_t = noise(0, (len(y), *prior.shape), "start")
    with estimator(prior, guidance) as estimate:
        for k, i in enumerate(order):
            (t, alpha, sigma), (_, alpha_s, sigma_s) = grid[i], grid[i + 1]
            _, eps = estimate(x_t, t, condition)
            x0_hat = (x_t - sigma * eps) / alpha
            x0_hat = x0_hat.clamp(-1, 1) if clip else x0_hat
            n = noise(k, x_t.shape, "latent") if sigma_s else torch.zeros_like(x_t)
            if sigma_y:
                mean, scale_n, scale_eps = plus(svd, svd.V_adjoint(x0_hat), y_bar, sigma_y, eta, alpha_s, sigma_s)
                x_s = svd.V(mean + scale_n * svd.V_adjoint(n) + scale_eps * svd.V_adjoint(eps))
            else:
                # A^+ up to singular values of the size of y's rounding, which it would magnify without bound.
                x0 = operators.prox_l2(operator, x0_hat, y, SIGMA_MIN**-2)
                x_s = alpha_s * x0 + sigma_s * (eta * n + (1 - eta**2) ** 0.5 * eps)
            x_t = x_s
            if k + 1 < len(order) and order[k + 1] <= i:  # time travel
                _, alpha_u, sigma_u = grid[order[k + 1]]
                known, a = (x0_hat, alpha_u) if travel_from == "x0" else (x_s, alpha_u / alpha_s)
                spread = sigma_u if travel_from == "x0" else (sigma_u**2 - (a * sigma_s) ** 2) ** 0.5
                x_t = a * known + spread * noise(k, x_t.shape, "travel")
            require_finite(x_t, k, f"eta={eta:g}")
            report(callback, k, len(order), t, operator, y, x0_hat, x_t=x_t, eps=eps)
    return prior.decode(x_t)


def plus(svd, x0_bar: torch.Tensor, y_bar: torch.Tensor, sigma_y: float, eta: float, alpha: float, sigma: float):
    """Mean and factors of n and eps of DDNM+ in spectral coordinates, for a step to (alpha, sigma)."""
    s = svd.singular
    own = alpha * sigma_y / s  # the noise that y_bar brings along, infinite where s = 0
    fits = sigma > own
    correction = torch.where(fits, 1.0, s * (sigma * (1 - eta**2) ** 0.5 / (alpha * sigma_y)))
    mean = alpha * (x0_bar - (s > 0) * correction * (x0_bar - y_bar))
    scale_n = torch.where(fits, (sigma**2 - own**2).clamp(min=0).sqrt(), sigma * eta)
    return mean, scale_n, (s == 0).to(s) * (sigma * (1 - eta**2) ** 0.5)


def travels(n: int, length: int, repeat: int) -> list[int]:
    """Steps 0 (noisiest) to n - 1 in the order of their evaluation: but for the last step and what `length` leaves over
    at the noisy end, blocks of `length` steps, each walked `repeat` times."""
    if length < 1 or repeat < 1:
        raise RestoreError("travel_length and travel_repeat must be at least 1")
    first = (n - 1) % length  # what is left over
    blocks = (range(i, i + length) for i in range(first, n - 1, length))
    return [*range(first), *(i for block in blocks for _ in range(repeat) for i in block), n - 1]
