"""Posterior Sampling with Latent Diffusion (PSLD, Rout et al. 2023, Algorithm 2) with guided scores."""

from __future__ import annotations

from typing import Literal

import torch

import operators
from operators import RestoreError
from operators.ranges import NonNegative, Share, enforce_ranges
from restore.backbones.base import normalise
from restore.guidance import estimator
from restore.samplers.consistency import check_decoder_sigma, decode_consistently
from restore.samplers.likelihood import l2_norm, require_linear, require_linear_gaussian
from restore.samplers.steps import FiniteCheck, alpha_bars, ldm_timesteps, report


@enforce_ranges
def psld(
    prior,
    operator,
    y,
    *,
    noise,
    steps,
    guidance=None,
    condition=None,
    callback=None,
    eta: NonNegative,
    gamma: NonNegative,
    ddim_eta: Share = 0.0,
    measurement_noise: bool = False,
    encoding: Literal["mean", "sample"] = "mean",
    index_shift: bool = False,
    decoder_sigma: NonNegative = 0.0,
) -> torch.Tensor:
    """Sample z_0 with decode(z_0) ~ p(x_0 | y) approximately; DDIM steps, each followed by a step of size 1 down

        eta ||y - A(D(z0_hat))|| + gamma ||z0_hat - E(A^T y + (I - A^T A) D(z0_hat))||,

    norms per image and not squared. The arguments of all samplers are in `restore.samplers`.

    operator: anything with differentiable `A` and `A_adjoint`. noise: also of kind "measurement" and "posterior".
    steps: a number as `restore.samplers.steps.ldm_timesteps` takes it, or the times to visit.
    eta, gamma: steps of the data and of the gluing term. gamma = 0 is "latent DPS", which does not run the encoder.
    guidance: of the update; the loss sees the unguided z0_hat (PAG, Ahn et al. 2024, App. A.3).
    ddim_eta: DDIM's sigma; 0 is deterministic and draws no latent noise.
    measurement_noise: add the operator's Gaussian noise to A(D(z0_hat)) at every step. encoding: "mean" or "sample" of
        the encoder's posterior. index_shift: count steps as the authors, and if every training step is visited, take
        alpha_bar at t - 1. These three reproduce the authors' code (`reference` in configs/method/psld.yaml).
    decoder_sigma: 0 is the paper's; else for a linear A and Gaussian noise.
    callback: also z0_hat, gradient, and glue, the second norm (B,).
    """
    sigma_y = getattr(operators.find_noise(operator), "sigma", None) if measurement_noise else 0.0
    if sigma_y is None:
        raise RestoreError("measurement_noise must be False for an operator without Gaussian noise, got True")
    check_decoder_sigma(prior, decoder_sigma)
    level = 0.0
    if decoder_sigma:
        level = require_linear_gaussian("psld with decoder_sigma", prior, operator, None, latents=True)
    if gamma:
        require_linear("psld", operator, " unless gamma=0", "fastdips")
    prior = normalise(prior, "vp")
    timesteps = ldm_timesteps(prior.schedule, steps, reference=index_shift)
    alpha_bar, alpha_bar_prev = alpha_bars(prior.schedule, timesteps, shift=index_shift)
    z_t = noise(0, (len(y), *prior.shape), "start")
    check_finite = FiniteCheck(len(timesteps))
    with estimator(prior, guidance) as estimate:
        for k, t in enumerate(timesteps):
            a, a_prev = alpha_bar[k], alpha_bar_prev[k]

            # Score: a pass with a graph for the likelihood.
            z_t = z_t.detach().requires_grad_()
            strong = estimate.strong(z_t, t, condition)

            # Likelihood: the decoded estimate must explain y, and survive being glued to y and encoded.
            z0_hat = (z_t - (1 - a) ** 0.5 * strong.eps) / a**0.5
            x0_hat = prior.decode(z0_hat)
            y_hat = operator.A(x0_hat)
            predicted = y_hat + sigma_y * noise(k, y.shape, "measurement") if measurement_noise else y_hat
            residual = l2_norm(y - predicted, y)
            glue = torch.zeros_like(residual)
            if gamma:
                x_glued = x0_hat + operator.A_adjoint(y) - operator.A_adjoint(y_hat)
                n = noise(k, z_t.shape, "posterior") if encoding == "sample" else None
                glue = l2_norm(z0_hat - prior.encode(x_glued, n), y)
            (gradient,) = torch.autograd.grad((eta * residual + gamma * glue).sum(), z_t)

            # Prior: DDIM with the guided score (Song et al. 2021, eq. 12), then the likelihood step.
            with torch.no_grad():
                eps = estimate.guided(strong, z_t, t, condition)
                sigma_t = ddim_eta * ((1 - a_prev) / (1 - a)) ** 0.5 * (1 - a / a_prev) ** 0.5
                z0_guided = (z_t - (1 - a) ** 0.5 * eps) / a**0.5
                z_next = a_prev**0.5 * z0_guided + max(1 - a_prev - sigma_t**2, 0.0) ** 0.5 * eps
                if sigma_t:
                    z_next = z_next + sigma_t * noise(k, z_t.shape, "latent")
                z_t = z_next - gradient
            check_finite(z_t, k, f"eta={eta:g}, gamma={gamma:g}")
            state = {"x_t": z_t, "x0_hat": x0_hat, "z0_hat": z0_hat, "eps": eps, "gradient": gradient}
            report(callback, k, len(timesteps), t, **state, residual=residual, glue=glue)
    with torch.no_grad():
        return decode_consistently(prior, operator, y, z_t.detach(), level, decoder_sigma)
