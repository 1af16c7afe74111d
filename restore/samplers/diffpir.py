"""DiffPIR: denoising diffusion models for plug-and-play image restoration (Zhu et al. 2023, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

import operators
from restore.backbones.base import Backbone, variance_preserving
from restore.guidance import estimator
from restore.samplers.steps import (
    decoded,
    decoder_error,
    follow,
    levels,
    report,
    require_finite,
    require_linear_gaussian,
    start,
)

SIGMA_MIN = 0.002  # the authors' floor of sigma_y, 0.001 on [0, 1]


@torch.no_grad()
def diffpir(
    prior: Backbone,
    operator,
    y: torch.Tensor,
    *,
    noise: Callable[..., torch.Tensor],
    steps: int | str | Sequence[float],
    lam: float = 1.75,
    zeta: float = 0.3,
    guidance=None,
    condition: Any = None,
    sigma_y: float | None = None,
    start_from: str = "noise",
    decoder_sigma: float = 0.0,
    clip: bool | None = None,
    callback: Callable[[dict], None] | None = None,
) -> torch.Tensor:
    """Sample x_0 ~ p(x_0 | y) approximately: every step replaces x0_hat by the point nearest to it that explains y,

        x0 = argmin ||y - A x||^2 + rho ||x - x0_hat||^2,  rho = lam sigma_y^2 / (sigma / alpha)^2,

    and goes on from x0 with the noise that it implies. No gradient of the network is taken.

    On latents the data step is taken in the image that x0_hat decodes to, and its change encoded.

    prior: a backbone of the image's size. operator: a linear one (see operators.prox_l2).
    y: measurement (B, ...). noise, steps, callback: as restore.samplers.dps.dps takes them; noise kinds "start" and
        "latent". "quad:N" are the authors' steps, denser at the clean end.
    lam: lambda with sigma_y on [-1, 1]. The authors state sigma_y on [0, 1], which makes theirs 4 lam.
    zeta: share of fresh noise, 0 to 1.
    guidance: the guided eps makes x0_hat, hence both the data step and the implied noise.
    sigma_y: None: that of the operator's noise. Below SIGMA_MIN that is taken.
    start_from: "noise", or "measurement" as in the authors' code (see restore.samplers.steps.start).
    decoder_sigma: on latents, of the last image's data step in pixels (see restore.samplers.steps.decoded); 0: none.
    clip: clamp x0_hat to [-1, 1]; None: where the prior's x_0 lies there.
    The authors' code returns the x that enters its last step instead of that step's x0.
    Returns images (B, 3, H, W), not clamped. Raises RestoreError where y = A x + n is not linear and Gaussian.
    """
    sigma_y = max(require_linear_gaussian("diffpir", prior, operator, sigma_y, latents=True), SIGMA_MIN)
    decoder_sigma = decoder_error(prior, decoder_sigma)
    prior = variance_preserving(prior)
    clip = prior.bounded if clip is None else clip
    visited = levels(prior.schedule, steps)
    x_t = start(start_from, prior, operator, y, sigma_y, *visited[0][1:], noise(0, (len(y), *prior.shape), "start"))
    with estimator(prior, guidance) as estimate:
        for k, ((t, alpha, sigma), (_, alpha_s, sigma_s)) in enumerate(pairwise(visited)):
            # Prior: the guided clean estimate.
            _, eps = estimate(x_t, t, condition)
            x0_hat = (x_t - sigma * eps) / alpha
            x0_hat = x0_hat.clamp(-1, 1) if clip else x0_hat

            # Data: the proximal step (eq. 13), 1 / rho being the weight of the data term.
            rho = lam * (sigma_y * alpha / sigma) ** 2
            image = prior.decode(x0_hat)
            x0 = follow(prior, x0_hat, image, operators.prox_l2(operator, image, y, 1 / rho, rough=True))

            # The noise that x0 implies, partly replaced by fresh noise (eq. 14).
            eps_hat = (x_t - alpha * x0) / sigma
            x_t = alpha_s * x0
            if sigma_s:
                n = noise(k, x_t.shape, "latent") if zeta else 0.0
                x_t = x_t + sigma_s * ((1 - zeta) ** 0.5 * eps_hat + zeta**0.5 * n)
            require_finite(x_t, k, f"lam={lam:g}")
            report(callback, k, len(visited) - 1, t, operator, y, image, x_t=x_t, eps=eps)
    return decoded(prior, operator, y, x_t, sigma_y, decoder_sigma)
