"""Denoising diffusion null-space models (Wang et al. 2023): DDNM for noiseless measurements, DDNM+ for noisy ones."""

from __future__ import annotations

from typing import Literal

import torch

import operators
from operators.ranges import Count, NonNegative, Share, enforce_ranges
from restore.backbones.base import normalise
from restore.guidance import estimator
from restore.samplers.likelihood import SIGMA_Y_FLOOR, require_linear_gaussian
from restore.samplers.steps import FiniteCheck, Momentum, levels, report


@enforce_ranges
@torch.no_grad()
def ddnm(
    prior,
    operator,
    y,
    *,
    noise,
    steps,
    guidance=None,
    condition=None,
    callback=None,
    eta: Share = 0.85,
    sigma_y: NonNegative | None = None,
    travel_length: Count = 1,
    travel_repeat: Count = 1,
    travel_from: Literal["x_s", "x0"] = "x_s",
    clip: bool | None = False,
    lamp: NonNegative = 0.0,
) -> torch.Tensor:
    """Sample x_0 ~ p(x_0 | y) approximately: the range of A^T is taken from y, its complement from the prior,

        x_s = alpha_s (x0_hat - A^+ (A x0_hat - y)) + sigma_s (eta n + sqrt(1 - eta^2) eps)          (DDNM, eq. 13)

    and with sigma_y > 0 (DDNM+, eq. 17-19 and App. I), in the singular basis A = U S V^T, the correction is scaled so
    that x_s never holds more noise than sigma_s. The authors' DDNM+ omits V^T before it scales eps (super-resolution,
    blur); this does not. The arguments of all samplers are in `restore.samplers`.

    prior: in pixels. operator: a linear one, with an SVD if sigma_y > 0. Raises RestoreError if it has none.
    noise: also of kind "travel". steps: evaluations without time travel; with it there are more, and k counts them.
    eta: share of fresh noise (the authors' 0.85). guidance: makes x0_hat and the noise.
    travel_length, travel_repeat: l and r of time travel: every l steps are walked r times (Algorithm 2).
    travel_from: what is noised to travel back: x_s, or x0_hat without the correction as in the authors' code ("x0").
    lamp: see `steps.Momentum`; of what x_s is made of without its noise, in the singular basis if sigma_y > 0.
    """
    sigma_y = require_linear_gaussian("ddnm", prior, operator, sigma_y)
    prior = normalise(prior, "vp")
    clip = prior.bounded if clip is None else clip
    grid = levels(prior.schedule, steps)
    order = travel_order(len(grid) - 1, travel_length, travel_repeat)
    svd = operators.svd(operator, prior.shape, y.dtype, y.device) if sigma_y else None
    y_bar = svd.U_adjoint(y) / svd.singular.where(svd.singular > 0, 1.0) if sigma_y else None
    x_t, momentum = noise(0, (len(y), *prior.shape), "start"), Momentum(lamp)
    check_finite = FiniteCheck(len(order))
    with estimator(prior, guidance) as estimate:
        for k, i in enumerate(order):
            (t, alpha, sigma), (_, alpha_s, sigma_s) = grid[i], grid[i + 1]
            _, eps = estimate(x_t, t, condition)
            x0_hat = (x_t - sigma * eps) / alpha
            x0_hat = x0_hat.clamp(-1, 1) if clip else x0_hat
            n = noise(k, x_t.shape, "latent") if sigma_s else torch.zeros_like(x_t)
            if sigma_y:
                x0_bar = svd.V_adjoint(x0_hat)
                mean, scale_n, scale_eps = spectral_step(svd.singular, x0_bar, y_bar, sigma_y, eta, alpha_s, sigma_s)
                mean = alpha_s * momentum(mean / alpha_s, (alpha, sigma), (alpha_s, sigma_s)) if lamp else mean
                x_s = svd.V(mean + scale_n * svd.V_adjoint(n) + scale_eps * svd.V_adjoint(eps))
            else:
                # A^+ up to singular values of the size of y's rounding.
                x0 = operators.prox_l2(operator, x0_hat, y, SIGMA_Y_FLOOR**-2)
                x0 = momentum(x0, (alpha, sigma), (alpha_s, sigma_s))
                x_s = alpha_s * x0 + sigma_s * (eta * n + (1 - eta**2) ** 0.5 * eps)
            x_t = x_s
            if k + 1 < len(order) and order[k + 1] <= i:  # time travel
                _, alpha_u, sigma_u = grid[order[k + 1]]
                known, a = (x0_hat, alpha_u) if travel_from == "x0" else (x_s, alpha_u / alpha_s)
                spread = sigma_u if travel_from == "x0" else (sigma_u**2 - (a * sigma_s) ** 2) ** 0.5
                x_t = a * known + spread * noise(k, x_t.shape, "travel")
            check_finite(x_t, k, f"eta={eta:g}")
            report(callback, k, len(order), t, x_t=x_t, x0_hat=x0_hat, eps=eps, operator=operator, y=y)
    return prior.decode(x_t)


def spectral_step(s, x0_bar, y_bar, sigma_y: float, eta: float, alpha: float, sigma: float):
    """Return mean and factors of n and eps of DDNM+ in spectral coordinates, for a step to (alpha, sigma)."""
    own = alpha * sigma_y / s  # the noise that y_bar brings along, infinite where s = 0
    fits = sigma > own
    correction = torch.where(fits, 1.0, s * (sigma * (1 - eta**2) ** 0.5 / (alpha * sigma_y)))
    mean = alpha * (x0_bar - (s > 0) * correction * (x0_bar - y_bar))
    scale_n = torch.where(fits, (sigma**2 - own**2).clamp(min=0).sqrt(), sigma * eta)
    return mean, scale_n, (s == 0).to(s) * (sigma * (1 - eta**2) ** 0.5)


def travel_order(n: int, length: int, repeat: int) -> list[int]:
    """Return steps 0 (noisiest) to n - 1 in the order of their evaluation: blocks of `length` steps, each walked
    `repeat` times, except for the last step and the first (n - 1) % length."""
    first = (n - 1) % length
    blocks = (range(i, i + length) for i in range(first, n - 1, length))
    return [*range(first), *(i for block in blocks for _ in range(repeat) for i in block), n - 1]
