"""Diffusion models as plug-and-play priors in a split Gibbs sampler (PnP-DM, Wu et al. 2024, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

import operators
from operators import RestoreError
from restore.backbones.base import Backbone, variance_preserving
from restore.guidance import estimator
from restore.samplers.steps import SIGMA_MIN, levels, report, require_finite, require_linear_gaussian


@torch.no_grad()
def pnpdm(
    prior: Backbone,
    operator,
    y: torch.Tensor,
    *,
    noise: Callable[..., torch.Tensor],
    steps: int | str | Sequence[float],
    iterations: int = 100,
    rho_max: float = 10.0,
    rho_min: float = 0.3,
    decay: float = 0.9,
    eta: float = 1.0,
    guidance=None,
    condition: Any = None,
    sigma_y: float | None = None,
    callback: Callable[[dict], None] | None = None,
) -> torch.Tensor:
    """Sample (x, z) ~ p(y | z) p(x) exp(-||x - z||^2 / 2 rho^2) by drawing z and x in turn, with rho falling

    from rho_max to rho_min by `decay`. Both draws are exact but for the steps of the diffusion, so the x of the last
    ones follow p(x | y) as rho goes to 0: the bias is that of rho_min, not that of an approximate likelihood.

    prior: a backbone of the image's size, in pixels. operator: a linear one (see operators.prox_l2).
    y: measurement (B, ...). noise: as restore.samplers.dps.dps takes it, kinds "start", "latent" (counting network
        evaluations), "posterior" and "measurement" (counting iterations).
    steps: times from which the reverse diffusion of each iteration takes those less noisy than rho ("karras:100").
    eta: of its DDIM steps, 1 being the stochastic ones. guidance: of its eps.
    sigma_y: None: that of the operator's noise. Below SIGMA_MIN that is taken.
    callback: as restore.samplers.dps.dps takes it, called after every iteration: x_t is z, x0_hat is x.
    Returns images (B, 3, H, W), not clamped. Raises RestoreError where y = A x + n is not linear and Gaussian.
    """
    sigma_y = max(require_linear_gaussian("pnpdm", prior, operator, sigma_y), SIGMA_MIN)
    if not (iterations >= 1 and 0 < rho_min <= rho_max and 0 < decay <= 1):
        raise RestoreError("pnpdm needs iterations >= 1, 0 < rho_min <= rho_max and 0 < decay <= 1")
    prior = variance_preserving(prior)
    times = prior.schedule.timesteps(steps)
    x, evaluations = noise(0, (len(y), *prior.shape), "start"), 0
    with estimator(prior, guidance) as estimate:
        for k in range(iterations):
            rho = max(rho_max * decay**k, rho_min)

            # z ~ p(z | x, y), Gaussian: the optimum of its own density for perturbed data (perturb and optimise).
            x = x + rho * noise(k, x.shape, "posterior")
            z = operators.prox_l2(operator, x, y + sigma_y * noise(k, y.shape, "measurement"), (rho / sigma_y) ** 2)

            # x ~ p(x | z): what a diffusion that has arrived at alpha z goes on to, where sigma / alpha = rho.
            first = prior.schedule.t(rho)
            visited = levels(prior.schedule, [first, *(t for t in times if t < first)])
            x_t = visited[0][1] * z
            for (t, alpha, sigma), (_, alpha_s, sigma_s) in pairwise(visited):
                _, eps = estimate(x_t, t, condition)
                c1 = eta * ((1 - (alpha / alpha_s) ** 2) ** 0.5 * sigma_s / sigma)
                c2 = max(sigma_s**2 - c1**2, 0.0) ** 0.5
                x_t = alpha_s * (x_t - sigma * eps) / alpha + c2 * eps
                x_t = x_t + c1 * noise(evaluations, x_t.shape, "latent") if c1 else x_t
                evaluations += 1
            x = x_t
            require_finite(x, k, f"rho_max={rho_max:g}")
            report(callback, k, iterations, first, operator, y, x, x_t=z, eps=eps)
    return prior.decode(x)
