"""Decoupled Annealing Posterior Sampling (DAPS and LatentDAPS, Zhang et al. 2025, Algorithms 1 and 2)."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

import torch

from operators import RestoreError
from operators.ranges import Count, Positive, Range, Share, enforce_ranges
from restore.guidance import estimator
from restore.samplers.likelihood import DataNorm, find_data_norm, likelihood_variance
from restore.samplers.steps import FiniteCheck, annealing_levels, report, rho_grid


@enforce_ranges
def daps(
    prior,
    operator,
    y,
    *,
    noise,
    steps,
    guidance=None,
    condition=None,
    callback=None,
    sigma_max: Positive = 100.0,
    sigma_min: Positive = 0.1,
    ode_steps: Count = 5,
    ode_sigma_min: Positive = 0.01,
    mcmc_steps: Annotated[int, Range(0)] = 100,
    lr: Positive = 1e-4,
    lr_min_ratio: Share = 0.01,
    tau: Positive | None = 0.01,
    momentum: Annotated[float, Range(0, below=1)] = 0.0,
    conditional: Literal["gaussian", "exact"] = "gaussian",
    data_norm: DataNorm | None = None,
    latent_clamp: Positive | None = None,
) -> torch.Tensor:
    """Sample x_0 ~ p(x_0 | y) approximately: at every noise level sigma_k, in coordinates x = x_0 + sigma n,

        x0_hat   the end of the probability-flow ODE from x_k, `ode_steps` Euler steps on the (guided) score
        x0_y     a sample of exp(-||y - A(x_0)||² / tau²) N(x_0; x0_hat, sigma_k²), by `mcmc_steps` Langevin steps
        x_{k+1} = x0_y + sigma_{k+1} n.

    The network is not differentiated. On latents (LatentDAPS) A(decode(x)) replaces A(x). The arguments of all samplers
    are in `restore.samplers`.

    operator: a differentiable `A`, linear or not. noise: "latent" makes x_k; also "langevin" and "velocity".
    steps: how many levels sigma_k, between sigma_max (at most the trained one) and sigma_min with rho = 7 (Karras et
        al. 2022, eq. 5), or the times of the levels. Network evaluations: steps · ode_steps, twice that if guided.
    ode_steps, ode_sigma_min: the grid of the ODE, rho = 7 too; it ends at ode_sigma_min without a last denoising.
    mcmc_steps, lr, lr_min_ratio: Langevin steps, their size at the first level, and the factor to which it falls
        linearly by the last. A step is stable if lr (2 s² / tau² + 1 / sigma_k²) < 2, s the norm of A.
    tau: the likelihood's standard deviation is tau / sqrt(2) on [-1, 1]; the published 0.01 belongs to sigma_y = 0.05.
        None: from the operator's noise, which makes it the true likelihood.
    momentum: of the Langevin steps; above 0 they are the Hamiltonian Monte Carlo of the authors' code.
    conditional: "gaussian", as above, or "exact": the score at ode_sigma_min and N(x_k; x_0, sigma_k²) take the place
        of N(x_0; x0_hat, sigma_k²). Exact in the limit of many Langevin steps; one more evaluation for each.
    latent_clamp: on latents, largest entry of the data term's gradient before the division by tau² (the authors': 1).
    callback: also z0_hat and z0_y, not decoded; eps is the ODE's first, residual x0_y's, `used` has tau and sigma_max.
    """
    schedule, norm, variance = prior.schedule, find_data_norm(operator, data_norm), likelihood_variance(operator, tau)
    sigma_max = min(sigma_max, float(schedule.ratios[-1]))
    if max(sigma_min, ode_sigma_min) > sigma_max:
        given = f"{sigma_min:g} and {ode_sigma_min:g}"
        raise RestoreError(f"sigma_min and ode_sigma_min must be at most sigma_max, {sigma_max:g}, got {given}")
    sigmas = annealing_levels(schedule, steps, sigma_max, sigma_min)
    shape = (len(y), *prior.shape)
    x = sigmas[0] * noise(0, shape, "start")

    def data_gradient(x0: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x0 = x0.detach().requires_grad_()
            loss = norm(y - operator.A(prior.decode(x0)), y).square().sum()
            (gradient,) = torch.autograd.grad(loss, x0)
        clamped = latent_clamp is not None and prior.downscale > 1
        return gradient.clamp(-latent_clamp, latent_clamp) if clamped else gradient

    check_finite = FiniteCheck(len(sigmas) - 1)
    with torch.no_grad(), estimator(prior, guidance) as estimate:

        def predict_noise(x: torch.Tensor, sigma: float) -> torch.Tensor:
            t = schedule.t(sigma)
            return estimate(schedule.alpha(t) * x, t, condition)[1]

        for k, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            # Prior: dx / dsigma = eps down to ode_sigma_min.
            x0_hat, eps = x, None
            for s, s_next in pairwise(rho_grid(sigma, ode_sigma_min, ode_steps)):
                slope = predict_noise(x0_hat, s)
                x0_hat, eps = x0_hat + (s_next - s) * slope, slope if eps is None else eps

            # Likelihood: Langevin steps, from x0_hat.
            step = lr * (1 + k / len(sigmas) * (lr_min_ratio - 1))
            x0_y, v = x0_hat, noise(k, shape, "velocity") if momentum else 0.0
            for j in range(mcmc_steps):
                score = (x0_hat - x0_y) / sigma**2
                if conditional == "exact":
                    score = (x - x0_y) / sigma**2 - predict_noise(x0_y, ode_sigma_min) / ode_sigma_min
                score = score - data_gradient(x0_y) / variance
                n = noise(k * mcmc_steps + j, shape, "langevin")
                v = momentum * v + step**0.5 * score + (2 * (1 - momentum)) ** 0.5 * n
                x0_y = x0_y + step**0.5 * v
            x = x0_y + sigma_next * noise(k, shape, "latent") if sigma_next else x0_y
            check_finite(x, k, f"lr={lr:g}, tau={variance**0.5:g}")
            state = {"x_t": x, "x0_hat": prior.decode(x0_hat), "z0_hat": x0_hat, "z0_y": x0_y, "eps": eps}
            state["residual"] = norm(y - operator.A(prior.decode(x0_y)), y)
            used = {"tau": variance**0.5, "sigma_max": sigmas[0]}
            report(callback, k, len(sigmas) - 1, schedule.t(sigma), **state, used=used)
        return prior.decode(x)
