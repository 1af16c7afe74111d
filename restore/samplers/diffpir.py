"""DiffPIR: denoising diffusion models for plug-and-play image restoration (Zhu et al. 2023, Algorithm 1)."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch

import operators
from operators.ranges import NonNegative, Positive, Share, enforce_ranges
from restore.backbones.base import normalise
from restore.guidance import estimator
from restore.samplers.consistency import check_decoder_sigma, decode_consistently, encode_change
from restore.samplers.likelihood import require_linear_gaussian
from restore.samplers.steps import FiniteCheck, Momentum, Start, initialise, levels, report

AUTHORS_SIGMA_Y_FLOOR = 0.002  # of the authors' code, 0.001 on [0, 1]


@enforce_ranges
@torch.no_grad()
def diffpir(
    prior,
    operator,
    y,
    *,
    noise,
    steps,
    guidance=None,
    condition=None,
    callback=None,
    lam: Positive = 1.75,
    zeta: Share = 0.3,
    sigma_y: NonNegative | None = None,
    start_from: Start = "noise",
    decoder_sigma: NonNegative = 0.0,
    clip: bool | None = None,
    dual: bool = False,
    prox: Literal["diffpir", "flower"] = "diffpir",
    lamp: NonNegative = 0.0,
) -> torch.Tensor:
    """Sample x_0 ~ p(x_0 | y) approximately: every step replaces x0_hat by the nearest point that explains y,

        x0 = argmin ||y - A x||^2 + rho ||x - x0_hat||^2,  rho = lam sigma_y^2 / (sigma / alpha)^2,

    and goes on from x0 with the noise that it implies, without a gradient of the network. On latents the data step is
    taken in the decoded image, and its change encoded. The authors' code returns the x that enters its last step, not
    that step's x0. sigma_y is at least AUTHORS_SIGMA_Y_FLOOR. The arguments of all samplers are in `restore.samplers`.

    operator: a linear one (see operators.prox_l2). guidance: makes x0_hat, hence the data step and the implied noise.
    steps, start_from: "quad:N", denser at the clean end, and "measurement" are the authors'.
    lam: lambda with sigma_y on [-1, 1]. The authors state sigma_y on [0, 1], which makes theirs 4 lam.
    zeta: share of fresh noise.
    dual: with the dual variable of dual ascent diffusion (2025, arXiv 2505.17353): u adds up x0 - x0_hat, in units of
        the noise's variance (ours), the proximal step is at x0_hat - u, and x goes on from x0 + u.
    prox: "flower" has x0_hat's variance if x_0 is white, sigma^2 / (alpha^2 + sigma^2), in place of (sigma / alpha)^2
        (Flower, 2026; with lam = zeta = 1). lamp: see `steps.Momentum`.
    """
    sigma_y = max(require_linear_gaussian("diffpir", prior, operator, sigma_y, latents=True), AUTHORS_SIGMA_Y_FLOOR)
    check_decoder_sigma(prior, decoder_sigma)
    prior = normalise(prior, "vp")
    clip = prior.bounded if clip is None else clip
    visited = levels(prior.schedule, steps)
    n = noise(0, (len(y), *prior.shape), "start")
    x_t = initialise(start_from, prior, operator, y, sigma_y, visited[0], n)
    u, momentum = 0.0, Momentum(lamp)
    check_finite = FiniteCheck(len(visited) - 1)
    with estimator(prior, guidance) as estimate:
        for k, ((t, alpha, sigma), (_, alpha_s, sigma_s)) in enumerate(pairwise(visited)):
            # Prior: the guided clean estimate.
            _, eps = estimate(x_t, t, condition)
            x0_hat = (x_t - sigma * eps) / alpha
            x0_hat = x0_hat.clamp(-1, 1) if clip else x0_hat

            # Data: the proximal step (eq. 13), 1 / rho being the weight of the data term.
            rho = lam * (sigma_y * (alpha if prox == "diffpir" else (alpha**2 + sigma**2) ** 0.5) / sigma) ** 2
            z = x0_hat - u if dual else x0_hat
            image = prior.decode(z)
            x0 = encode_change(prior, z, image, operators.prox_l2(operator, image, y, 1 / rho, rough=True))
            x0 = momentum(x0, (alpha, sigma), (alpha_s, sigma_s))

            # The noise that x0 implies, partly replaced by fresh noise (eq. 14).
            eps_hat = (x_t - alpha * x0) / sigma
            x_t = alpha_s * x0
            if sigma_s:
                n = noise(k, x_t.shape, "latent") if zeta else 0.0
                x_t = x_t + sigma_s * ((1 - zeta) ** 0.5 * eps_hat + zeta**0.5 * n)
            if dual and sigma_s:
                x_t, u = x_t + alpha_s * u, (u + x0 - x0_hat) * (sigma_s * alpha / (alpha_s * sigma)) ** 2
            check_finite(x_t, k, f"lam={lam:g}")
            shown = prior.decode(x0_hat) if dual else image
            report(callback, k, len(visited) - 1, t, x_t=x_t, x0_hat=shown, eps=eps, operator=operator, y=y)
    return decode_consistently(prior, operator, y, x_t, sigma_y, decoder_sigma)
