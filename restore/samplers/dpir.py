"""DPIR: plug-and-play restoration by half-quadratic splitting (Zhang et al. 2021, Algorithm 1), and the posterior mean
of plain noise, which is its single step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

import operators
from operators import RestoreError
from operators.validate import require_number
from restore.backbones.base import Backbone, variance_preserving
from restore.guidance import estimator
from restore.samplers.steps import report, require_finite, require_linear_gaussian, start

SIGMA_MIN = 0.01  # the last denoising level at least: below it a network trained with noise has nothing to say


@torch.no_grad()
def dpir(
    prior: Backbone,
    operator,
    y: torch.Tensor,
    *,
    noise: Callable[..., torch.Tensor],
    steps: int | str | Sequence[float],
    lam: float = 0.23,
    sigma_max: float = 0.384,
    guidance=None,
    condition: Any = None,
    sigma_y: float | None = None,
    clip: bool | None = None,
    callback: Callable[[dict], None] | None = None,
) -> torch.Tensor:
    """One estimate of x_0 given y, near the mean of what is probable: it draws nothing, so that all samples are equal.

    At noise levels sigma_k from sigma_max down to sigma_y, evenly spaced in log, and from z = y (where A keeps the
    image's size; else a linear reconstruction) on,

        x = argmin ||y - A x||^2 + rho ||x - z||^2,  rho = lam (sigma_y / sigma_k)^2      (eq. 6a)
        z = x0_hat of the network, with x as its input of noise level sigma_k             (eq. 6b)

    Where A is the identity, one step at sigma_y is Tweedie's formula: z = E[x_0 | y], of all estimates the one with the
    least squared error, as far as the network is right.

    prior: a backbone of the image's size, in pixels. operator: a linear one (see operators.prox_l2).
    y: measurement (B, ...). steps: the number of levels; 1 is sigma_y alone. noise: not used, but where A changes the
    image's size, kind "start", times 0. callback: as restore.samplers.dps.dps takes it.
    lam: the paper's lambda. sigma_max: on [-1, 1]; the paper has 49 / 255 on [0, 1]. Where the largest trained level
        is smaller, that is taken.
    guidance: the guided eps makes z. sigma_y: None: that of the operator's noise. The last level is at least SIGMA_MIN.
    clip: clamp x0_hat to [-1, 1]; None: where the prior's x_0 lies there.
    Returns images (B, 3, H, W), not clamped. Raises RestoreError where y = A x + n is not linear and Gaussian, and for
    steps that are no number.
    """
    sigma_y = require_linear_gaussian("dpir", prior, operator, sigma_y)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise RestoreError(f"steps={steps}: dpir takes a number of noise levels, at least 1")
    prior = variance_preserving(prior)
    clip = prior.bounded if clip is None else clip
    last = max(sigma_y, SIGMA_MIN)
    first = last if steps == 1 else max(last, require_number(sigma_max, "sigma_max", low=0.0))
    if y.shape[-3:] == tuple(prior.shape):
        z = y
    else:
        z = start("measurement", prior, operator, y, sigma_y, 1.0, 0.0, y.new_zeros(len(y), *prior.shape))
    with estimator(prior, guidance) as estimate:
        for k, level in enumerate(np.geomspace(first, last, steps)):
            # Data: the image nearest to z that explains y; exact measurements are met as if their noise were small.
            rho = lam * max(sigma_y / float(level), 1e-3) ** 2
            x = operators.prox_l2(operator, z, y, 1 / rho, rough=True)

            # Prior: x as a noisy image, whose clean estimate is the next z.
            t = prior.schedule.t(float(level))
            alpha, sigma = prior.schedule.alpha(t), prior.schedule.sigma(t)
            _, eps = estimate(alpha * x, t, condition)
            z = x - sigma / alpha * eps
            z = z.clamp(-1, 1) if clip else z
            require_finite(z, k, f"lam={lam:g}")
            report(callback, k, steps, t, operator, y, z, x_t=alpha * x, eps=eps)
    return z
