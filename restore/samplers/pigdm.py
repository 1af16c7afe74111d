"""Pseudoinverse-guided diffusion models (PiGDM, Song et al. 2023)."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch

import operators
from operators.ranges import NonNegative, Positive, Share, enforce_ranges
from restore.backbones.base import normalise
from restore.guidance import estimator
from restore.samplers.likelihood import SIGMA_Y_FLOOR, require_linear_gaussian
from restore.samplers.steps import FiniteCheck, Start, initialise, levels, report


@enforce_ranges
def pigdm(
    prior,
    operator,
    y,
    *,
    noise,
    steps,
    guidance=None,
    condition=None,
    callback=None,
    eta: Share = 1.0,
    weight: NonNegative = 1.0,
    sigma_y: NonNegative | None = None,
    prior_variance: Positive = 1.0,
    gradient: Literal["added", "score"] = "added",
    start_from: Start = "noise",
    clip: bool | None = False,
) -> torch.Tensor:
    """Sample x_0 ~ p(x_0 | y) approximately, with p(x_0 | x_t) taken as N(x0_hat, r^2 I): DDIM steps of the gradient

        g = (d x0_hat / d x_t)^T A^T (A A^T + sigma_y^2 / r^2 I)^-1 (y - A x0_hat)                        (eq. 7)

    The arguments of all samplers are in `restore.samplers`. With sigma_y 0 the inverse is the pseudo-inverse, up to its
    rounding; clip is of both x0_hat, g's and the step's.

    prior: in pixels. operator: a linear one (see operators.prox_l2).
    eta: of DDIM. weight: of g. guidance: of the DDIM step; g sees the unguided x0_hat, as in DPS with PAG.
    prior_variance: c of r^2 = c sigma^2 / (sigma^2 + c alpha^2), the paper's being 1.
    gradient: "added": alpha_s alpha_t g is added to the DDIM step (Algorithm 1, as its implementations scale it).
        "score": grad log p(y | x_t) = g / r^2 is a part of the score, in x0_hat and eps alike; exact in the limit of
        many steps if the prior is N(m, c I), but a trained network, inexact at the noisiest times, needs clip=True.
    """
    sigma_y = require_linear_gaussian("pigdm", prior, operator, sigma_y)
    prior = normalise(prior, "vp")
    clip = prior.bounded if clip is None else clip
    visited = levels(prior.schedule, steps)
    n = noise(0, (len(y), *prior.shape), "start")
    x_t = initialise(start_from, prior, operator, y, sigma_y, visited[0], n)
    check_finite = FiniteCheck(len(visited) - 1)
    with estimator(prior, guidance) as estimate:
        for k, ((t, alpha, sigma), (_, alpha_s, sigma_s)) in enumerate(pairwise(visited)):
            # Score: a pass with a graph for the likelihood.
            x_t = x_t.detach().requires_grad_()
            strong = estimate.strong(x_t, t, condition)
            x0_hat = (x_t - sigma * strong.eps) / alpha
            x0_hat = x0_hat.clamp(-1, 1) if clip else x0_hat

            # Likelihood: the residual, pulled back through the network.
            r2 = prior_variance * sigma**2 / (sigma**2 + prior_variance * alpha**2)
            with torch.no_grad():
                residual = y - operator.A(x0_hat)
                gamma = 1 / max(sigma_y**2 / r2, SIGMA_Y_FLOOR**2)
                v = operators.prox_l2(operator, torch.zeros_like(x0_hat), residual, gamma)
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
                check_finite(x_t, k, f"weight={weight:g}")
                report(callback, k, len(visited) - 1, t, x_t=x_t, x0_hat=x0_hat, eps=eps, operator=operator, y=y)
    return prior.decode(x_t.detach())
