"""Diffusion models as plug-and-play priors in a split Gibbs sampler (PnP-DM, Wu et al. 2024, Algorithm 1)."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

import torch

import operators
from operators import RestoreError, find_noise
from operators.ranges import Count, NonNegative, Positive, Range, Share, enforce_ranges
from restore.backbones.base import normalise
from restore.guidance import estimator
from restore.samplers.likelihood import SIGMA_Y_FLOOR, require_linear_gaussian
from restore.samplers.steps import FiniteCheck, levels, report


@enforce_ranges
@torch.no_grad()
def pnpdm(
    prior,
    operator,
    y,
    *,
    noise,
    steps,
    guidance=None,
    condition=None,
    callback=None,
    iterations: Count = 100,
    rho_max: Positive = 10.0,
    rho_min: Positive = 0.3,
    decay: Annotated[float, Range(above=0, high=1)] = 0.9,
    eta: Share = 1.0,
    sigma_y: NonNegative | None = None,
) -> torch.Tensor:
    """Sample (x, z) ~ p(y | z) p(x) exp(-||x - z||^2 / 2 rho^2) by drawing z and x in turn, while rho falls by `decay`
    from rho_max to rho_min.

    Both draws are exact up to the discretisation of the diffusion, so x follows p(x | y) as rho goes to 0. The
    arguments of all samplers are in `restore.samplers`; sigma_y is at least SIGMA_Y_FLOOR.

    prior: in pixels. operator: a linear one (see operators.prox_l2).
    noise: "latent" counts network evaluations; also "posterior" and "measurement", counting iterations.
    steps: times from which the reverse diffusion of each iteration takes those less noisy than rho ("karras:100").
    eta: of its DDIM steps, 1 being stochastic. guidance: of its eps.
    callback: after every iteration; x_t is z.
    """
    sigma_y = max(require_linear_gaussian("pnpdm", prior, operator, sigma_y), SIGMA_Y_FLOOR)
    if hasattr(find_noise(operator), "prox_l2"):
        raise RestoreError(f"pnpdm needs white noise, got {find_noise(operator)!r}; try diffpir")
    if rho_min > rho_max:
        raise RestoreError(f"rho_min must be at most rho_max, {rho_max:g}, got {rho_min:g}")
    prior = normalise(prior, "vp")
    times = prior.schedule.timesteps(steps)
    x, evaluations = noise(0, (len(y), *prior.shape), "start"), 0
    check_finite = FiniteCheck(iterations)
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
            check_finite(x, k, f"rho_max={rho_max:g}")
            report(callback, k, iterations, first, x_t=z, x0_hat=x, eps=eps, operator=operator, y=y)
    return prior.decode(x)
