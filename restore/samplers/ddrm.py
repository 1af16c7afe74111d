"""Denoising diffusion restoration models (DDRM, Kawar et al. 2022), in the singular basis of the operator."""

from __future__ import annotations

from itertools import pairwise

import torch

import operators
from operators.ranges import NonNegative, Share, enforce_ranges
from restore.backbones.base import normalise
from restore.guidance import estimator
from restore.samplers.likelihood import SIGMA_Y_FLOOR, require_linear_gaussian
from restore.samplers.steps import FiniteCheck, Momentum, levels, report


@enforce_ranges
@torch.no_grad()
def ddrm(
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
    eta_b: Share = 1.0,
    sigma_y: NonNegative | None = None,
    clip: bool | None = False,
    lamp: NonNegative = 0.0,
) -> torch.Tensor:
    """Sample x_0 ~ p(x_0 | y) approximately. With A = U S V^T, x_bar = V^T x / alpha and y_bar = S^+ U^T y, every
    coordinate moves to the next noise ratio r = sigma / alpha independently (eq. 7, 8):

        no singular value:  x0_bar + r (sqrt(1 - eta^2) eps + eta n)
        s r < sigma_y:      x0_bar + r (sqrt(1 - eta^2) (U^T y - s x0_bar) / sigma_y + eta n)
        s r >= sigma_y:     (1 - eta_b) x0_bar + eta_b y_bar + sqrt(r^2 - (eta_b sigma_y / s)^2) n

    The arguments of all samplers are in `restore.samplers`; sigma_y is at least SIGMA_Y_FLOOR.

    prior: in pixels. operator: a linear one with an SVD (see operators.svd). Raises RestoreError if it has none.
    noise: drawn in pixels, so that results do not depend on the choice of V.
    eta, eta_b: the paper's. guidance: makes x0_hat and the noise of coordinates without singular value.
    lamp: see `steps.Momentum`; of each line's terms without noise, x0_bar or its mean with y_bar.
    """
    sigma_y = max(require_linear_gaussian("ddrm", prior, operator, sigma_y), SIGMA_Y_FLOOR)
    prior = normalise(prior, "vp")
    clip = prior.bounded if clip is None else clip
    visited = levels(prior.schedule, steps)
    svd = operators.svd(operator, prior.shape, y.dtype, y.device)
    s, u = svd.singular, svd.U_adjoint(y)
    y_bar, sigma_bar = u / s.where(s > 0, 1.0), sigma_y / s  # the standard deviation of y_bar, infinite where s = 0

    # x_T given y (eq. 7).
    _, alpha, sigma = visited[0]
    z, r = svd.V_adjoint(noise(0, (len(y), *prior.shape), "start")), sigma / alpha
    x_t = alpha * svd.V(torch.where(sigma_bar < r, y_bar + (r**2 - sigma_bar**2).clamp(min=0).sqrt() * z, r * z))
    momentum = Momentum(lamp)
    check_finite = FiniteCheck(len(visited) - 1)
    with estimator(prior, guidance) as estimate:
        for k, ((t, alpha, sigma), (_, alpha_s, sigma_s)) in enumerate(pairwise(visited)):
            _, eps = estimate(x_t, t, condition)
            x0_hat = (x_t - sigma * eps) / alpha
            x0_hat = x0_hat.clamp(-1, 1) if clip else x0_hat

            # If y has less noise than x_t it is used itself, else its residual takes the place of eps.
            x0_bar, r = svd.V_adjoint(x0_hat), sigma_s / alpha_s
            n = svd.V_adjoint(noise(k, x_t.shape, "latent")) if r else torch.zeros_like(x0_bar)
            implied = torch.where(s > 0, (u - s * x0_bar) / sigma_y, svd.V_adjoint(eps))
            known = torch.where(sigma_bar > r, x0_bar, (1 - eta_b) * x0_bar + eta_b * y_bar)
            known = momentum(known, (alpha, sigma), (alpha_s, sigma_s))
            less = known + r * ((1 - eta**2) ** 0.5 * implied + eta * n)
            spread = (r**2 - (eta_b * sigma_bar) ** 2).clamp(min=0).sqrt()
            more = known + spread * n
            x_t = alpha_s * svd.V(torch.where(sigma_bar > r, less, more))
            check_finite(x_t, k, f"eta_b={eta_b:g}")
            report(callback, k, len(visited) - 1, t, x_t=x_t, x0_hat=x0_hat, eps=eps, operator=operator, y=y)
    return prior.decode(x_t)
