"""Pseudoinverse-guided diffusion models (PiGDM, Song et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

import operators
from operators import RestoreError
from restore.backbones.base import Backbone, variance_preserving
from restore.guidance import estimator
from restore.samplers.steps import SIGMA_MIN, levels, report, require_finite, require_linear_gaussian, start


def pigdm(
    prior: Backbone,
    operator,
    y: torch.Tensor,
    *,
    noise: Callable[..., torch.Tensor],
    steps: int | str | Sequence[float],
    eta: float = 1.0,
    weight: float = 1.0,
    guidance=None,
    condition: Any = None,
    sigma_y: float | None = None,
    prior_variance: float = 1.0,
    gradient: str = "added",
    start_from: str = "noise",
    clip: bool = False,
    callback: Callable[[dict], None] | None = None,
) -> torch.Tensor:
    """Sample x_0 ~ p(x_0 | y) approximately, with p(x_0 | x_t) taken as N(x0_hat, r^2 I): DDIM steps of the gradient

        g = (d x0_hat / d x_t)^T A^T (A A^T + sigma_y^2 / r^2 I)^-1 (y - A x0_hat)                        (eq. 7)

    prior: a backbone of the image's size, in pixels. operator: a linear one (see operators.prox_l2).
    y: measurement (B, ...). noise, steps, callback: as restore.samplers.dps.dps takes them; noise kinds "start" and
        "latent".
    eta: of DDIM. weight: of g.
    guidance: g sees the unguided x0_hat, the DDIM step the guided eps, as in DPS with PAG.
    sigma_y: None: that of the operator's noise. With 0 the inverse is the pseudo-inverse, up to its rounding.
    prior_variance: c of r^2 = c sigma^2 / (sigma^2 + c alpha^2), the paper's being 1.
    gradient: "added": alpha_s alpha_t g is added to the DDIM step (Algorithm 1, as its implementations scale it).
        "score": grad log p(y | x_t) = g / r^2 is a part of the score, in x0_hat and eps alike; exact in the limit of
        many steps where the prior is N(m, c I), where "added" pulls the harder the more steps there are. But it trusts
        the network's Jacobian at the noisiest times: with a trained network it needs clip=True.
    start_from: "noise", or "measurement" (see restore.samplers.steps.start). clip: clamp x0_hat, g's
        and the step's, to [-1, 1].
    Returns images (B, 3, H, W), not clamped. Raises RestoreError where y = A x + n is not linear and Gaussian.
    """
    if gradient not in ("added", "score"):
        raise RestoreError(f"gradient={gradient!r} is not known; expected added or score")
    sigma_y = require_linear_gaussian("pigdm", prior, operator, sigma_y)
    prior = variance_preserving(prior)
    visited = levels(prior.schedule, steps)
    x_t = start(start_from, prior, operator, y, sigma_y, *visited[0][1:], noise(0, (len(y), *prior.shape), "start"))
    with estimator(prior, guidance) as estimate:
        for k, ((t, alpha, sigma), (_, alpha_s, sigma_s)) in enumerate(pairwise(visited)):
            # Score: a pass with a graph for the likelihood.
            x_t = x_t.detach().requires_grad_()
            strong = estimate.strong(x_t, t, condition)
            x0_hat = (x_t - sigma * strong.eps) / alpha
            x0_hat = x0_hat.clamp(-1, 1) if clip else x0_hat

            # Likelihood: what y lacks, pulled back through the network.
            r2 = prior_variance * sigma**2 / (sigma**2 + prior_variance * alpha**2)
            with torch.no_grad():
                lack = y - operator.A(x0_hat)
                gamma = 1 / max(sigma_y**2 / r2, SIGMA_MIN**2)
                v = operators.prox_l2(operator, torch.zeros_like(x0_hat), lack, gamma)
            (g,) = torch.autograd.grad(x0_hat, x_t, weight * v)

            # Prior: DDIM with the guided eps (Song et al. 2021, eq. 12 and 16).
            with torch.no_grad():
                eps = estimate.guided(strong, x_t, t, condition)
                x0 = (x_t - sigma * eps) / alpha
                x0 = x0 + sigma**2 / (alpha * r2) * g if gradient == "score" else x0
                x0 = x0.clamp(-1, 1) if clip else x0
                implied = (x_t - alpha * x0) / sigma
                c1 = eta * ((1 - (alpha / alpha_s) ** 2) ** 0.5 * sigma_s / sigma)
                x_s = alpha_s * x0 + max(sigma_s**2 - c1**2, 0.0) ** 0.5 * implied
                x_s = x_s + alpha_s * alpha * g if gradient == "added" else x_s
                x_t = x_s + c1 * noise(k, x_t.shape, "latent") if c1 else x_s
                require_finite(x_t, k, f"weight={weight:g}")
                report(callback, k, len(visited) - 1, t, operator, y, x0_hat.detach(), x_t=x_t, eps=eps)
    return prior.decode(x_t.detach())
